"""Checks of the values inside a batch, for CPU tensors; the constructors checked everything else.

Every loop over requests or pages is a numpy expression: a step of a few hundred requests is checked
in well under a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fi_backend.errors import CapacityExceeded, InvalidInput, contract_message, require
from fi_backend.formats import FULL, Band, Nodes, PagedBatch, PageTable

if TYPE_CHECKING:
    from fi_backend.layers import Capacity

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_INT32_MAX = 2**31 - 1
_NODE_LIMITS = ("max_nodes", "max_links", "max_shared_tokens")


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
        "StepPlanner.plan takes batches on a GPU, and checks their values with FI_CHECK=1",
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
    check_indptr(as_ints(batch.qo_indptr), "qo_indptr", "pass cumulative query lengths")
    kv_len = as_ints(batch.kv_len)
    refuse_first(
        kv_len < 0,
        lambda r: (
            "kv_len",
            "at least 0",
            f"{kv_len[r]} at request {r}",
            "padded requests have length 0",
        ),
    )
    refuse_first(
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
    for name, count in used_capacity(batch).items():
        # Without own_begin the planner declines the nodes that do not fit.
        if name in _NODE_LIMITS and batch.nodes is not None and batch.nodes.own_begin is None:
            continue
        limit = getattr(capacity, name)
        require(
            count <= limit,
            "batch",
            f"{name} <= {limit}",
            count,
            f"build the planner with {name}={count} or split the batch",
            kind=CapacityExceeded,
        )


def used_capacity(batch: PagedBatch) -> dict[str, int]:
    """Return what a batch needs of each field of ``Capacity``."""
    used = {
        "max_requests": batch.num_requests,
        "max_tokens": int(batch.qo_indptr[-1]),
        "max_kv_len": int(batch.kv_len.max()) if batch.num_requests else 0,
    }
    if batch.nodes is not None:
        counts = (
            batch.nodes.num_nodes,
            batch.nodes.members.numel(),
            _gathered_tokens(batch, batch.nodes),
        )
        used |= dict(zip(_NODE_LIMITS, counts, strict=True))
    return used


def check_table(batch: PagedBatch) -> None:
    """Check that every request's row exists and is long enough for its kv_len.

    Raises:
        InvalidInput: a bad CSR indptr, a row index out of range, or a kv_len past the end of a row.
    """
    table = batch.page_table
    if table.indptr is not None:
        indptr = as_ints(table.indptr)
        check_indptr(indptr, "page_table.indptr", "pass cumulative page counts")
        require(
            bool(indptr[-1] <= table.entries.numel()),
            "page_table.indptr",
            f"at most {table.entries.numel()} pages, the length of indices",
            int(indptr[-1]),
            "pass all indices",
        )
    if table.row_index is not None:
        index = as_ints(table.row_index)
        rows = table.entries.shape[0]
        refuse_first(
            (index < 0) | (index >= rows),
            lambda r: (
                "page_table.row_index",
                f"rows in [0, {rows})",
                f"{index[r]} at request {r}",
                "point padded requests at any valid row",
            ),
        )
    kv_len = as_ints(batch.kv_len)
    room = row_pages(table)[: batch.num_requests] * table.page_size
    refuse_first(
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
    member_ptr = as_ints(nodes.member_ptr)
    members, begin, end = as_ints(nodes.members), as_ints(nodes.kv_begin), as_ints(nodes.kv_end)
    check_indptr(member_ptr, "nodes.member_ptr", "pass cumulative member counts")
    require(
        bool(member_ptr[-1] == members.size),
        "nodes.member_ptr",
        f"{members.size} at the end, the length of members",
        int(member_ptr[-1]),
        "pass all members",
    )
    refuse_first(
        (members < 0) | (members >= batch.num_requests),
        lambda i: (
            "nodes.members",
            f"requests in [0, {batch.num_requests})",
            f"{members[i]} at position {i}",
            "members are request indices of this batch",
        ),
    )
    refuse_first(
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
    used = used_entries(batch, band)
    ids, rule = used.ids, "page ids in [0, {limit}), the pages of the KV cache"
    if batch.page_table.page_map is not None:
        page_map = as_ints(batch.page_table.page_map)
        _check_ids(used, ids, page_map.size, "page ids in [0, {limit}), the length of page_map")
        ids, rule = page_map[ids], "mapped page ids in [0, {limit}), the pages of the KV cache"
    _check_ids(used, ids, num_pages, rule)


class UsedEntries(NamedTuple):
    """Page table entries that a batch can read: page ids and where they come from."""

    ids: Int64Array  # before page_map
    row: Int64Array  # table row
    page: Int64Array  # logical page within the row


def used_entries(batch: PagedBatch, band: Band = FULL) -> UsedEntries:
    """Return the page table entries that a kernel may read for this batch under ``band``.

    A window hides what lies before it unless there is a sink prefix: the KV tiles between the two
    may be read and masked.
    """
    kv_len = as_ints(batch.kv_len)
    q_len = np.diff(as_ints(batch.qo_indptr))
    rows = np.arange(batch.num_requests, dtype=np.int64)
    nodes, low = batch.nodes, np.zeros_like(kv_len)
    if nodes is not None and nodes.own_begin is not None:
        low = as_ints(nodes.own_begin)
    if band.left >= 0 and band.sink_prefix == 0:
        low = np.maximum(low, kv_len - q_len - band.left)
    live = q_len > 0
    parts = [(rows[live], low[live], kv_len[live])]
    if nodes is not None:
        parts.append((as_ints(nodes.table_row), as_ints(nodes.kv_begin), as_ints(nodes.kv_end)))
    row, begin, end = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _expand(batch.page_table, row, begin, end)


def row_pages(table: PageTable) -> Int64Array:
    """Return how many pages each row of a table has room for."""
    if table.indptr is not None:
        return np.diff(as_ints(table.indptr))
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
        ids = entries[as_ints(table.indptr)[row] + page]
    else:
        table_row = row if table.row_index is None else as_ints(table.row_index)[row]
        ids = entries[table_row, page * table.entry_stride]
    # Floor division keeps negative entries negative.
    return UsedEntries(ids.astype(np.int64) // table.slot_divisor, row, page)


def _check_ids(used: UsedEntries, ids: Int64Array, limit: int, rule: str) -> None:
    refuse_first(
        (ids < 0) | (ids >= limit),
        lambda i: (
            "page_table",
            rule.format(limit=limit),
            f"{ids[i]} at row {used.row[i]}, page {used.page[i]}",
            "fill every entry up to kv_len",
        ),
    )


def _check_node_rows(batch: PagedBatch, nodes: Nodes) -> None:
    """Node ranges lie inside their table row and inside every member."""
    table_row, end = as_ints(nodes.table_row), as_ints(nodes.kv_end)
    table = batch.page_table
    refuse_first(
        (table_row < 0) | (table_row >= table.num_rows),
        lambda n: (
            "nodes.table_row",
            f"rows in [0, {table.num_rows})",
            f"{table_row[n]} at node {n}",
            "name a row of the page table",
        ),
    )
    kv_len = as_ints(batch.kv_len)
    room = row_pages(table) * table.page_size
    # A request's own row is filled up to its kv_len only.
    room[: kv_len.size] = np.minimum(room[: kv_len.size], kv_len)
    refuse_first(
        end > room[table_row],
        lambda n: (
            "nodes.kv_end",
            f"at most {room[table_row[n]]} tokens, the length of row {table_row[n]}",
            f"{end[n]} at node {n}",
            "a node reads one filled row",
        ),
    )
    members = as_ints(nodes.members)
    node = np.repeat(np.arange(end.size), np.diff(as_ints(nodes.member_ptr)))
    refuse_first(
        end[node] > kv_len[members],
        lambda i: (
            "nodes.kv_end",
            f"at most kv_len {kv_len[members[i]]} of member {members[i]}",
            f"{end[node[i]]} at node {node[i]}",
            "a node holds only what all its members see",
        ),
    )


def _check_coverage(batch: PagedBatch, nodes: Nodes) -> None:
    """The nodes of each request tile [0, own_begin) in order."""
    if nodes.own_begin is None:
        return
    own_begin, members = as_ints(nodes.own_begin), as_ints(nodes.members)
    node = np.repeat(np.arange(nodes.num_nodes), np.diff(as_ints(nodes.member_ptr)))
    order = np.argsort(members, kind="stable")  # by request, then by node
    request, node = members[order], node[order]
    begin, end = as_ints(nodes.kv_begin)[node], as_ints(nodes.kv_end)[node]
    covered = np.zeros(own_begin.size, dtype=np.int64)
    covered[request] = end  # the last assignment wins: each request's last node
    expected = np.zeros_like(begin)
    same = request[1:] == request[:-1]
    expected[1:][same] = end[:-1][same]
    refuse_first(
        begin != expected,
        lambda i: (
            "nodes.kv_begin",
            f"{expected[i]}, where the earlier nodes of request {request[i]} end",
            f"{begin[i]} at node {node[i]}",
            "nodes of a request cover [0, own_begin) in ascending order",
        ),
    )
    refuse_first(
        covered != own_begin,
        lambda r: (
            "nodes.own_begin",
            f"{covered[r]}, where the nodes of request {r} end",
            f"{own_begin[r]} at request {r}",
            "nodes and own part cover every KV position once",
        ),
    )


def _gathered_tokens(batch: PagedBatch, nodes: Nodes) -> int:
    members = as_ints(nodes.members)
    members = members[(members >= 0) & (members < batch.num_requests)]
    return int(np.diff(as_ints(batch.qo_indptr))[members].sum())


def as_ints(tensor: Tensor) -> Int64Array:
    """Return a tensor's values as int64; reading a device's memory waits for it."""
    return tensor.cpu().numpy().astype(np.int64)


def check_indptr(indptr: Int64Array, argument: str, hint: str) -> None:
    """Check that cumulative counts start at 0 and never fall.

    Raises:
        InvalidInput: they do not; the message names the first bad element.
    """
    require(bool(indptr[0] == 0), argument, "0 at index 0", int(indptr[0]), hint)
    refuse_first(
        np.diff(indptr) < 0,
        lambda i: (
            argument,
            f"at least {indptr[i]} at index {i + 1}",
            indptr[i + 1],
            hint,
        ),
    )


def refuse_first(bad: BoolArray, describe: Callable[[int], tuple[str, str, object, str]]) -> None:
    """Raise InvalidInput for the first true element; ``describe`` gives the sentence."""
    if bad.any():
        raise InvalidInput(contract_message(*describe(int(bad.argmax()))))
