"""What attention means, in plain torch: the float64 oracle.

Nothing here is fast and nothing is shared with the kernels. The same code in the dtype of the
inputs is the "plain torch attention" that a kernel is measured against (tolerance.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fi_backend.formats import CAUSAL, Band, KvCacheView, PagedBatch
from fi_backend.variants import Variant


@dataclass(frozen=True)
class Problem:
    """One attention call: everything ``attention`` gets, as the oracle needs it.

    Attributes:
        batch: the step, any device; values are read on the host.
        q: [num_tokens, num_qo_heads, head_dim_qk].
        kv: the cache.
        band: which KV positions a query may see.
        variant: what happens to logits; None is plain softmax attention.
        params: the variant's parameters.
        scale: of the logits; None means 1 / sqrt(head_dim_qk).
        q_scale: float32, one value or one per KV head; None means 1.
        k_scale: as q_scale.
        v_scale: as q_scale, applied to the output.
        partial: the state before sinks and output transform.
    """

    batch: PagedBatch
    q: Tensor
    kv: KvCacheView
    band: Band = CAUSAL
    variant: Variant | None = None
    params: Mapping[str, Tensor | float] = field(default_factory=dict)
    scale: float | None = None
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    partial: bool = False

    @property
    def num_tokens(self) -> int:
        """Query tokens that belong to a request; rows of q past them are padding."""
        return int(self.batch.qo_indptr[-1])


def solve(
    problem: Problem, dtype: torch.dtype = torch.float64, rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (o, lse) of plain torch attention, products in ``dtype``.

    Args:
        problem: what to compute.
        dtype: float64 for the oracle; the dtype of q for what plain torch would give, with softmax
            and variant in float32.
        rotate: sum over KV positions and head components in an order rotated by this much.

    Returns:
        o [num_tokens, num_qo_heads, head_dim_vo] and natural lse [num_tokens, num_qo_heads],
        float64 or float32. Without softmax lse is zero.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    heads = problem.q.shape[1]
    o = torch.zeros(problem.num_tokens, heads, problem.kv.v.shape[-1], dtype=wide)
    lse = torch.full((problem.num_tokens, heads), -math.inf, dtype=wide)
    indptr = problem.batch.qo_indptr.tolist()
    for request in range(problem.batch.num_requests):
        rows = slice(indptr[request], indptr[request + 1])
        if rows.stop > rows.start:
            o[rows], lse[rows] = _solve_request(problem, request, rows, (dtype, rotate))
    return o, lse


def _solve_request(
    problem: Problem, request: int, rows: slice, arithmetic: tuple[torch.dtype, int]
) -> tuple[Tensor, Tensor]:
    dtype, rotate = arithmetic
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    num_kv_heads, num_heads = problem.kv.k.shape[2], problem.q.shape[1]
    kv_len, q_len = int(problem.batch.kv_len[request]), rows.stop - rows.start
    q_pos = torch.arange(kv_len - q_len, kv_len)
    visible = band_mask(problem.band, q_pos, torch.arange(kv_len))
    kv_pos = visible.any(0).nonzero().flatten().roll(rotate)  # nothing else is read
    pages, slots = locate(problem.batch, request, kv_pos)
    head = torch.arange(num_heads) // (num_heads // num_kv_heads)  # KV head of each query head
    k, v = (t[pages, slots].to(dtype)[:, head] for t in (problem.kv.k, problem.kv.v))
    logits = _products(problem, problem.q[rows], k, (q_pos, kv_pos), arithmetic)
    logits *= problem.q.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    for factor in (problem.q_scale, problem.k_scale):
        logits *= _per_head(factor, head, wide)[:, None, None]
    context: dict[str, Tensor | int | float] = {
        "kv_pos": kv_pos,
        "q_pos": q_pos[:, None],
        "token": torch.arange(rows.start, rows.stop)[:, None],
        "q_head": torch.arange(num_heads)[:, None, None],
        "kv_head": head[:, None, None],
        "request": request,
        "q_len": q_len,
        "kv_len": kv_len,
    }
    mask, softmax = visible[:, kv_pos], True
    if problem.variant is not None:
        softmax = problem.variant.softmax
        logits = problem.variant.evaluate_logits(logits, context, problem.params)
        mask = mask & problem.variant.evaluate_mask(context, problem.params)
    logits = torch.where(mask, logits, -math.inf if softmax else 0.0)
    v = torch.where(mask.expand(logits.shape).any(1).T[:, :, None], v, 0)  # 0 * NaN is NaN
    weights, lse = _softmax(logits) if softmax else (logits, logits.new_zeros(logits.shape[:2]))
    o = torch.einsum("hqk,khd->hqd", weights.to(dtype), v).to(wide)
    o *= _per_head(problem.v_scale, head, wide)[:, None, None]
    if not problem.partial:
        o, lse = _finish(problem, context, o, lse)
    return o.transpose(0, 1), lse.T


def _products(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    positions: tuple[Tensor, Tensor],
    arithmetic: tuple[torch.dtype, int],
) -> Tensor:
    """q . k [heads, q, k] of one request, both turned by their slots where the variant asks."""
    dtype, rotate = arithmetic
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rotation = None if problem.variant is None else problem.variant.rotation

    def product(q: Tensor, k: Tensor) -> Tensor:
        q, k = (t.to(dtype).roll(rotate, -1) for t in (q, k))
        return torch.einsum("qhd,khd->hqk", q, k).to(wide)

    if rotation is None:
        return product(q, k)
    return rotation.products(
        (q.to(wide), k.to(wide)),
        positions,
        problem.params,
        product,
        at_once=1 if dtype == torch.float64 else max(len(q), 1),
    )


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and natural log-sum-exp of the last dimension; an empty row has weights 0, -inf."""
    lse = torch.logsumexp(logits, -1)
    return torch.exp(logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]), lse


