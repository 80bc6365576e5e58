"""Layers of vLLM run through the adapter equal plain torch, whatever the cache's layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm_layers import (
    NAN,
    Layer,
    make_builder,
    make_step,
    reference,
    run_layer,
    vllm_layer,
)

from fi_backend.integrations.vllm.backend import FiBackend

PAGES, PAGE = 40, 16
# One-token decodes, chunks of a prefill, whole prompts, lengths at page edges.
MIXED = [(1, 1), (1, 16), (1, 17), (5, 37), (16, 16), (33, 33), (1, 129), (7, 64)]
# Logits have a standard deviation of 6 here: fp32 rounding reaches a few 1e-6, a wrong mask 1e-2.
FP32_BOUND = 2e-5
SLOPES = (0.25, 0.0625, 0.5, 0.125)
SINKS = torch.tensor([0.5, 2.0, -1.0, 3.0])


def layered_cache(layer: Layer, layout: KVCacheLayout, dtype: torch.dtype) -> Tensor:
    """Layer 1 of 3 in one buffer of a layout of vLLM 0.32: [pages, heads, tokens, 2 * dim]."""
    shape = (3, PAGES, layer.num_kv_heads, PAGE, layer.head_size + (layer.head_size_v or 32))
    order = layout.stride_order
    memory = torch.full([shape[i] for i in order], NAN).to(dtype)
    return memory.permute([order.index(i) for i in range(5)])[1]


def stacked_cache(layer: Layer, dtype: torch.dtype) -> Tensor:
    """The cache of vLLM before 0.32, as our get_kv_cache_shape and stride order ask for it."""
    shape = FiBackend.get_kv_cache_shape(PAGES, PAGE, layer.num_kv_heads, layer.head_size)
    order = FiBackend.get_kv_cache_stride_order()
    memory = torch.full([shape[i] for i in order], NAN).to(dtype)
    return memory.permute([order.index(i) for i in range(5)])


def check(
    layer: Layer, cache: Tensor, dtype: torch.dtype, bound: float, causal: bool = True
) -> None:
    holder = vllm_layer(layer)
    step = make_step(MIXED, PAGE, causal=causal, padded_tokens=3)
    run = run_layer(holder, make_builder([holder], PAGE, dtype), step, cache, dtype)
    expected = reference(run, layer, step, causal)
    torch.testing.assert_close(run.out[: step.tokens].double(), expected, rtol=0, atol=bound)
    assert run.out[step.tokens :].isnan().all(), "padded rows were written"


@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_packed_cache_of_any_layout(layout: KVCacheLayout) -> None:
    layer = Layer()
    check(layer, layered_cache(layer, layout, torch.float32), torch.float32, FP32_BOUND)


def test_stacked_cache_of_older_versions() -> None:
    layer = Layer()
    cache = stacked_cache(layer, torch.float32)
    assert cache.shape == (PAGES, 2, PAGE, 2, 32)
    assert cache.stride(3) > cache.stride(2), "a head's tokens of a page lie together"
    check(layer, cache, torch.float32, FP32_BOUND)


CASES = {
    "window": Layer(sliding_window=9),
    "soft cap": Layer(logits_soft_cap=2.0),
    "alibi": Layer(alibi_slopes=SLOPES),
    "sinks": Layer(sinks=SINKS),
    "sinks, bf16 checkpoint": Layer(sinks=SINKS.bfloat16()),
    "window, cap and sinks": Layer(sliding_window=20, logits_soft_cap=3.0, sinks=SINKS),
    "one head per KV head": Layer(num_kv_heads=4),
    "head 96": Layer(head_size=96, head_size_v=96),
    "wider values": Layer(head_size=32, head_size_v=64),
}


@pytest.mark.parametrize("layer", CASES.values(), ids=CASES.keys())
def test_what_layers_do_to_logits(layer: Layer) -> None:
    cache = layered_cache(layer, KVCacheLayout.LBHNC, torch.float32)
    check(layer, cache, torch.float32, FP32_BOUND)


@pytest.mark.parametrize("window", [None, 9])
def test_bidirectional_layers(window: int | None) -> None:
    layer = Layer(sliding_window=window)
    cache = layered_cache(layer, KVCacheLayout.LBHNC, torch.float32)
    check(layer, cache, torch.float32, FP32_BOUND, causal=False)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)], ids=["bf16", "fp16"]
)
def test_narrow_dtypes(dtype: torch.dtype, bound: float) -> None:
    layer = Layer()
    check(layer, layered_cache(layer, KVCacheLayout.LBHNC, dtype), dtype, bound)


def test_fp8_cache_is_uint8_in_vllm_and_scaled_by_the_layer() -> None:
    layer = Layer(kv_cache_dtype="fp8")
    holder = vllm_layer(layer)
    holder._k_scale, holder._v_scale = torch.tensor(0.05), torch.tensor(0.02)
    empty = torch.full((PAGES, 2, PAGE, 64), 0x7F, dtype=torch.uint8)  # NaN in e4m3
    step = make_step(MIXED, PAGE)
    run = run_layer(holder, make_builder([holder], PAGE), step, empty)

    def stored(x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    run.keys = [stored(k, holder._k_scale) for k in run.keys]
    run.values = [stored(v, holder._v_scale) for v in run.values]
    expected = reference(run, layer, step)
    torch.testing.assert_close(run.out.double(), expected, rtol=0, atol=1e-5)


def test_profiling_run_writes_zeros() -> None:
    holder = vllm_layer(Layer())
    out = torch.full((5, 4, 32), NAN)
    q = torch.full((5, 4, 32), NAN)
    holder.impl.forward(holder, q, q[:, :2], q[:, :2], torch.tensor([]), None, out)
    assert out.eq(0).all()


def test_slot_minus_one_is_skipped_and_extra_rows_are_ignored() -> None:
    holder = vllm_layer(Layer())
    cache = torch.zeros(4, 2, PAGE, 64)
    k = torch.ones(4, 2, 32)
    holder.impl.do_kv_cache_update(holder, k, 2 * k, cache, torch.tensor([PAGE + 3, -1]))
    written = cache.abs().sum((1, 3)).nonzero().tolist()
    assert written == [[1, 3]]
    assert cache[1, :, 3, :32].eq(1).all() and cache[1, :, 3, 32:].eq(2).all()
