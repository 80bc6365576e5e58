"""vLLM's attention calls without an engine: real metadata, builders and layers, made-up tensors.

Everything a backend must not read is poisoned: NaN in unused cache slots and padded rows, huge ids
in unused entries of the block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from fi_backend.integrations.vllm.impl import FiAttentionImpl
from fi_backend.integrations.vllm.metadata import StepMetadataBuilder

STALE = 2**31 - 1
NAN = float("nan")


@dataclass(frozen=True)
class Layer:
    """A layer as vLLM constructs it; see ``FiAttentionImpl``."""

    name: str = "layers.0.attn"
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    head_size_v: int | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    sinks: Tensor | None = None
    attn_type: str = "decoder"
    kv_cache_dtype: str = "auto"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return 1.5 * self.head_size**-0.5

    def impl(self) -> FiAttentionImpl:
        extra = dict(self.extra)
        if self.sinks is not None:
            extra["sinks"] = self.sinks
        return FiAttentionImpl(
            self.num_heads,
            self.head_size,
            self.scale,
            self.num_kv_heads,
            None if self.alibi_slopes is None else list(self.alibi_slopes),
            self.sliding_window,
            self.kv_cache_dtype,
            self.logits_soft_cap,
            self.attn_type,
            None,
            **extra,
        )


def vllm_layer(layer: Layer) -> Any:
    """What vLLM passes to the calls of a layer."""
    return SimpleNamespace(
        layer_name=layer.name,
        impl=layer.impl(),
        head_size=layer.head_size,
        head_size_v=layer.head_size_v or layer.head_size,
        kv_sharing_target_layer_name=None,
        _k_scale=torch.tensor(1.0),
        _v_scale=torch.tensor(1.0),
    )


def vllm_config(layers: Sequence[Any], dtype: torch.dtype, **scheduler: int) -> Any:
    """The parts of VllmConfig that the builder reads."""
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_num_encoder_input_tokens": 0}
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context={layer.layer_name: layer for layer in layers},
            cudagraph_mode=None,
        ),
        model_config=SimpleNamespace(dtype=dtype, max_model_len=512, enable_sleep_mode=False),
        parallel_config=SimpleNamespace(use_ubatching=False, rank=0),
        scheduler_config=SimpleNamespace(**(sizes | scheduler)),
        speculative_config=None,
    )


def make_builder(
    layers: Sequence[Any],
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    builder_cls: type[StepMetadataBuilder] = StepMetadataBuilder,
    spec: Any = None,
    *,
    speculative_config: Any = None,
    sleeps: bool = False,
) -> StepMetadataBuilder:
    """A builder of one group, as the model runner makes it."""
    impl = layers[0].impl
    spec = spec or FullAttentionSpec(
        block_size=page_size, num_kv_heads=impl.num_kv_heads, head_size=impl.head_size, dtype=dtype
    )
    names = [layer.layer_name for layer in layers]
    config = vllm_config(layers, dtype)
    config.speculative_config = speculative_config
    config.model_config.enable_sleep_mode = sleeps
    return builder_cls(spec, names, config, torch.device("cpu"))


@dataclass
class Step:
    """One model step of a group and the cache it runs on.

    Attributes:
        lengths: (query tokens, KV tokens) of each request.
        common: vLLM's metadata.
        pages: page ids of each request.
    """

    lengths: Sequence[tuple[int, int]]
    common: CommonAttentionMetadata
    pages: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(q for q, _ in self.lengths)


def make_step(
    lengths: Sequence[tuple[int, int]],
    page_size: int = 16,
    causal: bool | Tensor = True,
    padded_tokens: int = 0,
) -> Step:
    """A step whose requests own shuffled pages; unused table entries are stale."""
    counts = [-(-kv // page_size) for _, kv in lengths]
    ids = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(7)) + 1).tolist()
    pages = [[ids.pop() for _ in range(count)] for count in counts]
    table = torch.full((len(lengths), max(counts) + 3), STALE, dtype=torch.int32)
    slots = []
    for row, (q, kv) in enumerate(lengths):
        table[row, : counts[row]] = torch.tensor(pages[row], dtype=torch.int32)
        positions = range(kv - q, kv)
        slots += [pages[row][p // page_size] * page_size + p % page_size for p in positions]
    indptr = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).to(torch.int32)
    kv_len = torch.tensor([kv for _, kv in lengths], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=indptr,
        query_start_loc_cpu=indptr.clone(),
        seq_lens=kv_len,
        num_reqs=len(lengths),
        num_actual_tokens=len(slots) + padded_tokens,
        max_query_len=max(q for q, _ in lengths),
        max_seq_len=max(kv for _, kv in lengths),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots + [-1] * padded_tokens, dtype=torch.int64),
        causal=causal,
    )
    return Step(lengths, common, pages)


@dataclass
class Run:
    """Inputs of one layer over the whole history of each request, and the cache they went to."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    out: Tensor


