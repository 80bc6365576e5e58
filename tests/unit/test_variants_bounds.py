"""Tiles that a mask empties or fills: bounds over boxes are sound, by brute force."""

from __future__ import annotations

import operator
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variant_abi import Tile, define, make_tile, mask_kind, run

from fi_backend.variants import Scalar, Tensor, Variant
from fi_backend.variants.stages import bind_stages

INF = float("inf")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compile anew, away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder: Path = tmp_path_factory.mktemp("cache")
        patch.setenv("FI_CACHE_DIR", str(folder))
        yield folder


def check_tile(variant: Variant, tile: Tile, params: dict[str, Any]) -> str:
    """Compare the mask on a tile and its kind with the oracle; return the kind."""
    _, mask, kind, _, packed = bind_stages(variant, params).stages[0]
    x = torch.zeros(len(tile.q_pos), tile.num_cols)
    run(mask, tile, packed, x, -INF)
    expected = variant.evaluate_mask(tile.context(), params).expand(x.shape)
    assert torch.equal(x == 0, expected)
    answer = mask_kind(kind, tile.box(), packed)
    assert answer != "empty" or not expected.any()
    assert answer != "full" or expected.all()
    return answer


def compile_together(variants: list[Variant], params: dict[str, Any]) -> None:
    """Put all functions into one library: the chain's."""
    chain = variants[0]
    for variant in variants[1:]:
        chain = chain.then(variant)
    bind_stages(chain, params)


# Every operation alone, compared with a value near those that it takes: an end that is off by one
# shows.
WORDS = "q_pos, kv_pos, q_len, kv_len"
OPERATIONS = [
    *(f"q_pos {op} kv_pos" for op in ("+", "-", "*", "//", "%", "&", "|", "^", "<<", ">>")),
    *(f"{name}(q_pos, kv_pos)" for name in ("minimum", "maximum")),
    "abs(q_pos)",
    "-q_pos",
    "~q_pos",
    "q_pos if kv_pos < q_len else kv_pos",
    "(q_pos < kv_pos) + (q_pos == kv_pos) * 2 + (q_pos >= 3 and kv_pos > 2) * 4",
    "(q_pos != kv_pos or not q_pos <= 5) + q_len // kv_len",
]
COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@cache
def compared() -> dict[tuple[str, str], Variant]:
    variants = {}
    for text in OPERATIONS:
        for comparison in COMPARISONS:
            mask = define(f"def f({WORDS}, p):\n    return ({text}) {comparison} p\n")
            variants[text, comparison] = Variant("compared", mask=mask, params=(Scalar("p", int),))
    compile_together(list(variants.values()), {"p": 0})
    return variants


@cache
def value_of(text: str) -> Variant:
    return Variant("value", logits=define(f"def f({WORDS}):\n    return {text}\n"))


ENDS = (0, 0, 1, 7, 8, 31, 32, 2**16, 2**30, 2**31 - 9, -1, -8, -(2**16), -(2**31))


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """The first and number of at most 8 consecutive 32-bit integers."""
    count = draw(st.integers(1, 8))
    first = draw(st.sampled_from(ENDS)) + draw(st.integers(-3, 3))
    return max(-(2**31), min(first, 2**31 - count)), count


@pytest.mark.parametrize("text", OPERATIONS)
@settings(max_examples=150, deadline=None)
@given(q=ranges(), kv=ranges(), q_len=st.integers(-2, 3), step=st.integers(-1, 1))
def test_bounds_of_every_operation(
    text: str, q: tuple[int, int], kv: tuple[int, int], q_len: int, step: int
) -> None:
    rows = [q[0] + i for i in range(q[1])]
    tile = make_tile(q[1], kv[1], q_pos=rows, q_len=q_len, kv_len=3, kv_begin=kv[0])
    zeros = torch.zeros(q[1], kv[1], dtype=torch.float64)
    taken = value_of(text).evaluate_logits(zeros, tile.context()).int().flatten().tolist()
    for near in (min(taken), max(taken)):
        p = max(-(2**31), min(near + step, 2**31 - 1))
        for comparison, holds in COMPARISONS.items():
            bound = bind_stages(compared()[text, comparison], {"p": p})
            answer = mask_kind(bound.stages[0][2], tile.box(), bound.stages[0][4])
            visible = [holds(value, p) for value in taken]
            assert answer != "empty" or not any(visible)
            assert answer != "full" or all(visible)


LEAVES = ("q_pos", "kv_pos", "q_len", "kv_len", "q_head", "p")
NUMBERS = (0, 1, 2, 3, 5, 7, 8, -1, -4, 31, 40, 2**30, 2**31 - 1, -(2**31))
BINARY = ("+", "-", "*", "//", "%", "&", "|", "^", "<<", ">>")


class MaskWriter:
    """Writes random mask functions as source text."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self, depth: int) -> str:
        pick = self._random.randrange(12)
        if depth == 0 or pick < 2:
            return self._random.choice([*LEAVES, *LEAVES, *map(str, NUMBERS)])
        a, b = self.number(depth - 1), self.number(depth - 1)
        if pick < 8:
            return f"({a} {self._random.choice(BINARY)} {b})"
        if pick == 8:
            return f"{self._random.choice(('abs', '-', '~'))}({a})"
        if pick == 9:
            return f"{self._random.choice(('minimum', 'maximum'))}({a}, {b})"
        if pick == 10:
            return f"({a} if {self.condition(depth - 1)} else {b})"
        return f"table[{a} & 7]"

    def condition(self, depth: int) -> str:
        pick = self._random.randrange(8)
        if depth == 0 or pick < 4:
            comparison = self._random.choice([*COMPARISONS])
            return f"({self.number(depth)} {comparison} {self.number(depth)})"
        a, b = self.condition(depth - 1), self.condition(depth - 1)
        if pick == 4:
            return f"(not {a})"
        if pick == 5:
            return f"({self.number(depth - 1)} / 3 < {self.number(depth - 1)})"
        return f"({a} {self._random.choice(('and', 'or', '^'))} {b})"

    def variant(self) -> Variant:
        function = define(f"def f({', '.join(LEAVES)}, table):\n    return {self.condition(3)}\n")
        params = (Scalar("p", int), Tensor("table", torch.int32))
        return Variant("random", mask=function, params=params)


def random_tile(g: random.Random) -> Tile:
    first = g.choice((0, 0, 3, 60, 2**30 - 8))
    rows, cols = g.randrange(1, 5), g.choice((1, 2, 4, 8))
    return make_tile(
        rows,
        cols,
        q_pos=[first + g.randrange(12) for _ in range(rows)],
        q_head=[g.randrange(8) for _ in range(rows)],
        q_len=g.randrange(1, 9),
        kv_len=g.randrange(1, 80),
        kv_begin=first + g.randrange(12),
    )


def test_random_masks_agree_with_the_oracle_and_their_bounds_are_sound() -> None:
    writer, g = MaskWriter(7), random.Random(7)
    variants = [writer.variant() for _ in range(80)]
    table = torch.tensor([0, 1, -1, 5, 9, -(2**31), 2**31 - 1, 40], dtype=torch.int32)
    compile_together(variants, {"p": 0, "table": table})
    kinds = {"empty": 0, "full": 0, "mixed": 0}
    for variant in variants:
        for _ in range(12):
            params = {"p": g.choice(NUMBERS), "table": table}
            kinds[check_tile(variant, random_tile(g), params)] += 1
    assert min(kinds.values()) > 60, kinds  # the bounds decide often enough to be worth having
