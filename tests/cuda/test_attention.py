"""The tensor-core kernels against the oracle: the cases of the CPU engine, and those that choose a
specialisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from cases import STALE, Case, make_out, make_problem
from named_cases import BF16, DECODES, FP8, FP16, MIXED, capacity_of, gpu_cases, heads
from named_cases import random_gpu_case as random_case
from placing import copy_to, elements_around, misplace, misplaced, to_device
from running import (
    Place,
    Result,
    check,
    check_problem,
    compare,
    layer_class_of,
    make_layer,
    run,
)
from specialisations import kernel_of, planned_kernels

import fi_backend as fi
from fi_backend.formats import Band
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.tolerance import assert_close

PAIRS = gpu_cases()
BLOCK = 20
NUM_CTAS = (None, 1, 3, 50)
# Where q, k and v start, in elements past an aligned address, and what is added to their rows.
PLACES = [(1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 3, 0), (4, 5, 6, 0), (7, 4, 1, 0), (0, 0, 0, 1),
          (3, 7, 2, 5)]  # fmt: skip


def kernels_of(test: str, arguments: Mapping[str, Any]) -> Iterator[DeviceKernel]:
    """The kernels of a test, for conftest to compile beforehand."""
    if "block" in arguments:
        for seed in range(BLOCK * arguments["block"], BLOCK * (arguments["block"] + 1)):
            yield from planned_kernels(random_case(seed))
    elif "case" in arguments:
        yield from planned_kernels(arguments["case"], arguments.get("step", "any"))
        if test == "test_unaligned":
            yield kernel_of(arguments["case"], aligned=False)
    elif "variant" in arguments:
        yield from planned_kernels(Case("any", MIXED, dtype=BF16, variant=arguments["variant"]))
    elif test == "test_unaligned_output":
        yield kernel_of(Case("any", MIXED, dtype=BF16), aligned=False)


def on(device: str, step: str = "any") -> Place:
    return Place(device, capacity_of(step))


@pytest.mark.parametrize(("step", "case"), PAIRS, ids=[f"{c.name}-{s}" for s, c in PAIRS])
def test_named(device: str, step: str, case: Case) -> None:
    check(case, place=on(device, step))


@pytest.mark.parametrize("block", range(15))
def test_random(device: str, block: int) -> None:
    for seed in range(BLOCK * block, BLOCK * (block + 1)):
        case = random_case(seed)
        try:
            check(case, NUM_CTAS[seed // 11 % 4], seed, on(device))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_one_key_gives_its_value(device: str) -> None:
    case = Case("one", ((1, 1),), dtype=BF16)
    problem = make_problem(case)
    result = run(case, problem, place=on(device, "decode"))
    page = int(problem.batch.page_table.entries[0, 0])
    k, v = (t[page, 0].repeat_interleave(2, dim=0) for t in (problem.kv.k, problem.kv.v))
    assert torch.equal(result.out[0], v)
    logits = (problem.q[0].float() * k.float()).sum(-1) / 8
    torch.testing.assert_close(result.lse[0], logits, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing(device: str) -> None:
    case = Case("blind", ((3, 1),), dtype=BF16)
    result = run(case, make_problem(case), place=on(device))
    assert (result.out[:2] == 0).all() and (result.lse[:2] == -math.inf).all()
    assert result.out[2].isfinite().all() and result.lse[2].isfinite().all()


@pytest.mark.parametrize("num_ctas", [None, 64])
@pytest.mark.parametrize("lengths", [((1, 500),), ((150, 400),)], ids=["decode", "prefill"])
def test_nan_in_a_query_shows(
    device: str, lengths: tuple[tuple[int, int], ...], num_ctas: int | None
) -> None:
    """In its own row alone, whichever CTA or warp meets it and whatever merges it."""
    case = Case("nan", lengths, dtype=BF16)
    problem = make_problem(case)
    problem.q[0, 1, 3] = math.nan
    result = run(case, problem, num_ctas, on(device))
    assert result.out[0, 1].isnan().all() and result.lse[0, 1].isnan()
    result.out[0, 1], result.lse[0, 1] = 0.0, 0.0
    assert result.out.isfinite().all() and result.lse.isfinite().all()


def test_what_one_request_left_in_shared_memory_is_not_seen_by_the_next(device: str) -> None:
    """One CTA takes them all; tokens past the end of the short ones have to be zeros there."""
    case = Case("left", ((1, 300), (1, 3), (1, 40), (70, 90)), heads(4, 128), BF16)
    problem = make_problem(case)
    pages = problem.batch.page_table.entries[0, : -(-300 // case.page_size)].long()
    problem.kv.v[pages] = math.nan
    result = run(case, problem, 1, on(device))
    assert result.out[0].isnan().all()
    assert result.out[1:73].isfinite().all() and result.lse[:73].isfinite().all()


def test_a_band_wider_than_any_request(device: str) -> None:
    wide, full = (
        dataclasses.replace(Case("wide", ((70, 200), (1, 90)), dtype=BF16), band=band)
        for band in (fi.Band(2**31 - 1, 2**31 - 1), fi.Band(-1, -1))
    )
    problem = make_problem(full)
    expected = run(full, problem, place=on(device))
    actual = run(wide, dataclasses.replace(problem, band=wide.band), place=on(device))
    assert torch.equal(actual.out, expected.out) and torch.equal(actual.lse, expected.lse)


REPEATED = [c for _, c in PAIRS if c.name in ("mixed-bf16", "decode-long", "window-sinks", "fp8")]


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.name)
def test_equal_bits_on_repeat(device: str, case: Case) -> None:
    """Whoever arrives last merges, but always in the same order."""
    problem = make_problem(case)
    first = run(case, problem, 64, on(device))
    for _ in range(20):
        again = run(case, problem, 64, on(device))
        assert torch.equal(first.out.nan_to_num(), again.out.nan_to_num())
        assert torch.equal(first.lse.nan_to_num(), again.lse.nan_to_num())


@pytest.mark.parametrize("num_ctas", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "case",
    [
        Case("split", ((1, 1200), (70, 300)), heads(4, 128), BF16),
        Case("split-decode", ((1, 1500), (1, 3)), heads(4, 128), BF16, FP8),
        # More tiles in an item than a warp has lanes, which hold their page ids.
        Case("long", ((1, 4500), (70, 2300)), heads(4, 128), BF16),
        Case("long-parts-of-pages", ((1, 4500), (70, 2300)), heads(8), FP16, page_size=256),
    ],
    ids=lambda case: case.name,
)
def test_splits_agree_with_the_oracle(device: str, case: Case, num_ctas: int) -> None:
    check(case, num_ctas, place=on(device))


@pytest.mark.parametrize("variant", ["", "sinks", "gemma", "sigmoid"])
def test_partial_states(device: str, variant: str) -> None:
    """Before sinks and output transform, in float32 whatever the dtype of q."""
    case = Case("partial", ((1, 90), (12, 40)), dtype=BF16, variant=variant)
    problem = dataclasses.replace(make_problem(case), partial=True)
    result = check_problem(case, problem, place=on(device))
    assert result.out.dtype == torch.float32


UNALIGNED = [
    Case("bf16", MIXED, heads(4, 128), BF16),
    Case("fp16-d80", MIXED, heads(2, 80), FP16, page_size=1),
    Case("fp8", DECODES, heads(4, 128), BF16, FP8, scales="one"),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("case", UNALIGNED, ids=lambda case: case.name)
def test_unaligned(device: str, case: Case, place: tuple[int, int, int, int]) -> None:
    """Any element may come first and any stride may follow; what lies around is NaN."""
    q, k, v, widen = place
    check_problem(case, misplace(make_problem(case), q, k, v, widen), place=on(device))


def test_unaligned_output(device: str) -> None:
    case = Case("odd", MIXED, dtype=BF16)
    problem = make_problem(case)
    layer, there = make_layer(case, problem, 7, on(device)), to_device(problem, device)
    layer.plan(there.batch)
    out = copy_to(misplaced(make_out(case, problem), 3, 1), device)
    layer(there.q, there.kv, out=out)
    result = Result(copy_to(out, "cpu"), None)
    compare(result, problem)
    assert elements_around(result.out).isnan().all()


WINDOWED = [
    Case("decode", ((1, 400), (1, 77), (1, 20)), heads(4, 128), BF16, band=Band.window(50)),
    Case("chunk", ((90, 400), (5, 200)), heads(2), FP16, band=Band.window(33), page_size=3),
    Case("drafts-fp8", ((4, 900), (3, 64)), heads(4), BF16, FP8, band=Band.window(64)),
]


@pytest.mark.parametrize("case", WINDOWED, ids=lambda case: case.name)
@pytest.mark.parametrize("num_ctas", [None, 3])
def test_nothing_before_a_window_is_touched(device: str, case: Case, num_ctas: int | None) -> None:
    """Engines free those pages: their table entries are stale, their slots hold anything."""
    problem = make_problem(case)
    entries = problem.batch.page_table.entries
    for request, (q_len, kv_len) in enumerate(case.lengths):
        first = max(kv_len - q_len - case.band.left, 0)
        for j in range(first):
            page, slot = int(entries[request, j // case.page_size]), j % case.page_size
            problem.kv.k[page, slot] = problem.kv.v[page, slot] = torch.nan
        entries[request, : first // case.page_size] = STALE
    check_problem(case, problem, num_ctas, on(device))


def test_float32_output_of_a_whole_state(device: str) -> None:
    case = Case("wide", ((1, 90), (12, 40)), dtype=BF16)
    problem = make_problem(case)
    narrow = run(case, problem, place=on(device))
    layer, there = make_layer(case, problem, place=on(device)), to_device(problem, device)
    layer.plan(there.batch)
    wide = layer(there.q, there.kv, out=torch.empty_like(there.q, dtype=torch.float32))
    assert torch.equal(wide.to(BF16).cpu(), narrow.out)


def test_allocated_output_without_lse(device: str) -> None:
    case = Case("bare", ((1, 90), (12, 40)), dtype=BF16)
    problem = make_problem(case)
    layer, there = make_layer(case, problem, place=on(device)), to_device(problem, device)
    layer.plan(there.batch)
    out = layer(there.q, there.kv)
    assert (out.dtype, out.device) == (BF16, there.q.device)
    assert torch.equal(out.cpu(), run(case, problem, place=on(device)).out)


def test_the_convenience_grows(device: str) -> None:
    """fi.Attention builds a larger planner when a batch asks for one."""
    layer = fi.Attention(heads(2), BF16, device=device)
    for lengths in (((1, 20),), ((1, 20), (40, 200), (1, 1))):
        problem = make_problem(Case("grows", lengths, dtype=BF16))
        there = to_device(problem, device)
        layer.plan(there.batch)
        assert_close(layer(there.q, there.kv).cpu(), None, problem)


@pytest.mark.parametrize("num_ctas", [None, 3], ids=["a chunk a CTA", "chunks of a request a CTA"])
def test_batch_invariant_bits(num_ctas: int | None, device: str) -> None:
    """A request's bits do not depend on what else is in the batch."""
    case = Case("alone", ((7, 900),), heads(4, 128), BF16)
    company = dataclasses.replace(case, lengths=((7, 900), (1, 1500), (200, 300), (1, 5)))
    alone, among = make_problem(case), make_problem(company)
    pages = alone.batch.page_table.entries[0, :57].long()
    others = among.batch.page_table.entries[0, :57].long()
    among.kv.k[others], among.kv.v[others] = alone.kv.k[pages], alone.kv.v[pages]
    among.q[:7] = alone.q[:7]
    outs = []
    for one, problem in ((case, alone), (company, among)):
        planner = fi.StepPlanner(
            [layer_class_of(one, problem)],
            capacity_of("any"),
            device,
            batch_invariant_chunk=256,
            num_ctas=num_ctas,
        )
        there = to_device(problem, device)
        planner.plan(there.batch)
        out = make_out(one, problem).to(device)  # of NaN: every row has to be written
        fi.attention(planner.slot(0), there.q, there.kv, out=out)
        assert_close(out.cpu(), None, problem)
        outs.append(out[:7])
    assert torch.equal(*outs)
