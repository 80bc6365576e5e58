"""Attention kernels on a GPU: every workload, our engine and its peers in one run.

Correctness first, then CUDA-graph replay over layer copies, in turns, each at clocks of its own.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from e2e_bench import flashinfer_peers, graph_timing, report, tables
from e2e_bench.correctness import Reference
from e2e_bench.gpu_data import Data, make_pool
from e2e_bench.impls import Fa3, Implementation, NotHere, Ours, make_planner
from e2e_bench.run_log import RunLog
from e2e_bench.tables import IMPLS, OURS
from e2e_bench.workloads import WORKLOADS, Workload

METHOD = (
    "CUDA-graph replay over layer copies (600 MB), implementations in two turns, each after 0.3 s"
    " of its own that are not timed"
)


@dataclass(frozen=True)
class Options:
    """What the command line chose.

    Attributes:
        out: where the JSON goes; None: nowhere, the run is not a whole one.
        only: run workloads whose name contains one of these; empty: all.
        impls: names, or beginnings of names, of implementations; empty: all.
        quick: three repeats instead of ten.
        fa3: the FA3 library.
    """

    out: Path | None
    only: tuple[str, ...] = ()
    impls: tuple[str, ...] = ()
    quick: bool = False
    fa3: Path | None = None

    @property
    def repeats(self) -> int:
        """Timed replays of each graph."""
        return 3 if self.quick else 20


def chosen_workloads(only: Sequence[str]) -> list[Workload]:
    """Return the workloads whose name contains one of the words; all without words."""
    return [w for w in WORKLOADS if not only or any(word in w.name for word in only)]


def chosen_impls(beginnings: Sequence[str]) -> list[str]:
    """Return the implementations whose name begins with one of these; all without any."""
    return [impl for impl in IMPLS if not beginnings or impl.startswith(tuple(beginnings))]


def run(options: Options) -> int:
    """Run the benchmark; return the exit status, 1 if anything failed."""
    device = torch.device("cuda", torch.cuda.current_device())
    workloads, log = chosen_workloads(options.only), RunLog()
    if not workloads:
        print(f"no workload has {' or '.join(options.only)} in its name")
        return 2
    impls = _find_impls(options, workloads, device, log)
    pool = make_pool(workloads, device)
    rows: list[report.Row] = []
    for workload in workloads:
        begin = time.perf_counter()
        with log.attempt(workload.name, "all"):
            rows += bench(workload, impls, Runner(pool, options.repeats, log))
        print(f"{workload.name}: {time.perf_counter() - begin:.1f} s", flush=True)
        gc.collect()  # graphs hold their memory pools in cycles
        log.write(options.out, rows, method=METHOD)
        if log.device_is_lost:
            break
    print(tables.kernel_table(rows))
    return log.finish()


def _find_impls(
    options: Options, workloads: Sequence[Workload], device: torch.device, log: RunLog
) -> list[Implementation]:
    """Return the implementations that are here; say which are not."""
    names = chosen_impls(options.impls)
    wrappers = [name for name in names if name in flashinfer_peers.NAMES]
    makers: dict[str, Callable[[], Sequence[Implementation]]] = {}
    if OURS in names:
        makers[OURS] = lambda: [Ours()]
        with log.attempt("prebuild", OURS):
            _prebuild(workloads, device)
    if "fa3" in names:
        makers["fa3"] = lambda: [Fa3(options.fa3)]
    if wrappers:
        makers["flashinfer"] = lambda: flashinfer_peers.make(wrappers, workloads, device)
    found: list[Implementation] = []
    for name, make in makers.items():
        with log.attempt("start", name):
            try:
                found += make()
            except NotHere as error:
                print(f"{name} is not run: {error}", flush=True)
    return found


def _prebuild(workloads: Sequence[Workload], device: torch.device) -> None:
    """Compile our kernels together, by building each planner once: in turn they take longer."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda workload: make_planner(workload, device), workloads))


@dataclass(frozen=True)
class Runner:
    """What all workloads of a run share."""

    pool: Tensor
    repeats: int
    log: RunLog


def bench(workload: Workload, impls: Sequence[Implementation], runner: Runner) -> list[report.Row]:
    """Check and time one workload; what fails is in the log and has no row."""
    data = Data(workload, runner.pool)
    reference = Reference(data)
    calls = graph_timing.calls_per_graph(len(data.layers), workload.floor_us)
    graphs: dict[str, graph_timing.Recorded] = {}
    ratios: dict[str, float] = {}
    for impl in impls:
        reason = impl.why_not(workload)
        if reason is not None:
            print(f"  {impl.name} is not run: {reason}", flush=True)
            continue
        with runner.log.attempt(workload.name, impl.name):
            prepared = impl.prepare(data)
            ratios[impl.name] = reference.error_ratio(prepared.result())
            graphs[impl.name] = graph_timing.record(prepared.call, len(data.layers), calls)
    times = graph_timing.time_apart(graphs, runner.repeats)
    return [
        report.Row.of(
            workload.name,
            name,
            times[name],
            num_bytes=workload.num_bytes,
            flops=workload.flops,
            error_ratio=ratios[name],
            floor_us=workload.floor_us,
        )
        for name in graphs
    ]
