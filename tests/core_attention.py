"""Drives _core.run_attention directly: hostile memory around a case, and its float64 answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fi_backend import _core
from fi_backend.formats import DTYPE_CODES

STALE = 2**31 - 1  # dereferenced, it is a fault
SPARE_PAGES = 3
ISAS = [isa for isa in ("v2", "v3", "v4") if _core.force_isa(isa)]
_core.force_isa("auto")


@dataclass(frozen=True)
class CoreCase:
    """One step.

    Attributes:
        name: of the test.
        lengths: (q_len, kv_len) of each request.
        heads: num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo.
        dtype: of q.
        kv_dtype: of the cache; None means dtype.
        out_dtype: of the output.
        page_size: tokens of a page.
        layout: nhd, hnd or packed (K and V in one row).
        table: dense, indirect (int64 rows, slots for entries), csr or mapped.
        band: left, right, sink_prefix.
        nodes: (kv_begin, kv_end, members); pages of the first member are shared by all of them.
        scales: q, k and v scale per KV head.
        num_ctas: spans of the plan.
        seed: of the data.
    """

    name: str
    lengths: tuple[tuple[int, int], ...]
    heads: tuple[int, int, int, int] = (4, 2, 64, 64)
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    out_dtype: torch.dtype = torch.float32
    page_size: int = 16
    layout: str = "nhd"
    table: str = "dense"
    band: tuple[int, int, int] = (-1, 0, 0)
    nodes: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    scales: bool = False
    num_ctas: int = 5
    seed: int = 0

    def __str__(self) -> str:
        return self.name


@dataclass
class CoreRun:
    """The tensors of a case, the plan and the parameter object."""

    case: CoreCase
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)  # [pages, page_size, num_kv_heads, head_dim_qk]
    v: Tensor = field(init=False)
    pages: list[list[int]] = field(init=False)  # of each request
    params: _core.AttentionParams = field(init=False)
    keep: list[Any] = field(default_factory=list)  # what the parameters point at

    def __post_init__(self) -> None:
        case = self.case
        generator = torch.Generator().manual_seed(case.seed)
        tokens = sum(q_len for q_len, _ in case.lengths)
        heads, _, dim, dim_vo = case.heads
        self.q = (2 * torch.randn(tokens, heads, dim, generator=generator)).to(case.dtype)
        self.out = torch.full((tokens, heads, dim_vo), math.nan).to(case.out_dtype)
        self.lse = torch.full((tokens, heads), math.nan)
        self.scale_values = (
            0.5 + torch.rand(3, case.heads[1], generator=generator)
            if case.scales
            else torch.ones(3, case.heads[1])
        )
        self._place_pages(generator)
        self._fill_cache(generator)
        self._make_params()

    def _place_pages(self, generator: torch.Generator) -> None:
        counts = [-(-kv_len // self.case.page_size) for _, kv_len in self.case.lengths]
        self.num_pages = sum(counts) + SPARE_PAGES
        order = torch.randperm(self.num_pages, generator=generator).tolist()
        self.pages = []
        for count in counts:
            self.pages.append(order[:count])
            order = order[count:]
        for begin, end, members in self.case.nodes:
            span = slice(begin // self.case.page_size, end // self.case.page_size)
            for member in members[1:]:
                self.pages[member][span] = self.pages[members[0]][span]

    def _fill_cache(self, generator: torch.Generator) -> None:
        case = self.case
        _, heads, dim, dim_vo = case.heads
        dtype = case.kv_dtype or case.dtype
        shape = (self.num_pages, case.page_size, heads, dim + dim_vo)
        data = torch.randn(shape, generator=generator)
        used = torch.zeros(shape[:2], dtype=torch.bool)
        for (_, kv_len), pages in zip(case.lengths, self.pages, strict=True):
            position = torch.arange(kv_len)
            used[
                torch.tensor(pages, dtype=torch.long)[position // case.page_size],
                position % case.page_size,
            ] = True
        data[~used] = math.nan
        data = data.to(dtype)
        if case.layout == "packed":
            self.k, self.v = data[..., :dim], data[..., dim:]
            return
        self.k, self.v = data[..., :dim].contiguous(), data[..., dim:].contiguous()
        if case.layout == "hnd":
            self.k, self.v = (
                t.transpose(1, 2).contiguous().transpose(1, 2) for t in (self.k, self.v)
            )

    def _pointer(self, tensor: Tensor) -> int:
        self.keep.append(tensor)
        return tensor.data_ptr()

    def _make_table(self, table: _core.PageTableView) -> None:
        """Rows of request r, in the form that the case asks for; unused entries are stale."""
        case, count = self.case, len(self.pages)
        table.page_size, table.num_rows = case.page_size, count
        if case.table == "csr":
            flat = [page for pages in self.pages for page in pages]
            indptr = torch.tensor([0, *(len(p) for p in self.pages)]).cumsum(0)
            table.entries = self._pointer(torch.tensor([*flat, STALE], dtype=torch.int32))
            table.indptr = self._pointer(indptr.to(torch.int32))
            return
        slots, stride, pages = 1, 1, self.pages
        if case.table == "indirect":  # one entry per token: page id times page size
            slots = stride = case.page_size
            index = torch.arange(count - 1, -1, -1) + 1
            table.row_index, table.row_index_is_int64 = self._pointer(index), 1
        if case.table == "mapped":
            page_map = torch.arange(self.num_pages - 1, -1, -1, dtype=torch.int32)
            table.page_map = self._pointer(page_map)
            pages = [[self.num_pages - 1 - page for page in row] for row in pages]
        width = (max((len(p) for p in pages), default=0) + 2) * stride
        dense = torch.full((count + 1, width), STALE, dtype=torch.int32)
        for r, row in enumerate(pages):
            at = count - r if case.table == "indirect" else r
            dense[at, : len(row) * stride : stride] = torch.tensor(row, dtype=torch.int32) * slots
        self.entries = dense
        table.entries, table.row_stride = self._pointer(dense), dense.stride(0)
        table.entry_stride, table.slot_divisor = stride, slots

    def _make_plan(self, params: _core.AttentionParams) -> None:
        case = self.case
        count, nodes = len(case.lengths), case.nodes
        tokens = sum(q_len for q_len, _ in case.lengths)
        links = sum(len(members) for _, _, members in nodes)
        capacity = _core.PlanCapacity(
            count, tokens, max(n for _, n in case.lengths), len(nodes), links, tokens * len(nodes)
        )
        self.config = _core.PlanConfig(
            case.heads[0],
            case.heads[1],
            case.num_ctas,
            _core.Band(*case.band),
            0,
            _core.cpu_tile_classes(),
            capacity,
        )
        self.layout = self.config.layout()
        self.plan = torch.zeros(self.layout.total_bytes, dtype=torch.uint8)
        member_ptr = torch.tensor([0, *(len(m) for _, _, m in nodes)]).cumsum(0)
        arrays = [
            [m[0] for _, _, m in nodes],
            [b for b, _, _ in nodes],
            [e for _, e, _ in nodes],
            member_ptr,
            [r for _, _, m in nodes for r in m],
        ]
        addresses = [self._pointer(torch.as_tensor(a, dtype=torch.int32)) for a in arrays]
        indptr = torch.tensor([0, *(q for q, _ in case.lengths)]).cumsum(0).to(torch.int32)
        lengths = torch.tensor([n for _, n in case.lengths])
        status = _core.make_plan(
            self.config,
            self.layout,
            count,
            indptr.data_ptr(),
            lengths.data_ptr(),
            8,
            len(nodes),
            [*addresses, 0],
            self.plan.data_ptr(),
        )
        assert status == 0
        rows = self.layout.max_partial_rows
        self.arrivals = torch.zeros(self.layout.max_units, dtype=torch.int32)
        params.plan, params.layout = self.plan.data_ptr(), self.layout
        params.set_classes(self.config.classes)
        params.partial_o = self._pointer(torch.full((rows, case.heads[3]), math.nan))
        params.partial_lse = self._pointer(torch.full((rows,), math.nan))
        params.arrivals = self.arrivals.data_ptr()

    def _make_params(self) -> None:
        case, params = self.case, _core.AttentionParams()
        params.q, params.q_dtype = self.q.data_ptr(), DTYPE_CODES[case.dtype]
        params.q_stride_token, params.q_stride_head = self.q.stride()[:2]
        params.out, params.out_dtype = self.out.data_ptr(), DTYPE_CODES[case.out_dtype]
        params.out_stride_token, params.out_stride_head = self.out.stride()[:2]
        params.lse = self.lse.data_ptr()
        params.kv.k, params.kv.v = self.k.data_ptr(), self.v.data_ptr()
        params.kv.k_stride = _core.KvStrides(*self.k.stride()[:3])
        params.kv.v_stride = _core.KvStrides(*self.v.stride()[:3])
        params.kv.num_pages, params.kv.page_size = self.num_pages, case.page_size
        params.kv.dtype = DTYPE_CODES[self.k.dtype]
        params.heads, params.band = _core.HeadShape(*case.heads), _core.Band(*case.band)
        params.scale = case.heads[2] ** -0.5
        if case.scales:
            params.q_scale, params.k_scale, params.v_scale = (
                _core.Scale(row.data_ptr(), True) for row in self.scale_values
            )
        self._make_table(params.table)
        self._make_plan(params)
        self.params = params

    def run(self, threads: int = 2) -> tuple[Tensor, Tensor]:
        """Run the plan; returns fresh copies of out and lse."""
        self.out.fill_(math.nan)
        self.lse.fill_(math.nan)
        _core.run_attention(self.params, threads)
        assert not self.arrivals.any(), "merge counters are left at zero"
        return self.out.clone(), self.lse.clone()

    def logits(self, request: int) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 scaled logits [heads, q_len, kv_len], their band, and V [kv_len, heads, dim]."""
        case = self.case
        begin = sum(q for q, _ in case.lengths[:request])
        q_len, kv_len = case.lengths[request]
        group, position = case.heads[0] // case.heads[1], torch.arange(kv_len)
        page = torch.tensor(self.pages[request], dtype=torch.long)[position // case.page_size]
        k, v = (t[page, position % case.page_size].double() for t in (self.k, self.v))
        q_scale, k_scale, v_scale = self.scale_values.double()
        k = (k * (q_scale * k_scale)[:, None]).repeat_interleave(group, 1)
        v = (v * v_scale[:, None]).repeat_interleave(group, 1)
        q = self.q[begin : begin + q_len].double()
        logits = torch.einsum("qhd,khd->hqk", q, k) * case.heads[2] ** -0.5
        left, right, prefix = case.band
        distance = position - torch.arange(kv_len - q_len, kv_len)[:, None]
        seen = torch.ones(q_len, kv_len, dtype=torch.bool)
        if left >= 0:
            seen &= (distance >= -left) | (position < prefix)
        if right >= 0:
            seen &= distance <= right
        return logits, seen, v

    def expected(self) -> tuple[Tensor, Tensor]:
        """Float64 o and lse of plain softmax attention."""
        outputs, sums = [], []
        for request in range(len(self.case.lengths)):
            logits, seen, v = self.logits(request)
            logits = logits.masked_fill(~seen, -math.inf)
            lse = torch.logsumexp(logits, -1)
            weights = (logits - lse.clamp(min=-1e300)[..., None]).exp()
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
            sums.append(lse.T)
        return torch.cat(outputs), torch.cat(sums)


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Fp32 arithmetic on exact inputs: about 1e-6 of the largest value and of an lse near 10."""
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=5e-6)
