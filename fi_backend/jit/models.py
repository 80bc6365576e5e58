"""What a model's attention looks like: named shapes, and those of a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from fi_backend.errors import InvalidInput, Unsupported, contract_message, require
from fi_backend.formats import HeadShape
from fi_backend.variants import Variant, shipped

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelShape:
    """The attention of a model, as far as kernels depend on it.

    Windows are arguments of a launch: layers with and without one share their attention
    kernels.

    Attributes:
        heads: of the whole model.
        dtype: of q and of the output.
        variant: what all layers do to logits; None: plain softmax attention.
    """

    heads: HeadShape
    dtype: torch.dtype = torch.bfloat16
    variant: Variant | None = None

    def heads_of_rank(self, tensor_parallel: int) -> HeadShape:
        """Return the heads of one rank; KV heads are replicated where there are too few.

        Raises:
            InvalidInput: the ranks do not divide the heads.
        """
        heads, ranks = self.heads, tensor_parallel
        divides_kv = ranks > 0 and 0 in (heads.num_kv_heads % ranks, ranks % heads.num_kv_heads)
        require(
            divides_kv and heads.num_qo_heads % ranks == 0,
            "tp",
            f"a count of ranks that divides {heads.num_qo_heads} query heads and divides, or is "
            f"a multiple of, {heads.num_kv_heads} KV heads",
            ranks,
            "pass the tensor_parallel_size of the engine",
        )
        return HeadShape(
            heads.num_qo_heads // ranks,
            max(1, heads.num_kv_heads // ranks),
            heads.head_dim_qk,
            heads.head_dim_vo,
        )


MODELS: Mapping[str, ModelShape] = {
    "llama-3.1-8b": ModelShape(HeadShape(32, 8, 128)),
    "llama-3.1-70b": ModelShape(HeadShape(64, 8, 128)),
    "qwen3-8b": ModelShape(HeadShape(32, 8, 128)),
    "gemma-2-9b": ModelShape(HeadShape(16, 8, 256), variant=shipped.soft_cap(50.0)),
    "gemma-3-27b-like": ModelShape(HeadShape(32, 16, 128)),
    "gpt-oss-20b-like": ModelShape(HeadShape(64, 8, 64), variant=shipped.sinks()),
}


def find_model(name: str) -> ModelShape:
    """Return the shape of a named model, or of the one whose config.json a folder holds.

    Raises:
        InvalidInput: neither, or a config.json without what is needed.
        Unsupported: a kind of attention that is not served.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    config = path / "config.json" if path.is_dir() else path
    rule = f"one of {', '.join(MODELS)}, or a folder with a config.json"
    require(config.is_file(), "model", rule, repr(name), "download the model's config.json")
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise _malformed(config, "a JSON object", str(error)) from error
    if not isinstance(content, dict):
        raise _malformed(config, "a JSON object", type(content).__name__)
    # Models with vision or audio keep the language model's part apart.
    return shape_of_config(content.get("text_config") or content, str(config))


def shape_of_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """Return the shape that the fields of a Hugging Face config.json describe.

    Args:
        config: parsed fields.
        where: name of the file, for messages.

    Raises:
        InvalidInput: a field is missing or no positive integer.
        Unsupported: latent attention.
    """
    is_latent = config.get("kv_lora_rank") is not None
    hint = "keep the engine's own backend for this model"
    rule = "attention with K and V heads"
    require(not is_latent, where, rule, "latent attention", hint, kind=Unsupported)
    num_heads = _count(config, "num_attention_heads", where)
    num_kv_heads = num_heads
    if config.get("num_key_value_heads") is not None:
        num_kv_heads = _count(config, "num_key_value_heads", where)
    if config.get("head_dim") is not None:
        head_dim = _count(config, "head_dim", where)
    else:
        head_dim = _count(config, "hidden_size", where) // num_heads
    # Engines run checkpoints of other types, float32 among them, in 16 bits.
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return ModelShape(
        HeadShape(num_heads, num_kv_heads, head_dim),
        _DTYPES.get(name, torch.bfloat16),
        _variant_of_config(config),
    )


def _variant_of_config(config: Mapping[str, Any]) -> Variant | None:
    """Return the chain that the engine adapters build: soft cap, ALiBi, sinks."""
    chain: list[Variant] = []
    cap = config.get("attn_logit_softcapping")
    if cap:
        chain.append(shipped.soft_cap(float(cap)))
    if config.get("alibi"):
        chain.append(shipped.alibi())
    if config.get("model_type") == "gpt_oss":
        chain.append(shipped.sinks())
    return reduce(Variant.then, chain) if chain else None


def _count(config: Mapping[str, Any], field: str, where: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise _malformed(where, f"{field} to be a positive integer", repr(value))
    return value


def _malformed(where: object, rule: str, got: str) -> InvalidInput:
    return InvalidInput(contract_message(str(where), rule, got, "see the model's documentation"))
