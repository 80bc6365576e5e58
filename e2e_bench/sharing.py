"""What looking for shared prefixes costs where there are none, and what it saves where there are.

Our engine twice: with a planner that looks, and with one that has no room for prefixes. Of each,
one CUDA graph of a step (a plan and 32 layers), one of its attention and one of its plan; both take
turns, replay by replay, or, where prefixes are shared and one of them reads several times as much
as the other, at clocks of their own. The attention alone also shows what a kernel loses that could
serve prefixes: its tiles are of one class more.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import fi_backend as fi
from e2e_bench import graph_timing, report, tables
from e2e_bench.correctness import Reference
from e2e_bench.gpu_data import Data, make_pool
from e2e_bench.impls import make_planner
from e2e_bench.run_log import RunLog
from e2e_bench.tables import OURS, OURS_NO_SHARING
from e2e_bench.workloads import WORKLOADS, Workload

LAYERS = 32
PLANS_PER_GRAPH = 100
NOTHING_SHARED = ("dec.b16.k1k", "dec.b64.k4k", "dec.b256.uniform", "spec.q4")
# Room that an engine would give, whatever its requests share.
LEVELS = 3
METHOD = f"CUDA-graph replay, in turns; a step is a plan and {LAYERS} layers"


class WrongForest(AssertionError):
    """Prefixes found where there are none, or none found."""


@dataclass(frozen=True, eq=False)
class Engine:
    """A planner and a workload's tensors, ready to run.

    Attributes:
        planner: that has planned the workload.
        data: of the workload.
        caches: views of its layer copies.
        out: where all layers write.
    """

    planner: fi.StepPlanner
    data: Data
    caches: tuple[fi.KvCacheView, ...]
    out: Tensor

    @classmethod
    def of(cls, data: Data, levels: int) -> Engine:
        """Return the engine with room for some levels of prefixes, 0: none are looked for.

        Raises:
            WrongForest: it finds prefixes where there are none, or none where there are some.
        """
        planner = make_planner(data.workload, data.device, levels)
        planner.plan(data.batch)
        for forest in planner.forests:
            kv_tokens, saved = forest.reads()
            if (saved > 0) != bool(data.workload.prefixes):
                raise WrongForest(f"{saved} of {kv_tokens} KV tokens are said to be shared")
            print(f"  {saved / kv_tokens:.1%} of the KV tokens need not be read", flush=True)
        caches = tuple(fi.KvCacheView.nhd(k, v) for k, v in data.layers)
        return cls(planner, data, caches, data.new_out())

    def plan(self) -> None:
        """Enqueue the plan."""
        self.planner.plan(self.data.batch)

    def attention(self, layer: int) -> None:
        """Enqueue one layer of the step that was planned last."""
        cache = self.caches[layer % len(self.caches)]
        fi.attention(self.planner.slot(0), self.data.q, cache, out=self.out)

    def step(self) -> None:
        """Enqueue a plan and all layers."""
        self.plan()
        for layer in range(LAYERS):
            self.attention(layer)


def chosen_workloads(only: Sequence[str]) -> list[Workload]:
    """Return those that share something, and some that do not; `only` as for the kernels."""
    found = [w for w in WORKLOADS if w.name in NOTHING_SHARED or w.prefixes]
    return [w for w in found if not only or any(word in w.name for word in only)]


def title(workload: Workload) -> str:
    """Return the name of a workload's rows, before what is timed."""
    return workload.name if workload.prefixes else f"nothing.{workload.name}"


def run(out: Path | None, only: Sequence[str], quick: bool) -> int:
    """Run the benchmark; return the exit status."""
    device, log = torch.device("cuda", torch.cuda.current_device()), RunLog()
    workloads = chosen_workloads(only)
    if not workloads:
        print(f"no workload has {' or '.join(only)} in its name")
        return 2
    with log.attempt("prebuild", OURS):
        _prebuild(workloads, device)
    pool = make_pool(workloads, device)
    rows: list[report.Row] = []
    for workload in workloads:
        begin = time.perf_counter()
        with log.attempt(title(workload), "all"):
            rows += bench(Data(workload, pool), 10 if quick else 30, log)
        print(f"{title(workload)}: {time.perf_counter() - begin:.1f} s", flush=True)
        gc.collect()  # graphs hold their memory pools in cycles
        log.write(out, rows, method=METHOD)
        if log.device_is_lost:
            break
    print(tables.sharing_table(rows))
    return log.finish()


def _prebuild(workloads: Sequence[Workload], device: torch.device) -> None:
    """Compile all kernels together, by building each planner once."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for levels in (0, LEVELS):
            list(pool.map(lambda w, n=levels: make_planner(w, device, n), workloads))


def bench(data: Data, repeats: int, log: RunLog) -> list[report.Row]:
    """Check and time one workload; what fails is in the log and has no row."""
    workload, reference = data.workload, Reference(data)
    room = {OURS: max(LEVELS, workload.levels), OURS_NO_SHARING: 0}
    engines: dict[str, Engine] = {}
    ratios: dict[str, float] = {}
    for impl, levels in room.items():
        with log.attempt(title(workload), impl):
            engine = Engine.of(data, levels)
            engine.attention(0)
            ratios[impl] = reference.error_ratio(engine.out)
            engines[impl] = engine
    time_them = graph_timing.time_apart if workload.prefixes else graph_timing.time_in_turns
    rows = []
    for what, record in RECORDED.items():
        graphs = {impl: record(engine) for impl, engine in engines.items()}
        times = time_them(graphs, repeats)
        for impl in graphs:
            row = report.Row.of_times(f"{title(workload)}.{what}", impl, times[impl])
            checked = None if what == "plan" else round(ratios[impl], 3)
            rows.append(replace(row, error_ratio=checked))
    return rows


def _record_steps(engine: Engine) -> graph_timing.Recorded:
    calls = graph_timing.calls_per_graph(1, LAYERS * engine.data.workload.floor_us)
    return graph_timing.record(lambda _: engine.step(), 1, calls)


def _record_attention(engine: Engine) -> graph_timing.Recorded:
    copies = len(engine.caches)
    calls = graph_timing.calls_per_graph(copies, engine.data.workload.floor_us)
    return graph_timing.record(engine.attention, copies, calls)


def _record_plans(engine: Engine) -> graph_timing.Recorded:
    return graph_timing.record(lambda _: engine.plan(), 1, PLANS_PER_GRAPH)


RECORDED: dict[str, Callable[[Engine], graph_timing.Recorded]] = {
    "step": _record_steps,
    "attention": _record_attention,
    "plan": _record_plans,
}
