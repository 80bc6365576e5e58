"""Tensors of a workload on the GPU, in enough copies that no copy is still in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fi_backend as fi
from e2e_bench.workloads import ELEMENT_BYTES, TINY, Workload

# K and V of all layer copies together: ten times the L2 of an H200, so that a copy's second turn
# finds nothing of the first.
ROTATION_BYTES = 600e6
MIN_LAYERS = 2
# Spread of the logits: the largest of thousands then lies beyond 5, where softmax is not flat.
QUERY_SCALE = 2.0


def num_layers(workload: Workload) -> int:
    """Return how many layer copies rotate: at least two, and 600 MB of K and V."""
    return max(MIN_LAYERS, -(-int(ROTATION_BYTES) // workload.kv_bytes))


def pool_elements(workloads: Sequence[Workload]) -> int:
    """Return the elements that the layer copies of the largest workload take."""
    return max(num_layers(w) * w.kv_bytes // ELEMENT_BYTES for w in workloads)


def make_pool(workloads: Sequence[Workload], device: torch.device) -> Tensor:
    """Return bf16 normal numbers that every workload cuts its layers from: filled once."""
    generator = torch.Generator(device).manual_seed(7)
    count = pool_elements(workloads)
    return torch.randn(count, dtype=torch.bfloat16, device=device, generator=generator)


@dataclass(frozen=True, eq=False)
class Csr:
    """A page table as FlashInfer takes it.

    Attributes:
        indptr: int32 [requests + 1], pages before each request.
        indices: int32 [nnz], page ids.
        last_page_len: int32 [requests], tokens in each request's last page.
    """

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


class Data:
    """Tensors of a workload.

    Attributes:
        layers: (K, V) of each layer copy, [num_pages, page, num_kv_heads, head_dim].
        q: bf16 [num_tokens, num_qo_heads, head_dim], the same for all layers.
        qo_indptr: int32 [requests + 1].
        kv_len: int32 [requests].
        table: int32 [requests, most pages of a request]; unused entries are 0.
        rows: page ids of each request, on the host.
        batch: the step as our planner takes it.
    """

    def __init__(self, workload: Workload, pool: Tensor, layers: int | None = None) -> None:
        """Cut layers (by default, as many as must rotate) from the pool; shuffle the pages."""
        device, heads = pool.device, workload.heads
        self.workload = workload
        self.device = device
        self.layers = _cut_layers(workload, pool, layers or num_layers(workload))
        generator = torch.Generator(device).manual_seed(11)
        shape = (workload.num_tokens, heads.num_qo_heads, heads.head_dim_qk)
        q = torch.randn(shape, dtype=torch.float32, device=device, generator=generator)
        self.q = (q * QUERY_SCALE).bfloat16()
        self.rows = page_rows(workload)
        self.batch = make_batch(workload, self.rows, device)
        self.table = self.batch.page_table.entries
        self.qo_indptr, self.kv_len = self.batch.qo_indptr, self.batch.kv_len

    def new_out(self) -> Tensor:
        """Return memory for an output, NaN where nothing is written."""
        shape = (*self.q.shape[:-1], self.workload.heads.head_dim_vo)
        return torch.full(shape, torch.nan, dtype=self.q.dtype, device=self.device)

    def csr(self) -> Csr:
        """Return the page table without the shared part being known."""
        return make_csr(self.rows, self.workload.kv_lens, self.workload.page, self.device)


def _cut_layers(workload: Workload, pool: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    heads = workload.heads
    assert heads.head_dim_qk == heads.head_dim_vo, "K and V are cut alike"
    shape = (2, workload.num_pages, workload.page, heads.num_kv_heads, heads.head_dim_qk)
    size = workload.kv_bytes // ELEMENT_BYTES
    cuts = (pool[i * size : (i + 1) * size].view(shape) for i in range(count))
    return [(kv[0], kv[1]) for kv in cuts]


def page_rows(workload: Workload) -> list[Tensor]:
    """Return the page ids of each request, int32 on the host: shuffled, a prefix's placed once."""
    generator = torch.Generator().manual_seed(13)
    order = torch.randperm(workload.num_pages, dtype=torch.int32, generator=generator)
    parts = order.split(workload.page_counts)
    own = parts[len(workload.prefixes) :]
    return [
        torch.cat([*(parts[prefix] for prefix in workload.path(request)), pages])
        for request, pages in enumerate(own)
    ]


def make_batch(workload: Workload, rows: Sequence[Tensor], device: torch.device) -> fi.PagedBatch:
    """Return the step with rows of page ids as a dense table; unused entries are 0."""
    table = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
    return fi.PagedBatch(
        torch.tensor([0, *workload.q_lens]).cumsum(0).to(device, torch.int32),
        torch.tensor(workload.kv_lens, dtype=torch.int32, device=device),
        fi.PageTable.dense(table, workload.page),
    )


def make_csr(
    rows: Sequence[Tensor], kv_lens: Sequence[int], page: int, device: torch.device
) -> Csr:
    """Return rows of page ids in CSR form."""
    indptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(device, torch.int32)
    last = torch.tensor([(kv - 1) % page + 1 for kv in kv_lens], dtype=torch.int32, device=device)
    return Csr(indptr, torch.cat(list(rows)).to(device), last)


def tiny_data(device: torch.device) -> Data:
    """Return data of next to no work, for the cost of a call."""
    pool = torch.zeros(TINY.kv_bytes // ELEMENT_BYTES, dtype=torch.bfloat16, device=device)
    return Data(TINY, pool, layers=1)
