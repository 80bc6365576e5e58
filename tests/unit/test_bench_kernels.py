"""The kernel benchmark without a GPU: choices, checks, failures; graphs are stood in for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fi_backend as fi
from e2e_bench import __main__ as command_line
from e2e_bench import flashinfer_peers, graph_timing, impls, jit, jit_child, kernels, plan
from e2e_bench.correctness import Reference, WrongResult
from e2e_bench.gpu_data import Data
from e2e_bench.graph_timing import Recorded
from e2e_bench.impls import Fa3, NotHere, Ours, Prepared, make_planner
from e2e_bench.run_log import RunLog
from e2e_bench.tables import IMPLS
from e2e_bench.workloads import WORKLOADS, Prefix, Workload, decode_over, one_prefix
from fi_backend import _core
from fi_backend.jit.cache import default_cache
from fi_backend.jit.nvrtc import Cubin, compile_cubin

HEADS = fi.HeadShape(4, 2, 64)
MIXED = Workload("mixed", (70, 1, 1), (90, 200, 33), HEADS)
SHARED = one_prefix("shared", 448, (32,) * 3, heads=HEADS)
BY_NAME = {workload.name: workload for workload in WORKLOADS}


@pytest.fixture(scope="module")
def pool() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    count = 2 * max(w.kv_bytes for w in (MIXED, SHARED)) // 2
    return torch.randn(count, generator=generator).bfloat16()


class Wrong(Ours):
    """Ours with one element off by a hundredth, which only a limit of its own piece can see."""

    name = "fa3"

    def prepare(self, data: Data) -> Prepared:
        ours = super().prepare(data)
        assert ours.out is not None
        out = ours.out

        def call(layer: int) -> None:
            ours.call(layer)
            out[70, 3, 5] += 0.05

        return Prepared(call, out)


class Broken(Ours):
    """Cannot be prepared."""

    name = "flashinfer_fa2"

    def prepare(self, data: Data) -> Prepared:
        raise ValueError("cannot plan\nthis")


class Picky(Ours):
    """Serves nothing."""

    name = "flashinfer_fa3"

    def why_not(self, workload: Workload) -> str | None:
        return "does not like it"


@pytest.mark.parametrize("workload", [MIXED, SHARED], ids=lambda w: w.name)
def test_the_reference_accepts_our_result(workload: Workload, pool: torch.Tensor) -> None:
    data = Data(workload, pool, layers=2)
    reference = Reference(data)
    prepared = Ours().prepare(data)
    out = prepared.result()
    assert 0 < reference.error_ratio(out) <= 2
    first = out.clone()
    prepared.call(1)
    assert not torch.equal(prepared.out, first)  # layers differ


def test_prefixes_are_looked_for_where_a_workload_has_some() -> None:
    cpu = torch.device("cpu")
    assert [len(make_planner(w, cpu).forests) for w in (MIXED, SHARED)] == [0, 1]
    assert [len(make_planner(MIXED, cpu, levels).forests) for levels in (0, 3)] == [0, 1]
    assert make_planner(SHARED, cpu).capacity == fi.Capacity(3, 3, 480, 3, 3, 3, max_q_len=1)
    assert not make_planner(SHARED, cpu, 0).forests


def test_the_reference_sees_errors(pool: torch.Tensor) -> None:
    data = Data(MIXED, pool, layers=2)
    reference, out = Reference(data), Ours().prepare(data).result()
    wrong = out.clone()
    wrong[70, 3, 5] += 0.05  # the decode over 200 tokens: outputs near 0, their limit is small
    with pytest.raises(WrongResult, match="at token 70"):
        reference.error_ratio(wrong)
    wrong = out.clone()
    wrong[71, 0, 0] = torch.nan
    with pytest.raises(WrongResult, match="1 tokens are not finite, the first 71"):
        reference.error_ratio(wrong)


def test_only_right_results_are_timed(
    pool: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def record(call: Callable[[int], None], layers: int, count: int) -> Recorded:
        for i in range(3):
            call(i % layers)
        calls.append(count)
        return Recorded(None, count, call)  # type: ignore[arg-type]

    def in_turns(graphs: Mapping[str, Recorded], repeats: int) -> dict[str, list[float]]:
        return {name: [5.0 + i for i in range(repeats)] for name in graphs}

    monkeypatch.setattr(graph_timing, "record", record)
    monkeypatch.setattr(graph_timing, "time_apart", in_turns)
    monkeypatch.setattr("e2e_bench.gpu_data.num_layers", lambda _: 2)
    log = RunLog()
    rows = kernels.bench(MIXED, [Ours(), Wrong(), Broken(), Picky()], kernels.Runner(pool, 3, log))
    assert [(r.impl, r.us_median, r.us_min, r.us_max) for r in rows] == [("fi_backend", 6, 5, 7)]
    assert rows[0].floor_us == round(MIXED.floor_us, 2)
    assert len(calls) == 1
    assert [(f["impl"], f["error"].split(":")[0]) for f in log.failures] == [
        ("fa3", "WrongResult"),
        ("flashinfer_fa2", "ValueError"),
    ]
    assert log.failures[1]["error"] == "ValueError: cannot plan"
    assert log.finish() == 1
    assert "flashinfer_fa3 is not run: does not like it" in capsys.readouterr().out


def test_a_clean_run_has_status_0() -> None:
    log = RunLog()
    with log.attempt("w", "i"):
        pass
    assert log.finish() == 0


@pytest.mark.parametrize(
    ("layers", "floor_us", "calls"), [(9, 15.0, 207), (2, 3000.0, 2), (144, 0.95, 576), (2, 1, 600)]
)
def test_graphs_are_whole_turns(layers: int, floor_us: float, calls: int) -> None:
    assert graph_timing.calls_per_graph(layers, floor_us) == calls


def test_choices() -> None:
    assert kernels.chosen_impls(()) == list(IMPLS)
    assert kernels.chosen_impls(("fa3", "flashinfer_p")) == ["fa3", "flashinfer_persistent"]
    assert [w.name for w in kernels.chosen_workloads(("spec", "mix.chunk5"))] == [
        "mix.chunk512",
        "spec.q4",
        "spec.q8",
    ]
    assert len(kernels.chosen_workloads(())) == len(WORKLOADS)


def test_which_peer_runs_what() -> None:
    def served(name: str) -> set[str]:
        return {w.name for w in WORKLOADS if flashinfer_peers.why_not(name, w) is None}

    assert served("flashinfer_cascade") == {n for n in BY_NAME if n.startswith("shared.")}
    uneven = decode_over("x", (Prefix(64),), (0, 0, -1), (8,) * 3)
    assert flashinfer_peers.why_not("flashinfer_cascade", uneven) == "prefixes of one depth only"
    assert served("flashinfer_fa2") == BY_NAME.keys()
    assert {name.split(".")[0] for name in served("flashinfer_decode")} == {"dec", "shared"}
    unserved = {w.name for w in WORKLOADS if impls.fa3_why_not(w)}
    assert unserved == {"dec.b64.k4k.page1", "pre.b1.16k.page1", "shared.ragged.page1"}


class Cascade:
    """Stands in for FlashInfer: an output names its row, and the plan is kept."""

    planned: list[Any]

    def __init__(self, *arguments: object) -> None:
        Cascade.planned = [arguments[0]]

    def plan(self, *arguments: Any, **_: object) -> None:
        Cascade.planned += arguments

    def run(self, q: torch.Tensor, kv: object) -> torch.Tensor:
        return q


def test_a_cascade_reads_every_prefix_once_for_requests_side_by_side() -> None:
    prefixes = (Prefix(32), Prefix(16, 0), Prefix(16, 0), Prefix(16), Prefix(48, 3))
    tree = decode_over("tree", prefixes, (4, 1, 2, 1, 4), (5, 16, 1, 33, 20), heads=HEADS)
    data = Data(tree, torch.zeros(tree.kv_bytes // 2).bfloat16(), layers=1)
    package, none = SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade), torch.empty(0)
    prepared = flashinfer_peers._cascade(package, none, data)
    assert torch.equal(prepared.result(), data.q)  # sorted for the wrapper, and back
    levels, spans, indptrs, indices, last_page_lens, *_ = Cascade.planned
    assert levels == 3
    order = [1, 3, 2, 0, 4]
    assert torch.equal(prepared.call(0), data.q[order])
    assert [s.tolist() for s in spans] == [[0, 3, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert [i.diff().tolist() for i in indptrs] == [[2, 1], [1, 1, 3], [1, 3, 1, 1, 2]]
    assert [n.tolist() for n in last_page_lens] == [[16] * 2, [16] * 3, [16, 1, 1, 5, 4]]
    for at, request in enumerate(order):
        row = []
        for span, indptr, ids in zip(spans, indptrs, indices, strict=True):
            group = int(torch.searchsorted(span, at, right=True)) - 1
            row += ids[indptr[group] : indptr[group + 1]].tolist()
        assert row == data.rows[request].tolist()


def test_peers_that_are_not_here_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotHere, match=r"no library .*missing\.so; name it with --fa3 or FI_FA3"):
        Fa3(tmp_path / "missing.so")
    library = tmp_path / "broken.so"
    library.write_text("no library")
    with pytest.raises(NotHere, match=r"broken\.so does not load"):
        Fa3(library)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(NotHere, match="flashinfer does not import"):
        flashinfer_peers.Modules(("flashinfer_fa2",), WORKLOADS)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = command_line.parser().parse_args(["kernels", "--only", "dec,spec", "--impls", "fa3,fi"])
    assert (args.only, args.impls) == (("dec", "spec"), ("fa3", "fi"))
    with pytest.raises(SystemExit):
        command_line.parser().parse_args(["kernels", "--impls", "cudnn"])
    assert "expected beginnings of fi_backend, fa3" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["kernels", "plan", "sharing"])
def test_a_machine_without_a_gpu(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line.main([command]) == 2
    assert capsys.readouterr().err == f"{command}: expected a CUDA device, got none\n"


def test_launches_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[object, ...]] = []
    monkeypatch.setattr(_core, "launch_attention", lambda *arguments: launched.append(arguments))
    original = _core.launch_attention
    with jit.recorded_launches() as found:
        _core.launch_attention(1, 2)
    assert found == launched == [(1, 2)]
    assert _core.launch_attention is original


def test_cold_and_cached_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit_child, "CASES", jit_child.CASES[1:2])
    monkeypatch.setattr(jit_child, "COMPILE_TURNS", 2)
    sources: list[str] = []

    def spy(source: str, *arguments: object) -> Cubin:
        sources.append(source)
        return compile_cubin(source, *arguments)

    monkeypatch.setattr("fi_backend.jit.kernels.compile_cubin", spy)
    cold = jit_child.compile_all("sm_90a")
    assert len(set(sources)) == 4  # each timed one is new to every cache; the last is the case's
    assert sources[-1] == jit_child.CASES[0].kernel().source
    timed = {name: len(times) for name, times in cold.items()}
    assert timed == {"first": 1, "decode d128": 2, "decode d128, CPU time": 2}
    pairs = zip(cold["decode d128, CPU time"], cold["decode d128"], strict=True)
    assert all(0 < worked <= 1.05 * passed for worked, passed in pairs)
    assert len(default_cache().entries()) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr("fi_backend.jit.kernels.compile_cubin")  # it must not compile again
    assert list(jit_child.load_all("sm_90a", 0)) == ["first"]


def test_cases_are_different_kernels() -> None:
    kernels_of_cases = [case.kernel() for case in jit_child.CASES]
    assert len(set(kernels_of_cases)) == len(kernels_of_cases)


def test_rows_of_several_processes() -> None:
    rows = jit._rows("disk", [{"first": [3.0], "a": [1.0]}, {"first": [5.0], "a": [2.0, 3.0]}])
    assert [(r.workload, r.us_median) for r in rows] == [("disk: first", 4.0), ("disk: a", 2.0)]


def test_plan_sizes() -> None:
    names = [plan.make_step(kind, r).name for kind in plan.KINDS for r in plan.REQUESTS]
    assert len(set(names)) == 15
