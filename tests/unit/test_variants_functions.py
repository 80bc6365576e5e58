"""From a Python function to its expression: what is accepted, and what it computes."""

from __future__ import annotations

import math as python_math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from variant_abi import define, make_tile

from fi_backend.errors import InvalidInput
from fi_backend.variants import Scalar, Tensor, Variant, math
from fi_backend.variants import math as fm
from fi_backend.variants.ir import Type
from fi_backend.variants.printer import content_key, literal, print_function

CAP = 2.0
HALF_WINDOW = 4
ENABLED = True


def logits_of(function: Callable[..., Any], logit: float, **words: Any) -> float:
    """The value of a logits function for one logit, by the oracle."""
    params = tuple(Scalar(n, type(v)) for n, v in words.items() if n.startswith("p_"))
    variant = Variant("test", logits=function, params=params)
    given_params = {n: v for n, v in words.items() if n.startswith("p_")}
    values = {n: torch.tensor(v) for n, v in words.items() if not n.startswith("p_")}
    return variant.evaluate_logits(torch.tensor(logit), values, given_params).item()


def decorated_names(q_pos: Any, kv_pos: Any, logit: Any) -> Any:
    """A docstring is no statement to compile."""
    distance: int = q_pos - kv_pos
    distance += 1
    scaled = distance * 0.5
    scaled = scaled + logit
    return scaled


def chained(logit: Any, q_pos: Any, kv_pos: Any) -> Any:
    return 1.0 if 0 <= q_pos - kv_pos < HALF_WINDOW else -1.0


def closure(factor: float) -> Callable[..., Any]:
    return lambda logit: logit * factor


@dataclass(frozen=True)
class Case:
    name: str
    function: Callable[..., Any]
    logit: float
    words: dict[str, Any]
    expected: float


