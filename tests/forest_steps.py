"""Steps with shared prefixes for the two forest finders, and a naive search for what they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from plan_fibers import FILL
from torch import Tensor

from fi_backend import Capacity, PagedBatch, PageTable, _core
from fi_backend.class_plans import plan_capacity
from fi_backend.launch import table_view
from fi_backend.prefix_forest import PrefixForest, forest_arrays

CHECKPOINT, MAX_LEVELS, MAX_MEMBER_TOKENS = 64, 8, 64
UNUSED = -(1 << 20)  # in entries that nobody may read
MOST_TOKENS = 8192  # of a request of `serving_step`


@dataclass(frozen=True, eq=False)
class Step:
    """Lengths and pages of a step, and what a forest of it may hold."""

    name: str
    batch: PagedBatch
    capacity: Capacity
    pages: list[list[int]] = field(repr=False)  # of each request

    @property
    def q_len(self) -> list[int]:
        return np.diff(self.batch.qo_indptr.numpy()).tolist()

    def find_on_host(self) -> NDArray[np.uint8]:
        """All bytes of the host's forest, written over FILL."""
        batch, capacity = self.batch, plan_capacity(self.capacity)
        size = _core.forest_layout(capacity).total_bytes
        forest = np.full(size, FILL, np.uint8)
        _core.find_forest(
            capacity,
            batch.num_requests,
            batch.qo_indptr.data_ptr(),
            batch.kv_len.data_ptr(),
            batch.kv_len.element_size(),
            table_view(batch),
            forest.ctypes.data,
        )
        return forest

    def arrays(self, forest: NDArray[np.uint8]) -> dict[str, NDArray[np.void]]:
        layout = _core.forest_layout(plan_capacity(self.capacity))
        return forest_arrays(forest, layout, self.batch.num_requests)


def handed_over(forest: PrefixForest) -> Tensor | None:
    """What the kernel's CTAs hand over, zero between launches; None on the CPU."""
    return getattr(forest, "_branches", None)


Node = tuple[int, int, tuple[int, ...]]  # kv_begin, kv_end, members


