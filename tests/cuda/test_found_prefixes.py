"""Prefixes that a planner finds on the GPU: results are those of requests that share nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case
from forest import Tree, make_shared
from forest_problems import (
    LAYERS,
    Q_LENS,
    Shared,
    random_shared,
    random_step_and_case,
    sharing_capacity,
)
from named_cases import BF16, capacity_of, heads
from placing import to_device
from running import Place, PlannedLayer, check_result, make_layer, run_layer
from specialisations import planned_kernels

import fi_backend as fi
from fi_backend import _core
from fi_backend.host_batch import to_host
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.oracle import Problem
from fi_backend.prefix_forest import PrefixForest, forest_kernel

ROUNDS = 10  # random problems of each layer and kind of step
KINDS = len(LAYERS) * len(Q_LENS)
# Two orders of summation, P and the output each rounded to bf16.
DISAGREEMENT = 2.0**-6
LEVELS = (Tree(tuple(range(6)), 128, (Tree((0, 2, 4), 384), Tree((1, 5), 640))),)
DECODES = ((1, 700), (1, 900), (1, 385), (1, 200), (1, 650), (1, 833))
DRAFTS = ((4, 700), (2, 900), (8, 400), (3, 200), (4, 650), (7, 833))
REPEATED = Case("repeat", DECODES, heads(4, 128), BF16)
TABLES = (
    Case("slots", DECODES, dtype=BF16, page_size=8, table="slots", layout="slots"),
    Case("mapped", DECODES, dtype=BF16, page_size=16, table="mapped"),
    Case("page-3", DECODES, dtype=BF16, page_size=3, wide_lengths=True),
)


def kernels_of(test: str, arguments: Mapping[str, Any]) -> Iterator[DeviceKernel]:
    """The kernels of a test, for conftest to compile beforehand."""
    yield forest_kernel(sharing_capacity("any"))
    if "lengths" in arguments:
        yield from planned_kernels(REPEATED, "drafts", shares=True)
        return
    if "counters" in test:
        yield from planned_kernels(REPEATED, "drafts", shares=True)
        return
    first, case = arguments.get("first"), arguments.get("case")
    step, case = ("decode", case) if first is None else random_step_and_case(first)
    for shares in (False, True):
        yield from planned_kernels(case, step, shares=shares)


def found_by(layer: fi.Attention | PlannedLayer) -> int:
    """Nodes of the step that was planned last."""
    return int(layer.slot.arrays()["header"]["num_nodes"])


def run_both(
    shared: Shared, device: str, num_ctas: int | None = None, *, with_oracle: bool = True
) -> int:
    """Run with prefixes looked for and not, and compare; return the nodes that were found."""
    step, case, problem = shared
    outs, nodes = [], 0
    for capacity in (capacity_of(step), sharing_capacity(step, levels=2 + case.lengths[0][1] % 7)):
        layer = make_layer(case, problem, num_ctas, Place(device, capacity))
        result = run_layer(layer, case, problem, device)
        outs.append(result.out[: problem.num_tokens].float())
        nodes = found_by(layer)
    if with_oracle:
        check_result(result, problem)
    if outs[0].numel():
        difference, largest = float((outs[1] - outs[0]).abs().max()), float(outs[0].abs().max())
        assert difference <= DISAGREEMENT * max(1.0, largest), case
    return nodes


@pytest.mark.parametrize("first", range(KINDS))
def test_random_forests_give_the_same_with_and_without_sharing(device: str, first: int) -> None:
    found = 0
    for turn in range(ROUNDS):
        shared, num_ctas = random_shared(first + turn * KINDS), (None, 1, 5, 33)[turn % 4]
        found += run_both(shared, device, num_ctas, with_oracle=turn % 3 == 0)
    assert found >= ROUNDS // 2


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.name)
def test_tables_of_engines(device: str, case: Case) -> None:
    """Slots instead of pages, pages renumbered behind the table, pages of an odd size."""
    granule = 64 if case.page_size != 3 else 66
    trees = (Tree((0, 1, 2, 4, 5), 3 * granule, (Tree((0, 1, 4), 9 * granule),)),)
    if case.table == "slots":
        dense = make_shared(dataclasses.replace(case, table="dense"), trees)
        problem = through_slots(dense)
    else:
        problem = make_shared(case, trees)
    assert run_both(Shared("decode", case, problem), device) == 2


def through_slots(problem: Problem) -> Problem:
    """As SGLang has it: a row of slots per request, of which every page_size-th is read."""
    table = problem.batch.page_table
    page = table.page_size
    slots = torch.full((len(table.entries), table.entries.shape[1] * page), 2**31 - 1).int()
    used = table.entries < 1 << 20
    slots[:, ::page] = torch.where(used, table.entries * page, 2**31 - 1)
    index = torch.arange(len(slots))
    form = fi.PageTable.indirect(slots, index, page, entry_stride=page, slot_divisor=page)
    batch = dataclasses.replace(problem.batch, page_table=form)
    return dataclasses.replace(problem, batch=batch)


@pytest.mark.parametrize("first", range(KINDS))
def test_plans_of_found_prefixes_are_those_of_the_host(device: str, first: int) -> None:
    for turn in range(ROUNDS // 3):
        step, case, problem = random_shared(first + turn * KINDS)
        capacity = sharing_capacity(step)
        layer = make_layer(case, problem, None, Place(device, capacity))
        assert isinstance(layer, PlannedLayer)
        layer.plan(to_device(problem, device).batch)
        host = to_host(problem.batch)
        forest = PrefixForest(capacity, torch.device("cpu"))
        forest.find(host)
        slot, plan = layer.slot, np.zeros(layer.slot.layout.total_bytes, np.uint8)
        _core.make_plan_of_forest(
            slot.config,
            slot.layout,
            host.num_requests,
            host.qo_indptr.data_ptr(),
            host.kv_len.data_ptr(),
            host.kv_len.element_size(),
            forest.data.data_ptr(),
            plan.ctypes.data,
        )
        np.testing.assert_array_equal(slot.plan.cpu().numpy(), plan, err_msg=case.name)


@pytest.mark.parametrize("lengths", [DECODES, DRAFTS], ids=["decodes", "drafts"])
def test_equal_bits_on_repeat(device: str, lengths: tuple[tuple[int, int], ...]) -> None:
    case = dataclasses.replace(REPEATED, lengths=lengths)
    problem = make_shared(case, LEVELS)
    layer = make_layer(case, problem, None, Place(device, sharing_capacity("drafts")))
    first = run_layer(layer, case, problem, device)
    check_result(first, problem)
    assert found_by(layer) == 3
    for _ in range(20):
        again = run_layer(layer, case, problem, device)
        assert torch.equal(first.out, again.out)
        assert first.lse is not None and again.lse is not None
        assert torch.equal(first.lse, again.lse)


def test_counters_that_were_lost_are_cleared(device: str) -> None:
    problem = make_shared(REPEATED, LEVELS)
    layer = make_layer(REPEATED, problem, None, Place(device, sharing_capacity("drafts")))
    assert isinstance(layer, PlannedLayer)
    first = run_layer(layer, REPEATED, problem, device)
    for memory in (layer.planner.workspace.arrivals, layer.planner.forests[0]._branches):
        memory.fill_(0x55555555)
    layer.planner.clear_counters()
    again = run_layer(layer, REPEATED, problem, device)
    assert torch.equal(first.out, again.out)
    assert found_by(layer) == 3
