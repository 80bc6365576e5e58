"""The CPU implementation of the attention op: from tensors to the native engine's parameter block.

Filling the whole block for every layer would cost more than a small batch's attention. What depends
on the slot is set once, what depends on the step once per plan, on shapes once per change of them;
what is left per call is a comparison and the addresses.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fi_backend import _core
from fi_backend.checks import check_page_ids
from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.formats import DTYPE_CODES
from fi_backend.slot_registry import find_slot
from fi_backend.variants.stages import bind_stages

if TYPE_CHECKING:
    from fi_backend.planner import PlanSlot

_NO_SCALE = _core.Scale()


def run_attention(
    handle: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    lse: Tensor | None,
    scale: float,
    scales: list[Tensor | None],
    tensors: list[Tensor],
    names: list[str],
    numbers: list[float],
    partial: bool,
) -> None:
    """Run torch.ops.fi_backend.attention on CPU tensors; see ``attention``."""
    slot = find_slot(handle)
    launch = _launches.get(slot)
    if launch is None:
        launch = _launches[slot] = _Launch(slot)
    launch.set_step(slot, k)
    launch.set_shapes(q, k, v, out, lse)
    params, kv = launch.params, launch.kv
    kv.k, kv.v = k.data_ptr(), v.data_ptr()
    params.kv = kv
    params.q, params.out = q.data_ptr(), out.data_ptr()
    params.lse = 0 if lse is None else lse.data_ptr()
    params.scale = scale
    params.q_scale = launch.scale("q_scale", scales[0])
    params.k_scale = launch.scale("k_scale", scales[1])
    params.v_scale = launch.scale("v_scale", scales[2])
    params.partial = partial
    launch.bind_variant(tensors, names, numbers)
    _core.run_attention(params, torch.get_num_threads())


class _Launch:
    """The parameter block of one slot, and what it was filled with last."""

    def __init__(self, slot: PlanSlot) -> None:
        heads, band = slot.layer_class.heads, slot.layer_class.band
        self.layer_class = slot.layer_class
        self.planned_band = slot.layer_class.planned_band
        self.shapes: tuple[object, ...] = ()
        self.step = (0, -1)  # plans of the slot so far, pages of the cache
        self.num_tokens = self.num_requests = 0
        self.kv = _core.KvCacheView()
        self.params = _core.AttentionParams()
        self.params.plan = slot.plan.data_ptr()
        self.params.layout = slot.layout
        self.params.set_classes(slot.classes)
        self.params.partial_o = slot.partial_o.data_ptr()
        self.params.partial_lse = slot.partial_lse.data_ptr()
        self.params.arrivals = slot.arrivals.data_ptr()
        self.params.heads = _core.HeadShape(
            heads.num_qo_heads, heads.num_kv_heads, heads.head_dim_qk, heads.head_dim_vo
        )
        self.params.band = _core.Band(band.left, band.right, band.sink_prefix)

    def set_step(self, slot: PlanSlot, k: Tensor) -> None:
        """Take the page table of a step and check it against the cache, once per plan."""
        batch = slot.batch
        if batch is None:
            message = contract_message("slot", "a plan", "none", "call planner.plan(batch) first")
            raise InvalidInput(message)
        step = (slot.num_plans, k.shape[0])
        if step == self.step:
            return
        require(
            k.dim() == 4 and k.shape[1] == batch.page_table.page_size,
            "kv",
            f"pages of {batch.page_table.page_size} tokens, as in the page table",
            f"k of shape {tuple(k.shape)}",
            "view the cache with the table's page size",
        )
        check_page_ids(batch, k.shape[0], self.planned_band)
        table = _core.PageTableView()
        for name, value in batch.page_table.view()._asdict().items():
            setattr(table, name, value)
        self.params.table = table
        self.num_requests = batch.num_requests
        self.num_tokens = int(batch.qo_indptr[-1])
        self.step = step
        self.shapes = ()

    def set_shapes(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
        """Check dtypes, shapes, strides and devices and take the strides, once per change."""
        shapes = tuple(
            (t.shape, t.stride(), t.dtype, t.device) for t in (q, k, v, out, lse) if t is not None
        )
        if shapes == self.shapes:
            return
        self._check_shapes(q, k, v, out, lse)
        params, kv = self.params, self.kv
        params.q_dtype, params.out_dtype = DTYPE_CODES[q.dtype], DTYPE_CODES[out.dtype]
        params.q_stride_token, params.q_stride_head = q.stride()[:2]
        params.out_stride_token, params.out_stride_head = out.stride()[:2]
        kv.dtype = DTYPE_CODES[k.dtype]
        kv.k_stride = _core.KvStrides(*k.stride()[:3])
        kv.v_stride = _core.KvStrides(*v.stride()[:3])
        kv.num_pages, kv.page_size = k.shape[:2]
        self.shapes = shapes

    def _check_shapes(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
    ) -> None:
        layer_class = self.layer_class
        heads = layer_class.heads
        kv_tail = (self.step[1], k.shape[1], heads.num_kv_heads)
        rows = q.shape[0] if q.dim() == 3 else 0
        _check("q", q, (None, heads.num_qo_heads, heads.head_dim_qk), (layer_class.dtype,))
        require(
            rows >= self.num_tokens,
            "q",
            f"at least {self.num_tokens} tokens, those of the planned step",
            rows,
            "plan the step that q belongs to",
        )
        _check("k", k, (*kv_tail, heads.head_dim_qk), (layer_class.cache_dtype,))
        _check("v", v, (*kv_tail, heads.head_dim_vo), (layer_class.cache_dtype,))
        out_dtypes = (layer_class.dtype, torch.float32)
        _check("out", out, (rows, heads.num_qo_heads, heads.head_dim_vo), out_dtypes)
        if lse is None:
            return
        softmax = layer_class.variant is None or layer_class.variant.softmax
        require(
            softmax,
            "lse",
            "None without softmax",
            "a tensor",
            "states of such variants add, drop lse",
        )
        _check("lse", lse, (rows, heads.num_qo_heads), (torch.float32,))
        require(
            lse.is_contiguous(),
            "lse",
            "a contiguous tensor",
            describe(lse),
            "allocate it with torch.empty",
        )

    def scale(self, name: str, value: Tensor | None) -> _core.Scale:
        """Return a scale as the engine takes it."""
        return bind_scale(name, value, self.layer_class.heads.num_kv_heads)

    def bind_variant(self, tensors: list[Tensor], names: list[str], numbers: list[float]) -> None:
        """Set the variant's functions and parameters; the caller keeps the tensors alive."""
        variant = self.layer_class.variant
        # Numbers cross the op as floats; an int parameter gets its int back.
        values = [int(n) if n.is_integer() else n for n in numbers]
        params = dict(zip(names, [*tensors, *values], strict=True))
        if variant is None:
            require(
                not params,
                "params",
                "none for a layer class without a variant",
                ", ".join(params),
                "give the layer class its variant",
            )
            return
        sizes = {
            "q_head": self.layer_class.heads.num_qo_heads,
            "kv_head": self.layer_class.heads.num_kv_heads,
            "token": self.num_tokens,
            "request": self.num_requests,
        }
        bound = bind_stages(variant, params, sizes)
        self.params.set_variant(bound.stages, bound.softmax, bound.sinks_addr)


