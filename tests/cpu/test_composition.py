"""Shared prefixes: forests of any shape give what the same requests give alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from cases import Case
from forest import Tree, groups_of, hide_shared_entries, make_shared, random_tree
from running import Result, compare, run

import fi_backend as fi
from fi_backend.oracle import Problem

TWO_LEVELS = (Tree((0, 1, 2), 64, (Tree((0, 1), 96),)), Tree((3, 4), 32))
DECODES = ((1, 100), (1, 133), (1, 90), (1, 60), (1, 34), (1, 9))
CHUNKS = ((40, 140), (1, 99), (7, 100), (20, 60), (33, 35), (5, 5))


def with_nodes(problem: Problem, trees: tuple[Tree, ...]) -> Problem:
    batch = fi.shared_prefix(problem.batch, groups_of(trees))
    return dataclasses.replace(problem, batch=batch)


def check(case: Case, trees: tuple[Tree, ...], num_ctas: int | None = None) -> Result:
    """Run with nodes, shared entries of own rows stale; compare with the oracle without nodes."""
    alone = make_shared(case, trees)
    shared = with_nodes(alone, trees)
    hidden = dataclasses.replace(shared, batch=hide_shared_entries(shared.batch))
    result = run(case, hidden, num_ctas)
    compare(result, alone)
    return result


@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decodes", "chunks"])
@pytest.mark.parametrize("variant", ["", "alibi", "sinks", "soft_cap", "sigmoid", "gemma"])
def test_two_levels(lengths: tuple[tuple[int, int], ...], variant: str) -> None:
    check(Case("levels", lengths, variant=variant), TWO_LEVELS)


@pytest.mark.parametrize(
    "band", [fi.Band.window(20), fi.Band.window(70, 4), fi.FULL, fi.Band(9, 3)]
)
def test_each_row_has_its_own_band(band: fi.Band) -> None:
    """A node may reach past the context of its members, into positions only some rows see."""
    check(Case("bands", CHUNKS, band=band), TWO_LEVELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    check(Case("low", CHUNKS, fi.HeadShape(8, 2, 128), dtype), TWO_LEVELS)


@pytest.mark.parametrize("num_ctas", [1, 2, 5, 33])
def test_splits_of_nodes_merge(num_ctas: int) -> None:
    case = Case("splits", ((1, 900), (3, 700), (1, 640), (17, 660)), fi.HeadShape(4, 1, 32))
    check(case, (Tree((0, 1, 2, 3), 576, (Tree((1, 3), 640),)),), num_ctas)


def test_members_without_queries_and_lone_members() -> None:
    lengths = ((0, 80), (1, 80), (2, 90), (0, 0), (1, 40))
    check(Case("empty", lengths), (Tree((0, 1), 64), Tree((2,), 32), Tree((4,), 32)))


def test_a_node_may_be_all_of_a_request() -> None:
    lengths = ((1, 64), (1, 64), (4, 64))
    check(Case("whole", lengths, band=fi.FULL), (Tree((0, 1, 2), 64),))


def test_node_through_a_row_of_nobody() -> None:
    """The shared pages lie in a table row past the requests'."""
    case = Case("row", ((1, 100), (1, 133), (1, 90)))
    trees = (Tree((0, 1, 2), 64),)
    alone = make_shared(case, trees)
    entries = alone.batch.page_table.entries
    wider = torch.cat([entries, entries[:1]])
    wider[:3, :4] = 2**31 - 1
    nodes = fi.shared_prefix(alone.batch, groups_of(trees)).nodes
    assert nodes is not None
    nodes = dataclasses.replace(nodes, table_row=torch.tensor([3], dtype=torch.int32))
    table = fi.PageTable.dense(wider, 16)
    batch = fi.PagedBatch(alone.batch.qo_indptr, alone.batch.kv_len, table, nodes)
    compare(run(case, dataclasses.replace(alone, batch=batch)), alone)


@pytest.mark.parametrize("seed", range(24))
def test_random_forests(seed: int) -> None:
    rng = random.Random(seed)
    lengths = []
    for _ in range(rng.choice((2, 5, 13))):
        q_len = rng.choice((0, 1, 1, 1, 3, rng.randint(1, 40)))
        lengths.append((q_len, q_len + rng.choice((0, rng.randint(0, 60), rng.randint(60, 250)))))
    granule = rng.choice((16, 32, 64))
    kv_len = [kv for _, kv in lengths]
    trees = random_tree(rng, range(len(lengths)), kv_len, granule)
    case = Case(
        f"forest-{seed}",
        tuple(lengths),
        fi.HeadShape(*rng.choice(((2, 2), (4, 1), (6, 2))), 32),
        band=rng.choice((fi.CAUSAL, fi.CAUSAL, fi.FULL, fi.Band.window(50), fi.Band(30, 2, 5))),
        variant=rng.choice(("", "", "alibi", "sinks", "sigmoid", "gemma", "tree")),
    )
    check(case, trees, rng.choice((None, 1, 3, 20)))


def test_declined_nodes_are_read_through_own_rows() -> None:
    """Without own_begin nodes are advice: what exceeds the capacity is left out, in order."""
    case = Case("declined", CHUNKS)
    alone = make_shared(case, TWO_LEVELS)
    nodes = with_nodes(alone, TWO_LEVELS).batch.nodes
    assert nodes is not None
    advice = dataclasses.replace(nodes, own_begin=None)
    problem = dataclasses.replace(alone, batch=dataclasses.replace(alone.batch, nodes=advice))
    planned = []
    for max_nodes in (0, 1, 2, 3):
        layer = fi.Attention(
            case.heads, torch.float32, capacity=fi.Capacity(8, 200, 256, max_nodes, 20, 200)
        )
        layer.plan(problem.batch)
        header = layer.slot.arrays()["header"]
        planned.append((int(header["num_nodes"]), int(header["status"])))
        out = layer(problem.q, problem.kv)
        compare(Result(out, None), alone)
    assert planned == [(0, 16), (1, 16), (2, 16), (3, 0)]


def test_equal_bits_on_repeat() -> None:
    case = Case("repeat", CHUNKS, fi.HeadShape(8, 2, 64), torch.bfloat16)
    first, second = check(case, TWO_LEVELS), check(case, TWO_LEVELS)
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)


@pytest.mark.parametrize("members", [(), (0, 6), (-1,)])
def test_bad_members_are_refused(members: tuple[int, ...]) -> None:
    problem = make_shared(Case("bad", DECODES), ())
    match = r"groups\[1\]: expected members among requests \[0, 6\), got \["
    with pytest.raises(fi.InvalidInput, match=match):
        fi.shared_prefix(problem.batch, [((0,), 0, 16), (members, 0, 16)])


def test_gaps_between_levels_are_refused() -> None:
    problem = make_shared(Case("gap", DECODES), ())
    batch = fi.shared_prefix(problem.batch, [((0, 1), 0, 32), ((0, 1), 48, 64)])
    layer = fi.Attention(fi.HeadShape(4, 2, 64), torch.float32)
    with pytest.raises(fi.InvalidInput, match="expected 32, where the earlier nodes of request 0"):
        layer.plan(batch)
