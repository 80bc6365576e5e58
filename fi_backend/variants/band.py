"""What the planner may know of a mask: a band that contains all it lets through.

The mask's conjuncts are brought to the form a * q_pos + b * kv_pos + c <= 0. Those over the
difference of the positions bound the band; `window or kv_pos < s` gives a sink prefix; everything
else bounds nothing. Worked example: ``kv_pos <= q_pos and (q_pos - kv_pos < 128 or kv_pos < 4)``
has the conjuncts kv_pos - q_pos <= 0 (right = 0) and q_pos - kv_pos - 127 <= 0 or
kv_pos - 3 <= 0 (left = 127, sink_prefix = 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fi_backend.formats import Band
from fi_backend.variants.frontend import Function
from fi_backend.variants.ir import Const, Input, Node, Op, ScalarRead, fits_i32
from fi_backend.variants.params import Scalar

if TYPE_CHECKING:
    from fi_backend.variants.variant import Variant

# Positions lie in [0, 2^30): planner.MAX_KV_LEN. Terms that could leave 32 bits there, and so
# wrap, bound nothing.
MAX_POSITION = (1 << 30) - 1
_FLIPPED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True)
class Linear:
    """q * q_pos + kv * kv_pos + constant."""

    q: int
    kv: int
    constant: int

    def plus(self, other: Linear, times: int = 1) -> Linear:
        """Return self + times * other."""
        return Linear(
            self.q + times * other.q,
            self.kv + times * other.kv,
            self.constant + times * other.constant,
        )

    @property
    def cannot_wrap(self) -> bool:
        """Whether 32 bits hold the value for all positions."""
        ends = (self.q * MAX_POSITION, self.kv * MAX_POSITION)
        low = self.constant + sum(min(0, e) for e in ends)
        high = self.constant + sum(max(0, e) for e in ends)
        return fits_i32(low) and fits_i32(high)


@dataclass(frozen=True)
class Bound:
    """One conjunct: a least left, right bound or sink prefix; None bounds nothing."""

    left: int | None = None
    right: int | None = None
    sink_prefix: int | None = None


def derive_band(variant: Variant) -> Band:
    """Return a band that contains every (query, KV) pair the variant's masks let through.

    Scalars with bound values count as constants; anything not understood is unbounded. The mask
    itself stays in force: this only tells the planner what it need not look at.

    Args:
        variant: any variant; without masks the band is unbounded.
    """
    bounds = [
        bound
        for function in variant.functions("mask")
        for conjunct in _conjuncts(function.result, False)
        if (bound := _bound(function, *conjunct)) is not None
    ]
    rights = [max(b.right, 0) for b in bounds if b.right is not None]
    # The tightest window with its own prefix: intersecting it with others only takes pairs away.
    lefts = [(max(b.left, 0), b.sink_prefix or 0) for b in bounds if b.left is not None]
    left, sink_prefix = min(lefts, default=(-1, 0))
    return Band(left, min(rights, default=-1), sink_prefix)


def _conjuncts(node: Node, negated: bool) -> Iterator[tuple[Node, bool]]:
    if isinstance(node, Op) and node.name == "not":
        yield from _conjuncts(node.args[0], not negated)
    elif isinstance(node, Op) and node.name == ("or" if negated else "and"):
        for arg in node.args:
            yield from _conjuncts(arg, negated)
    else:
        yield node, negated


def _bound(function: Function, node: Node, negated: bool) -> Bound | None:
    if isinstance(node, Op) and node.name == ("and" if negated else "or"):
        parts = [_bound(function, *_disjunct(arg, negated)) for arg in node.args]
        return _window_or_sink(parts)
    if not isinstance(node, Op) or node.name not in _FLIPPED:
        return None
    name = _FLIPPED[node.name] if negated else node.name
    left, right = (_linear(function, arg) for arg in node.args)
    if left is None or right is None or name == "ne":
        return None
    difference = left.plus(right, -1)
    if name in ("gt", "ge"):
        difference = Linear(0, 0, 0).plus(difference, -1)
    if name in ("lt", "gt"):
        difference = difference.plus(Linear(0, 0, 1))
    bound = _from_inequality(difference)  # difference <= 0
    if name == "eq":
        other = _from_inequality(Linear(0, 0, 0).plus(difference, -1))
        return _both(bound, other)
    return bound


def _disjunct(node: Node, negated: bool) -> tuple[Node, bool]:
    while isinstance(node, Op) and node.name == "not":
        node, negated = node.args[0], not negated
    return node, negated


def _both(a: Bound | None, b: Bound | None) -> Bound | None:
    if a is None or b is None:
        return a or b
    return Bound(
        a.left if b.left is None else b.left, a.right if b.right is None else b.right, None
    )


def _window_or_sink(parts: list[Bound | None]) -> Bound | None:
    """Return what "any of the parts" bounds: the widest window, the longest prefix."""
    lefts, prefixes = [], [0]
    for part in parts:
        if part is None or (part.left is None and part.sink_prefix is None):
            return None
        if part.left is not None:
            lefts.append(part.left)
        prefixes.append(part.sink_prefix or 0)
    return Bound(left=max(lefts, default=None), sink_prefix=max(prefixes))


def _from_inequality(term: Linear) -> Bound | None:
    """Return what q * q_pos + kv * kv_pos + c <= 0 bounds."""
    if term.q == -term.kv and term.kv > 0:  # kv_pos - q_pos <= floor(-c / kv)
        return Bound(right=-term.constant // term.kv)
    if term.q == -term.kv and term.q > 0:
        return Bound(left=-term.constant // term.q)
    if term.q == 0 and term.kv > 0:  # kv_pos < floor(-c / kv) + 1
        return Bound(sink_prefix=max(0, -term.constant // term.kv + 1))
    return None


def _linear(function: Function, node: Node) -> Linear | None:
    result = _linear_unchecked(function, node)
    return result if result is not None and result.cannot_wrap else None


def _linear_unchecked(function: Function, node: Node) -> Linear | None:
    if isinstance(node, Op):
        args = [_linear(function, arg) for arg in node.args]
        known = [arg for arg in args if arg is not None]
        return _combined(node.name, known) if len(known) == len(args) else None
    if isinstance(node, Input):
        return {"q_pos": Linear(1, 0, 0), "kv_pos": Linear(0, 1, 0)}.get(node.name)
    value = node.value if isinstance(node, Const) else None
    if isinstance(node, ScalarRead):
        param = next(p for p in function.params if p.argument == node.argument)
        value = param.value if isinstance(param, Scalar) else None
    return Linear(0, 0, value) if isinstance(value, int) else None


def _combined(name: str, args: list[Linear]) -> Linear | None:
    zero = Linear(0, 0, 0)
    if name == "neg":
        return zero.plus(args[0], -1)
    if name in ("add", "sub"):
        return args[0].plus(args[1], 1 if name == "add" else -1)
    if name == "mul":
        factor, term = args if args[0].q == args[0].kv == 0 else args[::-1]
        return zero.plus(term, factor.constant) if factor.q == factor.kv == 0 else None
    return None
