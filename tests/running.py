"""Running a problem through the engine and holding the result against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case, make_out, make_problem
from placing import copy_to, elements_around, to_device
from torch import Tensor

from fi_backend import (
    Attention,
    Capacity,
    KvCacheView,
    LayerClass,
    StepPlanner,
    attention,
)
from fi_backend.oracle import Problem
from fi_backend.tolerance import assert_close


@dataclass(frozen=True)
class Place:
    """Where a problem runs.

    Attributes:
        device: of the planner and all tensors.
        capacity: of the planner; None: grows with the batches.
    """

    device: str = "cpu"
    capacity: Capacity | None = None


CPU = Place()


@dataclass(frozen=True)
class Result:
    """What a call wrote; lse is None without softmax."""

    out: Tensor
    lse: Tensor | None


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Set torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PlannedLayer:
    """One layer class with a planner of fixed capacity."""

    def __init__(
        self, layer_class: LayerClass, capacity: Capacity, device: str, num_ctas: int | None
    ) -> None:
        self.planner = StepPlanner([layer_class], capacity, device, num_ctas=num_ctas)
        self.slot = self.planner.slot(0)
        self.plan = self.planner.plan

    def __call__(self, q: Tensor, kv: KvCacheView, **options: Any) -> Tensor:
        return attention(self.slot, q, kv, **options)


def layer_class_of(case: Case, problem: Problem) -> LayerClass:
    return LayerClass(case.heads, case.dtype, case.kv_dtype, case.band, problem.variant)


def make_layer(
    case: Case, problem: Problem, num_ctas: int | None = None, place: Place = CPU
) -> Attention | PlannedLayer:
    if place.capacity is not None:
        layer_class = layer_class_of(case, problem)
        return PlannedLayer(layer_class, place.capacity, place.device, num_ctas)
    return Attention(
        case.heads,
        case.dtype,
        kv_dtype=case.kv_dtype,
        band=case.band,
        variant=problem.variant,
        num_ctas=num_ctas,
    )


def run(case: Case, problem: Problem, num_ctas: int | None = None, place: Place = CPU) -> Result:
    """Plan and run a CPU problem on a copy of it there; outputs, returned on the CPU, are NaN
    before the call."""
    return run_layer(make_layer(case, problem, num_ctas, place), case, problem, place.device)


def run_layer(
    layer: Attention | PlannedLayer, case: Case, problem: Problem, device: str = "cpu"
) -> Result:
    """As ``run``, on a layer that is there."""
    out = make_out(case, problem)
    if problem.partial:
        out = out.float()
    softmax = problem.variant is None or problem.variant.softmax
    lse = torch.full(out.shape[:2], torch.nan) if softmax else None
    if device != "cpu":
        problem, out = to_device(problem, device), copy_to(out, device)
        lse = None if lse is None else lse.to(device)
    layer.plan(problem.batch)
    layer(
        problem.q,
        problem.kv,
        out=out,
        lse=lse,
        q_scale=problem.q_scale,
        k_scale=problem.k_scale,
        v_scale=problem.v_scale,
        params=problem.params,
        partial=problem.partial,
    )
    return Result(copy_to(out, "cpu"), None if lse is None else lse.cpu())


def compare(result: Result, problem: Problem) -> None:
    """Hold a result against the oracle; nothing else may have been written."""
    with num_threads(1):  # many small products: threads only get in each other's way
        assert_close(result.out, result.lse, problem)
    assert result.out[problem.num_tokens :].isnan().all(), "a padding row was written"


def check(case: Case, num_ctas: int | None = None, seed: int = 0, place: Place = CPU) -> None:
    """Make, run and compare a case."""
    check_problem(case, make_problem(case, seed), num_ctas, place)


def check_problem(
    case: Case, problem: Problem, num_ctas: int | None = None, place: Place = CPU
) -> Result:
    """Run a problem, compare the result, and look at the gaps between rows and heads of out."""
    result = run(case, problem, num_ctas, place)
    check_result(result, problem)
    return result


def check_result(result: Result, problem: Problem) -> None:
    """Compare a result, and look at the gaps between rows and heads of out."""
    compare(result, problem)
    assert elements_around(result.out).isnan().all(), "a gap of out was written"
    if result.lse is not None:
        assert result.lse[problem.num_tokens :].isnan().all(), "a padding row of lse was written"
