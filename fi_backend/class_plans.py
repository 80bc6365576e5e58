"""What a planner fixes for each layer class: tile classes, number of CTAs, layout of the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fi_backend import _core
from fi_backend.errors import require
from fi_backend.formats import HeadShape
from fi_backend.jit.attention_kernels import AttentionSpec, attention_spec, takes_boxes
from fi_backend.layers import MAX_KV_LEN, Capacity, LayerClass

# Spans per thread: enough that a preempted thread's work is taken over by the others.
CPU_SPANS_PER_THREAD = 4
# Packed rows of the tiles of shared prefixes, at least: a decode step's kernel carries their class
# beside that of its requests.
SHARED_TILE_ROWS = 128


@dataclass(frozen=True)
class ClassPlan:
    """A layer class with its plan configuration and memory layout.

    Attributes:
        layer_class: the class.
        config: of the planner.
        layout: of a plan in memory.
        spec: the kernel's specialisation, for plain pages and aligned tensors; None on the CPU.
        longest: query and KV tokens of one request at most.
    """

    layer_class: LayerClass
    config: _core.PlanConfig
    layout: _core.PlanLayout
    spec: AttentionSpec | None
    longest: tuple[int, int]


def plan_class(
    layer_class: LayerClass,
    capacity: Capacity,
    device: torch.device,
    *,
    num_ctas: int | None,
    invariant_chunk: int,
    page_size: int | None = None,
) -> ClassPlan:
    """Return the plan configuration of a class.

    Args:
        layer_class: the class.
        capacity: the largest step.
        device: "cuda" without an index stands for a Hopper GPU that need not be here.
        num_ctas: None: on a GPU as many as are resident at once, which depends on the class; on the
            CPU a few per torch thread.
        invariant_chunk: 0, or where batch-invariant mode cuts.
        page_size: tokens of a page; None: not known, perhaps enough for boxes.

    Raises:
        InvalidInput: a chunk that the KV tiles do not divide, or sharing beside it.
    """
    require(
        num_ctas is None or num_ctas > 0, "num_ctas", "a positive count", num_ctas, "or pass None"
    )
    if device.type == "cuda":
        # A hint must not change which tiles a request gets where bits may not change.
        q_len = capacity.max_tokens if invariant_chunk else capacity.longest_q_len
        if capacity.max_nodes > 0 and layer_class.shares:
            q_len = tile_q_len(q_len, layer_class.heads)
        gpu = _gpu_size(device)
        boxes = gpu.copies_boxes and takes_boxes(
            layer_class.heads,
            layer_class.cache_dtype,
            layer_class.variant,
            MAX_KV_LEN if page_size is None else page_size,
        )
        spec = attention_spec(
            layer_class.heads,
            layer_class.dtype,
            layer_class.cache_dtype,
            layer_class.variant,
            max_q_len=q_len,
            max_requests=capacity.max_requests,
            has_nodes=capacity.max_nodes > 0,
            boxes=boxes,
            max_shared_bytes_per_sm=gpu.shared_bytes_per_sm,
        )
        classes = _tile_classes(layer_class, q_len, capacity.max_requests, gpu, boxes=boxes)
        count = num_ctas or spec.ctas_per_sm * gpu.num_sms
    else:
        spec, classes = None, _core.cpu_tile_classes()
        count = num_ctas or CPU_SPANS_PER_THREAD * torch.get_num_threads()
    _check_chunk(invariant_chunk, classes, capacity)
    config = _config(layer_class, capacity, count, invariant_chunk, classes)
    longest = (capacity.longest_q_len, capacity.max_kv_len)
    return ClassPlan(layer_class, config, config.layout(), spec, longest)


def tile_q_len(q_len: int, heads: HeadShape) -> int:
    """Return the query tokens that pick tile classes where nodes gather the rows of requests."""
    return max(q_len, -(-SHARED_TILE_ROWS // heads.group_size))


class _GpuSize(NamedTuple):
    num_sms: int
    shared_bytes_per_sm: int
    copies_boxes: bool


def _gpu_size(device: torch.device) -> _GpuSize:
    if device.index is None:  # sizes of no GPU in particular: those of Hopper
        return _GpuSize(132, 233472, copies_boxes=True)
    info = _core.device_info(device.index)
    return _GpuSize(info.num_sms, info.max_shared_bytes_per_sm, info.copies_boxes)


def _tile_classes(
    layer_class: LayerClass, max_q_len: int, max_requests: int, gpu: _GpuSize, *, boxes: bool
) -> list[_core.TileClass]:
    heads = layer_class.heads
    tiles = _core.sm80_tiles(
        *(heads.head_dim_qk, heads.head_dim_vo),
        layer_class.cache_dtype.itemsize,
        heads.group_size,
        max_q_len,
        max_requests,
        gpu.shared_bytes_per_sm,
        boxes,
    )
    return tiles.classes


def _config(
    layer_class: LayerClass,
    capacity: Capacity,
    num_ctas: int,
    invariant_chunk: int,
    classes: list[_core.TileClass],
) -> _core.PlanConfig:
    heads, band = layer_class.heads, layer_class.planned_band
    return _core.PlanConfig(
        num_qo_heads=heads.num_qo_heads,
        num_kv_heads=heads.num_kv_heads,
        num_ctas=num_ctas,
        band=_core.Band(band.left, band.right, band.sink_prefix),
        invariant_chunk=invariant_chunk,
        classes=classes,
        capacity=plan_capacity(capacity),
    )


def plan_capacity(capacity: Capacity) -> _core.PlanCapacity:
    """Return a capacity as the core has it."""
    return _core.PlanCapacity(
        max_requests=capacity.max_requests,
        max_tokens=capacity.max_tokens,
        max_kv_len=capacity.max_kv_len,
        max_nodes=capacity.max_nodes,
        max_links=capacity.max_links,
        max_shared_tokens=capacity.max_shared_tokens,
    )


def _check_chunk(chunk: int, classes: Sequence[_core.TileClass], capacity: Capacity) -> None:
    tile = math.lcm(*(c.kv_tile for c in classes))
    require(
        chunk >= 0 and chunk % tile == 0,
        "batch_invariant_chunk",
        f"0 or a multiple of {tile} tokens",
        chunk,
        "round it up",
    )
    require(
        chunk == 0 or capacity.max_nodes == 0,
        "batch_invariant_chunk",
        "0 when capacity.max_nodes > 0",
        chunk,
        "sharing makes bits depend on the batch; set max_nodes to 0",
    )
