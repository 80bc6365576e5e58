"""Running a problem through the engine and holding the result against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from cases import Case, make_out, make_problem
from torch import Tensor

from fi_backend import Attention
from fi_backend.oracle import Problem
from fi_backend.tolerance import assert_close


@dataclass(frozen=True)
class Result:
    """What a call wrote; lse is None without softmax."""

    out: Tensor
    lse: Tensor | None


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Set torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_layer(case: Case, problem: Problem, num_ctas: int | None = None) -> Attention:
    return Attention(
        case.heads,
        case.dtype,
        kv_dtype=case.kv_dtype,
        band=case.band,
        variant=problem.variant,
        num_ctas=num_ctas,
    )


def run(case: Case, problem: Problem, num_ctas: int | None = None) -> Result:
    """Plan and run a problem; outputs are NaN before the call."""
    layer = make_layer(case, problem, num_ctas)
    layer.plan(problem.batch)
    out = make_out(case, problem)
    if problem.partial:
        out = out.float()
    softmax = problem.variant is None or problem.variant.softmax
    lse = torch.full(out.shape[:2], torch.nan) if softmax else None
    layer(
        problem.q,
        problem.kv,
        out=out,
        lse=lse,
        q_scale=problem.q_scale,
        k_scale=problem.k_scale,
        v_scale=problem.v_scale,
        params=problem.params,
        partial=problem.partial,
    )
    return Result(out, lse)


def compare(result: Result, problem: Problem) -> None:
    """Hold a result against the oracle; padding rows must not have been written."""
    with num_threads(1):  # many small products: threads only get in each other's way
        assert_close(result.out, result.lse, problem)
    assert result.out[problem.num_tokens :].isnan().all()


def check(case: Case, num_ctas: int | None = None, seed: int = 0) -> None:
    """Make, run and compare a case."""
    problem = make_problem(case, seed)
    compare(run(case, problem, num_ctas), problem)
