"""What counters of all adapters have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TypeVar

from .sharing import SharedReads

_Counts = TypeVar("_Counts", bound="Counts")


@dataclass(kw_only=True)
class Counts:
    """Counts of one process.

    Attributes:
        kv_tokens: tokens of KV that a layer's attention covers, summed over requests and over
            planned steps of layers that look for shared prefixes.
        saved_kv_tokens: of those, what was not read because another request's read served.
    """

    kv_tokens: int = 0
    saved_kv_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)

    def copy_with(self: _Counts, reads: SharedReads) -> _Counts:
        """Return a copy with what the planners counted; on a GPU this waits for the device."""
        kv_tokens, saved = reads.read()
        return replace(self, kv_tokens=kv_tokens, saved_kv_tokens=saved)

    def clear(self, reads: SharedReads) -> None:
        """Set all counts to zero, those of the planners too."""
        reads.reset()
        for field in fields(self):
            setattr(self, field.name, 0)
