"""RoPE inside attention on the CPU: against the oracle, against K that was turned before."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import Case, make_problem
from named_cases import MIXED, heads
from running import Result, check, compare, layer_class_of, run

import fi_backend as fi
from fi_backend.oracle import Problem, solve
from fi_backend.variants import Rotation, Scalar, Variant, shipped
from fi_backend.variants import Tensor as TensorParam

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
LONG = ((1, 900), (1, 44), (1, 45), (90, 700), (5, 5), (0, 0), (40, 130))
CASES = [
    Case("rope", MIXED, variant="rope"),
    Case("rope-bf16", MIXED, heads(4, 128), BF16, variant="rope"),
    Case("rope-fp8", MIXED, heads(4, 128), FP16, FP8, scales="per_head", variant="rope"),
    Case("rope-some", MIXED, heads(2, 80), variant="rope-some"),
    Case("rope-pages", MIXED, page_size=3, layout="hnd", variant="rope"),
    Case("rope-strided", MIXED, strided=True, dtype=BF16, variant="rope-some"),
    Case("rope-nothing-seen", ((5, 2), (3, 0), (1, 4)), variant="rope"),
    Case("streaming", LONG, variant="streaming"),
    Case("streaming-bf16", LONG, heads(4, 128), BF16, variant="streaming"),
    Case("streaming-no-sinks", LONG, variant="streaming-no-sinks"),
    Case("streaming-many-sinks", LONG, heads(2, 32), variant="streaming-many-sinks"),
    Case("streaming-nothing-seen", ((5, 2), (3, 0), (1, 400)), variant="streaming"),
]


@pytest.mark.parametrize("num_ctas", [None, 1, 7, 64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_named(case: Case, num_ctas: int | None) -> None:
    check(case, num_ctas)


@pytest.mark.parametrize("variant", ["rope", "rope-some"])
def test_as_if_turned_before(variant: str) -> None:
    """The oracle agrees with itself on a cache whose K was turned by its positions."""
    case = Case("before", ((1, 50), (9, 33)), heads(2), variant=variant)
    problem = make_problem(case)
    rotation = problem.variant.rotation
    k, q = problem.kv.k.clone(), problem.q.clone()
    for request, (q_len, kv_len) in enumerate(case.lengths):
        rows = slice(*problem.batch.qo_indptr[request : request + 2].tolist())
        q_pos, kv_pos = torch.arange(kv_len - q_len, kv_len), torch.arange(kv_len)
        page = problem.batch.page_table.entries[request, kv_pos // 16].long()
        k[page, kv_pos % 16] = rotation.rotate(k[page, kv_pos % 16], kv_pos, problem.params)
        q[rows] = rotation.rotate(q[rows], q_pos, problem.params)
    plain = dataclasses.replace(
        problem,
        q=q,
        kv=dataclasses.replace(problem.kv, k=k),
        variant=None,
        params={},
    )
    for mine, theirs in zip(solve(problem), solve(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    compare(run(case, problem), problem)


def test_slots_roll() -> None:
    """A text of any length is the same as its leading tokens followed by its last ones."""
    case = Case("rolls", ((1, 300),), heads(2), variant="streaming")
    problem = make_problem(case)
    kept = torch.cat([torch.arange(4), torch.arange(300 - 40, 300)])
    table = problem.batch.page_table
    pages = table.entries[0, kept // 16].long()
    k, v = (t[pages, kept % 16] for t in (problem.kv.k, problem.kv.v))
    table = fi.PageTable.dense(torch.zeros(1, 1, dtype=torch.int32), 44)
    short = Problem(
        dataclasses.replace(problem.batch, kv_len=torch.tensor([44]).int(), page_table=table),
        problem.q,
        fi.KvCacheView(k[None].contiguous(), v[None].contiguous()),
        variant=shipped.rope(),
        params=problem.params,
    )
    for mine, theirs in zip(solve(problem), solve(short), strict=True):
        torch.testing.assert_close(mine, theirs)
    compare(run(case, problem), short)


def test_equal_bits_whatever_the_cut() -> None:
    case = Case("bits", LONG, heads(4, 128), BF16, variant="streaming")
    problem = make_problem(case)
    first, second = run(case, problem, 3), run(case, problem, 3)
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (torch.zeros(20, 64), "at least 50 slots, got 20"),
        (torch.zeros(50, 63), "rotary_dim even and at most 64"),
        (torch.zeros(50, 66), "rotary_dim even and at most 64"),
        (torch.zeros(50, 0), "rotary_dim even and at most 64"),
        (torch.zeros(64, 50).T, "stride 1 in the last dimension"),
    ],
)
def test_refused_tables(table: torch.Tensor, words: str) -> None:
    case = Case("refused", ((1, 50),), variant="rope")
    problem = dataclasses.replace(make_problem(case), params={"cos_sin": table})
    with pytest.raises(fi.InvalidInput, match=words):
        run(case, problem)


def test_few_slots_are_enough_for_a_window() -> None:
    case = Case("few", ((1, 700), (6, 90)), variant="streaming")
    problem = make_problem(case)
    assert problem.params["cos_sin"].shape[0] == 40 + 4 + 6
    compare(run(case, problem), problem)
    short = {"cos_sin": problem.params["cos_sin"][:-1]}
    with pytest.raises(fi.InvalidInput, match="at least 50 slots, got 49"):
        run(case, dataclasses.replace(problem, params=short))


def test_declarations() -> None:
    with pytest.raises(fi.InvalidInput, match="two dimensions"):
        Variant("none", rotation=Rotation())
    with pytest.raises(fi.InvalidInput, match="two dimensions"):
        Variant("flat", rotation=Rotation(), params=(TensorParam("cos_sin"),))
    with pytest.raises(fi.InvalidInput, match="two dimensions"):
        Variant("number", rotation=Rotation(), params=(Scalar("cos_sin"),))
    with pytest.raises(fi.InvalidInput, match="a rotation in one variant at most"):
        shipped.rope().then(shipped.rope())
    chain = shipped.rope().then(shipped.soft_cap(5.0)).renamed(cos_sin="angles")
    assert chain.rotation == Rotation("angles")


def test_a_chain_turns_too() -> None:
    case = Case("chain", MIXED, heads(2), variant="rope")
    problem = make_problem(case)
    chain = problem.variant.then(shipped.soft_cap(5.0)).renamed(cos_sin="angles")
    params = {"angles": problem.params["cos_sin"]}
    problem = dataclasses.replace(problem, variant=chain, params=params)
    compare(run(case, problem), problem)


def test_it_matters() -> None:
    """The cases above would fail without rotation."""
    case = Case("matters", MIXED, variant="rope")
    problem = make_problem(case)
    plain = run(case, dataclasses.replace(problem, variant=None, params={}))
    with pytest.raises(AssertionError):
        compare(plain, problem)


def test_a_gpu_turns_no_float8() -> None:
    def reasons(kv_dtype: torch.dtype | None, device: str) -> list[str]:
        layer_class = fi.LayerClass(heads(2), BF16, kv_dtype, variant=shipped.rope())
        return fi.why_not(fi.AttentionConfig.of(layer_class, device))

    words = "kv_dtype: expected the dtype of q where a GPU turns K"
    assert any(reason.startswith(words) for reason in reasons(FP8, "cuda"))
    assert not any(reason.startswith(words) for reason in reasons(None, "cuda"))
    assert not reasons(FP8, "cpu")


def test_explicit_nodes_where_slots_roll() -> None:
    case = Case("nodes", ((1, 100), (1, 100)), variant="streaming")
    problem = make_problem(case)
    ints = [[0], [0], [32], [0, 2], [0, 1]]
    nodes = fi.Nodes(*(torch.tensor(values, dtype=torch.int32) for values in ints))
    planner = fi.StepPlanner(
        [layer_class_of(case, problem)], fi.Capacity(2, 2, 128, max_nodes=1, max_links=2), "cpu"
    )
    planner.plan(dataclasses.replace(problem.batch, nodes=nodes))
    with pytest.raises(fi.InvalidInput, match="none where slots roll"):
        fi.attention(planner.slot(0), problem.q, problem.kv, params=problem.params)


def test_shared_prefixes() -> None:
    """Rows of a node come from requests in different positions."""
    case = Case("shared", ((1, 600), (1, 560), (4, 590)), heads(2), variant="rope")
    problem = make_problem(case)
    entries = problem.batch.page_table.entries.clone()
    entries[1:, :32] = entries[0, :32]
    batch = dataclasses.replace(problem.batch, page_table=fi.PageTable.dense(entries, 16))
    problem = dataclasses.replace(problem, batch=batch)
    capacity = fi.Capacity(4, 8, 1024).with_sharing()
    planner = fi.StepPlanner([layer_class_of(case, problem)], capacity, "cpu")
    planner.plan(batch)
    assert int(planner.slot(0).arrays()["header"]["num_nodes"]) > 0  # type: ignore[index]
    out = torch.full((problem.q.shape[0], 4, 64), torch.nan)
    lse = torch.full(out.shape[:2], torch.nan)
    fi.attention(planner.slot(0), problem.q, problem.kv, out=out, lse=lse, params=problem.params)
    compare(Result(out, lse), problem)
