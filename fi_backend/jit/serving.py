"""All device kernels that serving a model needs: the one place that lists them.

``python -m fi_backend.jit prebuild`` compiles them on any machine; planners compile the same ones
when an engine starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from fi_backend import _core
from fi_backend.class_plans import plan_capacity, tile_q_len
from fi_backend.cuda_ops import AppendSpec, append_kernels, merge_kernel
from fi_backend.errors import require
from fi_backend.jit.attention_kernels import attention_kernel, attention_spec, takes_boxes
from fi_backend.jit.kernels import HOPPER_SHARED_BYTES, DeviceKernel, distinct
from fi_backend.jit.models import ModelShape
from fi_backend.layers import Capacity
from fi_backend.plan_kernel import PlanKernel
from fi_backend.prefix_forest import forest_kernel

# Query tokens of a request in a verification step: one, and up to 15 speculated.
MAX_VERIFIED = 16
# Multiprocessors of GPUs from L4 to RTX PRO 6000: a planner's threads follow from them.
_NUM_SMS = (58, 78, 108, 132, 148, 188)
# A planner's code depends on whether there is a window, not on its width.
_BANDS = (_core.Band(-1, 0, 0), _core.Band(4095, 0, 0))


@dataclass(frozen=True)
class Serving:
    """How a model is served, as far as kernels depend on it.

    Attributes:
        tensor_parallel: ranks that share the heads.
        kv_dtype: of the cache; None: that of the model.
        page_size: tokens of a page.
        max_requests: requests of a step.
        max_tokens: query tokens of a step.
        max_kv_len: KV tokens of a request.
        max_shared_bytes_per_sm: of the GPU.
        copies_boxes: it is a Hopper GPU or a later one.

    Raises:
        InvalidInput: a count that is not positive.
    """

    tensor_parallel: int = 1
    kv_dtype: torch.dtype | None = None
    page_size: int = 16
    max_requests: int = 256
    max_tokens: int = 8192
    max_kv_len: int = 131072
    max_shared_bytes_per_sm: int = HOPPER_SHARED_BYTES
    copies_boxes: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool):
                require(value > 0, name, "a positive count", value, "pass the engine's setting")

    @property
    def plain_pages(self) -> bool:
        """Whether page ids need no division; see ``AttentionSpec``."""
        return self.page_size & (self.page_size - 1) == 0

    @property
    def q_lens(self) -> list[int]:
        """Query tokens of the longest request of a step: decoding, verification, any step."""
        return [*range(1, MAX_VERIFIED + 1), max(MAX_VERIFIED, self.max_tokens)]


def serving_kernels(shape: ModelShape, serving: Serving) -> list[DeviceKernel]:
    """Return every kernel of a model, each once: the decode kernel first.

    Raises:
        InvalidInput: ranks that do not divide the heads.
        Unsupported: a shape or dtype without a kernel.
    """
    return distinct(
        [
            *_attention_kernels(shape, serving),
            *_planner_kernels(shape, serving),
            forest_kernel(_capacity(serving, serving.q_lens[-1]).with_sharing()),
            *_kv_kernels(shape, serving),
        ]
    )


def _attention_kernels(shape: ModelShape, serving: Serving) -> Iterator[DeviceKernel]:
    heads = shape.heads_of_rank(serving.tensor_parallel)
    for q_len, shares in product(serving.q_lens, (False, True)):
        spec = attention_spec(
            heads,
            shape.dtype,
            serving.kv_dtype or shape.dtype,
            shape.variant,
            max_q_len=tile_q_len(q_len, heads) if shares else q_len,
            max_requests=serving.max_requests,
            has_nodes=shares,
            plain_pages=serving.plain_pages,
            boxes=_takes_boxes(shape, serving),
            max_shared_bytes_per_sm=serving.max_shared_bytes_per_sm,
        )
        yield attention_kernel(spec)


def _takes_boxes(shape: ModelShape, serving: Serving) -> bool:
    heads, kv_dtype = shape.heads_of_rank(serving.tensor_parallel), serving.kv_dtype or shape.dtype
    return (
        serving.copies_boxes
        and serving.plain_pages
        and takes_boxes(heads, kv_dtype, shape.variant, serving.page_size)
    )


def _planner_kernels(shape: ModelShape, serving: Serving) -> Iterator[DeviceKernel]:
    heads = shape.heads_of_rank(serving.tensor_parallel)
    for q_len, shares in product(serving.q_lens, (False, True)):
        tiles = _core.sm80_tiles(
            heads.head_dim_qk,
            heads.head_dim_vo,
            (serving.kv_dtype or shape.dtype).itemsize,
            heads.group_size,
            tile_q_len(q_len, heads) if shares else q_len,
            serving.max_requests,
            serving.max_shared_bytes_per_sm,
            _takes_boxes(shape, serving),
        )
        capacity = _capacity(serving, q_len)
        if shares:
            capacity = capacity.with_sharing()
        for num_sms, band in product(_NUM_SMS, _BANDS):
            config = _core.PlanConfig(
                num_qo_heads=heads.num_qo_heads,
                num_kv_heads=heads.num_kv_heads,
                num_ctas=num_sms * tiles.ctas_per_sm,
                band=band,
                invariant_chunk=0,
                classes=tiles.classes,
                capacity=plan_capacity(capacity),
            )
            yield PlanKernel.device_kernel(config, config.layout())


def _capacity(serving: Serving, q_len: int) -> Capacity:
    """Of the planner of steps with up to so many query tokens of a request."""
    requests = serving.max_requests
    if q_len == serving.q_lens[-1]:
        return Capacity(requests, serving.max_tokens, serving.max_kv_len)
    return Capacity(requests, q_len * requests, serving.max_kv_len, max_q_len=q_len)


def _kv_kernels(shape: ModelShape, serving: Serving) -> Iterator[DeviceKernel]:
    heads = shape.heads
    spec = AppendSpec(
        shape.dtype, serving.kv_dtype or shape.dtype, heads.head_dim_qk, heads.head_dim_vo
    )
    yield from append_kernels(spec)
    yield merge_kernel(heads.head_dim_vo, shape.variant is None or shape.variant.softmax)
