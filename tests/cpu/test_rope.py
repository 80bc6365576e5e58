"""append_kv with rotary embedding: expected values, an oracle in fp64, every documented refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fi_backend as fi
from fi_backend.ops import Rope

FP8, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
# Of one rounding, relative to the value.
ROUNDING = {FP32: 2.0**-24, FP16: 2.0**-11, BF16: 2.0**-8, FP8: 2.0**-4}


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """The first rotary_dim elements of x [tokens, heads, dim] turned, in fp64."""
    angles = rope.cos_sin.double()[rope.positions[: len(x)].long()]
    cos, sin = angles.unsqueeze(1).chunk(2, dim=-1)
    dim = angles.shape[-1]
    turned = x.double().clone()
    if rope.interleaved:
        a, b = turned[..., 0:dim:2].clone(), turned[..., 1:dim:2].clone()
        turned[..., 0:dim:2], turned[..., 1:dim:2] = a * cos - b * sin, b * cos + a * sin
    else:
        a, b = turned[..., :dim].clone().chunk(2, dim=-1)
        turned[..., :dim] = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned


def cos_sin_of(num_positions: int, rotary_dim: int, dtype: torch.dtype = FP32) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(num_positions)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def pool(dim: int, dtype: torch.dtype, heads: int = 2) -> fi.KvCacheView:
    cache = torch.full((2, 6, 4, heads, dim), 7.0).to(dtype)
    return fi.KvCacheView.nhd(cache[0], cache[1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_quarter_turn(interleaved: bool) -> None:
    """Cosine 0, sine 1: (x, y) becomes (-y, x); elements past rotary_dim stay."""
    cos_sin = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    k = torch.arange(1.0, 9.0).view(1, 1, 8)
    kv, q = pool(8, FP32, heads=1), k.clone()
    rope = Rope(cos_sin, torch.tensor([1]), interleaved)
    fi.append_kv(k, k, kv, torch.tensor([0]), rope=rope, q=q)
    turned = [-2.0, 1.0, -4.0, 3.0] if interleaved else [-3.0, -4.0, 1.0, 2.0]
    assert kv.k[0, 0, 0].tolist() == [*turned, 5.0, 6.0, 7.0, 8.0]
    assert q[0, 0].tolist() == [*turned, 5.0, 6.0, 7.0, 8.0]
    assert kv.v[0, 0, 0].tolist() == k[0, 0].tolist() == list(range(1, 9))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 20, 32, 64])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "angles"),
    [(FP32, FP32, FP32), (BF16, BF16, BF16), (FP16, FP16, FP32), (BF16, FP8, FP32)],
    ids=str,
)
def test_equals_the_oracle(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    angles: torch.dtype,
    rotary_dim: int,
    interleaved: bool,
) -> None:
    """One rounding of the fp32 result, whatever the cache: as close as its type allows."""
    torch.manual_seed(rotary_dim)
    fused = torch.randn(20, 7, 64).to(dtype)
    q, k, v = fused[:, :3], fused[:, 3:5], fused[:, 5:]
    kv, slots = pool(64, cache_dtype), torch.randperm(24)[:20]
    positions = torch.randint(0, 50, (23,), dtype=torch.int32 if interleaved else torch.int64)
    rope = Rope(cos_sin_of(50, rotary_dim, angles), positions, interleaved)
    scale = torch.tensor([0.5, 2.0]) if cache_dtype == FP8 else None
    q_out = torch.zeros(20, 3, 64, dtype=dtype)
    before = fused.clone()
    fi.append_kv(k, v, kv, slots, k_scale=scale, v_scale=scale, rope=rope, q=q, q_out=q_out)
    divisor = 1.0 if scale is None else scale.double()[:, None]
    stored = kv.k.flatten(0, 1)[slots].double()
    close(stored, rotate(k, rope) / divisor, cache_dtype)
    close(kv.v.flatten(0, 1)[slots].double(), v.double() / divisor, cache_dtype)
    close(q_out.double(), rotate(q, rope), dtype)
    assert torch.equal(fused, before)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # The products are of order 1, so cancellation leaves an absolute error of fp32's.
    floor = 2.0**-10 if dtype == FP8 else 1e-6
    torch.testing.assert_close(actual, expected, rtol=1.01 * ROUNDING[dtype], atol=floor)


def test_skipped_tokens_have_queries_and_padding_has_none() -> None:
    kv, q = pool(8, FP32), torch.randn(4, 3, 8)
    before, k = q.clone(), torch.randn(4, 2, 8)
    rope = Rope(cos_sin_of(9, 8), torch.tensor([5, 6, 7]))
    fi.append_kv(k, k, kv, torch.tensor([3, -1, 0]), rope=rope, q=q)
    torch.testing.assert_close(q[:3].double(), rotate(before[:3], rope), rtol=1e-6, atol=1e-6)
    assert torch.equal(q[3], before[3])
    written = (kv.k != 7.0).flatten(0, 1).any(-1).any(-1).nonzero().flatten()
    assert written.tolist() == [0, 3]


def test_rotating_twice_is_rotating_by_the_sum() -> None:
    kv, q = pool(64, FP32), torch.randn(1, 1, 64)
    k, expected = torch.randn(1, 2, 64), q.clone()
    cos_sin, skip = cos_sin_of(40, 64), torch.tensor([-1])
    for position in (13, 21):
        fi.append_kv(k, k, kv, skip, rope=Rope(cos_sin, torch.tensor([position])), q=q)
    fi.append_kv(k, k, kv, skip, rope=Rope(cos_sin, torch.tensor([34])), q=expected)
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
def test_traceable(in_place: bool) -> None:
    cos_sin, positions = cos_sin_of(9, 8), torch.tensor([5, 6, 7])
    k, slots = torch.randn(3, 2, 8), torch.tensor([3, -1, 0])
    first, second = pool(8, FP32), pool(8, FP32)

    def model(q: Tensor, cache_k: Tensor, cache_v: Tensor) -> Tensor:
        q_out = None if in_place else torch.zeros_like(q)
        kv = fi.KvCacheView.nhd(cache_k, cache_v)
        fi.append_kv(k, k, kv, slots, rope=Rope(cos_sin, positions), q=q, q_out=q_out)
        return q + 1 if q_out is None else q_out + 1

    q = torch.randn(3, 5, 8)
    expected = model(q.clone(), first.k, first.v)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q.clone(), second.k, second.v), expected, rtol=0, atol=0)
    assert torch.equal(first.k, second.k) and torch.equal(first.v, second.v)


def test_the_schema_tells_the_truth() -> None:
    kv = pool(8, FP32)
    arguments = (torch.ones(2, 2, 8), torch.ones(2, 2, 8), kv.k.clone(), kv.v.clone())
    arguments += (torch.tensor([3, -1]), None, None, cos_sin_of(9, 8), torch.tensor([2, 3]), False)
    arguments += (torch.ones(2, 4, 8), torch.zeros(2, 4, 8))
    op = torch.ops.fi_backend.rope_append_kv.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def append(rope: Rope | None = None, **changes: Any) -> None:
    arguments = {"k": torch.zeros(3, 2, 8), "v": torch.zeros(3, 2, 8), "kv": pool(8, FP32)}
    arguments |= {"slots": torch.tensor([0, 1, 2]), "q": torch.zeros(3, 4, 8)}
    fi.append_kv(**(arguments | changes), rope=rope)


def rope_with(**changes: Any) -> Rope:
    return Rope(**({"cos_sin": cos_sin_of(9, 8), "positions": torch.tensor([0, 1, 2])} | changes))


@dataclass(frozen=True)
class Bad:
    """A call that must be refused, and a pattern of its message."""

    match: str
    call: Any


BAD = [
    Bad("q: expected None without rope, got a tensor", lambda: append()),
    Bad("q_out: expected None without rope", lambda: append(q=None, q_out=torch.zeros(1))),
    Bad(
        "q_out: expected None without q",
        lambda: append(rope_with(), q=None, q_out=torch.zeros(3, 4, 8)),
    ),
    Bad(
        r"rope.cos_sin: expected .* rotary_dim even and at most 8, got float32 \[9, 16\]",
        lambda: append(rope_with(cos_sin=cos_sin_of(9, 16))),
    ),
    Bad("rope.cos_sin: .*even", lambda: append(rope_with(cos_sin=torch.zeros(9, 7)))),
    Bad(
        "rope.cos_sin: expected .* float32 or torch.float32.*got float64",
        lambda: append(rope_with(cos_sin=torch.zeros(9, 8).double())),
    ),
    Bad(
        "rope.positions: expected a contiguous int32 or int64 vector of 3 or more.*got int16",
        lambda: append(rope_with(positions=torch.zeros(3, dtype=torch.int16))),
    ),
    Bad(
        r"rope.positions: expected .*got int64 \[2\]",
        lambda: append(rope_with(positions=torch.tensor([0, 1]))),
    ),
    Bad(
        r"rope.positions: expected positions in \[0, 9\), .*got 9 at token 1",
        lambda: append(rope_with(positions=torch.tensor([0, 9, 2]))),
    ),
    Bad("got -1 at token 2", lambda: append(rope_with(positions=torch.tensor([0, 8, -1])))),
    Bad(
        r"q: expected torch.float32 \[3 tokens or more, heads, 8\].*got float32 \[2, 4, 8\]",
        lambda: append(rope_with(), q=torch.zeros(2, 4, 8)),
    ),
    Bad(
        "q_out: expected .*as many heads in q_out as in q",
        lambda: append(rope_with(), q_out=torch.zeros(3, 2, 8)),
    ),
    Bad(
        "q: expected torch.float32 .*float16",
        lambda: append(rope_with(), q=torch.zeros(3, 4, 8).half()),
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.match[:40])
def test_refusals(bad: Bad) -> None:
    with pytest.raises(fi.InvalidInput, match=bad.match):
        bad.call()