_launches: weakref.WeakKeyDictionary[PlanSlot, _Launch] = weakref.WeakKeyDictionary()


def bind_scale(name: str, value: Tensor | None, num_kv_heads: int) -> _core.Scale:
    """Return a scale in memory as the engine takes it; None means 1.

    Raises:
        InvalidInput: not float32 on the CPU with one element or one per KV head.
    """
    if value is None:
        return _NO_SCALE
    count = value.numel()
    fits = value.dtype == torch.float32 and value.device.type == "cpu" and value.is_contiguous()
    if not fits or count not in (1, num_kv_heads):
        rule = f"a contiguous float32 tensor of 1 or {num_kv_heads} elements on cpu"
        hint = "one scale for all heads, or one per KV head"
        raise InvalidInput(contract_message(name, rule, describe(value), hint))
    return _core.Scale(value.data_ptr(), count > 1)


def describe(tensor: Tensor) -> str:
    """Return a tensor's dtype, shape, strides and device, for messages."""
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with strides"
        f" {list(tensor.stride())} on {tensor.device}"
    )


def _check(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    fits = (
        tensor.dtype in dtypes
        and tensor.device.type == "cpu"
        and tensor.dim() == len(shape)
        and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        and (tensor.stride(-1) == 1 or tensor.shape[-1] < 2 or tensor.numel() == 0)
    )
    if not fits:
        rule = (
            " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))
            + f" [{', '.join('tokens' if n is None else str(n) for n in shape)}] on cpu,"
            " stride 1 in the last dimension"
        )
        raise InvalidInput(
            contract_message(name, rule, describe(tensor), "pass what the layer class declares")
        )
