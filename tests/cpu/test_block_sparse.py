"""Block-sparse matrices: expected batches, dense attention under the same mask, refusals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from running import Result, compare
from torch import Tensor

import fi_backend as fi
from fi_backend.oracle import Problem, solve
from fi_backend.variants.shipped import custom_mask

HEADS = fi.HeadShape(4, 2, 32)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense_mask(matrix: fi.BlockSparse) -> Tensor:
    """The elements of a matrix: bool [rows, columns]."""
    rows, cols = matrix.row_bounds().tolist(), matrix.col_bounds().tolist()
    mask = torch.zeros(rows[-1], cols[-1], dtype=torch.bool)
    indptr, indices = matrix.indptr.tolist(), matrix.indices.tolist()
    for b in range(len(rows) - 1):
        for c in indices[indptr[b] : indptr[b + 1]]:
            mask[rows[b] : rows[b + 1], cols[c] : cols[c + 1]] = True
    return mask


def union(matrices: Sequence[fi.BlockSparse]) -> Tensor:
    masks = [dense_mask(m) for m in matrices]
    out = torch.zeros(masks[0].shape[0], max(m.shape[1] for m in masks), dtype=torch.bool)
    for mask in masks:
        assert not (out[:, : mask.shape[1]] & mask).any()
        out[:, : mask.shape[1]] |= mask
    return out


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Float64 attention of every row over the columns its mask shows; 0 where there are none."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.double(), k) / q.shape[-1] ** 0.5
    weights = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v)


def check(batch: fi.PagedBatch, mask: Tensor, variant_mask: Tensor | None = None) -> None:
    """Run a batch; columns that no row shows hold NaN."""
    g = torch.Generator().manual_seed(0)
    page = batch.page_table.page_size
    q = torch.randn(mask.shape[0], 4, 32, generator=g) * 3
    k, v = torch.randn(2, mask.shape[1], 2, 32, generator=g)
    seen = mask if variant_mask is None else mask & variant_mask
    expected = dense_attention(q, k, v, seen)
    k[~mask.any(0)] = v[~mask.any(0)] = torch.nan
    kv = fi.KvCacheView.slots(k, v, page)
    variant = None if variant_mask is None else custom_mask()
    params = {} if variant_mask is None else fi.element_mask(batch, variant_mask)
    layer = fi.Attention(HEADS, torch.float32, band=fi.FULL, variant=variant)
    layer.plan(batch)
    lse = torch.full(q.shape[:2], torch.nan)
    out = layer(q, kv, lse=lse, params=params)
    problem = Problem(batch, q, kv, fi.FULL, variant, params)
    torch.testing.assert_close(solve(problem)[0], expected, rtol=1e-9, atol=1e-9)
    compare(Result(out, lse), problem)


def test_blocks_become_pages() -> None:
    batch = fi.block_sparse(2, 4, ints(0, 2, 3), ints(0, 2, 1))
    assert batch.qo_indptr.tolist() == [0, 2, 4]
    assert batch.kv_len.tolist() == [8, 4]
    assert (batch.page_table.page_size, batch.nodes) == (4, None)
    assert batch.page_table.entries.tolist() == [0, 2, 1]
    small = fi.block_sparse(2, 4, ints(0, 2, 3), ints(0, 2, 1), page_size=2)
    assert small.page_table.entries.tolist() == [0, 1, 4, 5, 2, 3]
    assert small.page_table.indptr.tolist() == [0, 4, 6]


def test_a_cut_last_column_makes_smaller_pages() -> None:
    batch = fi.block_sparse(1, 4, ints(0, 2), ints(2, 0), num_cols=10)
    assert (batch.page_table.page_size, batch.kv_len.tolist()) == (2, [6])
    assert batch.page_table.entries.tolist() == [4, 0, 1]


def test_nested_rows_share_through_a_node() -> None:
    """Four tokens share columns [0, 4); each pair has a block of two columns of its own."""
    coarse = fi.BlockSparse(4, 4, ints(0, 1), ints(0))
    fine = fi.BlockSparse(2, 2, ints(0, 1, 2), ints(2, 3))
    batch = fi.compose([coarse, fine])
    assert batch.qo_indptr.tolist() == [0, 2, 4]
    assert batch.kv_len.tolist() == [6, 6]
    assert batch.page_table.entries.tolist() == [0, 1, 2, 0, 1, 3]
    nodes = batch.nodes
    assert nodes is not None
    assert (nodes.kv_begin.tolist(), nodes.kv_end.tolist()) == ([0], [4])
    assert (nodes.table_row.tolist(), nodes.members.tolist()) == ([0], [0, 1])
    assert nodes.own_begin is not None and nodes.own_begin.tolist() == [4, 4]
    check(batch, union([coarse, fine]))


MATRICES = {
    "squares": fi.BlockSparse(16, 16, ints(0, 2, 2, 5), ints(1, 3, 0, 2, 3)),
    "flat": fi.BlockSparse(1, 32, ints(0, 1, 3, 3, 4), ints(1, 0, 2, 2)),
    "tall": fi.BlockSparse(70, 4, ints(0, 9, 12), ints(*range(3, 12), 0, 20, 7)),
    "vector-sparse": fi.BlockSparse(8, 1, ints(0, 40, 63), ints(*range(0, 80, 2), *range(23))),
    "cut": fi.BlockSparse(8, 16, ints(0, 3, 4), ints(3, 0, 2, 3), num_rows=11, num_cols=56),
    "any-sizes": fi.BlockSparse(
        ints(3, 1, 20), ints(6, 2, 9, 33), ints(0, 2, 2, 5), ints(3, 1, 0, 2, 3)
    ),
    "no-blocks": fi.BlockSparse(2, 4, ints(0, 0, 0), ints(), num_cols=8),
}


@pytest.mark.parametrize("name", MATRICES)
def test_against_dense_attention(name: str) -> None:
    matrix = MATRICES[name]
    check(fi.compose([matrix]), dense_mask(matrix))


@pytest.mark.parametrize("name", ["squares", "vector-sparse", "any-sizes"])
def test_element_masks(name: str) -> None:
    mask = dense_mask(MATRICES[name])
    g = torch.Generator().manual_seed(1)
    check(fi.compose([MATRICES[name]]), mask, torch.rand(mask.shape, generator=g) < 0.6)


def random_format(rng: random.Random, nested: bool) -> list[fi.BlockSparse]:
    """Disjoint matrices: every column block belongs to the matrix that drew it."""
    rows, blocks, size = 48, 24, rng.choice((1, 2, 4))
    owner = [rng.randrange(3) for _ in range(blocks)]
    heights = rng.choice(((48, 16, 4), (24, 12, 3), (48, 8, 8))) if nested else (32, 20, 7)
    matrices = []
    for m, height in enumerate(heights):
        picks = [
            [c for c in range(blocks) if owner[c] == m and rng.random() < 0.7]
            for _ in range(-(-rows // height))
        ]
        for pick in picks:
            rng.shuffle(pick)
        indptr = torch.tensor([0, *map(len, picks)]).cumsum(0).int()
        indices = ints(*(c for pick in picks for c in pick))
        matrices.append(fi.BlockSparse(height, size, indptr, indices, rows, blocks * size))
    return matrices


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("nested", [True, False])
def test_random_composable_formats(seed: int, nested: bool) -> None:
    matrices = random_format(random.Random(seed), nested)
    batch = fi.compose(matrices)
    assert batch.nodes is not None or not nested
    check(batch, union(matrices))


def matrix(**changes: Any) -> fi.BlockSparse:
    fields = {"block_rows": 2, "block_cols": 4, "indptr": ints(0, 1, 2), "indices": ints(0, 1)}
    return fi.BlockSparse(**(fields | changes))


@dataclass(frozen=True)
class Bad:
    """A call that must be refused, and a pattern of its message."""

    match: str
    call: Any


BAD = [
    Bad("indptr: expected rising counts from 0 to 2", lambda: matrix(indptr=ints(0, 1, 3))),
    Bad("indptr: expected rising counts from 0 to 2", lambda: matrix(indptr=ints(1, 1, 2))),
    Bad("indptr: expected torch.int32", lambda: matrix(indptr=torch.tensor([0, 1, 2]))),
    Bad(r"block_rows: .* at least one token.*, got \[0, 0\]", lambda: matrix(block_rows=0)),
    Bad(r"block_rows: .* add up to the matrix of 7, got \[2, 5\]", lambda: matrix(num_rows=7)),
    Bad(
        r"block_rows: .* add up to the matrix of 3, got \[2, 2\]",
        lambda: matrix(block_rows=ints(2, 2), num_rows=3),
    ),
    Bad("block_rows: expected 2 sizes, .*, got 3", lambda: matrix(block_rows=ints(2, 2, 2))),
    Bad(
        r"block_cols: .* at least one token.*, got \[4, 0\]", lambda: matrix(block_cols=ints(4, 0))
    ),
    Bad(
        r"indices: expected column blocks in \[0, 1\), got 1 at position 1",
        lambda: matrix(num_cols=4),
    ),
    Bad("formats: expected at least one matrix, got none", lambda: fi.compose([])),
    Bad(
        r"formats\[1\]: expected 4 rows, as in formats\[0\], got 6",
        lambda: fi.compose([matrix(), matrix(block_rows=3)]),
    ),
    Bad(
        "formats: expected disjoint blocks, got page 1 twice for request 1",
        lambda: fi.compose([matrix(), matrix(indices=ints(2, 1))]),
    ),
    Bad(
        "page_size: expected a divisor of 4, which divides all column blocks, got 3",
        lambda: fi.compose([matrix()], page_size=3),
    ),
    Bad(
        r"mask: expected bool \[4, 8 or more\], got torch.bool \[4, 7\]",
        lambda: fi.element_mask(fi.compose([matrix()]), torch.ones(4, 7, dtype=torch.bool)),
    ),
    Bad(
        "batch: expected a CSR page table, got another",
        lambda: fi.element_mask(
            fi.PagedBatch(ints(0), ints(), fi.PageTable.dense(ints().view(0, 0), 1)),
            torch.ones(0, 0, dtype=torch.bool),
        ),
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.match[:40])
def test_refusals(bad: Bad) -> None:
    with pytest.raises(fi.InvalidInput, match=bad.match):
        bad.call()
