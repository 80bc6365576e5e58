"""What of SGLang's attention is served: every reason against a model, as one sentence each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..common.reasons import refuse as refuse_all
from ..common.reasons import sentence
from .limits import setting

KEEP_SGLANG = "choose one of SGLang's own with --attention-backend"

# Of layers: values of RadixAttention.attn_type.
DECODER, ENCODER_ONLY = "decoder", "encoder_only"
SERVED_ATTN_TYPES = (DECODER, ENCODER_ONLY)
# SGLang 0.5.16 says so of every Gemma 3, and computes those without images as decoders.
BIDIRECTIONAL = "decoder_bidirectional"
# Classes of KV pools whose slots lie as [slots, heads, dim]; others translate or pack them.
PLAIN_POOL, WINDOW_POOL = "MHATokenToKVPool", "SWAKVPool"
# Keyword arguments of a layer's call that are served.
SERVED_ARGUMENTS = ("sinks",)


def refuse(reasons: Sequence[str]) -> None:
    """Raise Unsupported with all reasons, if there are any."""
    refuse_all(reasons, "a model that fi_backend serves", KEEP_SGLANG)


def runner_reasons(runner: Any) -> list[str]:
    """Return every reason against a model runner, its layers aside.

    Args:
        runner: SGLang's ModelRunner; its model and memory pools exist.
    """
    config = runner.model_config
    flags = {
        "use_mla_backend": (runner.use_mla_backend, "multi-head latent attention"),
        "attention_chunk_size": (
            getattr(config, "attention_chunk_size", None),
            "chunked local attention",
        ),
        "enable_hisparse": (getattr(runner, "enable_hisparse", False), "sparse attention"),
    }
    reasons = [
        sentence(name, f"unset ({what} is not served)", value, KEEP_SGLANG)
        for name, (value, what) in flags.items()
        if value
    ]
    reasons += _pool_reasons(runner.token_to_kv_pool)
    if config.is_encoder_decoder:
        reasons += _encoder_reasons(runner)
    if os.environ.get("SGLANG_USE_HND_KVCACHE", "0").lower() in ("1", "true"):
        hint = "leave it unset"
        reasons.append(sentence("SGLANG_USE_HND_KVCACHE", "0 (slots of one token)", 1, hint))
    # It plans on a stream that does not wait for the step before, whose plan graphs still read.
    if os.environ.get("SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "0").lower() in ("1", "true"):
        name, served = "SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "0 (plans in the order of steps)"
        reasons.append(sentence(name, served, 1, "leave it unset"))
    graphs = setting(runner, "exec.graph", "cuda_graph_config")
    if graphs.prefill.backend == "full":
        name, served = "cuda_graph_config[prefill].backend", "breakable or disabled"
        reasons.append(sentence(name, served, "full", "name another in --cuda-graph-config"))
    if runner.kv_cache_dtype == torch.float8_e5m2:
        hint = "pass --kv-cache-dtype fp8_e4m3"
        reasons.append(sentence("kv_cache_dtype", "auto or fp8_e4m3", "fp8_e5m2", hint))
    ranks = _decode_context_ranks(runner)
    if ranks > 1:
        reasons.append(
            sentence("decode_context_parallel_size", "1", ranks, "use tensor parallelism")
        )
    return reasons


def _decode_context_ranks(runner: Any) -> int:
    """Return how many ranks hold parts of one request's cache."""
    if hasattr(runner, "dcp_size"):  # 0.5.16
        return int(runner.dcp_size)
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().attn_dcp_size)


def _pool_reasons(pool: Any) -> Iterator[str]:
    name = type(pool).__name__
    served = f"{PLAIN_POOL}, or {WINDOW_POOL} of them"
    if name not in (PLAIN_POOL, WINDOW_POOL):
        yield sentence("token_to_kv_pool", served, name, KEEP_SGLANG)
    elif name == WINDOW_POOL:
        for part in (pool.full_kv_pool, pool.swa_kv_pool):
            if type(part).__name__ != PLAIN_POOL:
                yield sentence("token_to_kv_pool", served, type(part).__name__, KEEP_SGLANG)


def _encoder_reasons(runner: Any) -> Iterator[str]:
    """Return what does not go together with an encoder whose slots are a part of every row."""
    pool = type(runner.token_to_kv_pool).__name__
    if pool == WINDOW_POOL:
        yield sentence("token_to_kv_pool", f"{PLAIN_POOL} beside an encoder", pool, KEEP_SGLANG)
    if not runner.spec_algorithm.is_none():
        hint = "unset --speculative-algorithm"
        yield sentence("speculative_algorithm", "none beside an encoder", "one", hint)


def looks_ahead(config: Any) -> bool:
    """Return whether tokens of a model may see later ones: spans of images, or all of a prompt.

    Args:
        config: SGLang's ModelConfig.
    """
    text = config.hf_text_config
    return bool(config.is_multimodal or getattr(text, "use_bidirectional_attention", False))


def layer_reasons(
    layer: Any, *, verifies_trees: bool, looks_ahead: bool, has_encoders: bool
) -> Iterator[str]:
    """Return every reason against one RadixAttention.

    Args:
        layer: SGLang's module.
        verifies_trees: drafted tokens branch, so that a token's index is not its position.
        looks_ahead: of the model's configuration.
        has_encoders: SGLang counts the tokens of the model's encoder apart.
    """
    kind = attn_type(layer)
    if kind == BIDIRECTIONAL and not looks_ahead:
        kind = DECODER
    where = f"layer {layer.layer_id}"
    if layer.is_cross_attention and not has_encoders:
        served = "False in a model without an encoder"
        yield sentence(f"{where} is_cross_attention", served, True, KEEP_SGLANG)
    if kind not in SERVED_ATTN_TYPES:
        served = " or ".join(SERVED_ATTN_TYPES)
        yield sentence(f"{where} attn_type", served, kind, KEEP_SGLANG)
    window = layer.sliding_window_size
    if window > 0 and kind == ENCODER_ONLY:
        yield sentence(f"{where} sliding_window_size", "-1 in an encoder", window, KEEP_SGLANG)
    if window > 0 and verifies_trees:
        hint = "pass --speculative-eagle-topk 1"
        yield sentence(f"{where} sliding_window_size", "-1 under draft trees", window, hint)
    for name, served_value in (
        ("pos_encoding_mode", "NONE"),
        ("logit_capping_method", "tanh"),
        ("xai_temperature_len", -1),
    ):
        value = getattr(layer, name, served_value)
        if value != served_value and not (name == "logit_capping_method" and not layer.logit_cap):
            yield sentence(f"{where} {name}", str(served_value), value, KEEP_SGLANG)


def call_reasons(arguments: Mapping[str, Any]) -> list[str]:
    """Return every reason against the keyword arguments of a layer's call; unset ones are fine."""
    return [
        sentence(name, "unset (this version of fi_backend does not serve it)", "set", KEEP_SGLANG)
        for name, value in arguments.items()
        if name not in SERVED_ARGUMENTS and value is not None and value is not False
    ]


def attn_type(layer: Any) -> str:
    """Return the kind of a layer; SGLang passes either a string or an enum of strings."""
    return str(getattr(layer.attn_type, "value", layer.attn_type))
