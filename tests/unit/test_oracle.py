"""The oracle against numbers worked out by hand and against torch's own attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from cases import Case, make_problem
from named_cases import CASES

from fi_backend.formats import CAUSAL, FULL, Band, KvCacheView, Nodes, PagedBatch, PageTable
from fi_backend.oracle import Problem, band_mask, locate, solve
from fi_backend.tolerance import assert_close, plain_torch_error
from fi_backend.variants.shipped import sigmoid_attention, sinks, soft_cap

LOG2 = math.log(2.0)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def two_keys(**changes: Any) -> Problem:
    """One query of ones, head dimension 4: keys of logits 2 and 2 + log 3, values 10 and 20."""
    k = torch.tensor([1.0, 1.0 + math.log(3.0) / 2]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
    v = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    fields = {
        "batch": PagedBatch(ints(0, 1), ints(2), PageTable.dense(ints(0).view(1, 1), 2)),
        "q": torch.ones(1, 1, 4),
        "kv": KvCacheView.nhd(k.contiguous(), v.contiguous()),
    }
    return Problem(**(fields | changes))


def expect(problem: Problem, o: float, lse: float) -> None:
    got_o, got_lse = solve(problem)
    torch.testing.assert_close(got_o, torch.full_like(got_o, o), rtol=0, atol=1e-6)
    torch.testing.assert_close(got_lse, torch.full_like(got_lse, lse), rtol=0, atol=1e-6)


def test_softmax_weights_one_to_three() -> None:
    expect(two_keys(), 17.5, 2 + math.log(4))


def test_scales() -> None:
    """scale 1 doubles the logits (1 / sqrt(4) is the default): weights 1 to 9."""
    expect(two_keys(scale=1.0), 19.0, 4 + math.log(10))
    half, third = torch.tensor(0.5), torch.tensor([1 / 3])
    expect(two_keys(q_scale=half, k_scale=torch.tensor([4.0])), 19.0, 4 + math.log(10))
    expect(two_keys(v_scale=third), 17.5 / 3, 2 + math.log(4))


def test_band_hides_keys() -> None:
    expect(two_keys(band=Band.window(1)), 20.0, 2 + math.log(3))
    expect(two_keys(band=Band(0, 0, sink_prefix=1)), 17.5, 2 + math.log(4))
    last = PagedBatch(ints(0, 2), ints(1), PageTable.dense(ints(0).view(1, 1), 2))
    o, lse = solve(two_keys(batch=last, q=torch.ones(2, 1, 4)))
    assert o[0].tolist() == [[0.0, 0.0]] and lse[0].item() == -math.inf  # before the first key
    assert o[1].tolist() == [[10.0, 10.0]]


def test_sinks_take_weight_and_enter_lse() -> None:
    params = {"sinks": torch.tensor([2 + math.log(4)])}
    expect(two_keys(variant=sinks(), params=params), 8.75, 2 + math.log(8))
    expect(two_keys(variant=sinks(), params=params, partial=True), 17.5, 2 + math.log(4))


def test_logits_transform_comes_after_the_scale() -> None:
    capped = math.tanh(2.0), math.tanh(2 + math.log(3))
    weights = [math.exp(x) for x in capped]
    expected = (10 * weights[0] + 20 * weights[1]) / sum(weights)
    expect(two_keys(variant=soft_cap(1.0)), expected, math.log(sum(weights)))


def test_without_softmax_weights_are_not_normalised() -> None:
    weights = [1 / (1 + math.exp(-x)) for x in (2, 2 + math.log(3))]
    problem = two_keys(variant=sigmoid_attention(), v_scale=torch.tensor(2.0))
    expect(problem, 2 * (10 * weights[0] + 20 * weights[1]), 0.0)
    hidden = dataclasses.replace(problem, band=Band.window(1))
    expect(hidden, 2 * 20 * weights[1], 0.0)


def test_band_mask() -> None:
    q_pos, kv_pos = torch.arange(2, 5), torch.arange(5)

    def rows(band: Band) -> list[str]:
        mask = band_mask(band, q_pos, kv_pos)
        return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]

    assert rows(CAUSAL) == ["xxx..", "xxxx.", "xxxxx"]
    assert rows(FULL) == ["xxxxx"] * 3
    assert rows(Band(1, 0)) == [".xx..", "..xx.", "...xx"]
    assert rows(Band(0, 1, 1)) == ["x.xx.", "x..xx", "x...x"]
    assert rows(Band(0, 0, 4)) == ["xxx..", "xxxx.", "xxxxx"]  # a prefix shows no later token


def test_locate_follows_nodes_and_maps() -> None:
    page_map = ints(*[7 * i % 16 for i in range(16)])
    table = PageTable.dense(torch.arange(12, dtype=torch.int32).view(3, 4), 2, page_map=page_map)
    nodes = Nodes(ints(2), ints(0), ints(4), ints(0, 1), ints(1), ints(0, 4))
    batch = PagedBatch(ints(0, 1, 2), ints(6, 6), table, nodes)
    pages, slots = locate(batch, 1, torch.arange(6))
    assert pages.tolist() == [7 * i % 16 for i in (8, 8, 9, 9, 6, 6)]  # row 2, then its own row 1
    assert slots.tolist() == [0, 1] * 3
    assert locate(batch, 0, torch.tensor([0, 5]))[0].tolist() == [0, 14]


@pytest.mark.parametrize("name", ["g5-d96", "chunked", "fp8", "sglang"])
def test_agrees_with_torch(name: str) -> None:
    """Causal requests by torch's attention on gathered float64 keys."""
    problem = make_problem(next(c for c in CASES if c.name == name))
    o, _ = solve(problem)
    indptr = problem.batch.qo_indptr.tolist()
    group = problem.q.shape[1] // problem.kv.k.shape[2]
    one = torch.ones(problem.kv.k.shape[2])
    scales = [
        one if s is None else s.expand(one.shape)
        for s in (problem.q_scale, problem.k_scale, problem.v_scale)
    ]
    for r in range(problem.batch.num_requests):
        kv_len, q = int(problem.batch.kv_len[r]), problem.q[indptr[r] : indptr[r + 1]].double()
        at = locate(problem.batch, r, torch.arange(kv_len))
        k, v = (t[at].double().transpose(0, 1) for t in (problem.kv.k, problem.kv.v))
        k, v = (
            k * (scales[0] * scales[1]).double()[:, None, None],
            v * scales[2].double()[:, None, None],
        )
        mask = torch.ones(q.shape[0], kv_len, dtype=torch.bool).tril(kv_len - q.shape[0])
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), mask
        )
        torch.testing.assert_close(o[indptr[r] : indptr[r + 1]], expected.transpose(0, 1))


