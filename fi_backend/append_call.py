"""One call of append_kv: its tensors, their checks, and the engines' parameter block.

Checks and strides depend on shapes alone: they are made once per combination of them, after which a
call costs one look-up and the addresses.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fi_backend import _core
from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.formats import DTYPE_CODES, INDEX_DTYPES
from fi_backend.launch import bind_scale, describe

FLOAT8 = torch.float8_e4m3fn
CHUNK = 8  # elements that a thread moves at a time: kChunk of fi/common/append_params.h
# With FI_CHECK=1 slots and positions on a GPU are checked too, which waits for the device.
CHECKS_VALUES = os.environ.get("FI_CHECK", "0") not in ("", "0")

_MAX_PREPARED = 1024  # combinations of shapes that are remembered
_MAX_ROWS = 2**30  # tokens * heads that the kernel counts
_MAX_SLOTS = 2**31 - 1


class AppendCall(NamedTuple):
    """Arguments of the ops, in their order; see ``fi_backend.append_kv``."""

    k: Tensor
    v: Tensor
    cache_k: Tensor
    cache_v: Tensor
    slots: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    cos_sin: Tensor | None = None
    positions: Tensor | None = None
    interleaved: bool = False
    q: Tensor | None = None
    q_out: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """What all calls with the same shapes share.

    Attributes:
        params: all but the addresses.
        num_slots: of the cache.
        num_positions: of cos_sin; 0 without.
        aligned_strides: rows start at multiples of 8 elements if the tensors do, and what is
            rotated is whole chunks of 8.
        chunk_bytes: of the cache.
        kernels: on a GPU, by whether all rows are aligned.
    """

    params: _core.AppendParams
    num_slots: int
    num_positions: int
    aligned_strides: bool
    chunk_bytes: int
    kernels: dict[bool, _core.Kernel] = field(default_factory=dict)


def prepare(call: AppendCall) -> Prepared:
    """Return what is known of the call's shapes; they are checked when first seen.

    Raises:
        InvalidInput: as ``fi_backend.append_kv``, but for values.
    """
    k, v, cache_k, cache_v, slots, k_scale, v_scale, cos_sin = call[:8]
    key: tuple[object, ...] = (
        *(k.shape, k.stride(), k.dtype, k.device),
        *(v.shape, v.stride(), v.dtype, v.device),
        *(cache_k.shape, cache_k.stride(), cache_k.dtype, cache_k.device),
        *(cache_v.shape, cache_v.stride(), cache_v.dtype, cache_v.device),
        *(slots.shape, slots.stride(), slots.dtype, slots.device),
    )
    if k_scale is not None or v_scale is not None:
        key += ("scales", _shape(k_scale), _shape(v_scale))
    if cos_sin is not None:
        key += (_shape(cos_sin), call.interleaved)
        key += (_shape(call.positions), _shape(call.q), _shape(call.q_out))
    prepared = _prepared.get(key)
    if prepared is None:
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        prepared = _prepared[key] = _check_and_prepare(call)
    return prepared


_prepared: dict[tuple[object, ...], Prepared] = {}


def _shape(tensor: Tensor | None) -> tuple[object, ...] | None:
    if tensor is None:
        return None
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def addresses_of(call: AppendCall) -> tuple[int, ...]:
    """Return the addresses in the order of bindings/bind_ops.cc."""
    k, v, cache_k, cache_v, slots, k_scale, v_scale, cos_sin, positions, _, q, q_out = call
    return (
        k.data_ptr(),
        v.data_ptr(),
        cache_k.data_ptr(),
        cache_v.data_ptr(),
        slots.data_ptr(),
        0 if k_scale is None else k_scale.data_ptr(),
        0 if v_scale is None else v_scale.data_ptr(),
        0 if q is None else q.data_ptr(),
        0 if q_out is None else q_out.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        0 if cos_sin is None else cos_sin.data_ptr(),
    )


def check_values(call: AppendCall, prepared: Prepared) -> None:
    """Raise InvalidInput for slots past the cache and positions outside of cos_sin.

    On a GPU this waits for the device.
    """
    slots, positions = call.slots, call.positions
    if not slots.numel():
        return
    largest = int(slots.max())
    if largest >= prepared.num_slots:
        rule = f"at most {prepared.num_slots - 1}, the last slot of the cache"
        got = f"{largest} at token {int(slots.argmax())}"
        hint = "slots are page * page_size + offset"
        raise InvalidInput(contract_message("slots", rule, got, hint))
    if positions is None:
        return
    used = positions[: slots.numel()]
    for worst in (int(used.argmax()), int(used.argmin())):
        position = int(used[worst])
        require(
            0 <= position < prepared.num_positions,
            "rope.positions",
            f"positions in [0, {prepared.num_positions}), the rows of cos_sin",
            f"{position} at token {worst}",
            "give padding tokens a position too, such as 0",
        )


def _check_and_prepare(call: AppendCall) -> Prepared:
    k, v, cache_k, cache_v, slots = call[:5]
    _check_new(call)
    _check_cache(call)
    heads, device = cache_k.shape[2], cache_k.device
    params = _core.AppendParams(DTYPE_CODES[k.dtype])
    params.num_tokens, params.num_kv_heads = slots.numel(), heads
    params.head_dim_qk, params.head_dim_vo = k.shape[2], v.shape[2]
    params.k_stride = _core.TokenStrides(*k.stride()[:2])
    params.v_stride = _core.TokenStrides(*v.stride()[:2])
    params.kv = _cache_view(cache_k, cache_v)
    params.k_scale_per_head = bind_scale("k_scale", call.k_scale, heads, device).per_head
    params.v_scale_per_head = bind_scale("v_scale", call.v_scale, heads, device).per_head
    num_positions, moved = 0, [k, v, cache_k, cache_v]
    is_whole = True
    if call.cos_sin is not None and call.positions is not None:
        _check_rope(call, call.cos_sin, call.positions)
        num_positions, rotary_dim = call.cos_sin.shape
        is_whole = rotary_dim % (CHUNK if call.interleaved else 2 * CHUNK) == 0
        moved += [t for t in (call.cos_sin, call.q, call.q_out) if t is not None]
        _set_rope(params, call, call.cos_sin, call.positions)
    aligned = is_whole and all(
        size < 2 or stride % CHUNK == 0
        for t in moved
        for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)
    )
    num_slots = cache_k.shape[0] * cache_k.shape[1]
    return Prepared(params, num_slots, num_positions, aligned, CHUNK * cache_k.element_size())


def _cache_view(cache_k: Tensor, cache_v: Tensor) -> _core.KvCacheView:
    view = _core.KvCacheView()
    view.dtype = DTYPE_CODES[cache_k.dtype]
    view.k_stride = _core.KvStrides(*cache_k.stride()[:3])
    view.v_stride = _core.KvStrides(*cache_v.stride()[:3])
    view.num_pages, view.page_size = cache_k.shape[:2]
    return view


def _set_rope(
    params: _core.AppendParams, call: AppendCall, cos_sin: Tensor, positions: Tensor
) -> None:
    num_positions, rotary_dim = cos_sin.shape
    params.rope = _core.RopeParams(
        rotary_dim,
        call.interleaved,
        DTYPE_CODES[cos_sin.dtype],
        cos_sin.stride(0),
        num_positions,
        positions.dtype == torch.int64,
    )
    if call.q is not None and call.q_out is not None:
        params.num_qo_heads = call.q.shape[1]
        params.q_stride = _core.TokenStrides(*call.q.stride()[:2])
        params.q_out_stride = _core.TokenStrides(*call.q_out.stride()[:2])


def _check_new(call: AppendCall) -> None:
    k, cache_k, num_tokens = call.k, call.cache_k, call.slots.numel()
    device = cache_k.device
    dtypes = tuple(DTYPE_CODES) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    for name, new, cache in (("k", k, cache_k), ("v", call.v, call.cache_v)):
        heads, dim = cache.shape[2:]
        require(
            new.dim() == 3
            and new.shape[1:] == (heads, dim)
            and new.shape[0] >= num_tokens
            and new.dtype == k.dtype
            and new.device == device
            and new.stride(-1) == 1,
            name,
            f"[{num_tokens} tokens or more, {heads}, {dim}] on {device}, one dtype for k and v,"
            " stride 1 in the last dimension",
            describe(new),
            "pass the new tokens as the cache stores heads",
        )
        require(
            dim > 0 and dim % CHUNK == 0,
            name,
            f"a head dimension that is a multiple of {CHUNK}",
            dim,
            "pad the heads",
        )
    require(
        k.dtype in dtypes,
        "k",
        " or ".join(map(str, dtypes)) + f" on {device}",
        k.dtype,
        "convert k and v",
    )


def _check_cache(call: AppendCall) -> None:
    k, cache_k, slots = call.k, call.cache_k, call.slots
    require(
        cache_k.dtype in (k.dtype, FLOAT8),
        "kv",
        f"a cache of {k.dtype} or {FLOAT8}",
        cache_k.dtype,
        "convert k and v to the dtype of the cache",
    )
    for name, scale in (("k_scale", call.k_scale), ("v_scale", call.v_scale)):
        require(
            scale is None or cache_k.dtype == FLOAT8,
            name,
            f"None for a cache of {cache_k.dtype}",
            "a scale",
            "only float8_e4m3fn caches hold scaled values",
        )
    require(
        slots.dtype == torch.int64
        and slots.dim() == 1
        and slots.device == cache_k.device
        and slots.is_contiguous(),
        "slots",
        f"a contiguous int64 vector on {cache_k.device}",
        describe(slots),
        "convert it once per step",
    )
    num_slots = cache_k.shape[0] * cache_k.shape[1]
    require(num_slots <= _MAX_SLOTS, "kv", f"at most {_MAX_SLOTS} slots", num_slots, "split it")
    heads = cache_k.shape[2] if call.q is None else max(cache_k.shape[2], call.q.shape[1])
    rows = slots.numel() * heads
    require(rows <= _MAX_ROWS, "slots", f"tokens * heads up to {_MAX_ROWS}", rows, "split the step")


def _check_rope(call: AppendCall, cos_sin: Tensor, positions: Tensor) -> None:
    k, device, num_tokens = call.k, call.cache_k.device, call.slots.numel()
    head_dim = k.shape[2]
    require(
        cos_sin.dim() == 2
        and cos_sin.dtype in (torch.float32, k.dtype)
        and cos_sin.device == device
        and cos_sin.stride(-1) == 1
        and cos_sin.shape[1] in range(2, head_dim + 1, 2),
        "rope.cos_sin",
        f"[positions, rotary_dim] of float32 or {k.dtype} on {device}, stride 1 in the last"
        f" dimension, rotary_dim even and at most {head_dim}",
        describe(cos_sin),
        "pass cosines, then sines, half of rotary_dim each",
    )
    require(
        positions.dim() == 1
        and positions.numel() >= num_tokens
        and positions.dtype in INDEX_DTYPES
        and positions.device == device
        and positions.is_contiguous(),
        "rope.positions",
        f"a contiguous int32 or int64 vector of {num_tokens} or more elements on {device}",
        describe(positions),
        "pass one position per token",
    )
    for name, tensor in (("q", call.q), ("q_out", call.q_out)):
        if call.q is None or tensor is None:
            continue
        require(
            tensor.dim() == 3
            and tensor.shape[0] >= num_tokens
            and tensor.shape[1] == call.q.shape[1] > 0
            and tensor.shape[2] == head_dim
            and tensor.dtype == k.dtype
            and tensor.device == device
            and tensor.stride(-1) == 1,
            name,
            f"{k.dtype} [{num_tokens} tokens or more, heads, {head_dim}] on {device}, stride 1 in"
            " the last dimension, as many heads in q_out as in q",
            describe(tensor),
            "pass the queries of the same tokens",
        )
