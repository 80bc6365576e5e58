"""Planning: once per step, the batch becomes work items for a fixed number of CTAs.

A ``StepPlanner`` is built once with every layer class of a model and the largest step it must
serve. ``plan(batch)`` fills one fixed slot per class; ``attention(planner.slot(i), ...)`` runs a
layer of that class. The algorithm is in kernels/host/planner.cc, the bytes of a plan in
kernels/include/fi/plan.

Source: stream-K work decomposition (Osama et al., PPoPP 2023) applied to attention KV ranges, as in
LeanAttention (Sanovar et al., 2024); composable formats from FlashInfer (Ye et al., MLSys 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fi_backend import _core, checks
from fi_backend.errors import CapacityExceeded, Unsupported, require
from fi_backend.formats import PagedBatch
from fi_backend.layers import Capacity, LayerClass
from fi_backend.plan_records import plan_arrays
from fi_backend.why_not import AttentionConfig, why_not

# Spans per thread: enough that a preempted thread's work is taken over by the others.
CPU_SPANS_PER_THREAD = 4


@dataclass(frozen=True)
class _ClassPlan:
    """A layer class with its plan configuration and memory layout."""

    layer_class: LayerClass
    config: _core.PlanConfig
    layout: _core.PlanLayout


class PlanSlot:
    """The plan of one layer class: fixed memory that every ``plan`` refills.

    Attributes:
        layer_class: whose plan this is.
        layout: offsets of the plan's arrays.
        classes: tile classes (rows, kv_tile, c_fixed, c_tile) that items refer to.
        plan: uint8 [layout.total_bytes] device.
        batch: the step planned last; None before the first.
        num_plans: steps planned so far.
        partial_o: float32 [rows, head_dim_vo] device, partial outputs (workspace, shared by slots).
        partial_lse: float32 [rows] device, natural log.
        arrivals: int32 [units] device, zero between runs.
    """

    def __init__(self, planned: _ClassPlan, workspace: Workspace, device: torch.device) -> None:
        self.layer_class = planned.layer_class
        self.config = planned.config
        self.layout = planned.layout
        self.classes = planned.config.classes
        self.plan = torch.zeros(planned.layout.total_bytes, dtype=torch.uint8, device=device)
        rows, dim = planned.layout.max_partial_rows, self.layer_class.heads.head_dim_vo
        self.partial_o = workspace.partial_o[: rows * dim].view(rows, dim)
        self.partial_lse = workspace.partial_lse[:rows]
        self.arrivals = workspace.arrivals[: planned.layout.max_units]
        self.batch: PagedBatch | None = None
        self.num_plans = 0

    def arrays(self) -> dict[str, object]:
        """Return the plan as numpy structured arrays, trimmed to their used lengths.

        Keys and fields are those of kernels/include/fi/plan/records.h: header, cta_ptr, items,
        units, requests, nodes, node_tiles, links, gathered.
        """
        return plan_arrays(self.plan.cpu().numpy(), self.layout)

    def fill(self, batch: PagedBatch) -> None:
        """Plan ``batch`` into this slot; ``StepPlanner.plan`` has checked it."""
        nodes, count = batch.nodes, 0
        addresses = [0] * 6
        if nodes is not None:
            count = nodes.num_nodes
            tensors = (
                nodes.table_row,
                nodes.kv_begin,
                nodes.kv_end,
                nodes.member_ptr,
                nodes.members,
                nodes.own_begin,
            )
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
        _core.make_plan(
            self.config,
            self.layout,
            batch.num_requests,
            batch.qo_indptr.data_ptr(),
            batch.kv_len.data_ptr(),
            batch.kv_len.element_size(),
            count,
            addresses,
            self.plan.data_ptr(),
        )
        self.batch = batch
        self.num_plans += 1


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of one stream's steps; contents mean nothing between runs.

    Attributes:
        partial_o: float32 [elements] device.
        partial_lse: float32 [rows] device.
        arrivals: int32 [units] device, zero between runs.
    """

    partial_o: Tensor
    partial_lse: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(cls, planned: Sequence[_ClassPlan], device: torch.device) -> Workspace:
        """Allocate what the largest of the classes needs; layers run one after another."""
        elements = max(p.layout.max_partial_rows * p.layer_class.heads.head_dim_vo for p in planned)
        rows = max(p.layout.max_partial_rows for p in planned)
        units = max(p.layout.max_units for p in planned)
        return cls(
            torch.empty(elements, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.zeros(units, dtype=torch.int32, device=device),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


def _plan_classes(
    layer_classes: Sequence[LayerClass], capacity: Capacity, num_ctas: int, invariant_chunk: int
) -> list[_ClassPlan]:
    planned = []
    for layer_class in layer_classes:
        heads, band = layer_class.heads, layer_class.planned_band
        config = _core.PlanConfig(
            num_qo_heads=heads.num_qo_heads,
            num_kv_heads=heads.num_kv_heads,
            num_ctas=num_ctas,
            band=_core.Band(band.left, band.right, band.sink_prefix),
            invariant_chunk=invariant_chunk,
            classes=_core.cpu_tile_classes(),
            capacity=_core.PlanCapacity(**vars(capacity)),
        )
        planned.append(_ClassPlan(layer_class, config, config.layout()))
    return planned


def default_num_ctas() -> int:
    """Return the CPU engine's number of spans: a few per torch thread."""
    return CPU_SPANS_PER_THREAD * torch.get_num_threads()


def workspace_bytes(
    layer_classes: Sequence[LayerClass],
    capacity: Capacity,
    *,
    num_ctas: int | None = None,
    batch_invariant_chunk: int = 0,
) -> int:
    """Return the bytes a StepPlanner with these arguments allocates: plans and workspace.

    The workspace part is (2 * P * M + 2 * Hq * max_shared_tokens) * (head_dim_vo + 1) * 4 plus one
    counter per merge unit, independent of KV lengths (P CTAs, M rows of the largest tile);
    batch-invariant mode keeps every chunk's state instead and grows with max_kv_len / chunk.
    """
    planned = _plan_classes(
        layer_classes, capacity, num_ctas or default_num_ctas(), batch_invariant_chunk
    )
    plans = sum(p.layout.total_bytes for p in planned)
    return plans + Workspace.allocate(planned, torch.device("meta")).num_bytes


class StepPlanner:
    """Plans the steps of a model: all layer classes, one fixed slot each.

    Args:
        layer_classes: every class of the model, in slot order.
        capacity: the largest step.
        device: "cpu" in this version.
        num_ctas: spans that the work is cut into; None: four per torch thread.
        batch_invariant_chunk: 0, or cut KV only at multiples of this many tokens so that a
            request's bits depend on its own lengths and data alone. Sharing must be off.

    Raises:
        InvalidInput: no classes, or a chunk that the KV tiles do not divide.
        Unsupported: a class that this machine cannot serve; the message lists all reasons.

    Stream: the CPU engine works in the calling thread; plan and run in program order.
    """

    def __init__(
        self,
        layer_classes: Sequence[LayerClass],
        capacity: Capacity,
        device: torch.device | str = "cpu",
        *,
        num_ctas: int | None = None,
        batch_invariant_chunk: int = 0,
    ) -> None:
        self.capacity = capacity
        self.device = torch.device(device)
        self.num_ctas = default_num_ctas() if num_ctas is None else num_ctas
        require(self.num_ctas > 0, "num_ctas", "a positive count", num_ctas, "or pass None")
        self._check_classes(layer_classes)
        self._check_chunk(batch_invariant_chunk)
        planned = _plan_classes(layer_classes, capacity, self.num_ctas, batch_invariant_chunk)
        self.workspace = Workspace.allocate(planned, self.device)
        self._slots = [PlanSlot(p, self.workspace, self.device) for p in planned]

    def _check_chunk(self, chunk: int) -> None:
        tile = max(c.kv_tile for c in _core.cpu_tile_classes())
        require(
            chunk >= 0 and chunk % tile == 0,
            "batch_invariant_chunk",
            f"0 or a multiple of {tile} tokens",
            chunk,
            "round it up",
        )
        require(
            chunk == 0 or self.capacity.max_nodes == 0,
            "batch_invariant_chunk",
            "0 when capacity.max_nodes > 0",
            chunk,
            "sharing makes bits depend on the batch; set max_nodes to 0",
        )

    def _check_classes(self, layer_classes: Sequence[LayerClass]) -> None:
        require(
            len(layer_classes) > 0,
            "layer_classes",
            "at least one LayerClass",
            "none",
            "pass the classes of the model's attention layers",
        )
        for i, layer_class in enumerate(layer_classes):
            reasons = why_not(AttentionConfig.of(layer_class, self.device))
            require(
                not reasons,
                f"layer_classes[{i}]",
                "a configuration that is served",
                "; ".join(reasons),
                "fi_backend.why_not(config) lists the reasons",
                kind=Unsupported,
            )

    @cached_property
    def num_page_tables(self) -> int:
        """Batches that ``plan`` takes: one per page table id."""
        return 1 + max(s.layer_class.page_table_id for s in self._slots)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all plans and the workspace."""
        return sum(s.plan.numel() for s in self._slots) + self.workspace.num_bytes

    def plan(self, batch: PagedBatch | Sequence[PagedBatch]) -> None:
        """Plan one step into every slot.

        Args:
            batch: the step; one per page table id if the classes name several.

        Raises:
            InvalidInput: lengths, indptr, page tables or nodes out of contract.
            CapacityExceeded: a legal batch larger than ``capacity``.
        """
        batches = [batch] if isinstance(batch, PagedBatch) else list(batch)
        require(
            len(batches) == self.num_page_tables,
            "batch",
            f"{self.num_page_tables} batches, one per page_table_id",
            len(batches),
            "give each KV cache group its own page table",
        )
        for one in batches:
            checks.validate(one, self.capacity)
        for slot in self._slots:
            slot.fill(batches[slot.layer_class.page_table_id])

    def slot(self, index: int) -> PlanSlot:
        """Return the slot of layer class ``index``; its memory never moves.

        Raises:
            CapacityExceeded: there is no such class.
        """
        require(
            0 <= index < len(self._slots),
            "index",
            f"0 to {len(self._slots) - 1}",
            index,
            "slots follow the order of layer_classes",
            kind=CapacityExceeded,
        )
        return self._slots[index]
