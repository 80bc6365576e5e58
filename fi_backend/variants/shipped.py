"""The variants that are built into the core: they need no compiler.

Each is an ordinary variant function; ``kernels/cpu/shipped_variants.cc`` is generated from this
file by ``python -m fi_backend.variants.generate``. Combine them with ``a.then(b)``. A function of
your own with the same expression is served by the same code.
"""

from __future__ import annotations

from typing import Any

import torch

from fi_backend.errors import require
from fi_backend.variants.math import maximum, sigmoid, tanh
from fi_backend.variants.params import Scalar, Tensor
from fi_backend.variants.rotation import Rotation
from fi_backend.variants.variant import Variant

__all__ = [
    "alibi",
    "causal",
    "custom_mask",
    "rope",
    "sigmoid_attention",
    "sinks",
    "sliding_window",
    "soft_cap",
    "streaming_rope",
    "tree_mask",
]


def _causal_mask(q_pos: Any, kv_pos: Any) -> Any:
    return kv_pos <= q_pos


def causal() -> Variant:
    """Return the mask that hides later positions."""
    return Variant("causal", mask=_causal_mask)


def _window_mask(q_pos: Any, kv_pos: Any, window: Any, sink_prefix: Any) -> Any:
    return (q_pos - kv_pos < window) | (kv_pos < sink_prefix)


def sliding_window(num_tokens: int, sink_prefix: int = 0) -> Variant:
    """Return the mask that hides what lies ``num_tokens`` or more before the query.

    It does not hide later positions: add ``causal()`` or a causal band.

    Args:
        num_tokens: the query's own position and the ``num_tokens - 1`` before it stay visible.
        sink_prefix: leading positions that stay visible whatever the window.

    Raises:
        InvalidInput: an empty window or a negative prefix.
    """
    require(num_tokens > 0, "num_tokens", "a positive count", num_tokens, "drop the window")
    require(sink_prefix >= 0, "sink_prefix", "at least 0", sink_prefix, "0 keeps none visible")
    params = (Scalar("window", int, num_tokens), Scalar("sink_prefix", int, sink_prefix))
    return Variant("sliding_window", mask=_window_mask, params=params)


def _capped_logit(logit: Any, cap: Any) -> Any:
    return cap * tanh(logit / cap)


def soft_cap(cap: float) -> Variant:
    """Return logits squeezed into (-cap, cap): ``cap * tanh(logit / cap)`` (Gemma 2, Grok).

    Raises:
        InvalidInput: a cap that is not positive.
    """
    require(cap > 0, "cap", "a positive number", cap, "leave soft_cap out to have no cap")
    return Variant("soft_cap", logits=_capped_logit, params=(Scalar("cap", float, cap),))


def _alibi_logit(logit: Any, q_pos: Any, kv_pos: Any, q_head: Any, slopes: Any) -> Any:
    return logit + slopes[q_head] * (kv_pos - q_pos)


def alibi() -> Variant:
    """Return logits with a penalty on distance, linear per head (Press et al., 2021).

    Parameters: ``slopes``: float32 [num_qo_heads], logit per token of distance, positive.
    """
    return Variant("alibi", logits=_alibi_logit, params=(Tensor("slopes"),))


def sinks() -> Variant:
    """Return softmax with a learned logit per head that has no value (gpt-oss).

    Parameters: ``sinks``: float32 [num_qo_heads] contiguous, natural logits.
    """
    return Variant("sinks", sinks="sinks", params=(Tensor("sinks"),))


