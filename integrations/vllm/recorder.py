"""Draws a step of the running engine on request: what the planner saw and decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fi_backend import PagedBatch, PlanSlot, explain

MANY = 1 << 30


@dataclass
class Recorder:
    """Waits for a step that is large enough and draws it.

    Attributes:
        path: picture to write; None: not waiting.
        min_requests: steps of fewer requests are passed over.
        min_tokens: steps of fewer query tokens are passed over.
        max_tokens: steps of more query tokens are passed over.
        drawn: the picture written last.
    """

    path: Path | None = None
    min_requests: int = 1
    min_tokens: int = 1
    max_tokens: int = MANY
    drawn: Path | None = None

    def arm(
        self,
        path: str | Path,
        min_requests: int = 1,
        min_tokens: int = 1,
        max_tokens: int = MANY,
    ) -> None:
        """Draw the next step with this many requests and query tokens to ``path``."""
        self.path, self.drawn = Path(path), None
        self.min_requests, self.min_tokens, self.max_tokens = min_requests, min_tokens, max_tokens

    def offer(self, batch: PagedBatch, num_tokens: int, slots: Mapping[str, PlanSlot]) -> None:
        """Draw this step if it is the one waited for."""
        if self.path is None:
            return
        if batch.num_requests < self.min_requests:
            return
        if not self.min_tokens <= num_tokens <= self.max_tokens:
            return
        path, self.path = self.path, None
        self.drawn = Path(explain(batch, next(iter(slots.values())), path))


recorder = Recorder()
