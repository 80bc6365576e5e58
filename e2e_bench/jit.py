"""What compiling at run time costs: cold, from the disk cache, in memory; and what a launch costs.

Compilation is timed in processes of its own, whose cache is a folder of its own and which know no
cache of the driver: cold means cold.
Without a GPU the parts that need none are run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from e2e_bench import report, run_log, tables
from e2e_bench.gpu_data import tiny_data
from e2e_bench.host_timing import host_row
from e2e_bench.impls import Ours
from e2e_bench.run_log import RunLog
from fi_backend import _core
from fi_backend.jit.kernels import arch_of

PROCESSES = 3
LAUNCH_CALLS = 5000
IMPL = "fi_backend"
Times = dict[str, list[float]]


def run(out: Path | None, arch: str, quick: bool) -> int:
    """Run the benchmark; return the exit status."""
    log, rows = RunLog(), list[report.Row]()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        arch = arch_of(torch.device("cuda", torch.cuda.current_device()))
    processes = 1 if quick else PROCESSES
    with tempfile.TemporaryDirectory() as folder:
        with log.attempt("compile", IMPL):
            rows += _rows("compile", [_child(folder, "compile", "--arch", arch)])
        with log.attempt("disk", IMPL):
            turns = range(processes)
            children = (_child(folder, "disk", "--arch", arch, "--turn", str(t)) for t in turns)
            rows += _rows("disk", list(children))
    if has_gpu:
        with log.attempt("first call", IMPL):
            rows += _first_calls(processes)
        with log.attempt("launch", IMPL):
            rows += _launch_rows()
    else:
        print("no GPU: first calls and launches are not run")
    if out is not None and rows:
        device = {"gpu": report.gpu_name()} if has_gpu else {"cpu": report.cpu_name()}
        header = report.meta(run_log.gpu_versions(), arch=arch, failures=log.failures, **device)
        report.write(out, header, rows)
    print(tables.time_table(rows))
    return log.finish()


def _child(cache: str, *arguments: str) -> Times:
    """Return what a process of jit_child with its cache in this folder printed."""
    # NVRTC would take what an earlier process compiled from the driver's cache.
    environment = os.environ | {"FI_CACHE_DIR": cache, "CUDA_CACHE_DISABLE": "1"}
    command = [sys.executable, "-m", "e2e_bench.jit_child", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"jit_child {' '.join(arguments)}: exit status {done.returncode}")
    times: Times = json.loads(done.stdout.splitlines()[-1])
    return times


def _rows(prefix: str, children: list[Times]) -> list[report.Row]:
    """Return a row per name, over the times of all processes."""
    merged: Times = {}
    for times in children:
        for name, values in times.items():
            merged.setdefault(name, []).extend(values)
    return [report.Row.of_times(f"{prefix}: {name}", IMPL, merged[name]) for name in merged]


def _first_calls(processes: int) -> list[report.Row]:
    """Time a process's first attention: with nothing in the cache, then with its kernels there."""
    cold, warm = [], []
    for _ in range(processes):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(_child(folder, "first_call"))
            warm.append(_child(folder, "first_call"))
    return [*_rows("empty cache", cold), *_rows("kernels on disk", warm)]


def _launch_rows() -> list[report.Row]:
    """Time the host's part of a launch: the core's, and all of an attention call."""
    device = torch.device("cuda", torch.cuda.current_device())
    data = tiny_data(device)
    prepared = Ours().prepare(data)

    def attention() -> None:
        prepared.call(0)

    attention()
    with recorded_launches() as launches:
        attention()
    arguments = launches[-1]
    calls: dict[str, Callable[[], object]] = {
        "launch: core": lambda: _core.launch_attention(*arguments),
        "launch: attention(), through the custom op": attention,
    }
    return [host_row(name, IMPL, call, LAUNCH_CALLS) for name, call in calls.items()]


@contextmanager
def recorded_launches() -> Iterator[list[tuple[Any, ...]]]:
    """Record the arguments of every launch of the core in the block."""
    found: list[tuple[Any, ...]] = []
    launch = _core.launch_attention

    def spy(*arguments: Any) -> None:
        found.append(arguments)
        launch(*arguments)

    _core.launch_attention = spy
    try:
        yield found
    finally:
        _core.launch_attention = launch
