"""Attention on a GPU: from tensors to a kernel's parameter block, and its launch.

Nothing here waits for the device or reads its memory. Under a stream capture the launch is
recorded with the addresses of this call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fi_backend import _core
from fi_backend.checks import check_page_ids
from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.formats import PagedBatch, PageTable
from fi_backend.jit.attention_kernels import AttentionSpec, attention_kernel
from fi_backend.jit.kernels import load
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
from fi_backend.layers import MAX_KV_LEN
from fi_backend.variants import Variant
from fi_backend.variants.binding import ParamTuple, bind_params

if TYPE_CHECKING:
    from fi_backend.layers import LayerClass
    from fi_backend.plan_slot import PlanSlot

WARP_THREADS = 32
_FLIP_Q = "change the sign of q, which changes that of the logits"
ALIGNMENT = 16  # bytes that one cp.async or vector store moves

logger = logging.getLogger(__name__)


def is_plain(table: PageTable) -> bool:
    """Return whether positions become addresses with a shift and one table entry."""
    is_power_of_two = table.page_size & (table.page_size - 1) == 0
    return is_power_of_two and table.slot_divisor == 1 and table.page_map is None


def has_aligned_strides(*tensors: Tensor) -> bool:
    """Return whether rows of all tensors start at multiples of 16 bytes if the first one does."""
    return all(
        size < 2 or stride * t.element_size() % ALIGNMENT == 0
        for t in tensors
        for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)
    )


def is_capturing(device: torch.device) -> bool:
    """Return whether the current stream of a CUDA device is recording a graph."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class CudaLaunch(SlotLaunch):
    """The kernel parameter block of one slot."""

    def __init__(self, slot: PlanSlot, spec: AttentionSpec) -> None:
        super().__init__(slot.layer_class, slot.device)
        heads, band = slot.layer_class.heads, slot.layer_class.band
        self._index: int = slot.device.index
        self._current_stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream
        self._grid, self._threads = slot.layout.num_ctas, WARP_THREADS * spec.warps
        self._kernels = _Kernels(spec, slot.device)
        self._variant = _VariantParams(slot.layer_class, slot.device, slot.longest)
        self._batch: PagedBatch | None = None
        self._prepared = (0, True)  # page size of steps whose kernel is loaded; they are plain
        self._num_plans = 0  # plan that was checked, where values are checked
        self._num_tokens = 0  # of that plan; 0: only the device knows
        self._num_requests = 0
        self._plain = self._aligned_strides = True
        self._boxes = False  # of the step's pages, where tensors are aligned
        self._tensors = _core.CallTensors()
        self._scales: tuple[object, ...] = ()  # empty: none in the parameter block
        params = self._params = _core.KernelParams()
        params.num_qo_heads, params.num_kv_heads = heads.num_qo_heads, heads.num_kv_heads
        # Positions are below 2^30: wider bounds mean the same, and sums stay within 32 bits.
        params.band = _core.Band(*(min(n, MAX_KV_LEN - 1) for n in vars(band).values()))
        params.plan = slot.plan.data_ptr()
        params.layout = slot.layout
        params.partial_o = slot.partial_o.data_ptr()
        params.partial_lse = slot.partial_lse.data_ptr()
        params.arrivals = slot.arrivals.data_ptr()

    def run(  # noqa: PLR0917 (the op calls by position)
        self,
        slot: PlanSlot,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        scale: float,
        lse: Tensor | None = None,
        q_scale: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        partial: bool = False,
        tensors: list[Tensor] | None = None,
        names: str = "",
        numbers: list[float] | None = None,
    ) -> None:
        """Launch one layer on the current stream of the slot's device."""
        if slot.batch is not self._batch or slot.checks_values:
            self._set_step(slot, k)
        if not scale > 0.0:
            raise InvalidInput(
                contract_message("scale", "a positive number on a GPU", scale, _FLIP_Q)
            )
        params = self._params
        low_bits = self._tensors.take(params, q, k, v, out, lse, scale, partial)
        if low_bits < 0:
            self._set_shapes(slot, Call(q, k, v, out, scale, lse))
            low_bits = self._tensors.remember(params, q, k, v, out, lse, scale, partial)
        if q_scale is not None or k_scale is not None or v_scale is not None or self._scales:
            self._set_scales(q_scale, k_scale, v_scale)
        if names or self._variant.variant is not None:
            scales = (q_scale, k_scale, v_scale)
            call = Call(q, k, v, out, scale, lse, *scales, partial, tensors, names, numbers)
            self._variant.update(params, call, self._num_requests, self._num_tokens)
        aligned = self._aligned_strides and not low_bits
        kernel = self._kernels.get(self._plain, aligned, self._boxes and aligned)
        stream = self._current_stream(self._index)
        _core.launch_attention(kernel, params, self._grid, self._threads, stream)

    def prepare(self, table: PageTable) -> None:
        """Load the kernel for a page table and aligned tensors: steps come before captures."""
        plain = is_plain(table)
        if (table.page_size, plain) == self._prepared:
            return
        self._kernels.get(plain, aligned=True, boxes=self._kernels.in_boxes(table))
        self._prepared = (table.page_size, plain)

    def _set_step(self, slot: PlanSlot, k: Tensor) -> None:
        """Take the page table of a step; with FI_CHECK=1, let the next checks see its values."""
        batch = planned_batch(slot)
        if batch is not self._batch:
            table = batch.page_table
            if self._batch is None or self._batch.page_table.page_size != table.page_size:
                self._tensors.forget()
            self._params.table = table_view(batch)
            self._params.page_shift = table.page_size.bit_length() - 1
            self._plain, boxes = is_plain(table), self._kernels.in_boxes(table)
            if boxes != self._boxes:
                self._tensors.forget()
            self._boxes = boxes
            self._num_requests = batch.num_requests
            self._batch = batch
        if not slot.checks_values:
            return
        if is_capturing(self.device):  # steps that are replayed are checked when they are planned
            slot.captured_pages = max(slot.captured_pages, k.shape[0])
        if slot.num_plans != self._num_plans:
            host = slot.host_batch
            self._num_tokens = 0 if host is None else int(host.qo_indptr[-1])
            self._num_plans = slot.num_plans
            self._tensors.forget()

    def _set_shapes(self, slot: PlanSlot, call: Call) -> None:
        """Check tensors and take their strides."""
        page_size = planned_batch(slot).page_table.page_size
        check_tensors(call, self.layer_class, self.device, page_size, self._num_tokens)
        if slot.host_batch is not None:
            check_page_ids(slot.host_batch, call.k.shape[0], self.planned_band)
        self._params.out_is_float32 = call.out.dtype == torch.float32
        self.set_strides(self._params, call)
        self._params.kv = self.kv
        self._aligned_strides = has_aligned_strides(call.q, call.k, call.v, call.out)
        self._tensors.boxes = self._boxes and self._aligned_strides

    def _set_scales(self, *scales: Tensor | None) -> None:
        """Take the scales of q, k and v, and check them when they change."""
        seen = tuple(
            [
                None if s is None else (s.data_ptr(), s.shape, s.stride(), s.dtype, s.device)
                for s in scales
            ]
        )
        if seen == self._scales:
            return
        num_kv_heads, device, params = (
            self.layer_class.heads.num_kv_heads,
            self.device,
            self._params,
        )
        names = ("q_scale", "k_scale", "v_scale")
        bound = [
            bind_scale(name, scale, num_kv_heads, device)
            for name, scale in zip(names, scales, strict=True)
        ]
        params.q_scale, params.k_scale, params.v_scale = bound
        self._scales = () if seen == (None, None, None) else seen


