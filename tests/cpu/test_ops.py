"""append_kv and merge_states: expected values, the oracle, every documented refusal."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Case, lay_out, make_problem
from running import compare, run

import fi_backend as fi
from fi_backend.oracle import solve

FP8 = torch.float8_e4m3fn


def pool(layout: str, dtype: torch.dtype, dim_vo: int = 16) -> fi.KvCacheView:
    return lay_out(
        layout,
        torch.full((5, 4, 2, 8), 7.0).to(dtype),
        torch.full((5, 4, 2, dim_vo), 7.0).to(dtype),
    )


@pytest.mark.parametrize("layout", ["nhd", "hnd", "packed", "slots", "stacked"])
def test_tokens_land_in_their_slots(layout: str) -> None:
    dim_vo = 8 if layout == "stacked" else 16
    kv = pool(layout, torch.float32, dim_vo)
    fused = torch.randn(4, 5, 16)
    k, v = fused[:, :2, :8], fused[:, 2:4, :dim_vo]
    slots = torch.tensor([19, -1, 0, 6])
    fi.append_kv(k, v, kv, slots)
    for cache, new in ((kv.k, k), (kv.v, v)):
        expected = torch.full((20, *cache.shape[2:]), 7.0)
        expected[[19, 0, 6]] = new[[0, 2, 3]]
        assert torch.equal(cache.reshape(20, *cache.shape[2:]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float8_saturates_and_rounds_to_even(dtype: torch.dtype) -> None:
    """Between 16 and 18 float8 holds nothing: 17 goes to the even 16, 19 to the even 20."""
    values = torch.tensor([17.0, 19.0, 1000.0, -1000.0, 448.0, 464.0, 0.001953125, -0.0]).to(dtype)
    kv = pool("nhd", FP8, 8)
    fi.append_kv(values.expand(1, 2, 8), values.expand(1, 2, 8), kv, torch.tensor([5]))
    expected = [16.0, 20.0, 448.0, -448.0, 448.0, 448.0, 0.001953125, -0.0]
    assert kv.k[1, 1, 0].float().tolist() == expected
    assert kv.v[1, 1, 1].float().tolist() == expected


def test_float8_stores_values_over_their_scale() -> None:
    kv, k = pool("hnd", FP8, 8), torch.full((1, 2, 8), 6.0, dtype=torch.bfloat16)
    scale = torch.tensor([2.0, 0.5])
    fi.append_kv(k, k, kv, torch.tensor([0]), k_scale=scale, v_scale=torch.tensor(3.0))
    assert kv.k[0, 0, :, 0].float().tolist() == [3.0, 12.0]
    assert kv.v[0, 0, :, 0].float().tolist() == [2.0, 2.0]


def test_appending_a_step_then_attending() -> None:
    """Some requests read pages that the same step writes."""
    case = Case("append", ((20, 60), (1, 33), (5, 5)))
    problem = make_problem(case)
    expected = run(case, problem).out
    entries, kv = problem.batch.page_table.entries, problem.kv
    positions = [(r, p) for r, (q, n) in enumerate(case.lengths) for p in range(n - q, n)]
    slots = torch.tensor([int(entries[r, p // 16]) * 16 + p % 16 for r, p in positions])
    new = [t.reshape(-1, *t.shape[2:])[slots].clone() for t in (kv.k, kv.v)]
    for cache in (kv.k, kv.v):
        cache.view(-1, *cache.shape[2:])[slots] = torch.nan
    fi.append_kv(new[0], new[1], kv, slots)
    assert torch.equal(run(case, problem).out, expected)


def test_nothing_to_append() -> None:
    kv, none = pool("nhd", torch.float32, 8), torch.zeros(0, 2, 8)
    fi.append_kv(none, none, kv, torch.zeros(0, dtype=torch.int64))
    assert (kv.k == 7.0).all()


def test_merge_weighs_states_by_their_sums() -> None:
    o = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1).expand(2, 1, 1, 8).contiguous()
    lse = torch.tensor([1.0, 1.0 + math.log(3)]).view(2, 1, 1)
    merged, merged_lse = fi.merge_states(o, lse)
    torch.testing.assert_close(merged, torch.full((1, 1, 8), 17.5))
    torch.testing.assert_close(merged_lse, torch.full((1, 1), 1 + math.log(4)))


def test_merge_of_empty_states() -> None:
    o = torch.zeros(3, 1, 2, 8)
    lse = torch.full((3, 1, 2), -math.inf)
    o[1, 0, 1], lse[1, 0, 1] = 5.0, 2.0
    merged, merged_lse = fi.merge_states(o, lse)
    assert (merged[0, 0] == 0).all() and merged_lse[0, 0] == -math.inf
    assert (merged[0, 1] == 5).all() and merged_lse[0, 1] == 2.0


def test_merge_without_softmax_adds() -> None:
    o = torch.arange(24.0).view(3, 1, 1, 8)
    merged, lse = fi.merge_states(o, torch.full((3, 1, 1), torch.nan), softmax=False)
    assert torch.equal(merged, o.sum(0)) and (lse == 0).all()


@pytest.mark.parametrize("variant", ["", "sigmoid"])
def test_merged_halves_are_the_whole(variant: str) -> None:
    """Partial states over [0, 48) and the rest, from two launches, merge to one launch's result."""
    case = Case("halves", ((1, 120),), band=fi.FULL, variant=variant)
    whole = make_problem(case)
    table = whole.batch.page_table
    halves = [(table.entries[:, :3], 48), (table.entries[:, 3:], 72)]
    states = []
    for entries, kv_len in halves:
        lengths = torch.tensor([kv_len], dtype=torch.int32)
        part = fi.PagedBatch(whole.batch.qo_indptr, lengths, fi.PageTable.dense(entries, 16))
        states.append(run(case, dataclasses.replace(whole, batch=part, partial=True)))
    o = torch.stack([s.out for s in states])
    lses = [torch.zeros(o.shape[1:3]) if s.lse is None else s.lse for s in states]
    merged, lse = fi.merge_states(o, torch.stack(lses), softmax=not variant)
    exact = solve(whole)
    torch.testing.assert_close(merged, exact[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact[1].float(), rtol=1e-6, atol=1e-5)
    compare(run(case, whole), whole)


def append(**changes: Any) -> None:
    arguments = {
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 16),
        "kv": pool("nhd", torch.float32),
        "slots": torch.tensor([0, 1, 2]),
    }
    fi.append_kv(**(arguments | changes))


