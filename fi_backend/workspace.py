"""Scratch memory of attention steps, and how much of it a planner needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fi_backend.class_plans import ClassPlan
from fi_backend.errors import CapacityExceeded, require


@dataclass(frozen=True)
class WorkspaceSize:
    """What a workspace holds, in elements of 4 bytes; ``a | b`` is enough for either.

    Attributes:
        partial_elements: float32 components of partial outputs.
        partial_rows: float32 log-sum-exps, one per partial row.
        units: int32 arrival counters, one per merge unit.
    """

    partial_elements: int
    partial_rows: int
    units: int

    @classmethod
    def of(cls, planned: Iterable[ClassPlan]) -> WorkspaceSize:
        """Return what the largest of the classes needs; layers run one after another."""
        size = cls(0, 0, 0)
        for plan in planned:
            rows, dim = plan.layout.max_partial_rows, plan.layer_class.heads.head_dim_vo
            size |= cls(rows * dim, rows, plan.layout.max_units)
        return size

    def __or__(self, other: WorkspaceSize) -> WorkspaceSize:
        return WorkspaceSize(*map(max, vars(self).values(), vars(other).values()))

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole."""
        return 4 * (self.partial_elements + self.partial_rows + self.units)


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of one stream's steps; contents mean nothing between runs.

    Planners whose steps run one after the other on one stream may share one.

    Attributes:
        partial_o: float32 [elements] device.
        partial_lse: float32 [rows] device.
        arrivals: int32 [units] device, zero between runs.
    """

    partial_o: Tensor
    partial_lse: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(cls, size: WorkspaceSize, device: torch.device | str) -> Workspace:
        """Allocate; ``workspace_size`` says how much a planner needs."""
        return cls(
            torch.empty(size.partial_elements, dtype=torch.float32, device=device),
            torch.empty(size.partial_rows, dtype=torch.float32, device=device),
            torch.zeros(size.units, dtype=torch.int32, device=device),
        )

    @property
    def size(self) -> WorkspaceSize:
        """What it holds."""
        return WorkspaceSize(
            self.partial_o.numel(), self.partial_lse.numel(), self.arrivals.numel()
        )

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.size.num_bytes

    def require_room(self, needed: WorkspaceSize, device: torch.device) -> None:
        """Refuse a planner that needs more, or runs elsewhere.

        Raises:
            InvalidInput: another device.
            CapacityExceeded: too small; the message has both sizes.
        """
        place = self.partial_o.device
        require(place == device, "workspace", f"device {device}", place, "one workspace per device")
        require(
            self.size | needed == self.size,
            "workspace",
            f"at least {needed}, {needed.num_bytes} bytes",
            f"{self.size}, {self.num_bytes} bytes",
            "allocate it with workspace_size(a) | workspace_size(b) of all planners",
            kind=CapacityExceeded,
        )
