"""The launch of attention on a GPU with the driver faked: tensors and slots lie on the CPU.

Addresses, strides and choices are the same; only the last call is not made.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fi_backend as fi
from fi_backend import _core, cuda_launch
from fi_backend.class_plans import plan_class
from fi_backend.cuda_launch import CudaLaunch
from fi_backend.plan_slot import PlanSlot

HEADS = fi.HeadShape(4, 2, 64)
CAPACITY = fi.Capacity(max_requests=4, max_tokens=16, max_kv_len=256)
STREAM = 77
CPU = torch.device("cpu")


class Choice(NamedTuple):
    """What a kernel was compiled for."""

    plain: bool
    aligned: bool
    boxes: bool = False


@dataclass
class Launches:
    """What reached the fakes."""

    loaded: list[Choice] = field(default_factory=list)
    calls: list[tuple[Choice, Any, int, int, int]] = field(default_factory=list)

    @property
    def kernel(self) -> Choice:
        return self.calls[-1][0]

    @property
    def params(self) -> Any:
        return self.calls[-1][1]


def fake_launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Replace what needs a GPU."""
    seen = Launches()

    def load(spec: Any, device: torch.device) -> Choice:
        seen.loaded.append(Choice(spec.plain_pages, spec.aligned, spec.boxes))
        return seen.loaded[-1]

    monkeypatch.setattr(cuda_launch, "attention_kernel", lambda spec: spec)
    monkeypatch.setattr(cuda_launch, "load", load)
    monkeypatch.setattr(cuda_launch, "is_capturing", lambda device: False)
    monkeypatch.setattr(_core, "launch_attention", lambda *call: seen.calls.append(call))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    cuda_launch._say_once.cache_clear()
    return seen


def make_slot(
    variant: fi.Variant | None = None, dtype: torch.dtype = torch.float16, *, boxes: bool = False
) -> PlanSlot:
    layer_class = fi.LayerClass(HEADS, dtype, variant=variant)
    device = torch.device("cuda")
    planned = plan_class(layer_class, CAPACITY, device, num_ctas=6, invariant_chunk=0)
    workspace = fi.Workspace.allocate(fi.WorkspaceSize.of([planned]), CPU)
    slot = PlanSlot(dataclasses.replace(planned, spec=None), workspace, CPU)
    assert planned.spec is not None
    assert planned.spec.boxes is (variant is None or variant.rotation is None)
    slot.launch = CudaLaunch(slot, dataclasses.replace(planned.spec, boxes=boxes))
    return slot


def make_batch(page: int = 16, **options: Any) -> fi.PagedBatch:
    """Two requests: 3 query tokens and 20 KV tokens, 1 and 5."""
    table = torch.tensor([[3, 1, 9], [2, 9, 9]], dtype=torch.int32)
    return fi.PagedBatch(
        torch.tensor([0, 3, 4], dtype=torch.int32),
        torch.tensor([20, 5], dtype=torch.int32),
        fi.PageTable.dense(table, page, **options),
    )


def plan(slot: PlanSlot, batch: fi.PagedBatch | None = None) -> None:
    """What StepPlanner.plan does for the launch; the plan's bytes do not matter here."""
    slot._take(make_batch() if batch is None else batch)


def make_q(*shape: int) -> Tensor:
    return torch.zeros(*(shape or (4, 4, 64)), dtype=torch.float16)


def make_kv(pages: int = 5, page: int = 16) -> fi.KvCacheView:
    return fi.KvCacheView.nhd(*torch.zeros(2, pages, page, 2, 64, dtype=torch.float16))
