"""Shared prefixes: which layers look for them, and how much reading of the KV cache that saved."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fi_backend import LayerClass, StepPlanner

# Between two lines, and between two looks at the device's counters.
REPORT_S, LOOK_S = 10.0, 1.0


def is_switched_on() -> bool:
    """Return whether FI_SHARING leaves the search for shared prefixes on, as it is without it."""
    return os.environ.get("FI_SHARING", "1") != "0"


def shares_prefixes(layer_classes: Sequence[LayerClass], chunk: int) -> bool:
    """Return whether the planners of a group of layers look for shared prefixes.

    Args:
        layer_classes: of layers whose requests can hold the same pages.
        chunk: where batch-invariant mode cuts; sharing would make bits depend on the batch.
    """
    return is_switched_on() and not chunk and any(one.shares for one in layer_classes)


@dataclass(frozen=True)
class _Counter:
    """What the forest of one planner counts; kept after the planner."""

    totals: Tensor  # int64 [2] device: kv_tokens, saved_kv_tokens
    forest: weakref.ReferenceType[object]


@dataclass(frozen=True)
class _Look:
    """A copy of the counters on its way from the device."""

    sums: Tensor  # int64 [2] pinned
    arrived: Any  # torch.cuda.Event, whose methods are untyped


class SharedReads:
    """Adds up what all planners of the process counted, and writes lines to the log.

    Args:
        logger: one whose lines the engine shows.
        clock: seconds.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._counters: list[_Counter] = []
        self._past = [0, 0]  # of planners that are gone
        self._writes = False
        self._pinned: Tensor | None = None
        self._on_its_way: _Look | None = None
        self._reported = [0, 0]
        self._reported_at = self._looked_at = clock()

    def watch(self, planner: StepPlanner, *, writes: bool) -> None:
        """Count what a planner's steps read; called when it is made.

        Args:
            planner: with or without forests.
            writes: whether this process writes lines: one rank of several is enough.
        """
        alive = []
        for one in self._counters:
            if one.forest() is None:
                self._past = _sum(self._past, one.totals.tolist())
            else:
                alive.append(one)
        self._counters, self._on_its_way = alive, None
        for forest in planner.forests:
            self._counters.append(_Counter(forest.totals, weakref.ref(forest)))
            self._writes = writes
            if forest.totals.is_cuda and self._pinned is None:
                with torch.inference_mode(False):  # engines plan inside and outside of that mode
                    self._pinned = torch.zeros(2, dtype=torch.int64, device="cpu", pin_memory=True)

    def read(self) -> tuple[int, int]:
        """Return KV tokens of all steps so far, and those saved; on a GPU this waits for it."""
        total = self._past
        for one in self._counters:
            total = _sum(total, one.totals.tolist())
        return total[0], total[1]

    def reset(self) -> None:
        """Count from zero."""
        self._past, self._reported, self._on_its_way = [0, 0], [0, 0], None
        with torch.inference_mode():
            for one in self._counters:
                one.totals.zero_()
        self._reported_at = self._looked_at = self._clock()

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Leave the counts as they are, whatever is planned: dummy requests share a page."""
        before = [(one.totals, one.totals.clone()) for one in self._counters]
        yield
        with torch.inference_mode():
            for totals, value in before:
                totals.copy_(value)

    def after_plan(self) -> None:
        """Write a line if one is due. Never waits: what the device counted is read a step later."""
        if not self._writes:
            return
        now, look = self._clock(), self._on_its_way
        if look is None and now < self._looked_at + LOOK_S:
            return
        if self._pinned is None:
            self._looked_at = now
            self._report(list(self.read()), now)
        elif torch.cuda.is_current_stream_capturing():
            return  # a copy would become a part of the graph, and events must not be asked
        elif look is None:
            self._looked_at = now
            self._on_its_way = _look(self._pinned, [one.totals for one in self._counters])
        elif look.arrived.query():
            self._on_its_way = None
            self._report(_sum(self._past, look.sums.tolist()), now)

    def _report(self, total: list[int], now: float) -> None:
        """Write a line about the time since the last one, unless too little of it has passed.

        The first savings are reported when they are seen.
        """
        seconds = now - self._reported_at
        if seconds < REPORT_S and self._reported[1] > 0:
            return
        tokens, saved = (new - old for new, old in zip(total, self._reported, strict=True))
        if 0 < saved <= tokens:  # nonsense where a sleep mode has dropped the counters
            self._logger.info(
                "fi_backend: shared prefixes saved %.1f %% of KV reads (%s of %s tokens) "
                "in the last %.0f s",
                *(100 * saved / tokens, in_short(saved), in_short(tokens), max(seconds, 1.0)),
            )
        if saved != 0 or seconds >= REPORT_S:
            self._reported, self._reported_at = total, now


def _look(pinned: Tensor, totals: Sequence[Tensor]) -> _Look:
    pinned.copy_(torch.stack(list(totals)).sum(0), non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return _Look(pinned, arrived)


def in_short(count: int) -> str:
    """Return a count with its unit: 12.3 M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


def _sum(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]
