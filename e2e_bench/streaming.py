"""Text without end through a decoder: RoPE inside attention against RoPE in a kernel of its own.

Leading tokens and a rolling window stay in sight (StreamingLLM, Xiao et al., 2023), positions are
slots among them, so that a key turns by another angle in every step and a cache cannot hold it
turned. *fused* reads K once and turns it on its way into the product. *apart* turns all that is in
sight into a copy first, which torch.compile makes one kernel of, and then attends to the copy; so
the serving systems that the FlashInfer paper measured against do (its figure of StreamingLLM on
Vicuna-13B).

A step is a whole decoder: projections, norms, MLP and attention of every layer, with random
weights, in one CUDA graph; its plan is made before, as it stays the same from step to step.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import fi_backend as fi
from e2e_bench import graph_timing, report, tables
from e2e_bench.run_log import RunLog
from e2e_bench.tables import APART, OURS
from fi_backend.variants import shipped

SINK_PREFIX = 4
PAGE_SIZE = 16
# Tokens that every request has seen: far past its window.
KV_LEN = 20_000
METHOD = "CUDA-graph replay of one decode step of a decoder with random weights, in turns"
# Rounding of K before and after it turns differs; so do the sums of a deep decoder.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Decoder:
    """Dimensions of a Llama-like decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: fi.HeadShape


@dataclass(frozen=True)
class Stream:
    """What is timed.

    Attributes:
        name: of its rows.
        decoder: that takes the step.
        batch: requests.
        window: tokens in sight of a query, beside the leading ones.
        kv_len: tokens of each request so far.
    """

    name: str
    decoder: Decoder
    batch: int
    window: int
    kv_len: int = KV_LEN


VICUNA_13B = Decoder(40, 5120, 13824, fi.HeadShape(40, 40, 128))
LLAMA_8B = Decoder(32, 4096, 14336, fi.HeadShape(32, 8, 128))
STREAMS = tuple(
    Stream(f"{name}.b{batch}.w{window}", decoder, batch, window)
    for name, decoder in (("vicuna-13b", VICUNA_13B), ("llama-8b", LLAMA_8B))
    for batch, window in ((1, 2000), (8, 1000), (8, 2000), (8, 4000), (32, 2000))
)


class Layer:
    """Weights and cache of one layer.

    Cache rows are a ring of pages: those that left the window are written over.
    """

    def __init__(self, stream: Stream, num_pages: int, device: torch.device) -> None:
        heads, hidden = stream.decoder.heads, stream.decoder.hidden
        q_dim = heads.num_qo_heads * heads.head_dim_qk
        kv_dim = heads.num_kv_heads * heads.head_dim_qk
        width = stream.decoder.intermediate

        def weight(rows: int, columns: int) -> Tensor:
            made = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
            return made.normal_(std=columns**-0.5)

        self.qkv = weight(q_dim + 2 * kv_dim, hidden)
        self.out = weight(hidden, q_dim)
        self.up, self.down = weight(2 * width, hidden), weight(hidden, width)
        self.norms = torch.ones(2, hidden, dtype=torch.bfloat16, device=device)
        shape = (num_pages, PAGE_SIZE, heads.num_kv_heads, heads.head_dim_qk)
        self.k, self.v = (
            torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2)
        )


