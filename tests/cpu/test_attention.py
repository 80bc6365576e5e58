"""The CPU engine against the oracle: named cases, random ones, equal bits on repeat."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import Case, make_out, make_problem
from named_cases import CASES, capacity_of, random_case
from running import Place, Result, check, compare, make_layer, num_threads, run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_named(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("block", range(10))
def test_random(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        case = random_case(seed)
        try:
            check(case, num_ctas=(None, 1, 3, 50)[seed % 4])
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_one_key_gives_its_value() -> None:
    case = Case("one", ((1, 1),))
    problem = make_problem(case)
    result = run(case, problem)
    page = int(problem.batch.page_table.entries[0, 0])
    k, v = (t[page, 0].repeat_interleave(2, dim=0) for t in (problem.kv.k, problem.kv.v))
    torch.testing.assert_close(result.out[0], v)
    torch.testing.assert_close(result.lse[0], (problem.q[0] * k).sum(-1) / 8)


def test_rows_that_see_nothing() -> None:
    case = Case("blind", ((3, 1),))
    result = run(case, make_problem(case))
    assert (result.out[:2] == 0).all() and (result.lse[:2] == -math.inf).all()
    assert result.out[2].isfinite().all() and result.lse[2].isfinite().all()


@pytest.mark.parametrize("name", ["mixed-bf16", "decode-long", "window-sinks"])
def test_equal_bits_on_repeat(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    problem = make_problem(case)
    first, second = run(case, problem), run(case, problem)
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)


@pytest.mark.parametrize("num_ctas", [1, 2, 7, 64])
def test_splits_agree_with_the_oracle(num_ctas: int) -> None:
    check(Case("split", ((1, 1200), (70, 300))), num_ctas)


def test_thread_counts_give_equal_bits() -> None:
    case = Case("threads", ((1, 900), (40, 200), (1, 5)))
    problem = make_problem(case)
    results = []
    for count in (1, 3):
        with num_threads(count):
            results.append(run(case, problem, num_ctas=12))
    assert torch.equal(results[0].out, results[1].out)
    compare(results[1], problem)


@pytest.mark.parametrize("variant", ["", "sinks", "gemma", "sigmoid"])
def test_partial_states(variant: str) -> None:
    """Before sinks and output transform, in float32 whatever the dtype of q."""
    case = Case("partial", ((1, 90), (12, 40)), dtype=torch.bfloat16, variant=variant)
    problem = dataclasses.replace(make_problem(case), partial=True)
    result = run(case, problem)
    assert result.out.dtype == torch.float32
    compare(result, problem)


@pytest.mark.parametrize("variant", ["", "gemma", "sinks"])
def test_torchs_default_device_changes_nothing(variant: str) -> None:
    """Engines build models under one: a tensor that names no device would land there."""
    case = Case("default-device", ((1, 300), (70, 90)), variant=variant)
    problem = make_problem(case)
    place = Place(capacity=capacity_of("any").with_sharing())
    out = make_out(case, problem)
    lse = torch.full(out.shape[:2], torch.nan)
    with torch.device("meta"):
        layer = make_layer(case, problem, place=place)
        layer.plan(problem.batch)
        layer(problem.q, problem.kv, out=out, lse=lse, params=problem.params)
    compare(Result(out, lse), problem)
