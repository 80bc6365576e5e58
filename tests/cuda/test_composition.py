"""Shared prefixes, block-sparse matrices and contiguous K and V on the GPU."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from cases import Case
from forest import Tree, groups_of, hide_shared_entries, make_shared, random_tree
from named_cases import BF16, FP8, FP16, heads
from placing import to_device
from running import Place, Result, check_problem, compare, make_layer
from specialisations import planned_kernels

import fi_backend as fi
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.oracle import Problem

TWO_LEVELS = (Tree((0, 1, 2), 64, (Tree((0, 1), 96),)), Tree((3, 4), 32))
DECODES = ((1, 100), (1, 133), (1, 90), (1, 60), (1, 34), (1, 9))
CHUNKS = ((40, 140), (1, 99), (7, 100), (20, 60), (33, 35), (5, 5))
# Requests and tokens of named_cases.capacity_of: the same tile classes, the same kernels.
CAPACITY = fi.Capacity(64, 1024, 2048, 64, 256, 1024)
VARIANTS = ("", "alibi", "sinks", "soft_cap", "sigmoid", "gemma")
LAYERS = (
    Case("bf16", CHUNKS, heads(4, 128), BF16),
    Case("fp16-d64", CHUNKS, heads(2), FP16),
    Case("fp8", CHUNKS, heads(4, 128), BF16, FP8, scales="per_head"),
    Case("d192-128", DECODES, heads(2, 192, 128), BF16),
)


def kernels_of(test: str, arguments: Mapping[str, Any]) -> Iterator[DeviceKernel]:
    case = arguments.get("case", Case("any", ((1, 1),), heads(2), BF16))
    yield from planned_kernels(dataclasses.replace(case, variant=arguments.get("variant", "")))


def on(device: str) -> Place:
    return Place(device, CAPACITY)


def with_nodes(problem: Problem, trees: tuple[Tree, ...]) -> Problem:
    batch = fi.shared_prefix(problem.batch, groups_of(trees))
    return dataclasses.replace(problem, batch=batch)


def check(case: Case, trees: tuple[Tree, ...], device: str, num_ctas: int | None = None) -> Result:
    """Run with nodes, shared entries of own rows stale; compare with the oracle, nodes and all."""
    shared = with_nodes(make_shared(case, trees), trees)
    hidden = dataclasses.replace(shared, batch=hide_shared_entries(shared.batch))
    return check_problem(case, hidden, num_ctas, on(device))


@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decodes", "chunks"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_levels(device: str, lengths: tuple[tuple[int, int], ...], variant: str) -> None:
    check(Case("levels", lengths, dtype=BF16, variant=variant), TWO_LEVELS, device)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
@pytest.mark.parametrize("num_ctas", [None, 1, 5, 33])
def test_splits_of_nodes_merge(device: str, case: Case, num_ctas: int | None) -> None:
    check(case, TWO_LEVELS, device, num_ctas)


@pytest.mark.parametrize(
    "band", [fi.Band.window(20), fi.Band.window(70, 4), fi.FULL, fi.Band(9, 3)], ids=str
)
def test_each_row_has_its_own_band(device: str, band: fi.Band) -> None:
    check(Case("bands", CHUNKS, dtype=BF16, band=band), TWO_LEVELS, device)


@pytest.mark.parametrize("seed", range(24))
def test_random_forests(device: str, seed: int) -> None:
    rng = random.Random(seed)
    lengths = []
    for _ in range(rng.choice((2, 5, 13))):
        q_len = rng.choice((0, 1, 1, 1, 3, rng.randint(1, 40)))
        lengths.append((q_len, q_len + rng.choice((0, rng.randint(0, 60), rng.randint(60, 250)))))
    kv_len = [kv for _, kv in lengths]
    trees = random_tree(rng, range(len(lengths)), kv_len, rng.choice((16, 32, 64)))
    kv_heads = rng.choice((1, 2))
    case = Case(
        f"forest-{seed}",
        tuple(lengths),
        fi.HeadShape(2 * kv_heads, kv_heads, 64),
        BF16,
        band=rng.choice((fi.CAUSAL, fi.CAUSAL, fi.FULL, fi.Band.window(50), fi.Band(30, 2, 5))),
        variant=rng.choice(VARIANTS),
    )
    check(case, trees, device, rng.choice((None, 1, 3, 20)))


def test_equal_bits_on_repeat(device: str) -> None:
    first = check(LAYERS[0], TWO_LEVELS, device)
    for _ in range(10):
        second = check(LAYERS[0], TWO_LEVELS, device)
        assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)


def test_declined_nodes_are_read_through_own_rows(device: str) -> None:
    """Without own_begin nodes are advice: what exceeds the capacity is left out, in order."""
    case = Case("declined", CHUNKS, dtype=BF16)
    alone = make_shared(case, TWO_LEVELS)
    nodes = with_nodes(alone, TWO_LEVELS).batch.nodes
    assert nodes is not None
    advice = dataclasses.replace(nodes, own_begin=None)
    problem = dataclasses.replace(alone, batch=dataclasses.replace(alone.batch, nodes=advice))
    there, planned = to_device(problem, device), []
    for max_nodes in (0, 1, 2, 3):
        capacity = dataclasses.replace(CAPACITY, max_nodes=max_nodes)
        layer = make_layer(case, problem, place=Place(device, capacity))
        layer.plan(there.batch)
        planned.append(int(layer.slot.arrays()["header"]["num_nodes"]))
        compare(Result(layer(there.q, there.kv).cpu(), None), alone)
    assert planned == [0, 1, 2, 3]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


MATRICES = {
    "squares": [fi.BlockSparse(16, 16, ints(0, 2, 2, 5), ints(1, 3, 0, 2, 3))],
    "vector-sparse": [fi.BlockSparse(8, 1, ints(0, 40, 63), ints(*range(0, 80, 2), *range(23)))],
    "any-sizes": [
        fi.BlockSparse(ints(3, 1, 20), ints(6, 2, 9, 33), ints(0, 2, 2, 5), ints(3, 1, 0, 2, 3))
    ],
    "nested": [
        fi.BlockSparse(4, 4, ints(0, 1), ints(0)),
        fi.BlockSparse(2, 2, ints(0, 1, 2), ints(2, 3)),
    ],
}


@pytest.mark.parametrize("name", MATRICES)
def test_block_sparse(device: str, name: str) -> None:
    batch = fi.compose(MATRICES[name])
    g = torch.Generator().manual_seed(0)
    tokens, page = int(batch.qo_indptr[-1]), batch.page_table.page_size
    columns = (int(batch.page_table.entries.max()) + 1) * page
    q = (torch.randn(tokens, 4, 64, generator=g) * 3).to(BF16)
    k, v = torch.randn(2, columns, 2, 64, generator=g).to(BF16)
    kv = fi.KvCacheView.slots(k, v, page)
    case = Case("sparse", (), dtype=BF16, band=fi.FULL)
    check_problem(case, Problem(batch, q, kv, fi.FULL), place=on(device))


@pytest.mark.parametrize("band", [fi.CAUSAL, fi.FULL, fi.Band.window(20)], ids=str)
def test_contiguous_keys_and_values(device: str, band: fi.Band) -> None:
    """K and V as slices of one fused projection: nothing is copied."""
    batch = fi.ragged(ints(0, 65, 65, 68, 85), ints(0, 65, 65, 105, 122))
    g = torch.Generator().manual_seed(0)
    q = (torch.randn(85, 4, 64, generator=g) * 3).to(BF16)
    fused = torch.randn(122, 4, 64, generator=g).to(BF16)
    kv = fi.KvCacheView.ragged(fused[:, :2], fused[:, 2:])
    case = Case("ragged", (), dtype=BF16, band=band)
    check_problem(case, Problem(batch, q, kv, band), place=on(device))
