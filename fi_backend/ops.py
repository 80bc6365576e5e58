"""The small operators around attention: writing new K and V into the cache, merging states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fi_backend import cpu_ops, cuda_ops
from fi_backend.custom_op import register_op
from fi_backend.errors import require
from fi_backend.formats import KvCacheView


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary embedding of one step: which angles the tokens' K and Q are turned by.

    The first rotary_dim elements of a head turn pairwise, in float32, each pair (x, y) to
    (x cos - y sin, y cos + x sin); the others stay.

    Attributes:
        cos_sin: float32 or dtype of k [num_positions, rotary_dim], any stride between positions:
            the cosines of the rotary_dim / 2 pairs, then their sines (vLLM's cos_sin_cache).
        positions: int32 or int64 [num_tokens or more], contiguous.
        interleaved: pairs are neighbours (2i, 2i + 1) as in GPT-J; else (i, i + rotary_dim / 2) as
            in GPT-NeoX and Llama.
    """

    cos_sin: Tensor
    positions: Tensor
    interleaved: bool = False


def append_kv(
    k: Tensor,
    v: Tensor,
    kv: KvCacheView,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rope: Rope | None = None,
    q: Tensor | None = None,
    q_out: Tensor | None = None,
) -> None:
    """Write the K and V of new tokens into their slots of a cache, in place.

    Args:
        k: [num_tokens, num_kv_heads, head_dim_qk], any strides but 1 in the last dimension; float16
            or bfloat16, on the CPU also float32. Tokens past ``slots`` are padding.
        v: [num_tokens, num_kv_heads, head_dim_vo], dtype of k.
        kv: the cache; dtype of k, or float8_e4m3fn. Head dimensions are multiples of 8.
        slots: int64 [at most num_tokens] contiguous: page * page_size + offset, or -1 to skip.
        k_scale: float32, one value or one per KV head; a float8 cache stores k / k_scale, saturated
            to +-448 and rounded to nearest even. None means 1, and is all that other caches take.
        v_scale: as k_scale.
        rope: rotate K before it is scaled and stored; ``k`` itself stays.
        q: [num_tokens, num_qo_heads, head_dim_qk], dtype of k, any strides but 1 in the last
            dimension: rotated too, for every token of ``slots``, skipped ones included.
        q_out: where q goes, in q's shape; None: in place. May not overlap other tensors, nor q
            unless it is q.

    Raises:
        InvalidInput: a dtype, shape, stride or device outside the above, a slot past the cache, or
            a position past ``rope.cos_sin``.

    Values on a GPU: slots and positions are not read on the host. Tokens with a slot past the cache
    are skipped; K and q of tokens with a position outside of ``rope.cos_sin`` are not written. With
    FI_CHECK=1 in the environment such values raise, which waits for the device at every call that
    no graph captures.
    Graphs: traceable by torch.compile; capturable once a call of the same shapes has loaded the
    kernel. Slots named twice: either token may win.
    Stream: the current one of the cache's device. The CPU engine returns when all is written.
    """
    if rope is None:
        names = [name for name, tensor in (("q", q), ("q_out", q_out)) if tensor is not None]
        require(not names, "".join(names[:1]), "None without rope", "a tensor", "pass rope")
        torch.ops.fi_backend.append_kv(k, v, kv.k, kv.v, slots, k_scale, v_scale)
        return
    if q is not None and q_out is None:
        q_out = q
    require(q is not None or q_out is None, "q_out", "None without q", "a tensor", "pass q")
    torch.ops.fi_backend.rope_append_kv(
        *(k, v, kv.k, kv.v, slots, k_scale, v_scale),
        *(rope.cos_sin, rope.positions, rope.interleaved, q, q_out),
    )


def merge_states(o: Tensor, lse: Tensor, softmax: bool = True) -> tuple[Tensor, Tensor]:
    """Merge partial states of the same queries over disjoint KV positions.

    With softmax, o = sum(exp(lse_s) * o_s) / sum(exp(lse_s)) and lse = log(sum(exp(lse_s))); a row
    that saw nothing anywhere has o = 0 and lse = -inf. Without, states add up. States are summed in
    their order: equal bits on every run.

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

    Graphs and stream: as ``append_kv``.
    """
    merged: tuple[Tensor, Tensor] = torch.ops.fi_backend.merge_states(o, lse, softmax)
    return merged


_APPEND_ARGUMENTS = (
    "Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor slots,"
    " Tensor? k_scale=None, Tensor? v_scale=None"
)

register_op(
    f"append_kv({_APPEND_ARGUMENTS}) -> ()",
    cpu_ops.run_append,
    lambda *_, **__: None,
    cuda_ops.run_append,
)
# An op of its own: torch takes time for every argument, also for those that are None.
register_op(
    f"rope_append_kv({_APPEND_ARGUMENTS}, Tensor? cos_sin=None, Tensor? positions=None,"
    " bool interleaved=False, Tensor? q=None, Tensor(c!)? q_out=None) -> ()",
    cpu_ops.run_append,
    lambda *_, **__: None,
    cuda_ops.run_append,
)
register_op(
    "merge_states(Tensor o, Tensor lse, bool softmax) -> (Tensor, Tensor)",
    cpu_ops.run_merge,
    lambda o, lse, softmax: (torch.empty_like(o[0]), torch.empty_like(lse[0])),
    cuda_ops.run_merge,
)
