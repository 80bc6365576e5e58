"""Without a server the runtime context has no settings: the runner's own stand for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fi_backend.integrations.sglang import backend, limits, support


@pytest.fixture(autouse=True)
def settings_of_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    def setting(runner: Any, group: str, name: str) -> Any:
        settings: SimpleNamespace = runner.settings
        return getattr(settings, name)

    for module in (limits, backend, support):
        monkeypatch.setattr(module, "setting", setting)
