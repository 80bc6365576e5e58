"""Prefill over contiguous K and V: tokens of all requests one after the other, no cache.

A ragged batch is a paged one with pages of one token: row r of the page table is
``kv_indptr[r] .. kv_indptr[r + 1]``. Nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fi_backend.checks import as_ints, check_indptr
from fi_backend.errors import require
from fi_backend.formats import PagedBatch, PageTable
from fi_backend.storage import require_vector


def ragged(qo_indptr: Tensor, kv_indptr: Tensor, *, num_kv_tokens: int | None = None) -> PagedBatch:
    """Return the batch of contiguous K and V; view them with ``KvCacheView.ragged(k, v)``.

    Args:
        qo_indptr: int32 [R + 1] device, query tokens before each request.
        kv_indptr: int32 [R + 1] device, KV tokens before each request.
        num_kv_tokens: KV tokens in all, or more: the length of k. None: read from kv_indptr, which
            on a GPU waits for the device.

    Raises:
        InvalidInput: a dtype, length or device outside the above; counts that fall or exceed
            num_kv_tokens, where they are read: on a GPU not with num_kv_tokens given.
    """
    require_vector(kv_indptr, "kv_indptr", (torch.int32,))
    require(kv_indptr.numel() > 0, "kv_indptr", "R + 1 elements", "none", "an empty batch has [0]")
    device = kv_indptr.device
    if num_kv_tokens is None or device.type == "cpu":
        bounds = as_ints(kv_indptr)
        check_indptr(bounds, "kv_indptr", "pass cumulative KV lengths")
        last = int(bounds[-1])
        num_kv_tokens = last if num_kv_tokens is None else num_kv_tokens
        rule = f"at most num_kv_tokens={num_kv_tokens} at the end"
        require(last <= num_kv_tokens, "kv_indptr", rule, last, "pass the length of k")
    indices = torch.arange(num_kv_tokens, dtype=torch.int32, device=device)
    return PagedBatch(
        qo_indptr,
        kv_indptr.diff(),
        PageTable.csr(kv_indptr, indices, page_size=1),
    )
