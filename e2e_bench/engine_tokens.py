"""Runs of an engine whose greedy tokens are compared, and the file that says how they agree.

What ``vllm_gpu.tokens`` and ``sglang_gpu.tokens`` have in common. The file grows by each case. Run
again, the same command goes on: cases that agreed on the same GPU, at the same commit and with the
same versions, stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
LOG_END_CHARS = 1500
# What of a header says that an earlier run's cases need not run again.
SAME = ("gpu", "commit", "kernels_hash", "planner_hash", "versions")


class Runner:
    """Runs engines in processes of their own, each for a limited time.

    Attributes:
        folder: for answers and logs.
        command: of a process, up to the names of its run and of the file for its answers.
        environment: of processes.
        deadline: of time.monotonic(), for all of them.
        limit_s: for each.
        ends_well: whether a process has to end with 0; else its answers are enough.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        deadline: float,
        limit_s: float,
        *,
        ends_well: bool,
    ) -> None:
        self.folder = folder
        self.command = command
        self.environment = environment
        self.deadline = deadline
        self.limit_s = limit_s
        self.ends_well = ends_well

    def run(self, name: str, further: Mapping[str, str] | None = None) -> Result:
        """Return the answers of a run, or {"failed": why}.

        Args:
            name: of the run.
            further: variables of its environment.
        """
        limit_s = min(self.limit_s, self.deadline - time.monotonic())
        if limit_s <= 0:
            return {"failed": "no time left"}
        stem = name.replace(" ", "-").replace(",", "")
        answers, log = self.folder / f"{stem}.json", self.folder / f"{stem}.log"
        answers.unlink(missing_ok=True)  # of an earlier run, where the folder was kept
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.command, name, str(answers)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environment, **(further or {})},
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                code = f"none after {limit_s:.0f} s"
            finally:
                # Schedulers and ranks may outlive the process that started them.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if answers.exists() and (code == 0 or not self.ends_well):
            return dict(json.loads(answers.read_text()))
        end = log.read_text(errors="replace")[-LOG_END_CHARS:]
        return {"failed": f"exit status {code}", "log": end}


class Board:
    """Collects results of runs; prints and keeps each case as soon as its runs are done.

    Args:
        needs: names of the runs of each case, by its name.
        report: returns a case's outcome from its name and the results by run.
        keep: takes each outcome.
    """

    def __init__(
        self,
        needs: Mapping[str, Sequence[str]],
        report: Callable[[str, Mapping[str, Result]], Result],
        keep: Callable[[Result], None],
    ) -> None:
        self._waiting = dict(needs)
        self._report = report
        self._keep = keep
        self._results: dict[str, Result] = {}
        self._lock = threading.Lock()

    def add(self, run: str, result: Result) -> None:
        """Take one run's answers. Any thread."""
        with self._lock:
            self._results[run] = result
            for case, runs in list(self._waiting.items()):
                if all(name in self._results for name in runs):
                    del self._waiting[case]
                    line = self._report(case, self._results)
                    print(json.dumps(line), flush=True)
                    self._keep(line)


class Record:
    """The file of results: a line per case, on disk as soon as it is known.

    Goes on from the file's earlier run, where that was made at the same commit, with the same
    versions, on the same GPU.
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
            self._earlier_s = before["summary"].get("seconds", 0.0)

    @property
    def summary(self) -> Result:
        """How many cases there are, which of them failed, and how long all runs together took."""
        seconds = self._earlier_s + time.monotonic() - self._started
        failed = [line["case"] for line in self.lines if not line["ok"]]
        return {"cases": len(self.lines), "failed": failed, "seconds": round(seconds, 1)}

    @property
    def agreed(self) -> set[str]:
        """Names of cases that need not run again."""
        return {line["case"] for line in self.lines if line["ok"]}

    def add(self, line: Result) -> None:
        """Take one case's outcome, in place of an earlier one, and write the file."""
        self.lines = [other for other in self.lines if other["case"] != line["case"]] + [line]
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        results = {"meta": self.header, "summary": self.summary, "cases": self.lines}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".tmp")
        whole.write_text(json.dumps(results, indent=1) + "\n")
        whole.replace(self.path)

    def finish(self) -> int:
        """Write and print what came of it; return 0 where there are cases and all agree."""
        self.write()
        summary = self.summary
        print(json.dumps(summary), flush=True)
        return 1 if summary["failed"] or not summary["cases"] else 0


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line that both engines share."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--out", type=Path, required=True, help="JSON to write, or to go on with")
    result.add_argument("--only", nargs="+", default=["*"], help="patterns of case names")
    result.add_argument("--jobs", type=int, default=4, help="engines beside each other")
    result.add_argument("--limit-s", type=float, default=540.0, help="for everything")
    result.add_argument("--keep", type=Path, help="folder for answers and logs; else temporary")
    return result


def is_wanted(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a case's name is one of ``--only``."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
