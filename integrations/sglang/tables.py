"""Page tables of a step, from SGLang's table of token slots.

``req_to_token`` has a row per request of the pool and a column per token; its entries are slots.
Slots of a page lie one after the other, so every page_size-th column names a page by its first
slot. Eager steps read it in place. A graph must not: SGLang refills rows as soon as the step is
planned (0.5.16), before the graph has run. So rows of a graph's step are copied to a table of our
own first. Window layers may have a pool of their own, with a map from slots to its slots: their
table is always a copy, translated. Where a model has an encoder, a row begins with the encoder's
slots, and those of the text lie behind them: the text's table is a copy, moved to the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fi_backend import PagedBatch, PageTable


@dataclass(frozen=True)
class StepRequests:
    """The requests of a step: on the device, what is read of which rows.

    Attributes:
        rows: int64 [requests], rows of ``req_to_token``.
        qo_indptr: int32 [requests + 1].
        kv_len: int64 [requests], tokens.
        begin: int64 [requests], tokens of a row before the first of these: those of its encoder.
            None: the model has none.
    """

    rows: Tensor
    qo_indptr: Tensor
    kv_len: Tensor
    begin: Tensor | None = None

    def encoders(self) -> StepRequests:
        """Return the same requests, reading what their encoders left."""
        assert self.begin is not None
        return StepRequests(self.rows, self.qo_indptr, self.begin)

    def by(self, table: PageTable) -> PagedBatch:
        """Return the step as it is read through a table."""
        return PagedBatch(self.qo_indptr, self.kv_len, table)


class SlotTables:
    """Page tables over one ``req_to_token``.

    Args:
        req_to_token: int32 [rows, tokens] device.
        page_size: tokens of a page; 1 where there are encoders, whose last page the text shares.
        pool: SGLang's KV pool; one for windows has ``full_to_swa_index_mapping``.
        window_left: tokens before its own that a query of a window layer may see, at most; None:
            no layer has a pool of its own.
        has_encoders: requests have encoders; then no layer has a pool of its own.
    """

    def __init__(
        self,
        req_to_token: Tensor,
        page_size: int,
        pool: Any,
        window_left: int | None,
        *,
        has_encoders: bool,
    ) -> None:
        self._slots, self._page_size, self._pool = req_to_token, page_size, pool
        self._window_left, self._has_encoders = window_left, has_encoders
        self._columns = -(-req_to_token.shape[1] // page_size)
        # Of graphs: what layers read, and what those of a window pool do, or those that look at
        # encoders. Of eager steps: what cannot be read in place.
        self._main = self._second = self._eager = self._allocate(0)

    def reserve(self, max_requests: int) -> None:
        """Take the memory that graphs of up to this many requests read."""
        if self._main.shape[0] >= max_requests:
            return
        self._main = self._allocate(max_requests)
        if self._window_left is not None or self._has_encoders:
            self._second = self._allocate(max_requests)

    def in_place(self, step: StepRequests) -> list[PagedBatch]:
        """Return an eager step as it is read through its tables, one per page table id."""
        size, requests = self._page_size, step.rows.numel()
        whole = PageTable.indirect(self._slots, step.rows, size, entry_stride=size)
        if self._window_left is None and not self._has_encoders:
            return [step.by(whole)]
        if self._eager.shape[0] < requests:  # rarely: twice as many as ever before
            self._eager = self._allocate(1 << (requests - 1).bit_length())
        own = self._eager[:requests]
        if self._has_encoders:
            return [self._copy(own, step), step.encoders().by(whole)]
        return [step.by(whole), self._translate(own, step)]

    def copied(self, step: StepRequests) -> list[PagedBatch]:
        """Return the same through tables of our own, filled in stream order.

        Their addresses never change. A step has as many requests as were reserved, or fewer.
        """
        requests = step.rows.numel()
        main, second = self._copy(self._main[:requests], step), self._second[:requests]
        if self._has_encoders:
            return [main, self._copy(second, step.encoders())]
        return [main] if self._window_left is None else [main, self._translate(second, step)]

    def _copy(self, own: Tensor, step: StepRequests) -> PagedBatch:
        copy_rows(own, self._slots, step, self._page_size)
        return step.by(PageTable.dense(own, self._page_size))

    def _translate(self, own: Tensor, step: StepRequests) -> PagedBatch:
        """Fill ``own`` with the slots of the window pool that the step's windows show."""
        slot_map = self._pool.full_to_swa_index_mapping
        copy_rows(own, self._slots, step, self._page_size, slot_map, self._window_left)
        return step.by(PageTable.dense(own, self._page_size))

    def _allocate(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._columns, dtype=torch.int32, device=self._slots.device)


def copy_rows(
    own: Tensor,
    slots: Tensor,
    step: StepRequests,
    page_size: int,
    slot_map: Tensor | None = None,
    window_left: int | None = None,
) -> None:
    """Copy the first slot of every page that a step can read; others stay as they are.

    Args:
        own: int32 [requests, pages] device, written.
        slots: int32 [rows, tokens] device.
        step: what is read.
        page_size: tokens of a page.
        slot_map: int64 [slots] device, what to write instead of a slot; None: the slot.
        window_left: tokens before its own that a query sees; None: all.

    Stream: on a GPU one kernel, and no wait.
    """
    if own.is_cuda:
        from .copy_kernel import launch_copy  # needs Triton

        launch_copy(own, slots, step, page_size, slot_map, window_left)
        return
    first = torch.zeros_like(step.kv_len)
    if window_left is not None:
        first = (step.kv_len - step.qo_indptr.diff() - window_left).clamp(min=0) // page_size
    last = -(-step.kv_len // page_size)
    begin = torch.zeros_like(first) if step.begin is None else step.begin
    for request, row in enumerate(step.rows.tolist()):
        low, high, skipped = int(first[request]), int(last[request]), int(begin[request])
        found = slots[row, skipped:][low * page_size : high * page_size : page_size]
        own[request, low:high] = found if slot_map is None else slot_map[found].to(torch.int32)
