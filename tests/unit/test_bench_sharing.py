"""The benchmarks of shared prefixes without a GPU; graphs are stood in for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import fi_backend as fi
from e2e_bench import detection, graph_timing, plan, sharing
from e2e_bench.gpu_data import Data, make_batch, page_rows
from e2e_bench.graph_timing import Recorded
from e2e_bench.report import Row
from e2e_bench.run_log import RunLog
from e2e_bench.workloads import Workload, decode, one_prefix
from fi_backend.plan_slot import PlanSlot

CPU = torch.device("cpu")
HEADS = fi.HeadShape(4, 2, 64)
ALONE = Workload("spec.small", (2,) * 3, (500, 90, 300), HEADS)
SHARED = one_prefix("shared.small", 448, (32,) * 3, heads=HEADS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every graph is one call long; what it enqueues is in the list."""
    seen: list[str] = []

    def record(call: Callable[[int], None], layers: int, count: int) -> Recorded:
        seen.append(f"graph of {count}, {layers} in turn")
        call(layers - 1)
        return Recorded(None, count, call)  # type: ignore[arg-type]

    def in_turns(graphs: Mapping[str, Recorded], repeats: int) -> dict[str, list[float]]:
        return {name: [5.0 + i for i in range(repeats)] for name in graphs}

    monkeypatch.setattr(graph_timing, "record", record)
    monkeypatch.setattr(graph_timing, "time_in_turns", in_turns)
    monkeypatch.setattr(graph_timing, "time_apart", in_turns)
    attention, planned = fi.attention, fi.StepPlanner.plan

    def run(*arguments: Any, **options: Any) -> Any:
        seen.append("attention")
        return attention(*arguments, **options)

    def plan_step(planner: fi.StepPlanner, batch: fi.PagedBatch) -> None:
        seen.append("plan")
        planned(planner, batch)

    monkeypatch.setattr(fi, "attention", run)
    monkeypatch.setattr(fi.StepPlanner, "plan", plan_step)
    return seen


@pytest.fixture
def pool() -> torch.Tensor:
    count = max(w.kv_bytes for w in (ALONE, SHARED))
    return torch.randn(count, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("workload", [ALONE, SHARED], ids=lambda w: w.name)
def test_both_engines_are_checked_and_take_turns(
    workload: Workload, pool: torch.Tensor, calls: list[str]
) -> None:
    log = RunLog()
    rows = sharing.bench(Data(workload, pool, layers=2), 3, log)
    assert log.finish() == 0
    name = sharing.title(workload)
    assert name == ("shared.small" if workload is SHARED else "nothing.spec.small")
    assert [(row.workload, row.impl) for row in rows] == [
        (f"{name}.{what}", impl)
        for what in ("step", "attention", "plan")
        for impl in ("fi_backend", "fi_backend_no_sharing")
    ]
    assert [row.us_median for row in rows] == [6.0] * 6
    assert all(0 < (row.error_ratio or 0) <= 2 for row in rows[:4])
    assert [row.error_ratio for row in rows[4:]] == [None, None]
    step = ["plan", *["attention"] * 32]
    steps = graph_timing.calls_per_graph(1, 32 * workload.floor_us)
    layers = graph_timing.calls_per_graph(2, workload.floor_us)
    assert calls == [
        *["plan", "attention"] * 2,
        *[f"graph of {steps}, 1 in turn", *step] * 2,
        *[f"graph of {layers}, 2 in turn", "attention"] * 2,
        *["graph of 100, 1 in turn", "plan"] * 2,
    ]


def test_an_engine_that_finds_the_wrong_prefixes_is_not_timed(
    pool: torch.Tensor,
) -> None:
    shared, alone = Data(SHARED, pool, layers=1), decode("alone", SHARED.kv_lens, heads=HEADS)
    shared.batch = make_batch(alone, page_rows(alone), CPU)
    with pytest.raises(sharing.WrongForest, match="0 of 1440 KV tokens are said to be shared"):
        sharing.Engine.of(shared, 3)
    assert sharing.Engine.of(shared, 0).planner.forests == ()


def test_workloads_with_and_without_prefixes() -> None:
    names = [sharing.title(w) for w in sharing.chosen_workloads(())]
    alone = [name.removeprefix("nothing.") for name in names if name.startswith("nothing.")]
    assert sorted(alone) == sorted(sharing.NOTHING_SHARED)
    assert {name.split(".")[0] for name in names} == {"nothing", "shared"}
    assert [w.name for w in sharing.chosen_workloads(("n4", "spec"))] == ["spec.q4", "shared.n4"]


def test_steps_with_prefixes_to_find() -> None:
    steps = detection.make_steps()
    assert [step.name for step in steps[:5]] == [
        "detect.8x4k.r256.page16",
        "detect.nothing.r256.page16",
        "detect.8x4k.r1024.page16",
        "detect.nothing.r1024.page16",
        "detect.8x4k.r256.page1",
    ]
    assert all(set(step.kv_lens) == {8192} for step in steps)
    assert steps[0].num_kv_tokens == 8 * 4096 + 256 * 4096


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("kind", ["8x4k", "nothing"])
def test_finding_and_planning_are_timed_together_and_apart(
    kind: str, page: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[torch.Tensor | None] = []

    def fill(
        slot: PlanSlot,
        batch: object,
        forest: torch.Tensor,
        word: torch.Tensor,
        stream: int,
        **_: bool,
    ) -> None:
        assert (int(word), stream) == (0, 77)
        filled.append(forest)

    def host_row(workload: str, impl: str, call: Callable[[], object], count: int) -> Row:
        call()
        return Row.of_times(workload, impl, [1.0])

    monkeypatch.setattr(PlanSlot, "fill", fill)
    monkeypatch.setattr(detection, "host_row", host_row)
    monkeypatch.setattr(detection, "COLD_BYTES", 2_000_000)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 77, raising=False)
    step = detection.make_step(kind, 16, page)
    rows = detection.bench(step, CPU)
    parts = ("device", "forest", "planner", "cold", "host")
    assert [row.workload for row in rows] == [f"{step.name}.{part}" for part in parts]
    tables = 4 if page == 1 else 62
    assert calls == [
        "plan",
        *["graph of 100, 1 in turn", "plan"],
        *["graph of 100, 1 in turn"] * 2,
        *[f"graph of {100 if page == 1 else 124}, {tables} in turn", "plan"],
        "plan",
    ]
    assert len(filled) == 1


def test_a_planner_that_finds_too_little_is_not_timed() -> None:
    step, other = (detection.make_step(kind, 16, 16) for kind in ("8x4k", "nothing"))
    planner = detection.make_planner(step, CPU)
    planner.plan(make_batch(other, page_rows(other), CPU))
    with pytest.raises(AssertionError, match="instead of"):
        detection.check(step, planner)


def test_rows_of_detection_are_among_those_of_planning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row.of_times("detect.x.page16.device", "fi_backend", [11.0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(plan, "KINDS", ())
    monkeypatch.setattr(detection, "rows", lambda *_: [row])
    assert plan.run(None, tmp_path / "none.so", quick=False) == 0
    assert "| detect.x.page16.device | 11.0 µs (11.0 µs – 11.0 µs) | 12.0 µs |" in (
        capsys.readouterr().out
    )
