"""A planned step as plain numbers: what the pictures and the summary are made from."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fi_backend import _core
from fi_backend.errors import require
from fi_backend.formats import Band, PagedBatch, PageTable
from fi_backend.host_batch import to_host

if TYPE_CHECKING:
    from fi_backend.planner import PlanSlot

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Node:
    """A shared prefix: KV positions [kv_begin, kv_end) that its members read together."""

    kv_begin: int
    kv_end: int
    level: int  # nodes that lie before it in each member's chain
    members: tuple[int, ...]
    pages: Ints


@dataclass(frozen=True)
class Request:
    """A request and the pages of the pool that hold its KV tokens."""

    q_len: int
    kv_len: int
    own_begin: int  # first KV position that no node covers
    nodes: tuple[int, ...]
    pages: Ints


@dataclass(frozen=True)
class Bar:
    """A work item on the timeline of its CTA, in cost units."""

    cta: int
    start: int
    end: int
    request: int  # index, or ~node
    partial: bool  # leaves a partial state that is merged later
    kv_tokens: int


@dataclass(frozen=True)
class Step:
    """A batch with its plan."""

    requests: tuple[Request, ...]
    nodes: tuple[Node, ...]
    bars: tuple[Bar, ...]
    merges: tuple[tuple[int, int], ...]  # per merge: CTA of the last arriver, time of its arrival
    num_ctas: int
    num_kv_heads: int
    page_size: int
    band: Band
    status: int

    def page_lists(self) -> list[Ints]:
        """Pages of each node, then of each request's own part."""
        return [*(node.pages for node in self.nodes), *(r.pages for r in self.requests)]

    @property
    def span_costs(self) -> Ints:
        """Cost of each CTA's items."""
        costs = np.zeros(self.num_ctas, dtype=np.int64)
        for bar in self.bars:
            costs[bar.cta] += bar.end - bar.start
        return costs


def read_step(batch: PagedBatch, slot: PlanSlot) -> Step:
    """Gather everything that is shown about ``batch`` and its plan in ``slot``.

    Both may lie on a GPU: they are copied, which waits for it.

    Raises:
        InvalidInput: the slot is not planned, or holds the plan of another batch.
    """
    hint = "call planner.plan(batch) first, and explain before the next plan"
    got = "another batch's plan" if slot.batch is not None else "no plan"
    require(slot.batch is batch, "slot", "the plan of this batch", got, hint)
    batch = to_host(batch)
    arrays: dict[str, Any] = dict(slot.arrays())
    links = _links(arrays)
    nodes = _nodes(batch, arrays, links)
    bars = _bars(arrays, slot.classes)
    return Step(
        requests=_requests(batch, arrays, links, nodes),
        nodes=nodes,
        bars=bars,
        merges=_merges(arrays, slot, bars, links),
        num_ctas=len(arrays["cta_ptr"]) - 1,
        num_kv_heads=slot.layer_class.heads.num_kv_heads,
        page_size=batch.page_table.page_size,
        band=slot.layer_class.band,
        status=int(arrays["header"]["status"]),
    )