CASES = [
    Case("locals", decorated_names, 10.0, {"q_pos": 7, "kv_pos": 2}, 13.0),
    Case("chain inside", chained, 0.0, {"q_pos": 5, "kv_pos": 2}, 1.0),
    Case("chain below", chained, 0.0, {"q_pos": 1, "kv_pos": 2}, -1.0),
    Case("chain above", chained, 0.0, {"q_pos": 6, "kv_pos": 2}, -1.0),
    Case("closure", closure(3.0), 2.0, {}, 6.0),
    Case("module constant", lambda logit: logit / CAP, 3.0, {}, 1.5),
    Case("module attribute", lambda logit: logit * python_math.pi, 1.0, {}, python_math.pi),
    Case("bool constant", lambda logit: logit if ENABLED else 0.0, 3.0, {}, 3.0),
    Case("scalar parameter", lambda logit, p_x: logit + p_x, 1.0, {"p_x": 0.5}, 1.5),
    Case("int parameter", lambda logit, p_n: logit * p_n, 1.5, {"p_n": 3}, 4.5),
    Case("true division of ints", lambda q_pos: q_pos / 2, 0.0, {"q_pos": 7}, 3.5),
    Case("floor division", lambda q_pos: -q_pos // 2, 0.0, {"q_pos": 7}, -4.0),
    Case("floor modulo", lambda q_pos: -q_pos % 3, 0.0, {"q_pos": 7}, 2.0),
    Case("modulo of a power of two", lambda q_pos: -q_pos % 4, 0.0, {"q_pos": 7}, 1.0),
    Case("negative divisor", lambda q_pos: q_pos % -4, 0.0, {"q_pos": 7}, -1.0),
    Case(
        "division by zero", lambda q_pos, kv_pos: q_pos // kv_pos, 0.0, {"q_pos": 7, "kv_pos": 0}, 0
    ),
    Case("wraps", lambda q_pos: q_pos + 1, 0.0, {"q_pos": 2**31 - 1}, -(2.0**31)),
    Case("bits", lambda q_pos: (q_pos >> 1 & 3 | 8) ^ 1, 0.0, {"q_pos": 7}, 10.0),
    Case("shift modulo 32", lambda q_pos: q_pos << 33, 0.0, {"q_pos": 7}, 14.0),
    Case("inverted int", lambda q_pos: ~q_pos, 0.0, {"q_pos": 7}, -8.0),
    Case("inverted bool", lambda q_pos: 1 if ~(q_pos < 3) else 2, 0.0, {"q_pos": 7}, 1.0),
    Case("bools add up", lambda q_pos: (q_pos < 9) + (q_pos < 8), 0.0, {"q_pos": 7}, 2.0),
    Case("power", lambda logit: logit**3 + logit**0, 2.0, {}, 9.0),
    Case("unary plus", lambda logit: +logit, 2.0, {}, 2.0),
    Case(
        "and, or, not",
        lambda q_pos: 1 if not q_pos < 3 and (q_pos > 9 or q_pos == 7) else 0,
        0.0,
        {"q_pos": 7},
        1,
    ),
    Case("where", lambda logit: math.where(logit > 1, logit, 5), 2.0, {}, 2.0),
    Case("module alias", lambda logit: fm.minimum(logit, 1) + fm.maximum(logit, 3), 2.0, {}, 4.0),
    Case("builtin abs", lambda logit: abs(logit) + 1, -2.0, {}, 3.0),
    Case("sqrt", lambda logit: math.sqrt(logit) + 1, 9.0, {}, 4.0),
    Case("log of exp", lambda logit: math.log(math.exp(logit)), 1.0, {}, 1.0),
    Case("sigmoid", lambda logit: math.sigmoid(logit) + 1, 0.0, {}, 1.5),
    Case("tanh", lambda logit: math.tanh(logit) + 1, 0.0, {}, 1.0),
    Case("not equal", lambda q_pos: 1 if q_pos != 7 else 0, 0.0, {"q_pos": 7}, 0),
]

# Python's own integers do not wrap, raise for these, or (~ of a bool) are no conditions.
DIFFERENT_ON_NUMBERS = {"wraps", "division by zero", "shift modulo 32", "inverted bool"}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_small_values(case: Case) -> None:
    assert logits_of(case.function, case.logit, **case.words) == pytest.approx(case.expected)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in DIFFERENT_ON_NUMBERS], ids=lambda c: c.name
)
def test_the_function_itself_is_an_oracle_on_numbers(case: Case) -> None:
    code = case.function.__code__
    words = {"logit": case.logit, **case.words}
    arguments = [words[name] for name in code.co_varnames[: code.co_argcount]]
    assert case.function(*arguments) == pytest.approx(case.expected)


def test_the_function_itself_runs_on_tensors() -> None:
    def window(q_pos: Any, kv_pos: Any) -> Any:
        return (kv_pos <= q_pos) & math.where(kv_pos < 2, True, q_pos - kv_pos < HALF_WINDOW)

    q_pos, kv_pos = torch.arange(12)[:, None], torch.arange(12)
    variant = Variant("window", mask=window)
    expected = variant.evaluate_mask({"q_pos": q_pos, "kv_pos": kv_pos})
    assert torch.equal(window(q_pos, kv_pos), expected)
    assert expected.sum() == sum(min(q + 1, max(4, min(q - 3, 2) + 4)) for q in range(12))


def test_a_lambda_in_the_middle_of_a_call_is_found() -> None:
    variant = Variant(
        "v", logits=lambda logit: logit + 1, mask=lambda q_pos, kv_pos: kv_pos < q_pos
    )
    assert variant.evaluate_logits(torch.tensor(1.0), {}).item() == 2.0
    assert not variant.evaluate_mask({"q_pos": 3, "kv_pos": 3})


def test_constants_are_captured_when_the_variant_is_made() -> None:
    factor = 2.0
    variant = Variant("scaled", logits=lambda logit: logit * factor)
    factor = 5.0
    assert variant.evaluate_logits(torch.tensor(1.0), {}).item() == 2.0
    assert factor == 5.0


def test_equal_functions_have_equal_text() -> None:
    def short(logit: Any, q_pos: Any) -> Any:
        return logit * (q_pos + 1) + (q_pos + 1)

    def long(q_pos: Any, logit: Any) -> Any:
        next_position = q_pos + (3 - 2)
        return logit * next_position + next_position

    one, two = (Variant("v", logits=f).functions("logits")[0] for f in (short, long))
    assert content_key(one) == content_key(two)
    assert print_function(one).count("add(") == 1


