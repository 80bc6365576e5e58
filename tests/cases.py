"""Attention problems for tests: a case is plain data, ``make_problem`` turns it into tensors.

Every problem is hostile on purpose: NaN in unused slots of pages, huge ids in unused table entries,
shuffled pages, logits with real spread, and padding rows of q that belong to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from variant_cases import VARIANTS

from fi_backend.formats import CAUSAL, Band, HeadShape, KvCacheView, PagedBatch, PageTable
from fi_backend.oracle import Problem

STALE = 2**31 - 1  # dereferenced, it is a fault
SPARE_PAGES = 3
# Standard deviation of q: with unit keys the largest of 64 logits of a row is about 2.4 times this.
SPREAD = 3.0


@dataclass(frozen=True)
class Case:
    """One batch and how its memory is laid out.

    Attributes:
        name: of the test.
        lengths: (q_len, kv_len) of each request, tokens.
        heads: of the layer.
        dtype: of q.
        kv_dtype: of the cache; None means dtype.
        page_size: tokens of a page.
        layout: of the cache: nhd, hnd, stacked, packed or slots.
        table: dense, wide, indirect, indirect64, slots, csr or mapped.
        band: which KV positions a query may see.
        variant: key of VARIANTS; empty means plain softmax attention.
        wide_lengths: kv_len is int64.
        strided: q is a slice of a fused projection, out has gaps.
        scales: "", "one" or "per_head": q, k and v scales on the device.
        padding: rows of q past the last request.
    """

    name: str
    lengths: tuple[tuple[int, int], ...]
    heads: HeadShape = field(default_factory=lambda: HeadShape(4, 2, 64))
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    page_size: int = 16
    layout: str = "nhd"
    table: str = "dense"
    band: Band = CAUSAL
    variant: str = ""
    wide_lengths: bool = False
    strided: bool = False
    scales: str = ""
    padding: int = 0

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.dtype if self.kv_dtype is None else self.kv_dtype


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Return the tensors of a case; equal seeds give equal problems."""
    g = torch.Generator().manual_seed(seed)
    pages = _assign_pages(case, g)
    q_len, kv_len = (torch.tensor([n[i] for n in case.lengths]) for i in (0, 1))
    indptr = torch.cat([torch.zeros(1, dtype=torch.long), q_len.cumsum(0)]).int()
    batch = PagedBatch(
        indptr, kv_len if case.wide_lengths else kv_len.int(), make_table(case, pages, g)
    )
    variant, params = VARIANTS[case.variant](case, g) if case.variant else (None, {})
    scales = make_scales(case, g)
    return Problem(
        batch,
        make_q(case, int(indptr[-1]), g),
        make_cache(case, pages, g),
        case.band,
        variant,
        params,
        partial=False,
        **scales,
    )


