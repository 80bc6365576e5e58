"""The planner: small expected values first, then properties over random steps."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_model import (
    Node,
    Step,
    check_coverage,
    check_every_row_written,
    check_nodes_come_first,
    item_cost,
    make_plan,
    span_costs,
)

SMALL = ((16, 64, 200, 400), (64, 64, 800, 4000))


def ranges(plan: object) -> list[tuple[int, int, int, int]]:
    return [
        (int(i["request"]), int(i["kv_head"]), int(i["kv_begin"]), int(i["kv_end"]))
        for i in plan.arrays["items"]
    ]


def test_one_decode_on_one_cta_is_one_item_per_kv_head() -> None:
    plan = make_plan(Step((1,), (100,), num_kv_heads=2, num_ctas=1))
    assert ranges(plan) == [(0, 0, 0, 100), (0, 1, 0, 100)]
    assert [int(i["partial_row"]) for i in plan.arrays["items"]] == [-1, -1]
    assert plan.arrays["cta_ptr"].tolist() == [0, 2]


def test_a_cut_falls_on_a_multiple_of_the_kv_tile() -> None:
    # One tile of cost 200 + 4 * 400 = 1800; before the cut at 900 lie half of the fixed cost and
    # (900 - 100) / 400 = 2 steps.
    plan = make_plan(Step((1,), (256,), num_kv_heads=1, num_ctas=2))
    assert ranges(plan) == [(0, 0, 0, 128), (0, 0, 128, 256)]
    assert [int(i["partial_row"]) for i in plan.arrays["items"]] == [0, 4]
    unit = plan.arrays["units"][0]
    assert (unit["expected"], unit["num_splits"], unit["num_rows"]) == (2, 2, 4)


def test_a_short_rest_stays_with_what_precedes_it() -> None:
    classes = ((16, 64, 200, 100),)
    # Costs 1400, 1400, 2400. The cut at 2600 has 11 of the second request's 12 steps before it and
    # leaves 200 of its cost: no more than a start, nor than an eighth of a span.
    step = Step((1, 1, 1), (768, 768, 1408), num_kv_heads=1, num_ctas=2, classes=classes)
    assert ranges(make_plan(step)) == [(0, 0, 0, 768), (1, 0, 0, 768), (2, 0, 0, 1408)]
    # Costs 1400 and 1000: the cut at 1200 leaves 200, a sixth of a span.
    step = Step((1, 1), (768, 512), num_kv_heads=1, num_ctas=2, classes=classes)
    assert ranges(make_plan(step)) == [(0, 0, 0, 704), (0, 0, 704, 768), (1, 0, 0, 512)]
    # Costs 1400 and 1100: all 12 steps lie before the cut at 1250.
    step = Step((1, 1), (768, 576), num_kv_heads=1, num_ctas=2, classes=classes)
    assert ranges(make_plan(step)) == [(0, 0, 0, 768), (1, 0, 0, 576)]


def test_causal_prefill_tiles_are_counted_exactly_and_descend() -> None:
    # 32 tokens of 4 heads are 128 packed rows: two tiles of 64 that see 32 - 16 = 16 and 32 tokens.
    plan = make_plan(Step((32,), (32,), num_kv_heads=1, num_ctas=1))
    assert [(int(i["row_begin"]), int(i["kv_end"])) for i in plan.arrays["items"]] == [
        (64, 32),
        (0, 16),
    ]


def test_window_with_sink_skips_the_hole() -> None:
    step = Step((1,), (1000,), num_kv_heads=1, num_ctas=1, band=(99, 0, 10))
    (item,) = make_plan(step).arrays["items"]
    # The token at position 999 sees [0, 10) and [900, 1000): tiles 0 and 14..15 of 64 tokens.
    assert [int(item[f]) for f in ("kv_begin", "hole_begin", "hole_end", "kv_end")] == [
        0,
        64,
        896,
        1000,
    ]


def test_window_without_sink_starts_at_the_first_visible_token() -> None:
    step = Step((1,), (1000,), num_kv_heads=1, num_ctas=1, band=(99, 0, 0))
    assert ranges(make_plan(step)) == [(0, 0, 900, 1000)]


def test_zero_length_requests_cost_nothing_and_empty_kv_is_one_item() -> None:
    plan = make_plan(Step((0, 1, 0), (50, 0, 0), num_kv_heads=1, num_ctas=3))
    assert ranges(plan) == [(1, 0, 0, 0)]


def test_empty_batch() -> None:
    plan = make_plan(Step((), ()))
    assert len(plan.arrays["items"]) == 0
    assert plan.arrays["cta_ptr"].tolist() == [0] * 8


def test_shared_prefix_is_one_node_item_and_own_parts_continue_it() -> None:
    nodes = (Node(table_row=1, kv_begin=0, kv_end=64, members=(0, 1)),)
    step = Step((1, 1), (100, 80), num_kv_heads=1, num_ctas=1, nodes=nodes)
    plan = make_plan(step)
    assert ranges(plan) == [(-1, 0, 0, 64), (0, 0, 64, 100), (1, 0, 64, 80)]
    node_item = plan.arrays["items"][0]
    assert (node_item["table_row"], node_item["num_rows"]) == (1, 8)
    assert [int(u["expected"]) for u in plan.arrays["units"]] == [2, 2]
    assert [int(x["row_offset"]) for x in plan.arrays["links"]] == [0, 4]


def test_nodes_that_do_not_fit_are_declined_and_read_by_their_members() -> None:
    nodes = (Node(0, 0, 64, (0, 1)), Node(0, 64, 128, (0, 1)))
    step = Step((1, 1), (200, 200), nodes=nodes, capacity={"max_shared_tokens": 2})
    plan = make_plan(step)
    assert plan.arrays["header"]["num_nodes"] == 1
    assert plan.arrays["header"]["status"] == 16
    check_coverage(step, plan)
    check_every_row_written(step, plan)


def test_lengths_beyond_capacity_are_clamped_and_reported() -> None:
    step = Step((4, 4), (100, 90), capacity={"max_tokens": 6, "max_kv_len": 95})
    plan = make_plan(step)
    assert plan.arrays["header"]["status"] == 2 | 4
    assert plan.arrays["requests"]["q_len"].tolist() == [4, 2]
    assert plan.arrays["requests"]["kv_len"].tolist() == [95, 90]


def test_int64_lengths_give_the_same_bytes() -> None:
    step = Step((3, 1, 40), (300, 1000, 64))
    assert used_bytes(step, np.int32) == used_bytes(step, np.int64)


def used_bytes(step: Step, kv_dtype: type = np.int32, fill: int = 0) -> list[bytes]:
    arrays = make_plan(step, kv_dtype=kv_dtype, fill=fill).arrays
    return [np.asarray(a).tobytes() for a in arrays.values()]


@st.composite
def steps(draw: st.DrawFn, *, chunk: int = 0, with_nodes: bool = False) -> Step:
    count = draw(st.integers(1, 6))
    kv = [draw(st.integers(0, 400)) for _ in range(count)]
    q = [draw(st.integers(0, min(k, 40))) for k in kv]
    left = draw(st.sampled_from([-1, -1, 0, 31, 100]))
    band = (left, draw(st.sampled_from([-1, 0, 0, 3])), draw(st.sampled_from([0, 0, 5, 70])))
    classes = draw(st.sampled_from([SMALL, ((16, 32, 100, 70), (32, 16, 10, 300)), SMALL[1:]]))
    nodes = draw(forests(kv)) if with_nodes else ()
    return Step(
        tuple(q),
        tuple(kv),
        group_size=draw(st.sampled_from([1, 4, 5, 24])),
        num_kv_heads=draw(st.integers(1, 2)),
        num_ctas=draw(st.integers(1, 20)),
        band=band,
        chunk=chunk,
        classes=classes,
        nodes=nodes,
    )


@st.composite
def forests(draw: st.DrawFn, kv_lens: list[int]) -> tuple[Node, ...]:
    """Nested groups: each node's members are a subset of one node of the level above."""
    nodes: list[Node] = []
    frontier = [(0, tuple(range(len(kv_lens))))]
    for _ in range(draw(st.integers(0, 3))):
        next_frontier = []
        for begin, group in frontier:
            members = tuple(m for m in group if draw(st.booleans()))
            if not members:
                continue
            end = draw(st.integers(begin, max(begin, min(kv_lens[m] for m in members))))
            if end > begin:
                nodes.append(Node(members[0], begin, end, members))
                next_frontier.append((end, members))
        frontier = next_frontier
    return tuple(nodes)


