"""What finding shared prefixes adds to planning a step: both together, and each alone.

Steps are decodes of 8,192 KV tokens whose page tables are real: in eight groups that share 4,096
tokens, or with nothing shared. Times are of a graph of many plans, like those of plan.py, in which
the page table stays in the L2 cache; *cold* takes turns among tables that do not fit there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

import fi_backend as fi
from e2e_bench import graph_timing, report
from e2e_bench.gpu_data import make_batch, page_rows
from e2e_bench.host_timing import HOST_CALLS, host_row
from e2e_bench.run_log import RunLog
from e2e_bench.tables import OURS
from e2e_bench.workloads import LLAMA, Workload, decode, groups

REQUESTS = (256, 1024)
PAGES = (16, 1)
KV_LEN, SHARED_LEN, NUM_GROUPS = 8192, 4096, 8
MAX_KV_LEN = 131072
PLANS_PER_GRAPH = 100
# Tables of a cold graph, and the bytes that they should have: more than twice the L2 of an H200.
MOST_TABLES, COLD_BYTES = 256, 128 << 20


def make_steps() -> list[Workload]:
    """Return the steps, named such as "detect.8x4k.r256.page16"."""
    return [
        make_step(kind, requests, page)
        for page in PAGES
        for requests in REQUESTS
        for kind in ("8x4k", "nothing")
    ]


def make_step(kind: str, requests: int, page: int) -> Workload:
    """Return a step of one kind, neighbours in different groups."""
    name = f"detect.{kind}.r{requests}.page{page}"
    if kind == "nothing":
        return decode(name, (KV_LEN,) * requests, page=page)
    order = tuple(request % NUM_GROUPS for request in range(requests))
    own = (KV_LEN - SHARED_LEN,) * requests
    return groups(name, (SHARED_LEN,) * NUM_GROUPS, order, own, page)


def make_planner(step: Workload, device: torch.device) -> fi.StepPlanner:
    """Return a planner of decodes that looks for prefixes."""
    requests = len(step.kv_lens)
    capacity = fi.Capacity(requests, requests, MAX_KV_LEN, max_q_len=1).with_sharing()
    return fi.StepPlanner([fi.LayerClass(LLAMA, torch.bfloat16)], capacity, device=device)


def parts(
    planner: fi.StepPlanner, batch: fi.PagedBatch, stream: Callable[[], int]
) -> dict[str, Callable[[], None]]:
    """Return what is timed by the end of its name; the planner has planned the batch.

    Args:
        planner: with room for prefixes.
        batch: of all calls.
        stream: returns the handle of the current one.
    """
    (forest,), slot = planner.forests, planner.slot(0)
    word = torch.zeros(1, dtype=torch.int32, pin_memory=planner.device.type == "cuda")
    return {
        "device": lambda: planner.plan(batch),
        "forest": lambda: forest.find(batch, stream()),
        "planner": lambda: slot.fill(batch, forest.data, word, stream()),
    }


def cold_batches(batch: fi.PagedBatch) -> list[fi.PagedBatch]:
    """Return the step with as many copies of its page table as do not fit the cache."""
    table = batch.page_table
    count = min(-(-COLD_BYTES // (4 * table.entries.numel())), MOST_TABLES)
    return [
        replace(batch, page_table=replace(table, entries=table.entries.clone()))
        for _ in range(count)
    ]


def rows(device: torch.device, quick: bool, log: RunLog) -> list[report.Row]:
    """Time all steps; what fails is in the log and has no row."""
    found: list[report.Row] = []
    for step in make_steps()[:: 3 if quick else 1]:
        with log.attempt(step.name, OURS):
            found += bench(step, device)
        if log.device_is_lost:
            break
    return found


def bench(step: Workload, device: torch.device) -> list[report.Row]:
    """Time one step in all its parts."""
    batch = make_batch(step, page_rows(step), device)
    planner = make_planner(step, device)
    planner.plan(batch)
    check(step, planner)
    calls = parts(planner, batch, lambda: torch._C._cuda_getCurrentRawStream(device.index))
    graphs = {
        part: graph_timing.record(lambda _, c=call: c(), 1, PLANS_PER_GRAPH)
        for part, call in calls.items()
    }
    tables = cold_batches(batch)
    whole_turns = -(-PLANS_PER_GRAPH // len(tables)) * len(tables)
    graphs["cold"] = graph_timing.record(
        lambda i: planner.plan(tables[i]), len(tables), whole_turns
    )
    times = graph_timing.time_in_turns(graphs, 10)
    found = [report.Row.of_times(f"{step.name}.{part}", OURS, times[part]) for part in graphs]
    return [*found, host_row(f"{step.name}.host", OURS, calls["device"], HOST_CALLS)]


def check(step: Workload, planner: fi.StepPlanner) -> None:
    """Raise AssertionError unless the planner found what the step shares."""
    (forest,) = planner.forests
    wanted = sum(step.kv_lens), sum(step.kv_lens) - step.num_kv_tokens
    assert forest.reads() == wanted, f"{forest.reads()} instead of {wanted}"
    nodes = int(planner.slot(0).arrays()["header"]["num_nodes"])  # type: ignore[index]
    assert nodes == len(step.prefixes), f"{nodes} nodes instead of {len(step.prefixes)}"
