"""Greedy tokens of vLLM on a GPU with this backend, compared with those of vLLM's own backends.

``python -m e2e_bench.vllm_gpu.tokens --out tokens.json`` runs every case of ``runs``, several
engines beside each other, prints one JSON line per case and ends with 1 unless all agree. The file
grows by each case. Run again, the same command goes on: cases that agreed on the same GPU, with the
same kernels, planner and versions, stay as they are.
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
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from e2e_bench.engine_environment import engine_environment, run_header
from e2e_bench.vllm_gpu.compare import compare, judge
from e2e_bench.vllm_gpu.models import make_small
from e2e_bench.vllm_gpu.runs import Case, Run, cases

Result = dict[str, Any]
LOG_END_CHARS = 1500
# What of a header says that an earlier run's cases need not run again.
SAME = ("gpu", "kernels_hash", "planner_hash", "versions")


def runs_of(wanted: Iterable[Case]) -> list[Run]:
    """Return each run once, in the order in which cases need them."""
    order: dict[str, Run] = {}
    for case in wanted:
        for run in (case.reference, *case.noise, *(case.else_noise or ()), case.ours):
            order.setdefault(run.name, run)
    return list(order.values())


class Runner:
    """Runs engines in processes of their own, each for a limited time."""

    def __init__(self, folder: Path, deadline: float, limit_s: float) -> None:
        self.folder = folder
        self.deadline = deadline
        self.limit_s = limit_s
        self.environment = engine_environment(folder)

    def run(self, run: Run) -> Result:
        """Return an engine's answers, or {"failed": why}."""
        limit_s = min(self.limit_s, self.deadline - time.monotonic())
        if limit_s <= 0:
            return {"failed": "no time left"}
        stem = run.name.replace(" ", "-").replace(",", "")
        answers, log = self.folder / f"{stem}.json", self.folder / f"{stem}.log"
        # One process for engine and worker: counters are read without a server.
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
        command = [sys.executable, "-m", "e2e_bench.vllm_gpu.engine", run.name, str(answers)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment | own | dict(run.environment),
                start_new_session=True,  # so that the ranks of a failed engine end with it
            )
            try:
                code: int | str = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                code = f"none after {limit_s:.0f} s"
            finally:
                if process.returncode != 0:
                    _end_group(process)
        if code == 0:
            return dict(json.loads(answers.read_text()))
        end = log.read_text(errors="replace")[-LOG_END_CHARS:]
        return {"failed": f"exit status {code}", "log": end}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report(case: Case, results: dict[str, Result]) -> Result:
    """Return a case's outcome: how it differs, what it did, and every reason why it fails."""
    ours = results[case.ours.name]
    pair = case.noise
    if case.else_noise and any("failed" in results[run.name] for run in pair):
        pair = case.else_noise
    used = {run.name: results[run.name] for run in (case.ours, case.reference, *pair)}
    line: Result = {"case": case.ours.name, "reference": case.reference.name}
    broken = {name: result for name, result in used.items() if "failed" in result}
    if broken:
        reasons = [f"{name}: {result['failed']}" for name, result in broken.items()]
        logs = {name: result["log"] for name, result in broken.items() if "log" in result}
        return line | {"ok": False, "reasons": reasons, "logs": logs}
    found = compare(ours, results[case.reference.name])
    noise = compare(results[pair[1].name], results[pair[0].name])
    reasons = judge(found, noise)
    reasons += [f"{name} is zero" for name in case.shows if not ours["counts"].get(name)]
    reasons += [f"{name} is not zero" for name in case.hides if ours["counts"].get(name)]
    for name in dict.fromkeys(run.name for run in (case.reference, *pair)):
        if results[name]["counts"]["forwards"]:
            reasons.append(f"{name}: our attention ran in the reference")
    by_gap = sorted(found.divergences, key=lambda where: -where["gap"])
    return line | {
        "ok": not reasons,
        "reasons": reasons,
        "tokens": found.tokens,
        "divergences": len(found.divergences),
        "worst_divergence": by_gap[0] if by_gap else None,
        "logprob_max": round(found.largest, 5),
        "logprob_mean": round(found.mean, 6),
        "noise_from": [run.name for run in pair],
        "noise_max": round(noise.largest, 5),
        "noise_mean": round(noise.mean, 6),
        **{
            name: ours[name]
            for name in ("runner_v2", "async_scheduling", "cudagraph_mode", "counts")
        },
        "seconds": ours["total_s"],
    }


