"""append_kv and merge_states on a GPU, beside a copy that moves as many bytes.

Correctness first, then CUDA-graph replay, in turns; every call moves several times the L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fi_backend as fi
from e2e_bench import graph_timing, report, tables
from e2e_bench.run_log import RunLog
from e2e_bench.workloads import LLAMA

OURS, COPY = "fi_backend", "copy"
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
TOKENS, PAGE = 65_536, 16
MERGED_TOKENS = 8_192
CALLS = 20
CHECKED = 64  # tokens


@dataclass(frozen=True)
class Op:
    """One operation ready to run.

    Attributes:
        call: enqueues it.
        num_bytes: read and written.
        check: raises unless the last call did what it should.
    """

    call: Callable[[], object]
    num_bytes: int
    check: Callable[[], None]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Return [tokens, heads, dim] with its halves turned against each other, in fp32."""
    cos, sin = cos_sin[: len(x), None].chunk(2, dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def append(device: torch.device, cache_dtype: torch.dtype, *, rotates: bool) -> Op:
    """Return the append of a large prefill step into shuffled pages."""
    heads, dim = LLAMA.num_kv_heads, LLAMA.head_dim_qk
    k, v = torch.randn(2, TOKENS, heads, dim, device=device).to(BF16)
    cache = torch.zeros(2, TOKENS // PAGE, PAGE, heads, dim, device=device).to(cache_dtype)
    pages = torch.randperm(TOKENS // PAGE, device=device)
    slots = (pages[:, None] * PAGE + torch.arange(PAGE, device=device)).flatten()
    options: dict[str, Any] = {}
    moved, scale = _bytes(k, v, cache), 1.0
    if cache_dtype == FP8:
        scale = 0.5
        one = torch.full((1,), scale, device=device)
        options |= {"k_scale": one, "v_scale": one}
    expected = [(k[:CHECKED].float(), cache[0]), (v[:CHECKED].float(), cache[1])]
    q = q_out = torch.empty(0)
    if rotates:
        q = torch.randn(TOKENS, LLAMA.num_qo_heads, dim, device=device).to(BF16)
        q_out = torch.zeros_like(q)
        angles = torch.rand(TOKENS, dim // 2, device=device)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        rope = fi.Rope(cos_sin, torch.arange(TOKENS, device=device))
        options |= {"rope": rope, "q": q, "q_out": q_out}
        moved += _bytes(q, q_out, cos_sin)
        expected[0] = (_rotated(k[:CHECKED], cos_sin), cache[0])
    view = fi.KvCacheView.nhd(cache[0], cache[1])

    def check() -> None:
        step = torch.finfo(cache_dtype).eps
        for wanted, stored in expected:
            found = stored.view(TOKENS, heads, dim)[slots[:CHECKED]].float() * scale
            torch.testing.assert_close(found, wanted, rtol=step, atol=step / 16)
        if rotates:
            wanted = _rotated(q[:CHECKED], cos_sin)
            torch.testing.assert_close(q_out[:CHECKED].float(), wanted, rtol=0.01, atol=1e-3)

    return Op(lambda: fi.append_kv(k, v, view, slots, **options), moved, check)


def merge(device: torch.device, states: int) -> Op:
    """Return the merge of some fp32 states of a large step."""
    shape = (states, MERGED_TOKENS, LLAMA.num_qo_heads)
    o = torch.randn(*shape, LLAMA.head_dim_vo, device=device)
    lse = torch.randn(shape, device=device)
    found: list[Tensor] = []

    def call() -> None:
        found[:] = fi.merge_states(o, lse)

    def check() -> None:
        weights = lse[:, :CHECKED].softmax(0)[..., None]
        expected = (o[:, :CHECKED] * weights).sum(0)
        torch.testing.assert_close(found[0][:CHECKED], expected, rtol=1e-4, atol=1e-5)

    return Op(call, _bytes(o, lse) // states * (states + 1), check)


def copy(device: torch.device, num_bytes: int) -> Callable[[], object]:
    """Return a copy that reads half of the bytes and writes the other half."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


MAKERS: dict[str, Callable[[torch.device], Op]] = {
    "append to bf16": partial(append, cache_dtype=BF16, rotates=False),
    "append to fp8": partial(append, cache_dtype=FP8, rotates=False),
    "append rotated to bf16": partial(append, cache_dtype=BF16, rotates=True),
    "append rotated to fp8": partial(append, cache_dtype=FP8, rotates=True),
    "merge 2 states": partial(merge, states=2),
    "merge 4 states": partial(merge, states=4),
    "merge 8 states": partial(merge, states=8),
}


def run(out: Path | None, quick: bool) -> int:
    """Run the benchmark; return the exit status."""
    device = torch.device("cuda", torch.cuda.current_device())
    log, rows = RunLog(), list[report.Row]()
    for name in list(MAKERS)[:: 3 if quick else 1]:
        with log.attempt(name, OURS):
            rows += _rows(name, MAKERS[name](device), device)
    log.write(out, rows)
    print(tables.spread_table(rows))
    return log.finish()


def _rows(name: str, op: Op, device: torch.device) -> list[report.Row]:
    """Check and time one operation and its copy."""
    op.call()
    op.check()
    calls = {OURS: op.call, COPY: copy(device, op.num_bytes)}
    calls[COPY]()
    graphs = {
        impl: graph_timing.record(lambda _, c=call: c(), 1, CALLS) for impl, call in calls.items()
    }
    times = graph_timing.time_in_turns(graphs, 10)
    rows = [report.Row.of_times(name, impl, times[impl]) for impl in graphs]
    return [replace(row, gbs=round(op.num_bytes / row.us_median / 1e3, 1)) for row in rows]