class _Kernels:
    """The kernels of one layer class, by what they ask of page table and tensors."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._loaded: dict[tuple[bool, bool, bool], _core.Kernel] = {}
        self.get(plain=True, aligned=True, boxes=spec.boxes)  # before any capture

    def in_boxes(self, table: PageTable) -> bool:
        """Return whether aligned pages of a table are copied as boxes."""
        spec = self._spec
        sizes = (spec.head_dim_qk, spec.head_dim_vo, spec.kv_dtype.itemsize, table.page_size)
        return spec.boxes and is_plain(table) and _core.fits_boxes(*sizes)

    def get(self, plain: bool, aligned: bool, boxes: bool) -> _core.Kernel:
        """Return a kernel; one that was not used before is compiled, which a capture refuses."""
        kernel = self._loaded.get((plain, aligned, boxes))
        if kernel is None:
            spec = replace(self._spec, plain_pages=plain, aligned=aligned, boxes=boxes)
            kernel = load(attention_kernel(spec), self._device)
            self._loaded[plain, aligned, boxes] = kernel
            if not plain:
                _say_once(
                    "attention takes a slower kernel for page tables with a page_map, a"
                    " slot_divisor or a page size that is not a power of two"
                )
            if not aligned:
                _say_once(
                    "attention takes a slower kernel for q, K, V or out with addresses or strides"
                    f" that are not multiples of {ALIGNMENT} bytes"
                )
        return kernel


@cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)


class _VariantParams:
    """The values of a variant's parameters that a slot's kernel was given last."""

    def __init__(
        self, layer_class: LayerClass, device: torch.device, longest: tuple[int, int]
    ) -> None:
        heads = layer_class.heads
        self._head_dim = heads.head_dim_qk
        self._longest = longest  # query and KV tokens of a request
        self.variant: Variant | None = layer_class.variant
        self._device = device
        self._heads = {"q_head": heads.num_qo_heads, "kv_head": heads.num_kv_heads}
        self._seen: tuple[object, ...] = ()
        self._packed: list[ParamTuple] = []
        self._sources: list[int | None] = []  # of each packed parameter: its tensor in the call
        self._sinks: int | None = None  # likewise
        self._rotation: tuple[int, int, int, bool, int, int] | None = None  # likewise, and the rest
        self._addresses: list[int] = []

    def update(
        self, params: _core.KernelParams, call: Call, num_requests: int, num_tokens: int
    ) -> None:
        """Write what changed; layers that differ in addresses alone cost little.

        Raises:
            InvalidInput: as ``bind_params``.
        """
        tensors = call.tensors or ()
        seen = (
            *(call.names, call.numbers, num_requests, num_tokens),
            *[(t.shape, t.stride(), t.dtype, t.device) for t in tensors],
        )
        addresses = [t.data_ptr() for t in tensors]
        if seen != self._seen:
            self._check(call, num_requests, num_tokens)
            self._seen = seen
        elif addresses == self._addresses:
            return
        if self._packed:
            packed = [
                entry if source is None else (addresses[source], entry[1], entry[2])
                for entry, source in zip(self._packed, self._sources, strict=True)
            ]
            params.set_variant_params(packed)
        params.sinks = 0 if self._sinks is None else addresses[self._sinks]
        if self._rotation is not None:
            table, stride, rotary_dim, interleaved, window, sink_prefix = self._rotation
            params.rotation = _core.Rotation(
                addresses[table], stride, rotary_dim, interleaved, window, sink_prefix
            )
        self._addresses = addresses

    def _check(self, call: Call, num_requests: int, num_tokens: int) -> None:
        values = named_params(call)
        if self.variant is None:
            return refuse_params(values)
        # Without the number of tokens, tensors read by token are trusted to be long enough.
        sizes = self._heads | {"request": num_requests, "token": num_tokens}
        bound = bind_params(self.variant, values, sizes, self._device)
        names = call.names.split(",")
        index = {name: i for i, name in enumerate(names[: len(call.tensors or ())])}
        self._packed = [entry for function in bound.functions for entry in function]
        self._sources = [index.get(name) for function in bound.names for name in function]
        self._sinks = None if self.variant.sinks is None else index[self.variant.sinks]
        rotation = self.variant.rotation
        if rotation is not None and bound.angles is not None:
            rotation.check_table(bound.angles, self._head_dim, *self._longest)
            dim, name = bound.angles.shape[1], f"params[{rotation.cos_sin!r}]"
            rule = "rotary_dim a multiple of 4 on a GPU"
            require(dim % 4 == 0, name, rule, dim, "pad it with angles of 0")
            self._rotation = (
                *(index[rotation.cos_sin], bound.angles.stride(0), dim),
                *(rotation.interleaved, rotation.window, rotation.sink_prefix),
            )
