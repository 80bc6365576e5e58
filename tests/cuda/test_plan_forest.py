"""The planner kernel on a GPU plans prefix forests as the host does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from plan_batches import (
    PlanCase,
    assert_same,
    broken_forest_case,
    forest_case,
    plan_on_host,
    serving_forest,
)
from torch import Tensor

from fi_backend import PagedBatch
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.plan_kernel import PlanKernel
from fi_backend.plan_records import plan_arrays
from fi_backend.storage import PageTable

CUDA = torch.device("cuda")
FILL = 0xAB
BLOCK = 50  # random steps of a test
# Costs of 32 bits, and of 64.
NARROW = [(16, 64, 290, 190), (64, 64, 220, 240)]
WIDE = [(16, 64, 40, 190), (64, 64, 160, 1240)]


def kernels_of(test: str, arguments: Mapping[str, Any]) -> Iterator[DeviceKernel]:
    """The kernels of a test, for conftest to compile beforehand."""
    for seed in range(BLOCK) if "first" in arguments else ():
        config = forest_case(arguments["first"] + seed).config()
        yield PlanKernel.device_kernel(config, config.layout())


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def on_device(case: PlanCase) -> tuple[PagedBatch, Tensor]:
    """Its batch and its forest."""
    table = PageTable.dense(torch.zeros(len(case.kv_len), 1, dtype=torch.int32, device=CUDA), 16)
    indptr, kv_len = torch.from_numpy(case.qo_indptr), torch.from_numpy(case.kv_len)
    assert case.forest is not None
    forest = torch.from_numpy(case.forest).to(CUDA)
    return PagedBatch(indptr.to(CUDA), kv_len.to(CUDA), table), forest


def assert_planned(planner: PlanKernel, case: PlanCase) -> None:
    config = case.config()
    layout = config.layout()
    plan = torch.full((layout.total_bytes,), FILL, dtype=torch.uint8, device=CUDA)
    status = torch.zeros(1, dtype=torch.int32).pin_memory()
    batch, forest = on_device(case)
    planner.enqueue(batch, plan, status, stream(), forest)
    expected = plan_on_host(case, FILL)
    assert_same(case, expected, plan.cpu().numpy())
    assert status.item() == plan_arrays(expected, layout)["header"]["status"], case


def planner_of(case: PlanCase) -> PlanKernel:
    config = case.config()
    return PlanKernel(config, config.layout(), CUDA)


@pytest.mark.parametrize("first", range(0, 300, BLOCK))
def test_random_forests_give_the_bytes_of_the_host(first: int) -> None:
    for seed in range(first, first + BLOCK):
        assert_planned(planner_of(forest_case(seed)), forest_case(seed))


@pytest.mark.parametrize("classes", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("num_requests", [256, 1024])
def test_steps_of_serving_size(num_requests: int, classes: list[tuple[int, int, int, int]]) -> None:
    changes: dict[str, Any] = {"classes": classes, "capacity": (num_requests, 30_000, 131_072)}
    planner = planner_of(serving_forest(num_requests, 0, **changes))
    for seed in range(20):
        case = serving_forest(num_requests, seed, **changes)
        assert_planned(planner, case)
        # The same lengths, nothing shared.
        forest = np.zeros_like(case.forest)
        assert_planned(planner, dataclasses.replace(case, nodes=[], forest=forest))


def test_forests_of_broken_lengths_are_ignored() -> None:
    for seed in range(BLOCK):
        case = broken_forest_case(seed)
        case = dataclasses.replace(case, num_requests=len(case.kv_len))
        alone = plan_on_host(dataclasses.replace(case, nodes=[], forest=None))
        if plan_arrays(alone, case.config().layout())["header"]["status"] != 0:
            assert_planned(planner_of(case), case)


def test_a_captured_launch_plans_the_forest_of_its_replay() -> None:
    changes: dict[str, Any] = {"capacity": (256, 30_000, 131_072)}
    case = serving_forest(256, 0, **changes)
    planner, (batch, forest) = planner_of(case), on_device(case)
    num_bytes = case.config().layout().total_bytes
    plan = torch.full((num_bytes,), FILL, dtype=torch.uint8, device=CUDA)
    planner.enqueue(batch, plan, None, stream(), forest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planner.enqueue(batch, plan, None, stream(), forest)
    for seed in range(30):
        case = serving_forest(256, seed, **changes)
        later, later_forest = on_device(case)
        batch.qo_indptr.copy_(later.qo_indptr)
        batch.kv_len.copy_(later.kv_len)
        forest.copy_(later_forest)
        plan.fill_(FILL)
        graph.replay()
        assert_same(case, plan_on_host(case, FILL), plan.cpu().numpy())
