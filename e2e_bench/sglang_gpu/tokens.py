"""Greedy tokens of SGLang on a GPU with this backend, compared with those of SGLang's own.

``python -m e2e_bench.sglang_gpu.tokens --out tokens.json`` runs every case of ``runs``, several
engines beside each other, prints one JSON line per case and ends with 1 unless all agree.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from e2e_bench.engine_environment import run_header, sglang_environment
from e2e_bench.sglang_gpu.runs import Case, Run, cases
from e2e_bench.vllm_gpu.compare import compare, judge
from e2e_bench.vllm_gpu.models import make_small

Result = dict[str, Any]
LOG_END_CHARS = 1500


def run_engine(run: Run, folder: Path, limit_s: float) -> Result:
    """Return an engine's answers, or {"failed": why}."""
    stem = run.name.replace(" ", "-").replace(",", "")
    answers, log = folder / f"{stem}.json", folder / f"{stem}.log"
    command = [sys.executable, "-m", "e2e_bench.sglang_gpu.engine", run.name, str(answers)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=sglang_environment(folder),
            start_new_session=True,
        )
        code: int | str
        try:
            code = process.wait(timeout=max(limit_s, 0.0))
        except subprocess.TimeoutExpired:
            code = f"none after {limit_s:.0f} s"
        # SGLang's processes outlive the one that started them.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if answers.exists():
        return dict(json.loads(answers.read_text()))
    end = log.read_text(errors="replace")[-LOG_END_CHARS:]
    return {"failed": f"exit status {code}", "log": end}


def report(case: Case, results: dict[str, Result]) -> Result:
    """Return a case's outcome: how it differs, what it did, and every reason why it fails."""
    reference, other = case.noise
    line: Result = {"case": case.ours.name, "reference": reference.name}
    used = {run.name: results[run.name] for run in (case.ours, *case.noise)}
    broken = {name: result for name, result in used.items() if "failed" in result}
    if broken:
        reasons = [f"{name}: {result['failed']}" for name, result in broken.items()]
        logs = {name: result.get("log") for name, result in broken.items()}
        return line | {"ok": False, "reasons": reasons, "logs": logs}
    ours = results[case.ours.name]
    found = compare(ours, results[reference.name])
    noise = compare(results[other.name], results[reference.name])
    reasons = judge(found, noise)
    reasons += [f"{name} is zero" for name in case.shows if not ours["counts"].get(name)]
    for run in case.noise:
        if results[run.name]["counts"]:
            reasons.append(f"{run.name}: our attention ran in the reference")
    worst = sorted(found.divergences, key=lambda where: -where["gap"])[:1]
    return line | {
        "ok": not reasons,
        "reasons": reasons,
        "tokens": found.tokens,
        "divergences": len(found.divergences),
        "worst_divergence": worst[0] if worst else None,
        "logprob_max": round(found.largest, 5),
        "logprob_mean": round(found.mean, 6),
        "noise_max": round(noise.largest, 5),
        "noise_mean": round(noise.mean, 6),
        "counts": ours["counts"],
        "ready_s": ours["ready_s"],
        "seconds": ours["total_s"],
    }


def run_cases(wanted: list[Case], folder: Path, jobs: int, limit_s: float) -> list[Result]:
    """Return the outcomes of cases, running each engine once, for so many seconds at most."""
    runs = {run.name: run for case in wanted for run in (*case.noise, case.ours)}
    for model in dict.fromkeys(run.model for run in runs.values()):
        make_small(model)
    deadline = time.monotonic() + limit_s

    def start(run: Run) -> Result:
        return run_engine(run, folder, deadline - time.monotonic())

    with ThreadPoolExecutor(jobs) as pool:
        results = dict(zip(runs, pool.map(start, runs.values()), strict=True))
    lines = [report(case, results) for case in wanted]
    for line in lines:
        print(json.dumps(line), flush=True)
    return lines


def main() -> int:
    """Run the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of case names")
    parser.add_argument("--jobs", type=int, default=4, help="engines beside each other")
    parser.add_argument("--limit-s", type=float, default=540.0, help="for everything")
    parser.add_argument("--keep", type=Path, help="folder for answers and logs; else temporary")
    args = parser.parse_args()
    wanted = [
        case
        for case in cases()
        if any(fnmatch.fnmatch(case.ours.name, pattern) for pattern in args.only)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        lines = run_cases(wanted, folder, args.jobs, args.limit_s)
    failed = [line["case"] for line in lines if not line["ok"]]
    summary = {"cases": len(lines), "failed": failed}
    print(json.dumps(summary), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"meta": run_header("sglang"), "summary": summary, "cases": lines}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
