"""append_kv into float8 caches rounds as division does: equal to the CPU, whatever the scale.

NaN may differ in sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import fi_backend as fi
from fi_backend.cuda_ops import AppendSpec, RopeSpec, append_kernels
from fi_backend.jit.kernels import DeviceKernel

FP8, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
DIM, PAGE = 64, 16
# Scales that the kernel inverts; those that it leaves to division (128 or less units next to a
# multiple of 1 / 8, a mantissa of ones); the edges of both; tiny, huge, no number.
SCALES = [0.5, 0.75, 1.0, 3.0, 1 / 448, 0.1, 0.3, 0.00719, 123.456, -2.5, 1e-30, 1e30]
SCALES += [1 + 2**-23, 1.125 - 5 * 2**-23, -1.75 - 2**-22, 2 - 2**-23]
SCALES += [1 + n * 2**-23 for n in (127, 128, 129)] + [1.5 - n * 2**-23 for n in (127, 128, 129)]
SCALES += [0.0, -0.0, 1e-45, -1e-40, 1e-38, 2.0**-100, 2.0**100, 3e38, math.inf, math.nan]


def kernels_of(test: str, arguments: Mapping[str, Any]) -> list[DeviceKernel]:
    """What a test compiles: conftest.py builds all of it in advance, on all cores."""
    dtype, rope = arguments.get("dtype"), RopeSpec(FP32, DIM)
    spec = (
        AppendSpec(BF16, FP8, DIM, DIM, rope) if dtype is None else AppendSpec(dtype, FP8, DIM, DIM)
    )
    return append_kernels(spec)


def stored(k: Tensor, scale: float, place: str, cos: Tensor | None = None) -> Tensor:
    """K [tokens, DIM] in a float8 cache, turned by (cos, 0) where given; in fp32 on the CPU."""
    tokens = len(k)
    rows, one = k[:, None].to(place), torch.tensor([scale], device=place)
    caches = torch.zeros(2, tokens // PAGE, PAGE, 1, DIM, device=place).to(FP8)
    rope = None
    if cos is not None:
        turning = torch.cat((cos, torch.zeros_like(cos)), dim=1).to(place)
        rope = fi.Rope(turning, torch.arange(tokens, device=place))
    slots = torch.arange(tokens, device=place)
    view = fi.KvCacheView.nhd(*caches)
    fi.append_kv(rows, rows, view, slots, k_scale=one, v_scale=one, rope=rope)
    return caches.float().cpu()


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_value(dtype: torch.dtype, scale: float, device: str) -> None:
    values = torch.arange(-(2**15), 2**15).short().view(dtype).view(-1, DIM)
    found, expected = (stored(values, scale, place) for place in (device, "cpu"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_rotated_values(scale: float, device: str) -> None:
    """1 turned by (cos, 0) is cos: fp32 values whose quotients are next to where fp8 changes."""
    g = torch.Generator().manual_seed(1)
    shape = 4096, DIM // 2
    exponents = torch.randint(-15, 5, shape, generator=g)
    midpoints = torch.randint(16, 33, shape, generator=g) * torch.exp2(exponents.double())
    cos = (midpoints * scale).float()
    cos = (cos.view(torch.int32) + torch.randint(-3, 4, shape, generator=g).int()).view(FP32)
    k = torch.cat((torch.ones(shape), torch.zeros(shape)), dim=1).to(BF16)
    found, expected = (stored(k, scale, place, cos) for place in (device, "cpu"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())
