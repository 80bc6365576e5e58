"""The typed expression that a variant function becomes.

Nodes are made by a ``Builder`` only, which gives equal expressions the same object (so common
subexpressions cost nothing), applies Python's promotions (bool to int to float) and folds
constants. Floats are fp32 and integers wrap at 32 bits, on every path: oracle, host and device.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Type(Enum):
    """Types of a value, in order of promotion."""

    BOOL = 0
    I32 = 1
    F32 = 2


@dataclass(frozen=True, eq=False)
class Node:
    """A value; compared by identity."""

    type: Type


@dataclass(frozen=True, eq=False)
class Const(Node):
    """A number known when the variant is made."""

    value: float | int | bool


@dataclass(frozen=True, eq=False)
class Input(Node):
    """A word of the fixed vocabulary: ``logit``, ``q_pos``, ..."""

    name: str


@dataclass(frozen=True, eq=False)
class ScalarRead(Node):
    """A scalar parameter, by its name inside the function."""

    argument: str


@dataclass(frozen=True, eq=False)
class Load(Node):
    """An element of a tensor parameter, 0 where ``guard`` is false.

    The guard is what surrounds the subscript in the source: the element may not exist elsewhere.
    """

    argument: str
    element: str
    indices: tuple[Node, ...]
    guard: Node


@dataclass(frozen=True, eq=False)
class Op(Node):
    """An operation on nodes of equal type (``select``: a bool and two of equal type)."""

    name: str
    args: tuple[Node, ...]


COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
FLOAT_FUNCTIONS = ("exp", "log", "sqrt", "tanh", "sigmoid")

Fold = Callable[[str, Sequence[Const]], "float | int | bool"]


class TypeMismatch(Exception):
    """An operation on types it does not take; the front end adds the place."""


def fits_i32(value: int) -> bool:
    """Return whether 32 bits hold the integer."""
    return -(2**31) <= value < 2**31


def round_to_f32(value: float) -> float:
    """Return the nearest fp32 number; overflow gives infinity."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def children(node: Node) -> tuple[Node, ...]:
    """Return the nodes that this one reads."""
    if isinstance(node, Op):
        return node.args
    if isinstance(node, Load):
        return (*node.indices, node.guard)
    return ()


def walk(root: Node) -> Iterator[Node]:
    """Yield every node below and including ``root`` once, operands first."""
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(children(node)))