def _assign_pages(case: Case, g: torch.Generator) -> list[Tensor]:
    """Distinct, shuffled pages for each request."""
    counts = [-(-kv_len // case.page_size) for _, kv_len in case.lengths]
    ids = torch.randperm(sum(counts) + SPARE_PAGES, generator=g)
    return list(ids[: sum(counts)].split(counts)) if counts else []


def make_table(case: Case, pages: list[Tensor], g: torch.Generator) -> PageTable:
    """Return the page table in the case's form."""
    if case.table == "csr":
        counts = torch.tensor([0] + [p.numel() for p in pages]).cumsum(0)
        return PageTable.csr(
            counts.int(), torch.cat([*pages, torch.tensor([STALE])]).int(), case.page_size
        )
    rows, widest = len(pages), max((p.numel() for p in pages), default=0) + 2
    if case.table == "mapped":
        size = sum(p.numel() for p in pages) + SPARE_PAGES
        shuffle = torch.randperm(2 * size, generator=g)[:size]  # ids of a larger pool
        page_map = torch.full((2 * size,), STALE, dtype=torch.int32)
        page_map[shuffle] = torch.arange(size, dtype=torch.int32)
        return PageTable.dense(
            _fill(rows, widest, [shuffle[p] for p in pages]), case.page_size, page_map=page_map
        )
    if case.table == "slots":
        table, index = _scatter_rows(rows, widest * case.page_size, g)
        for row, p in zip(index, pages, strict=True):
            table[row, : p.numel() * case.page_size : case.page_size] = (p * case.page_size).int()
        return PageTable.indirect(
            table, index, case.page_size, entry_stride=case.page_size, slot_divisor=case.page_size
        )
    if case.table.startswith("indirect"):
        table, index = _scatter_rows(rows, widest, g)
        table[index] = _fill(rows, widest, pages)
        index = index if case.table == "indirect64" else index.int()
        return PageTable.indirect(table, index, case.page_size)
    if case.table == "wide":
        wide = torch.full((rows, 2 * widest + 1), STALE, dtype=torch.int32)
        wide[:, 3 : 3 + widest] = _fill(rows, widest, pages)
        return PageTable.dense(wide[:, 3 : 3 + widest], case.page_size)
    assert case.table == "dense", case.table
    return PageTable.dense(_fill(rows, widest, pages), case.page_size)


def _fill(rows: int, columns: int, pages: list[Tensor]) -> Tensor:
    table = torch.full((rows, columns), STALE, dtype=torch.int32)
    for row, p in enumerate(pages):
        table[row, : p.numel()] = p.int()
    return table


def _scatter_rows(rows: int, columns: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A larger table of stale entries and a distinct row of it for each request."""
    index = torch.randperm(2 * rows + 1, generator=g)[:rows]
    return torch.full((2 * rows + 1, columns), STALE, dtype=torch.int32), index


def make_cache(case: Case, pages: list[Tensor], g: torch.Generator) -> KvCacheView:
    """Return a cache with unit-variance K and V in used slots and NaN everywhere else."""
    shape = (sum(p.numel() for p in pages) + SPARE_PAGES, case.page_size, case.heads.num_kv_heads)
    k = torch.full((*shape, case.heads.head_dim_qk), torch.nan)
    v = torch.full((*shape, case.heads.head_dim_vo), torch.nan)
    for (_, kv_len), ids in zip(case.lengths, pages, strict=True):
        for cache in (k, v):
            flat = torch.full((ids.numel() * case.page_size, *cache.shape[2:]), torch.nan)
            flat[:kv_len] = torch.randn(kv_len, *cache.shape[2:], generator=g)
            cache[ids] = flat.view(-1, *cache.shape[1:])
    return lay_out(case.layout, k.to(case.cache_dtype), v.to(case.cache_dtype))


def lay_out(layout: str, k: Tensor, v: Tensor) -> KvCacheView:
    """Return k and v [pages, page, heads, dim] stored in the given layout."""
    if layout == "nhd":
        return KvCacheView.nhd(k, v)
    if layout == "hnd":
        return KvCacheView.hnd(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
    if layout == "stacked":
        return KvCacheView.stacked(torch.stack([k, v], dim=1))
    if layout == "packed":  # vLLM >= 0.32: [pages, heads, page, dims], seen with tokens first
        stored = torch.cat([k, v], dim=-1).transpose(1, 2).contiguous()
        return KvCacheView.packed(stored.transpose(1, 2), k.shape[-1])
    assert layout == "slots", layout
    return KvCacheView.slots(k.flatten(0, 1), v.flatten(0, 1), k.shape[1])


def make_q(case: Case, num_tokens: int, g: torch.Generator) -> Tensor:
    """Return q, contiguous or a slice of a fused projection."""
    heads, rows = case.heads, num_tokens + case.padding
    extra = 2 * heads.num_kv_heads if case.strided else 0
    fused = torch.randn(rows, heads.num_qo_heads + extra, heads.head_dim_qk, generator=g) * SPREAD
    fused[num_tokens:] = torch.nan
    return fused.to(case.dtype)[:, : heads.num_qo_heads]


def make_scales(case: Case, g: torch.Generator) -> Mapping[str, Tensor]:
    """Return q, k and v scales around 1, one value or one per KV head."""
    if not case.scales:
        return {}
    shape = () if case.scales == "one" else (case.heads.num_kv_heads,)
    return {
        name: 0.5 + torch.rand(shape, generator=g) for name in ("q_scale", "k_scale", "v_scale")
    }


def make_out(case: Case, problem: Problem) -> Tensor:
    """Return an output of NaN, contiguous or with gaps between tokens and heads."""
    heads = case.heads
    gaps = 2 if case.strided else 1
    shape = (problem.q.shape[0], gaps * heads.num_qo_heads, gaps * heads.head_dim_vo)
    out = torch.full(shape, torch.nan, dtype=case.dtype)
    return out[:, ::gaps, : heads.head_dim_vo]
