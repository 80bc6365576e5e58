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


def ragged(qo_indptr: Tensor, kv_indptr: Tensor) -> PagedBatch:
    """Return the batch of contiguous K and V; view them with ``KvCacheView.ragged(k, v)``.

    Args:
        qo_indptr: int32 [R + 1] CPU, query tokens before each request.
        kv_indptr: int32 [R + 1] CPU, KV tokens before each request.

    Raises:
        InvalidInput: a dtype or length outside the above, or counts that fall.
    """
    require_vector(kv_indptr, "kv_indptr", (torch.int32,))
    require(kv_indptr.numel() > 0, "kv_indptr", "R + 1 elements", "none", "an empty batch has [0]")
    bounds = as_ints(kv_indptr)
    check_indptr(bounds, "kv_indptr", "pass cumulative KV lengths")
    indices = torch.arange(int(bounds[-1]), dtype=torch.int32)
    return PagedBatch(
        qo_indptr,
        kv_indptr.diff(),
        PageTable.csr(kv_indptr, indices, page_size=1),
    )
