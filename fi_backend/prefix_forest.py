"""Shared prefixes, found in the page tables of a step: on the host, or by a kernel on a GPU.

Requests that hold the same page ids at the same positions read the same memory there. The forest of
those ranges is found once per page table and step, before planning; every layer class plans with
it. Records: kernels/include/fi/plan/forest.h. Code: kernels/host/prefix_forest.cc on the host, and
kernels/include/fi/common/forest.h with the same bytes on a GPU.

Source: composable formats (FlashInfer; Ye et al., MLSys 2025) and Hydragen (Juravsky et al., 2024)
compute attention over given shared prefixes; here they are looked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fi_backend import _core
from fi_backend.class_plans import plan_capacity
from fi_backend.errors import require
from fi_backend.formats import PagedBatch
from fi_backend.jit.kernels import DeviceKernel, bool_literal, load
from fi_backend.launch import table_view
from fi_backend.layers import MAX_NODES, Capacity
from fi_backend.plan_records import FOREST_HEADER, FOREST_LINK, FOREST_NODE, FOREST_REQUEST

_THREADS = 256
_CTAS_PER_SM = 3  # bounds registers, at 80
# Of a CTA, so that the requests of a usual step are compared at once: more would leave fewer CTAs
# on a multiprocessor. The kernel itself declares up to 7 KB; sm_86, sm_89 and sm_120 grant 99.
_MAX_SHARED_BYTES = 92 << 10

_BRANCH_BYTES, _TOTALS_BYTES = 8, 16

# threads, CTAs of a multiprocessor, scratch in shared memory
SOURCE = """#include "fi/common/forest_block.h"