@settings(max_examples=150, deadline=None)
@given(steps(), st.integers(0, 255))
def test_any_step_is_covered_once_balanced_within_capacity_and_repeatable(
    step: Step, fill: int
) -> None:
    plan = make_plan(step)
    check_coverage(step, plan)
    check_every_row_written(step, plan)
    assert len(plan.arrays["items"]) <= plan.layout.max_items
    costs = span_costs(step, plan)
    mean = math.ceil(int(plan.arrays["header"]["total_cost"]) / step.num_ctas)
    quantum = max(c[3] for c in step.classes)
    fixed = max(c[2] for c in step.classes)
    short_rest = min(mean // 8, fixed)
    assert max(costs) <= mean + quantum + fixed + short_rest
    assert used_bytes(step, fill=fill) == used_bytes(step, fill=255 - fill)


@settings(max_examples=100, deadline=None)
@given(steps(with_nodes=True))
def test_any_forest_is_covered_once_and_every_row_is_written(step: Step) -> None:
    plan = make_plan(step)
    check_coverage(step, plan)
    check_every_row_written(step, plan)
    check_nodes_come_first(plan)
    assert plan.arrays["header"]["status"] == 0
    assert len(plan.arrays["items"]) <= plan.layout.max_items
    assert len(plan.arrays["node_tiles"]) <= plan.layout.max_node_tiles


@settings(max_examples=60, deadline=None)
@given(steps(chunk=192), st.integers(0, 5))
def test_batch_invariant_cuts_depend_on_the_request_alone(step: Step, pick: int) -> None:
    plan = make_plan(step)
    check_coverage(step, plan)
    check_every_row_written(step, plan)
    assert len(plan.arrays["items"]) <= plan.layout.max_items
    r = pick % len(step.q_lens)
    alone = dataclasses.replace(
        step, q_lens=(step.q_lens[r],), kv_lens=(step.kv_lens[r],), num_ctas=3
    )
    fields = ["kv_head", "kv_begin", "kv_end", "hole_begin", "hole_end", "row_begin", "num_rows"]

    def mine(p: object, request: int) -> list[object]:
        items = p.arrays["items"]
        return items[items["request"] == request][fields].tolist()

    assert mine(plan, r) == mine(make_plan(alone), 0)
    sizes = [int(i["kv_end"]) - int(i["kv_begin"]) for i in plan.arrays["items"]]
    one_tile = plan.arrays["requests"]["num_tiles"][plan.arrays["items"]["request"]] == 1
    assert all(s <= 192 for s, one in zip(sizes, one_tile, strict=True) if one)


@pytest.mark.parametrize("num_ctas", [1, 132, 264])
def test_capacity_holds_at_its_extremes(num_ctas: int) -> None:
    full = Step((1,) * 300, (131072,) * 300, num_ctas=num_ctas)
    lopsided = Step((8192,) + (0,) * 299, (8192,) + (1,) * 299, num_ctas=num_ctas)
    ragged = Step((31,) * 264, (31,) * 264, num_ctas=num_ctas)
    shared = {"max_requests": 300, "max_tokens": 8192, "max_kv_len": 131072}
    for step in (full, lopsided, ragged):
        plan = make_plan(dataclasses.replace(step, capacity=shared))
        header = plan.arrays["header"]
        assert header["status"] == 0
        assert header["num_items"] <= plan.layout.max_items
        assert header["num_units"] <= plan.layout.max_units
        assert header["num_partial_rows"] <= plan.layout.max_partial_rows
        total = sum(item_cost(step, i) for i in plan.arrays["items"])
        restarts = (num_ctas - 1) * max(c[2] for c in step.classes)
        assert header["total_cost"] <= total <= header["total_cost"] + restarts


def test_layout_is_a_function_of_capacity() -> None:
    capacity = {"max_requests": 64, "max_tokens": 512, "max_kv_len": 4096}
    small = make_plan(Step((1,), (10,), capacity=capacity))
    large = make_plan(Step((8,) * 64, (4096,) * 64, capacity=capacity))
    assert small.layout.total_bytes == large.layout.total_bytes
    assert small.layout.items == large.layout.items


@pytest.mark.parametrize(
    "classes",
    [(), SMALL * 3, SMALL[::-1], ((16, 64, 0, 400),), ((16, 64, 200, 0),), ((16, 0, 200, 400),)],
)
def test_tile_classes_out_of_contract_are_refused(classes: object) -> None:
    step = Step((1,), (100,), classes=classes)
    with pytest.raises(ValueError, match="classes: expected 1 to 4 tile classes of positive"):
        step.config()
