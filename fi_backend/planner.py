"""Planning: once per step, the batch becomes work items for a fixed number of CTAs.

A ``StepPlanner`` is built once with every layer class of a model and the largest step it must
serve. ``plan(batch)`` fills one fixed slot per class; ``attention(planner.slot(i), ...)`` runs a
layer of that class. The algorithm is in kernels/host/planner.cc, the bytes of a plan in
kernels/include/fi/plan. On a GPU the same algorithm runs as a kernel (plan_kernel.py).

Source: stream-K work decomposition (Osama et al., PPoPP 2023) applied to attention KV ranges, as in
LeanAttention (Sanovar et al., 2024); composable formats from FlashInfer (Ye et al., MLSys 2025).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fi_backend import _core, checks
from fi_backend.class_plans import ClassPlan, plan_class
from fi_backend.cuda_launch import is_capturing
from fi_backend.errors import CapacityExceeded, InvalidInput, Unsupported, contract_message, require
from fi_backend.formats import PagedBatch
from fi_backend.gpu import resolve_device
from fi_backend.host_batch import to_host
from fi_backend.jit.attention_kernels import attention_kernel
from fi_backend.jit.kernels import arch_of, prebuild
from fi_backend.layers import Capacity, LayerClass
from fi_backend.plan_kernel import _CTAS_WITH_GLOBAL_SCRATCH as CTAS_WITH_GLOBAL_SCRATCH
from fi_backend.plan_kernel import PlanKernel
from fi_backend.plan_slot import PlanSlot
from fi_backend.plan_status import PlanStatus, StatusReport
from fi_backend.prefix_forest import PrefixForest, forest_kernel
from fi_backend.why_not import AttentionConfig, why_not
from fi_backend.workspace import Workspace, WorkspaceSize

__all__ = [
    "Capacity",
    "LayerClass",
    "PlanSlot",
    "StepPlanner",
    "workspace_bytes",
    "workspace_size",
]


def workspace_size(
    layer_classes: Sequence[LayerClass],
    capacity: Capacity,
    device: torch.device | str = "cpu",
    *,
    num_ctas: int | None = None,
    batch_invariant_chunk: int = 0,
) -> WorkspaceSize:
    """Return the workspace that a StepPlanner with these arguments needs.

    For planners of one stream that share one: ``workspace = Workspace.allocate(workspace_size(...)
    | workspace_size(...), device)``, and ``StepPlanner(..., workspace=workspace)`` for each.
    """
    chunk = batch_invariant_chunk
    return WorkspaceSize.of(_plan_classes(layer_classes, capacity, device, num_ctas, chunk))


def workspace_bytes(
    layer_classes: Sequence[LayerClass],
    capacity: Capacity,
    device: torch.device | str = "cpu",
    *,
    num_ctas: int | None = None,
    batch_invariant_chunk: int = 0,
) -> int:
    """Return the bytes a StepPlanner with these arguments allocates: plans and workspace.

    The workspace part is (2 * P * M + 2 * Hq * max_shared_tokens) * (head_dim_vo + 1) * 4 plus one
    counter per merge unit, independent of KV lengths (P CTAs, M rows of the largest tile);
    batch-invariant mode keeps every chunk's state instead and grows with max_kv_len / chunk. On a
    machine without a GPU, "cuda" stands for an H200.
    """
    planned = _plan_classes(layer_classes, capacity, device, num_ctas, batch_invariant_chunk)
    plans = sum(p.layout.total_bytes for p in planned)
    tables = _shared_tables(layer_classes, capacity)
    forests = len(tables) * PrefixForest.bytes_of(capacity, torch.device(device))
    return plans + forests + _scratch_bytes(planned) + WorkspaceSize.of(planned).num_bytes


def _plan_classes(
    layer_classes: Sequence[LayerClass],
    capacity: Capacity,
    device: torch.device | str,
    num_ctas: int | None,
    invariant_chunk: int,
    *,
    page_size: int | None = None,
) -> list[ClassPlan]:
    device = torch.device(device)
    if torch.cuda.is_available():
        device = resolve_device(device)
    return [
        plan_class(
            one,
            capacity,
            device,
            num_ctas=num_ctas,
            invariant_chunk=invariant_chunk,
            page_size=page_size,
        )
        for one in layer_classes
    ]


class StepPlanner:
    """Plans the steps of a model: all layer classes, one fixed slot each.

    Args:
        layer_classes: every class of the model, in slot order.
        capacity: the largest step.
        device: "cpu", "cuda" (the current GPU) or "cuda:<index>". The kernels for plain page tables
            and aligned tensors are compiled, or taken from the cache, and loaded here.
        num_ctas: spans that the work is cut into; None: on a GPU as many as are resident at once,
            on the CPU four per torch thread.
        batch_invariant_chunk: 0, or cut KV only at multiples of this many tokens so that a
            request's bits depend on its own lengths and data alone. Sharing must be off.
        workspace: scratch memory shared with other planners of the same stream; None: allocated.
        page_size: tokens of a page, where all steps have the same; None: kernels for pages of 8
            tokens and more are loaded here, others when a step comes with them.

    Raises:
        InvalidInput: no classes, a chunk that the KV tiles do not divide, or a workspace elsewhere.
        Unsupported: a class that this machine cannot serve; the message lists all reasons.
        CapacityExceeded: a workspace that is too small; the message has both sizes.
        CompileFailed: a kernel did not compile.

    Stream: on a GPU plans and runs are ordered by the current stream; all of them belong on one.
    The CPU engine works in the calling thread; plan and run in program order.
    Graphs: construct before capture. ``plan`` may be captured or run before each replay; the memory
    of slots and workspace never moves, and a graph reads the page table that its slot was planned
    with during capture: refill that tensor in place.
    FI_CHECK=1 in the environment when the planner is made: values on a GPU are checked as on the
    CPU, page ids with request and position. Every plan then waits for the device.
    """

    def __init__(
        self,
        layer_classes: Sequence[LayerClass],
        capacity: Capacity,
        device: torch.device | str = "cpu",
        *,
        num_ctas: int | None = None,
        batch_invariant_chunk: int = 0,
        workspace: Workspace | None = None,
        page_size: int | None = None,
    ) -> None:
        self.capacity = capacity
        require(
            len(layer_classes) > 0,
            "layer_classes",
            "at least one LayerClass",
            "none",
            "pass the classes of the model's attention layers",
        )
        _check_classes(layer_classes, device)
        self.device = resolve_device(device)
        chunk = batch_invariant_chunk
        planned = _plan_classes(
            layer_classes, capacity, self.device, num_ctas, chunk, page_size=page_size
        )
        _prebuild(planned, capacity, self.device)
        size = WorkspaceSize.of(planned)
        if workspace is None:
            workspace = Workspace.allocate(size, self.device)
        workspace.require_room(size, self.device)
        self.workspace = workspace
        is_cuda = self.device.type == "cuda"
        self._checks_values = is_cuda and os.environ.get("FI_CHECK", "0") not in ("", "0")
        self._slots = [
            PlanSlot(p, workspace, self.device, checks_values=self._checks_values) for p in planned
        ]
        self._num_page_tables = 1 + max(c.page_table_id for c in layer_classes)
        self._report = StatusReport(self.device)
        self._forests = {
            table: PrefixForest(capacity, self.device)
            for table in _shared_tables(layer_classes, capacity)
        }

    @property
    def num_page_tables(self) -> int:
        """Batches that ``plan`` takes: one per page table id."""
        return self._num_page_tables

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all plans and the workspace."""
        plans = sum(s.num_bytes for s in self._slots)
        forests = sum(forest.num_bytes for forest in self._forests.values())
        return plans + forests + self.workspace.num_bytes

    @property
    def forests(self) -> tuple[PrefixForest, ...]:
        """What was found shared, per page table; empty where sharing is off."""
        return tuple(self._forests.values())

    @property
    def status(self) -> PlanStatus:
        """What planning reported so far: steps out of contract, sharing that did not fit.

        On a GPU a bit appears when the device has run the plan: synchronise for a final answer.
        """
        return self._report.status

    def clear_counters(self) -> None:
        """Let steps follow that begin with memory whose contents were lost.

        Kernels count arrivals in device memory, from zero and back to it. An allocator that drops
        contents behind a planner's back, as vLLM's sleep mode does, leaves anything there. Enqueues
        a fill or two on the current stream; the workspace's other planners must not be at work.
        """
        with torch.inference_mode():
            self.workspace.arrivals.zero_()
            for forest in self._forests.values():
                forest.clear_counters()

    def plan(self, batch: PagedBatch | Sequence[PagedBatch]) -> None:
        """Plan one step into every slot.

        Where the capacity has room for nodes and a batch comes without them, prefixes that its page
        table shows to be shared are found first and read once (prefix_forest.py).

        On a GPU this enqueues a kernel per slot on the current stream, without waiting for the
        device or reading its memory: values out of contract are clamped there, set ``status`` and
        are logged, once per kind, by a later call. Batches with nodes are planned on the host
        instead: copied there and back, which waits for the device and cannot be captured.

        Args:
            batch: the step; one per page table id if the classes name several. Its tensors must
                not change before the step's attention has run.

        Raises:
            InvalidInput: lengths, indptr, page tables or nodes out of contract; on a GPU without
                nodes and without FI_CHECK=1, another device.
            CapacityExceeded: a legal batch larger than ``capacity``; on a GPU likewise, more
                requests.
            Unsupported: a batch with nodes while the stream is capturing a graph.
        """
        batches = (batch,) if isinstance(batch, PagedBatch) else tuple(batch)
        if len(batches) != self._num_page_tables:
            rule = f"{self._num_page_tables} batches, one per page_table_id"
            hint = "give each KV cache group its own page table"
            raise InvalidInput(contract_message("batch", rule, len(batches), hint))
        if self.device.type == "cpu":
            for one in batches:
                checks.validate(one, self.capacity)
            found = self._find_forests(batches)
            for slot in self._slots:
                one = batches[slot.layer_class.page_table_id]
                self._report.add(slot.fill_on_host(one, one, self._forest_of(slot, found)))
        else:
            self._plan_on_device(batches)
        self._report.log_news()

    def _plan_on_device(self, batches: tuple[PagedBatch, ...]) -> None:
        for one in batches:
            self._check_on_host(one)
        hosts = [
            self._copy_to_host(one) if self._checks_values or one.nodes is not None else None
            for one in batches
        ]
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        found = self._find_forests(batches, stream)
        follows_forest = len(found) > 0
        for slot in self._slots:
            table_id = slot.layer_class.page_table_id
            one, host = batches[table_id], hosts[table_id]
            if self._checks_values:
                self._check_replays(slot, host)
            if one.nodes is not None and host is not None:
                self._report.add(slot.fill_on_host(one, host))
            else:
                forest, word = self._forest_of(slot, found), self._report.word
                slot.fill(one, forest, word, stream, follows_forest=follows_forest)
            follows_forest = False

    def _find_forests(
        self, batches: tuple[PagedBatch, ...], stream: int = 0
    ) -> dict[int, PrefixForest]:
        """Look for shared prefixes in the batches that come without nodes."""
        found = {t: f for t, f in self._forests.items() if batches[t].nodes is None}
        for table, forest in found.items():
            forest.find(batches[table], stream)
        return found

    @staticmethod
    def _forest_of(slot: PlanSlot, found: dict[int, PrefixForest]) -> Tensor | None:
        forest = found.get(slot.layer_class.page_table_id)
        return forest.data if forest is not None and slot.layer_class.shares else None

    def _check_on_host(self, batch: PagedBatch) -> None:
        """Check what is known without reading device memory."""
        device = batch.qo_indptr.device
        if device != self.device:
            hint = "plan on the device that holds the batch"
            rule = f"tensors on {self.device}"
            raise InvalidInput(contract_message("batch", rule, device, hint))
        count, limit = batch.num_requests, self.capacity.max_requests
        if count > limit:
            hint = f"build the planner with max_requests={count} or split the batch"
            rule = f"max_requests <= {limit}"
            raise CapacityExceeded(contract_message("batch", rule, count, hint))

    def _copy_to_host(self, batch: PagedBatch) -> PagedBatch | None:
        """Copy what checks and host planning read, and check it; None during a capture."""
        if is_capturing(self.device):
            require(
                batch.nodes is None,
                "batch",
                "no nodes while the stream is capturing a graph",
                f"{0 if batch.nodes is None else batch.nodes.num_nodes} nodes",
                "plan before the capture: the graph reads the slot's memory",
                kind=Unsupported,
            )
            return None
        host = to_host(batch, page_ids=self._checks_values)
        checks.validate(host, self.capacity)
        return host

    def _check_replays(self, slot: PlanSlot, host: PagedBatch | None) -> None:
        """With FI_CHECK=1, check page ids now if the step's attention is in a captured graph."""
        slot.host_batch = host
        if host is not None and slot.captured_pages > 0:
            checks.check_page_ids(host, slot.captured_pages, slot.layer_class.planned_band)

    def slot(self, index: int) -> PlanSlot:
        """Return the slot of layer class ``index``; its memory never moves.

        Raises:
            CapacityExceeded: there is no such class.
        """
        if not 0 <= index < len(self._slots):  # once per layer: a sentence only where it is needed
            rule, hint = f"0 to {len(self._slots) - 1}", "slots follow the order of layer_classes"
            raise CapacityExceeded(contract_message("index", rule, index, hint))
        return self._slots[index]