extern "C" __global__ void __launch_bounds__({threads}, {ctas_per_sm})
fi_forest(const __grid_constant__ fi::ForestKernelParams p) {{
  fi::forest::run<{threads}, {in_shared}>(p);
}}
"""


class SharedReads(NamedTuple):
    """What steps had to read, and what sharing saved of it.

    Attributes:
        kv_tokens: of all requests of all steps, each request counting its own.
        saved_kv_tokens: of those, what was not read because another request's read served.
    """

    kv_tokens: int
    saved_kv_tokens: int


class PrefixForest:
    """The forest of one page table: fixed memory that every ``find`` refills.

    Args:
        capacity: the largest step; ``max_nodes`` > 0.
        device: where the page table and lengths lie.

    Attributes:
        data: uint8 [layout.total_bytes] device, the forest.
        layout: where its arrays lie.
        totals: int64 [2] device, kv_tokens and saved_kv_tokens of all steps so far.

    Raises:
        InvalidInput: more nodes than the kernel can number.

    On a GPU one object serves one stream at a time; a captured launch reads the page table it was
    captured with, at any contents.
    """

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        require(
            capacity.max_nodes <= MAX_NODES,
            "capacity.max_nodes",
            f"at most {MAX_NODES}",
            capacity.max_nodes,
            "with_sharing() stays below",
        )
        self._capacity = plan_capacity(capacity)
        self.layout = _core.forest_layout(self._capacity)
        self.data = torch.zeros(self.layout.total_bytes, dtype=torch.uint8, device=device)
        self.totals = torch.zeros(2, dtype=torch.int64, device=device)
        self._held = [self.data, self.totals]
        self._kernel: _core.Kernel | None = None
        if device.type != "cuda":
            return
        self._kernel = load(forest_kernel(capacity), device)
        self._params = _core.ForestKernelParams(self._capacity)
        self._branches = torch.zeros(capacity.max_requests, dtype=torch.int64, device=device)
        self._held.append(self._branches)
        self._params.branches = self._branches.data_ptr()
        self._params.forest = self.data.data_ptr()
        self._params.totals = self.totals.data_ptr()
        if self._params.scratch_bytes > _MAX_SHARED_BYTES:
            size = self._params.scratch_bytes
            scratch = torch.empty(size, dtype=torch.uint8, device=device)
            self._held.append(scratch)
            self._params.scratch = scratch.data_ptr()

    def clear_counters(self) -> None:
        """As ``StepPlanner.clear_counters``."""
        if self._kernel is not None:
            self._branches.zero_()

    def reads(self) -> SharedReads:
        """Return what all steps so far read; on a GPU this waits for the device."""
        return SharedReads(*self.totals.tolist())

    @staticmethod
    def bytes_of(capacity: Capacity, device: torch.device) -> int:
        """Return the memory that a forest of this capacity holds on a device."""
        held = _core.forest_layout(plan_capacity(capacity)).total_bytes + _TOTALS_BYTES
        if device.type != "cuda":
            return held
        scratch = _core.ForestKernelParams(plan_capacity(capacity)).scratch_bytes
        branches = _BRANCH_BYTES * capacity.max_requests
        return held + branches + (scratch if scratch > _MAX_SHARED_BYTES else 0)

    @property
    def num_bytes(self) -> int:
        """Memory held on the device."""
        return sum(t.numel() * t.element_size() for t in self._held)

    def find(self, batch: PagedBatch, stream: int = 0) -> None:
        """Find what the requests of a step share.

        On a GPU this enqueues a kernel and returns; nothing is copied back.

        Args:
            batch: on the device of the forest; its nodes are not looked at.
            stream: raw handle; not used on the CPU.
        """
        if self._kernel is None:
            _core.find_forest(
                self._capacity,
                batch.num_requests,
                batch.qo_indptr.data_ptr(),
                batch.kv_len.data_ptr(),
                batch.kv_len.element_size(),
                table_view(batch),
                self.data.data_ptr(),
            )
            header = self.data[: FOREST_HEADER.itemsize].numpy().view(FOREST_HEADER)[0]
            self.totals[0] += int(header["kv_tokens"])
            self.totals[1] += int(header["saved_kv_tokens"])
            return
        params = self._params
        params.num_requests = batch.num_requests
        params.qo_indptr = batch.qo_indptr.data_ptr()
        params.kv_len = batch.kv_len.data_ptr()
        params.kv_len_is_int64 = batch.kv_len.dtype == torch.int64
        params.set_table(table_view(batch))
        grid = batch.num_requests + 1  # one builds what the others find
        _core.launch_forest(self._kernel, params, grid, _THREADS, stream)


def forest_kernel(capacity: Capacity) -> DeviceKernel:
    """Return the kernel that finds forests within a capacity; the same for any architecture."""
    scratch = _core.ForestKernelParams(plan_capacity(capacity)).scratch_bytes
    in_shared = scratch <= _MAX_SHARED_BYTES
    place = "" if in_shared else ", scratch in global memory"
    return DeviceKernel(
        title=f"prefix forest, {_THREADS} threads{place}",
        entry="fi_forest",
        source=SOURCE.format(
            threads=_THREADS, ctas_per_sm=_CTAS_PER_SM, in_shared=bool_literal(in_shared)
        ),
        shared_bytes=scratch if in_shared else 0,
    )


def forest_arrays(
    forest: NDArray[np.uint8], layout: _core.ForestLayout, num_requests: int
) -> dict[str, NDArray[np.void]]:
    """Return a forest as numpy structured arrays: header, nodes, requests, links.

    Args:
        forest: uint8 [layout.total_bytes] host.
        layout: where its arrays lie.
        num_requests: of the step.
    """
    header = forest[: FOREST_HEADER.itemsize].view(FOREST_HEADER)

    def array(offset: int, dtype: np.dtype[np.void], count: int) -> NDArray[np.void]:
        return forest[offset : offset + count * dtype.itemsize].view(dtype)

    return {
        "header": header,
        "nodes": array(layout.nodes, FOREST_NODE, int(header["num_nodes"][0])),
        "requests": array(layout.requests, FOREST_REQUEST, num_requests),
        "links": array(layout.links, FOREST_LINK, int(header["num_links"][0])),
    }