def run_layer(
    layer: Any,
    builder: StepMetadataBuilder,
    step: Step,
    kv_cache: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """Write each request's history, then this step, and run the layer; returns what it saw."""
    impl, noise = layer.impl, torch.Generator().manual_seed(3)
    heads, dim, dim_v = impl.num_kv_heads, impl.head_size, layer.head_size_v
    rows = step.common.num_actual_tokens

    def random(*shape: int) -> Tensor:
        return (2.0 * torch.randn(*shape, generator=noise)).to(dtype)

    keys = [random(kv, heads, dim) for _, kv in step.lengths]
    values = [random(kv, heads, dim_v) for _, kv in step.lengths]
    page_size = builder._page_size
    for pages, k, v, (q_len, kv) in zip(step.pages, keys, values, step.lengths, strict=True):
        past = kv - q_len
        slots = [pages[p // page_size] * page_size + p % page_size for p in range(past)]
        history = torch.tensor(slots, dtype=torch.int64)
        impl.do_kv_cache_update(layer, k[:past], v[:past], kv_cache, history)
    metadata = builder.build(0, step.common)
    q = torch.full((rows, impl.num_heads, dim), NAN, dtype=dtype)
    q[: step.tokens] = random(step.tokens, impl.num_heads, dim)
    new = [slice(kv - n, kv) for n, kv in step.lengths]
    pad = torch.full((rows - step.tokens, heads, max(dim, dim_v)), NAN, dtype=dtype)
    k = torch.cat([*(k[s] for k, s in zip(keys, new, strict=True)), pad[..., :dim]])
    v = torch.cat([*(v[s] for v, s in zip(values, new, strict=True)), pad[..., :dim_v]])
    out = torch.full((rows, impl.num_heads, dim_v), NAN, dtype=dtype)
    impl.do_kv_cache_update(layer, k, v, kv_cache, metadata.slot_mapping)
    returned = impl.forward(layer, q, k, v, kv_cache, metadata, out)
    assert returned is out
    return Run(q[: step.tokens], keys, values, out)


def reference(run: Run, spec: Layer, step: Step, causal: bool = True) -> Tensor:
    """The same attention in fp64 torch, request by request: [tokens, heads, head_size_v]."""
    outs, start = [], 0
    group = spec.num_heads // spec.num_kv_heads
    for (q_len, kv), *cached in zip(step.lengths, run.keys, run.values, strict=True):
        q = run.q[start : start + q_len].double()
        start += q_len
        k, v = (x.double().repeat_interleave(group, 1) for x in cached)
        logits = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        i, j = torch.arange(kv - q_len, kv)[:, None], torch.arange(kv)[None]
        if spec.logits_soft_cap:
            logits = spec.logits_soft_cap * torch.tanh(logits / spec.logits_soft_cap)
        if spec.alibi_slopes is not None:
            logits = logits + torch.tensor(spec.alibi_slopes).double()[:, None, None] * (j - i)
        hidden = torch.zeros(q_len, kv, dtype=torch.bool)
        if causal:
            hidden |= j > i
        if spec.sliding_window is not None:
            hidden |= (i - j).abs() >= spec.sliding_window
        logits = logits.masked_fill(hidden, -torch.inf)
        if spec.sinks is not None:
            sink = spec.sinks.double()[:, None, None].expand(-1, q_len, 1)
            logits = torch.cat([logits, sink], -1)
        weights = logits.softmax(-1)[..., :kv]
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outs)
