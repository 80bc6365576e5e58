"""Random steps for planners that must write equal bytes: lengths within contract and out of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plan_forests import (
    NO_NODES,
    NODES_DECLINED,
    ForestNode,
    NodeCapacity,
    capacity_of,
    forest_bytes,
    random_nodes,
)

from fi_backend import _core
from fi_backend.plan_records import plan_arrays

# (num_qo_heads, num_kv_heads) of Llama 3.1 8B and 70B, two of eight ranks, Qwen 2.5 7B, MHA, MQA.
HEADS = [(32, 8), (64, 8), (4, 1), (8, 1), (28, 4), (40, 8), (8, 8), (64, 1)]
CLASSES = [
    [(16, 64, 40, 190), (64, 64, 160, 1240)],
    [(16, 64, 200, 400), (64, 64, 800, 4000), (128, 64, 900, 5000)],
    [(16, 32, 100, 70), (32, 16, 10, 300)],
    [(64, 128, 1, 1)],
]
BANDS = [(-1, 0, 0)] * 4 + [
    (-1, -1, 0),
    (127, 0, 0),
    (4095, 0, 4),
    (1000, 0, 300),
    (99, 7, 70),
    (-1, 9, 0),
]
KINDS = ["decode", "padded", "verify", "mixed", "prefill", "broken"]


@dataclass(frozen=True)
class PlanCase:
    """A configuration of the planner and lengths to plan, as they lie in memory."""

    name: str
    heads: tuple[int, int]
    num_ctas: int
    band: tuple[int, int, int]
    chunk: int
    classes: list[tuple[int, int, int, int]]
    capacity: tuple[int, int, int]  # requests, query tokens, KV tokens of a request
    num_requests: int
    qo_indptr: NDArray[np.int32] = field(repr=False)
    kv_len: NDArray[Any] = field(repr=False)
    node_capacity: NodeCapacity = NO_NODES
    nodes: list[ForestNode] = field(default_factory=list, repr=False)
    forest: NDArray[np.uint8] | None = field(default=None, repr=False)  # the same as bytes

    def config(self) -> _core.PlanConfig:
        return _core.PlanConfig(
            num_qo_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            num_ctas=self.num_ctas,
            band=_core.Band(*self.band),
            invariant_chunk=self.chunk,
            classes=[_core.TileClass(*c) for c in self.classes],
            capacity=_core.PlanCapacity(*self.capacity, *self.node_capacity),
        )


def plan_on_host(case: PlanCase, fill: int = 0xAB) -> NDArray[np.uint8]:
    """All bytes of the host's plan, written over `fill`."""
    config = case.config()
    layout = config.layout()
    plan = np.full(layout.total_bytes, fill, np.uint8)
    _core.make_plan_of_forest(
        config,
        layout,
        case.num_requests,
        case.qo_indptr.ctypes.data,
        case.kv_len.ctypes.data,
        case.kv_len.itemsize,
        0 if case.forest is None else case.forest.ctypes.data,
        plan.ctypes.data,
    )
    return plan


def plan_of_explicit_nodes(case: PlanCase, fill: int = 0xAB) -> NDArray[np.uint8]:
    """The host's plan of the same nodes, given one by one."""
    config = case.config()
    layout = config.layout()
    plan = np.full(layout.total_bytes, fill, np.uint8)
    members = [m for n in case.nodes for m in n.members]
    fields = [
        np.array(values, np.int32)
        for values in (
            [n.members[0] for n in case.nodes],
            [n.kv_begin for n in case.nodes],
            [n.kv_end for n in case.nodes],
            np.cumsum([0, *(len(n.members) for n in case.nodes)]),
            members,
        )
    ]
    _core.make_plan(
        config,
        layout,
        case.num_requests,
        case.qo_indptr.ctypes.data,
        case.kv_len.ctypes.data,
        case.kv_len.itemsize,
        len(case.nodes),
        [*(f.ctypes.data for f in fields), 0],
        plan.ctypes.data,
    )
    return plan