def page_ids(table: PageTable, row: int, begin: int, end: int) -> Ints:
    """Return the ids of the pages that hold tokens [begin, end) of a row of a table on the CPU."""
    first, last = (
        begin // table.page_size,
        max(-(-end // table.page_size), begin // table.page_size),
    )
    entries = table.entries.numpy()
    if table.indptr is not None:
        base = int(table.indptr[row])
        ids = entries[base + first : base + last]
    else:
        at = row if table.row_index is None else int(table.row_index[row])
        ids = entries[at, first * table.entry_stride : last * table.entry_stride]
        ids = ids[:: table.entry_stride]
    ids = ids.astype(np.int64) // table.slot_divisor
    return ids if table.page_map is None else table.page_map.numpy()[ids].astype(np.int64)


def _links(arrays: dict[str, Any]) -> list[tuple[tuple[int, int], ...]]:
    """Per request: (node, row offset) of its nodes, in merge order."""
    links = arrays["links"]
    return [
        tuple(
            (int(link["node"]), int(link["row_offset"]))
            for link in links[request["link_begin"] : request["link_end"]]
        )
        for request in arrays["requests"]
    ]


def _nodes(
    batch: PagedBatch, arrays: dict[str, Any], links: list[tuple[tuple[int, int], ...]]
) -> tuple[Node, ...]:
    members = defaultdict(list)
    levels: dict[int, int] = defaultdict(int)
    for request, chain in enumerate(links):
        for level, (node, _) in enumerate(chain):
            members[node].append(request)
            levels[node] = max(levels[node], level)
    nodes = []
    for n, node in enumerate(arrays["nodes"]):
        begin, end = int(node["kv_begin"]), int(node["kv_end"])
        pages = page_ids(batch.page_table, int(node["table_row"]), begin, end)
        nodes.append(Node(begin, end, levels[n], tuple(members[n]), pages))
    return tuple(nodes)


def _requests(
    batch: PagedBatch,
    arrays: dict[str, Any],
    links: list[tuple[tuple[int, int], ...]],
    nodes: tuple[Node, ...],
) -> tuple[Request, ...]:
    given = None if batch.nodes is None else batch.nodes.own_begin
    requests = []
    for r, planned in enumerate(arrays["requests"]):
        chain = tuple(node for node, _ in links[r])
        own_begin = max((nodes[n].kv_end for n in chain), default=0)
        if given is not None:
            own_begin = int(given[r])
        kv_len = int(planned["kv_len"])
        pages = page_ids(batch.page_table, r, own_begin, kv_len)
        requests.append(Request(int(planned["q_len"]), kv_len, own_begin, chain, pages))
    return tuple(requests)


def _bars(arrays: dict[str, Any], classes: Any) -> tuple[Bar, ...]:
    bars = []
    cta_ptr, items = arrays["cta_ptr"], arrays["items"]
    for cta in range(len(cta_ptr) - 1):
        clock = 0
        for item in items[cta_ptr[cta] : cta_ptr[cta + 1]]:
            tile = classes[int(item["tile_class"])]
            begin, end = int(item["kv_begin"]), int(item["kv_end"])
            hole = int(item["hole_end"]) - int(item["hole_begin"])
            tiles = -(-end // tile.kv_tile) - begin // tile.kv_tile - hole // tile.kv_tile
            cost = tile.c_fixed + tile.c_tile * (tiles if end > begin else 0)
            cost += _core.node_fixed(tile.rows) if int(item["request"]) < 0 else 0
            partial = int(item["partial_row"]) >= 0
            bars.append(
                Bar(cta, clock, clock + cost, int(item["request"]), partial, end - begin - hole)
            )
            clock += cost
    return tuple(bars)


def _merges(
    arrays: dict[str, Any],
    slot: PlanSlot,
    bars: tuple[Bar, ...],
    links: list[tuple[tuple[int, int], ...]],
) -> tuple[tuple[int, int], ...]:
    """Where and when the last piece of each merge unit arrives, if all CTAs start together."""
    own: dict[int, list[Bar]] = defaultdict(list)
    shared: dict[int, list[Bar]] = defaultdict(list)
    for item, bar in zip(arrays["items"], bars, strict=True):
        if bar.partial:
            (own if bar.request >= 0 else shared)[int(item["unit"])].append(bar)
    heads, group = slot.layer_class.heads.num_kv_heads, slot.layer_class.heads.group_size
    merges = []
    for r, request in enumerate(arrays["requests"]):
        rows, tiles = int(request["q_len"]) * group, int(request["num_tiles"])
        tile_rows = slot.classes[int(request["tile_class"])].rows
        for unit in range(heads * tiles):
            head, tile = divmod(unit, tiles)
            arrivals = list(own[int(request["unit_base"]) + unit])
            for n, offset in links[r]:
                node = arrays["nodes"][n]
                node_rows = slot.classes[int(node["tile_class"])].rows
                first = (offset + tile * tile_rows) // node_rows
                last = (offset + min((tile + 1) * tile_rows, rows) - 1) // node_rows
                for t in range(first, last + 1):
                    arrivals += shared[int(node["tile_base"]) + t * heads + head]
            if arrivals:
                final = max(arrivals, key=lambda bar: (bar.end, bar.cta))
                merges.append((final.cta, final.end))
    return tuple(merges)