class Board:
    """Collects results, prints and keeps each case as soon as its runs are done."""

    def __init__(self, wanted: list[Case], keep: Callable[[Result], None]) -> None:
        self.waiting = list(wanted)
        self.results: dict[str, Result] = {}
        self._keep = keep
        self._lock = threading.Lock()

    def add(self, run: Run, result: Result) -> None:
        """Take one run's answers."""
        with self._lock:
            self.results[run.name] = result
            for case in list(self.waiting):
                if all(one.name in self.results for one in runs_of([case])):
                    self.waiting.remove(case)
                    line = report(case, self.results)
                    print(json.dumps(line), flush=True)
                    self._keep(line)


class Record:
    """The file of results: a line per case, on disk as soon as it is known.

    Goes on from the file's earlier run, where that was made by the same kernels, planner and
    versions on the same GPU.
    """

    def __init__(self, path: Path, header: Result) -> None:
        self.path = path
        self.header = header
        self.lines: list[Result] = []
        self._earlier_s = 0.0
        self._started = time.monotonic()
        if not path.exists():
            return
        before = json.loads(path.read_text())
        if all(before["meta"].get(name) == header.get(name) for name in SAME):
            self.lines = before["cases"]
            self._earlier_s = before["summary"]["seconds"]

    @property
    def summary(self) -> Result:
        """How many cases there are, which of them failed, and how long all runs together took."""
        seconds = self._earlier_s + time.monotonic() - self._started
        failed = [line["case"] for line in self.lines if not line["ok"]]
        return {"cases": len(self.lines), "failed": failed, "seconds": round(seconds, 1)}

    def missing(self, wanted: list[Case]) -> list[Case]:
        """Return the cases that have not agreed yet."""
        agreed = {line["case"] for line in self.lines if line["ok"]}
        return [case for case in wanted if case.ours.name not in agreed]

    def add(self, line: Result) -> None:
        """Take one case's outcome, in place of an earlier one, and write the file."""
        self.lines = [other for other in self.lines if other["case"] != line["case"]] + [line]
        results = {"meta": self.header, "summary": self.summary, "cases": self.lines}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".tmp")
        whole.write_text(json.dumps(results, indent=1) + "\n")
        whole.replace(self.path)


def run_cases(
    wanted: list[Case], runner: Runner, jobs: int, keep: Callable[[Result], None]
) -> None:
    """Give ``keep`` the outcome of each case, running each engine once."""
    board, runs = Board(wanted, keep), runs_of(wanted)
    for model in dict.fromkeys(run.model for run in runs):
        make_small(model)
    with ThreadPoolExecutor(jobs) as pool:

        def start(run: Run) -> Future[None]:
            return pool.submit(lambda: board.add(run, runner.run(run)))

        for future in [start(run) for run in runs if not run.alone]:
            future.result()
    for run in runs:
        if run.alone:
            board.add(run, runner.run(run))


def main() -> int:
    """Run the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of case names")
    parser.add_argument("--jobs", type=int, default=4, help="engines beside each other")
    parser.add_argument("--limit-s", type=float, default=540.0, help="for everything")
    parser.add_argument("--run-limit-s", type=float, default=150.0, help="for one engine")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that runs may use")
    parser.add_argument("--keep", type=Path, help="folder for answers and logs; else temporary")
    args = parser.parse_args()
    wanted = [
        case
        for case in cases()
        if case.ours.gpus <= args.gpus
        and any(fnmatch.fnmatch(case.ours.name, pattern) for pattern in args.only)
    ]
    record = Record(args.out, run_header("vllm"))
    missing = record.missing(wanted)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        runner = Runner(folder, time.monotonic() + args.limit_s, args.run_limit_s)
        run_cases(missing, runner, args.jobs, record.add)
    print(json.dumps(record.summary), flush=True)
    return 1 if record.summary["failed"] or not record.lines else 0


if __name__ == "__main__":
    sys.exit(main())
