"""Plans of prefix forests: the host's, and the planner kernel's body on fibers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from plan_batches import PlanCase, assert_same, forest_case, plan_of_explicit_nodes, plan_on_host
from plan_forests import NODES_DECLINED, ForestNode, NodeCapacity, forest_bytes

from fi_backend.plan_records import BAD_INDPTR, KV_TOO_LONG, TOO_MANY_REQUESTS, plan_arrays

# Requests 0 to 3 share [0, 2048), 0 and 2 go on together to 3072: the example of plan/forest.h.
EXAMPLE_NODES = [ForestNode((0, 1, 2, 3), 0, 2048), ForestNode((0, 2), 2048, 3072)]


def example(status: int = 0) -> PlanCase:
    q_lens, capacity = [1, 1, 2, 1], NodeCapacity(2, 6, 8)
    return PlanCase(
        "example",
        heads=(8, 2),
        num_ctas=3,
        band=(-1, 0, 0),
        chunk=0,
        classes=[(16, 64, 40, 190), (64, 64, 160, 1240)],
        capacity=(4, 5, 4096),
        num_requests=4,
        qo_indptr=np.cumsum([0, *q_lens]).astype(np.int32),
        kv_len=np.array([3200, 2100, 3100, 2049], np.int32),
        node_capacity=capacity,
        nodes=EXAMPLE_NODES,
        forest=forest_bytes(EXAMPLE_NODES, q_lens, capacity, 4, status=status),
    )


def without_nodes(case: PlanCase) -> PlanCase:
    return dataclasses.replace(case, nodes=[], forest=None)


def status_of(case: PlanCase) -> int:
    return int(plan_arrays(plan_on_host(case), case.config().layout())["header"]["status"])


def test_the_host_plans_the_example() -> None:
    case = example()
    arrays = plan_arrays(plan_on_host(case), case.config().layout())
    nodes, requests, links = arrays["nodes"], arrays["requests"], arrays["links"]
    assert nodes["kv_end"].tolist() == [2048, 3072]
    assert nodes["num_tokens"].tolist() == [5, 3]
    assert list(zip(requests["link_begin"], requests["link_end"], strict=True)) == [
        (0, 2), (2, 3), (3, 5), (5, 6)
    ]  # fmt: skip
    assert [tuple(link) for link in links] == [(0, 0), (1, 0), (0, 4), (0, 8), (1, 4), (0, 16)]
    assert arrays["gathered"]["token"].tolist() == [0, 1, 2, 3, 4, 0, 2, 3]
    assert arrays["gathered"]["local"].tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    own = arrays["items"][arrays["items"]["request"] >= 0]
    assert own["kv_begin"].min() == 2048
    assert (own["partial_row"] >= 0).all()


def test_the_host_plans_a_forest_like_the_same_nodes_given_one_by_one() -> None:
    shared = 0
    for seed in range(300):
        case = forest_case(seed)
        declined = int(case.forest[12:16].view(np.int32)[0])
        expected = plan_of_explicit_nodes(case)
        plan_arrays(expected, case.config().layout())["header"]["status"] |= declined
        assert_same(case, expected, plan_on_host(case))
        shared += len(case.nodes)
    assert shared > 1000


def test_an_empty_forest_gives_the_plan_without_nodes() -> None:
    for seed in range(20):
        case = forest_case(seed)
        forest = forest_bytes([], [], case.node_capacity, case.capacity[0])
        empty = dataclasses.replace(case, nodes=[], forest=forest)
        expected = plan_on_host(without_nodes(case))
        assert_same(case, expected, plan_on_host(empty))
        assert_same(case, expected, plan_of_explicit_nodes(empty))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"kv_len": np.array([3200, 2100, 3100, 4097], np.int64)}, KV_TOO_LONG),
        ({"kv_len": np.array([-1, 2100, 3100, 2049], np.int32)}, KV_TOO_LONG),
        ({"qo_indptr": np.array([0, 1, 2, 1, 5], np.int32)}, BAD_INDPTR),
        ({"capacity": (3, 5, 4096)}, TOO_MANY_REQUESTS),
    ],
    ids=str,
)
def test_a_forest_is_ignored_where_lengths_are_out_of_contract(
    change: dict[str, object], status: int
) -> None:
    case = dataclasses.replace(example(NODES_DECLINED), **change)
    assert status_of(case) == status
    assert_same(case, plan_on_host(without_nodes(case)), plan_on_host(case))


def test_a_forest_that_left_nodes_out_says_so() -> None:
    assert status_of(example(NODES_DECLINED)) == NODES_DECLINED
    assert status_of(example()) == 0
