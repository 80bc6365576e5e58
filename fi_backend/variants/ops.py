"""What each operation means: once for torch, once for C++.

The torch column is the oracle of the C++ column and folds constants. Integers are int32 tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fi_backend.variants.ir import COMPARISONS, FLOAT_FUNCTIONS, Const, Type

__all__ = ["BOOL_OPS", "CONVERSIONS", "FLOAT_OPS", "INT_OPS", "Meaning", "fold", "meaning"]

TORCH_TYPES = {Type.BOOL: torch.bool, Type.I32: torch.int32, Type.F32: torch.float32}


@dataclass(frozen=True)
class Meaning:
    """An operation on torch tensors, and its C++ text with a place per operand."""

    on_tensors: Callable[..., Tensor]
    cpp: str
    is_infix: bool = False


def _floor_div(a: Tensor, b: Tensor) -> Tensor:
    # 64 bits, because -2^31 / -1 traps in 32; division by zero gives 0.
    quotient = torch.floor_divide(a.long(), torch.where(b == 0, 1, b).long()).int()
    return torch.where(b == 0, torch.zeros_like(quotient), quotient)


def _floor_mod(a: Tensor, b: Tensor) -> Tensor:
    remainder = torch.remainder(a.long(), torch.where(b == 0, 1, b).long()).int()
    return torch.where(b == 0, torch.zeros_like(remainder), remainder)


def _narrow(x: Tensor) -> Tensor:
    return x.int()  # wraps


_INFIX_COMPARISONS = {
    name: Meaning(getattr(torch, name), f"{{}} {symbol} {{}}", True)
    for name, symbol in zip(COMPARISONS, ("<", "<=", ">", ">=", "==", "!="), strict=True)
}
_CHOICES = {
    "select": Meaning(torch.where, "select({}, {}, {})"),
    "minimum": Meaning(lambda a, b: torch.where(a < b, a, b), "minimum({}, {})"),
    "maximum": Meaning(lambda a, b: torch.where(a > b, a, b), "maximum({}, {})"),
}

FLOAT_OPS = {
    **_INFIX_COMPARISONS,
    **_CHOICES,
    "add": Meaning(torch.add, "{} + {}", True),
    "sub": Meaning(torch.sub, "{} - {}", True),
    "mul": Meaning(torch.mul, "{} * {}", True),
    "div": Meaning(torch.div, "{} / {}", True),
    "neg": Meaning(torch.neg, "-{}", True),
    "abs": Meaning(torch.abs, "abs({})"),
    **{name: Meaning(getattr(torch, name), f"{name}({{}})") for name in FLOAT_FUNCTIONS},
}

INT_OPS = {
    **_INFIX_COMPARISONS,
    **_CHOICES,
    "add": Meaning(torch.add, "add({}, {})"),
    "sub": Meaning(torch.sub, "sub({}, {})"),
    "mul": Meaning(torch.mul, "mul({}, {})"),
    "neg": Meaning(torch.neg, "neg({})"),
    "abs": Meaning(lambda a: _narrow(torch.abs(a.long())), "abs({})"),
    "floor_div": Meaning(_floor_div, "floor_div({}, {})"),
    "floor_mod": Meaning(_floor_mod, "floor_mod({}, {})"),
    "and": Meaning(torch.bitwise_and, "{} & {}", True),
    "or": Meaning(torch.bitwise_or, "{} | {}", True),
    "xor": Meaning(torch.bitwise_xor, "{} ^ {}", True),
    "not": Meaning(torch.bitwise_not, "~{}", True),
    "shl": Meaning(lambda a, n: _narrow(a.long() << (n & 31).long()), "shl({}, {})"),
    "shr": Meaning(lambda a, n: a >> (n & 31), "shr({}, {})"),
}

BOOL_OPS = {
    "and": Meaning(torch.logical_and, "{} && {}", True),
    "or": Meaning(torch.logical_or, "{} || {}", True),
    "not": Meaning(torch.logical_not, "!{}", True),
    "select": _CHOICES["select"],
}

CONVERSIONS = {
    "to_i32": Meaning(lambda a: a.int(), "to_i32({})"),
    "to_f32": Meaning(lambda a: a.float(), "to_f32({})"),
}

_BY_TYPE = {Type.F32: FLOAT_OPS, Type.I32: INT_OPS, Type.BOOL: BOOL_OPS}


def meaning(name: str, operand: Type) -> Meaning:
    """Return what an operation means for values of type ``operand``."""
    return CONVERSIONS.get(name) or _BY_TYPE[operand][name]


def fold(name: str, constants: Sequence[Const]) -> float | int | bool:
    """Compute an operation on constants, in the precision of the kernels."""
    values = [torch.tensor(c.value, dtype=TORCH_TYPES[c.type], device="cpu") for c in constants]
    result: float | int | bool = meaning(name, constants[-1].type).on_tensors(*values).item()
    return result