def _check_classes(layer_classes: Sequence[LayerClass], device: torch.device | str) -> None:
    for i, layer_class in enumerate(layer_classes):
        reasons = why_not(AttentionConfig.of(layer_class, device))
        require(
            not reasons,
            f"layer_classes[{i}]",
            "a configuration that is served",
            "; ".join(reasons),
            "fi_backend.why_not(config) lists the reasons",
            kind=Unsupported,
        )


def _shared_tables(layer_classes: Sequence[LayerClass], capacity: Capacity) -> list[int]:
    """Return the page tables that some class looks for shared prefixes in."""
    if capacity.max_nodes == 0:
        return []
    return sorted({c.page_table_id for c in layer_classes if c.shares})


def _scratch_bytes(planned: Sequence[ClassPlan]) -> int:
    """Bytes that planner kernels hold where a capacity is too large for shared memory."""
    return sum(
        CTAS_WITH_GLOBAL_SCRATCH * _core.PlanKernelParams(p.config, p.layout).scratch_bytes
        for p in planned
        if p.spec is not None and PlanKernel.device_kernel(p.config, p.layout).shared_bytes == 0
    )


def _prebuild(planned: Sequence[ClassPlan], capacity: Capacity, device: torch.device) -> None:
    """Compile what the planner will load, all kernels at once."""
    kernels = [attention_kernel(p.spec) for p in planned if p.spec is not None]
    if not kernels:
        return
    kernels += [PlanKernel.device_kernel(p.config, p.layout) for p in planned]
    if _shared_tables([p.layer_class for p in planned], capacity):
        kernels.append(forest_kernel(capacity))
    prebuild(kernels, arch_of(device))
