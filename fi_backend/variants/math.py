"""The functions a variant may call, for Python numbers and for torch tensors.

In a variant function they are recognised by identity and compiled; called directly they compute,
so the same function runs on tensors, where ``&``, ``|``, ``~`` and ``where`` must take the place
of ``and``, ``or``, ``not`` and the conditional expression.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

__all__ = ["abs", "exp", "log", "maximum", "minimum", "sigmoid", "sqrt", "tanh", "where"]

# What a variant function computes with; Any so that users' one-line functions need no casts.
Value: TypeAlias = Any


def _unary(on_tensor: Callable[[torch.Tensor], torch.Tensor], x: Value) -> Value:
    if isinstance(x, torch.Tensor):
        return on_tensor(x)
    return on_tensor(torch.tensor(float(x), dtype=torch.float64, device="cpu")).item()


def tanh(x: Value) -> Value:
    """Return the hyperbolic tangent."""
    return _unary(torch.tanh, x)


def exp(x: Value) -> Value:
    """Return e to the power of x."""
    return _unary(torch.exp, x)


def log(x: Value) -> Value:
    """Return the natural logarithm: -inf at 0, NaN below."""
    return _unary(torch.log, x)


def sqrt(x: Value) -> Value:
    """Return the square root: NaN below 0."""
    return _unary(torch.sqrt, x)


def sigmoid(x: Value) -> Value:
    """Return 1 / (1 + exp(-x))."""
    return _unary(torch.sigmoid, x)


def abs(x: Value) -> Value:
    """Return the magnitude."""
    return builtins.abs(x)


def minimum(a: Value, b: Value) -> Value:
    """Return the smaller of two values."""
    return where(a < b, a, b)


def maximum(a: Value, b: Value) -> Value:
    """Return the larger of two values."""
    return where(a > b, a, b)


def where(condition: Value, yes: Value, no: Value) -> Value:
    """Return ``yes`` where the condition holds and ``no`` elsewhere.

    A tensor parameter subscripted inside an argument is read only where that argument is chosen.
    """
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no
