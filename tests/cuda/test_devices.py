"""Devices and what is refused: every GPU of the machine, whichever is current; typed errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Case, make_problem
from named_cases import BF16, MIXED, capacity_of, heads
from placing import to_device
from running import Place, check, make_layer, run
from stress import LOADS, Stress, run_steps

import fi_backend as fi
from fi_backend.plan_status import PlanStatus
from fi_backend.variants.shipped import sinks

CASE = Case("device", MIXED, heads(4, 128), BF16, variant="gemma")
SMALL = Case("small", ((2, 20), (1, 5)), dtype=BF16)


def devices() -> list[str]:
    """Every GPU; named inside the tests, for counting them at collection would start CUDA."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def test_every_device_whichever_is_current() -> None:
    """Planner, plan and launch follow the tensors; the current device stays what it was."""
    for place in devices():
        for current in devices():
            with torch.cuda.device(current):
                check(CASE, place=Place(place, capacity_of("any")))
                assert torch.cuda.current_device() == torch.device(current).index


def test_torchs_default_device_changes_nothing(device: str) -> None:
    """Engines build models under one: a tensor that names no device would land there."""
    problem, place = make_problem(SMALL), Place(device, capacity_of("any"))
    expected, there = run(SMALL, problem, place=place), to_device(problem, device)
    out = torch.empty_like(expected.out, device=device)
    with torch.device(device):
        layer = make_layer(SMALL, problem, place=place)
        layer.plan(there.batch)
        layer(there.q, there.kv, out=out)
    assert torch.equal(out.cpu(), expected.out)


def test_devices_agree_bit_by_bit() -> None:
    problem = make_problem(CASE)
    results = [run(CASE, problem, 40, Place(d, capacity_of("any"))) for d in devices()]
    for result in results:
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.lse, results[0].lse)


def test_every_device_replays_graphs() -> None:
    work = [Stress(LOADS["mixed"], 200, 6, place) for place in devices()]
    for index in range(200):
        for stress in work:  # all devices at once
            stress.step(index)
    for stress in work:
        stress.check_last()


def test_a_plain_name_is_the_current_device() -> None:
    last = devices()[-1]
    with torch.cuda.device(last):
        planner = fi.StepPlanner([fi.LayerClass(SMALL.heads, BF16)], fi.Capacity(4, 8, 64), "cuda")
    assert planner.device == torch.device(last)
    assert planner.slot(0).plan.device == torch.device(last)


def test_replays_outside_a_device_context() -> None:
    """A graph of the last device, replayed while the first is current."""
    stress = Stress(LOADS["decode"], 100, 7, devices()[-1])
    with torch.cuda.device(0):
        run_steps(stress, 100)


@dataclass(frozen=True)
class Bad:
    """Arguments that must be refused, and a pattern of the message."""

    match: str
    changes: Mapping[str, Any]


BAD = [
    Bad(r"q: expected bfloat16 \[tokens, 4, 64\] on cuda:\d.*, got float32 \[3, 4, 64\]",
        {"q": lambda p: p.q.float()}),
    Bad(r"q: expected bfloat16 .* on cuda:\d.*, got bfloat16 .* on cpu",
        {"q": lambda p: p.q.cpu()}),
    Bad(r"k: expected bfloat16 .*, got float16",
        {"kv": lambda p: fi.KvCacheView.nhd(p.kv.k.half(), p.kv.v.half())}),
    Bad(r"k: expected bfloat16 .* on cuda:\d.*, got bfloat16 .* on cpu",
        {"kv": lambda p: fi.KvCacheView.nhd(p.kv.k.cpu(), p.kv.v.cpu())}),
    Bad(r"kv: expected pages of 16 tokens",
        {"kv": lambda p: fi.KvCacheView.nhd(p.kv.k[:, :8], p.kv.v[:, :8])}),
    Bad(r"out: expected bfloat16 or float32 \[3, 4, 64\] on cuda:\d.*, got float16",
        {"out": lambda p: p.q.half()}),
    Bad(r"lse: expected float32 \[3, 4\]", {"lse": lambda p: p.q[..., 0].contiguous()}),
    Bad(r"k_scale: expected a contiguous float32 tensor of 1 or 2 elements on cuda:\d",
        {"k_scale": lambda p: torch.ones(1)}),
    Bad("params: expected none for a layer class without a variant",
        {"params": lambda p: {"cap": 3.0}}),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.match[:40])
def test_refusals(device: str, bad: Bad) -> None:
    problem = make_problem(SMALL)
    layer = make_layer(SMALL, problem, place=Place(device, capacity_of("any")))
    there = to_device(problem, device)
    layer.plan(there.batch)
    arguments = {"q": there.q, "kv": there.kv} | {n: f(there) for n, f in bad.changes.items()}
    with pytest.raises(fi.InvalidInput, match=bad.match):
        layer(arguments.pop("q"), arguments.pop("kv"), **arguments)
    assert layer(there.q, there.kv).isfinite().all()  # a refusal leaves the slot usable


def test_parameters_on_another_device(device: str) -> None:
    case = dataclasses.replace(SMALL, variant="sinks")
    problem = make_problem(case)
    layer = make_layer(case, problem, place=Place(device, capacity_of("any")))
    there = to_device(problem, device)
    layer.plan(there.batch)
    with pytest.raises(fi.InvalidInput, match=r"sinks.* on cuda:\d.*, got .*cpu"):
        layer(there.q, there.kv, params={"sinks": problem.params["sinks"]})


def test_a_batch_on_another_device(device: str) -> None:
    layer = make_layer(SMALL, make_problem(SMALL), place=Place(device, capacity_of("any")))
    with pytest.raises(fi.InvalidInput, match=r"batch: expected tensors on cuda:\d, got cpu"):
        layer.plan(make_problem(SMALL).batch)


def test_more_requests_than_capacity(device: str) -> None:
    layer = make_layer(SMALL, make_problem(SMALL), place=Place(device, fi.Capacity(1, 9, 99)))
    with pytest.raises(fi.CapacityExceeded, match="batch: expected max_requests <= 1, got 2"):
        layer.plan(to_device(make_problem(SMALL), device).batch)


@pytest.mark.parametrize(
    ("match", "layer_class"),
    [
        ("dtype: expected float16 or bfloat16, got float32",
         fi.LayerClass(SMALL.heads, torch.float32)),
        ("head_dim_qk: expected a multiple of 16 from 32 to 256, got 72",
         fi.LayerClass(fi.HeadShape(4, 2, 72), BF16)),
    ],
)  # fmt: skip
def test_classes_that_tensor_cores_do_not_serve(
    device: str, match: str, layer_class: fi.LayerClass
) -> None:
    with pytest.raises(fi.Unsupported, match=match):
        fi.StepPlanner([layer_class], capacity_of("any"), device)


def test_lengths_out_of_contract_are_clamped_and_reported(device: str) -> None:
    """Nothing is read past the table, and the status says why the step was cut."""
    case = Case("long", ((1, 40), (1, 64)), dtype=BF16, variant="sinks")
    problem = to_device(make_problem(case), device)
    planner = fi.StepPlanner(
        [fi.LayerClass(case.heads, BF16, variant=sinks())], fi.Capacity(4, 8, 64), device
    )
    problem.batch.kv_len[1] = 1 << 20
    planner.plan(problem.batch)
    out = fi.attention(planner.slot(0), problem.q, problem.kv, params=problem.params)
    assert out[0].isfinite().all()
    torch.cuda.synchronize(device)
    assert planner.status & PlanStatus.KV_TOO_LONG