def test_poison_is_never_read() -> None:
    for case in CASES:
        problem = make_problem(case)
        o, lse = solve(problem)
        assert o.isfinite().all() and not lse.isnan().any(), case.name


def test_inputs_have_spread() -> None:
    """Row maxima of logits reach 5: a softmax in low precision would show."""
    _, lse = solve(make_problem(Case("spread", ((1, 64),) * 8)))
    assert lse.median() > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_torch_passes_and_its_double_error_fails(dtype: torch.dtype) -> None:
    problem = make_problem(Case("plain", ((4, 90), (20, 20)), dtype=dtype))
    o, lse = solve(problem, dtype)
    assert_close(o.to(dtype), lse, problem)
    error = plain_torch_error(problem)
    exact, _ = solve(problem)
    exact[13, 2, 5] += 2 * error.o + 2 * float(exact.abs().max()) * torch.finfo(dtype).eps
    match = r"out: error .* > .* at token 13 \(request 1 of kv_len 20\), head 2, component \(5,\)"
    with pytest.raises(AssertionError, match=match):
        assert_close(exact.to(dtype), None, problem)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0])
def test_wrong_empty_rows_fail(wrong: float) -> None:
    problem = make_problem(Case("empty", ((2, 1),)))
    o, lse = solve(problem)
    assert_close(o, lse, problem)
    lse[0, 1] = wrong
    with pytest.raises(AssertionError, match="lse: error inf"):
        assert_close(o, lse, problem)


def test_wrong_shape_fails() -> None:
    problem = make_problem(Case("shape", ((2, 3),)))
    with pytest.raises(AssertionError, match="out: shape"):
        assert_close(torch.zeros(2, 4, 32), None, problem)


def test_equal_seeds_give_equal_problems() -> None:
    case = CASES[0]
    first, second, other = (make_problem(case, seed) for seed in (3, 3, 4))
    assert torch.equal(first.q, second.q) and not torch.equal(first.q, other.q)
