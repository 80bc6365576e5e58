"""The CPU engine through _core: every instruction set of this machine against float64."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from core_attention import ISAS, STALE, CoreCase, CoreRun, assert_close

from fi_backend import _core, plan_records

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
MIXED = ((1, 100), (40, 70), (0, 0), (3, 64), (1, 1))

CASES = [
    CoreCase("decode", ((1, 300), (1, 16), (1, 17), (1, 15))),
    CoreCase("mixed_steps", MIXED, dtype=BF16),
    CoreCase("prefill_over_tile_edges", ((65, 65), (64, 129), (127, 128)), dtype=FP16),
    CoreCase("one_head_group", ((3, 40), (20, 90)), heads=(3, 3, 96, 96)),
    CoreCase("odd_group", ((1, 200), (20, 33)), heads=(7, 1, 128, 128), dtype=BF16),
    CoreCase("wide_group", ((1, 150), (2, 70)), heads=(16, 1, 64, 64)),
    CoreCase("odd_eighths", ((1, 50), (30, 60)), heads=(4, 2, 40, 72), dtype=BF16),
    CoreCase("smallest_and_largest_dims", ((2, 30), (20, 80)), heads=(2, 1, 256, 32)),
    CoreCase("fp8_cache", MIXED, heads=(4, 2, 104, 64), dtype=BF16, kv_dtype=FP8, scales=True),
    CoreCase("fp8_cache_of_fp16", MIXED, dtype=FP16, kv_dtype=FP8, page_size=3),
    CoreCase("scales", MIXED, dtype=FP16, scales=True),
    CoreCase("hnd", MIXED, layout="hnd", dtype=BF16),
    CoreCase("packed", MIXED, layout="packed", heads=(4, 2, 72, 40), page_size=5),
    CoreCase("page_of_one", MIXED, page_size=1, table="csr"),
    CoreCase("csr", MIXED, table="csr"),
    CoreCase("indirect_slots", MIXED, table="indirect", page_size=4),
    CoreCase("mapped", MIXED, table="mapped"),
    CoreCase("window", ((9, 500), (100, 100)), band=(30, 0, 0), dtype=BF16),
    CoreCase("window_with_sink_prefix", ((9, 500), (100, 300)), band=(30, 0, 5), dtype=BF16),
    CoreCase("no_mask", ((9, 100), (33, 200)), band=(-1, -1, 0)),
    CoreCase("two_sided_band", ((9, 100), (33, 200)), band=(10, 20, 3)),
    CoreCase("rows_before_the_first_token", ((5, 3), (40, 10))),
    CoreCase("many_splits", ((1, 5000),), heads=(5, 1, 128, 128), dtype=BF16, num_ctas=13),
    CoreCase("more_threads_than_work", ((1, 5),), num_ctas=1),
]
PREFIX = (0, 64, (0, 1, 2))
NODE_CASES = [
    CoreCase("shared_by_decodes", ((1, 200), (1, 100), (1, 65)), nodes=(PREFIX,)),
    CoreCase(
        "two_levels_two_groups",
        ((2, 300), (1, 200), (7, 90), (1, 400), (3, 270)),
        heads=(6, 2, 64, 64),
        nodes=((0, 64, (0, 1, 2)), (0, 128, (3, 4)), (64, 192, (0, 1))),
        num_ctas=11,
    ),
    CoreCase(
        "rows_over_many_tiles",
        ((40, 160), (30, 100), (50, 200)),
        heads=(4, 1, 64, 64),
        dtype=BF16,
        nodes=(PREFIX,),
    ),
    CoreCase("window_inside_node", ((1, 90), (1, 200)), band=(50, 0, 4), nodes=((0, 64, (0, 1)),)),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert _core.force_isa(request.param)
    yield request.param
    _core.force_isa("auto")


@pytest.mark.parametrize("case", CASES + NODE_CASES, ids=str)
def test_matches_float64(case: CoreCase, isa: str) -> None:
    run = CoreRun(case)
    assert_close(run.run(), run.expected())


def test_random_steps_match_float64() -> None:
    rng = random.Random(7)
    for seed in range(60):
        lengths = tuple(
            (q_len, q_len + rng.choice((0, rng.randrange(300))))
            for q_len in (rng.choice((0, 1, 1, 2, 70)) for _ in range(rng.randint(1, 5)))
        )
        kv_heads = rng.choice((1, 2))
        case = CoreCase(
            f"random {seed}",
            lengths,
            heads=(kv_heads * rng.randint(1, 9), kv_heads, rng.randrange(8, 137, 8), 8),
            dtype=rng.choice((BF16, FP16, torch.float32)),
            page_size=rng.choice((1, 7, 16, 32)),
            layout=rng.choice(("nhd", "hnd", "packed")),
            table=rng.choice(("dense", "indirect", "csr", "mapped")),
            band=rng.choice(((-1, 0, 0), (rng.randrange(200), 0, rng.randrange(9)))),
            num_ctas=rng.randint(1, 12),
            seed=seed,
        )
        run = CoreRun(case)
        assert_close(run.run(), run.expected())


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_output_is_the_rounded_fp32_output(dtype: torch.dtype, isa: str) -> None:
    case = CoreCase("mixed", MIXED, dtype=dtype, heads=(4, 2, 64, 40))
    wide, _ = CoreRun(case).run()
    narrow, _ = CoreRun(replace(case, out_dtype=dtype)).run()
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("case", [CASES[1], CASES[22], *NODE_CASES], ids=str)
def test_equal_bits_whatever_the_threads(case: CoreCase, isa: str) -> None:
    run = CoreRun(case)
    first, first_lse = run.run(1)
    for threads in (2, 3, 2):
        again, again_lse = run.run(threads)
        assert torch.equal(again, first)
        assert torch.equal(again_lse, first_lse)


@pytest.mark.parametrize("dtype", [FP8, FP16, BF16], ids=str)
def test_every_value_of_a_narrow_cache_is_read_exactly(dtype: torch.dtype, isa: str) -> None:
    # One visible token per request has weight 1, so the output is its V row.
    requests = 1 if dtype == FP8 else 256
    case = CoreCase("values", ((1, 1),) * requests, heads=(1, 1, 8, 256), kv_dtype=dtype)
    run = CoreRun(case)
    width = np.uint8 if dtype == FP8 else np.uint16
    values = torch.from_numpy(np.arange(requests * 256, dtype=width)).view(dtype)
    run.k.view(torch.uint8).zero_()
    rows = torch.tensor([pages[0] for pages in run.pages])
    run.v[rows, 0, 0] = values.view(requests, 256)
    out, _ = run.run()
    want = values.float()
    assert torch.equal(torch.isnan(out.flatten()), torch.isnan(want))
    assert torch.equal(out.flatten().nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))


def set_items(run: CoreRun, ranges: list[tuple[int, int]], hole: tuple[int, int]) -> None:
    """Replace the plan of a one-tile request by one item per CTA, a KV range each."""
    arrays = plan_records.plan_arrays(run.plan.numpy(), run.layout)
    items, count = np.repeat(arrays["items"][:1], len(ranges)), len(ranges)
    items["kv_begin"], items["kv_end"] = zip(*ranges, strict=True)
    items["hole_begin"], items["hole_end"] = hole
    rows = int(items["num_rows"][0])
    items["partial_row"] = np.arange(count) * rows
    unit = np.array([count, 0, count, rows], np.int32)  # expected, partial_row, splits, rows
    layout, memory = run.layout, run.plan.numpy()
    for offset, array in (
        (layout.items, items),
        (layout.cta_ptr, np.arange(count + 1, dtype=np.int32)),
        (layout.units, unit),
    ):
        memory[offset:][: array.nbytes] = array.view(np.uint8)


def test_cuts_and_hole_by_hand_equal_the_whole() -> None:
    # One query at 199 sees [0, 24) and [100, 200); the pages inside the hole are not there.
    case = CoreCase("hand", ((1, 200),), heads=(4, 1, 64, 64), num_ctas=3, band=(99, 0, 24))
    run = CoreRun(case)
    set_items(run, [(0, 7), (7, 110), (110, 200)], hole=(24, 100))
    run.entries[0, 2:6] = STALE
    for threads in (1, 3):
        assert_close(run.run(threads), run.expected())


def test_weights_are_exponentials_to_a_few_ulp(isa: str) -> None:
    # Logits x and 0, values 1 and 0: the output is e^x / (e^x + 1), and 0 below -87.3.
    run = CoreRun(CoreCase("exp", ((4096, 2),), heads=(1, 1, 8, 8), band=(-1, -1, 0)))
    x = -100 * torch.rand(4096, generator=torch.Generator().manual_seed(1))
    run.params.scale = 1.0
    run.q.zero_()
    run.q[:, 0, 0] = x
    for cache in (run.k, run.v):
        tokens = cache[run.pages[0][0], :2, 0]
        tokens.zero_()
        tokens[0, 0] = 1
    got = run.run()[0][:, 0, 0].double()
    error = got / torch.sigmoid(x.double()) - 1
    assert (error.abs()[x > -87.3] < 2.5e-7).all()
    assert (got[x < -87.31] == 0).all()


@pytest.mark.parametrize("q_len", [1, 30], ids=["few_rows", "many_rows"])
def test_nan_of_an_earlier_call_is_gone(q_len: int, isa: str) -> None:
    earlier = CoreRun(CoreCase("larger", ((64, 64),), heads=(1, 1, 256, 256)))
    earlier.q.fill_(math.nan)
    assert earlier.run(1)[0].isnan().all()
    run = CoreRun(CoreCase("odd eighths", ((q_len, 60),), heads=(1, 1, 40, 72)))
    assert_close(run.run(1), run.expected())


def test_empty_batch_writes_nothing() -> None:
    run = CoreRun(CoreCase("empty", ((0, 0), (0, 9))))
    out, lse = run.run()
    assert out.numel() == 0
    assert lse.numel() == 0


def test_rows_that_see_nothing_are_zero_with_lse_minus_infinity(isa: str) -> None:
    out, lse = CoreRun(CoreCase("kv shorter", ((5, 3), (2, 0)))).run()
    assert torch.equal(out[[0, 1, 5, 6]], torch.zeros(4, 4, 64))
    assert torch.equal(lse[[0, 1, 5, 6]], torch.full((4, 4), -math.inf))


def test_forced_isa_is_reported() -> None:
    for name in ISAS:
        assert _core.force_isa(name)
        assert _core.active_isa() == name
    assert not _core.force_isa("v9")
    assert _core.active_isa() == ISAS[-1]
    assert _core.force_isa("auto")
    assert _core.active_isa() == ISAS[-1]


def test_threads_start_again_in_a_forked_child() -> None:
    run = CoreRun(CASES[1])
    want, _ = run.run(3)
    child = os.fork()
    if child == 0:
        got, _ = run.run(3)
        os._exit(0 if torch.equal(got, want) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: setattr(p, "plan", 0), "expected a plan and its tile classes"),
        (lambda p: setattr(p, "heads", _core.HeadShape(3, 2, 64, 64)), "divide num_qo_heads"),
        (lambda p: setattr(p, "heads", _core.HeadShape(4, 2, 60, 64)), "multiples of 8, got 60"),
        (lambda p: setattr(p, "q_dtype", 9), "q_dtype: expected a dtype code in 0..3, got 9"),
        (lambda p: p.set_classes([]), "expected 1 to 4 tile classes, got 0"),
    ],
)
def test_bad_parameters_are_refused(change: object, message: str) -> None:
    run = CoreRun(CASES[0])
    with pytest.raises(ValueError, match=message):
        change(run.params)
        _core.run_attention(run.params, 1)


def test_bad_thread_count_is_refused() -> None:
    with pytest.raises(ValueError, match="num_threads: expected at least 1, got 0"):
        _core.run_attention(CoreRun(CASES[0]).params, 0)
