"""Compiled arithmetic against the oracle: accuracy of the functions, integers at their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from variant_abi import define, make_tile, run, run_logits

from fi_backend.variants import Scalar, Tensor, Variant, math
from fi_backend.variants.stages import bind_stages

NAN, INF = float("nan"), float("inf")
# Relative to the fp32 spacing of the result: 2^-23 is about 1.2e-7.
RELATIVE_ERROR = 4e-7


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile anew, away from the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "variant_cache"
    monkeypatch.setenv("FI_CACHE_DIR", str(folder))
    return folder


FUNCTIONS = {
    "exp": (lambda logit: math.exp(logit), (-87.0, 88.7)),
    "log": (lambda logit: math.log(logit), (1e-38, 3e38)),
    "log near 1": (lambda logit: math.log(logit), (0.5, 2.0)),
    "sqrt": (lambda logit: math.sqrt(logit), (0.0, 3e38)),
    "tanh": (lambda logit: math.tanh(logit), (-12.0, 12.0)),
    "tanh near 0": (lambda logit: math.tanh(logit), (-1e-3, 1e-3)),
    "sigmoid": (lambda logit: math.sigmoid(logit), (-80.0, 80.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_relative_error_of_elementary_functions(name: str) -> None:
    function, (low, high) = FUNCTIONS[name]
    variant = Variant("f", logits=function)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(4, 20000, generator=g, dtype=torch.float64) * (high - low) + low
    if low > 0 and high / low > 100:
        x = torch.exp(torch.rand(4, 20000, generator=g, dtype=torch.float64) * 174 - 87)
    x = x.float()
    got = run_logits(variant, make_tile(4, x.shape[1]), x).double()
    expected = variant.evaluate_logits(x.double(), {})
    error = ((got - expected).abs() / expected.abs().clamp(min=1e-300)).max().item()
    assert error < RELATIVE_ERROR


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("exp", [-INF, -200.0, -103.5, 0.0, 89.0, INF, NAN], [0, 0, 1e-45, 1, INF, INF, NAN]),
        (
            "log",
            [0.0, -0.0, -1.0, 1e-45, 1.0, INF, NAN],
            [-INF, -INF, NAN, -103.27893, 0, INF, NAN],
        ),
        ("sqrt", [0.0, 4.0, -1.0, INF], [0, 2, NAN, INF]),
        ("tanh", [-INF, -0.0, 0.0, 50.0, INF, NAN], [-1, 0, 0, 1, 1, NAN]),
        ("sigmoid", [-INF, -200.0, 0.0, 200.0, INF, NAN], [0, 0, 0.5, 1, 1, NAN]),
    ],
)
def test_elementary_functions_at_their_limits(
    name: str, inputs: list[float], expected: list[float]
) -> None:
    variant = Variant("f", logits=FUNCTIONS[name][0])
    for repeat in (1, 20):  # the scalar remainder of a loop, and its vectors
        x = torch.tensor([inputs * repeat])
        got = run_logits(variant, make_tile(1, x.shape[1]), x)[0].tolist()
        assert got == pytest.approx(expected * repeat, rel=1e-6, abs=1e-45, nan_ok=True)


def test_choices_and_powers() -> None:
    def f(logit: Any, q_head: Any, flags: Any, p: Any) -> Any:
        scaled = math.maximum(abs(logit) ** 3, p)
        return -scaled if flags[q_head] and logit < 0 else math.minimum(scaled, 100)

    params = (Tensor("flags", torch.bool), Scalar("p"))
    variant = Variant("choices", logits=f, params=params)
    given = {"flags": torch.tensor([True, False]), "p": 2.0}
    tile = make_tile(2, 4, q_head=[0, 1])
    out = run_logits(variant, tile, torch.tensor([[-3.0, -1.0, 1.0, 5.0]] * 2), **given)
    assert out.tolist() == [[-27, -2, 2, 100], [27, 2, 2, 100]]


def test_output_functions_see_the_component() -> None:
    def f(out: Any, dim: Any, q_head: Any, gain: Any) -> Any:
        return out * gain[q_head, dim]

    gain = torch.arange(6, dtype=torch.float32).view(3, 2).T
    variant = Variant("gain", output=f, params=(Tensor("gain", torch.float32, 2),))
    bound = bind_stages(variant, {"gain": gain})
    x = torch.ones(2, 3)
    run(bound.stages[0][3], make_tile(2, 3, q_head=[0, 1]), bound.stages[0][4], x, 0.0)
    assert torch.equal(x, gain)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.int32, torch.int64, torch.uint8, torch.bool]
)
def test_reads_of_every_dtype_and_rank(dtype: torch.dtype) -> None:
    def f(q_pos: Any, kv_pos: Any, token: Any, t: Any) -> Any:
        return t[token, q_pos, kv_pos] * 2

    values = (torch.arange(24) % 2 if dtype is torch.bool else torch.arange(24)).to(dtype)
    tensor = values.view(3, 2, 4).transpose(0, 2)
    variant = Variant("t", logits=f, params=(Tensor("t", dtype, 3),))
    tile = make_tile(2, 3, q_pos=[0, 1], token=[3, 2])
    out = run_logits(variant, tile, torch.zeros(2, 3), t=tensor)
    assert torch.equal(out, torch.stack([tensor[3, 0], tensor[2, 1]]).float() * 2)


LIMITS = (0, 1, -1, 2, 31, 32, 33, -5, 2**31 - 1, -(2**31), -(2**31) + 1)
INTEGER_CASES = {
    "a // b": lambda a, b: a // b if b else 0,
    "a % b": lambda a, b: a % b if b else 0,
    "a << b": lambda a, b: a << (b & 31),
    "a >> b": lambda a, b: a >> (b & 31),
    "a * b": lambda a, b: a * b,
    "a - b": lambda a, b: a - b,
    "abs(a) + -b": lambda a, b: wrapped(abs(a)) - b,
    "(a & b) ^ (a | ~b)": lambda a, b: (a & b) ^ (a | ~b),
    "a // -1 + b % 8 + b // 16": lambda a, b: wrapped(-a) + b % 8 + b // 16,
}


def wrapped(value: int) -> int:
    """What 32 bits keep of an integer."""
    return (value + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("text", INTEGER_CASES)
def test_integers_at_their_limits(text: str) -> None:
    # The sign bit goes through a mask; fp32 logits would round.
    body = f"def f(q_pos, kv_pos, p):\n    a = q_pos\n    b = kv_pos\n    return ({text}) == p\n"
    variant = Variant("limits", mask=define(body), params=(Scalar("p", int),))
    for a in LIMITS:
        for b in LIMITS:
            expected = wrapped(INTEGER_CASES[text](a, b))
            tile = make_tile(1, 1, q_pos=a, kv_begin=b)
            for p in (expected, wrapped(expected + 1)):
                out = run_logits(variant, tile, torch.zeros(1, 1), p=p)
                assert (out.item() == 0) == (p == expected), (a, b)
                assert variant.evaluate_mask(tile.context(), {"p": p}).item() == (p == expected)