def _finish(
    problem: Problem, context: dict[str, Tensor | int | float], o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Sinks, then the output transform."""
    variant = problem.variant
    if variant is None:
        return o, lse
    if variant.sinks is not None:
        sinks = torch.as_tensor(problem.params[variant.sinks]).to(lse.dtype)[:, None]
        with_sink = torch.logaddexp(lse, sinks)
        keep = torch.where(lse == -math.inf, 0.0, torch.exp(lse - with_sink))
        o, lse = o * keep[..., None], with_sink
    words = {name: word for name, word in context.items() if name != "kv_pos"}
    return variant.evaluate_output(
        o, words | {"dim": torch.arange(o.shape[-1])}, problem.params
    ), lse


def band_mask(band: Band, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    """Return which of the positions [q] see which of [k]: bool [q, k]."""
    distance = q_pos[:, None] - kv_pos
    visible = torch.ones_like(distance, dtype=torch.bool)
    if band.left >= 0:
        visible &= (distance <= band.left) | (kv_pos < band.sink_prefix)
    if band.right >= 0:
        visible &= -distance <= band.right
    return visible


def locate(batch: PagedBatch, request: int, kv_pos: Tensor) -> tuple[Tensor, Tensor]:
    """Return page id and slot within the page of KV positions of a request, nodes included."""
    row = torch.full_like(kv_pos, request)
    nodes, table = batch.nodes, batch.page_table
    if nodes is not None and nodes.own_begin is not None:
        for n in range(nodes.num_nodes):
            members = nodes.members[int(nodes.member_ptr[n]) : int(nodes.member_ptr[n + 1])]
            if request in members.tolist():
                inside = (kv_pos >= nodes.kv_begin[n]) & (kv_pos < nodes.kv_end[n])
                row[inside] = nodes.table_row[n].long()
    page = kv_pos // table.page_size
    if table.indptr is not None:
        ids = table.entries[table.indptr[row].long() + page]
    else:
        row = row if table.row_index is None else table.row_index[row].long()
        ids = table.entries[row, page * table.entry_stride]
    ids = ids.long() // table.slot_divisor
    return ids if table.page_map is None else table.page_map[ids].long(), kv_pos % table.page_size


def _per_head(scale: Tensor | None, head: Tensor, dtype: torch.dtype) -> Tensor:
    values = torch.ones(1) if scale is None else scale.reshape(-1)
    return (values[head] if values.numel() > 1 else values.expand(head.numel())).to(dtype)
