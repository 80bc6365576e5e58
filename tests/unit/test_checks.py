"""Value checks of a batch: every documented refusal, and what must not be refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fi_backend import checks
from fi_backend.errors import CapacityExceeded, FiError, InvalidInput
from fi_backend.formats import FULL, Band, PagedBatch, PageTable


@dataclass(frozen=True)
class Limits:
    """A capacity; the real one needs the native core."""

    max_requests: int = 8
    max_tokens: int = 64
    max_kv_len: int = 64
    max_nodes: int = 0
    max_links: int = 0
    max_shared_tokens: int = 0


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


STALE = -(2**31)
# Request 0: 9 tokens (3 pages of 4), request 1: nothing, request 2: 4 tokens (1 page).
TABLE = torch.tensor([[3, 1, 5, STALE], [STALE] * 4, [2, STALE, STALE, STALE]], dtype=torch.int32)


def make_batch(**changes: Any) -> PagedBatch:
    fields = {
        "qo_indptr": ints(0, 2, 2, 3),
        "kv_len": ints(9, 0, 4),
        "page_table": PageTable.dense(TABLE, 4),
    }
    return PagedBatch(**(fields | changes))


def csr(indptr: torch.Tensor, indices: torch.Tensor) -> PageTable:
    return PageTable.csr(indptr, indices, 4)


def test_legal_batches_pass() -> None:
    checks.validate(make_batch(), Limits(), num_pages=6)
    checks.validate(make_batch(kv_len=torch.tensor([9, 0, 4])), Limits(), num_pages=6)
    checks.validate(make_batch(page_table=csr(ints(0, 3, 3, 4), ints(3, 1, 5, 2))), num_pages=6)
    empty = make_batch(qo_indptr=ints(0), kv_len=ints())
    checks.validate(empty, Limits(), num_pages=0)


def test_queries_may_outnumber_keys() -> None:
    checks.validate(make_batch(kv_len=ints(1, 0, 0)), num_pages=6)


def test_token_slot_tables() -> None:
    """SGLang: one column per token, entries are slots, only each page's first is read."""
    slots = torch.full((5, 16), STALE, dtype=torch.int32)
    slots[4, [0, 4, 8]] = ints(12, 4, 20)
    slots[1, 0] = 8
    table = PageTable.indirect(slots, ints(4, 0, 1), 4, entry_stride=4, slot_divisor=4)
    batch = make_batch(page_table=table)
    checks.validate(batch, num_pages=6)
    assert checks.used_entries(batch).ids.tolist() == [3, 1, 5, 2]
    with pytest.raises(InvalidInput, match=r"\[0, 5\).*got 5 at row 0, page 2"):
        checks.validate(batch, num_pages=5)


def test_page_map_is_applied_to_valid_ids() -> None:
    page_map = ints(-1, 0, 1, 2, -1, 3)
    table = PageTable.dense(TABLE, 4, page_map=page_map)
    checks.validate(make_batch(page_table=table), num_pages=4)
    with pytest.raises(InvalidInput, match=r"mapped page ids in \[0, 3\).*got 3 at row 0, page 2"):
        checks.validate(make_batch(page_table=table), num_pages=3)
    short = PageTable.dense(TABLE, 4, page_map=page_map[:3])
    with pytest.raises(InvalidInput, match="the length of page_map, got 3 at row 0, page 0"):
        checks.validate(make_batch(page_table=short), num_pages=4)


def test_pages_before_a_window_are_not_looked_at() -> None:
    table = TABLE.clone()
    table[0, 0] = STALE  # request 0 asks at positions 7 and 8: a window of 4 starts at 4
    batch = make_batch(page_table=PageTable.dense(table, 4))
    checks.validate(batch, num_pages=6, band=Band.window(4))
    with pytest.raises(InvalidInput, match="at row 0, page 0"):
        checks.validate(batch, num_pages=6, band=Band.window(5))
    with pytest.raises(InvalidInput, match="at row 0, page 0"):
        checks.validate(batch, num_pages=6, band=Band.window(4, sink_prefix=1))


