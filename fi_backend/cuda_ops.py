"""append_kv and merge_states on a GPU: their kernels, and launches on torch's current stream.

Nothing here waits for the device or reads its memory, but for checks that FI_CHECK=1 asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fi_backend import _core, append_call
from fi_backend.append_call import (
    CHUNK,
    AppendCall,
    Prepared,
    addresses_of,
    check_values,
    prepare,
)
from fi_backend.cpu_ops import check_states
from fi_backend.cuda_launch import is_capturing
from fi_backend.jit.kernels import DeviceKernel, bool_literal, load

_ELEMENTS = {
    torch.bfloat16: "__nv_bfloat16",
    torch.float16: "__half",
    torch.float32: "float",
    torch.float8_e4m3fn: "__nv_fp8_e4m3",
}
_VECTOR_BYTES = 16


@dataclass(frozen=True)
class RopeSpec:
    """What an append kernel's code depends on where it rotates.

    Attributes:
        cos_sin_dtype: float32, or dtype of k.
        rotary_dim: rotated elements of a head.
        interleaved: as ``Rope``.
    """

    cos_sin_dtype: torch.dtype
    rotary_dim: int
    interleaved: bool = False


@dataclass(frozen=True)
class AppendSpec:
    """What an append kernel's code depends on.

    Attributes:
        dtype: of k, v and q: float16 or bfloat16.
        cache_dtype: the same, or float8_e4m3fn.
        head_dim_qk: of k and q, a multiple of 8.
        head_dim_vo: of v.
        rope: None: K is stored as it is.
        aligned: rows start at multiples of 16 bytes (8 in a float8 cache), rotated parts are whole
            chunks of 8 elements; other kernels are slower.
    """

    dtype: torch.dtype
    cache_dtype: torch.dtype
    head_dim_qk: int
    head_dim_vo: int
    rope: RopeSpec | None = None
    aligned: bool = True


@lru_cache(maxsize=256)
def append_kernel(spec: AppendSpec) -> DeviceKernel:
    """Return the kernel that appends tensors of a spec."""
    rope, turns = "NoRope", ""
    if spec.rope is not None:
        element = _ELEMENTS[spec.rope.cos_sin_dtype]
        rope = f"Rope<{element}, {spec.rope.rotary_dim}, {bool_literal(spec.rope.interleaved)}>"
        turns = f" {rope}"
    arguments = (
        f"{_ELEMENTS[spec.dtype]}, {_ELEMENTS[spec.cache_dtype]}, {spec.head_dim_qk},"
        f" {spec.head_dim_vo}, {bool_literal(spec.aligned)}"
    )
    source = f"""#include "fi/common/append_kv.h"
extern "C" __global__ void __launch_bounds__(fi::kAppendThreads)
fi_append_kv(const __grid_constant__ fi::AppendParams p) {{
  using namespace fi;
  append_kv<{arguments}, {rope}>(p);
}}
"""
    title = (
        f"append_kv {_short(spec.dtype)} to {_short(spec.cache_dtype)} d{spec.head_dim_qk}"
        f"/{spec.head_dim_vo}{turns}{'' if spec.aligned else ' unaligned'}"
    )
    return DeviceKernel(title, "fi_append_kv", source, 0)


def append_kernels(spec: AppendSpec) -> list[DeviceKernel]:
    """Return all kernels that calls of one layer may need, whatever their strides."""
    kernels = [append_kernel(replace(spec, aligned=False))]
    if spec.rope is None or _is_whole(spec.rope):
        kernels.append(append_kernel(replace(spec, aligned=True)))
    return kernels


@lru_cache(maxsize=64)
def merge_kernel(dim: int, softmax: bool = True, aligned: bool = True) -> DeviceKernel:
    """Return the kernel that merges states of ``dim`` elements; aligned: dim is a multiple of 4."""
    source = f"""#include "fi/common/merge_states.h"
extern "C" __global__ void __launch_bounds__(fi::kMergeThreads, fi::kMergeCtas)
fi_merge_states(const __grid_constant__ fi::MergeKernelParams p) {{
  fi::merge_states<{dim}, {bool_literal(aligned)}, {bool_literal(softmax)}>(p);
}}
"""
    what = "states" if softmax else "sums"
    title = f"merge_states {what} d{dim}{'' if aligned else ' unaligned'}"
    return DeviceKernel(title, "fi_merge_states", source, 0)


def run_append(*arguments: object) -> None:
    """Run torch.ops.fi_backend.append_kv or rope_append_kv on CUDA tensors."""
    call = AppendCall(*arguments)  # type: ignore[arg-type]
    prepared = prepare(call)
    device = call.cache_k.device
    if append_call.CHECKS_VALUES and not is_capturing(device):
        check_values(call, prepared)
    addresses = addresses_of(call)
    k, v, cache_k, cache_v, _, _, _, q, q_out, _, cos_sin = addresses
    aligned = (
        prepared.aligned_strides
        and (k | v | q | q_out | cos_sin) % _VECTOR_BYTES == 0
        and (cache_k | cache_v) % prepared.chunk_bytes == 0
    )
    kernel = prepared.kernels.get(aligned) or _load_append(call, prepared, aligned)
    _core.launch_append(kernel, prepared.params, addresses, _current_stream(device))


def run_merge(o: Tensor, lse: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """Run torch.ops.fi_backend.merge_states on CUDA tensors."""
    check_states(o, lse)
    num_states, tokens, heads, dim = o.shape
    out_o, out_lse = o.new_empty(o.shape[1:]), lse.new_empty(lse.shape[1:])
    if not out_o.numel():
        return out_o, out_lse.fill_(-torch.inf if softmax else 0.0)
    aligned = dim % 4 == 0 and o.data_ptr() % _VECTOR_BYTES == 0
    kernel = load(merge_kernel(dim, softmax, aligned), o.device)
    addresses = (o.data_ptr(), lse.data_ptr(), out_o.data_ptr(), out_lse.data_ptr())
    stream = _current_stream(o.device)
    _core.launch_merge(kernel, addresses, num_states, tokens * heads, dim, aligned, stream)
    return out_o, out_lse


def _load_append(call: AppendCall, prepared: Prepared, aligned: bool) -> _core.Kernel:
    k, v, cache_k = call[:3]
    rope = None
    if call.cos_sin is not None:
        rope = RopeSpec(call.cos_sin.dtype, call.cos_sin.shape[1], call.interleaved)
    spec = AppendSpec(k.dtype, cache_k.dtype, k.shape[2], v.shape[2], rope, aligned)
    kernel = load(append_kernel(spec), cache_k.device)
    prepared.kernels[aligned] = kernel
    return kernel


def _is_whole(rope: RopeSpec) -> bool:
    return rope.rotary_dim % (CHUNK if rope.interleaved else 2 * CHUNK) == 0


def _current_stream(device: torch.device) -> int:
    # torch.cuda.current_stream builds an object for the same number, at several times the cost.
    return torch._C._cuda_getCurrentRawStream(device.index)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
