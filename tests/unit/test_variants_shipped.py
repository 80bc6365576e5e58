"""The variants in the core: small explicit values, then compiled code against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from variant_abi import Tile, make_tile, mask_kind, oracle_chain, run, run_chain, run_logits

from fi_backend import _core
from fi_backend.jit import host_compiler
from fi_backend.variants import Variant, derive_band, math, shipped
from fi_backend.variants.generate import SHIPPED_SOURCE, generate, main
from fi_backend.variants.printer import content_key
from fi_backend.variants.stages import bind_stages, compile_stages

INF = float("inf")


def visible(variant: Variant, tile: Tile, **params: Any) -> list[list[int]]:
    """Which columns of each row the compiled mask lets through."""
    out = run_logits(variant, tile, torch.zeros(len(tile.q_pos), tile.num_cols), **params)
    return [[j for j, x in enumerate(row) if x == 0] for row in out.tolist()]


def test_causal() -> None:
    assert visible(shipped.causal(), make_tile(3, 5, q_pos=[0, 2, 9])) == [
        [0],
        [0, 1, 2],
        [0, 1, 2, 3, 4],
    ]


def test_sliding_window() -> None:
    tile = make_tile(2, 6, q_pos=[4, 5])
    assert visible(shipped.sliding_window(2), tile) == [[3, 4, 5], [4, 5]]
    assert visible(shipped.sliding_window(2, sink_prefix=1), tile) == [[0, 3, 4, 5], [0, 4, 5]]


def test_soft_cap() -> None:
    out = run_logits(shipped.soft_cap(2.0), make_tile(1, 4), torch.tensor([[0.0, 2.0, -2.0, INF]]))
    assert out.tolist() == [pytest.approx([0.0, 1.5231884, -1.5231884, 2.0])]


def test_alibi_is_slope_times_distance() -> None:
    tile = make_tile(2, 3, q_pos=[2, 2], q_head=[0, 1])
    out = run_logits(shipped.alibi(), tile, torch.ones(2, 3), slopes=torch.tensor([0.5, 0.25]))
    assert out.tolist() == [[0.0, 0.5, 1.0], [0.5, 0.75, 1.0]]


def test_custom_mask_bits_are_little_endian_rows() -> None:
    # Request 1 has two query tokens at positions 8 and 9; its bit rows start at row 1.
    tile = make_tile(2, 10, q_pos=[8, 9], q_len=2, kv_len=10, request=1)
    bits = torch.tensor([[255, 255], [0b10000001, 0b00000001], [0b00000010, 0b00000010]])
    params = {"mask_bits": bits.to(torch.uint8), "mask_offset": torch.tensor([0, 1]).int()}
    assert visible(shipped.custom_mask(), tile, **params) == [[0, 7, 8], [1, 9]]


def test_tree_mask_sees_the_past_and_ancestors() -> None:
    # Tokens 5, 6, 7 of the batch are a request's new tokens; 6 and 7 are both children of 5.
    tile = make_tile(3, 5, q_pos=[2, 3, 4], q_len=3, kv_len=5, token=[5, 6, 7])
    bits = torch.zeros(8, 1, dtype=torch.int32)
    bits[5:, 0] = torch.tensor([0b001, 0b011, 0b101])
    assert visible(shipped.tree_mask(), tile, tree_bits=bits) == [
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 4],
    ]


def test_tree_mask_uses_the_sign_bit_and_later_words() -> None:
    tile = make_tile(1, 34, q_pos=33, q_len=34, kv_len=34)
    bits = torch.tensor([[-(2**31), 2]], dtype=torch.int32)
    assert visible(shipped.tree_mask(), tile, tree_bits=bits) == [[31, 33]]


def test_sigmoid_attention_masks_with_zero() -> None:
    variant = shipped.causal().then(shipped.sigmoid_attention(bias=1.0))
    out = run_logits(variant, make_tile(1, 3, q_pos=1), torch.tensor([[-1.0, 0.0, 0.0]]))
    assert out.tolist() == [pytest.approx([0.5, 0.7310586, 0.0])]


def test_masked_logits_are_not_edited_again() -> None:
    variant = shipped.causal().then(shipped.soft_cap(1.0))
    out = run_logits(variant, make_tile(1, 2, q_pos=0), torch.tensor([[9.0, 9.0]]))
    assert out.tolist() == [[pytest.approx(1.0), -INF]]


def custom_params(g: torch.Generator, tile: Tile) -> dict[str, Tensor]:
    pitch = (tile.kv_begin + tile.num_cols + 7) // 8
    bits = torch.randint(0, 256, (64, 2 * pitch), generator=g, dtype=torch.uint8)
    return {"mask_bits": bits[:, :pitch], "mask_offset": torch.tensor([3, 0, 40]).int()}


def tree_params(g: torch.Generator, tile: Tile) -> dict[str, Tensor]:
    words = torch.randint(-(2**31), 2**31, (64, 16), generator=g)
    return {"tree_bits": words.int()}


def head_params(name: str) -> Callable[[torch.Generator, Tile], dict[str, Tensor]]:
    return lambda g, tile: {name: torch.rand(8, generator=g)}


@dataclass(frozen=True)
class Random:
    variant: Variant
    params: Callable[[torch.Generator, Tile], dict[str, Tensor]] = field(default=lambda g, tile: {})


RANDOM = [
    Random(shipped.causal()),
    Random(shipped.sliding_window(37, 3)),
    Random(shipped.soft_cap(30.0)),
    Random(shipped.alibi(), head_params("slopes")),
    Random(shipped.sinks(), head_params("sinks")),
    Random(shipped.custom_mask(), custom_params),
    Random(shipped.tree_mask(), tree_params),
    Random(shipped.sigmoid_attention(-2.0)),
    Random(
        shipped.alibi().then(shipped.soft_cap(5.0)).then(shipped.causal()), head_params("slopes")
    ),
]


def random_tile(g: torch.Generator, rows: int, cols: int) -> Tile:
    def draw(high: int) -> Tensor:
        return torch.randint(0, high, (rows,), generator=g, dtype=torch.int32)

    q_len = draw(20) + 1
    kv_len = q_len + draw(80)
    q_pos = kv_len - q_len + draw(1000) % q_len
    return Tile(q_pos, draw(64), draw(8), draw(3), q_len, kv_len, int(draw(30)[0]), cols)


@pytest.mark.parametrize("case", RANDOM, ids=lambda c: c.variant.name)
def test_compiled_code_agrees_with_the_oracle(case: Random) -> None:
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        tile = random_tile(g, rows=7, cols=(1, 5, 16, 67)[seed % 4])
        params = case.params(g, tile)
        wide = torch.randn(7, tile.num_cols + 3, generator=g) * 20
        logits = wide[:, : tile.num_cols]  # rows are strided
        got = run_chain(bind_stages(case.variant, params), tile, logits)
        expected = oracle_chain(case.variant, tile, logits, params)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_neighbours_of_a_strided_tile_stay_untouched() -> None:
    wide = torch.ones(4, 40)
    bound = bind_stages(shipped.soft_cap(0.5))
    run(bound.stages[0][0], make_tile(4), bound.stages[0][4], wide[:, 4:21], -INF)
    assert (wide[:, :4] == 1).all()
    assert (wide[:, 21:] == 1).all()
    assert (wide[:, 4:21] < 0.5).all()


def test_mask_kinds() -> None:
    bound = bind_stages(shipped.sliding_window(4))
    _, _, kind, _, params = bound.stages[0]
    box = make_tile(2, 4, q_pos=[8, 9]).box()
    window = {"empty": (0, 4), "mixed": (4, 6), "full": (6, 10)}
    for expected, (begin, end) in window.items():
        here = {**box, "kv_pos_min": begin, "kv_pos_max": end - 1}
        assert mask_kind(kind, here, params) == expected
    tensor_mask = compile_stages(shipped.tree_mask())[0].mask_kind_addr
    new = make_tile(1, 4, q_pos=5, q_len=4, kv_len=8, kv_begin=4).box()
    assert mask_kind(tensor_mask, new, [(0, (0, 0, 0), 0.0)]) == "mixed"
    old = {**new, "kv_pos_min": 0, "kv_pos_max": 3}
    assert mask_kind(tensor_mask, old, [(0, (0, 0, 0), 0.0)]) == "full"


def test_bands() -> None:
    bands = {
        (v.name): (b.left, b.right, b.sink_prefix)
        for v in [*shipped.all_shipped(), shipped.causal().then(shipped.sliding_window(128, 4))]
        for b in [derive_band(v)]
    }
    unbounded = (-1, -1, 0)
    assert bands == {
        "causal": (-1, 0, 0),
        "sliding_window": (0, -1, 0),
        "soft_cap": unbounded,
        "alibi": unbounded,
        "sinks": unbounded,
        "custom_mask": unbounded,
        "tree_mask": unbounded,
        "sigmoid": unbounded,
        "causal+sliding_window": (127, 0, 4),
    }


def test_the_committed_source_is_what_the_definitions_give() -> None:
    assert SHIPPED_SOURCE.read_text() == generate()
    assert main(["--check"]) == 0


def test_an_equal_function_of_the_user_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def capped(other: Any, logit: Any) -> Any:
        ratio = logit / other
        return other * math.tanh(ratio)

    def refuse() -> None:
        raise AssertionError("looked for a compiler")

    monkeypatch.setattr(host_compiler, "find_compiler", refuse)
    params = (shipped.Scalar("other", float, 30.0),)
    mine = Variant("mine", logits=capped, params=params)
    theirs = shipped.soft_cap(50.0)
    assert compile_stages(mine)[0].logits_addr == compile_stages(theirs)[0].logits_addr


def test_the_core_finds_functions_by_content_alone() -> None:
    (function,) = shipped.causal().all_functions()
    run_addr, kind_addr = _core.find_variant_function(content_key(function))
    assert run_addr and kind_addr
    assert _core.find_variant_function("0" * 64) is None
