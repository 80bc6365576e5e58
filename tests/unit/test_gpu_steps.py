"""How a step is planned on a GPU: by a kernel, or on the host where it must; slots are faked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fi_backend as fi
from fi_backend import planner as planner_module
from fi_backend.attention import SMALLEST_ON_GPU
from fi_backend.class_plans import plan_class

LAYER = fi.LayerClass(fi.HeadShape(4, 2, 64), torch.bfloat16)
CAPACITY = fi.Capacity(2, 8, 64, max_nodes=2, max_links=4, max_shared_tokens=8)
STREAM = 5


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_batch(nodes: fi.Nodes | None = None, kv_len: int = 20) -> fi.PagedBatch:
    table = fi.PageTable.dense(ints(3, 1, 3, 2).view(2, 2), 16)
    return fi.PagedBatch(ints(0, 1, 2), ints(kv_len, 20), table, nodes)


def shared() -> fi.Nodes:
    return fi.Nodes(ints(0), ints(0), ints(16), ints(0, 2), ints(0, 1), ints(16, 16))


@dataclass
class FakeSlot:
    """Remembers who planned."""

    layer_class: fi.LayerClass = LAYER
    captured_pages: int = 0
    host_batch: Any = None
    by_kernel: list[Any] = field(default_factory=list)
    by_host: list[Any] = field(default_factory=list)
    follows: list[bool] = field(default_factory=list)

    def fill(self, *arguments: Any, follows_forest: bool) -> None:
        self.by_kernel.append(arguments)
        self.follows.append(follows_forest)

    def fill_on_host(self, *arguments: Any) -> int:
        self.by_host.append(arguments)
        return 16


class GpuPlanner(fi.StepPlanner):
    """Plans as on a GPU, for tensors on the CPU."""

    def __init__(self, *, checks_values: bool = False, num_tables: int = 1) -> None:
        classes = [
            fi.LayerClass(LAYER.heads, LAYER.dtype, page_table_id=i) for i in range(num_tables)
        ]
        super().__init__(classes, CAPACITY, num_ctas=2)
        self.fakes = [FakeSlot(one) for one in classes]
        self._slots = self.fakes  # type: ignore[assignment]
        self._checks_values = checks_values

    def plan(self, *batches: Any) -> None:
        self._plan_on_device(batches)


@pytest.fixture(autouse=True)
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What is_capturing answers: the last element."""
    answers = [False]
    monkeypatch.setattr(planner_module, "is_capturing", lambda device: answers[-1])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    return answers


def test_a_kernel_plans_each_slot(capturing: list[bool]) -> None:
    planner, first, second = GpuPlanner(num_tables=2), make_batch(), make_batch()
    planner.plan(first, second)
    capturing.append(True)  # captured the same way
    planner.plan(first, second)
    for fake, batch, forest in zip(planner.fakes, (first, second), planner.forests, strict=True):
        assert len(fake.by_kernel) == 2
        for planned, found, *others in fake.by_kernel:
            assert planned is batch and found is forest.data
            assert others == [planner._report.word, STREAM]
        assert fake.follows == [fake is planner.fakes[0]] * 2
        assert not fake.by_host and fake.host_batch is None


def test_lengths_are_left_to_the_device() -> None:
    planner = GpuPlanner()
    planner.plan(make_batch(kv_len=10**6))
    assert len(planner.fakes[0].by_kernel) == 1


def test_batches_with_nodes_are_planned_on_the_host(capturing: list[bool]) -> None:
    planner, plain, sharing = GpuPlanner(num_tables=2), make_batch(), make_batch(shared())
    planner.plan(plain, sharing)
    assert len(planner.fakes[0].by_kernel) == 1 and not planner.fakes[0].by_host
    assert planner.fakes[0].follows == [True]
    assert planner.fakes[1].by_host == [(sharing, sharing)] and not planner.fakes[1].by_kernel
    assert planner.status == fi.PlanStatus.NODES_DECLINED  # what the host said
    with pytest.raises(fi.InvalidInput, match="kv_len: expected at most 32 tokens"):
        planner.plan(plain, make_batch(shared(), kv_len=60))  # checked, for it was copied
    capturing.append(True)
    with pytest.raises(
        fi.Unsupported,
        match="batch: expected no nodes while the stream is capturing a graph, got 1 nodes; plan",
    ):
        planner.plan(plain, sharing)


def test_checked_values(capturing: list[bool]) -> None:
    planner = GpuPlanner(checks_values=True)
    with pytest.raises(
        fi.InvalidInput, match=r"kv_len: expected at most 32 tokens.* 60 at request"
    ):
        planner.plan(make_batch(kv_len=60))
    batch, (fake,) = make_batch(), planner.fakes
    planner.plan(batch)
    assert fake.host_batch is batch and len(fake.by_kernel) == 1
    fake.captured_pages = 3  # a graph reads a cache of that size: page 3 is outside
    with pytest.raises(fi.InvalidInput, match=r"page ids in \[0, 3\).*got 3 at row 0, page 0"):
        planner.plan(batch)
    capturing.append(True)
    planner.plan(batch)
    assert fake.host_batch is None  # nothing may be read now


def test_batches_elsewhere_are_refused() -> None:
    table = fi.PageTable.dense(torch.empty(2, 2, dtype=torch.int32, device="meta"), 16)
    meta = [torch.empty(n, dtype=torch.int32, device="meta") for n in (3, 2)]
    with pytest.raises(fi.InvalidInput, match="batch: expected tensors on cpu, got meta"):
        GpuPlanner().plan(fi.PagedBatch(*meta, table))


def test_too_many_requests_are_refused() -> None:
    batch = fi.PagedBatch(
        ints(0, 1, 2, 3), ints(1, 1, 1), fi.PageTable.dense(ints(0, 1, 2).view(3, 1), 16)
    )
    with pytest.raises(fi.CapacityExceeded, match="batch: expected max_requests <= 2, got 3"):
        GpuPlanner().plan(batch)


def test_growing_capacities_share_a_kernel() -> None:
    """fi.Attention without a capacity starts with the kernel that it will end with."""
    specs = {
        plan_class(LAYER, c, torch.device("cuda"), num_ctas=None, invariant_chunk=0).spec
        for c in (SMALLEST_ON_GPU, fi.Capacity(16, 2048, 1024), fi.Capacity(1024, 65536, 131072))
    }
    assert len(specs) == 1


def test_the_op_has_a_kernel_for_gpus() -> None:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("fi_backend::attention", key)


def test_tracing_needs_no_gpu() -> None:
    """The fake kernel serves every device: shapes are known without running."""
    planner = fi.StepPlanner([LAYER], CAPACITY)
    with FakeTensorMode():
        q = torch.empty(3, 4, 64, dtype=torch.bfloat16, device="cuda")
        kv = fi.KvCacheView.nhd(
            *(torch.empty(5, 16, 2, 64, dtype=q.dtype, device="cuda") for _ in range(2))
        )
        lse = torch.empty(3, 4, device="cuda")
        out = fi.attention(planner.slot(0), q, kv, lse=lse, params={"cap": 2.0})
        partial = fi.attention(planner.slot(0), q, kv, partial=True)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
    assert (partial.shape, partial.dtype) == (q.shape, torch.float32)
