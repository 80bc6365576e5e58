"""Pictures and summaries of a planned step: the matrix, the CTA timeline and the prefix forest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fi_backend.checks import used_capacity
from fi_backend.errors import Unsupported, require
from fi_backend.explaining.step import read_step
from fi_backend.explaining.summary import summarize
from fi_backend.formats import HeadShape, PagedBatch
from fi_backend.host_batch import to_host

if TYPE_CHECKING:
    from fi_backend.planner import PlanSlot

__all__ = ["draw", "explain", "text"]

MAX_FOREST_LEVELS = 8  # kMaxForestLevels of fi/plan/forest.h
# The layer that explain() plans for when it is given none: small groups show splits and merges.
EXAMPLE_HEADS = HeadShape(num_qo_heads=4, num_kv_heads=1, head_dim_qk=64)


def explain(
    batch: PagedBatch, slot: PlanSlot | None = None, path: Path | str = "explain.png"
) -> Path:
    """Draw how a step is laid out and divided.

    Args:
        batch: the step, on any device; one on a GPU is copied, which waits for it.
        slot: its plan; None: a plan is made on the CPU for a causal layer with EXAMPLE_HEADS.
        path: picture to write; its suffix chooses the format (png, svg, pdf).

    Returns:
        ``path``.

    Raises:
        InvalidInput: the batch breaks its contract, or the slot holds another batch's plan.
        Unsupported: matplotlib is not installed.
    """
    if slot is None:
        batch = to_host(batch)
        slot = plan_alone(batch)
    return draw(batch, slot, path)


def draw(batch: PagedBatch, slot: PlanSlot, path: Path | str) -> Path:
    """Draw a planned step; see ``explain``."""
    step = read_step(batch, slot)
    try:
        from fi_backend.explaining.picture import draw_step  # noqa: PLC0415
    except ImportError as error:
        hint = "pip install 'fi-backend[pictures]'"
        require(False, "explain", "matplotlib", f"an import error: {error}", hint, kind=Unsupported)
        raise
    return draw_step(step, Path(path))


def text(batch: PagedBatch, slot: PlanSlot) -> str:
    """Return what ``draw`` shows, in a few lines of plain text."""
    return summarize(read_step(batch, slot))


def plan_alone(batch: PagedBatch) -> PlanSlot:
    """Plan ``batch``, which lies on the CPU, by itself for the example layer; return the slot."""
    from fi_backend.layers import Capacity, LayerClass  # noqa: PLC0415
    from fi_backend.planner import StepPlanner  # noqa: PLC0415

    layer_class = LayerClass(EXAMPLE_HEADS, torch.float32)
    capacity = Capacity(**used_capacity(batch))
    if batch.nodes is None:
        capacity = capacity.with_sharing(levels=MAX_FOREST_LEVELS)
    planner = StepPlanner([layer_class], capacity)
    planner.plan(batch)
    return planner.slot(0)
