"""Formats: addresses and strides of every layout, and every contract error of the constructors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fi_backend.errors import CapacityExceeded, FiError, InvalidInput, require
from fi_backend.formats import (
    CAUSAL,
    DTYPE_CODES,
    FULL,
    Band,
    HeadShape,
    KvCacheView,
    Nodes,
    PagedBatch,
    PageTable,
)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_error_sentence() -> None:
    with pytest.raises(InvalidInput) as caught:
        require(False, "q", "3 dimensions", "shape (2,)", "reshape it")
    assert str(caught.value) == "q: expected 3 dimensions, got shape (2,); reshape it"
    with pytest.raises(CapacityExceeded):
        require(False, "q", "less", 3, "split", kind=CapacityExceeded)
    assert issubclass(InvalidInput, FiError) and issubclass(InvalidInput, ValueError)
    require(True, "q", "anything", 1, "nothing")


def test_dtype_codes_are_those_of_the_kernels() -> None:
    expected = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    assert [DTYPE_CODES[dtype] for dtype in expected] == [0, 1, 2, 3]


def test_head_shape() -> None:
    heads = HeadShape(12, 4, 192, 128)
    assert (heads.group_size, heads.head_dim_qk, heads.head_dim_vo) == (3, 192, 128)
    assert HeadShape(8, 8, 64) == HeadShape(8, 8, 64, 64)


def test_band() -> None:
    assert Band(-1, 0) == CAUSAL
    assert Band(-1, -1) == FULL
    assert Band.window(128) == Band(127, 0, 0)
    assert Band.window(4, sink_prefix=2) == Band(3, 0, 2)


def test_dense_view() -> None:
    table = torch.zeros(4, 10, dtype=torch.int32)[1:, 2:8]  # rows of a wider table
    view = PageTable.dense(table, 16).view()
    assert view.entries == table.data_ptr()
    assert (view.indptr, view.row_index, view.page_map) == (0, 0, 0)
    assert (view.row_stride, view.entry_stride, view.page_size, view.num_rows) == (10, 1, 16, 3)


def test_indirect_view() -> None:
    table = torch.zeros(7, 64, dtype=torch.int32)
    index = torch.tensor([5, 2], dtype=torch.int64)
    page_map = torch.zeros(9, dtype=torch.int32)
    view = PageTable.indirect(
        table, index, 16, entry_stride=16, slot_divisor=16, page_map=page_map
    ).view()
    assert (view.row_index, view.row_index_is_int64) == (index.data_ptr(), 1)
    assert view.page_map == page_map.data_ptr()
    assert (view.row_stride, view.entry_stride, view.slot_divisor) == (64, 16, 16)
    assert view.num_rows == 2
    assert PageTable.indirect(table, index.int(), 1).view().row_index_is_int64 == 0


def test_csr_view() -> None:
    indptr, indices = ints(0, 2, 3), ints(7, 8, 9)
    view = PageTable.csr(indptr, indices, 4).view()
    assert (view.indptr, view.entries) == (indptr.data_ptr(), indices.data_ptr())
    assert (view.num_rows, view.page_size) == (2, 4)


def test_kv_layouts_name_the_same_element() -> None:
    pages, page, heads, dim = 3, 4, 2, 8
    nhd = torch.arange(2 * pages * page * heads * dim, dtype=torch.float32)
    k, v = nhd.view(2, pages, page, heads, dim)
    stacked = torch.stack([k, v], dim=1)
    packed = torch.cat([k, v], dim=-1)
    flat = (k.reshape(-1, heads, dim), v.reshape(-1, heads, dim))
    views = [
        KvCacheView.nhd(k, v),
        KvCacheView.hnd(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()),
        KvCacheView.stacked(stacked),
        KvCacheView.packed(packed, dim),
        KvCacheView.slots(*flat, page_size=page),
    ]
    for view in views:
        assert (view.num_pages, view.page_size) == (pages, page)
        torch.testing.assert_close(view.k, k)
        torch.testing.assert_close(view.v, v)
    assert views[2].k.data_ptr() == stacked.data_ptr()  # views, not copies
    assert views[3].v.data_ptr() == packed.data_ptr() + dim * packed.element_size()
    ragged = KvCacheView.ragged(*flat)
    assert (ragged.num_pages, ragged.page_size) == (pages * page, 1)


def test_slots_keep_the_strides_of_a_pool() -> None:
    pool = torch.arange(2 * 6 * 2 * 8, dtype=torch.float32).view(6, 2, 2, 8)
    view = KvCacheView.slots(pool[:, 0], pool[:, 1], page_size=2)
    assert view.k.data_ptr() == pool.data_ptr()
    torch.testing.assert_close(view.v[2, 1], pool[5, 1])


def make_kv(**changes: Any) -> KvCacheView:
    shape = {"pages": 2, "page": 4, "heads": 2, "dim": 8, "dtype": torch.float32} | changes
    k = torch.zeros(2, 4, 2, 8)
    v = torch.zeros(
        shape["pages"], shape["page"], shape["heads"], shape["dim"], dtype=shape["dtype"]
    )
    return KvCacheView.nhd(k, v)


def make_nodes(**changes: torch.Tensor) -> Nodes:
    fields = {
        "table_row": ints(0),
        "kv_begin": ints(0),
        "kv_end": ints(4),
        "member_ptr": ints(0, 2),
        "members": ints(0, 1),
        "own_begin": ints(4, 4),
    }
    return Nodes(**(fields | changes))


def make_batch(**changes: Any) -> PagedBatch:
    fields = {
        "qo_indptr": ints(0, 1, 2),
        "kv_len": ints(5, 6),
        "page_table": PageTable.dense(torch.zeros(2, 4, dtype=torch.int32), 4),
    }
    return PagedBatch(**(fields | changes))


def test_batch_accepts_wide_lengths_and_extra_rows() -> None:
    table = PageTable.dense(torch.zeros(5, 4, dtype=torch.int32), 4)
    batch = make_batch(kv_len=torch.tensor([5, 6]), page_table=table, nodes=make_nodes())
    assert batch.num_requests == 2
    assert make_batch(qo_indptr=ints(0), kv_len=ints()).num_requests == 0


TABLE = torch.zeros(2, 4, dtype=torch.int32)


@dataclass(frozen=True)
class Bad:
    """A call that must be refused, and a pattern of its message."""

    match: str
    call: Any


BAD = [
    Bad("num_kv_heads: expected a positive count, got 0", lambda: HeadShape(8, 0, 64)),
    Bad("num_qo_heads: expected a multiple of num_kv_heads=3, got 8", lambda: HeadShape(8, 3, 64)),
    Bad("band.left: expected at least -1, got -2", lambda: Band(-2, 0)),
    Bad("band.right: expected at least -1, got -5", lambda: Band(0, -5)),
    Bad("band.sink_prefix: expected at least 0, got -1", lambda: Band(0, 0, -1)),
    Bad("num_tokens: expected a positive count, got 0", lambda: Band.window(0)),
    Bad("page_size: expected a positive count, got 0", lambda: PageTable.dense(TABLE, 0)),
    Bad(
        "entry_stride: expected a positive count, got 0",
        lambda: PageTable.dense(TABLE, 4, entry_stride=0),
    ),
    Bad(
        "slot_divisor: expected a positive count, got -1",
        lambda: PageTable.dense(TABLE, 4, slot_divisor=-1),
    ),
    Bad(
        "page_table: expected torch.int32, got torch.int64",
        lambda: PageTable.dense(TABLE.long(), 4),
    ),
    Bad("page_table: expected 2 dimensions, got shape", lambda: PageTable.dense(TABLE[0], 4)),
    Bad("page_table: expected contiguous rows, got strides", lambda: PageTable.dense(TABLE.t(), 4)),
    Bad("page_table: expected a tensor, got list", lambda: PageTable.dense([[0]], 4)),  # type: ignore[arg-type]
    Bad(
        "page_table.row_index: expected torch.int32 or torch.int64",
        lambda: PageTable.indirect(TABLE, torch.zeros(2), 4),
    ),
    Bad(
        "page_table.row_index: expected stride 1, got stride 2",
        lambda: PageTable.indirect(TABLE, torch.zeros(4, dtype=torch.int32)[::2], 4),
    ),
    Bad(
        "page_table.page_map: expected device cpu, got meta",
        lambda: PageTable.dense(
            TABLE, 4, page_map=torch.zeros(2, dtype=torch.int32, device="meta")
        ),
    ),
    Bad("page_table.indptr: expected num_rows", lambda: PageTable.csr(ints(), ints(1), 4)),
    Bad("k: expected 4 dimensions", lambda: KvCacheView.nhd(torch.zeros(2), torch.zeros(2))),
    Bad(
        "k: expected torch.float32 or",
        lambda: KvCacheView.nhd(*[torch.zeros(1, 1, 1, 1).long()] * 2),
    ),
    Bad(
        "k: expected stride 1 in the head dimension",
        lambda: KvCacheView.nhd(*[torch.zeros(2, 4, 8, 8).transpose(2, 3)] * 2),
    ),
    Bad("v: expected the pages, tokens and heads of k", lambda: make_kv(pages=3)),
    Bad(
        "v: expected dtype torch.float32 of k, got torch.float16", lambda: make_kv(dtype=torch.half)
    ),
    Bad("kv: expected 2 in dimension 1", lambda: KvCacheView.stacked(torch.zeros(2, 3, 4, 2, 8))),
    Bad(
        "head_dim_k: expected between 1 and 15, got 16",
        lambda: KvCacheView.packed(torch.zeros(2, 4, 2, 16), 16),
    ),
    Bad(
        "k: expected a multiple of page_size=4 slots, got 6",
        lambda: KvCacheView.slots(torch.zeros(6, 2, 8), torch.zeros(6, 2, 8), 4),
    ),
    Bad(
        "nodes.kv_end: expected 1 elements for 1 nodes, got 2",
        lambda: make_nodes(kv_end=ints(1, 2)),
    ),
    Bad("nodes.member_ptr: expected 2 elements", lambda: make_nodes(member_ptr=ints(0))),
    Bad("nodes.members: expected torch.int32", lambda: make_nodes(members=torch.tensor([0, 1]))),
    Bad("qo_indptr: expected 3 elements for 2 requests", lambda: make_batch(qo_indptr=ints(0, 1))),
    Bad("kv_len: expected torch.int32 or torch.int64", lambda: make_batch(kv_len=torch.zeros(2))),
    Bad(
        "page_table: expected at least 2 rows for 2 requests, got 1",
        lambda: make_batch(page_table=PageTable.dense(TABLE[:1], 4)),
    ),
    Bad(
        "nodes.own_begin: expected 2 elements for 2 requests, got 1",
        lambda: make_batch(nodes=make_nodes(own_begin=ints(0))),
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.match[:40])
def test_refusals(bad: Bad) -> None:
    with pytest.raises(InvalidInput, match=bad.match):
        bad.call()
