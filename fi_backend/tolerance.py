"""How far a kernel may be from the oracle: twice as far as plain torch in the same dtype.

Shared by tests and benchmarks, so that a time is only ever shown for a correct result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fi_backend.oracle import Problem, solve


class Errors(NamedTuple):
    """Largest absolute errors of one result."""

    o: float
    lse: float


def plain_torch_error(problem: Problem) -> Errors:
    """Return the errors of plain torch attention in the dtype of q on the same inputs.

    The largest over several orders of summation, the more the fewer rows there are: one order of
    one row is lucky now and then.
    """
    exact, (_, heads, dim) = solve(problem), problem.q.shape
    orders = min(max(1200 // (problem.num_tokens * heads + 1), 3), 12)
    found = [
        _errors(solve(problem, problem.q.dtype, dim * i // orders), exact) for i in range(orders)
    ]
    return Errors(max(e.o for e in found), max(e.lse for e in found))


def assert_close(out: Tensor, lse: Tensor | None, problem: Problem) -> None:
    """Raise AssertionError if a kernel errs more than it may.

    That is twice the error of plain torch, plus what rounding the largest element to the dtype of
    ``out`` (for lse: float32) may cost.

    Args:
        out: [num_tokens or more, num_qo_heads, head_dim_vo]; rows past the requests are ignored.
        lse: [num_tokens or more, num_qo_heads] or None.
        problem: what was computed.
    """
    exact, plain = solve(problem), plain_torch_error(problem)
    _compare("out", out, exact[0], 2 * plain.o, problem)
    if lse is not None:
        _compare("lse", lse, exact[1], 2 * plain.lse, problem)


def _errors(actual: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> Errors:
    differences = ((a.double() - e).abs() for a, e in zip(actual, exact, strict=True))
    finite = (d[d.isfinite()] for d in differences)  # -inf - -inf of empty rows
    return Errors(*(float(d.max()) if d.numel() else 0.0 for d in finite))


def _compare(name: str, actual: Tensor, exact: Tensor, limit: float, problem: Problem) -> None:
    finite = exact[exact.isfinite()].abs()
    if finite.numel():
        limit += float(finite.max()) * torch.finfo(actual.dtype).eps / 2
    actual = actual[: problem.num_tokens].double()
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape} instead of {exact.shape}"
    error = torch.where(actual == exact, 0.0, (actual - exact).abs()).nan_to_num(
        nan=math.inf, posinf=math.inf
    )
    if error.numel() == 0 or float(error.max()) <= limit:
        return
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    request = int(torch.searchsorted(problem.batch.qo_indptr, at[0], right=True)) - 1
    raise AssertionError(
        f"{name}: error {float(error.max()):.3g} > {limit:.3g} at token {at[0]} (request {request}"
        f" of kv_len {int(problem.batch.kv_len[request])}), head {at[1]}, component {at[2:]}:"
        f" got {float(actual[at])!r}, expected {float(exact[at])!r};"
        f" {int((error > limit).sum())} of {error.numel()} elements are off"
    )
