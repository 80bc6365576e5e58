"""The counts of a scheduler's process, in what SGLang tells about its state.

``Engine.get_server_info()`` and ``GET /server_info`` then have them in ``internal_states``, under
``fi_backend``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from .counters import stats

_PATCHED = "_fi_backend_patched"


def report_stats() -> None:
    """Add the counts to the answers of this process's scheduler. Idempotent."""
    module = sys.modules.get("sglang.srt.managers.scheduler")
    if module is None:  # a model runner without a scheduler, as in SGLang's benchmarks
        return
    stock = module.Scheduler.get_internal_state
    if hasattr(stock, _PATCHED):
        return

    @functools.wraps(stock)
    def get_internal_state(scheduler: Any, request: Any) -> Any:
        answer = stock(scheduler, request)
        answer.internal_state["fi_backend"] = stats().as_dict()
        return answer

    setattr(get_internal_state, _PATCHED, True)
    module.Scheduler.get_internal_state = get_internal_state
