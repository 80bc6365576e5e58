"""Correctness before time: a sample of query rows against fp64, on the device that ran them.

Rows [begin, end) of a request whose queries end its KV are a request of their own, with the KV up
to ``end``: so the oracle of the tests serves, on a batch of such pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fi_backend as fi
from e2e_bench.gpu_data import Data
from e2e_bench.workloads import Workload
from fi_backend.oracle import Problem, solve
from fi_backend.tolerance import plain_torch_error

MAX_REQUESTS = 12  # evenly spread over the batch, beside the longest
MAX_PIECES = 16
PIECE_ROWS = 48  # query tokens of a piece: tile edges of 16, 32 and 64 rows over groups of heads


class WrongResult(AssertionError):
    """An output that is further from the oracle than it may be."""


@dataclass(frozen=True)
class Piece:
    """Query tokens [begin, end) of a request."""

    request: int
    begin: int
    end: int


def pieces(workload: Workload) -> list[Piece]:
    """Return the rows that are checked.

    Requests: first, last, those with most KV and most queries, others evenly between. Of each: its
    last, first and middle query tokens.
    """
    q_lens, kv_lens = workload.q_lens, workload.kv_lens
    count = len(kv_lens)
    longest = [max(range(count), key=lens.__getitem__) for lens in (kv_lens, q_lens)]
    between = range(0, count, max(1, count // MAX_REQUESTS))
    found: dict[Piece, None] = {}
    for request in dict.fromkeys([0, count - 1, *longest, *between]):
        last = max(0, q_lens[request] - PIECE_ROWS)
        for begin in (last, 0, last // 2):
            found[Piece(request, begin, min(begin + PIECE_ROWS, q_lens[request]))] = None
    return list(found)[:MAX_PIECES]


@dataclass(frozen=True, eq=False)
class Expected:
    """What a piece should be.

    Attributes:
        rows: int64 [rows], of q and out.
        exact: float64 [rows, num_qo_heads, head_dim].
        plain: largest error of plain torch.
        limit: largest error that is accepted. Of this piece alone: outputs over few KV tokens are
            large, and their limit would hide any error over many.
    """

    rows: Tensor
    exact: Tensor
    plain: float
    limit: float


class Reference:
    """The oracle's result for a sample of rows, and how far plain torch is from it."""

    def __init__(self, data: Data) -> None:
        """Solve the sample on layer 0 of the data."""
        starts = data.qo_indptr.tolist()
        # Sums of plain torch are fp32 sums: the limit must not grow with a shortcut of the library.
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_bf16_reduced_precision_reduction
        matmul.allow_bf16_reduced_precision_reduction = False
        try:
            with data.device:  # the oracle makes its tensors on the default device
                self._expected = [
                    _expect(data, piece, starts[piece.request]) for piece in pieces(data.workload)
                ]
        finally:
            matmul.allow_bf16_reduced_precision_reduction = before

    def error_ratio(self, out: Tensor) -> float:
        """Return the largest error over that of plain torch.

        Raises:
            WrongResult: an error beyond the limit, or anything that is not finite anywhere.
        """
        bad = (~out.isfinite()).flatten(1).any(1).nonzero().flatten()
        if bad.numel():
            raise WrongResult(f"{bad.numel()} tokens are not finite, the first {int(bad[0])}")
        return max(_error_ratio(out, expected) for expected in self._expected)


def _expect(data: Data, piece: Piece, start: int) -> Expected:
    workload, request = data.workload, piece.request
    rows = torch.arange(start + piece.begin, start + piece.end)
    seen = workload.kv_lens[request] - workload.q_lens[request] + piece.end
    batch = fi.PagedBatch(
        torch.tensor([0, piece.end - piece.begin], dtype=torch.int32),
        torch.tensor([seen], dtype=torch.int32),
        fi.PageTable.dense(data.table[request : request + 1], workload.page),
    )
    problem = Problem(batch, data.q[rows], fi.KvCacheView.nhd(*data.layers[0]))
    exact, plain = solve(problem)[0], plain_torch_error(problem).o
    rounding = float(exact.abs().max()) * torch.finfo(data.q.dtype).eps / 2
    return Expected(rows, exact, plain, 2 * plain + rounding)


def _error_ratio(out: Tensor, expected: Expected) -> float:
    errors = (out[expected.rows].double() - expected.exact).abs()
    worst = float(errors.max())
    if worst > expected.limit:
        token = int(expected.rows[errors.flatten(1).max(1).values.argmax()])
        raise WrongResult(f"error {worst:.3g} > {expected.limit:.3g} at token {token}")
    return worst / expected.plain
