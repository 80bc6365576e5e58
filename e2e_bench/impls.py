"""What is timed: our engine and its peers, each prepared for a workload as an engine would.

``prepare`` plans once, outside the time; the call it returns runs one layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import fi_backend as fi
from e2e_bench.gpu_data import Data
from e2e_bench.workloads import Workload

FA3_LIBRARY = "/tmp/gpu_kernels/_vllm_fa3_C.abi3.so"
FA3_PAGE_MULTIPLE = 16


class NotHere(RuntimeError):
    """A peer that this machine does not have; the message says what is missing."""


@dataclass(frozen=True)
class Prepared:
    """A workload ready to run.

    Attributes:
        call: enqueues the attention of one layer.
        out: where it writes; None: what it returns.
        rows: where the output has each query token; None: in the order of the batch.
    """

    call: Callable[[int], Tensor | None]
    out: Tensor | None
    rows: Tensor | None = None

    def result(self) -> Tensor:
        """Run layer 0 and return its output."""
        returned = self.call(0)
        out = returned if self.out is None else self.out
        assert out is not None
        return out if self.rows is None else out[self.rows]


class Implementation(Protocol):
    """One way to compute attention.

    Attributes:
        name: in tables and JSON.
    """

    name: str

    def why_not(self, workload: Workload) -> str | None:
        """Return why a workload is not run; None: it is."""

    def prepare(self, data: Data) -> Prepared:
        """Plan the workload."""


class Ours:
    """This package, on a planner for no more than the workload needs.

    What a workload shares is for the planner to find: it is given page tables and nothing else.
    """

    name = "fi_backend"

    def __init__(self, levels: int | None = None) -> None:
        """Room for some levels of prefixes, as ``make_planner`` takes it."""
        self._levels = levels

    def why_not(self, workload: Workload) -> str | None:
        """Everything is served."""
        return None

    def prepare(self, data: Data) -> Prepared:
        """Plan the step; the kernel was compiled when the planner was built."""
        planner = make_planner(data.workload, data.device, self._levels)
        planner.plan(data.batch)
        slot, out = planner.slot(0), data.new_out()
        caches = [fi.KvCacheView.nhd(k, v) for k, v in data.layers]

        def call(layer: int) -> None:
            fi.attention(slot, data.q, caches[layer], out=out)

        return Prepared(call, out)


def make_planner(
    workload: Workload, device: torch.device, levels: int | None = None
) -> fi.StepPlanner:
    """Return a planner that serves the workload and nothing larger.

    Args:
        workload: the only step.
        device: of its tensors.
        levels: of shared prefixes that there is room for, 0: none are looked for; None: as many as
            the workload has.
    """
    capacity = fi.Capacity(
        len(workload.q_lens),
        workload.num_tokens,
        max(workload.kv_lens),
        max_q_len=max(workload.q_lens),
    )
    room = workload.levels if levels is None else levels
    if room > 0:
        capacity = capacity.with_sharing(room)
    layer_class = fi.LayerClass(workload.heads, torch.bfloat16)
    return fi.StepPlanner([layer_class], capacity, device=device)


class Fa3:
    """FlashAttention-3 as vLLM builds it, with its scheduler metadata."""

    name = "fa3"

    def __init__(self, library: Path | None = None) -> None:
        """Load the library, by default the one that FI_FA3 names.

        Raises:
            NotHere: there is no such file, or it does not load.
        """
        path = library or Path(os.environ.get("FI_FA3", FA3_LIBRARY))
        if not path.is_file():
            raise NotHere(f"no library {path}; name it with --fa3 or FI_FA3")
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise NotHere(f"{path} does not load: {error}") from error

    def why_not(self, workload: Workload) -> str | None:
        """Small pages are not served."""
        return fa3_why_not(workload)

    def prepare(self, data: Data) -> Prepared:
        """Compute the scheduler metadata."""
        workload, out = data.workload, data.new_out()
        heads = workload.heads
        metadata = scheduler_metadata(
            heads,
            workload.q_lens,
            workload.kv_lens,
            kv_len=data.kv_len,
            qo_indptr=data.qo_indptr,
            page=workload.page,
        )
        longest = (max(workload.q_lens), max(workload.kv_lens))
        scale = heads.head_dim_qk**-0.5

        def call(layer: int) -> None:
            k, v = data.layers[layer]
            torch.ops._vllm_fa3_C.fwd(
                data.q, k, v, None, None, None, out, data.qo_indptr, None, None, None, data.kv_len,
                *longest, data.table, None, None, None, None, None, None, None, None, scale, True,
                -1, -1, 0.0, True, metadata, 0, None, 0, None, 1, 0, None,
            )  # fmt: skip

        return Prepared(call, out)


def fa3_why_not(workload: Workload) -> str | None:
    """Return why FA3 does not run a workload."""
    if workload.page % FA3_PAGE_MULTIPLE:
        return f"pages of {workload.page}: this build serves multiples of {FA3_PAGE_MULTIPLE}"
    return None


def scheduler_metadata(
    heads: fi.HeadShape,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    kv_len: Tensor,
    qo_indptr: Tensor,
    page: int,
) -> Any:
    """Return FA3's plan of a step, computed by a kernel on the current stream."""
    return torch.ops._vllm_fa3_C.get_scheduler_metadata(
        len(kv_lens), max(q_lens), max(kv_lens), heads.num_qo_heads, heads.num_kv_heads,
        heads.head_dim_qk, heads.head_dim_vo, torch.bfloat16, kv_len, qo_indptr, None, None, None,
        None, page, 0, True, -1, -1, False, 0, None, 0,
    )  # fmt: skip
