"""FlashInfer's wrappers, each planned for its step and run layer by layer.

Its modules compile for minutes with nvcc: those that the workloads need are started together. The
wrappers run as they come, launch overlap included.

Source: signatures of FlashInfer 0.6.13.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from e2e_bench.gpu_data import Csr, Data, make_csr
from e2e_bench.impls import Implementation, NotHere, Prepared
from e2e_bench.workloads import Workload

NAMES = (
    "flashinfer_decode",
    "flashinfer_fa2",
    "flashinfer_fa3",
    "flashinfer_persistent",
    "flashinfer_cascade",
)
WORKSPACE_BYTES = 512 << 20
BF16 = torch.bfloat16
# What each wrapper is made of; the cascade takes the prefill template that suits the GPU.
MODULES = {
    "flashinfer_decode": ("fa2",),
    "flashinfer_fa2": ("fa2",),
    "flashinfer_fa3": ("fa3",),
    "flashinfer_persistent": ("persistent",),
    "flashinfer_cascade": ("fa3", "merge"),
}


class Modules:
    """FlashInfer's compiled modules, built in threads from the start of a run."""

    def __init__(self, names: Sequence[str], workloads: Sequence[Workload]) -> None:
        """Start to build what these wrappers need for these workloads.

        Raises:
            NotHere: FlashInfer cannot be imported.
        """
        try:
            self.package: Any = importlib.import_module("flashinfer")
        except (ImportError, OSError, RuntimeError) as error:
            raise NotHere(f"flashinfer does not import: {error}") from error
        wanted = {
            (module, workload.heads.head_dim_qk if module != "merge" else 0)
            for name in names
            for workload in workloads
            if why_not(name, workload) is None
            for module in MODULES[name]
        }
        # Compilers per module: together half as many again as cores; each takes 2 to 3 GB.
        cores = os.cpu_count() or 1
        os.environ.setdefault("MAX_JOBS", str(-(-3 * cores // (2 * max(1, len(wanted))))))
        pool = ThreadPoolExecutor(max(1, len(wanted)))
        self._built: dict[tuple[str, int], Future[Any]] = {
            key: pool.submit(_build, *key) for key in sorted(wanted)
        }
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until all are built or have failed."""
        for key, future in self._built.items():
            error = future.exception()
            print(f"  flashinfer module {key}: {'failed' if error else 'ready'}", flush=True)

    def require(self, name: str, workload: Workload) -> None:
        """Raise the error of a module that this wrapper needs and that did not build."""
        for module in MODULES[name]:
            key = (module, workload.heads.head_dim_qk if module != "merge" else 0)
            self._built[key].result()


def _build(module: str, head_dim: int) -> object:
    if module == "merge":
        return importlib.import_module("flashinfer.cascade").get_cascade_module()
    # Elements of q, K and V, out; page ids; dims; no position encoding, and no other option.
    types, dims = (BF16, BF16, BF16, torch.int32), (head_dim, head_dim)
    if module == "persistent":
        core = importlib.import_module("flashinfer.attention._core")
        return core.get_holistic_attention_module(*types, *dims, 0, False, False)
    prefill = importlib.import_module("flashinfer.prefill")
    return prefill.get_batch_prefill_module(module, *types, *dims, 0, False, False, False)


def why_not(name: str, workload: Workload) -> str | None:
    """Return why a wrapper does not run a workload."""
    if name == "flashinfer_decode" and not workload.is_decode:
        return "one query token per request only"
    if name == "flashinfer_cascade":
        depths = {len(workload.path(request)) for request in range(len(workload.kv_lens))}
        if depths == {0}:
            return "shared prefixes only"
        if len(depths) > 1:
            return "prefixes of one depth only"
    return None


class FlashInfer:
    """One of FlashInfer's wrappers."""

    def __init__(self, name: str, modules: Modules, workspace: Tensor) -> None:
        self.name = name
        self._modules = modules
        self._workspace = workspace

    def why_not(self, workload: Workload) -> str | None:
        """As the function of this name."""
        return why_not(self.name, workload)

    def prepare(self, data: Data) -> Prepared:
        """Plan the step in a wrapper of its own."""
        self._modules.require(self.name, data.workload)
        return _PREPARE[self.name](self._modules.package, self._workspace, data)


def make(
    names: Sequence[str], workloads: Sequence[Workload], device: torch.device
) -> list[Implementation]:
    """Return the wrappers of these names, their modules built.

    Raises:
        NotHere: FlashInfer cannot be imported.
    """
    modules = Modules(names, workloads)
    modules.wait()
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return [FlashInfer(name, modules, workspace) for name in names]


def _shape(data: Data) -> tuple[int, int, int]:
    heads = data.workload.heads
    return heads.num_qo_heads, heads.num_kv_heads, heads.head_dim_qk


def _decode(package: Any, workspace: Tensor, data: Data) -> Prepared:
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    csr = data.csr()
    wrapper.plan(
        csr.indptr,
        csr.indices,
        csr.last_page_len,
        *_shape(data),
        data.workload.page,
        q_data_type=BF16,
        kv_data_type=BF16,
    )
    return _into_out(wrapper.run, data)


def _paged_prefill(backend: str) -> Callable[[Any, Tensor, Data], Prepared]:
    def prepare(package: Any, workspace: Tensor, data: Data) -> Prepared:
        wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        csr = data.csr()
        wrapper.plan(
            data.qo_indptr,
            csr.indptr,
            csr.indices,
            csr.last_page_len,
            *_shape(data),
            data.workload.page,
            causal=True,
            q_data_type=BF16,
            kv_data_type=BF16,
        )
        return _into_out(wrapper.run, data)

    return prepare


def _persistent(package: Any, _workspace: Tensor, data: Data) -> Prepared:
    wrapper = package.BatchAttention("NHD", device=str(data.device))
    csr = data.csr()
    num_qo_heads, num_kv_heads, head_dim = _shape(data)
    wrapper.plan(
        data.qo_indptr,
        csr.indptr,
        csr.indices,
        data.kv_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        head_dim,
        data.workload.page,
        causal=True,
        q_data_type=BF16,
        kv_data_type=BF16,
    )
    lse = torch.empty(data.q.shape[:2], dtype=torch.float32, device=data.device)
    return _into_out(lambda q, kv, out: wrapper.run(q, kv, out=out, lse=lse), data)


@dataclass(frozen=True)
class Level:
    """One level of a cascade: KV ranges, each read for consecutive query tokens.

    Attributes:
        qo_indptr: int32 [ranges + 1], query tokens before each range's.
        kv: the ranges.
    """

    qo_indptr: Tensor
    kv: Csr


def cascade_levels(data: Data, order: Sequence[int]) -> list[Level]:
    """Return the levels of prefixes, then that of each request's own KV.

    Args:
        data: whose requests all have a prefix on every level.
        order: of the requests; those of a prefix follow each other.
    """
    workload, levels = data.workload, []
    read = [0] * len(order)  # pages of each request that the levels so far have read
    for level in range(workload.levels):
        spans, rows, lens = [], [], []
        for prefix, members in groupby(order, key=lambda r: workload.path(r)[level]):
            spans.append(list(members))
            begin, count = read[spans[-1][0]], workload.page_counts[prefix]
            rows.append(data.rows[spans[-1][0]][begin : begin + count])
            lens.append(workload.prefixes[prefix].tokens)
            for request in spans[-1]:
                read[request] += count
        levels.append(_level(data, spans, rows, lens))
    own = [data.rows[request][read[request] :] for request in order]
    own_lens = [workload.own_lens[request] for request in order]
    return [*levels, _level(data, [[request] for request in order], own, own_lens)]


def _level(
    data: Data, spans: Sequence[Sequence[int]], rows: Sequence[Tensor], lens: Sequence[int]
) -> Level:
    q_lens = data.workload.q_lens
    counts = [sum(q_lens[request] for request in span) for span in spans]
    indptr = torch.tensor([0, *counts]).cumsum(0).to(data.device, torch.int32)
    return Level(indptr, make_csr(rows, lens, data.workload.page, data.device))


def _cascade(package: Any, workspace: Tensor, data: Data) -> Prepared:
    """The wrapper wants the tokens of a prefix side by side: they are sorted before the time."""
    workload = data.workload
    order = sorted(range(len(workload.kv_lens)), key=workload.path)
    levels = cascade_levels(data, order)
    wrapper = package.MultiLevelCascadeAttentionWrapper(len(levels), workspace, "NHD")
    wrapper.plan(
        [level.qo_indptr for level in levels],
        [level.kv.indptr for level in levels],
        [level.kv.indices for level in levels],
        [level.kv.last_page_len for level in levels],
        *_shape(data),
        workload.page,
        causal=True,
        q_data_type=BF16,
        kv_data_type=BF16,
    )
    starts = data.qo_indptr.tolist()
    tokens = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in order]).to(data.device)
    q = data.q[tokens]
    return Prepared(lambda layer: wrapper.run(q, data.layers[layer]), None, tokens.argsort())


def _into_out(run: Callable[..., object], data: Data) -> Prepared:
    out = data.new_out()

    def call(layer: int) -> None:
        run(data.q, data.layers[layer], out=out)

    return Prepared(call, out)


_PREPARE: dict[str, Callable[[Any, Tensor, Data], Prepared]] = {
    "flashinfer_decode": _decode,
    "flashinfer_fa2": _paged_prefill("fa2"),
    "flashinfer_fa3": _paged_prefill("fa3"),
    "flashinfer_persistent": _persistent,
    "flashinfer_cascade": _cascade,
}
