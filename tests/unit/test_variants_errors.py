"""Every message about a function that is refused: sentence, place, source line."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from variant_abi import define

from fi_backend.errors import UnsupportedVariant
from fi_backend.variants import Tensor, Variant


@dataclass(frozen=True)
class Refused:
    """A function body that is refused; `line` is the line of the source that the message shows."""

    name: str
    body: str
    message: str
    line: str = "return x"
    arguments: str = "logit, q_pos, table"
    kind: str = "logits"
    constants: dict[str, Any] = field(default_factory=dict)


REFUSED = [
    Refused(
        "if", "if q_pos > 1:\n        x = 1\n    return x", "got `If`; write `x if", "if q_pos > 1:"
    ),
    Refused(
        "for", "for i in range(3): pass\n    return 1", "got `For`; write the terms out", "for i"
    ),
    Refused(
        "while", "while True: pass\n    return 1", "got `While`; write the terms", "while True"
    ),
    Refused("no return", "x = logit", "expected a value for every logit, got no return", "def f("),
    Refused("bare return", "return", "got `Return`", "return"),
    Refused("tuple", "return logit, 1", "got `Tuple`; assign and return one", "return logit, 1"),
    Refused("tuple target", "a, b = 1, 2\n    return a", "got `Assign`", "a, b = 1, 2"),
    Refused("call", "return print(logit)", "got a call of `print`; call abs, exp", "return print"),
    Refused("method", "return logit.abs()", "got a call of `logit.abs`", "return logit.abs"),
    Refused(
        "torch", "return t.tanh(logit)", "a call of `t.tanh`", "t.tanh", constants={"t": torch}
    ),
    Refused("shadowed", "tanh = 1\n    return tanh(logit)", "a call of `tanh`", "return tanh"),
    Refused("keyword", "return exp(x=logit)", "expected 1 positional arguments of exp", "exp(x="),
    Refused(
        "arity", "return minimum(logit)", "expected 2 positional arguments of minimum", "minimum("
    ),
    Refused(
        "unknown name", "return logit + other", "unknown name 'other'; declare", "logit + other"
    ),
    Refused(
        "list constant",
        "return K",
        "got 'K', a list; only int, float and bool",
        "return K",
        constants={"K": [1]},
    ),
    Refused("string", "return 'a'", "a str; only int, float", "return 'a'"),
    Refused(
        "big int",
        "return q_pos + 2**16 * 65536 * 3000000000",
        "the integer 3000000000",
        "return q_pos",
    ),
    Refused(
        "whole tensor",
        "return table + 1",
        "the whole tensor 'table'; read table\\[i, j\\]",
        "table + 1",
    ),
    Refused(
        "few subscripts",
        "return table[1]",
        "expected 2 subscripts of 'table', as declared, got 1",
        "table[1]",
    ),
    Refused(
        "float subscript",
        "return table[logit, 1]",
        "expected integer subscripts, got `logit`",
        "table[logit",
    ),
    Refused("slice", "return table[1:2, 0]", "got `Slice`", "table[1:2"),
    Refused("foreign subscript", "return logit[0]", "a subscript of 'logit'", "logit[0]"),
    Refused(
        "number as condition",
        "return 1 if q_pos else 0",
        "expected a condition, got a number",
        "if q_pos",
    ),
    Refused(
        "number in and", "return q_pos and 1", "expected a condition, got a number", "q_pos and 1"
    ),
    Refused(
        "not a number", "return not q_pos", "a number where a condition is needed", "not q_pos"
    ),
    Refused(
        "float floor division", "return logit // 2", "// or % on floats; use integers", "logit // 2"
    ),
    Refused("float bits", "return logit & 1", "a bit operation on floats", "logit & 1"),
    Refused(
        "float exponent",
        "return logit ** 0.5",
        "expected a constant exponent of 0 to 16, got 0.5",
        "** 0.5",
    ),
    Refused("matrix product", "return logit @ logit", "got `BinOp`", "logit @ logit"),
    Refused("is", "return 1 if logit is None else 2", "got `Is`", "is None"),
    Refused(
        "unknown argument",
        "return 1",
        "expected an argument out of logit, kv_pos.*got 'head'",
        "def f(",
        "head",
    ),
    Refused(
        "default", "return logit", "expected plain arguments, got a default", "def f(", "logit=1"
    ),
    Refused("star", "return 1", "expected plain arguments", "def f(", "*logit"),
    Refused(
        "logit in a mask",
        "return logit < 1",
        "expected an argument out of kv_pos",
        "def f(",
        "logit",
        "mask",
    ),
    Refused(
        "kv_pos in output",
        "return kv_pos",
        "expected an argument out of out, dim",
        "def f(",
        "kv_pos",
        "output",
    ),
    Refused(
        "number as mask",
        "return q_pos & 1",
        "expected a condition, got a number",
        "return q_pos & 1",
        "q_pos",
        "mask",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.name)
def test_refused_functions(case: Refused) -> None:
    source = f"def f({case.arguments}):\n    {case.body}\n"
    function = define(source, **case.constants)
    params = (Tensor("table", torch.float32, 2),)
    with pytest.raises(UnsupportedVariant) as caught:
        Variant("mine", **{case.kind: function}, params=params)
    sentence, place = str(caught.value).split("\n")
    assert re.search(rf"^mine\.{case.kind}: expected .*, got .*; ", sentence)
    assert re.search(case.message, sentence)
    found = re.fullmatch(r"  <variant \d+>:(\d+): (.*)", place)
    assert found is not None
    assert source.splitlines()[int(found[1]) - 1].strip() == found[2]
    assert case.line in found[2]


def test_functions_without_source() -> None:
    module: dict[str, Any] = {}
    exec("def f(logit): return logit", module)
    with pytest.raises(
        UnsupportedVariant, match="source text can be read, got 'f'; define it in a file"
    ):
        Variant("mine", logits=module["f"])


@pytest.mark.parametrize("function", [abs, functools.partial(max, 1), int])
def test_what_is_not_a_plain_function(function: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedVariant, match=r"mine\.logits: expected a Python function, got"):
        Variant("mine", logits=function)


def test_two_equal_lambdas_on_a_line_are_told_apart_by_place() -> None:
    pair = (lambda logit: logit + 1, lambda logit: logit + 2)
    values = [Variant("v", logits=f).evaluate_logits(torch.zeros(()), {}).item() for f in pair]
    assert values == [1, 2]


def test_a_file_that_changed_since_import() -> None:
    source = "def f(logit):\n    return logit\n"
    function = define(source)
    function.__code__ = function.__code__.replace(co_firstlineno=2)
    with pytest.raises(
        UnsupportedVariant, match=r"one definition at .*:2, got 0; reload the module"
    ):
        Variant("mine", logits=function)
