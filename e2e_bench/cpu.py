"""The CPU engine beside vLLM's CPU_ATTN kernel and torch SDPA, on the same data, in turns.

Correctness first: each implementation's output is compared with fp64 before it is timed. Calls of
all implementations alternate, so that a slow phase of the machine hits them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fi_backend as fi
from e2e_bench import report
from fi_backend.oracle import Problem, solve
from fi_backend.tolerance import assert_close, plain_torch_error

HEADS = fi.HeadShape(32, 8, 128)
# OpenMP's threads keep a core busy for up to 200 ms after their last loop: wait for it to pass, or
# each implementation is timed against the one before.
SPIN_S = 0.25
PAGE = 32  # vLLM's CPU kernel wants a multiple of 32


@dataclass(frozen=True)
class Workload:
    """Requests of one step: lengths, 32/8 heads, head dimension 128, bf16."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: fi.HeadShape = HEADS

    @property
    def num_bytes(self) -> float:
        """Bytes of K and V that a step must read once."""
        return sum(self.kv_lens) * self.heads.num_kv_heads * self.heads.head_dim_qk * 2 * 2

    @property
    def flops(self) -> float:
        """Floating-point operations of the visible causal pairs."""
        pairs = sum(
            q * kv - q * (q - 1) / 2 for q, kv in zip(self.q_lens, self.kv_lens, strict=True)
        )
        return 4 * pairs * self.heads.num_qo_heads * self.heads.head_dim_qk


WORKLOADS = (
    Workload("decode 8 x 2,048", (1,) * 8, (2048,) * 8),
    Workload("decode 1 x 8,192", (1,), (8192,)),
    Workload("decode 32 x 512", (1,) * 32, (512,) * 32),
    Workload("prefill 1 x 1,024", (1024,), (1024,)),
    Workload("mixed 256 of 1,024 + 15 decodes", (256,) + (1,) * 15, (1024,) * 16),
)


