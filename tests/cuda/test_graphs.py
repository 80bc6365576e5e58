"""CUDA graphs: captured once, replayed with any plan; streams, processes, tracing, checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, make_problem
from named_cases import BF16, capacity_of, heads
from placing import to_device
from running import Place, Result, compare, make_layer
from stress import HEADS, LAYER_CLASS, LOADS, Load, Stress, capture, run_steps
from torch import Tensor

import fi_backend as fi
from fi_backend.jit.kernels import DeviceKernel, load

ROOT = Path(__file__).parents[2]
SMALL = Load(4, 24, 700)


@pytest.mark.parametrize("name", LOADS)
def test_ten_thousand_replays(device: str, name: str) -> None:
    stress = Stress(LOADS[name], 10_000, device=device)
    run_steps(stress, 10_000)


def test_two_processes_share_the_gpu(device: str) -> None:
    """Counters and workspaces of one do not know the other; both kernels may be resident."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    environment["FI_TEST_DEVICE"] = device
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/stress.py"), name, "3000", seed],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, seed in (("mixed", "1"), ("decode", "2"))
    ]
    for process in processes:
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
        assert "3000 steps clean" in output


def test_captured_sizes_share_a_workspace(device: str) -> None:
    large = Stress(LOADS["mixed"], 300, 1, device)
    small = Stress(SMALL, 300, 2, device, workspace=large.planner.workspace)
    assert small.planner.slot(0).arrivals.data_ptr() == large.planner.slot(0).arrivals.data_ptr()
    for index in range(300):
        (large, small)[index % 3 == 0].step(index)
    large.check_last()
    small.check_last()


def test_capturing_again_changes_nothing(device: str) -> None:
    """Engines capture each size twice; old and new graph replay any plan."""
    stress = Stress(SMALL, 40, 3, device)
    first = stress.replay
    stress.set_step(0)
    stress.planner.plan(stress.batch)
    again = capture(
        lambda: fi.attention(
            stress.planner.slot(0), stress.q, stress.kv, out=stress.out, lse=stress.lse
        ),
        stress.device,
    )
    for index in range(40):
        stress.replay = (first, again)[index % 2]
        stress.step(index)
        stress.check_last()


def test_streams_with_a_workspace_each(device: str) -> None:
    streams = [torch.cuda.Stream(device) for _ in range(4)]
    loads = [LOADS["mixed"], LOADS["decode"], LOADS["drafts"], SMALL]
    work = [Stress(load, 200, seed, device) for seed, load in enumerate(loads)]
    torch.cuda.synchronize(device)
    for index in range(200):
        for stream, stress in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                stress.step(index)
    torch.cuda.synchronize(device)
    for stress in work:
        stress.check_last()


@pytest.mark.parametrize(("name", "count"), [("mixed", 100), ("shared", 2000)])
def test_a_plan_inside_the_graph(device: str, name: str, count: int) -> None:
    """Plan and attention in one graph; what changes between replays is the step's own tensors."""
    stress = Stress(LOADS[name], count, 4, device)
    stress.set_step(0)

    def step() -> None:
        stress.planner.plan(stress.batch)
        fi.attention(stress.planner.slot(0), stress.q, stress.kv, out=stress.out, lse=stress.lse)

    replay = capture(step, stress.device)
    for index in range(count):
        stress.set_step(index)
        stress.out.fill_(torch.nan)
        stress.lse.fill_(torch.nan)
        replay()
        stress.other.plan(stress.batch)
        fi.attention(
            stress.other.slot(0),
            stress.q,
            stress.kv,
            out=stress.other_out,
            lse=stress.other_lse,
        )
        stress.tally()
    stress.check_last()


def test_padded_requests_are_no_work(device: str) -> None:
    """The items of a padded batch are those of its live requests."""
    items = []
    for padding in (0, 45):
        case = Case("padded", ((1, 700), (1, 30), (1, 299), *((0, 0),) * padding), dtype=BF16)
        problem = make_problem(case)
        layer = make_layer(case, problem, 32, Place(device, capacity_of("decode")))
        layer.plan(to_device(problem, device).batch)
        header = layer.slot.arrays()["header"]
        items.append((int(header["num_items"]), int(header["total_cost"])))
    assert items[0] == items[1]


