"""append_kv and merge_states of the CPU engine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from core_attention import ISAS
from torch import Tensor

from fi_backend import _core
from fi_backend.formats import DTYPE_CODES

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
PAGE = 4


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert _core.force_isa(request.param)
    yield request.param
    _core.force_isa("auto")


def append(
    k: Tensor, v: Tensor, cache: Tensor, slots: Tensor, scales: Tensor | None = None
) -> None:
    """Append to a cache [pages, PAGE, heads, head_dim_qk + head_dim_vo] that packs K and V."""
    dim = k.shape[-1]
    params = _core.AppendParams(DTYPE_CODES[k.dtype])
    params.k_stride = _core.TokenStrides(*k.stride()[:2])
    params.v_stride = _core.TokenStrides(*v.stride()[:2])
    params.num_tokens, params.num_kv_heads = len(slots), k.shape[1]
    params.head_dim_qk, params.head_dim_vo = dim, v.shape[-1]
    view = params.kv
    view.k_stride = view.v_stride = _core.KvStrides(*cache.stride()[:3])
    view.num_pages, view.page_size, view.dtype = len(cache), PAGE, DTYPE_CODES[cache.dtype]
    addresses = [t.data_ptr() for t in (k, v, cache, cache[..., dim:], slots)] + [0] * 6
    if scales is not None:
        params.k_scale_per_head = params.v_scale_per_head = 1
        addresses[5:7] = [s.data_ptr() for s in scales]
    _core.append_kv(params, tuple(addresses), 3)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_tokens_land_in_their_slots_and_negative_slots_are_skipped(dtype: torch.dtype) -> None:
    heads, dim, dim_vo = 2, 24, 40
    fused = torch.randn(50, heads, 2 * (dim + dim_vo)).to(dtype)
    k, v = fused[..., :dim], fused[..., dim : dim + dim_vo]
    cache = torch.full((20, PAGE, heads, dim + dim_vo), 7.0, dtype=dtype)
    slots = torch.randperm(80)[:50]
    slots[::5] = -1
    want = cache.clone().flatten(0, 1)
    kept = slots >= 0
    want[slots[kept]] = torch.cat([k, v], -1)[kept]
    append(k, v, cache, slots)
    assert torch.equal(cache.flatten(0, 1), want)


def every_value(dtype: torch.dtype) -> Tensor:
    """Finite 16-bit values, or fp32 ones around every rounding boundary of the narrow types."""
    bits = torch.from_numpy(np.arange(65536, dtype=np.uint16))
    if dtype != FP32:
        return bits.view(dtype)
    near = [bits.view(narrow).float() for narrow in (FP16, BF16)]
    values = torch.cat([near[0], near[1], (near[0] + near[0].roll(1)) / 2])
    return torch.cat([values, values.nextafter(torch.tensor(math.inf))])


@pytest.mark.parametrize("source", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("target", [FP16, BF16, FP8], ids=str)
def test_conversion_rounds_like_torch(source: torch.dtype, target: torch.dtype, isa: str) -> None:
    values = every_value(source)
    rows = values.view(-1, 1, 256)
    pages = -(-len(rows) // PAGE)
    cache = torch.zeros(pages, PAGE, 1, 512, dtype=target)
    scales = torch.tensor([[0.75], [3.0]])
    append(rows, rows, cache, torch.arange(len(rows)), scales)
    for part, scale in zip(cache.flatten(0, 1)[: len(rows), 0].split(256, -1), scales, strict=True):
        want = values.float()
        if target == FP8:
            want = (want / scale).clamp(-448, 448)
        want, got = want.to(target).float(), part.float().flatten()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))


def merge(o: Tensor, lse: Tensor | None, threads: int = 2) -> tuple[Tensor, Tensor]:
    states, rows, dim = o.shape
    out, out_lse = torch.full((rows, dim), math.nan), torch.full((rows,), math.nan)
    params = _core.MergeParams()
    params.o, params.out_o = o.data_ptr(), out.data_ptr()
    params.num_states, params.rows, params.dim, params.softmax = states, rows, dim, lse is not None
    if lse is not None:
        params.lse, params.out_lse = lse.data_ptr(), out_lse.data_ptr()
    _core.merge_states(params, threads)
    return out, out_lse


def test_merged_states_equal_attention_over_all_of_them() -> None:
    logits, v = 5 * torch.randn(300, 40, dtype=torch.float64), torch.randn(40, 24).double()
    parts = [slice(0, 1), slice(1, 17), slice(17, 40)]
    o = torch.stack([logits[:, p].softmax(-1) @ v[p] for p in parts]).float()
    lse = torch.stack([logits[:, p].logsumexp(-1) for p in parts]).float()
    got, got_lse = merge(o, lse)
    torch.testing.assert_close(got.double(), logits.softmax(-1) @ v, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got_lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=2e-6)
    again, again_lse = merge(o, lse, threads=3)
    assert torch.equal(again, got)
    assert torch.equal(again_lse, got_lse)


def test_empty_states_do_not_count_even_when_they_hold_nan() -> None:
    o = torch.tensor([[[math.nan], [math.nan]], [[3.0], [math.nan]]])
    lse = torch.tensor([[-math.inf, -math.inf], [0.5, -math.inf]])
    got, got_lse = merge(o, lse)
    assert got.tolist() == [[3.0], [0.0]]
    assert got_lse.tolist() == [0.5, -math.inf]


def test_without_softmax_states_add() -> None:
    o = torch.randn(3, 70, 8)
    got, _ = merge(o, None)
    torch.testing.assert_close(got, o.sum(0))
