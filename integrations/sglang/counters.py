"""What the adapter did in this process. Tests assert on it that SGLang really ran our attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from .sharing import shared_reads


@dataclass
class Stats:
    """Counts since the process started or since ``reset_stats``.

    Attributes:
        steps: batches planned.
        decode_steps: those of them in which every request decodes.
        verify_steps: those of them that verify drafted tokens.
        graph_steps: those of them planned for a CUDA graph, captures included.
        planned_requests: requests summed over steps.
        forwards: attention layers run by Python; a replayed CUDA graph does not count.
        appended_tokens: slots handed to KV cache writes by Python, summed over layers.
        kv_tokens: tokens of KV that a layer's attention covers, summed over requests and over
            steps that look for shared prefixes.
        saved_kv_tokens: of those, what was not read because another request's read served.
    """

    steps: int = 0
    decode_steps: int = 0
    verify_steps: int = 0
    graph_steps: int = 0
    planned_requests: int = 0
    forwards: int = 0
    appended_tokens: int = 0
    kv_tokens: int = 0
    saved_kv_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


counts = Stats()


def stats() -> Stats:
    """Return a copy of this process's counts; on a GPU this waits for the device."""
    kv_tokens, saved = shared_reads.read()
    return Stats(**(counts.as_dict() | {"kv_tokens": kv_tokens, "saved_kv_tokens": saved}))


def reset_stats() -> None:
    """Set all counts to zero."""
    shared_reads.reset()
    for field in fields(Stats):
        setattr(counts, field.name, 0)