class Builder:
    """Makes the nodes of one function."""

    def __init__(self, fold: Fold) -> None:
        """Take the constant folder: (operation, constants) -> number."""
        self._fold = fold
        self._pool: dict[tuple[object, ...], Node] = {}

    def _intern(self, node: Node, *key: object) -> Node:
        return self._pool.setdefault((type(node), node.type, *key), node)

    def const(self, value: float | int | bool) -> Node:
        """Return a constant; floats are rounded to fp32.

        Raises:
            TypeMismatch: an integer that 32 bits do not hold.
        """
        if isinstance(value, bool):
            return self._intern(Const(Type.BOOL, value), value)
        if isinstance(value, int):
            if not fits_i32(value):
                raise TypeMismatch(f"the integer {value}, which 32 bits do not hold")
            return self._intern(Const(Type.I32, value), value)
        rounded = round_to_f32(value)
        return self._intern(Const(Type.F32, rounded), struct.pack("<f", rounded))

    def input(self, name: str, kind: Type) -> Node:
        """Return a word of the vocabulary."""
        return self._intern(Input(kind, name), name)

    def scalar(self, argument: str, kind: Type) -> Node:
        """Return a scalar parameter."""
        return self._intern(ScalarRead(kind, argument), argument)

    def load(
        self, argument: str, element: str, kind: Type, indices: Sequence[Node], guard: Node
    ) -> Node:
        """Return an element of a tensor parameter, read where ``guard`` holds."""
        node = Load(kind, argument, element, tuple(indices), guard)
        return self._intern(node, argument, *map(id, indices), id(guard))

    def convert(self, node: Node, to: Type) -> Node:
        """Return ``node`` as a type that is not lower in the order of promotion."""
        if node.type is to:
            return node
        return self._op("to_f32" if to is Type.F32 else "to_i32", to, node)

    def promote(self, *nodes: Node, at_least: Type = Type.I32) -> list[Node]:
        """Return the nodes converted to their common type."""
        common = max((*(n.type for n in nodes), at_least), key=lambda t: t.value)
        return [self.convert(node, common) for node in nodes]

    def _op(self, name: str, kind: Type, *args: Node) -> Node:
        constants = [a for a in args if isinstance(a, Const)]
        if len(constants) == len(args):
            return self.const(self._fold(name, constants))
        return self._intern(Op(kind, name, args), name, *map(id, args))

    def arithmetic(self, name: str, *args: Node) -> Node:
        """Return add, sub, mul, div, neg, abs, minimum, maximum, floor_div or floor_mod.

        Raises:
            TypeMismatch: floor division of floats.
        """
        args = tuple(self.promote(*args, at_least=Type.F32 if name == "div" else Type.I32))
        kind = args[0].type
        if name in ("floor_div", "floor_mod"):
            if kind is Type.F32:
                raise TypeMismatch("// or % on floats")
            divisor = args[1]
            # Exact for every dividend, negative ones included, because both round down.
            if isinstance(divisor, Const) and divisor.value > 0:
                value = int(divisor.value)
                if value & (value - 1) == 0:
                    if name == "floor_mod":
                        return self._op("and", kind, args[0], self.const(value - 1))
                    return self._op("shr", kind, args[0], self.const(value.bit_length() - 1))
        return self._op(name, kind, *args)

    def power(self, base: Node, exponent: int) -> Node:
        """Return ``base`` multiplied by itself, 0 <= exponent."""
        (base,) = self.promote(base)
        result: Node | None = None
        for bit in f"{exponent:b}":
            if result is not None:
                result = self._op("mul", base.type, result, result)
            if bit == "1":
                result = base if result is None else self._op("mul", base.type, result, base)
        return self.convert(self.const(1), base.type) if result is None else result

    def call(self, name: str, arg: Node) -> Node:
        """Return one of FLOAT_FUNCTIONS."""
        return self._op(name, Type.F32, self.convert(arg, Type.F32))

    def compare(self, name: str, a: Node, b: Node) -> Node:
        """Return one of COMPARISONS."""
        return self._op(name, Type.BOOL, *self.promote(a, b))

    def bits(self, name: str, *args: Node) -> Node:
        """Return and, or, xor, not, shl or shr; on bools the first four are logical.

        Raises:
            TypeMismatch: a float.
        """
        if any(a.type is Type.F32 for a in args):
            raise TypeMismatch("a bit operation on floats")
        if all(a.type is Type.BOOL for a in args) and name not in ("shl", "shr"):
            return self.logical(name, *args)
        return self._op(name, Type.I32, *self.promote(*args))

    def logical(self, name: str, *args: Node) -> Node:
        """Return and, or, xor or not of bools.

        Raises:
            TypeMismatch: anything but bools.
        """
        if any(a.type is not Type.BOOL for a in args):
            raise TypeMismatch("a number where a condition is needed")
        if name == "xor":
            return self.compare("ne", *args)
        # x and True = x; x and False = False; x or True = True; x or False = x.
        for this, other in (args, args[::-1]) if len(args) == 2 else ():
            if isinstance(this, Const):
                return other if this.value == (name == "and") else this
        return self._op(name, Type.BOOL, *args)

    def select(self, condition: Node, yes: Node, no: Node) -> Node:
        """Return ``yes`` where the condition holds, else ``no``.

        Raises:
            TypeMismatch: the condition is not a bool.
        """
        if condition.type is not Type.BOOL:
            raise TypeMismatch("a number where a condition is needed")
        yes, no = self.promote(yes, no, at_least=Type.BOOL)
        if isinstance(condition, Const):
            return yes if condition.value else no
        return self._op("select", yes.type, condition, yes, no)
