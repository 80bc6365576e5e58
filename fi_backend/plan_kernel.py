"""The planner on the device: enqueues the kernel that writes the plan of a step.

The kernel writes the same bytes as ``kernels/host/planner.cc`` from lengths, and a prefix forest
where there is one, in device memory, and nothing comes back to the host. Code:
kernels/include/fi/common/planner.h; docs/planning.md says how it works.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fi_backend import _core
from fi_backend.errors import Unsupported, require
from fi_backend.formats import PagedBatch
from fi_backend.jit.kernels import DeviceKernel, bool_literal, load

# Dynamic shared memory that every architecture from sm_80 on grants to a CTA: 99 KiB on sm_86,
# sm_89 and sm_120, of which the kernel itself declares up to 14.
MAX_SHARED_BYTES = 85 << 10
# CTAs where the scratch lies in global memory: each works out all tables in a copy of its own.
_CTAS_WITH_GLOBAL_SCRATCH = 16
# A warp for each scheduler of a multiprocessor writes that many in one round; more CTAs would not
# be faster, but start and end later.
_ITEMS_PER_CTA = 128
_WARP = 32
# Barriers and scans take longer the more warps meet in them.
_MIN_THREADS, _MAX_THREADS = 128, 512
# Requests that a thread takes in one round, where there are more of them than threads.
_MOST_PER_THREAD = 4

# Threads, scratch in shared memory, Mode of planner_params.h. Left alone, the compiler saves
# registers for a second CTA, which there is not.
SOURCE = """#include "fi/common/planner_block.h"

