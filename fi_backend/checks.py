"""Checks of the values inside a batch, for CPU tensors; the constructors checked everything else.

Every loop over requests or pages is a numpy expression: a step of a few hundred requests is checked
in well under a millisecond.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fi_backend.errors import CapacityExceeded, InvalidInput, contract_message, require
from fi_backend.formats import FULL, Band, Nodes, PagedBatch, PageTable

if TYPE_CHECKING:
    from fi_backend.planner import Capacity

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_INT32_MAX = 2**31 - 1


def validate(
    batch: PagedBatch,
    capacity: Capacity | None = None,
    num_pages: int | None = None,
    band: Band = FULL,
) -> None:
    """Check every value of a batch that a kernel would trust.

    Args:
        batch: CPU tensors.
        capacity: what the planner was built for; None: unlimited.
        num_pages: pages of the KV cache when it is known; None: page ids are not checked.
        band: page ids that no query can see are not checked, for they may be stale.

    Raises:
        InvalidInput: the first value out of contract, with its position.
        CapacityExceeded: the batch is legal but larger than ``capacity``.
    """
    require(
        batch.qo_indptr.device.type == "cpu",
        "batch",
        "CPU tensors",
        batch.qo_indptr.device,
        "device batches are checked by the planner kernel",
    )
    check_lengths(batch)
    if capacity is not None:
        check_capacity(batch, capacity)
    check_table(batch)
    if batch.nodes is not None:
        check_nodes(batch, batch.nodes)
    if num_pages is not None:
        check_page_ids(batch, num_pages, band)


def check_lengths(batch: PagedBatch) -> None:
    """Check qo_indptr and kv_len by themselves.

    Raises:
        InvalidInput: an indptr that does not start at 0 or falls, a negative or huge kv_len.
    """
    _check_indptr(_ints(batch.qo_indptr), "qo_indptr", "pass cumulative query lengths")
    kv_len = _ints(batch.kv_len)
    _first(
        kv_len < 0,
        lambda r: (
            "kv_len",
            "at least 0",
            f"{kv_len[r]} at request {r}",
            "padded requests have length 0",
        ),
    )
    _first(
        kv_len > _INT32_MAX,
        lambda r: (
            "kv_len",
            f"at most {_INT32_MAX}",
            f"{kv_len[r]} at request {r}",
            "positions are 32-bit",
        ),
    )


def check_capacity(batch: PagedBatch, capacity: Capacity) -> None:
    """Check that a batch fits what its planner was built for.

    Raises:
        CapacityExceeded: one of the counts is larger; the message names it.
    """
    tokens = int(batch.qo_indptr[-1])
    longest = int(batch.kv_len.max()) if batch.num_requests else 0
    used = {
        "max_requests": batch.num_requests,
        "max_tokens": tokens,
        "max_kv_len": longest,
    }
    if batch.nodes is not None and batch.nodes.num_nodes:
        used["max_nodes"] = batch.nodes.num_nodes
        used["max_links"] = batch.nodes.members.numel()
        used["max_shared_tokens"] = _gathered_tokens(batch, batch.nodes)
    for name, count in used.items():
        limit = getattr(capacity, name)
        require(
            count <= limit,
            "batch",
            f"{name} <= {limit}",
            count,
            f"build the planner with {name}={count} or split the batch",
            kind=CapacityExceeded,
        )


def check_table(batch: PagedBatch) -> None:
    """Check that every request's row exists and is long enough for its kv_len.

    Raises:
        InvalidInput: a bad CSR indptr, a row index out of range, or a kv_len past the end of a row.
    """
    table = batch.page_table
    if table.indptr is not None:
        indptr = _ints(table.indptr)
        _check_indptr(indptr, "page_table.indptr", "pass cumulative page counts")
        require(
            bool(indptr[-1] <= table.entries.numel()),
            "page_table.indptr",
            f"at most {table.entries.numel()} pages, the length of indices",
            int(indptr[-1]),
            "pass all indices",
        )
    if table.row_index is not None:
        index = _ints(table.row_index)
        rows = table.entries.shape[0]
        _first(
            (index < 0) | (index >= rows),
            lambda r: (
                "page_table.row_index",
                f"rows in [0, {rows})",
                f"{index[r]} at request {r}",
                "point padded requests at any valid row",
            ),
        )
    kv_len = _ints(batch.kv_len)
    room = row_pages(table)[: batch.num_requests] * table.page_size
    _first(
        kv_len > room,
        lambda r: (
            "kv_len",
            f"at most {room[r]} tokens, the pages of its row",
            f"{kv_len[r]} at request {r}",
            "widen the page table or shorten the request",
        ),
    )


def check_nodes(batch: PagedBatch, nodes: Nodes) -> None:
    """Check that nodes and own parts cover every KV position of every request exactly once.

    Raises:
        InvalidInput: indices out of range, ranges outside their rows or members, gaps or overlaps.
    """
    member_ptr = _ints(nodes.member_ptr)
    members, begin, end = _ints(nodes.members), _ints(nodes.kv_begin), _ints(nodes.kv_end)
    _check_indptr(member_ptr, "nodes.member_ptr", "pass cumulative member counts")
    require(
        bool(member_ptr[-1] == members.size),
        "nodes.member_ptr",
        f"{members.size} at the end, the length of members",
        int(member_ptr[-1]),
        "pass all members",
    )
    _first(
        (members < 0) | (members >= batch.num_requests),
        lambda i: (
            "nodes.members",
            f"requests in [0, {batch.num_requests})",
            f"{members[i]} at position {i}",
            "members are request indices of this batch",
        ),
    )
    _first(
        (begin < 0) | (end <= begin),
        lambda n: (
            "nodes.kv_begin",
            "0 <= kv_begin < kv_end",
            f"[{begin[n]}, {end[n]}) at node {n}",
            "drop empty nodes",
        ),
    )
    _check_node_rows(batch, nodes)
    _check_coverage(batch, nodes)


def check_page_ids(batch: PagedBatch, num_pages: int, band: Band = FULL) -> None:
    """Check every page id that a kernel can read; stale and unseen entries are not looked at.

    Raises:
        InvalidInput: the first id outside the page map or the KV cache, with request and page.
    """
    table = batch.page_table
    used = used_entries(batch, band)
    ids, where, limit = used.ids, "page ids", num_pages
    if table.page_map is not None:
        limit = table.page_map.numel()
        _check_ids(used, ids, f"page ids in [0, {limit}), the length of page_map")
        ids, where, limit = _ints(table.page_map)[ids], "mapped page ids", num_pages
    _check_ids(used, ids, f"{where} in [0, {limit})")


class UsedEntries(NamedTuple):
    """Page table entries that a batch can read: page ids and where they come from."""

    ids: Int64Array  # before page_map
    row: Int64Array  # table row
    page: Int64Array  # logical page within the row


def used_entries(batch: PagedBatch, band: Band = FULL) -> UsedEntries:
    """Return the page table entries that queries of this batch can reach under ``band``."""
    kv_len = _ints(batch.kv_len)
    q_len = np.diff(_ints(batch.qo_indptr))
    rows = np.arange(batch.num_requests, dtype=np.int64)
    own_begin = np.zeros_like(kv_len) if batch.nodes is None else _ints(batch.nodes.own_begin)
    live = q_len > 0
    low = np.maximum(kv_len - q_len - band.left, 0) if band.left >= 0 else np.zeros_like(kv_len)
    parts = [(rows[live], np.maximum(low, own_begin)[live], kv_len[live])]
    if band.sink_prefix:
        parts.append((rows[live], own_begin[live], np.minimum(band.sink_prefix, low)[live]))
    if batch.nodes is not None and batch.nodes.num_nodes:
        nodes = batch.nodes
        parts.append((_ints(nodes.table_row), _ints(nodes.kv_begin), _ints(nodes.kv_end)))
    row, begin, end = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _expand(batch.page_table, row, begin, end)


def row_pages(table: PageTable) -> Int64Array:
    """Return how many pages each row of a table has room for."""
    if table.indptr is not None:
        return np.diff(_ints(table.indptr))
    pages = -(-table.entries.shape[1] // table.entry_stride)
    return np.full(table.num_rows, pages, dtype=np.int64)


def _expand(table: PageTable, row: Int64Array, begin: Int64Array, end: Int64Array) -> UsedEntries:
    """Page ids of token ranges [begin, end) of table rows, one after the other."""
    first = begin // table.page_size
    count = np.where(end > begin, -(-end // table.page_size) - first, 0)
    row = np.repeat(row, count)
    page = np.arange(row.size, dtype=np.int64) - np.repeat(np.cumsum(count) - count - first, count)
    entries = table.entries.numpy()
    if table.indptr is not None:
        ids = entries[_ints(table.indptr)[row] + page]
    else:
        table_row = row if table.row_index is None else _ints(table.row_index)[row]
        ids = entries[table_row, page * table.entry_stride]
    # Floor division keeps negative entries negative.
    return UsedEntries(ids.astype(np.int64) // table.slot_divisor, row, page)


def _check_ids(used: UsedEntries, ids: Int64Array, rule: str) -> None:
    limit = int(rule.split("[0, ")[1].split(")", maxsplit=1)[0])
    _first(
        (ids < 0) | (ids >= limit),
        lambda i: (
            "page_table",
            rule,
            f"{ids[i]} at row {used.row[i]}, page {used.page[i]}",
            "fill every entry up to kv_len",
        ),
    )
