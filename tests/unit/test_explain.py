"""What explain says about a plan is what the plan says, and the pictures can be drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from fi_backend import explaining
from fi_backend.errors import InvalidInput, Unsupported
from fi_backend.explaining.picture import page_columns, row_heights, visible_fraction
from fi_backend.explaining.step import Request, Step, page_ids, read_step
from fi_backend.explaining.summary import summarize
from fi_backend.formats import CAUSAL, Band, HeadShape, Nodes, PagedBatch, PageTable
from fi_backend.host_batch import _move
from fi_backend.planner import Capacity, LayerClass, PlanSlot, StepPlanner

PAGE = 16


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_batch(q_lens: list[int], kv_lens: list[int], nodes: Nodes | None = None) -> PagedBatch:
    """Pages 0, 1, 2, ... in request order; members of nodes share the pages of their first."""
    width = max((-(-n // PAGE) for n in kv_lens), default=0)
    table = torch.arange(len(q_lens) * width, dtype=torch.int32).view(len(q_lens), width)
    if nodes is not None:
        for n in range(nodes.num_nodes):
            members = nodes.members[nodes.member_ptr[n] : nodes.member_ptr[n + 1]].long()
            columns = slice(int(nodes.kv_begin[n]) // PAGE, int(nodes.kv_end[n]) // PAGE)
            table[members, columns] = table[int(nodes.table_row[n]), columns]
    indptr = torch.tensor([0, *np.cumsum(q_lens)], dtype=torch.int32)
    return PagedBatch(indptr, ints(*kv_lens), PageTable.dense(table, PAGE), nodes)


def make_plan(batch: PagedBatch, num_ctas: int = 4, band: Band = CAUSAL) -> PlanSlot:
    layer = LayerClass(HeadShape(8, 2, 64), torch.float32, band=band)
    planner = StepPlanner([layer], Capacity(64, 4096, 4096, 8, 64, 64), num_ctas=num_ctas)
    planner.plan(batch)
    return planner.slot(0)


# Requests 0-3 share 128 tokens, 0 and 1 the next 64 too; request 4 is alone.
FOREST = Nodes(
    table_row=ints(0, 0),
    kv_begin=ints(0, 128),
    kv_end=ints(128, 192),
    member_ptr=ints(0, 4, 6),
    members=ints(0, 1, 2, 3, 0, 1),
    own_begin=ints(192, 192, 128, 128, 0),
)


def forest_step() -> tuple[PagedBatch, PlanSlot]:
    batch = make_batch([1, 1, 1, 2, 30], [200, 210, 140, 150, 100], FOREST)
    return batch, make_plan(batch)


def test_nodes_and_own_parts() -> None:
    step = read_step(*forest_step())
    assert [(n.level, n.members) for n in step.nodes] == [(0, (0, 1, 2, 3)), (1, (0, 1))]
    assert [r.nodes for r in step.requests] == [(0, 1), (0, 1), (0,), (0,), ()]
    assert [r.own_begin for r in step.requests] == [192, 192, 128, 128, 0]
    assert step.nodes[0].pages.tolist() == list(range(8))
    assert step.requests[2].pages.tolist() == [2 * 14 + 8]


def test_shared_pages_are_one_column() -> None:
    columns = page_columns(read_step(*forest_step()))
    # 8 + 4 shared pages, then own ones: 1, 2, 1, 2 of the members and 7 of request 4.
    assert len(columns) == 12 + 1 + 2 + 1 + 2 + 7
    assert [columns[page] for page in range(12)] == list(range(12))


def test_bars_fill_each_cta_without_gaps() -> None:
    batch, slot = forest_step()
    step = read_step(batch, slot)
    for cta in range(step.num_ctas):
        bars = [bar for bar in step.bars if bar.cta == cta]
        assert [bar.start for bar in bars] == [0, *[bar.end for bar in bars[:-1]]]
    assert {bar.request for bar in step.bars} == {~0, ~1, 0, 1, 2, 3, 4}


def test_costs_are_those_of_the_planner() -> None:
    # One decode without sharing on one CTA: nothing is split, so the costs add up exactly.
    batch = make_batch([1], [200])
    slot = make_plan(batch, num_ctas=1)
    step = read_step(batch, slot)
    header = slot.arrays()["header"]
    assert int(step.span_costs.sum()) == int(header["total_cost"])  # type: ignore[index]
    assert step.merges == ()


def test_merges_are_where_the_last_piece_arrives() -> None:
    # One KV head's 256 tokens on each of 2 x 2 CTAs: two cut units, two merges.
    batch = make_batch([1], [256])
    step = read_step(batch, make_plan(batch, num_ctas=4))
    assert [bar.partial for bar in step.bars] == [True] * 4
    assert len(step.merges) == 2
    for cta, time in step.merges:
        assert time == max(bar.end for bar in step.bars if bar.cta // 2 == cta // 2)


def test_every_member_of_a_node_merges() -> None:
    step = read_step(*forest_step())
    members = 4 * 2  # requests and KV heads
    splits_of_request_4 = len(step.merges) - members
    assert 0 <= splits_of_request_4 <= 2 * step.num_ctas


@pytest.mark.parametrize(
    ("band", "expected"),
    [
        (CAUSAL, [[1, 1, 0.25], [1, 1, 0.5]]),
        (Band(-1, -1), [[1, 1, 0.5], [1, 1, 0.5]]),
        (Band.window(4), [[0, 0.75, 0.25], [0, 0.5, 0.5]]),
        (Band.window(2, sink_prefix=1), [[0.25, 0.25, 0.25], [0.25, 0, 0.5]]),
    ],
)
def test_visible_fraction(band: Band, expected: list[list[float]]) -> None:
    # Pages of 4 tokens; two query tokens at positions 8 and 9 of 10.
    step = Step((), (), (), (), 1, 1, page_size=4, band=band, status=0)
    request = Request(2, 10, 0, (), np.arange(3))
    shade = visible_fraction(step, request, np.arange(2), 0, 3)
    np.testing.assert_array_equal(shade, expected)


def test_page_ids_of_every_form() -> None:
    rows = torch.tensor([[9, 9, 9], [4, 7, 2]], dtype=torch.int32)
    assert page_ids(PageTable.dense(rows, 16), 1, 16, 40).tolist() == [7, 2]
    csr = PageTable.csr(ints(0, 3, 6), rows.flatten(), 16)
    assert page_ids(csr, 1, 0, 17).tolist() == [4, 7]
    # Token slots, one column per token, pages of two.
    slots = torch.tensor([[8, 9, 14, 15, 4, 5]], dtype=torch.int32)
    table = PageTable.indirect(slots, ints(0, 0), 2, entry_stride=2, slot_divisor=2)
    assert page_ids(table, 1, 0, 6).tolist() == [4, 7, 2]
    mapped = PageTable.dense(rows, 16, page_map=torch.arange(10, dtype=torch.int32) + 100)
    assert page_ids(mapped, 1, 0, 48).tolist() == [104, 107, 102]
    assert page_ids(mapped, 1, 32, 32).tolist() == []


def test_rows_of_the_picture() -> None:
    def requests(*q_lens: int) -> list[Request]:
        return [Request(q, q, 0, (), np.arange(1)) for q in q_lens]

    assert row_heights(requests(3, 1, 0)) == [3, 1, 0]
    assert row_heights(requests(512, 1, 0, 2)) == [10, 1, 0, 2]


def test_summary_of_a_forest() -> None:
    lines = summarize(read_step(*forest_step())).splitlines()
    assert lines[0] == "step    5 requests, 35 query tokens, 800 KV tokens on 25 pages of 16"
    assert lines[3] == ("sharing 2 nodes, up to 2 levels: 448 of 800 KV tokens need no second read")
    assert lines[4] == "  r0         1 query       200 KV   shares n0 > n1, own from 192"
    assert lines[8] == "  r4        30 query       100 KV"


def test_summary_of_many_requests_is_short() -> None:
    batch = make_batch([1] * 64, [100] * 64)
    lines = explaining.text(batch, make_plan(batch)).splitlines()
    assert lines[-1] == "  and 48 more"
    assert len(lines) < 25


PICTURES = {
    "two requests": make_batch([5, 1], [37, 120]),
    "sixty-four requests": make_batch([1] * 62 + [300, 500], [*range(1, 63), 300, 900]),
    "empty batch": make_batch([], []),
    "zero-length request": make_batch([0, 2], [0, 20]),
}


@pytest.mark.parametrize("batch", PICTURES.values(), ids=PICTURES)
def test_pictures(tmp_path: Path, batch: PagedBatch) -> None:
    path = explaining.explain(batch, path=tmp_path / "step.png")
    image = imread(path)
    assert image.shape[1] == 1320
    assert path == tmp_path / "step.png"


def test_picture_of_a_forest_is_taller_and_shows_slate(tmp_path: Path) -> None:
    batch, slot = forest_step()
    flat = make_batch([1, 1, 1, 2, 30], [200, 210, 140, 150, 100])
    shared = imread(explaining.draw(batch, slot, tmp_path / "shared.png"))
    plain = imread(explaining.explain(flat, make_plan(flat), tmp_path / "plain.png"))
    assert shared.shape[0] > plain.shape[0]

    def slate(image: np.ndarray) -> int:
        return int((np.abs(image[..., :3] - [0.225, 0.255, 0.3]).max(-1) < 0.02).sum())

    assert slate(shared) > 1000 > slate(plain)


def test_the_suffix_chooses_the_format(tmp_path: Path) -> None:
    batch = make_batch([1], [20])
    path = explaining.explain(batch, path=tmp_path / "step.svg")
    assert path.read_text().startswith("<?xml")


def test_the_slot_must_hold_this_batch(tmp_path: Path) -> None:
    slot = make_plan(make_batch([1], [20]))
    with pytest.raises(InvalidInput, match="slot: expected the plan of this batch, got another"):
        explaining.explain(make_batch([1], [20]), slot, tmp_path / "step.png")


def test_a_batch_elsewhere_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta tensor holds nothing: every value must come from the copy."""
    here, slot = forest_step()
    expected = explaining.text(here, slot)
    there = _move(here, here.page_table.entries.to("meta"), torch.device("meta"))
    copies: list[PagedBatch] = []

    def copied(batch: PagedBatch) -> PagedBatch:
        if batch is here:
            return here
        assert batch is there
        copies.append(batch)
        return here

    monkeypatch.setattr("fi_backend.explaining.step.to_host", copied)
    monkeypatch.setattr("fi_backend.explaining.to_host", copied)
    slot.batch = there
    assert explaining.text(there, slot) == expected
    assert len(copies) == 1
    assert explaining.explain(there, path=tmp_path / "step.svg").exists()
    assert len(copies) == 2


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fi_backend.explaining.picture")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Unsupported, match=r"explain: expected matplotlib.*\[pictures\]"):
        explaining.explain(make_batch([1], [20]), path=tmp_path / "step.png")
