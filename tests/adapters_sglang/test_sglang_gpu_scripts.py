"""The scripts that compare engines on a GPU: what needs no GPU of them."""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from e2e_bench.engine_tokens import Record, Runner
from e2e_bench.sglang_gpu import tokens
from e2e_bench.sglang_gpu.engine import _answer, find_run
from e2e_bench.sglang_gpu.runs import OURS, Case, Run, cases


def test_cases_are_what_they_say() -> None:
    runs = {run for case in cases() for run in (case.ours.name, *(r.name for r in case.noise))}
    assert {case.ours.name for case in cases()} <= runs
    assert len({case.ours.name for case in cases()}) == len(cases())
    for case in cases():
        assert OURS in case.ours.engine_options().values()
        for run in case.noise:
            assert OURS not in run.engine_options().values()
        assert find_run(case.ours.name) == case.ours
    trees = find_run("llama trees").engine_options()
    assert (trees["speculative_eagle_topk"], trees["attention_backend"]) == (2, OURS)


def test_options_are_sglangs_own() -> None:
    known = inspect.signature(ServerArgs).parameters
    asked = {name for case in cases() for name in case.ours.engine_options()}
    assert asked - set(known) == set()


def result(ids: list[int], counts: dict[str, int]) -> dict[str, Any]:
    answer = {"tokens": ids, "logprobs": [-0.1] * len(ids), "gaps": [2.0] * len(ids)}
    answers = {"answers": {"mixed": [answer]}, "scored": [-1.0]}
    return answers | {"counts": counts, "ready_s": 1.0, "total_s": 2.0}


def test_a_report_wants_evidence_that_ours_ran() -> None:
    ours, first, second = Run("a", "m", OURS), Run("b", "m", "B"), Run("c", "m", "C")
    case = Case(ours, (first, second), ("steps", "forwards"))
    results = {"a": result([5, 6], {"steps": 3, "forwards": 9})}
    results |= {"b": result([5, 6], {}), "c": result([5, 6], {})}
    assert tokens.report(case, results)["ok"]
    results["a"] = result([5, 7], {"steps": 3, "forwards": 0})
    results["c"] = result([5, 6], {"forwards": 1})
    first_reason, *others = tokens.report(case, results)["reasons"]
    assert "tokens part where they should not" in first_reason
    assert others == ["forwards is zero", "c: our attention ran in the reference"]
    results["b"] = {"failed": "exit status 1", "log": "why"}
    broken = tokens.report(case, results)
    assert (broken["reasons"], broken["logs"]) == (["b: exit status 1"], {"b": "why"})


def test_a_failed_engine_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "make_small", lambda model: tmp_path / model)
    case = Case(Run("no such run", "m", OURS), (Run("b", "m", "B"), Run("c", "m", "C")))
    runner = Runner(tmp_path, tokens.ENGINE, os.environ, float("inf"), 60.0, ends_well=False)
    record = Record(tmp_path / "tokens.json", {})
    tokens.run_cases([case], runner, jobs=2, record=record)
    (line,) = record.lines
    assert line["reasons"] == [f"{n}: exit status 1" for n in ("no such run", "b", "c")]
    assert "StopIteration" in line["logs"]["b"]


def test_a_run_without_cases_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tokens.json"
    monkeypatch.setattr(sys, "argv", ["tokens", "--out", str(out), "--only", "nothing"])
    assert tokens.main() == 1
    summary = json.loads(out.read_text())["summary"]
    assert (summary["cases"], summary["failed"]) == (0, [])


def test_answers_of_sglang_are_understood() -> None:
    meta = {
        "output_token_logprobs": [(-0.1, 7, None), (-0.5, 8, None)],
        "output_top_logprobs": [
            [(-0.1, 7, None), (-2.1, 3, None)],
            [(-0.5, 8, None), (-0.75, 9, None)],
        ],
    }
    found = _answer({"output_ids": [7, 8], "meta_info": meta})
    assert found == {"tokens": [7, 8], "logprobs": [-0.1, -0.5], "gaps": [2.0, 0.25]}
    assert _answer({"output_ids": [7], "meta_info": {}}) == {"tokens": [7]}
