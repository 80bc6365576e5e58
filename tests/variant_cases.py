"""Variants by name, with seeded parameters that fit a case."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from fi_backend.variants import Variant
from fi_backend.variants.shipped import (
    alibi,
    causal,
    custom_mask,
    rope,
    sigmoid_attention,
    sinks,
    sliding_window,
    soft_cap,
    streaming_rope,
    tree_mask,
)

if TYPE_CHECKING:
    from cases import Case

# What every GPU case is planned for: tokens of a step, slots of a request.
GPU_TOKENS, GPU_KV_LEN = 1024, 8192

Made = tuple[Variant, Mapping[str, Tensor | float]]


def _slopes(case: Case, _: Generator) -> Tensor:
    heads = case.heads.num_qo_heads
    return 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float32) / heads)


def _sinks(case: Case, g: Generator) -> Tensor:
    return torch.randn(case.heads.num_qo_heads, generator=g) * 3


def _alibi(case: Case, g: Generator) -> Made:
    return alibi(), {"slopes": _slopes(case, g)}


def _with_sinks(case: Case, g: Generator) -> Made:
    return sinks(), {"sinks": _sinks(case, g)}


def _angles(slots: int, rotary_dim: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(slots)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def _rope(
    case: Case,
    rotary_dim: int = 0,
    *,
    interleaved: bool = False,
    slots: int = 0,
    multiples: bool = False,
) -> Made:
    longest = max((kv_len for _, kv_len in case.lengths), default=0)
    table = _angles(slots or longest or 1, rotary_dim or case.heads.head_dim_qk)
    return rope(interleaved=interleaved, multiples=multiples), {"cos_sin": table}


def _streaming(
    case: Case,
    num_tokens: int,
    sink_prefix: int,
    max_q_len: int = 0,
    *,
    multiples: bool = False,
) -> Made:
    """With no more slots than a text of any length needs."""
    q_len = max_q_len or max((q_len for q_len, _ in case.lengths), default=0)
    table = _angles(num_tokens + sink_prefix + q_len, case.heads.head_dim_qk)
    return streaming_rope(num_tokens, sink_prefix, multiples=multiples), {"cos_sin": table}


def _tree(case: Case, g: Generator) -> Made:
    """Each new token sees itself and the ancestors of a random parent."""
    words = -(-max((q for q, _ in case.lengths), default=1) // 32) + 1
    rows = []
    for q_len, _ in case.lengths:
        seen: list[int] = []
        for i in range(q_len):
            parent = int(torch.randint(-1, i, (), generator=g)) if i else -1
            seen.append((seen[parent] if parent >= 0 else 0) | 1 << i)
        rows += [[bits >> 32 * w & 0xFFFFFFFF for w in range(words)] for bits in seen]
    bits = torch.tensor(rows, dtype=torch.int64).view(-1, words)
    return tree_mask(), {"tree_bits": torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()}


def _bits(case: Case, g: Generator) -> Made:
    """Half of all pairs, for causal bands less than half: some rows see nothing."""
    tokens = sum(q for q, _ in case.lengths)
    pitch = -(-max((kv for _, kv in case.lengths), default=1) // 8)
    offsets = torch.tensor([0, *(q for q, _ in case.lengths)]).cumsum(0)[:-1]
    bits = torch.randint(0, 256, (tokens, pitch + 3), generator=g, dtype=torch.uint8)
    return custom_mask(), {"mask_bits": bits[:, :pitch], "mask_offset": offsets.int()}


def _gemma(case: Case, g: Generator) -> Made:
    """A chain with two masks, a cap and sinks."""
    chain = soft_cap(4.0).then(causal()).then(sliding_window(40, 3)).then(sinks())
    return chain, {"sinks": _sinks(case, g)}


def _sigmoid(case: Case, _: Generator) -> Made:
    return sigmoid_attention(-math.log(max(1, *(kv for _, kv in case.lengths)))), {}


VARIANTS: dict[str, Callable[[Case, Generator], Made]] = {
    "soft_cap": lambda *_: (soft_cap(5.0), {}),
    "alibi": _alibi,
    "sinks": _with_sinks,
    "tree": _tree,
    "bits": _bits,
    "sigmoid": _sigmoid,
    "gemma": _gemma,
    "window": lambda *_: (causal().then(sliding_window(33)), {}),
    "rope": lambda case, _: _rope(case),
    "rope-some": lambda case, _: _rope(case, 24, interleaved=True),
    # With room for what a planner on a GPU is built for.
    "gpu-rope": lambda case, _: _rope(case, slots=GPU_KV_LEN),
    "gpu-rope-some": lambda case, _: _rope(case, 32, interleaved=True, slots=GPU_KV_LEN),
    "gpu-rope-steps": lambda case, _: _rope(case, slots=GPU_KV_LEN, multiples=True),
    "gpu-rope-some-steps": lambda case, _: _rope(
        case, 32, interleaved=True, slots=GPU_KV_LEN, multiples=True
    ),
    "gpu-streaming-steps": lambda case, _: _streaming(case, 40, 4, GPU_TOKENS, multiples=True),
    "gpu-streaming-many-sinks-steps": lambda case, _: _streaming(
        case, 20, 70, GPU_TOKENS, multiples=True
    ),
    "gpu-streaming": lambda case, _: _streaming(case, 40, 4, GPU_TOKENS),
    "gpu-streaming-many-sinks": lambda case, _: _streaming(case, 20, 70, GPU_TOKENS),
    "streaming": lambda case, _: _streaming(case, 40, 4),
    "streaming-no-sinks": lambda case, _: _streaming(case, 16, 0),
    "streaming-many-sinks": lambda case, _: _streaming(case, 20, 70),
}
