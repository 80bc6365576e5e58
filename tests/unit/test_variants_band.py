"""The band derived from a mask: explicit cases, then brute force over random masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variant_abi import define

from fi_backend.formats import Band
from fi_backend.variants import Scalar, Tensor, Variant, derive_band, shipped

WINDOW = 8


@dataclass(frozen=True)
class Case:
    name: str
    mask: Callable[..., Any]
    band: tuple[int, int, int]


CASES = [
    Case("causal", lambda q_pos, kv_pos: kv_pos <= q_pos, (-1, 0, 0)),
    Case("causal, other way round", lambda q_pos, kv_pos: q_pos >= kv_pos, (-1, 0, 0)),
    Case("difference", lambda q_pos, kv_pos: q_pos - kv_pos >= 0, (-1, 0, 0)),
    Case("strictly causal", lambda q_pos, kv_pos: kv_pos < q_pos, (-1, 0, 0)),
    Case("look ahead", lambda q_pos, kv_pos: kv_pos - 3 <= q_pos, (-1, 3, 0)),
    Case("window", lambda q_pos, kv_pos: q_pos - kv_pos < WINDOW, (7, -1, 0)),
    Case("chained", lambda q_pos, kv_pos: 0 <= q_pos - kv_pos < WINDOW, (7, 0, 0)),
    Case("negated", lambda q_pos, kv_pos: not (kv_pos > q_pos or q_pos >= kv_pos + 8), (7, 0, 0)),
    Case("scaled", lambda q_pos, kv_pos: 2 * kv_pos - 7 <= 2 * q_pos, (-1, 3, 0)),
    Case("equal", lambda q_pos, kv_pos: kv_pos == q_pos - 2, (2, 0, 0)),
    Case("sink", lambda q_pos, kv_pos: q_pos - kv_pos < 8 or kv_pos < 4, (7, -1, 4)),
    Case("sink of one", lambda q_pos, kv_pos: kv_pos == 0 or q_pos - kv_pos < 8, (7, -1, 1)),
    Case(
        "streaming",
        lambda q_pos, kv_pos: kv_pos <= q_pos and (q_pos - kv_pos < 8 or kv_pos < 4),
        (7, 0, 4),
    ),
    Case(
        "tightest window",
        lambda q_pos, kv_pos: (q_pos - kv_pos < 9) & (q_pos < kv_pos + 3),
        (2, -1, 0),
    ),
    Case("two windows", lambda q_pos, kv_pos: q_pos - kv_pos < 9 or q_pos - kv_pos < 3, (8, -1, 0)),
    Case("prefix alone", lambda kv_pos: kv_pos < 4, (-1, -1, 0)),
    Case("different", lambda q_pos, kv_pos: q_pos != kv_pos, (-1, -1, 0)),
    Case("block local", lambda q_pos, kv_pos: q_pos // 8 == kv_pos // 8, (-1, -1, 0)),
    Case("sum", lambda q_pos, kv_pos: q_pos + kv_pos < 8, (-1, -1, 0)),
    Case("product", lambda q_pos, kv_pos: q_pos * kv_pos < 8, (-1, -1, 0)),
    Case("may wrap", lambda q_pos, kv_pos: 4 * kv_pos <= 4 * q_pos, (-1, -1, 0)),
    Case("float", lambda q_pos, kv_pos: kv_pos * 1.0 <= q_pos, (-1, -1, 0)),
    Case("either causal or not", lambda q_pos, kv_pos: kv_pos <= q_pos or q_pos < 3, (-1, -1, 0)),
    Case(
        "one conjunct unknown",
        lambda q_pos, kv_pos, q_len: kv_pos <= q_pos and q_len % 3 == 1,
        (-1, 0, 0),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bands(case: Case) -> None:
    assert derive_band(Variant("v", mask=case.mask)) == Band(*case.band)


def test_bound_scalars_are_constants_and_open_ones_bound_nothing() -> None:
    def mask(q_pos: Any, kv_pos: Any, w: Any) -> Any:
        return q_pos - kv_pos < w

    assert derive_band(Variant("v", mask=mask, params=(Scalar("w", int, 5),))) == Band(4, -1)
    assert derive_band(Variant("v", mask=mask, params=(Scalar("w", int),))) == Band(-1, -1)
    table = (Tensor("w", torch.int32),)
    by_head = Variant(
        "v", mask=lambda q_pos, kv_pos, q_head, w: q_pos - kv_pos < w[q_head], params=table
    )
    assert derive_band(by_head) == Band(-1, -1)


def test_chains_intersect() -> None:
    chain = (
        shipped.sliding_window(64, sink_prefix=2).then(shipped.causal()).then(shipped.soft_cap(3))
    )
    assert derive_band(chain) == Band(63, 0, 2)
    assert derive_band(shipped.soft_cap(3)) == Band(-1, -1, 0)


TERMS = st.sampled_from(
    (
        "q_pos",
        "kv_pos",
        "q_pos - kv_pos",
        "kv_pos - q_pos",
        "2 * q_pos",
        "-kv_pos",
        "q_pos + kv_pos",
        "w",
    )
)
COMPARED = st.sampled_from(("<", "<=", ">", ">=", "==", "!="))


def combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    either = st.builds("({} {} {})".format, inner, st.sampled_from(("and", "or")), inner)
    return either | st.builds("(not {})".format, inner)


MASKS = st.recursive(
    st.builds("({} {} {} + {})".format, TERMS, COMPARED, TERMS, st.integers(-6, 6)),
    combine,
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(MASKS, st.integers(-3, 6))
def test_the_band_contains_all_that_the_mask_lets_through(text: str, w: int) -> None:
    mask = define(f"def f(q_pos, kv_pos, w):\n    return {text}\n")
    variant = Variant("random", mask=mask, params=(Scalar("w", int, w),))
    q_pos, kv_pos = torch.arange(24)[:, None], torch.arange(24)
    visible = variant.evaluate_mask({"q_pos": q_pos, "kv_pos": kv_pos}).expand(24, 24)
    band = derive_band(variant)
    inside = torch.ones(24, 24, dtype=torch.bool)
    if band.right >= 0:
        inside &= kv_pos <= q_pos + band.right
    if band.left >= 0:
        inside &= (kv_pos >= q_pos - band.left) | (kv_pos < band.sink_prefix)
    assert not (visible & ~inside).any()
