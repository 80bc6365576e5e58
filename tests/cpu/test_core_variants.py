"""Variants, sinks and partial states in the CPU engine; the stages are callbacks of this file."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import pytest
import torch
from core_attention import CoreCase, CoreRun, assert_close
from torch import Tensor
from variant_abi import CTile

BF16 = torch.bfloat16
LENGTHS = ((1, 100), (40, 70), (3, 64))
NODES = ((0, 32, (0, 1)),)
CAP = 3.0
EMPTY, FULL, MIXED = range(3)

TileCallback = ctypes.CFUNCTYPE(None, ctypes.POINTER(CTile), ctypes.POINTER(ctypes.c_float))
KindCallback = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.POINTER(ctypes.c_int32 * 10), ctypes.c_void_p
)


def view(tile: CTile, data: object) -> Tensor:
    """The edited matrix [num_rows, num_cols] as a tensor."""
    size = (tile.num_rows - 1) * tile.row_stride + tile.num_cols
    flat = (ctypes.c_float * size).from_address(ctypes.addressof(data.contents))
    tensor = torch.frombuffer(flat, dtype=torch.float32)
    return tensor.as_strided((tile.num_rows, tile.num_cols), (tile.row_stride, 1))


def tile_callback(edit: Callable[[CTile, Tensor], None]) -> object:
    return TileCallback(lambda tile, data: edit(tile.contents, view(tile.contents, data)))


def address(callback: object) -> int:
    return 0 if callback is None else ctypes.cast(callback, ctypes.c_void_p).value or 0


def words(tile: CTile, name: str) -> Tensor:
    return torch.tensor([getattr(tile.rows[r], name) for r in range(tile.num_rows)])[:, None]


def soft_cap(tile: CTile, logits: Tensor) -> None:
    logits.copy_(tile.params[0].scalar * torch.tanh(logits / tile.params[0].scalar))


def halve(_: CTile, logits: Tensor) -> None:
    logits.mul_(0.5)


def hide_odd_heads_tail(tile: CTile, logits: Tensor) -> None:
    """A row of an odd head sees only the first half of its request."""
    kv_pos = tile.kv_begin + torch.arange(tile.num_cols)
    seen = (words(tile, "q_head") % 2 == 0) | (kv_pos < words(tile, "kv_len") // 2)
    logits.masked_fill_(~seen, tile.masked_value)


def add_head(tile: CTile, output: Tensor) -> None:
    output.add_(words(tile, "q_head") + 0.25 * words(tile, "token"))


def expected(run: CoreRun, request: int, softmax: bool = True) -> tuple[Tensor, Tensor]:
    """Float64 o, lse of one request under soft_cap, halve and hide_odd_heads_tail."""
    logits, seen, v = run.logits(request)
    kv_len = run.case.lengths[request][1]
    odd = torch.arange(run.case.heads[0])[:, None, None] % 2 == 1
    seen = seen & ~(odd & (torch.arange(kv_len) >= kv_len // 2))
    logits = 0.5 * CAP * torch.tanh(logits / CAP)
    if not softmax:
        return torch.einsum("hqk,khd->qhd", logits * seen, v), torch.zeros(())
    logits = logits.masked_fill(~seen, -math.inf)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v), torch.logsumexp(logits, -1).T


def all_expected(run: CoreRun, softmax: bool = True) -> tuple[Tensor, Tensor]:
    parts = [expected(run, r, softmax) for r in range(len(run.case.lengths))]
    lse = torch.cat([lse for _, lse in parts]) if softmax else torch.zeros(())
    return torch.cat([o for o, _ in parts]), lse


def set_chain(run: CoreRun, softmax: bool = True, sinks: int = 0, output: object = None) -> None:
    """Two logits stages; the second one also masks."""
    cap, half, hide = (tile_callback(f) for f in (soft_cap, halve, hide_odd_heads_tail))
    run.keep += [cap, half, hide, output]
    stages = [
        (address(cap), 0, 0, 0, [(0, (0, 0, 0), CAP)]),
        (address(half), address(hide), 0, address(output), []),
    ]
    run.params.set_variant(stages, softmax, sinks)


@pytest.mark.parametrize("nodes", [(), NODES], ids=["plain", "nodes"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_stages_run_in_order_then_masks(nodes: tuple[object, ...], dtype: torch.dtype) -> None:
    run = CoreRun(CoreCase("variant", LENGTHS, dtype=dtype, nodes=nodes))
    set_chain(run)
    assert_close(run.run(), all_expected(run))


@pytest.mark.parametrize("nodes", [(), NODES], ids=["plain", "nodes"])
def test_without_softmax_states_add_and_lse_is_left_alone(nodes: tuple[object, ...]) -> None:
    run = CoreRun(CoreCase("variant", LENGTHS, nodes=nodes, scales=True, num_ctas=9))
    set_chain(run, softmax=False)
    out, lse = run.run()
    want, _ = all_expected(run, softmax=False)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=3e-5)
    assert lse.isnan().all()


def test_sinks_take_weight_once_and_enter_lse_then_the_output_transform_runs() -> None:
    run = CoreRun(CoreCase("sinks", LENGTHS, scales=True, nodes=NODES, num_ctas=9))
    sinks = torch.tensor([-1.0, 2.0, -math.inf, 0.5])
    set_chain(run, sinks=sinks.data_ptr(), output=tile_callback(add_head))
    out, lse = run.run()
    o, state = all_expected(run)
    with_sink = torch.logaddexp(state, sinks.double())
    head, token = torch.arange(4)[:, None], torch.arange(o.shape[0])[:, None, None]
    want = o * (state - with_sink).exp()[..., None] + head + 0.25 * token
    assert_close((out, lse), (want, with_sink))
    run.params.partial = True
    assert_close(run.run(), (o, state))


def test_empty_row_with_a_sink_has_the_sinks_lse() -> None:
    run = CoreRun(CoreCase("empty", ((2, 0), (1, 20))))
    sinks = torch.tensor([0.5, -math.inf, 1.0, -2.0])
    run.params.set_variant([], True, sinks.data_ptr())
    out, lse = run.run()
    assert torch.equal(out[:2], torch.zeros(2, 4, 64))
    assert torch.equal(lse[:2], sinks.expand(2, 4))
    assert out[2].isfinite().all()


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "sum"])
@pytest.mark.parametrize("q_len", [1, 40], ids=["few_rows", "many_rows"])
def test_columns_hidden_from_all_rows_may_hold_nan(softmax: bool, q_len: int) -> None:
    run = CoreRun(CoreCase("hidden", ((q_len, 100),), band=(-1, -1, 0)))
    clean = CoreRun(run.case)
    # Scratch memory holds NaN from an earlier, larger call.
    earlier = CoreRun(CoreCase("nan", ((64, 64),), heads=(1, 1, 256, 256)))
    earlier.q.fill_(math.nan)
    assert earlier.run(1)[0].isnan().all()

    def hide_every_third(tile: CTile, logits: Tensor) -> None:
        kv_pos = tile.kv_begin + torch.arange(tile.num_cols)
        logits.masked_fill_(kv_pos % 3 == 0, tile.masked_value)

    for kv_pos in range(0, 100, 3):
        page, slot = run.pages[0][kv_pos // 16], kv_pos % 16
        run.k[page, slot] = math.nan
        run.v[page, slot] = math.nan
    mask = tile_callback(hide_every_third)
    for one in (run, clean):
        one.params.set_variant([(0, address(mask), 0, 0, [])], softmax, 0)
    out, _ = run.run(1)
    want, clean_lse = clean.run(1)
    assert torch.equal(out, want)
    assert clean_lse.isnan().all() != softmax


def test_mask_kind_skips_empty_tiles_and_the_mask_of_full_ones() -> None:
    run = CoreRun(CoreCase("kinds", ((1, 200),), heads=(2, 1, 64, 64), num_ctas=1))
    masked_at: list[int] = []

    @KindCallback
    def kind(box: object, _: object) -> int:
        _, _, kv_min, kv_max, *rest = box.contents
        assert rest == [1, 1, 200, 200, 0, 1]
        return EMPTY if kv_max < 64 else FULL if kv_min >= 128 else MIXED

    def hide_below_64(tile: CTile, logits: Tensor) -> None:
        masked_at.append(tile.kv_begin)
        assert tile.kv_begin >= 64

    mask = tile_callback(hide_below_64)
    run.params.set_variant([(0, address(mask), address(kind), 0, [])], True, 0)
    got = run.run(1)
    logits, _, v = run.logits(0)
    logits[..., :64] = -math.inf
    o = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.double())
    assert_close(got, (o, torch.logsumexp(logits, -1).T))
    assert min(masked_at) == 64
    assert max(masked_at) < 128
