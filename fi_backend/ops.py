"""The small operators around attention: writing new K and V into the cache, merging states."""

from __future__ import annotations

import torch
from torch import Tensor

from fi_backend import _core
from fi_backend.custom_op import register_op
from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.formats import DTYPE_CODES, KvCacheView
from fi_backend.launch import bind_scale, describe


def append_kv(
    k: Tensor,
    v: Tensor,
    kv: KvCacheView,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write the K and V of new tokens into their slots of a cache, in place.

    Args:
        k: [num_tokens, num_kv_heads, head_dim_qk], any strides but 1 in the last dimension. Tokens
            past ``slots`` are padding.
        v: [num_tokens, num_kv_heads, head_dim_vo], dtype of k.
        kv: the cache; dtype of k, or float8_e4m3fn.
        slots: int64 [at most num_tokens] contiguous: page * page_size + offset, or -1 to skip.
        k_scale: float32, one value or one per KV head; a float8 cache stores k / k_scale, saturated
            to +-448 and rounded to nearest even. None means 1, and is all that other caches take.
        v_scale: as k_scale.

    Raises:
        InvalidInput: a dtype, shape, stride or device outside the above, or a slot past the cache.

    Graphs: traceable by torch.compile. Slots named twice: either token may win.
    """
    torch.ops.fi_backend.append_kv(k, v, kv.k, kv.v, slots, k_scale=k_scale, v_scale=v_scale)


def merge_states(o: Tensor, lse: Tensor, softmax: bool = True) -> tuple[Tensor, Tensor]:
    """Merge partial states of the same queries over disjoint KV positions.

    With softmax, o = sum(exp(lse_s) * o_s) / sum(exp(lse_s)) and lse = log(sum(exp(lse_s))); a row
    that saw nothing anywhere has o = 0 and lse = -inf. Without, states add up.

    Args:
        o: float32 [num_states, num_tokens, num_heads, head_dim], contiguous.
        lse: float32 [num_states, num_tokens, num_heads], contiguous, natural log; not read without
            softmax.
        softmax: whether the states are normalised.

    Returns:
        o float32 [num_tokens, num_heads, head_dim]; lse float32 [num_tokens, num_heads], zero
        without softmax.

    Raises:
        InvalidInput: a dtype, shape, stride or device outside the above.
    """
    merged: tuple[Tensor, Tensor] = torch.ops.fi_backend.merge_states(o, lse, softmax)
    return merged


def _append_kv_cpu(
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    _check_append(k, v, cache_k, cache_v, slots)
    _check_cache_scales(cache_k.dtype, k_scale, v_scale)
    params = _core.AppendParams()
    params.k, params.v, params.slots = k.data_ptr(), v.data_ptr(), slots.data_ptr()
    params.dtype = DTYPE_CODES[k.dtype]
    params.k_stride_token, params.k_stride_head = k.stride()[:2]
    params.v_stride_token, params.v_stride_head = v.stride()[:2]
    params.num_tokens = slots.numel()
    heads = k.shape[1]
    params.heads = _core.HeadShape(heads, heads, k.shape[2], v.shape[2])
    view = _core.KvCacheView()
    view.k, view.v, view.dtype = cache_k.data_ptr(), cache_v.data_ptr(), DTYPE_CODES[cache_k.dtype]
    view.k_stride = _core.KvStrides(*cache_k.stride()[:3])
    view.v_stride = _core.KvStrides(*cache_v.stride()[:3])
    view.num_pages, view.page_size = cache_k.shape[:2]
    params.kv = view
    params.k_scale = bind_scale("k_scale", k_scale, heads)
    params.v_scale = bind_scale("v_scale", v_scale, heads)
    _core.append_kv(params, torch.get_num_threads())


def _check_cache_scales(dtype: torch.dtype, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        require(
            scale is None or dtype == torch.float8_e4m3fn,
            name,
            f"None for a cache of {dtype}",
            "a scale",
            "only float8_e4m3fn caches hold scaled values",
        )


def _check_append(k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, slots: Tensor) -> None:
    for name, new, cache in (("k", k, cache_k), ("v", v, cache_v)):
        heads, dim = cache.shape[2:]
        require(
            new.dim() == 3
            and new.shape[1:] == (heads, dim)
            and new.shape[0] >= slots.numel()
            and new.dtype == k.dtype
            and new.dtype in DTYPE_CODES
            and new.device.type == "cpu"
            and new.stride(-1) == 1,
            name,
            f"[{slots.numel()} tokens or more, {heads}, {dim}] on cpu, one dtype for k and v,"
            " stride 1 in the last dimension",
            describe(new),
            "pass the new tokens as the cache stores heads",
        )
    require(
        cache_k.dtype in (k.dtype, torch.float8_e4m3fn),
        "kv",
        f"a cache of {k.dtype} or torch.float8_e4m3fn",
        cache_k.dtype,
        "convert k and v to the dtype of the cache",
    )
    require(
        slots.dtype == torch.int64
        and slots.dim() == 1
        and slots.device.type == "cpu"
        and slots.is_contiguous(),
        "slots",
        "a contiguous int64 vector on cpu",
        describe(slots),
        "convert it once per step",
    )
    limit = cache_k.shape[0] * cache_k.shape[1]
    largest = int(slots.max()) if slots.numel() else -1
    if largest >= limit:
        raise InvalidInput(
            contract_message(
                "slots",
                f"at most {limit - 1}, the last slot of the cache",
                f"{largest} at token {int(slots.argmax())}",
                "slots are page * page_size + offset",
            )
        )


def _merge_states_cpu(o: Tensor, lse: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    for name, tensor, ndim in (("o", o, 4), ("lse", lse, 3)):
        require(
            tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            and tensor.dim() == ndim
            and tensor.shape[:3] == o.shape[:3]
            and tensor.is_contiguous(),
            name,
            f"contiguous float32 [states, tokens, heads{', dim' if ndim == 4 else ''}] on cpu,"
            " equal in both",
            describe(tensor),
            "stack the partial states",
        )
    out_o, out_lse = torch.empty_like(o[0]), torch.zeros_like(lse[0])
    params = _core.MergeParams()
    params.o, params.lse = o.data_ptr(), lse.data_ptr()
    params.out_o, params.out_lse = out_o.data_ptr(), out_lse.data_ptr()
    params.num_states, params.rows, params.dim = o.shape[0], lse[0].numel(), o.shape[3]
    params.softmax = softmax
    _core.merge_states(params, torch.get_num_threads())
    return out_o, out_lse


register_op(
    "append_kv(Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor slots, *,"
    " Tensor? k_scale, Tensor? v_scale) -> ()",
    _append_kv_cpu,
    lambda *_, **__: None,
)
register_op(
    "merge_states(Tensor o, Tensor lse, bool softmax) -> (Tensor, Tensor)",
    _merge_states_cpu,
    lambda o, lse, softmax: (torch.empty_like(o[0]), torch.empty_like(lse[0])),
)