class Data:
    """Tensors of a workload; pages lie shuffled in the pool."""

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(7)
        heads = workload.heads
        counts = [-(-kv // PAGE) for kv in workload.kv_lens]
        pool = sum(counts)
        shape = (pool, PAGE, heads.num_kv_heads, heads.head_dim_qk)
        self.k = torch.randn(shape).bfloat16()
        self.v = torch.randn(shape).bfloat16()
        order = torch.randperm(pool, dtype=torch.int32)
        self.table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, pages in zip(self.table, order.split(counts), strict=True):
            row[: len(pages)] = pages
        tokens = sum(workload.q_lens)
        self.q = torch.randn(tokens, heads.num_qo_heads, heads.head_dim_qk).bfloat16()
        lengths = torch.tensor([0, *workload.q_lens]).cumsum(0)
        self.qo_indptr = lengths.to(torch.int32)
        self.kv_len = torch.tensor(workload.kv_lens, dtype=torch.int32)
        self.batch = fi.PagedBatch(
            self.qo_indptr, self.kv_len, fi.PageTable.dense(self.table, PAGE)
        )
        self.workload = workload
        self.scale = heads.head_dim_qk**-0.5

    def gathered(self, request: int) -> tuple[Tensor, Tensor]:
        """K and V of a request, contiguous [heads, tokens, d]."""
        kv_len = self.workload.kv_lens[request]
        pages = self.table[request, : -(-kv_len // PAGE)].long()
        k, v = (x[pages].flatten(0, 1)[:kv_len].transpose(0, 1) for x in (self.k, self.v))
        return k.contiguous(), v.contiguous()

    def queries(self, request: int) -> Tensor:
        """Queries of a request, [heads, tokens, d]."""
        return self.q[self.qo_indptr[request] : self.qo_indptr[request + 1]].transpose(0, 1)

    def causal_mask(self, request: int) -> Tensor | None:
        """Which KV each query sees; None for a decode, which sees all."""
        q_len, kv_len = self.workload.q_lens[request], self.workload.kv_lens[request]
        if q_len == 1:
            return None
        return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)


def _ours(data: Data, *, head_major: bool) -> Callable[[], Tensor]:
    heads = data.workload.heads
    capacity = fi.Capacity(data.batch.num_requests, len(data.q), max(data.workload.kv_lens))
    planner = fi.StepPlanner([fi.LayerClass(heads, torch.bfloat16)], capacity)
    planner.plan(data.batch)
    cache, out = fi.KvCacheView.nhd(data.k, data.v), torch.empty_like(data.q)
    if head_major:
        cache = fi.KvCacheView.hnd(*(x.transpose(1, 2).contiguous() for x in (data.k, data.v)))
    return lambda: fi.attention(planner.slot(0), data.q, cache, out=out)


def _vllm(data: Data) -> Callable[[], Tensor]:
    from vllm import _custom_ops as ops  # an engine, and slow to import

    heads, d = data.workload.heads, data.workload.heads.head_dim_qk
    cache = torch.zeros(len(data.k), heads.num_kv_heads, PAGE * 2, d, dtype=torch.bfloat16)
    k_cache, v_cache = cache.chunk(2, dim=2)
    slots = torch.arange(data.k.shape[0] * PAGE)
    ops.cpu_attn_reshape_and_cache(
        data.k.flatten(0, 1), data.v.flatten(0, 1), k_cache, v_cache, slots, "vec"
    )
    requests = len(data.workload.q_lens)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        requests, heads.num_qo_heads, heads.num_kv_heads, d, data.kv_len, torch.bfloat16,
        data.qo_indptr, True, -1, "vec", True,
    )  # fmt: skip
    out = torch.empty_like(data.q)

    def call() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            data.q, k_cache, v_cache, out, data.qo_indptr, data.kv_len, data.scale, True, None,
            -1, data.table, 0.0, metadata, None,
        )  # fmt: skip
        return out

    return call


def _sdpa(data: Data, *, gather: bool) -> Callable[[], Tensor]:
    requests = range(len(data.workload.q_lens))
    kept = [data.gathered(r) for r in requests]
    masks = [data.causal_mask(r) for r in requests]

    def call() -> Tensor:
        outs = []
        for r in requests:
            k, v = data.gathered(r) if gather else kept[r]
            o = torch.nn.functional.scaled_dot_product_attention(
                data.queries(r)[None], k[None], v[None], attn_mask=masks[r], enable_gqa=True
            )
            outs.append(o[0].transpose(0, 1))
        return torch.cat(outs)

    return call


def _check(data: Data, calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Return each implementation's largest error over that of plain torch in bf16.

    Raises:
        AssertionError: one errs more than the tests allow; the message names the worst element.
    """
    problem = Problem(data.batch, data.q, fi.KvCacheView.nhd(data.k, data.v))
    exact, plain = solve(problem)[0], plain_torch_error(problem).o
    ratios = {}
    for name, call in calls.items():
        print(f"  checking {name}", flush=True)
        out = call()
        assert_close(out, None, problem)
        ratios[name] = float((out.double() - exact).abs().max()) / plain
    return ratios


def _time_in_turns(calls: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(SPIN_S)
            call()  # untimed: wakes the implementation's own threads
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e6)
    return times


def _bench(workload: Workload, repeats: int) -> list[report.Row]:
    data = Data(workload)
    calls = {
        "fi_backend": _ours(data, head_major=True),
        "fi_backend, token-major cache": _ours(data, head_major=False),
        "vLLM CPU_ATTN": _vllm(data),
        "torch SDPA": _sdpa(data, gather=False),
        "torch SDPA, gather timed": _sdpa(data, gather=True),
    }
    ratios = _check(data, calls)
    times = _time_in_turns(calls, repeats)
    return [
        report.Row.of(
            workload.name,
            name,
            times[name],
            num_bytes=workload.num_bytes,
            flops=workload.flops,
            error_ratio=ratios[name],
        )
        for name in calls
    ]


def run(out: Path, repeats: int, only: str) -> None:
    """Run the workloads whose name contains ``only``; print the table, write JSON to ``out``."""
    rows: list[report.Row] = []
    for workload in WORKLOADS:
        if only in workload.name:
            print(f"{workload.name} …", flush=True)
            rows += _bench(workload, repeats)
    header = report.meta(
        threads=torch.get_num_threads(), isa=fi.active_isa(), cpu=report.cpu_name()
    )
    report.write(out, header, rows)
    print(report.table(rows))
