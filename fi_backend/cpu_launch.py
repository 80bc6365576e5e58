"""Attention on the CPU: from tensors to the native engine's parameter block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fi_backend import _core
from fi_backend.checks import check_page_ids
from fi_backend.errors import require
from fi_backend.formats import DTYPE_CODES
from fi_backend.launch import (
    Call,
    SlotLaunch,
    bind_scale,
    check_tensors,
    named_params,
    planned_batch,
    refuse_params,
    table_view,
)
from fi_backend.variants.stages import bind_stages

if TYPE_CHECKING:
    from fi_backend.plan_slot import PlanSlot
    from fi_backend.variants import Rotation


class CpuLaunch(SlotLaunch):
    """The CPU engine's parameter block of one slot."""

    def __init__(self, slot: PlanSlot) -> None:
        super().__init__(slot.layer_class, slot.device)
        heads, band = slot.layer_class.heads, slot.layer_class.band
        self._shapes: tuple[object, ...] = ()
        self._checked = self._num_plans = 0  # plan whose page ids were checked, current plan
        self._num_pages = self._num_tokens = self._num_requests = 0
        self._max_q_len = self._max_kv_len = 0
        params = self._params = _core.AttentionParams()
        params.plan = slot.plan.data_ptr()
        params.layout = slot.layout
        params.set_classes(slot.classes)
        params.partial_o = slot.partial_o.data_ptr()
        params.partial_lse = slot.partial_lse.data_ptr()
        params.arrivals = slot.arrivals.data_ptr()
        params.heads = _core.HeadShape(
            heads.num_qo_heads, heads.num_kv_heads, heads.head_dim_qk, heads.head_dim_vo
        )
        params.band = _core.Band(band.left, band.right, band.sink_prefix)

    def run(self, slot: PlanSlot, *arguments: Any, **_: Any) -> None:
        """Compute one layer in the calling thread and torch's number of others."""
        call = Call(*arguments)
        if slot.num_plans != self._num_plans:
            self._set_step(slot)
        self._set_shapes(slot, call)
        params, kv, num_kv_heads = self._params, self.kv, self.layer_class.heads.num_kv_heads
        kv.k, kv.v = call.k.data_ptr(), call.v.data_ptr()
        params.kv = kv
        params.q, params.out = call.q.data_ptr(), call.out.data_ptr()
        params.lse = 0 if call.lse is None else call.lse.data_ptr()
        params.scale = call.scale
        params.q_scale = bind_scale("q_scale", call.q_scale, num_kv_heads)
        params.k_scale = bind_scale("k_scale", call.k_scale, num_kv_heads)
        params.v_scale = bind_scale("v_scale", call.v_scale, num_kv_heads)
        params.partial = call.partial
        self._bind_variant(call)
        _core.run_attention(params, torch.get_num_threads())

    def _set_step(self, slot: PlanSlot) -> None:
        """Take the page table of a step."""
        batch = planned_batch(slot)
        rotation = None if self.layer_class.variant is None else self.layer_class.variant.rotation
        rolls = rotation is not None and rotation.window > 0
        rule, hint = "none where slots roll with a window", "plan this class without nodes"
        require(not (rolls and batch.nodes is not None), "batch.nodes", rule, "nodes", hint)
        self._params.table = table_view(batch)
        self._num_requests = batch.num_requests
        self._num_tokens = int(batch.qo_indptr[-1])
        self._max_q_len = int(batch.qo_indptr.diff().max()) if batch.num_requests else 0
        self._max_kv_len = int(batch.kv_len.max()) if batch.num_requests else 0
        self._num_plans = slot.num_plans
        self._shapes = ()

    def _set_shapes(self, slot: PlanSlot, call: Call) -> None:
        """Check tensors and take their strides, once per change."""
        shapes = tuple(
            None if t is None else (t.shape, t.stride(), t.dtype, t.device)
            for t in (call.q, call.k, call.v, call.out, call.lse)
        )
        if shapes == self._shapes:
            return
        batch = planned_batch(slot)
        page_size = batch.page_table.page_size
        check_tensors(call, self.layer_class, self.device, page_size, self._num_tokens)
        num_pages = call.k.shape[0]
        if (self._checked, self._num_pages) != (self._num_plans, num_pages):
            check_page_ids(batch, num_pages, self.planned_band)
            self._checked, self._num_pages = self._num_plans, num_pages
        self._params.q_dtype = DTYPE_CODES[call.q.dtype]
        self._params.out_dtype = DTYPE_CODES[call.out.dtype]
        self.set_strides(self._params, call)
        self._shapes = shapes

    def _bind_variant(self, call: Call) -> None:
        """Set the variant's functions and parameters; the caller keeps the tensors alive."""
        variant, params = self.layer_class.variant, named_params(call)
        if variant is None:
            return refuse_params(params)
        sizes = {
            "q_head": self.layer_class.heads.num_qo_heads,
            "kv_head": self.layer_class.heads.num_kv_heads,
            "token": self._num_tokens,
            "request": self._num_requests,
        }
        bound = bind_stages(variant, params, sizes)
        self._params.set_variant(bound.stages, bound.softmax, bound.sinks_addr)
        if variant.rotation is not None and bound.angles is not None:
            self._bind_rotation(variant.rotation, bound.angles)

    def _bind_rotation(self, rotation: Rotation, angles: torch.Tensor) -> None:
        head_dim = self.layer_class.heads.head_dim_qk
        rotation.check_table(angles, head_dim, self._max_q_len, self._max_kv_len)
        self._params.rotation = _core.Rotation(
            angles.data_ptr(),
            angles.stride(0),
            angles.shape[1],
            int(rotation.interleaved),
            rotation.window,
            rotation.sink_prefix,
        )
