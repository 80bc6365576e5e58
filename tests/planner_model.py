"""What a plan must mean, spelled out slowly: coverage counts and span costs by brute force."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fi_backend import _core
from fi_backend.plan_records import plan_arrays


@dataclass(frozen=True)
class Node:
    table_row: int
    kv_begin: int
    kv_end: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """A batch and a planner configuration, small enough to enumerate."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    group_size: int = 4
    num_kv_heads: int = 2
    num_ctas: int = 7
    band: tuple[int, int, int] = (-1, 0, 0)
    chunk: int = 0
    classes: tuple[tuple[int, int, int, int], ...] = ((16, 64, 200, 400), (64, 64, 800, 4000))
    nodes: tuple[Node, ...] = ()
    own_begin: tuple[int, ...] | None = None
    capacity: dict[str, int] = field(default_factory=dict)

    def config(self) -> Any:
        links = sum(len(n.members) for n in self.nodes)
        shared = sum(sum(self.q_lens[m] for m in n.members) for n in self.nodes)
        limits = {
            "max_requests": len(self.q_lens),
            "max_tokens": sum(self.q_lens),
            "max_kv_len": max(self.kv_lens, default=0),
            "max_nodes": len(self.nodes),
            "max_links": links,
            "max_shared_tokens": shared,
        }
        return _core.PlanConfig(
            num_qo_heads=self.group_size * self.num_kv_heads,
            num_kv_heads=self.num_kv_heads,
            num_ctas=self.num_ctas,
            band=_core.Band(*self.band),
            invariant_chunk=self.chunk,
            classes=[_core.TileClass(*c) for c in self.classes],
            capacity=_core.PlanCapacity(**(limits | self.capacity)),
        )


@dataclass(frozen=True)
class Plan:
    raw: NDArray[np.uint8]
    layout: Any
    arrays: dict[str, Any]


def make_plan(step: Step, *, kv_dtype: type = np.int32, fill: int = 0xAB) -> Plan:
    """Plan ``step`` into memory full of ``fill``."""
    config = step.config()
    layout = config.layout()
    raw = np.full(layout.total_bytes, fill, dtype=np.uint8)
    indptr = np.concatenate([[0], np.cumsum(step.q_lens)]).astype(np.int32)
    kv_len = np.array(step.kv_lens, dtype=kv_dtype)
    fields = [
        np.array([n.table_row for n in step.nodes], np.int32),
        np.array([n.kv_begin for n in step.nodes], np.int32),
        np.array([n.kv_end for n in step.nodes], np.int32),
        np.concatenate([[0], np.cumsum([len(n.members) for n in step.nodes])]).astype(np.int32),
        np.array([m for n in step.nodes for m in n.members], np.int32),
    ]
    own = None if step.own_begin is None else np.array(step.own_begin, np.int32)
    _core.make_plan(
        config,
        layout,
        len(step.q_lens),
        indptr.ctypes.data,
        kv_len.ctypes.data,
        kv_len.itemsize,
        len(step.nodes),
        [f.ctypes.data for f in fields] + [0 if own is None else own.ctypes.data],
        raw.ctypes.data,
    )
    return Plan(raw, layout, plan_arrays(raw, layout))


def visible(step: Step, request: int, token: int) -> NDArray[np.bool_]:
    """Which KV positions of its request a query token may see, by the definition of a band."""
    left, right, sink = step.band
    q_pos = step.kv_lens[request] - step.q_lens[request] + token
    kv = np.arange(step.kv_lens[request])
    seen = np.ones(len(kv), bool)
    if right >= 0:
        seen &= kv <= q_pos + right
    if left >= 0:
        seen &= (kv >= q_pos - left) | (kv < sink)
    return seen


def item_rows(step: Step, plan: Plan, item: Any) -> list[tuple[int, int, int]]:
    """(request, token of the request, query head) of each packed row of an item."""
    rows = []
    for x in range(item["row_begin"], item["row_begin"] + item["num_rows"]):
        token, head = x // step.group_size, x % step.group_size
        q_head = int(item["kv_head"]) * step.group_size + head
        if item["request"] >= 0:
            rows.append((int(item["request"]), token, q_head))
        else:
            gathered = plan.arrays["gathered"][item["qo_begin"] + token]
            rows.append((int(gathered["request"]), int(gathered["local"]), q_head))
    return rows