def _custom_mask(  # noqa: PLR0917 (named words, never called by position)
    q_pos: Any,
    kv_pos: Any,
    q_len: Any,
    kv_len: Any,
    request: Any,
    mask_bits: Any,
    mask_offset: Any,
) -> Any:
    row = mask_offset[request] + (q_pos - (kv_len - q_len))
    return ((mask_bits[row, kv_pos // 8] >> (kv_pos % 8)) & 1) != 0


def custom_mask() -> Variant:
    """Return an arbitrary mask, one bit for every (query token, KV position).

    Parameters:
        ``mask_bits``: uint8 [rows, pitch], one row per query token; bit ``j % 8`` of byte
            ``j // 8`` is set when KV position j is visible; pitch >= ceil(max kv_len / 8), and
            rows may lie any stride apart.
        ``mask_offset``: int32 [requests], row of the request's first query token.
    """
    params = (Tensor("mask_bits", torch.uint8, 2), Tensor("mask_offset", torch.int32))
    return Variant("custom_mask", mask=_custom_mask, params=params)


def _tree_mask(kv_pos: Any, q_len: Any, kv_len: Any, token: Any, tree_bits: Any) -> Any:
    new = kv_pos - (kv_len - q_len)  # index among the request's query tokens; negative before them
    bit = maximum(new, 0)
    return (new < 0) | (((tree_bits[token, bit // 32] >> (bit % 32)) & 1) != 0)


def tree_mask() -> Variant:
    """Return the mask of a speculation tree: everything before the new tokens, and ancestors.

    Parameters: ``tree_bits``: int32 [num_qo_tokens, words]; bit ``k % 32`` of word ``k // 32`` of
    a query token's row is set when it sees the k-th new token of its request (itself included).
    """
    return Variant("tree_mask", mask=_tree_mask, params=(Tensor("tree_bits", torch.int32, 2),))


def _sigmoid_weight(logit: Any, bias: Any) -> Any:
    return sigmoid(logit + bias)


def sigmoid_attention(bias: float = 0.0) -> Variant:
    """Return attention whose weights are ``sigmoid(logit + bias)``, without normalisation.

    Args:
        bias: usually -log(sequence length) (Ramapuram et al., 2024).
    """
    params = (Scalar("bias", float, bias),)
    return Variant("sigmoid", logits=_sigmoid_weight, softmax=False, params=params)


def rope(*, interleaved: bool = False, multiples: bool = False) -> Variant:
    """Return attention that turns q and K by their positions: the cache holds K without RoPE.

    Args:
        interleaved: pairs are neighbours as in GPT-J; else halves as in GPT-NeoX and Llama.
        multiples: the table is that of fixed frequencies, not scaled (``Rotation``): K turns
            faster. Tables of YaRN, which scale, are not.

    Parameters: ``cos_sin``: float32 [positions, rotary_dim], cosines, then sines.
    """
    params = (Tensor("cos_sin", ndim=2),)
    rotation = Rotation(interleaved=interleaved, multiples=multiples)
    return Variant("rope", rotation=rotation, params=params)


def streaming_rope(
    num_tokens: int, sink_prefix: int = 4, *, interleaved: bool = False, multiples: bool = False
) -> Variant:
    """Return attention over leading tokens and a window, positions rolling (StreamingLLM).

    q and K turn by slots in what is still seen, so that a text may be longer than any position a
    model was trained on. Add ``causal()`` or a causal band.

    Args:
        num_tokens: of the window, as in ``sliding_window``.
        sink_prefix: leading positions that stay visible.
        interleaved: as in ``rope``.
        multiples: as in ``rope``.

    Parameters: ``cos_sin``: float32 [slots, rotary_dim], cosines, then sines; slots:
    ``sink_prefix + num_tokens`` and the query tokens of the longest request.

    Raises:
        InvalidInput: an empty window or a negative prefix.
    """
    window = sliding_window(num_tokens, sink_prefix)
    rotation = Rotation(
        interleaved=interleaved, window=num_tokens, sink_prefix=sink_prefix, multiples=multiples
    )
    params = (*window.params, Tensor("cos_sin", ndim=2))
    return Variant("streaming_rope", mask=_window_mask, rotation=rotation, params=params)


def all_shipped() -> list[Variant]:
    """Return one of each, for the generator: bound values do not enter the code."""
    return [
        causal(),
        sliding_window(1),
        soft_cap(1.0),
        alibi(),
        sinks(),
        custom_mask(),
        tree_mask(),
        sigmoid_attention(),
    ]
