"""Page tables of a step, from SGLang's table of token slots.

``req_to_token`` has a row per request of the pool and a column per token; its entries are slots.
Slots of a page lie one after the other, so every page_size-th column names a page by its first
slot. Eager steps read it in place. A graph must not: SGLang refills rows as soon as the step is
planned (0.5.16), before the graph has run. So rows of a graph's step are copied to a table of our
own first. Window layers may have a pool of their own, with a map from slots to its slots: their
table is always a copy, translated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fi_backend import PageTable


class SlotTables:
    """Page tables over one ``req_to_token``.

    Args:
        req_to_token: int32 [rows, tokens] device.
        page_size: tokens of a page.
        pool: SGLang's KV pool; one for windows has ``full_to_swa_index_mapping``.
        window_left: tokens before its own that a query of a window layer may see, at most; None:
            no layer has a pool of its own.
    """

    def __init__(
        self, req_to_token: Tensor, page_size: int, pool: Any, window_left: int | None
    ) -> None:
        self._slots, self._page_size, self._pool = req_to_token, page_size, pool
        self._window_left = window_left
        self._columns = -(-req_to_token.shape[1] // page_size)
        # Of graphs: all slots, and those of the window pool. Of eager steps: the latter.
        self._main = self._window = self._eager_window = self._allocate(0)

    def reserve(self, max_requests: int) -> None:
        """Take the memory that graphs of up to this many requests read."""
        if self._main.shape[0] >= max_requests:
            return
        self._main = self._allocate(max_requests)
        if self._window_left is not None:
            self._window = self._allocate(max_requests)

    def in_place(self, rows: Tensor, qo_indptr: Tensor, kv_len: Tensor) -> list[PageTable]:
        """Return the tables of an eager step, one per page table id.

        Args:
            rows: int64 [requests] device, rows of ``req_to_token``.
            qo_indptr: int32 [requests + 1] device.
            kv_len: int64 [requests] device.
        """
        size, requests = self._page_size, rows.numel()
        main = PageTable.indirect(self._slots, rows, size, entry_stride=size)
        if self._window_left is None:
            return [main]
        if self._eager_window.shape[0] < requests:  # rarely: twice as many as ever before
            self._eager_window = self._allocate(1 << (requests - 1).bit_length())
        return [main, self._translated(self._eager_window[:requests], rows, qo_indptr, kv_len)]

    def copied(self, rows: Tensor, qo_indptr: Tensor, kv_len: Tensor) -> list[PageTable]:
        """Return tables of our own at addresses that never change, filled in stream order.

        Arguments are those of ``in_place``; as many requests as were reserved.
        """
        own = self._main[: rows.numel()]
        copy_rows(own, self._slots, rows, qo_indptr, kv_len, self._page_size)
        main = PageTable.dense(own, self._page_size)
        if self._window_left is None:
            return [main]
        return [main, self._translated(self._window[: rows.numel()], rows, qo_indptr, kv_len)]

    def _translated(
        self, own: Tensor, rows: Tensor, qo_indptr: Tensor, kv_len: Tensor
    ) -> PageTable:
        """Fill ``own`` with the slots of the window pool that the step's windows show."""
        copy_rows(
            own,
            self._slots,
            rows,
            qo_indptr,
            kv_len,
            self._page_size,
            self._pool.full_to_swa_index_mapping,
            self._window_left,
        )
        return PageTable.dense(own, self._page_size)

    def _allocate(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._columns, dtype=torch.int32, device=self._slots.device)


def copy_rows(
    own: Tensor,
    slots: Tensor,
    rows: Tensor,
    qo_indptr: Tensor,
    kv_len: Tensor,
    page_size: int,
    slot_map: Tensor | None = None,
    window_left: int | None = None,
) -> None:
    """Copy the first slot of every page that a step can read; others stay as they are.

    Args:
        own: int32 [requests, pages] device, written.
        slots: int32 [rows, tokens] device.
        rows: int64 [requests] device, row of ``slots`` of each request.
        qo_indptr: int32 [requests + 1] device.
        kv_len: int64 [requests] device, tokens.
        page_size: tokens of a page.
        slot_map: int64 [slots] device, what to write instead of a slot; None: the slot.
        window_left: tokens before its own that a query sees; None: all.

    Stream: on a GPU one kernel, and no wait.
    """
    if own.is_cuda:
        from .copy_kernel import launch_copy  # needs Triton

        launch_copy(own, slots, rows, qo_indptr, kv_len, page_size, slot_map, window_left)
        return
    first = torch.zeros_like(kv_len)
    if window_left is not None:
        first = (kv_len - qo_indptr.diff() - window_left).clamp(min=0) // page_size
    last = -(-kv_len // page_size)
    for request, row in enumerate(rows.tolist()):
        low, high = int(first[request]), int(last[request])
        found = slots[row, low * page_size : high * page_size : page_size]
        own[request, low:high] = found if slot_map is None else slot_map[found].to(torch.int32)