def assert_same(case: PlanCase, expected: NDArray[np.uint8], got: NDArray[np.uint8]) -> None:
    """Equal in every byte, those that neither may write included; says what differs first."""
    if np.array_equal(expected, got):
        return
    layout = case.config().layout()
    wanted, arrays = plan_arrays(expected, layout), plan_arrays(got, layout)
    for name, array in wanted.items():
        pairs = zip(np.ravel(array), np.ravel(arrays[name]), strict=True)
        for i, (want, have) in enumerate(pairs):
            assert want.tobytes() == have.tobytes(), f"{case}: {name}[{i}] is {have}, not {want}"
    where = np.flatnonzero(expected != got)
    raise AssertionError(f"{case}: writes outside the arrays at {where[:4]}")


def random_case(seed: int, max_requests: int = 1024) -> PlanCase:
    """A step of one of KINDS, of up to max_requests requests x 131,072 tokens."""
    draw = Random(seed)
    kind = KINDS[seed % len(KINDS)]
    chunk = draw.choice([0, 0, 0, 192, 512, 4096])
    limit = max_requests if chunk == 0 else max(1, max_requests // 8)  # items grow with KV / chunk
    count = draw.choice([0, 1, 2, draw.randint(1, limit), draw.randint(1, limit), limit])
    kv_limit = draw.choice([1, 70, 1000, 20_000, 131_072])
    kv = np.array([draw.randint(0, kv_limit) for _ in range(count)], np.int64)
    q = np.array([_query_tokens(kind, draw, int(k)) for k in kv], np.int64)
    indptr = np.concatenate([[0], np.cumsum(q)])
    capacity = (draw.choice([count, count + 5, limit + 76]), int(indptr[-1]), kv_limit)
    num_requests = count
    if kind == "broken":
        capacity, num_requests = _break(draw, indptr, kv, capacity)
    classes = draw.choice(CLASSES)
    if chunk % max(c[1] for c in classes):
        chunk = 512
    return PlanCase(
        name=f"{seed}-{kind}",
        heads=draw.choice(HEADS),
        num_ctas=draw.choice([1, 3, 78, 132, 264, 396, 1000]),
        band=draw.choice(BANDS),
        chunk=chunk,
        classes=classes,
        capacity=capacity,
        num_requests=num_requests,
        qo_indptr=indptr.astype(np.int32),
        kv_len=kv.astype(draw.choice([np.int32, np.int64])),
    )


# Of a step with a forest: query tokens of its requests.
FOREST_KINDS = {
    "decode": [1],
    "padded": [0, 1, 1],
    "verify": [1, 4, 8],
    "drafts": [1, 16, 63, 64],
    "mixed": [*[1] * 30, 0, 65, 300, 2048],
}
# Of the last ones, costs need 64 bits at many KV tokens.
FOREST_CLASSES = [*CLASSES, [(16, 64, 290, 3_000_000), (64, 64, 4000, 9_000_000)]]
# (num_qo_heads, num_kv_heads): groups of 1 to 64.
FOREST_HEADS = [(32, 8), (64, 8), (4, 1), (28, 4), (8, 8), (64, 1), (6, 2)]


def forest_case(seed: int, max_requests: int = 300) -> PlanCase:
    """A step whose requests share prefixes: several groups of up to eight levels."""
    draw = Random(seed)
    kind = draw.choice(list(FOREST_KINDS))
    count = draw.choice([2, 3, draw.randint(2, 40), draw.randint(2, max_requests), max_requests])
    kv_limit = draw.choice([200, 1000, 8192, 131_072])
    q_lens = [draw.choice(FOREST_KINDS[kind]) for _ in range(count)]
    kv_lens = [q + draw.choice([0, draw.randint(0, kv_limit), kv_limit]) for q in q_lens]
    groups, step = draw.choice([1, 1, 3, 7, 40]), draw.choice([64, 64, 16, 192, 5])
    nodes = random_nodes(draw, q_lens, kv_lens, groups, step)
    node_capacity = capacity_of(nodes, q_lens).grown(draw.choice([0, 0, 1, 50]))
    if node_capacity.max_nodes == 0:
        node_capacity = NodeCapacity(1, 2, 2)
    capacity = (count + draw.choice([0, 0, 5, 76]), max(1, sum(q_lens)), max(kv_lens))
    status = draw.choice([0, 0, NODES_DECLINED])
    return PlanCase(
        name=f"{seed}-{kind}",
        heads=draw.choice(FOREST_HEADS),
        num_ctas=draw.choice([1, 3, 78, 132, 264, 396, 1000]),
        band=draw.choice([(-1, 0, 0)] * 3 + [(-1, -1, 0), (-1, 9, 0)]),
        chunk=0,
        classes=draw.choice(FOREST_CLASSES),
        capacity=capacity,
        num_requests=count,
        qo_indptr=np.cumsum([0, *q_lens]).astype(np.int32),
        kv_len=np.array(kv_lens, draw.choice([np.int32, np.int64])),
        node_capacity=node_capacity,
        nodes=nodes,
        forest=forest_bytes(nodes, q_lens, node_capacity, capacity[0], status=status),
    )


def broken_forest_case(seed: int) -> PlanCase:
    """The same, mostly with lengths out of contract; then the forest may be garbage too."""
    draw = Random(seed)
    case = forest_case(seed)
    indptr, kv_len = case.qo_indptr.astype(np.int64), case.kv_len.astype(np.int64)
    capacity, num_requests = _break(draw, indptr, kv_len, case.capacity)
    assert case.forest is not None
    bytes_needed = dataclasses.replace(case, capacity=capacity).config().forest_bytes
    forest = case.forest[:bytes_needed].copy()
    if draw.random() < 0.5:
        garbage = draw.randbytes(len(forest) - 16)
        forest[16:] = np.frombuffer(garbage, np.uint8)
    return dataclasses.replace(
        case,
        capacity=capacity,
        num_requests=num_requests,
        qo_indptr=indptr.astype(np.int32),
        kv_len=kv_len.astype(case.kv_len.dtype),
        forest=forest,
    )


def serving_forest(num_requests: int, seed: int, **changes: object) -> PlanCase:
    """Decodes of 8,192 tokens and more in a few groups, with some requests beside them."""
    draw = Random(seed)
    q_lens = [draw.choice([1] * 60 + [4, 0, 512]) for _ in range(num_requests)]
    kv_lens = [8192 + q + draw.randint(0, 4000) for q in q_lens]
    nodes = random_nodes(draw, q_lens, kv_lens, 12, 64)
    node_capacity = NodeCapacity(256, 8 * num_requests, 16 * num_requests)
    capacity = (num_requests, max(8192, sum(q_lens)), 131_072)
    base = PlanCase(
        f"serving {seed}",
        heads=(32, 8),
        num_ctas=264,
        band=(-1, 0, 0),
        chunk=0,
        classes=[(16, 64, 40, 190), (64, 64, 160, 1240)],
        capacity=capacity,
        num_requests=num_requests,
        qo_indptr=np.cumsum([0, *q_lens]).astype(np.int32),
        kv_len=np.array(kv_lens, np.int64),
        node_capacity=node_capacity,
        nodes=nodes,
        forest=forest_bytes(nodes, q_lens, node_capacity, num_requests),
    )
    return dataclasses.replace(base, **changes)


def _query_tokens(kind: str, draw: Random, kv_len: int) -> int:
    if kind == "decode":
        return 1
    if kind == "padded":
        return draw.choice([0, 0, 1])
    if kind == "verify":
        return min(kv_len, draw.choice([1, 4, 4, 8]))
    chunk = draw.choice([0, 300, 2048]) if draw.random() < 0.1 else 1
    return min(kv_len, chunk if kind == "mixed" else draw.randint(0, 300))


def _break(
    draw: Random,
    indptr: NDArray[np.int64],
    kv: NDArray[np.int64],
    capacity: tuple[int, int, int],
) -> tuple[tuple[int, int, int], int]:
    """Put lengths out of contract, in place; return the capacity and a number of requests."""
    for _ in range(draw.randint(0, 3)):
        indptr[draw.randrange(len(indptr))] = draw.choice([-5, 0, 3, int(indptr[-1]) + 9])
    for _ in range(draw.randint(0, 2) if len(kv) else 0):
        kv[draw.randrange(len(kv))] = draw.choice([-1, -(2**31), capacity[2] + 1, 2**31 - 1])
    requests, tokens, kv_len = capacity
    requests = draw.choice([requests, max(0, len(kv) - 2)])
    return (requests, int(draw.choice([tokens, tokens // 2])), kv_len), draw.choice([len(kv), -1])
