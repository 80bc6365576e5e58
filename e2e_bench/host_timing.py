"""Times on the host: what a call costs that only enqueues work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from e2e_bench import report

HOST_CALLS = 1000
# Calls between synchronisations: the launch queue holds about a thousand, a full one blocks.
QUEUE = 50


def host_times(call: Callable[[], object], calls: int = HOST_CALLS) -> list[float]:
    """Return µs of host time of each call, the stream kept short."""
    times = []
    for i in range(calls):
        if i % QUEUE == 0:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return times


def host_row(workload: str, impl: str, call: Callable[[], object], calls: int) -> report.Row:
    """Return the row of ten medians: single calls now and then wait for the system."""
    share = max(calls // 10, 1)
    host_times(call, share)  # warm
    return report.Row.of_times(
        workload, impl, [statistics.median(host_times(call, share)) for _ in range(10)]
    )
