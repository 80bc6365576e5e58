"""vLLM's KV cache tensors as views that the kernels read in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fi_backend import KvCacheView


def kv_view(kv_cache: Tensor, head_dim_k: int, *, fp8: bool) -> KvCacheView:
    """Return K and V of one layer.

    Args:
        kv_cache: [pages, heads, tokens, head_dim_k + head_dim_v] any strides (vLLM 0.32 and later)
            or [pages, 2, tokens, heads, head_dim] any strides (before).
        head_dim_k: components of a key.
        fp8: the cache holds float8_e4m3fn; vLLM types it uint8.
    """
    if fp8:
        kv_cache = kv_cache.view(torch.float8_e4m3fn)
    if kv_cache.dim() == 5:
        return KvCacheView.stacked(kv_cache)
    return KvCacheView.packed(kv_cache.transpose(1, 2), head_dim_k)
