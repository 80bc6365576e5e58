"""The scripts that compare and measure engines on a GPU: what needs no GPU of them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from e2e_bench import engine_environment as environment
from e2e_bench.engine_tokens import Board, Record, Runner
from e2e_bench.serving.shapes import SHAPES, make_shape
from e2e_bench.vllm_gpu import tokens
from e2e_bench.vllm_gpu.compare import Agreement, compare, judge
from e2e_bench.vllm_gpu.engine import SHARING, WORKLOADS, find_run
from e2e_bench.vllm_gpu.runs import OURS, Case, Run, cases


def said(ids: list[int], logprobs: list[float], gaps: list[float], scored: float = -1.0) -> Any:
    answer = {"tokens": ids, "logprobs": logprobs, "gaps": gaps}
    return {"answers": {"mixed": [answer]}, "scored": [scored]}


REFERENCE = said([5, 6, 7], [-0.1, -0.2, -0.3], [2.0, 1.0, 0.06])
NOISE = Agreement([0.02, 0.002, 0.002], [], 100)


def test_differences_count_up_to_where_tokens_part() -> None:
    found = compare(said([5, 6, 8], [-0.11, -0.2, -9.0], [0, 0, 0], -1.01), REFERENCE)
    assert found.tokens == 2
    assert found.divergences == [{"workload": "mixed", "prompt": 0, "position": 2, "gap": 0.06}]
    assert found.differences == pytest.approx([0.01, 0.0, 0.01])


def test_near_ties_may_part_and_clear_choices_may_not() -> None:
    tie = compare(said([5, 6, 8], [-0.1, -0.2, -9.0], [0, 0, 0]), REFERENCE)
    assert judge(tie, NOISE) == []
    clear = compare(said([5, 9, 8], [-0.1, -9.0, -9.0], [0, 0, 0]), REFERENCE)
    (reason,) = judge(clear, NOISE)
    assert "tokens part where they should not" in reason and "'position': 1" in reason


def test_logprobs_beyond_the_noise_are_reported() -> None:
    far = compare(said([5, 6, 7], [-0.1, -0.4, -0.3], [0, 0, 0]), REFERENCE)
    reasons = judge(far, NOISE)
    assert [r.split(" by")[0] for r in reasons] == ["log-probabilities differ"] * 2
    assert judge(compare(REFERENCE, REFERENCE), NOISE) == []
    assert judge(Agreement(), NOISE) == ["nothing was compared"]
    broken = compare(said([5, 6, 7], [-0.1, float("nan"), -0.3], [0, 0, 0]), REFERENCE)
    assert judge(broken, NOISE), "a NaN agrees with nothing"


def test_cases_are_what_they_say() -> None:
    names = [run.name for run in tokens.runs_of(cases())]
    assert len(names) == len(set(names))
    for case in cases():
        assert case.ours.backend == OURS != case.reference.backend
        assert case.reference.name in names and find_run(case.ours.name) == case.ours
        assert set(case.ours.workloads) <= {*WORKLOADS, *SHARING}
        assert {run.backend for run in case.noise}.isdisjoint({OURS})
    full = next(case.ours for case in cases() if case.ours.graphs == "FULL")
    assert full.engine_options()["compilation_config"]["cudagraph_mode"] == "FULL"


def result(backend: str, forwards: int) -> dict[str, Any]:
    counts = {"steps": 3, "forwards": forwards, "decode_steps": 0}
    facts = {"runner_v2": True, "async_scheduling": True, "cudagraph_mode": "FULL"}
    return REFERENCE | facts | {"backend": backend, "counts": counts, "total_s": 1.0}


def test_report_wants_evidence_that_ours_ran(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs, other = (Run(n, "m", b) for n, b in (("a", OURS), ("b", "B"), ("c", "C")))
    case = Case(ours, theirs, (theirs, other), ("steps", "forwards"))
    kept: list[dict[str, Any]] = []
    needs = {"a": [run.name for run in tokens.runs_of([case])]}
    board = Board(needs, lambda _, results: tokens.report(case, results), kept.append)
    board.add("b", result("B", 0))
    board.add("c", result("C", 0))
    assert kept == []
    board.add("a", result(OURS, 4))
    assert json.loads(capsys.readouterr().out)["ok"] is True and kept[0]["ok"] is True
    results = {"a": result(OURS, 0), "b": result("B", 1), "c": {"failed": "exit status 1"}}
    (reason,) = tokens.report(case, results)["reasons"]
    assert reason == "c: exit status 1"
    stand_in = dataclasses.replace(case, else_noise=(theirs, theirs))
    assert tokens.report(stand_in, results)["noise_from"] == ["b", "b"]
    results["c"] = result("C", 0)
    assert tokens.report(case, results)["reasons"] == [
        "forwards is zero",
        "b: our attention ran in the reference",
    ]
    results |= {"a": result(OURS, 4), "b": result("B", 0)}
    off = dataclasses.replace(case, hides=("decode_steps", "steps"))
    assert tokens.report(off, results)["reasons"] == ["steps is not zero"]


def test_a_run_goes_on_with_the_cases_that_have_not_agreed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokens.json"
    header = {"gpu": "NVIDIA H200", "commit": "a", "kernels_hash": "1", "versions": {}}
    record = Record(path, header | {"date": "2026-01-01"})
    record.add({"case": "first", "ok": True})
    record.add({"case": "second", "ok": False})
    assert json.loads(path.read_text())["summary"]["failed"] == ["second"]
    again = Record(path, header | {"date": "2026-01-02"})
    assert again.agreed == {"first"}
    assert again.finish() == 1, "not run again, not forgotten"
    again.add({"case": "second", "ok": True})
    assert again.finish() == 0
    written = json.loads(path.read_text())
    assert written["summary"] | {"seconds": 0} == {"cases": 2, "failed": [], "seconds": 0}
    assert written["meta"]["date"] == "2026-01-02"
    assert len(Record(path, header).lines) == 2
    for other in ({"kernels_hash": "9"}, {"commit": "b"}, {"gpu": "NVIDIA H100"}):
        assert Record(path, header | other).lines == [], other


def make_runner(folder: Path, *command: str, ends_well: bool = True) -> Runner:
    return Runner(folder, command, os.environ, float("inf"), 60.0, ends_well=ends_well)


def test_a_failed_engine_is_reported_with_its_log(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, *tokens.ENGINE)
    failed = runner.run("no such run")
    assert failed["failed"] == "exit status 1" and "StopIteration" in failed["log"]
    runner.limit_s = 0.01
    assert runner.run("slow")["failed"] == "exit status none after 0 s"
    runner.deadline = 0.0
    assert runner.run("late") == {"failed": "no time left"}


def test_answers_of_an_engine_that_ends_badly(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[2], 'w').write('{}'); sys.exit(3)"
    strict = make_runner(tmp_path, sys.executable, "-c", code)
    assert strict.run("a")["failed"] == "exit status 3"
    lenient = make_runner(tmp_path, sys.executable, "-c", code, ends_well=False)
    assert lenient.run("a") == {}
    lenient.command = (sys.executable, "-c", "import sys; sys.exit(4)")
    assert lenient.run("a")["failed"] == "exit status 4", "not by answers of the run before"


def test_entry_points_of_a_checkout_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_is_installed", lambda: False)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    variables = environment.engine_environment(tmp_path)
    paths = variables["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == "/elsewhere" and paths[-1] == str(environment.ROOT)
    (found,) = importlib.metadata.distributions(path=[paths[1]])
    points = {(p.group, p.name): p.value for p in found.entry_points}
    assert points[environment.GROUP, "fi_backend"] == "fi_backend.integrations.vllm:register"
    code = "import fi_backend, e2e_bench, os; print(os.path.dirname(e2e_bench.__file__))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(environment.ROOT / "e2e_bench")


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_one_token_per_word(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = make_shape(name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [3, SHAPES[name]["vocab_size"] - 1, 77, 4]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert len(tokenizer) == AutoConfig.from_pretrained(folder).vocab_size
