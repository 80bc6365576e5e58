"""The plan of one layer class: fixed memory that every step refills."""

from __future__ import annotations

import torch
from torch import Tensor

from fi_backend import _core
from fi_backend.class_plans import ClassPlan
from fi_backend.cpu_launch import CpuLaunch
from fi_backend.cuda_launch import CudaLaunch
from fi_backend.formats import PagedBatch
from fi_backend.launch import SlotLaunch
from fi_backend.plan_kernel import PlanKernel
from fi_backend.plan_records import plan_arrays
from fi_backend.slot_registry import register_slot
from fi_backend.workspace import Workspace


class PlanSlot:
    """The plan of one layer class: fixed memory that every ``plan`` refills.

    Attributes:
        layer_class: whose plan this is.
        layout: offsets of the plan's arrays.
        classes: tile classes (rows, kv_tile, c_fixed, c_tile) that items refer to.
        longest: query and KV tokens of one request at most.
        device: where the plan lies.
        plan: uint8 [layout.total_bytes] device.
        batch: the step planned last; None before the first.
        num_plans: steps planned so far.
        partial_o: float32 [rows, head_dim_vo] device, partial outputs (workspace, shared by slots).
        partial_lse: float32 [rows] device, natural log on the CPU, base 2 on a GPU.
        arrivals: int32 [units] device, zero between runs.
        checks_values: whether page ids are held against the cache (FI_CHECK=1; always on the CPU).
        host_batch: copy of ``batch`` for such checks; None: none was made.
        captured_pages: pages of the largest cache that a captured graph reads; 0: none is known.
        launch: runs a layer of the class.
        default_scale: of logits, 1 / sqrt(head_dim_qk).
        handle: number that names this slot in torch operators.
    """

    def __init__(
        self,
        planned: ClassPlan,
        workspace: Workspace,
        device: torch.device,
        *,
        checks_values: bool = False,
    ) -> None:
        self.layer_class = planned.layer_class
        self.config = planned.config
        self.layout = planned.layout
        self.classes = planned.config.classes
        self.longest = planned.longest
        self.device = device
        self.plan = torch.zeros(planned.layout.total_bytes, dtype=torch.uint8, device=device)
        rows, dim = planned.layout.max_partial_rows, self.layer_class.heads.head_dim_vo
        self.partial_o = workspace.partial_o[: rows * dim].view(rows, dim)
        self.partial_lse = workspace.partial_lse[:rows]
        self.arrivals = workspace.arrivals[: planned.layout.max_units]
        self.default_scale: float = self.layer_class.heads.head_dim_qk**-0.5
        self.batch: PagedBatch | None = None
        self.num_plans = 0
        self.checks_values = checks_values
        self.host_batch: PagedBatch | None = None
        self.captured_pages = 0
        self.launch: SlotLaunch
        self._kernel: PlanKernel | None = None
        self._host_plan: Tensor | None = None  # made by the first step that is planned on the host
        if planned.spec is None:
            self.launch = CpuLaunch(self)
        else:
            self.launch = CudaLaunch(self, planned.spec)
            self._kernel = PlanKernel(self.config, self.layout, device)
        self.handle = register_slot(self)

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory, the workspace not included."""
        scratch = 0 if self._kernel is None else self._kernel.scratch_bytes
        return self.plan.numel() + scratch

    def arrays(self) -> dict[str, object]:
        """Return the plan as numpy structured arrays, trimmed to their used lengths.

        Keys and fields are those of kernels/include/fi/plan/records.h: header, cta_ptr, items,
        units, requests, nodes, node_tiles, links, gathered.
        """
        return plan_arrays(self.plan.cpu().numpy(), self.layout)

    def fill(
        self,
        batch: PagedBatch,
        forest: Tensor | None,
        status: Tensor,
        stream: int,
        *,
        follows_forest: bool = False,
    ) -> None:
        """Plan a step on the device, in stream order; ``StepPlanner.plan`` has checked it.

        Args:
            batch: without nodes, on the device of the slot.
            forest: ``PrefixForest.data`` of the batch, on the device; None: nothing is shared.
            status: int32 [1] pinned; the kernel adds PlanStatus bits.
            stream: raw handle.
            follows_forest: as in ``PlanKernel.enqueue``.
        """
        assert self._kernel is not None
        self._kernel.enqueue(
            batch, self.plan, status, stream, forest, follows_forest=follows_forest
        )
        self._take(batch)

    def fill_on_host(
        self, batch: PagedBatch, host: PagedBatch, forest: Tensor | None = None
    ) -> int:
        """Plan a step on the host and return its PlanStatus bits.

        Args:
            batch: on the device of the slot.
            host: its lengths and nodes on the CPU; the same batch for the CPU engine.
            forest: ``PrefixForest.data`` of a batch without nodes, for the CPU engine.
        """
        if forest is not None:
            bits = self._plan_forest(host, forest)
        elif self.device.type == "cpu":
            bits = self._make_plan(host, self.plan)
        else:
            if self._host_plan is None:
                self._host_plan = torch.empty(
                    self.layout.total_bytes, dtype=torch.uint8, device="cpu"
                )
            bits = self._make_plan(host, self._host_plan)
            # From pageable memory: in stream order, and done with the source when it returns.
            self.plan.copy_(self._host_plan)
        self._take(batch)
        return bits

    def _take(self, batch: PagedBatch) -> None:
        self.launch.prepare(batch.page_table)
        self.batch = batch
        self.num_plans += 1

    def _plan_forest(self, host: PagedBatch, forest: Tensor) -> int:
        return _core.make_plan_of_forest(
            self.config,
            self.layout,
            host.num_requests,
            host.qo_indptr.data_ptr(),
            host.kv_len.data_ptr(),
            host.kv_len.element_size(),
            forest.data_ptr(),
            self.plan.data_ptr(),
        )

    def _make_plan(self, host: PagedBatch, plan: Tensor) -> int:
        nodes, count = host.nodes, 0
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
        return _core.make_plan(
            self.config,
            self.layout,
            host.num_requests,
            host.qo_indptr.data_ptr(),
            host.kv_len.data_ptr(),
            host.kv_len.element_size(),
            count,
            addresses,
            plan.data_ptr(),
        )