class Engine:
    """A decoder that takes the same step again and again, one way or the other."""

    def __init__(self, stream: Stream, device: torch.device) -> None:
        heads = stream.decoder.heads
        self.stream, self.device = stream, device
        # In sight: leading tokens, the window, and what shares pages with their ends.
        ring = -(-(SINK_PREFIX + stream.window) // PAGE_SIZE) + 3
        self.layers = [
            Layer(stream, ring * stream.batch, device) for _ in range(stream.decoder.layers)
        ]
        self.hidden = torch.empty(
            stream.batch, stream.decoder.hidden, dtype=torch.bfloat16, device=device
        ).normal_()
        self._make_step(ring)
        self.variants = {
            OURS: shipped.streaming_rope(stream.window, SINK_PREFIX, multiples=True),
            APART: None,
        }
        self.planners = {
            impl: fi.StepPlanner(
                [self._layer_class(heads, impl)],
                fi.Capacity(stream.batch, stream.batch, stream.kv_len, max_q_len=1),
                device,
            )
            for impl in self.variants
        }
        for planner in self.planners.values():
            planner.plan(self.batch)
        self.turned = torch.empty_like(self.layers[0].k)
        torch.compiler.reset()  # each stream has its shapes: past a few, torch compiles no more
        compiles = device.type == "cuda"
        self._turn = torch.compile(_turn, dynamic=False) if compiles else _turn

    def _layer_class(self, heads: fi.HeadShape, impl: str) -> fi.LayerClass:
        band = fi.Band.window(self.stream.window, SINK_PREFIX)
        return fi.LayerClass(heads, torch.bfloat16, band=band, variant=self.variants[impl])

    def _make_step(self, ring: int) -> None:
        """Page table, slots of the cache rows that are in sight, and angles."""
        stream, device = self.stream, self.device
        pages = torch.arange(-(-stream.kv_len // PAGE_SIZE))
        # The first page stays, the others go round.
        ids = torch.where(pages == 0, 0, 1 + (pages - 1) % (ring - 1))
        table = torch.stack([ids + r * ring for r in range(stream.batch)]).int()
        self.batch = fi.PagedBatch(
            torch.arange(stream.batch + 1, dtype=torch.int32, device=device),
            torch.full((stream.batch,), stream.kv_len, dtype=torch.int32, device=device),
            fi.PageTable.dense(table.to(device), PAGE_SIZE),
        )
        last = stream.kv_len - 1
        gone = max(0, last + 1 - SINK_PREFIX - stream.window)
        seen = torch.arange(max(gone + SINK_PREFIX, 0), stream.kv_len)
        slot_of_row = torch.zeros(ring * PAGE_SIZE, dtype=torch.long)
        slot_of_row[ids[seen // PAGE_SIZE] * PAGE_SIZE + seen % PAGE_SIZE] = seen - gone
        slot_of_row[:SINK_PREFIX] = torch.arange(SINK_PREFIX)
        self.slots = slot_of_row.repeat(stream.batch).to(device)  # of every cache row
        newest = int(ids[last // PAGE_SIZE]) * PAGE_SIZE + last % PAGE_SIZE
        rows = torch.arange(stream.batch) * ring * PAGE_SIZE + newest
        self.new_rows = rows.to(device)
        self.q_slots = torch.full((stream.batch,), last - gone, device=device)
        dim = stream.decoder.heads.head_dim_qk
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.arange(SINK_PREFIX + stream.window + 1)[:, None] * frequencies
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], -1).float().to(device)

    def attention(self, impl: str, layer: int, q: Tensor) -> Tensor:
        """Return the attention of one layer, whose new K and V are in its cache."""
        cache, slot = self.layers[layer], self.planners[impl].slot(0)
        if impl == OURS:
            kv = fi.KvCacheView.nhd(cache.k, cache.v)
            return fi.attention(slot, q, kv, params={"cos_sin": self.cos_sin})
        self._turn(cache.k, self.slots, self.cos_sin, self.turned)
        turned_q = torch.empty_like(q)
        self._turn(q[:, None], self.q_slots, self.cos_sin, turned_q[:, None])
        return fi.attention(slot, turned_q, fi.KvCacheView.nhd(self.turned, cache.v))

    def step(self, impl: str) -> Tensor:
        """Return the hidden state after all layers."""
        heads, x = self.stream.decoder.heads, self.hidden
        q_heads, kv_heads, dim = heads.num_qo_heads, heads.num_kv_heads, heads.head_dim_qk
        for index, layer in enumerate(self.layers):
            normed = functional.rms_norm(x, x.shape[-1:], layer.norms[0])
            qkv = functional.linear(normed, layer.qkv).view(x.shape[0], -1, dim)
            q, k, v = qkv.split([q_heads, kv_heads, kv_heads], 1)
            fi.append_kv(k, v, fi.KvCacheView.nhd(layer.k, layer.v), self.new_rows)
            attended = self.attention(impl, index, q.contiguous())
            x = x + functional.linear(attended.flatten(1), layer.out)
            gate, up = functional.linear(
                functional.rms_norm(x, x.shape[-1:], layer.norms[1]), layer.up
            ).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return x


def _turn(rows: Tensor, slots: Tensor, cos_sin: Tensor, out: Tensor) -> None:
    """Write rows [pages, tokens, heads, dim], turned by the slot of each token, into ``out``."""
    angles = cos_sin[slots].view(*rows.shape[:2], 1, -1)
    cos, sin = angles.chunk(2, -1)
    x, y = rows.float().chunk(2, -1)
    out.copy_(torch.cat([x * cos - y * sin, y * cos + x * sin], -1))


def run(out: Path | None, only: Sequence[str], quick: bool) -> int:
    """Run the benchmark; return the exit status."""
    device, log = torch.device("cuda", torch.cuda.current_device()), RunLog()
    streams = [s for s in STREAMS if not only or any(word in s.name for word in only)]
    if not streams:
        print(f"no workload has {' or '.join(only)} in its name")
        return 2
    rows: list[report.Row] = []
    for stream in streams:
        with log.attempt(stream.name, "all"):
            rows += bench(stream, device, 10 if quick else 30)
        gc.collect()
        torch.cuda.empty_cache()
        log.write(out, rows, method=METHOD)
        if log.device_is_lost:
            break
    print(tables.streaming_table(rows))
    return log.finish()


def bench(stream: Stream, device: torch.device, repeats: int) -> list[report.Row]:
    """Return rows of a step and of a layer's attention, both ways.

    Raises:
        AssertionError: the two ways differ by more than rounding.
    """
    engine = Engine(stream, device)
    impls = (OURS, APART)
    found = {impl: engine.step(impl).double() for impl in impls}
    error = (found[OURS] - found[APART]).norm() / found[APART].norm()
    print(f"{stream.name}: the two ways differ by {float(error):.4f}", flush=True)
    assert float(error) < TOLERANCE, f"fused and apart differ by {float(error):.3f}"
    layers = len(engine.layers)
    heads = stream.decoder.heads
    q = torch.randn(stream.batch, heads.num_qo_heads, heads.head_dim_qk, device=device).bfloat16()
    for impl in impls:  # what is compiled for these tensors must not be compiled while captured
        engine.attention(impl, 0, q)
    timed = {
        "step": {i: graph_timing.record(lambda _, i=i: engine.step(i), 1, 1) for i in impls},
        "attention": {
            i: graph_timing.record(lambda layer, i=i: engine.attention(i, layer, q), layers, layers)
            for i in impls
        },
    }
    rows = []
    for what, graphs in timed.items():
        for impl, times in graph_timing.time_in_turns(graphs, repeats).items():
            rows.append(report.Row.of_times(f"{stream.name}.{what}", impl, times))
    return rows
