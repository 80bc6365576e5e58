"""A step with one prefix: its row tiles in whole pieces, the other CTAs for requests."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from plan_batches import PlanCase, assert_same, plan_on_host
from plan_fibers import Launch, build, plan_on_fibers
from plan_forests import ForestNode, capacity_of, forest_bytes

from fi_backend import _core
from fi_backend.plan_records import plan_arrays

# Rows, KV tile, cost of a start and of a KV tile: those of an H200.
CLASSES = [(16, 64, 270, 150), (64, 64, 400, 215), (128, 64, 600, 260)]


def case_of(
    prefixes: Sequence[int],
    own: Sequence[int],
    heads: tuple[int, int] = (32, 8),
    num_ctas: int = 264,
    max_kv_len: int = 131_072,
) -> PlanCase:
    """Decodes with `own` tokens behind one of the prefixes, in turns."""
    number = len(own)
    members = [tuple(range(i, number, len(prefixes))) for i in range(len(prefixes))]
    nodes = [ForestNode(of, 0, end) for of, end in zip(members, prefixes, strict=True)]
    q_lens = [1] * number
    node_capacity = capacity_of(nodes, q_lens)
    return PlanCase(
        f"{prefixes}, {own}, {heads}, {num_ctas}",
        heads=heads,
        num_ctas=num_ctas,
        band=(-1, 0, 0),
        chunk=0,
        classes=CLASSES,
        capacity=(number, number, max_kv_len),
        num_requests=number,
        qo_indptr=np.arange(number + 1, dtype=np.int32),
        kv_len=np.array([prefixes[i % len(prefixes)] + n for i, n in enumerate(own)], np.int32),
        node_capacity=node_capacity,
        nodes=nodes,
        forest=forest_bytes(nodes, q_lens, node_capacity, number),
    )


def plan_of(case: PlanCase) -> dict[str, NDArray[Any]]:
    return plan_arrays(plan_on_host(case), case.config().layout())


def pieces_of(plan: dict[str, NDArray[Any]]) -> list[int]:
    """KV tiles of each node item, if each of them is alone in its span; else none."""
    items, starts = plan["items"], plan["cta_ptr"]
    of_nodes = np.flatnonzero(items["request"] < 0)
    if len(of_nodes) >= len(starts):
        return []
    alone = [starts[p + 1] - starts[p] == 1 for p in range(len(of_nodes))]
    if not all(alone) or (starts[: len(of_nodes) + 1] != np.arange(len(of_nodes) + 1)).any():
        return []
    items = items[of_nodes]
    return ((items["kv_end"] - items["kv_begin"] + 63) // 64).tolist()


def own_lengths(number: int, low: int, high: int) -> list[int]:
    draw = Random(number)
    return [draw.randint(low, high) for _ in range(number)]


def test_the_example() -> None:
    """16 row tiles of 64 steps in 6 pieces each: 96 of 264 CTAs."""
    plan = plan_of(case_of([4096], own_lengths(64, 128, 512)))
    pieces = pieces_of(plan)
    assert len(pieces) == 96
    assert pieces == [11, 11, 11, 11, 10, 10] * 16
    assert (plan["node_tiles"]["num_splits"] == 6).all()
    # Requests: what the other CTAs compute is even, to what it costs to begin a tile again.
    items, starts = plan["items"], plan["cta_ptr"]
    tiles = (items["kv_end"] - items["kv_begin"] + 63) // 64
    costs = [int((270 + 150 * tiles[a:b]).sum()) for a, b in itertools.pairwise(starts[96:])]
    whole = [cost for cost in costs if cost > 0]
    assert len(whole) >= 167
    assert max(whole) - np.median(whole) < 2 * 270


@pytest.mark.parametrize(
    ("prefix", "number", "own", "heads", "expected"),
    [
        (8192, 64, (512, 512), (32, 8), 7),  # 8 would leave requests too few CTAs
        (32768, 16, (256, 256), (32, 8), 29),
        (4096, 16, (128, 512), (32, 8), 16),
        (4096, 32, (128, 512), (16, 2), 32),
        (4096, 64, (128, 512), (8, 1), 32),
        (4096, 16, (128, 512), (16, 16), 7),
    ],
)
def test_pieces_of_a_tile(
    prefix: int, number: int, own: tuple[int, int], heads: tuple[int, int], expected: int
) -> None:
    plan = plan_of(case_of([prefix], own_lengths(number, *own), heads))
    pieces = pieces_of(plan)
    assert (plan["node_tiles"]["num_splits"] == expected).all()
    assert len(pieces) == expected * len(plan["node_tiles"])
    assert max(pieces) - min(pieces) <= 1


@pytest.mark.parametrize(
    "case",
    [
        case_of([4096, 4096], own_lengths(64, 128, 512)),  # two nodes
        case_of([1024], own_lengths(128, 16, 512)),  # one or two pieces: neither is near a span
        case_of([64], own_lengths(64, 2000, 4000)),  # shorter than a span
        case_of([4096], own_lengths(64, 128, 512), num_ctas=8),  # fewer CTAs than row tiles
        case_of([1 << 20], [3688] * 16, num_ctas=200, max_kv_len=1 << 21),  # long spans
    ],
    ids=lambda case: case.name[:40],
)
def test_otherwise_cost_alone_decides(case: PlanCase) -> None:
    assert pieces_of(plan_of(case)) == []


def test_the_device_cuts_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    fibers: ctypes.CDLL = build(tmp_path_factory.mktemp("planner"), has_nodes=True)
    draw, whole, narrow = Random(4), 0, set()
    for _ in range(120):
        own = [
            draw.randint(1, draw.choice([64, 512, 4096]))
            for _ in range(draw.choice([2, 5, 16, 64, 200]))
        ]
        case = case_of(
            [64 * draw.choice([1, 3, 16, 64, 250, 1000])],
            own,
            draw.choice([(32, 8), (28, 4), (8, 1), (16, 16), (64, 8)]),
            draw.choice([40, 132, 264, 396]),
            draw.choice([131_072, 1 << 26]),
        )
        expected = plan_on_host(case)
        launch = draw.choice([Launch(2, 64, 4), Launch(4, 32, 1, is_descending=True)])
        got, _ = plan_on_fibers(fibers, case, launch)
        assert_same(case, expected, got)
        layout = case.config().layout()
        whole += pieces_of(plan_arrays(expected, layout)) != []
        narrow.add(_core.PlanKernelParams(case.config(), layout).is_narrow)
    assert 30 < whole < 110
    assert narrow == {True, False}
