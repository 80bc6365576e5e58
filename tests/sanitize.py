"""The kernels under compute-sanitizer: ``python tests/sanitize.py``.

Each tool watches a small set of cases, of which only our kernels count, and a kernel with a planted
bug, which it must find. Prints a line per tool; exits with 1 if one has findings, misses its bug or
does not finish. With ``--evidence PLACE`` the figures go to the evidence file (gpu_evidence.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sanitizer_report import DONE, findings_of, is_complete

TESTS = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TIMEOUT_S = 400
OUR_KERNELS = "kns=fi_"


@dataclass(frozen=True)
class Outcome:
    """What a tool said about a run."""

    findings: list[str]
    finished: bool  # the tool came to its summary, the program to its end
    output: str


@cache
def sanitizer() -> str:
    """Path of compute-sanitizer."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    for place in places:
        if place and Path(place).exists():
            return place
    sys.exit("compute-sanitizer: expected on PATH, got none; install the CUDA toolkit")


@cache
def filter_option() -> str:
    """The option that names kernels; it had another name before 2024.3."""
    shown = subprocess.run([sanitizer(), "--help"], capture_output=True, text=True, check=False)
    return "--kernel-name" if "--kernel-name" in shown.stdout else "--kernel-regex"


def watch(tool: str, work: str) -> Outcome:
    """Run a piece of sanitizer_work.py under a tool."""
    options = ["--tool", tool, "--show-backtrace", "no", "--print-limit", "500"]
    # initcheck must see the writes of torch's kernels too, or all memory looks uninitialised.
    if tool != "initcheck":
        options += [filter_option(), OUR_KERNELS]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch probes the driver
    command = [sanitizer(), *options, sys.executable, str(TESTS / "sanitizer_work.py"), work]
    # Each tensor is an allocation of its own: an access past its end is not one into the next.
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
    }
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        return Outcome([], False, f"{error.stdout or ''}\nstopped after {TIMEOUT_S} s")
    output = done.stdout
    return Outcome(findings_of(output), is_complete(output) and DONE in output, output)


def judge(tool: str) -> tuple[dict[str, object], str]:
    """Return a tool's figures and the line that says them."""
    start = time.monotonic()
    planted, cases = watch(tool, tool), watch(tool, "cases")
    seconds = round(time.monotonic() - start, 1)
    figures = {
        "findings": len(cases.findings),
        "planted": bool(planted.findings),
        "finished": cases.finished,
        "seconds": seconds,
    }
    words = f"{len(cases.findings)} findings" if cases.findings else "clean"
    if not cases.finished:
        words = "did not finish"
    bug = "finds its planted bug" if planted.findings else "misses its planted bug"
    lines = [f"{tool:10} {seconds:6.1f} s  {words}, {bug}", *dict.fromkeys(cases.findings)]
    if not cases.finished:
        lines += cases.output.splitlines()[-30:]
    if not planted.findings:
        lines += planted.output.splitlines()[-15:]
    return figures, "\n    ".join(lines)


def is_good(figures: dict[str, object]) -> bool:
    return figures["findings"] == 0 and bool(figures["finished"]) and bool(figures["planted"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="comma-separated")
    parser.add_argument("--evidence", type=Path, help="folder or JSON file for the figures")
    arguments = parser.parse_args()
    results = {}
    tools = arguments.tools.split(",")
    with ThreadPoolExecutor(len(tools)) as pool:  # they do not wait for each other
        for tool, (figures, line) in zip(tools, pool.map(judge, tools), strict=True):
            results[tool] = figures
            print(line, flush=True)
    if arguments.evidence:
        sys.path.append(str(TESTS.parent))
        import gpu_evidence
        import torch

        gpu = torch.cuda.get_device_name(os.environ.get("FI_TEST_DEVICE", "cuda:0"))
        gpu_evidence.update(arguments.evidence, gpu, sanitizer=results)
    sys.exit(0 if all(map(is_good, results.values())) else 1)


if __name__ == "__main__":
    main()