def check_coverage(step: Step, plan: Plan) -> None:
    """Every visible (row, KV position) lies in exactly one item, no position in two."""
    heads = step.group_size * step.num_kv_heads
    counts = [
        np.zeros((q, heads, kv), np.int32) for q, kv in zip(step.q_lens, step.kv_lens, strict=True)
    ]
    for item in plan.arrays["items"]:
        kv = np.arange(item["kv_begin"], item["kv_end"])
        kv = kv[(kv < item["hole_begin"]) | (kv >= item["hole_end"])]
        for request, token, q_head in item_rows(step, plan, item):
            counts[request][token, q_head, kv] += 1
    for request, count in enumerate(counts):
        assert count.max(initial=0) <= 1, f"request {request}: a position is covered twice"
        for token in range(step.q_lens[request]):
            missing = visible(step, request, token) & (count[token] == 0)
            assert not missing.any(), f"request {request} token {token}: {np.argwhere(missing)[0]}"


def check_every_row_written(step: Step, plan: Plan) -> None:
    """Each output row has one direct writer, or a merge unit that expects exactly its arrivals."""
    arrivals: dict[int, int] = {}
    direct: dict[tuple[int, int, int], int] = {}
    partial: set[int] = set()
    for item in plan.arrays["items"]:
        rows = item_rows(step, plan, item)
        if item["partial_row"] < 0:
            for row in rows:
                direct[row] = direct.get(row, 0) + 1
            continue
        taken = set(range(item["partial_row"], item["partial_row"] + item["num_rows"]))
        assert not taken & partial, "two items write the same partial rows"
        partial |= taken
        for unit in {unit_of(step, plan, item, row) for row in rows}:
            arrivals[unit] = arrivals.get(unit, 0) + 1
    assert len(partial) == plan.arrays["header"]["num_partial_rows"]
    assert len(partial) <= plan.layout.max_partial_rows
    assert all(count == 1 for count in direct.values())
    for unit, record in enumerate(plan.arrays["units"]):
        assert arrivals.get(unit, 0) == record["expected"], f"unit {unit}"
    merged = sum(int(u["num_rows"]) for u in plan.arrays["units"] if u["expected"])
    assert merged + len(direct) == sum(step.q_lens) * step.group_size * step.num_kv_heads


def unit_of(step: Step, plan: Plan, item: Any, row: tuple[int, int, int]) -> int:
    request, token, q_head = row
    record = plan.arrays["requests"][request]
    packed = token * step.group_size + q_head % step.group_size
    tile = packed // step.classes[record["tile_class"]][0]
    return int(record["unit_base"] + item["kv_head"] * record["num_tiles"] + tile)


def item_cost(step: Step, item: Any) -> int:
    rows, kv_tile, c_fixed, c_tile = step.classes[item["tile_class"]]
    c_fixed += _core.node_fixed(rows) if item["request"] < 0 else 0
    if item["kv_end"] <= item["kv_begin"]:
        return c_fixed
    tiles = -(-int(item["kv_end"]) // kv_tile) - int(item["kv_begin"]) // kv_tile
    return c_fixed + c_tile * (tiles - int(item["hole_end"] - item["hole_begin"]) // kv_tile)


def check_nodes_come_first(plan: Plan) -> None:
    """In every span nodes precede requests: the kernel announces the states of the latter last."""
    ptr, items = plan.arrays["cta_ptr"], plan.arrays["items"]
    for begin, end in pairwise(ptr.tolist()):
        is_request = items["request"][begin:end] >= 0
        assert (np.diff(is_request.astype(int)) >= 0).all(), f"items {begin} to {end}"


def span_costs(step: Step, plan: Plan) -> list[int]:
    ptr, items = plan.arrays["cta_ptr"], plan.arrays["items"]
    return [
        sum(item_cost(step, i) for i in items[ptr[p] : ptr[p + 1]]) for p in range(len(ptr) - 1)
    ]
