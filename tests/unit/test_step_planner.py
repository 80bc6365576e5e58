"""StepPlanner: slots, capacity, workspace, and one test per documented error."""

from __future__ import annotations

import pytest
import torch

from fi_backend import errors
from fi_backend.formats import CAUSAL, Band, HeadShape, PagedBatch, PageTable
from fi_backend.layers import Capacity, LayerClass, intersect_bands
from fi_backend.planner import StepPlanner, workspace_bytes

HEADS = HeadShape(8, 2, 64)
LAYER = LayerClass(HEADS, torch.bfloat16)
CAPACITY = Capacity(max_requests=4, max_tokens=64, max_kv_len=256)


def batch(q_lens: list[int], kv_lens: list[int], page: int = 16) -> PagedBatch:
    pages = max([-(-kv // page) for kv in kv_lens], default=0)
    table = torch.arange(max(1, pages) * len(kv_lens), dtype=torch.int32).view(len(kv_lens), -1)
    indptr = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(kv_lens, dtype=torch.int32)
    return PagedBatch(indptr, lengths, PageTable.dense(table, page))


def test_every_class_gets_its_slot_and_slots_never_move() -> None:
    windowed = LayerClass(HEADS, torch.bfloat16, band=Band.window(32))
    planner = StepPlanner([LAYER, windowed], CAPACITY, num_ctas=2)
    planner.plan(batch([1, 1], [200, 100]))
    address = planner.slot(1).plan.data_ptr()
    assert planner.slot(0).arrays()["items"]["kv_begin"].min() == 0
    assert planner.slot(1).arrays()["items"]["kv_begin"].min() == 100 - 32
    planner.plan(batch([2], [10]))
    assert planner.slot(1).plan.data_ptr() == address
    assert planner.slot(1).arrays()["header"]["num_requests"] == 1


def test_page_table_ids_choose_among_several_batches() -> None:
    other = LayerClass(HEADS, torch.bfloat16, page_table_id=1)
    planner = StepPlanner([LAYER, other], CAPACITY)
    first, second = batch([1], [100]), batch([1], [90])
    planner.plan([first, second])
    assert planner.slot(0).batch is first
    assert planner.slot(1).batch is second


def test_workspace_bytes_is_what_the_planner_allocates() -> None:
    planner = StepPlanner([LAYER], CAPACITY, num_ctas=3)
    assert workspace_bytes([LAYER], CAPACITY, num_ctas=3) == planner.workspace_bytes


def test_workspace_does_not_grow_with_kv_length() -> None:
    short, long = (Capacity(1024, 8192, kv) for kv in (1024, 131072))
    assert workspace_bytes([LAYER], short) == workspace_bytes([LAYER], long)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (Band(-1, 0), Band(-1, -1), Band(-1, 0)),
        (Band(9, 0), Band(5, -1), Band(5, 0)),
        (Band(9, 0, 4), Band(-1, 3), Band(9, 0, 4)),
        (Band(9, 0, 4), Band(3, 0, 8), Band(3, 0, 8)),
    ],
)
def test_intersected_bands(a: Band, b: Band, expected: Band) -> None:
    assert intersect_bands(a, b) == expected


def test_intersection_covers_every_pair_visible_in_both() -> None:
    q, kv = torch.arange(40)[:, None], torch.arange(40)[None, :]

    def seen(band: Band) -> torch.Tensor:
        right = torch.ones(40, 40, dtype=torch.bool) if band.right < 0 else kv <= q + band.right
        left = band.left < 0 or (kv >= q - band.left) | (kv < band.sink_prefix)
        return right & left

    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        lefts, rights = torch.randint(-1, 20, (2, 2), generator=generator).tolist()
        sinks = torch.randint(0, 20, (2,), generator=generator).tolist()
        a, b = (Band(*bounds) for bounds in zip(lefts, rights, sinks, strict=True))
        assert not (seen(a) & seen(b) & ~seen(intersect_bands(a, b))).any()


def test_error_no_classes() -> None:
    with pytest.raises(errors.InvalidInput, match=r"layer_classes: expected at least one .* none"):
        StepPlanner([], CAPACITY)


def test_error_num_ctas() -> None:
    with pytest.raises(errors.InvalidInput, match=r"num_ctas: expected a positive count, got 0"):
        StepPlanner([LAYER], CAPACITY, num_ctas=0)


def test_error_class_that_is_not_served_lists_the_reasons() -> None:
    odd = LayerClass(HeadShape(8, 2, 20), torch.bfloat16)
    with pytest.raises(errors.Unsupported, match=r"layer_classes\[1\]: .*head_dim_qk.*20"):
        StepPlanner([LAYER, odd], CAPACITY)


@pytest.mark.parametrize("chunk", [-64, 65])
def test_error_chunk(chunk: int) -> None:
    with pytest.raises(errors.InvalidInput, match=rf"batch_invariant_chunk: .* got {chunk}"):
        StepPlanner([LAYER], CAPACITY, batch_invariant_chunk=chunk)


def test_error_chunk_with_sharing() -> None:
    shared = Capacity(4, 64, 256, max_nodes=1, max_links=2, max_shared_tokens=2)
    with pytest.raises(errors.InvalidInput, match="sharing makes bits depend on the batch"):
        StepPlanner([LAYER], shared, batch_invariant_chunk=64)


def test_error_capacity_values() -> None:
    with pytest.raises(errors.InvalidInput, match=r"capacity.max_tokens: expected at least 0"):
        Capacity(1, -1, 1)
    with pytest.raises(errors.InvalidInput, match=r"capacity.max_kv_len: .* got 2147483647"):
        Capacity(1, 1, 2**31 - 1)


def test_error_wrong_number_of_batches() -> None:
    planner = StepPlanner([LAYER], CAPACITY)
    with pytest.raises(errors.InvalidInput, match="batch: expected 1 batches"):
        planner.plan([batch([1], [1]), batch([1], [1])])


def test_error_slot_index() -> None:
    with pytest.raises(errors.CapacityExceeded, match="index: expected 0 to 0, got 1"):
        StepPlanner([LAYER], CAPACITY).slot(1)


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "what"),
    [([1] * 5, [9] * 5, "requests"), ([65], [65], "tokens"), ([1], [257], "kv")],
)
def test_error_batch_beyond_capacity(q_lens: list[int], kv_lens: list[int], what: str) -> None:
    planner = StepPlanner([LAYER], CAPACITY)
    with pytest.raises(errors.CapacityExceeded, match=what):
        planner.plan(batch(q_lens, kv_lens))


def test_default_band_is_causal() -> None:
    assert LAYER.planned_band == CAUSAL


@pytest.mark.parametrize(
    ("requests", "drafts", "room"),
    [
        (256, 0, 3 * 256),  # three levels
        (256, 3, 3 * 256 * 4),
        (1024, 3, 4096),  # one level, not three
        (3000, 0, 4096),
        (8192, 0, 8192),
    ],
)
def test_room_for_sharing_is_bounded(requests: int, drafts: int, room: int) -> None:
    step = Capacity(requests, requests * (1 + drafts), 4096, max_q_len=1 + drafts)
    assert step.with_sharing().max_shared_tokens == room
