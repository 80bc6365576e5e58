"""Names under which vLLM finds us, in every one of its processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig

from fi_backend.integrations.vllm import OWN_NAME, register, selection

ROOT = Path(__file__).parents[2]
STOCK = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
PLAIN = AttentionSelectorConfig(64, torch.float32, "auto", None)


@pytest.fixture(autouse=True)
def registered() -> None:
    register()
    register()  # vLLM calls it several times


def selected(name: str) -> str:
    backend = AttentionBackendEnum[name]
    return str(current_platform.get_attn_backend_cls(backend, attn_selector_config=PLAIN))


@pytest.mark.parametrize("name", ["CUSTOM", OWN_NAME])
def test_a_name_of_ours_reaches_us_on_the_cpu(name: str) -> None:
    assert selected(name).startswith("fi_backend.integrations.vllm.backend.")
    backend = AttentionBackendEnum[name].get_class()
    assert backend.get_name() == name, "the engine looks the member up by this name"


def test_other_names_keep_vllms_attention() -> None:
    assert selected("CPU_ATTN") == STOCK
    assert selected("FLASH_ATTN") == STOCK
    chosen = current_platform.get_attn_backend_cls(None, attn_selector_config=PLAIN)
    assert chosen == STOCK


def test_a_custom_backend_of_somebody_else_is_not_taken_over() -> None:
    register_backend(AttentionBackendEnum.CUSTOM, "elsewhere.Backend")
    assert selected("CUSTOM") == STOCK  # the CPU platform's own answer


def test_selection_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def record(text: str, *args: Any) -> None:
        lines.append(text % args)

    monkeypatch.setattr(selection.logger, "info", record)
    selection._announce.cache_clear()
    for _ in range(3):
        selected("CUSTOM")
    assert lines == [
        "fi_backend serves attention on the CPU, as selected by attention backend CUSTOM"
    ]


def test_our_member_unpickles_in_a_process_that_has_not_registered() -> None:
    payload = pickle.dumps(AttentionBackendEnum[OWN_NAME]).hex()
    code = f"import pickle; print(pickle.loads(bytes.fromhex({payload!r})).get_class().get_name())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "VLLM_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[-1:] == [OWN_NAME], done.stderr


def test_other_members_pickle_as_before() -> None:
    member = AttentionBackendEnum.FLASH_ATTN
    assert pickle.loads(pickle.dumps(member)) is member
    assert b"fi_backend" not in pickle.dumps(member)


def test_the_package_declares_the_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {
        "fi_backend": "fi_backend.integrations.vllm:register"
    }
