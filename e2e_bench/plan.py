"""What planning a step costs: time on the device and on the host, FA3's scheduler beside ours.

Prefixes are not looked for here; detection.py has the steps where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fi_backend as fi
from e2e_bench import detection, graph_timing, report, tables
from e2e_bench.host_timing import HOST_CALLS, host_row
from e2e_bench.impls import Fa3, NotHere, scheduler_metadata
from e2e_bench.run_log import RunLog
from e2e_bench.workloads import LLAMA, uniform

REQUESTS = (1, 16, 64, 256, 1024)
KINDS = ("decode", "mixed", "verification")
MAX_KV_LEN = 131072
PAGE = 16
CHUNK = 1024  # query tokens of the prefill chunk in a mixed step
VERIFIED = 4  # query tokens of every request in a verification step
PLANS_PER_GRAPH = 100


@dataclass(frozen=True)
class Step:
    """A step to plan."""

    kind: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]

    @property
    def name(self) -> str:
        """Such as "decode.r64"."""
        return f"{self.kind}.r{len(self.q_lens)}"


def make_step(kind: str, requests: int) -> Step:
    """Return a step of KV lengths between 1,024 and 8,192 tokens; the first may be a chunk."""
    kv_lens = uniform(requests, requests, CHUNK, 8192)
    first = CHUNK if kind == "mixed" else 1
    q_len = VERIFIED if kind == "verification" else 1
    return Step(kind, (max(first, q_len), *(q_len,) * (requests - 1)), kv_lens)


def make_batch(step: Step, device: torch.device) -> fi.PagedBatch:
    """Return the step's batch; its page table names page 0 only, planning reads lengths."""
    indptr = torch.tensor([0, *step.q_lens]).cumsum(0).to(device, torch.int32)
    kv_len = torch.tensor(step.kv_lens, dtype=torch.int32, device=device)
    width = -(-max(step.kv_lens) // PAGE)
    table = torch.zeros(len(step.q_lens), width, dtype=torch.int32, device=device)
    return fi.PagedBatch(indptr, kv_len, fi.PageTable.dense(table, PAGE))


def _ours(step: Step, device: torch.device) -> Callable[[], object]:
    batch = make_batch(step, device)
    capacity = fi.Capacity(
        len(step.q_lens), sum(step.q_lens), MAX_KV_LEN, max_q_len=max(step.q_lens)
    )
    planner = fi.StepPlanner([fi.LayerClass(LLAMA, torch.bfloat16)], capacity, device=device)
    return lambda: planner.plan(batch)


def _fa3(step: Step, device: torch.device) -> Callable[[], object]:
    batch = make_batch(step, device)
    return lambda: scheduler_metadata(
        LLAMA,
        step.q_lens,
        step.kv_lens,
        kv_len=batch.kv_len,
        qo_indptr=batch.qo_indptr,
        page=PAGE,
    )


def run(out: Path | None, fa3: Path | None, quick: bool) -> int:
    """Run the benchmark; return the exit status."""
    device, log = torch.device("cuda", torch.cuda.current_device()), RunLog()
    planners = {"fi_backend": _ours}
    try:
        Fa3(fa3)
        planners["fa3"] = _fa3
    except NotHere as error:
        print(f"fa3 is not run: {error}", flush=True)
    steps = [make_step(kind, requests) for kind in KINDS for requests in REQUESTS]
    rows: list[report.Row] = []
    for step in steps[:: 4 if quick else 1]:
        calls: dict[str, Callable[[], object]] = {}
        for name, planner in planners.items():
            with log.attempt(step.name, name):
                call = planner(step, device)
                call()
                calls[name] = call
        with log.attempt(f"{step.name}.device", "all"):
            rows += _device_rows(step, calls, log)
        for name, call in calls.items():
            with log.attempt(f"{step.name}.host", name):
                rows.append(host_row(f"{step.name}.host", name, call, HOST_CALLS))
        if log.device_is_lost:
            break
    if not log.device_is_lost:
        rows += detection.rows(device, quick, log)
    log.write(out, rows)
    print(tables.time_table(rows))
    return log.finish()


def _device_rows(
    step: Step, calls: dict[str, Callable[[], object]], log: RunLog
) -> list[report.Row]:
    """Time a graph of many plans, which includes the gap between two launches."""
    graphs = {}
    name = f"{step.name}.device"
    for impl, call in calls.items():
        with log.attempt(name, impl):
            graphs[impl] = graph_timing.record(lambda _, c=call: c(), 1, PLANS_PER_GRAPH)
    times = graph_timing.time_in_turns(graphs, 10)
    return [report.Row.of_times(name, impl, times[impl]) for impl in graphs]
