"""What the adapter did in this process. Tests assert on it that SGLang really ran our attention."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.counters import Counts
from .sharing import shared_reads


@dataclass(kw_only=True)
class Stats(Counts):
    """Counts since the process started or since ``reset_stats``.

    Attributes:
        steps: batches planned.
        decode_steps: those of them in which every request decodes.
        verify_steps: those of them that verify drafted tokens.
        graph_steps: those of them planned for a CUDA graph, captures included.
        planned_requests: requests summed over steps.
        forwards: attention layers run by Python; a replayed CUDA graph does not count.
        appended_tokens: slots handed to KV cache writes by Python, summed over layers.
    """

    steps: int = 0
    decode_steps: int = 0
    verify_steps: int = 0
    graph_steps: int = 0
    planned_requests: int = 0
    forwards: int = 0
    appended_tokens: int = 0


counts = Stats()


def stats() -> Stats:
    """Return a copy of this process's counts; on a GPU this waits for the device."""
    return counts.copy_with(shared_reads)


def reset_stats() -> None:
    """Set all counts to zero."""
    counts.clear(shared_reads)
