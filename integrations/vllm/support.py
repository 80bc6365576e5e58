"""What of vLLM's attention is served: every reason against a layer, as one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fi_backend import AttentionConfig, why_not

from ..common.reasons import refuse as refuse_all
from ..common.reasons import sentence

# Names of vLLM's attention types; the engine passes either these strings or an enum of them.
DECODER, ENCODER_ONLY, ENCODER_DECODER = "decoder", "encoder_only", "encoder_decoder"
SERVED_ATTN_TYPES = (DECODER, ENCODER_ONLY, ENCODER_DECODER)

# vLLM's names of KV cache dtypes; None: the dtype of the model.
KV_DTYPES: Mapping[str | None, torch.dtype | None] = {
    None: None,
    "auto": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
}
FP8_NAMES = tuple(str(k) for k, v in KV_DTYPES.items() if v == torch.float8_e4m3fn)

# Features that vLLM asks for by a flag. A flag in neither list is new: refused until known.
SERVED_FLAGS = (
    "has_sink",
    "has_sliding_window",
    "use_adaptive_verification",
    "use_batch_invariant",
    "use_non_causal",
)
REFUSED_FLAGS = {
    "use_mla": "multi-head latent attention",
    "use_sparse": "sparse attention with top-k indices",
    "use_mm_prefix": "bidirectional spans of multimodal tokens",
    "use_per_head_quant_scales": "one quantisation scale per head",
    "use_kv_connector": "transfer of the KV cache between engines",
    "use_pcp": "prefill context parallelism",
    "use_dcp": "decode context parallelism",
    "use_rswa": "sliding windows with a reference prefix",
}
KEEP_VLLM = "leave --attention-backend unset to keep vLLM's own"


def refuse(reasons: Sequence[str]) -> None:
    """Raise Unsupported with all reasons, if there are any."""
    refuse_all(reasons, "a layer that fi_backend serves", KEEP_VLLM)


def selection_reasons(device: str, fields: Mapping[str, Any]) -> list[str]:
    """Return every reason against the layers that a selector configuration describes.

    Args:
        device: type of the device that the engine runs on.
        fields: vLLM's AttentionSelectorConfig as a dict; its fields differ between versions. With
            device_capability the driver is not asked: this may run in a process that vLLM forks.
    """
    reasons = list(_flag_reasons(fields))
    attn_type = str(getattr(fields.get("attn_type"), "value", fields.get("attn_type", DECODER)))
    if attn_type not in SERVED_ATTN_TYPES:
        served = " or ".join(SERVED_ATTN_TYPES)
        reasons.append(sentence("attn_type", served, attn_type, KEEP_VLLM))
    name = fields.get("kv_cache_dtype")
    if name not in KV_DTYPES:
        served = ", ".join(str(key) for key in KV_DTYPES if key is not None)
        reasons.append(
            sentence("kv_cache_dtype", f"one of {served}", name, "pass --kv-cache-dtype auto")
        )
    config = AttentionConfig(
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim_qk=fields["head_size"],
        dtype=fields["dtype"],
        kv_dtype=KV_DTYPES.get(name),
        page_size=fields.get("block_size") or 1,
        device=device,
        compute_capability=fields.get("device_capability"),
    )
    return reasons + why_not(config)


def _flag_reasons(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        if value is not True or name in SERVED_FLAGS:
            continue
        what = REFUSED_FLAGS.get(name, "a feature that this version of fi_backend does not know")
        yield sentence(name, f"False ({what} is not served)", value, KEEP_VLLM)


def layer_reasons(
    *,
    extra: Mapping[str, Any],
    dcp_world_size: int,
    pcp_world_size: int,
) -> list[str]:
    """Return every reason against a layer that vLLM reveals only when it constructs it.

    Args:
        extra: constructor arguments beyond those of every attention layer; unset ones are ignored.
        dcp_world_size: ranks that share one request's KV cache in decode.
        pcp_world_size: ranks that share one request's prefill.
    """
    reasons = [
        sentence(name, "unset", value, f"the model needs it; {KEEP_VLLM}")
        for name, value in extra.items()
        if value is not None and value is not False and value != -1  # vLLM's ways to say "none"
    ]
    for name, size in (
        ("decode_context_parallel_size", dcp_world_size),
        ("prefill_context_parallel_size", pcp_world_size),
    ):
        if size > 1:
            reasons.append(sentence(name, "1", size, "use tensor parallelism"))
    return reasons
