"""Running attention: one call per layer, a torch custom op that writes its outputs in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fi_backend.checks import used_capacity
from fi_backend.custom_op import register_op
from fi_backend.formats import CAUSAL, Band, HeadShape, KvCacheView, PagedBatch
from fi_backend.host_batch import to_host
from fi_backend.launch import ATTENTION_SCHEMA, PLAIN_SCHEMA, run_attention
from fi_backend.layers import Capacity, LayerClass
from fi_backend.planner import StepPlanner
from fi_backend.variants import Variant

if TYPE_CHECKING:
    from fi_backend.planner import PlanSlot

for _schema in (PLAIN_SCHEMA, ATTENTION_SCHEMA):
    register_op(_schema, run_attention, lambda *_: None, run_attention)
_plain_op = torch.ops.fi_backend.attention_plain.default
_attention_op = torch.ops.fi_backend.attention.default


def attention(
    slot: PlanSlot,
    q: Tensor,
    kv: KvCacheView,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    params: Mapping[str, Tensor | float] | None = None,
    partial: bool = False,
) -> Tensor:
    """Run the attention of one layer for the step that its planner planned last; return ``out``.

    Logits are ``scale * q_scale * k_scale * (q . k)``, then the variant's, then the masks, softmax
    in float32, ``v_scale`` at the output, sinks, the variant's output transform. A query that sees
    nothing gets o = 0 and lse = -inf (the sink's value with a sink). On a GPU, V must be finite at
    positions that the variant's masks hide, or that lie between a sink prefix and a window in one
    KV tile with visible ones: they are multiplied by 0.

    Args:
        slot: ``planner.slot(i)`` of the layer's class.
        q: dtype of the layer class [num_tokens, num_qo_heads, head_dim_qk], any strides but 1 in
            the last dimension. Rows past the batch's tokens are padding and are not read.
        kv: the layer's cache; the step's own K and V are in it already (``append_kv``).
        out: dtype of q or float32 [rows of q, num_qo_heads, head_dim_vo], written in place, any
            strides but 1 in the last dimension; must not overlap other tensors. Padding rows stay
            as they are. None: allocated, float32 for partial states, else the dtype of q.
        lse: float32 [rows of q, num_qo_heads] contiguous, written in place: natural log of the sum
            of exponentials, sink included; None: not wanted.
        scale: of the logits, on a GPU positive; None means 1 / sqrt(head_dim_qk).
        q_scale: float32, one value or one per KV head, on a GPU positive; None means 1. So are
            k_scale and v_scale.
        params: values of the variant's open parameters, tensors on the device of q.
        partial: return the state before sinks and output transform, for ``merge_states``.

    Raises:
        InvalidInput: the slot was not planned, or a tensor's dtype, shape, strides or device do not
            fit the layer class or the batch, or a page id lies outside the cache. On a GPU what
            only the device knows is checked with FI_CHECK=1 alone (see StepPlanner): the number of
            query tokens against q and parameters read by token, and page ids.
        Unsupported: a stream capture needs a kernel that was not used before (see StepPlanner).

    Graphs: traceable by torch.compile (out and lse are mutated, nothing else), capturable in a CUDA
        graph, which then reads these tensors and the slot's page table. No gradients.
    Stream: on a GPU the kernel is launched on the current stream of the slot's device; the CPU
        engine returns when out is complete. One call per workspace at a time.
    """
    if out is None:
        heads = slot.layer_class.heads
        dtype = torch.float32 if partial else q.dtype
        shape = (q.shape[0], heads.num_qo_heads, heads.head_dim_vo)
        out = torch.empty(shape, dtype=dtype, device=q.device)
    if scale is None:
        scale = slot.default_scale
    has_scales = q_scale is not None or k_scale is not None or v_scale is not None
    if not (params or has_scales or partial or lse is not None):
        _plain_op(slot.handle, q, kv.k, kv.v, out, scale)
    elif not params:
        _attention_op(
            slot.handle, q, kv.k, kv.v, out, scale, lse, q_scale, k_scale, v_scale, partial
        )
    else:
        tensors, names, numbers = _split_params(params)
        _attention_op(
            slot.handle,
            q,
            kv.k,
            kv.v,
            out,
            scale,
            lse,
            q_scale,
            k_scale,
            v_scale,
            partial,
            tensors,
            names,
            numbers,
        )
    return out


def _split_params(
    params: Mapping[str, Tensor | float],
) -> tuple[list[Tensor], str, list[float]]:
    """Parameters as the op takes them: names of the tensors first, then those of the numbers."""
    tensors, numbers, tensor_names, number_names = [], [], [], []
    for name, value in params.items():
        if isinstance(value, Tensor):
            tensors.append(value)
            tensor_names.append(name)
        else:
            numbers.append(float(value))
            number_names.append(name)
    return tensors, ",".join(tensor_names + number_names), numbers


# From here on larger capacities take the same kernel.
SMALLEST_ON_GPU = Capacity(max_requests=16, max_tokens=1024, max_kv_len=1024)


def _power_of_two(count: int) -> int:
    """The least one that is not smaller, so that growing batches rebuild rarely: 65 gives 128."""
    return 1 << (count - 1).bit_length() if count else 0


class Attention:
    """Attention of one layer class, with a planner of its own.

    Example: ``layer = Attention(HeadShape(32, 8, 128), torch.bfloat16); layer.plan(batch);
    out = layer(q, kv)``.

    Args:
        heads: heads of one rank.
        dtype: of q.
        kv_dtype: of the cache; None means ``dtype``.
        band: which KV positions a query may see.
        variant: what happens to logits; None is plain softmax attention.
        capacity: the largest step; None: grows with the batches, by building a new planner. Give
            one where the slot must stay the same, as in a compiled graph, and on a GPU, where
            measuring a batch waits for the device.
        device: as in StepPlanner.
        num_ctas: spans that the work is cut into; None: chosen by StepPlanner.

    Raises:
        Unsupported: a class that this machine cannot serve; the message lists all reasons.
    """

    def __init__(
        self,
        heads: HeadShape,
        dtype: torch.dtype,
        *,
        kv_dtype: torch.dtype | None = None,
        band: Band = CAUSAL,
        variant: Variant | None = None,
        capacity: Capacity | None = None,
        device: torch.device | str = "cpu",
        num_ctas: int | None = None,
    ) -> None:
        self.layer_class = LayerClass(heads, dtype, kv_dtype, band, variant)
        self._device = torch.device(device)
        self._num_ctas = num_ctas
        self._grows = capacity is None
        if capacity is None:
            # Another kernel for small capacities would be compiled only to be outgrown.
            capacity = SMALLEST_ON_GPU if self._device.type == "cuda" else Capacity(1, 1, 1)
        self._planner = self._build(capacity)

    def _build(self, capacity: Capacity) -> StepPlanner:
        return StepPlanner([self.layer_class], capacity, self._device, num_ctas=self._num_ctas)

    @property
    def slot(self) -> PlanSlot:
        """The slot that ``plan`` fills."""
        return self._planner.slot(0)

    def plan(self, batch: PagedBatch) -> None:
        """Plan a step; arguments and errors are those of ``StepPlanner.plan``.

        Raises:
            InvalidInput: lengths, indptr, page table or nodes out of contract.
            CapacityExceeded: larger than the capacity that was given.
        """
        if self._grows:
            held = vars(self._planner.capacity)
            used = used_capacity(to_host(batch, page_ids=False))
            if any(count > held[name] for name, count in used.items()):
                grown = {name: _power_of_two(max(n, held[name])) for name, n in used.items()}
                self._planner = self._build(Capacity(**(held | grown)))
        self._planner.plan(batch)

    def __call__(
        self,
        q: Tensor,
        kv: KvCacheView,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        scale: float | None = None,
        q_scale: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        params: Mapping[str, Tensor | float] | None = None,
        partial: bool = False,
    ) -> Tensor:
        """Run ``attention`` on the step planned last; arguments, results and errors are its own."""
        return attention(
            self.slot,
            q,
            kv,
            out=out,
            lse=lse,
            scale=scale,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            params=params,
            partial=partial,
        )