def test_printed_text() -> None:
    variant = Variant(
        "v",
        logits=lambda logit, p_n, p_t: logit * 0.1 + p_t[p_n, 3],
        params=(Scalar("p_n", int), Tensor("p_t", torch.uint8, 2)),
    )
    assert print_function(variant.functions("logits")[0]) == (
        "  static constexpr int32_t kNumParams = 2;\n\n"
        "  template <class Context>\n"
        "  FI_VARIANT_FN static auto apply(const Context& c) {\n"
        "    const auto t0 = c.template load<uint8_t>(1, true, c.template scalar<int32_t>(0), 3);\n"
        "    return (c.logit() * 0.1f) + to_f32(t0);\n"
        "  }\n"
    )


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (1.0, Type.F32, "1.0f"),
        (0.1, Type.F32, "0.1f"),
        (1e30, Type.F32, "1e+30f"),
        (python_math.inf, Type.F32, "from_bits(2139095040)"),
        (3, Type.I32, "3"),
        (-(2**31), Type.I32, "(-2147483647 - 1)"),
        (True, Type.BOOL, "true"),
    ],
)
def test_literals(value: float, kind: Type, text: str) -> None:
    rounded = torch.tensor(value, dtype=torch.float32).item() if kind is Type.F32 else value
    assert literal(rounded, kind) == text


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float_literals_are_exact(value: float) -> None:
    text = literal(value, Type.F32).removesuffix("f")
    assert torch.tensor(float(text), dtype=torch.float32).item() == value


def test_reads_are_guarded_by_what_surrounds_them() -> None:
    def guarded(logit: Any, kv_pos: Any, table: Any) -> Any:
        return table[kv_pos - 2] if kv_pos >= 2 and kv_pos < 4 else logit

    variant = Variant("v", logits=guarded, params=(Tensor("table"),))
    params = {"table": torch.tensor([10.0, 20.0])}
    context = make_tile(1, 6).context()
    out = variant.evaluate_logits(torch.zeros(1, 6), context, params)
    assert out.tolist() == [[0, 0, 10, 20, 0, 0]]
    empty = {"table": torch.zeros(0)}
    only_outside = {"kv_pos": torch.tensor([0, 9])}
    assert variant.evaluate_logits(torch.zeros(2), only_outside, empty).tolist() == [0, 0]


def test_reads_outside_the_tensor_are_refused_by_the_oracle() -> None:
    variant = Variant("v", logits=lambda kv_pos, t: t[kv_pos], params=(Tensor("t"),))
    with pytest.raises(
        InvalidInput, match=r"params\['t'\]: expected subscripts of axis 0 in \[0, 2\)"
    ):
        variant.evaluate_logits(torch.zeros(3), {"kv_pos": torch.arange(3)}, {"t": torch.zeros(2)})


def test_missing_words_and_mistyped_words() -> None:
    variant = Variant("v", mask=lambda kv_pos, q_pos: kv_pos < q_pos)
    with pytest.raises(InvalidInput, match="context: expected an entry 'q_pos', got kv_pos"):
        variant.evaluate_mask({"kv_pos": torch.arange(3)})
    with pytest.raises(
        InvalidInput, match=r"context\['q_pos'\]: expected integers, got torch.float"
    ):
        variant.evaluate_mask({"kv_pos": 1, "q_pos": torch.zeros(3)})


def test_float64_logits_give_a_float64_oracle() -> None:
    variant = Variant("v", logits=lambda logit, q_pos: math.exp(logit) * q_pos)
    logits = torch.tensor([0.1], dtype=torch.float64)
    out = variant.evaluate_logits(logits, {"q_pos": 3})
    assert out.dtype == torch.float64
    assert out.item() == 3 * python_math.exp(0.1)


def test_a_function_made_from_text() -> None:
    function = define("def f(logit):\n    return logit + STEP\n", STEP=4)
    assert logits_of(function, 1.0) == 5.0