def test_compiled_functions_are_one_graph(device: str) -> None:
    """Allocated and given outputs, lse and parameters; another plan needs no new trace."""
    case = Case("compiled", ((3, 40), (1, 20)), dtype=BF16, variant="sinks")
    problem = make_problem(case)
    layer = make_layer(case, problem, place=Place(device, capacity_of("any")))

    def model(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        kv = fi.KvCacheView.nhd(k, v)
        first = fi.attention(layer.slot, q + 1, kv, params={"sinks": sinks}) * 2
        out = torch.zeros_like(q)
        fi.attention(layer.slot, q, kv, out=out, lse=lse, params={"sinks": sinks})
        return first, out + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed, stance in ((0, "default"), (1, "fail_on_recompile")):
        step = to_device(make_problem(case, seed), device)
        layer.plan(step.batch)
        lses = torch.empty(2, 4, 4, device=device)
        tensors = (step.q, step.kv.k, step.kv.v)
        expected = model(*tensors, lses[0], step.params["sinks"])
        with torch.compiler.set_stance(stance):
            actual = compiled(*tensors, lses[1], step.params["sinks"])
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        assert torch.equal(lses[0], lses[1]) and lses.isfinite().all()


def test_a_kernel_missing_under_capture_is_an_error(device: str) -> None:
    """It would compile for a second inside the capture; nothing of the kind happens in serving."""
    entry = f"fi_missing_{os.getpid()}"
    kernel = DeviceKernel("missing", entry, f'extern "C" __global__ void {entry}() {{}}\n', 0)
    graph, total = torch.cuda.CUDAGraph(), torch.zeros((), device=device)
    with torch.cuda.device(device), torch.cuda.graph(graph):
        total += 1
        with pytest.raises(fi.Unsupported, match=r"missing: expected kernels .* loaded before a"):
            load(kernel, torch.device(device))
    graph.replay()
    assert float(total) == 1  # the capture went on and is whole
    load(kernel, torch.device(device))


def test_checks_name_request_and_position(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FI_CHECK=1: an id outside the cache is an error of the host, not a fault of the device."""
    monkeypatch.setenv("FI_CHECK", "1")
    case = Case("checked", ((1, 40), (2, 90)), dtype=BF16)
    problem = make_problem(case)
    layer = make_layer(case, problem, place=Place(device, capacity_of("any")))
    there = to_device(problem, device)
    table = there.batch.page_table.entries
    kept, table[1, 4] = int(table[1, 4]), 999_999
    match = r"page_table: expected page ids in \[0, 12\), .* got 999999 at row 1, page 4"
    with pytest.raises(fi.InvalidInput, match=match):
        layer.plan(there.batch)
        layer(there.q, there.kv)
    table[1, 4] = kept
    layer.plan(there.batch)
    lse = torch.empty(3, 4, device=device)
    compare(Result(layer(there.q, there.kv, lse=lse).cpu(), lse.cpu()), problem)


def test_checks_see_replays(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph launches without us, so the plan of its step is where FI_CHECK=1 looks."""
    monkeypatch.setenv("FI_CHECK", "1")
    stress = Stress(SMALL, 20, 5, device)
    stress.step(7)
    stress.check_last()
    request = int(stress.batch.kv_len.argmax())
    stress.batch.page_table.entries[request, 0] = -3
    with pytest.raises(fi.InvalidInput, match=rf"got -3 at row {request}, page 0"):
        stress.planner.plan(stress.batch)


def test_layer_classes_take_turns_in_one_graph(device: str) -> None:
    """Alternating layers of two classes, one plan of each per step, one workspace."""
    window = fi.LayerClass(HEADS, BF16, band=fi.Band.window(64))
    case = Case("layers", ((1, 300), (30, 200), (0, 0), (1, 17)), heads(4, 128), BF16)
    planner = fi.StepPlanner([LAYER_CLASS, window], capacity_of("any"), device)
    problem = to_device(make_problem(case), device)
    planner.plan(problem.batch)
    outs = torch.empty(6, *problem.q.shape, dtype=BF16, device=device)

    def model() -> None:
        for layer, out in enumerate(outs):
            fi.attention(planner.slot(layer % 2), problem.q, problem.kv, out=out)

    replay = capture(model, torch.device(device))
    for seed in range(4):
        step = make_problem(case, seed)
        there = to_device(step, device)
        problem.q.copy_(there.q)
        problem.kv.k.copy_(there.kv.k)
        problem.kv.v.copy_(there.kv.v)
        problem.batch.page_table.entries.copy_(there.batch.page_table.entries)
        planner.plan(problem.batch)
        replay()
        for layer, out in enumerate(outs.cpu()):
            band = (fi.CAUSAL, window.band)[layer % 2]
            layer_problem = make_problem(
                Case("layers", case.lengths, case.heads, BF16, band=band), seed
            )
            compare(Result(out, None), layer_problem)
