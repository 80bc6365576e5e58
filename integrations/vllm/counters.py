"""What the adapter did in this process. Tests assert on it that vLLM really ran our attention."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.counters import Counts
from .sharing import shared_reads


@dataclass(kw_only=True)
class Stats(Counts):
    """Counts since the process started or since ``reset_stats``.

    Attributes:
        steps: metadata builds, one per KV cache group and model step.
        decode_steps: those of them planned for the kernel of decode steps.
        planned_requests: requests summed over builds.
        planned_tokens: query tokens summed over builds.
        forwards: attention layers run by Python; a replayed CUDA graph does not count.
        profiling_forwards: layers asked to run without a batch (memory profiling, warm-up).
        appended_tokens: slots handed to KV cache writes by Python, summed over layers.
    """

    steps: int = 0
    decode_steps: int = 0
    planned_requests: int = 0
    planned_tokens: int = 0
    forwards: int = 0
    profiling_forwards: int = 0
    appended_tokens: int = 0


counts = Stats()


def stats() -> Stats:
    """Return a copy of this process's counts; on a GPU this waits for the device."""
    return counts.copy_with(shared_reads)


def reset_stats() -> None:
    """Set all counts to zero."""
    counts.clear(shared_reads)
