"""What a planner for a GPU fixes before it needs one: tiles, CTAs, memory; and its reports."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fi_backend as fi
from fi_backend import _core, plan_status
from fi_backend.class_plans import ClassPlan, plan_class
from fi_backend.host_batch import to_device, to_host
from fi_backend.plan_status import PlanStatus, StatusReport

HEADS = fi.HeadShape(32, 8, 128)
LAYER = fi.LayerClass(HEADS, torch.bfloat16)
LARGEST = fi.Capacity(max_requests=1024, max_tokens=8192, max_kv_len=131072)
MIB = 1 << 20


def planned(capacity: fi.Capacity, layer: fi.LayerClass = LAYER, **options: Any) -> ClassPlan:
    arguments = {"num_ctas": None, "invariant_chunk": 0} | options
    return plan_class(layer, capacity, torch.device("cuda"), **arguments)


def rows(plan: ClassPlan) -> list[int]:
    return [c.rows for c in plan.config.classes]


def test_a_decode_planner_has_the_decode_class_alone() -> None:
    decode = planned(fi.Capacity(256, 256, 4096, max_q_len=1))
    assert len(rows(decode)) == 1 and rows(decode)[0] >= HEADS.group_size
    general = planned(fi.Capacity(256, 8192, 4096))
    assert rows(general)[:1] == rows(decode) and len(rows(general)) > 1
    for plan in (decode, general):
        assert plan.spec is not None
        assert [tile[0] for tile in plan.spec.tiles] == rows(plan)
        assert plan.spec.plain_pages and plan.spec.aligned
    # A hint above the step's tokens says nothing new.
    assert rows(planned(fi.Capacity(256, 256, 4096, max_q_len=300))) == rows(
        planned(fi.Capacity(256, 256, 4096))
    )


def test_batch_invariance_does_not_depend_on_the_hint() -> None:
    plans = [
        planned(fi.Capacity(256, 8192, 4096, max_q_len=q), invariant_chunk=512) for q in (0, 1, 16)
    ]
    assert rows(plans[0]) == rows(plans[1]) == rows(plans[2])


def test_as_many_ctas_as_are_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimpleNamespace(num_sms=10, max_shared_bytes_per_sm=233472, copies_boxes=False)
    monkeypatch.setattr(_core, "device_info", lambda index: info)
    plan = plan_class(LAYER, LARGEST, torch.device("cuda:3"), num_ctas=None, invariant_chunk=0)
    assert plan.spec is not None
    assert plan.layout.num_ctas == 10 * plan.spec.ctas_per_sm
    assert planned(LARGEST, num_ctas=7).layout.num_ctas == 7
    info.max_shared_bytes_per_sm = 102400  # less room for tiles and CTAs
    small = plan_class(LAYER, LARGEST, torch.device("cuda:3"), num_ctas=None, invariant_chunk=0)
    assert small.spec is not None
    assert small.spec.ctas_per_sm <= plan.spec.ctas_per_sm


@pytest.mark.parametrize("max_q_len", [0, 1, 16])
def test_memory_of_the_largest_step(max_q_len: int) -> None:
    capacity = fi.Capacity(1024, 8192, 131072, max_q_len=max_q_len)
    total = fi.workspace_bytes([LAYER], capacity, "cuda")
    assert total <= 64 * MIB
    short = fi.Capacity(1024, 8192, 1024, max_q_len=max_q_len)
    assert fi.workspace_bytes([LAYER], short, "cuda") == total
    assert fi.workspace_size([LAYER], capacity, "cuda").num_bytes < total


def test_sizes_join_to_what_is_enough_for_either() -> None:
    decode = fi.workspace_size([LAYER], fi.Capacity(1024, 1024, 4096, max_q_len=1), "cuda")
    general = fi.workspace_size([LAYER], fi.Capacity(16, 8192, 4096), "cuda")
    both = decode | general
    assert both.partial_rows == general.partial_rows > decode.partial_rows
    assert both.units == max(decode.units, general.units)
    workspace = fi.Workspace.allocate(both, "cpu")
    assert workspace.size == both and workspace.num_bytes == both.num_bytes
    for size in (decode, general):
        workspace.require_room(size, torch.device("cpu"))


def test_planners_share_a_workspace() -> None:
    capacities = fi.Capacity(4, 64, 256), fi.Capacity(2, 8, 64)
    own = [fi.StepPlanner([LAYER], c, num_ctas=4) for c in capacities]
    shared = fi.StepPlanner([LAYER], capacities[1], num_ctas=4, workspace=own[0].workspace)
    assert shared.slot(0).arrivals.data_ptr() == own[0].slot(0).arrivals.data_ptr()
    assert shared.slot(0).plan.data_ptr() != own[0].slot(0).plan.data_ptr()
    with pytest.raises(
        fi.CapacityExceeded,
        match=r"workspace: expected at least WorkspaceSize.*4\d* bytes, got WorkspaceSize.*bytes;",
    ):
        fi.StepPlanner([LAYER], capacities[0], num_ctas=4, workspace=own[1].workspace)
    elsewhere = fi.Workspace.allocate(own[0].workspace.size, "meta")
    with pytest.raises(fi.InvalidInput, match="workspace: expected device cpu, got meta"):
        fi.StepPlanner([LAYER], capacities[0], num_ctas=4, workspace=elsewhere)


def test_every_kind_of_report_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    report = StatusReport(torch.device("cpu"))
    report.log_news()
    assert report.status == PlanStatus.OK and not caplog.records
    for bits in (PlanStatus.KV_TOO_LONG, PlanStatus.KV_TOO_LONG, PlanStatus.BAD_INDPTR):
        report.word[0] |= int(bits)  # what a kernel does
        report.log_news()
    assert report.status == PlanStatus.KV_TOO_LONG | PlanStatus.BAD_INDPTR
    report.add(31)
    report.log_news()
    report.log_news()
    messages = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(messages) == len(set(messages)) == 5
    assert messages[0].startswith("kv_len: expected lengths from 0 to capacity.max_kv_len, got")
    assert all("; " in message and ": expected " in message for message in messages)


def test_a_planner_reports_declined_sharing(caplog: pytest.LogCaptureFixture) -> None:
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    nodes = fi.Nodes(ints(0), ints(0), ints(16), ints(0, 2), ints(0, 1))
    batch = fi.PagedBatch(
        ints(0, 1, 2), ints(20, 20), fi.PageTable.dense(ints(3, 1, 3, 2).view(2, 2), 16), nodes
    )
    planner = fi.StepPlanner([LAYER], fi.Capacity(4, 8, 64, max_nodes=1, max_links=1))
    assert planner.status == PlanStatus.OK
    planner.plan(batch)
    planner.plan(batch)
    assert planner.status == PlanStatus.NODES_DECLINED
    assert [r.message for r in caplog.records] == [plan_status._SENTENCES[planner.status]]


def test_words_of_planners_that_are_gone_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(
        plan_status.torch, "zeros", lambda *a, **k: zeros(*a, **(k | {"pin_memory": False}))
    )
    monkeypatch.setattr(plan_status, "_free_words", [])
    reports = [StatusReport(torch.device("cuda")) for _ in range(300)]
    addresses = {report.word.data_ptr() for report in reports}
    assert len(addresses) == 300
    reports[0].word[0] = 4
    reports.clear()
    gc.collect()
    fresh = [StatusReport(torch.device("cuda")) for _ in range(300)]
    assert {report.word.data_ptr() for report in fresh} <= addresses | {
        word.data_ptr() for word in plan_status._free_words
    }
    assert all(report.status == PlanStatus.OK for report in fresh)


@pytest.mark.parametrize("form", ["dense", "indirect", "csr"])
def test_batches_move_between_devices(form: str) -> None:
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    wide = torch.arange(40, dtype=torch.int32).view(4, 10)[:, 2:5]  # rows with gaps
    table = {
        "dense": lambda: fi.PageTable.dense(wide, 8, entry_stride=2, page_map=ints(*range(40))),
        "indirect": lambda: fi.PageTable.indirect(wide, torch.tensor([3, 0]), 8, slot_divisor=8),
        "csr": lambda: fi.PageTable.csr(ints(0, 2, 3), ints(4, 5, 6), 8),
    }[form]()
    nodes = fi.Nodes(ints(0), ints(0), ints(8), ints(0, 2), ints(0, 1), ints(8, 8))
    batch = fi.PagedBatch(ints(0, 1, 3), ints(16, 8), table, nodes)
    assert to_host(batch) is batch and to_device(batch, torch.device("cpu")) is batch
    there = to_device(batch, torch.device("meta"))
    assert there.qo_indptr.device.type == there.nodes.own_begin.device.type == "meta"  # type: ignore[union-attr]
    assert there.page_table.row_stride == (0 if form == "csr" else 3)
    for name in ("page_size", "entry_stride", "slot_divisor", "num_rows"):
        assert getattr(there.page_table, name) == getattr(table, name)
    for name in ("entries", "indptr", "row_index", "page_map"):
        here, moved = getattr(table, name), getattr(there.page_table, name)
        assert (here is None) == (moved is None)
        assert here is None or (moved.shape, moved.dtype) == (here.shape, here.dtype)


def test_no_capacity_field_hides_from_growth() -> None:
    with pytest.raises(fi.InvalidInput, match=r"capacity.max_q_len: expected at least 0, got -1"):
        fi.Capacity(1, 1, 1, max_q_len=-1)
    assert fi.Capacity(0, 0, 0).longest_q_len == 1
    assert fi.Capacity(1, 9, 1, max_q_len=4).longest_q_len == 4