extern "C" __global__ void __launch_bounds__({threads}, 1)
fi_plan(const __grid_constant__ fi::PlanKernelParams p) {{
  fi::planner::run<{threads}, {in_shared}, fi::planner::Mode{{{mode}}}>(p);
}}
"""


class PlanKernel:
    """Plans the steps of one layer class on a CUDA device.

    Args:
        config: the layer class, its tile classes and capacity.
        layout: ``config.layout()``.
        device: CUDA device of the plans.

    Raises:
        Unsupported, CompileFailed, DeviceError: as ``jit.kernels.load``.

    One object serves one stream at a time. Where the tables of a CTA exceed its shared memory, it
    holds ``scratch_bytes(config, layout)`` of device memory.
    """

    def __init__(
        self, config: _core.PlanConfig, layout: _core.PlanLayout, device: torch.device
    ) -> None:
        kernel = self.device_kernel(config, layout)
        self._kernel = load(kernel, device)
        self._params = _core.PlanKernelParams(config, layout)
        self._forest_bytes = config.forest_bytes
        self._threads, _ = _shape(self._params, layout)
        ctas = -(-layout.max_items // _ITEMS_PER_CTA)
        num_sms = _core.device_info(self._kernel.device).num_sms
        self._grid = _power_of_two(min(ctas, num_sms))
        self._scratch: Tensor | None = None
        num_bytes = scratch_bytes(config, layout)
        if num_bytes > 0:
            self._grid = _CTAS_WITH_GLOBAL_SCRATCH
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._params.scratch = self._scratch.data_ptr()

    @property
    def scratch_bytes(self) -> int:
        """Device memory held, ``scratch_bytes(config, layout)``."""
        return 0 if self._scratch is None else self._scratch.numel()

    @staticmethod
    def device_kernel(config: _core.PlanConfig, layout: _core.PlanLayout) -> DeviceKernel:
        """Return the kernel that plans this class; the same for any architecture."""
        params = _core.PlanKernelParams(config, layout)
        threads, per_thread = _shape(params, layout)
        scratch = params.scratch_bytes
        in_shared = scratch <= MAX_SHARED_BYTES
        mode = ", batch-invariant" if params.is_invariant else ""
        mode += "" if params.is_invariant or params.from_start else ", window"
        mode += "" if params.is_invariant or params.is_narrow else ", 64-bit costs"
        mode += ", nodes" if params.has_nodes else ""
        place = "" if in_shared else ", scratch in global memory"
        source = SOURCE.format(
            threads=threads,
            in_shared=bool_literal(in_shared),
            mode=_mode(params, per_thread),
        )
        return DeviceKernel(
            title=f"planner, {threads} threads of {per_thread}{mode}{place}",
            entry="fi_plan",
            source=source,
            shared_bytes=scratch if in_shared else 0,
        )

    @property
    def takes_forest(self) -> bool:
        """Whether steps are planned with a prefix forest.

        Planners of a capacity without nodes, of classes with a window and in batch-invariant mode
        have each request read all of its KV.
        """
        return self._params.has_nodes

    def enqueue(
        self,
        batch: PagedBatch,
        plan: Tensor,
        status: Tensor | None,
        stream: int,
        forest: Tensor | None = None,
        *,
        follows_forest: bool = False,
    ) -> None:
        """Plan ``batch`` into ``plan``; returns before the device has begun.

        The kernel reads the batch's tensors when it runs: they may be filled by earlier work of the
        stream, and a captured launch reads what lies at the same addresses at replay. The number of
        requests is captured: pad with requests of no tokens.

        Args:
            batch: qo_indptr and kv_len on the device; no explicit nodes.
            plan: uint8 [layout.total_bytes] device, 16-byte aligned.
            status: int32 [1] device or pinned host: the PlanStatus bits of lengths out of contract,
                which are clamped, and of nodes left out of the forest are OR-ed in; None: they only
                show in the plan's header.
            stream: CUDA stream handle.
            forest: uint8 [bytes] device, 16-byte aligned, the prefix forest of these lengths as
                kernels/include/fi/plan/forest.h lays it out for the capacity; all zero: nothing is
                shared. Needed if ``takes_forest``, else ignored.
            follows_forest: the last launch of the stream was that of a kernel that finds forests,
                and ``forest`` is complete when it is; the planner then starts while it runs.

        Raises:
            InvalidInput: no forest, or one of another capacity, for a planner that needs one.
            Unsupported: the batch has explicit nodes.
            DeviceError: the launch failed.
        """
        if batch.nodes is not None:
            hint = "plan batches with nodes on the host"
            require(False, "batch.nodes", "none on the device", "some", hint, kind=Unsupported)
        params = self._params
        if params.has_nodes:
            got = None if forest is None else forest.numel()
            rule = f"{self._forest_bytes} bytes on the device"
            hint = "pass zeros where nothing is shared"
            require(got == self._forest_bytes, "forest", rule, got, hint)
        params.num_requests = batch.num_requests
        params.qo_indptr = batch.qo_indptr.data_ptr()
        params.kv_len = batch.kv_len.data_ptr()
        params.kv_len_is_int64 = batch.kv_len.dtype == torch.int64
        params.forest = 0 if forest is None else forest.data_ptr()
        params.plan = plan.data_ptr()
        params.status = 0 if status is None else status.data_ptr()
        overlaps = follows_forest and params.has_nodes
        _core.launch_plan(self._kernel, params, self._grid, self._threads, stream, overlaps)


def scratch_bytes(config: _core.PlanConfig, layout: _core.PlanLayout) -> int:
    """Return the device memory that a PlanKernel allocates; none at usual capacities."""
    one = _core.PlanKernelParams(config, layout).scratch_bytes
    return 0 if one <= MAX_SHARED_BYTES else _CTAS_WITH_GLOBAL_SCRATCH * one


def _shape(params: _core.PlanKernelParams, layout: _core.PlanLayout) -> tuple[int, int]:
    """Return the threads of a CTA and the requests of each: cuts in one round, usually all else."""
    # With a window or chunks a tile's cost takes branches: no four of them side by side.
    most = _MOST_PER_THREAD if params.from_start else 1
    wanted = max(layout.num_ctas + 1, -(-params.max_requests // most), _MIN_THREADS)
    threads = min(-(-wanted // _WARP) * _WARP, _MAX_THREADS)
    return threads, 1 if params.max_requests <= threads else most


def _mode(params: _core.PlanKernelParams, per_thread: int) -> str:
    """Return the initialiser of a Mode."""
    flags = (params.is_invariant, params.from_start, params.is_narrow, params.has_nodes)
    return ", ".join([str(per_thread), str(params.num_classes), *map(bool_literal, flags)])


def _power_of_two(most: int) -> int:
    """Return the largest one up to `most`, 1 at least: the kernel divides by its CTAs."""
    return 1 << max(most, 1).bit_length() - 1