@dataclass(frozen=True)
class Bad:
    """A call that must be refused, and a pattern of its message."""

    match: str
    call: Any


LSE, STATES = torch.zeros(2, 3, 1), torch.zeros(2, 3, 1, 8)
BAD = [
    Bad(
        r"k: expected \[3 tokens or more, 2, 8\] on cpu.*got float32 \[2, 2, 8\]",
        lambda: append(k=torch.zeros(2, 2, 8)),
    ),
    Bad(r"v: expected .*got float32 \[3, 2, 8\]", lambda: append(v=torch.zeros(3, 2, 8))),
    Bad(
        "v: expected .* one dtype for k and v.*got float16",
        lambda: append(v=torch.zeros(3, 2, 16).half()),
    ),
    Bad("k: expected .* stride 1", lambda: append(k=torch.zeros(3, 8, 2).transpose(1, 2))),
    Bad(
        "kv: expected a cache of torch.float32 or torch.float8_e4m3fn, got torch.float16",
        lambda: append(kv=pool("nhd", torch.half)),
    ),
    Bad(
        "slots: expected a contiguous int64 vector on cpu, got int32",
        lambda: append(slots=torch.tensor([0, 1, 2]).int()),
    ),
    Bad("slots: expected a contiguous int64 vector", lambda: append(slots=torch.arange(6)[::2])),
    Bad(
        "slots: expected at most 19, the last slot of the cache, got 20 at token 1",
        lambda: append(slots=torch.tensor([0, 20, 2])),
    ),
    Bad(
        "k_scale: expected a contiguous float32 tensor of 1 or 2",
        lambda: append(kv=pool("nhd", FP8), k_scale=torch.ones(3)),
    ),
    Bad(
        "v_scale: expected a contiguous float32 tensor of 1 or 2",
        lambda: append(kv=pool("nhd", FP8), v_scale=torch.ones(2).half()),
    ),
    Bad(
        "v_scale: expected None for a cache of torch.float32",
        lambda: append(v_scale=torch.ones(1)),
    ),
    Bad(
        "k: expected a head dimension that is a multiple of 8, got 12",
        lambda: append(
            k=torch.zeros(3, 2, 12),
            kv=fi.KvCacheView.nhd(torch.zeros(5, 4, 2, 12), torch.zeros(5, 4, 2, 16)),
        ),
    ),
    Bad("o: expected contiguous float32", lambda: fi.merge_states(STATES[:0], LSE[:0])),
    Bad(
        r"o: expected contiguous float32 \[states, tokens, heads, dim\]",
        lambda: fi.merge_states(STATES.half(), LSE),
    ),
    Bad("lse: expected contiguous float32", lambda: fi.merge_states(STATES, LSE.transpose(0, 1))),
    Bad(
        r"lse: .*equal in both, got float32 \[2, 4, 1\]",
        lambda: fi.merge_states(STATES, torch.zeros(2, 4, 1)),
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.match[:40])
def test_refusals(bad: Bad) -> None:
    with pytest.raises(fi.InvalidInput, match=bad.match):
        bad.call()