def shared_ranges(step: Step) -> list[Node]:
    """Every range that pays, by comparing all prefixes with all, in no particular order."""
    page = step.batch.page_table.page_size
    pages = max(1, -(-CHECKPOINT // page))
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}  # members -> prefixes they share
    owners: dict[tuple[int, ...], list[int]] = {}
    for r, (q, kv) in enumerate(zip(step.q_len, step.batch.kv_len.tolist(), strict=True)):
        if not 1 <= q <= MAX_MEMBER_TOKENS:
            continue
        for k in range(1, (kv - q) // (pages * page) + 1):
            owners.setdefault(tuple(step.pages[r][: k * pages]), []).append(r)
    for prefix, members in owners.items():
        if len(members) > 1:
            groups.setdefault(tuple(members), []).append(prefix)
    # Members of a range share all its prefixes; it ends with the longest.
    ends = {members: max(len(p) for p in prefixes) * page for members, prefixes in groups.items()}
    ranges = []
    for members, end in ends.items():
        wider = [e for m, e in ends.items() if set(m) > set(members)]
        if (len(members) - 1) * (end - max(wider, default=0)) >= 128 + 32 * len(members):
            ranges.append((members, end))
    nodes = []
    for members, end in ranges:
        wider = [e for m, e in ranges if set(m) > set(members)]
        if len(wider) < MAX_LEVELS:
            nodes.append((max(wider, default=0), end, members))
    return nodes


def nodes_of(arrays: dict[str, NDArray[np.void]]) -> list[Node]:
    """The nodes of a forest with their members."""
    members: list[list[int]] = [[] for _ in arrays["nodes"]]
    for r, request in enumerate(arrays["requests"]):
        for link in arrays["links"][request["link_begin"] :][: request["num_links"]]:
            members[int(link["node"])].append(r)
    ranges = zip(arrays["nodes"]["kv_begin"], arrays["nodes"]["kv_end"], members, strict=True)
    return [(int(begin), int(end), tuple(m)) for begin, end, m in ranges]


def random_step(seed: int, max_requests: int = 60, most_tokens: int = 20_000) -> Step:
    """Requests that branch off each other anywhere, in any order."""
    draw = Random(seed)
    page = draw.choice([1, 1, 16, 16, 16, 48, 64, 256])
    count = draw.choice([0, 1, 2, draw.randint(3, max_requests), max_requests])
    fresh = iter(range(1, 1 << 30))
    rows: list[list[int]] = []
    limit = draw.choice([300, 2000]) if page == 1 else draw.choice([500, 4000, 20_000])
    limit = min(limit, most_tokens)
    for _ in range(count):
        length = draw.randint(0, limit) // page
        row: list[int] = []
        if rows and draw.random() < 0.85:
            other = draw.choice(rows)
            row = other[: draw.choice([len(other), draw.randint(0, len(other))])]
        rows.append(row + [next(fresh) for _ in range(length - len(row))])
    draw.shuffle(rows)
    if draw.random() < 0.3:
        _mix_in_equal_ids(draw, rows)
    q = [draw.choice([0, 1, 1, 1, 1, 2, 5, 64, 65, 300]) for _ in rows]
    kv = [len(row) * page - draw.randint(0, page - 1) if row else 0 for row in rows]
    q = [min(a, b) for a, b in zip(q, kv, strict=True)]
    roomy = (count, 4 * count, 64 * count + 1)
    tight = tuple(draw.randint(0, most) for most in (count // 4, count, 2 * count))
    nodes, links, tokens = draw.choice([roomy, roomy, roomy, tight])
    capacity = Capacity(count + draw.choice([0, 7]), sum(q), limit + 256, nodes, links, tokens)
    kv_dtype = draw.choice([torch.int32, torch.int64])
    return Step(
        f"{seed}, page {page}",
        PagedBatch(
            torch.tensor([0, *np.cumsum(q)], dtype=torch.int32),
            torch.tensor(kv, dtype=kv_dtype),
            _table(draw, rows, page),
        ),
        capacity,
        rows,
    )


def serving_step(seed: int, requests: int, page: int, kind: str = "dense") -> Step:
    """Requests of up to 8,192 tokens that branch off each other, as `random_step`'s.

    Steps of equal arguments but the seed have tensors of equal shapes.

    Args:
        seed: of all that is drawn.
        requests: how many.
        page: tokens of one.
        kind: of table: dense, csr or indirect.
    """
    rng = np.random.default_rng(seed)
    width = MOST_TOKENS // page
    table = np.arange(requests * width, dtype=np.int32).reshape(requests, width)
    order = rng.permutation(requests)
    for i in range(1, requests):
        row, other = table[order[i]], table[order[rng.integers(i)]]
        end = rng.choice([0, width // 8, width // 2, rng.integers(width)])
        row[:end] = other[:end]
        if rng.random() < 0.05:  # equal ids behind different ones
            row[end + 1 :] = other[end + 1 :]
    q = rng.choice([1, 1, 1, 1, 0, 4, MAX_MEMBER_TOKENS, MAX_MEMBER_TOKENS + 1], requests)
    kv = np.maximum(rng.integers(0, MOST_TOKENS + 1, requests), q)
    pages = -(-kv // page)
    table[np.arange(width) >= pages[:, None]] = UNUSED
    indptr = torch.tensor([0, *np.cumsum(q)], dtype=torch.int32)
    tokens = (MAX_MEMBER_TOKENS + 1) * requests
    # What does not fit is declined.
    limits = (requests, 8 * requests, tokens // 2 if seed % 3 == 2 else 8 * tokens)
    return Step(
        f"{requests} requests, page {page}, {kind}, {seed}",
        PagedBatch(
            indptr,
            torch.tensor(kv, dtype=torch.int32 if seed % 2 else torch.int64),
            _serving_table(rng, table, pages, page, kind),
        ),
        Capacity(requests, tokens, MOST_TOKENS, *limits),
        [],
    )


def _serving_table(
    rng: np.random.Generator,
    table: NDArray[np.int32],
    pages: NDArray[np.int64],
    page: int,
    kind: str,
) -> PageTable:
    if kind == "dense":
        return PageTable.dense(torch.from_numpy(table), page)
    if kind == "csr":
        used = np.concatenate([row[:count] for row, count in zip(table, pages, strict=True)])
        indptr = torch.tensor([0, *np.cumsum(pages)], dtype=torch.int32)
        return PageTable.csr(indptr, torch.from_numpy(used), page)
    assert kind == "indirect", kind
    index = rng.permutation(2 * len(table))[: len(table)]
    entries = np.full((2 * len(table), table.shape[1]), UNUSED, np.int32)
    entries[index] = table
    return PageTable.indirect(torch.from_numpy(entries), torch.from_numpy(index), page)


def _mix_in_equal_ids(draw: Random, rows: list[list[int]]) -> None:
    """Give rows pages of others behind different ones: equal ids do not mean equal prefixes."""
    for _ in range(len(rows)):
        a, b = draw.choice(rows), draw.choice(rows)
        if a is not b and min(len(a), len(b)) > 2:
            at = draw.randrange(min(len(a), len(b)))
            end = draw.randint(at, min(len(a), len(b)))
            a[at:end] = b[at:end]


def _table(draw: Random, rows: list[list[int]], page: int) -> PageTable:
    kind = draw.choice(["dense", "csr", "indirect"])
    if kind == "csr":
        indptr = torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=torch.int32)
        entries = torch.tensor([p for row in rows for p in row] or [UNUSED], dtype=torch.int32)
        return PageTable.csr(indptr, entries, page)
    width = max([len(row) for row in rows], default=0) + 1
    stride = draw.choice([1, page]) if kind == "indirect" else 1
    entries = torch.full((len(rows) + 2, width * stride), UNUSED, dtype=torch.int32)
    order = list(range(len(rows) + 2))
    if kind == "indirect":
        draw.shuffle(order)
    for r, row in enumerate(rows):
        entries[order[r], : len(row) * stride : stride] = torch.tensor(row, dtype=torch.int32)
    if kind == "dense":
        return PageTable.dense(entries[: len(rows)], page)
    index = torch.tensor(order[: len(rows)], dtype=draw.choice([torch.int32, torch.int64]))
    return PageTable.indirect(entries, index, page, entry_stride=stride)
