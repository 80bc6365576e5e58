"""Every documented refusal of attention(), and what must not be refused."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import STALE, Case, make_problem
from running import Result, compare, make_layer, run
from torch import Tensor

import fi_backend as fi
from fi_backend.variants.shipped import sigmoid_attention, sinks

CASE = Case("errors", ((2, 20), (1, 5)))
HEADS = CASE.heads


def planned(**changes: Any) -> tuple[fi.Attention, Any]:
    problem = make_problem(CASE)
    layer = fi.Attention(HEADS, torch.float32, **changes)
    layer.plan(problem.batch)
    return layer, problem


def call(layer: fi.Attention, problem: Any, **changes: Any) -> Tensor:
    arguments = {"q": problem.q, "kv": problem.kv} | changes
    return layer(arguments.pop("q"), arguments.pop("kv"), **arguments)


def q_like(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


def cache(pages: int = 9, page: int = 16, heads: int = 2, dim: int = 64, **options: Any) -> Any:
    return fi.KvCacheView.nhd(*torch.zeros(2, pages, page, heads, dim, **options))


@dataclass(frozen=True)
class Bad:
    """Arguments that must be refused, and a pattern of the message."""

    match: str
    changes: dict[str, Any]


BAD = [
    Bad(r"q: expected float32 \[tokens, 4, 64\] on cpu.*, got float64 \[3, 4, 64\]",
        {"q": q_like(3, 4, 64, dtype=torch.float64)}),
    Bad(r"q: expected float32 \[tokens, 4, 64\].*, got float32 \[3, 2, 64\]",
        {"q": q_like(3, 2, 64)}),
    Bad(r"q: expected .*, got float32 \[3, 64\]", {"q": q_like(3, 64)}),
    Bad(r"q: expected .* stride 1 .*, got .* strides \[256, 1, 4\]",
        {"q": q_like(3, 64, 4).transpose(1, 2)}),
    Bad("q: expected at least 3 tokens, those of the planned step, got 2", {"q": q_like(2, 4, 64)}),
    Bad(r"kv: expected pages of 16 tokens, as in the page table, got k of shape \(9, 8, 2, 64\)",
        {"kv": cache(page=8)}),
    Bad(r"k: expected float32 \[9, 16, 2, 64\] on cpu.*got float32 \[9, 16, 4, 64\]",
        {"kv": cache(heads=4)}),
    Bad(r"v: expected float32 \[9, 16, 2, 64\]",
        {"kv": fi.KvCacheView.nhd(torch.zeros(9, 16, 2, 64), torch.zeros(9, 16, 2, 32))}),
    Bad("k: expected float32 .*, got bfloat16", {"kv": cache(dtype=torch.bfloat16)}),
    Bad(r"page_table: expected page ids in \[0, 2\), the pages of the KV cache, got \d at row 0",
        {"kv": cache(pages=2)}),
    Bad(r"out: expected float32 \[3, 4, 64\] on cpu.*, got float32 \[2, 4, 64\]",
        {"out": q_like(2, 4, 64)}),
    Bad("out: expected float32 .*, got float16", {"out": q_like(3, 4, 64, dtype=torch.float16)}),
    Bad(r"lse: expected float32 \[3, 4\]", {"lse": q_like(3, 5)}),
    Bad("lse: expected a contiguous tensor", {"lse": q_like(6, 4)[::2]}),
    Bad("lse: expected float32", {"lse": q_like(3, 4, dtype=torch.float64)}),
    Bad("q_scale: expected a contiguous float32 tensor of 1 or 2 elements on cpu, got float32 .3.",
        {"q_scale": torch.ones(3)}),
    Bad("k_scale: expected a contiguous float32 tensor", {"k_scale": torch.ones(2).double()}),
    Bad("v_scale: expected a contiguous float32 tensor", {"v_scale": torch.ones(4)[::2]}),
    Bad("params: expected none for a layer class without a variant, got cap",
        {"params": {"cap": 3.0}}),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.match[:50])
def test_refusals(bad: Bad) -> None:
    layer, problem = planned()
    with pytest.raises(fi.InvalidInput, match=bad.match):
        call(layer, problem, **bad.changes)
    assert call(layer, problem).isfinite().all()  # a refusal leaves the slot usable


def test_unplanned_slot() -> None:
    layer, problem = fi.Attention(HEADS, torch.float32), make_problem(CASE)
    with pytest.raises(
        fi.InvalidInput, match=r"slot: expected a plan, got none; call planner\.plan"
    ):
        call(layer, problem)


def test_dead_slot() -> None:
    layer, problem = planned()
    handle = layer.slot.handle
    del layer
    gc.collect()
    kv, out = problem.kv, torch.empty_like(problem.q)
    with pytest.raises(fi.InvalidInput, match="slot: expected a slot of a living StepPlanner"):
        torch.ops.fi_backend.attention(handle, problem.q, kv.k, kv.v, out, 1.0)


def test_lse_without_softmax() -> None:
    layer, problem = planned(variant=sigmoid_attention())
    with pytest.raises(fi.InvalidInput, match="lse: expected None without softmax, got a tensor"):
        call(layer, problem, lse=torch.empty(3, 4))


def test_variant_parameters_are_checked() -> None:
    layer, problem = planned(variant=sinks())
    with pytest.raises(fi.InvalidInput, match="params: expected a value for 'sinks', got nothing"):
        call(layer, problem)
    with pytest.raises(fi.InvalidInput, match="expected at least 4 elements along axis 0"):
        call(layer, problem, params={"sinks": torch.zeros(3)})


def test_capacity_of_the_convenience_class() -> None:
    problem = make_problem(CASE)
    layer = fi.Attention(HEADS, torch.float32, capacity=fi.Capacity(1, 64, 64))
    with pytest.raises(fi.CapacityExceeded, match="batch: expected max_requests <= 1, got 2"):
        layer.plan(problem.batch)


def test_without_a_capacity_the_planner_grows() -> None:
    layer = fi.Attention(HEADS, torch.float32)
    slots = []
    for lengths in (((1, 5),), ((3, 70), (1, 2)), ((1, 60),), ((4, 65),)):
        case = Case("growing", lengths)
        problem = make_problem(case)
        layer.plan(problem.batch)
        slots.append(layer.slot)
        compare(Result(layer(problem.q, problem.kv), None), problem)
    assert slots[0] is not slots[1] and slots[1] is slots[2] is slots[3]


def test_shapes_may_change_between_calls() -> None:
    """What was checked for one call is checked again when anything about it changes."""
    layer, problem = planned()
    first = call(layer, problem)
    fused = torch.cat([problem.q, problem.q], dim=1)
    assert torch.equal(call(layer, problem, q=fused[:, :4]), first)
    padded = torch.cat([problem.q, torch.full((2, 4, 64), torch.nan)])
    assert torch.equal(call(layer, problem, q=padded)[:3], first)
    with pytest.raises(fi.InvalidInput, match="q: expected at least 3 tokens"):
        call(layer, problem, q=problem.q[:2])
    moved = fi.KvCacheView.hnd(
        *(t.transpose(1, 2).contiguous() for t in (problem.kv.k, problem.kv.v))
    )
    assert torch.equal(call(layer, problem, kv=moved), first)


def test_each_plan_is_checked_against_the_cache() -> None:
    layer, problem = planned()
    call(layer, problem)
    table = problem.batch.page_table.entries.clone()
    table[1, 0] = -1
    layer.plan(
        fi.PagedBatch(problem.batch.qo_indptr, problem.batch.kv_len, fi.PageTable.dense(table, 16))
    )
    with pytest.raises(fi.InvalidInput, match="got -1 at row 1, page 0"):
        call(layer, problem)


def test_a_batch_whose_tensors_changed_in_place_is_checked_again() -> None:
    layer, problem = planned()
    call(layer, problem)
    problem.batch.page_table.entries[1, 0] = 10**6
    layer.plan(problem.batch)
    with pytest.raises(fi.InvalidInput, match="got 1000000 at row 1, page 0"):
        call(layer, problem)


def test_pages_before_the_window_are_never_read() -> None:
    case = Case("stale", ((1, 300), (5, 200)), band=fi.Band.window(60))
    problem = make_problem(case)
    entries = problem.batch.page_table.entries
    entries[0, : (300 - 60) // 16] = STALE
    entries[1, : (200 - 5 - 59) // 16] = STALE
    compare(run(case, problem), problem)


def test_output_defaults() -> None:
    problem = make_problem(Case("half", ((2, 9),), dtype=torch.bfloat16))
    layer = make_layer(Case("half", (), dtype=torch.bfloat16), problem)
    layer.plan(problem.batch)
    assert layer(problem.q, problem.kv).dtype == torch.bfloat16
    assert layer(problem.q, problem.kv, partial=True).dtype == torch.float32
