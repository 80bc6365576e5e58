"""Prefix forests of random requests, as the bytes of kernels/include/fi/plan/forest.h."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_LEVELS, MAX_MEMBER_TOKENS = 8, 64
NODES_DECLINED = 16


class ForestNode(NamedTuple):
    """KV [kv_begin, kv_end) that the tables of `members`, ascending, hold in the same pages."""

    members: tuple[int, ...]
    kv_begin: int
    kv_end: int


class NodeCapacity(NamedTuple):
    """The nodes' part of PlanCapacity."""

    max_nodes: int = 0
    max_links: int = 0
    max_shared_tokens: int = 0

    def grown(self, by: int) -> NodeCapacity:
        return NodeCapacity(*(n + by for n in self))


NO_NODES = NodeCapacity()


def capacity_of(nodes: Sequence[ForestNode], q_lens: Sequence[int]) -> NodeCapacity:
    """What these nodes take, to the last token."""
    links = sum(len(n.members) for n in nodes)
    return NodeCapacity(len(nodes), links, sum(q_lens[m] for n in nodes for m in n.members))


def random_nodes(
    draw: Random, q_lens: Sequence[int], kv_lens: Sequence[int], num_groups: int, step: int
) -> list[ForestNode]:
    """Trees of nodes over groups of requests, in whole steps of tokens, in the order of forests."""
    able = [
        r
        for r, (q, kv) in enumerate(zip(q_lens, kv_lens, strict=True))
        if 1 <= q <= MAX_MEMBER_TOKENS and kv - q >= step
    ]
    draw.shuffle(able)
    nodes: list[ForestNode] = []

    def grow(members: list[int], begin: int, level: int) -> None:
        limit = min(kv_lens[m] - q_lens[m] for m in members) // step * step
        if len(members) < 2 or limit <= begin or level == MAX_LEVELS:
            return
        steps = (limit - begin) // step
        end = begin + step * draw.choice([steps, 1, draw.randint(1, steps)])
        nodes.append(ForestNode(tuple(sorted(members)), begin, end))
        for part in _parts(draw, members, draw.choice([1, 1, 2, 3])):
            grow(part, end, level + 1)

    for group in _parts(draw, able, num_groups):
        grow(group, 0, 0)
    return sorted(nodes, key=lambda n: (n.members[0], n.kv_end))


def _parts(draw: Random, members: list[int], count: int) -> list[list[int]]:
    """Disjoint parts of some of them."""
    ends = sorted(draw.choice([len(members), draw.randint(0, len(members))]) for _ in range(count))
    return [members[a:b] for a, b in zip([0, *ends], ends, strict=False) if b > a]


def forest_bytes(
    nodes: Sequence[ForestNode],
    q_lens: Sequence[int],
    capacity: NodeCapacity,
    max_requests: int,
    *,
    status: int = 0,
    fill: int = 0xCD,
) -> NDArray[np.uint8]:
    """A forest as its kernel leaves it, aligned; `fill`: what lies where nobody may read."""
    at_requests = 64 + 32 * capacity.max_nodes
    at_links = at_requests + 16 * max_requests
    num_bytes = at_links + (8 * capacity.max_links + 15) // 16 * 16
    memory = np.full(num_bytes + 64, fill, np.uint8)
    start = -memory.ctypes.data % 64
    forest = memory[start : start + num_bytes]
    links: list[list[tuple[int, int]]] = [[] for _ in q_lens]
    own_begin = [0] * len(q_lens)
    records, num_tokens = [], 0
    for number, node in enumerate(nodes):
        tokens = 0
        for member in node.members:
            links[member].append((number, tokens))
            own_begin[member] = node.kv_end
            tokens += q_lens[member]
        parent = links[node.members[0]][-2][0] if node.kv_begin > 0 else -1
        counts = (len(node.members), tokens, num_tokens)
        records.append([node.members[0], node.kv_begin, node.kv_end, *counts, parent, 0])
        num_tokens += tokens
    flat = [link for of_request in links for link in of_request]
    begins = np.cumsum([0, *map(len, links)])
    requests = [
        [int(begin), len(own), end, 0]
        for begin, own, end in zip(begins[:-1], links, own_begin, strict=True)
    ]
    _put(forest, 0, [[len(nodes), len(flat), num_tokens, status]])
    _put(forest, 64, records)
    if nodes:  # of an empty forest only the header is read
        _put(forest, at_requests, requests)
    _put(forest, at_links, [list(link) for link in flat])
    return forest


def _put(forest: NDArray[np.uint8], at: int, records: list[list[int]]) -> None:
    data = np.array(records, np.int32).reshape(-1).view(np.uint8)
    forest[at : at + len(data)] = data
