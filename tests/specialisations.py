"""Which kernels the GPU cases run, so that a session compiles them all at once, on all cores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from cases import Case
from named_cases import capacity_of
from variant_cases import VARIANTS

from fi_backend.class_plans import SHARED_TILE_ROWS
from fi_backend.jit.attention_kernels import attention_kernel, attention_spec, takes_boxes
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.variants import Variant


def is_plain(case: Case) -> bool:
    """Whether positions of the case's pages become addresses without a division or a map."""
    has_divisor = case.table == "slots" and case.page_size > 1
    return case.page_size.bit_count() == 1 and not has_divisor and case.table != "mapped"


def kernel_of(
    case: Case,
    step: str = "any",
    *,
    variant: Variant | None = None,
    aligned: bool = True,
    shares: bool = False,
) -> DeviceKernel:
    """Return the kernel that runs a case.

    Args:
        case: the case.
        step: kind of step (named_cases.STEPS) of its planner.
        variant: in place of the case's own.
        aligned: whether addresses and strides are multiples of 16 bytes.
        shares: whether the planner has room for shared prefixes.
    """
    if case.variant:
        variant, _ = VARIANTS[case.variant](case, torch.Generator())
    capacity = capacity_of(step)
    max_q_len = capacity.longest_q_len
    if shares:
        max_q_len = max(max_q_len, -(-SHARED_TILE_ROWS // case.heads.group_size))
    spec = attention_spec(
        case.heads,
        case.dtype,
        case.cache_dtype,
        variant,
        max_q_len=max_q_len,
        max_requests=capacity.max_requests,
        has_nodes=shares,
    )
    plain = is_plain(case)
    boxes = plain and aligned and takes_boxes(case.heads, case.cache_dtype, variant, case.page_size)
    return attention_kernel(
        dataclasses.replace(spec, plain_pages=plain, aligned=aligned, boxes=boxes)
    )


def planned_kernels(
    case: Case, step: str = "any", *, shares: bool = False
) -> Iterator[DeviceKernel]:
    """Yield the kernels that a planner loads at once and the one that the case then runs."""
    plain = dataclasses.replace(case, table="dense", page_size=16)
    yield kernel_of(plain, step, shares=shares)
    yield kernel_of(case, step, shares=shares)