def test_requests_without_queries_read_nothing() -> None:
    table = TABLE.clone()
    table[2, 0] = STALE
    batch = make_batch(qo_indptr=ints(0, 2, 2, 2), page_table=PageTable.dense(table, 4))
    checks.validate(batch, num_pages=6)


@dataclass(frozen=True)
class Bad:
    """A batch that must be refused, and a pattern of the message."""

    match: str
    changes: dict[str, Any]
    capacity: Limits | None = None
    kind: type[FiError] = InvalidInput


BAD = [
    Bad("qo_indptr: expected 0 at index 0, got 1", {"qo_indptr": ints(1, 2, 2, 3)}),
    Bad("qo_indptr: expected at least 2 at index 2, got 1", {"qo_indptr": ints(0, 2, 1, 3)}),
    Bad("kv_len: expected at least 0, got -1 at request 1", {"kv_len": ints(9, -1, 4)}),
    Bad(
        "kv_len: expected at most 2147483647, got 4294967296 at request 2",
        {"kv_len": torch.tensor([9, 0, 1 << 32])},
    ),
    Bad(
        "kv_len: expected at most 16 tokens, the pages of its row, got 17 at request 0",
        {"kv_len": ints(17, 0, 4)},
    ),
    Bad(
        "kv_len: expected at most 4 tokens, the pages of its row, got 5 at request 2",
        {"kv_len": ints(9, 0, 5), "page_table": csr(ints(0, 3, 3, 4), ints(3, 1, 5, 2))},
    ),
    Bad(
        "page_table.indptr: expected at least 3 at index 2, got 2",
        {"page_table": csr(ints(0, 3, 2, 4), ints(3, 1, 5, 2))},
    ),
    Bad(
        "page_table.indptr: expected 0 at index 0, got 1",
        {"page_table": csr(ints(1, 3, 3, 4), ints(3, 1, 5, 2))},
    ),
    Bad(
        "page_table.indptr: expected at most 3 pages, the length of indices, got 4",
        {"page_table": csr(ints(0, 3, 3, 4), ints(3, 1, 5))},
    ),
    Bad(
        r"page_table.row_index: expected rows in \[0, 3\), got 3 at request 1",
        {"page_table": PageTable.indirect(TABLE, ints(0, 3, 2), 4)},
    ),
    Bad(
        "batch: expected max_requests <= 2, got 3",
        {},
        Limits(max_requests=2),
        CapacityExceeded,
    ),
    Bad("batch: expected max_tokens <= 2, got 3", {}, Limits(max_tokens=2), CapacityExceeded),
    Bad("batch: expected max_kv_len <= 8, got 9", {}, Limits(max_kv_len=8), CapacityExceeded),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.match[:40])
def test_refusals(bad: Bad) -> None:
    with pytest.raises(bad.kind, match=bad.match):
        checks.validate(make_batch(**bad.changes), bad.capacity)


@pytest.mark.parametrize(("page", "entry"), [(0, -1), (1, 6), (2, 2**31 - 1)])
def test_bad_page_ids_are_named(page: int, entry: int) -> None:
    table = TABLE.clone()
    table[0, page] = entry
    match = rf"page_table: expected page ids in \[0, 6\), .* got {entry} at row 0, page {page};"
    with pytest.raises(InvalidInput, match=match):
        checks.check_page_ids(make_batch(page_table=PageTable.dense(table, 4)), 6, FULL)


def test_device_batches_are_refused() -> None:
    meta = torch.device("meta")
    batch = PagedBatch(
        ints(0, 1).to(meta), ints(1).to(meta), PageTable.dense(TABLE[:1].to(meta), 4)
    )
    with pytest.raises(InvalidInput, match="batch: expected CPU tensors, got meta"):
        checks.validate(batch)
