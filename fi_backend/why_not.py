"""What this version serves, as data, and every reason why a configuration is outside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fi_backend.errors import contract_message
from fi_backend.formats import CAUSAL, Band
from fi_backend.gpu import gpu_reasons
from fi_backend.jit.attention_kernels import MAX_VARIANT_PARAMS

if TYPE_CHECKING:
    from fi_backend.layers import LayerClass
    from fi_backend.variants import Variant

DEVICES = ("cpu", "cuda")
# Tensor cores take no fp32 inputs.
QUERY_DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}
# A cache may also be stored in the dtype of q.
NARROW_KV_DTYPES = (torch.float8_e4m3fn,)
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256
# The CPU kernels hold a head in whole groups of 8 fp32 lanes and their tiles in fixed scratch; a
# tensor-core product takes 16 components at a time.
HEAD_DIM_STEP = {"cpu": 8, "cuda": 16}
# What an engine may ask for beyond plain attention, and gets.
FEATURES = frozenset(
    {
        "alibi",
        "batch_invariant",
        "lse",
        "partial_states",
        "rotation",
        "shared_prefix",
        "sinks",
        "sliding_window",
        "soft_cap",
        "variant",
    }
)


@dataclass(frozen=True)
class AttentionConfig:
    """One attention layer as an engine asks for it. Any values may be put in: ``why_not`` judges.

    Attributes:
        num_qo_heads: query heads of one rank.
        num_kv_heads: KV heads of one rank.
        head_dim_qk: components of q and k.
        head_dim_vo: components of v and of the output; None means head_dim_qk.
        dtype: of q and of the output.
        kv_dtype: of the cache; None means ``dtype``.
        page_size: tokens of a page.
        band: which KV positions a query may see; every band is served.
        device: "cpu", "cuda" or "cuda:<index>".
        features: what else is asked for, by name; FEATURES are served.
        num_variant_params: parameters of the variant, summed over its functions.
        compute_capability: of the GPU, where the caller knows it; None: the CUDA driver is asked,
            and a process that asked it must not fork others that use the GPU.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int | None = None
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    page_size: int = 1
    band: Band = CAUSAL
    device: str = "cpu"
    features: frozenset[str] = frozenset()
    num_variant_params: int = 0
    compute_capability: tuple[int, int] | None = None

    @property
    def device_type(self) -> str:
        """The device without its index."""
        return self.device.partition(":")[0]

    @classmethod
    def of(cls, layer_class: LayerClass, device: torch.device | str) -> AttentionConfig:
        """Return the configuration that a StepPlanner serves for ``layer_class`` on ``device``."""
        heads, variant = layer_class.heads, layer_class.variant
        functions = () if variant is None else tuple(variant.all_functions())
        return cls(
            num_qo_heads=heads.num_qo_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim_qk=heads.head_dim_qk,
            head_dim_vo=heads.head_dim_vo,
            dtype=layer_class.dtype,
            kv_dtype=layer_class.kv_dtype,
            band=layer_class.band,
            device=str(torch.device(device)),
            features=_features_of(variant),
            num_variant_params=sum(len(function.params) for function in functions),
        )


def why_not(config: AttentionConfig) -> list[str]:
    """Return every reason why ``config`` is not served; an empty list when it is.

    Each reason is a sentence ``<argument>: expected <rule>, got <value>; <what to do>``.
    """
    return [
        *_device_reasons(config),
        *_head_reasons(config),
        *_dtype_reasons(config),
        *_feature_reasons(config),
    ]


def _features_of(variant: Variant | None) -> frozenset[str]:
    if variant is None:
        return frozenset()
    return frozenset({"variant"} if variant.rotation is None else {"variant", "rotation"})


def _names(values: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(value).removeprefix("torch.") for value in values)


def _device_reasons(config: AttentionConfig) -> Iterator[str]:
    kind, _, index = config.device.partition(":")
    if kind not in DEVICES or (index and not index.isdecimal()):
        hint = "keep the engine's own backend on this device"
        yield contract_message("device", " or ".join(DEVICES), config.device, hint)
    elif kind == "cuda":
        yield from gpu_reasons(int(index) if index else None, config.compute_capability)


def _head_reasons(config: AttentionConfig) -> Iterator[str]:
    qo, kv = config.num_qo_heads, config.num_kv_heads
    if kv < 1:
        yield contract_message("num_kv_heads", "at least 1", kv, "pass the heads of one rank")
    elif qo < 1 or qo % kv:
        yield contract_message(
            "num_qo_heads",
            f"a positive multiple of num_kv_heads={kv}",
            qo,
            "pass the heads of one rank",
        )
    dims = {"head_dim_qk": config.head_dim_qk}
    if config.head_dim_vo is not None and config.head_dim_vo != config.head_dim_qk:
        dims["head_dim_vo"] = config.head_dim_vo
    step = HEAD_DIM_STEP.get(config.device_type, HEAD_DIM_STEP["cpu"])
    for name, dim in dims.items():
        if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM or dim % step:
            yield contract_message(
                name,
                f"a multiple of {step} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}",
                dim,
                "pad the head dimension with zeros",
            )
    if config.page_size < 1:
        yield contract_message(
            "page_size", "at least 1 token", config.page_size, "any positive size is served"
        )


def _dtype_reasons(config: AttentionConfig) -> Iterator[str]:
    dtype, kv_dtype = config.dtype, config.kv_dtype
    served = QUERY_DTYPES.get(config.device_type, QUERY_DTYPES["cpu"])
    if dtype not in served:
        yield contract_message("dtype", _names(served), _names((dtype,)), "convert q first")
    if kv_dtype is not None and kv_dtype not in (dtype, *NARROW_KV_DTYPES):
        yield contract_message(
            "kv_dtype",
            _names(tuple(dict.fromkeys((dtype, *NARROW_KV_DTYPES)))),
            _names((kv_dtype,)),
            "store the cache in the dtype of q or in float8_e4m3fn",
        )


def _feature_reasons(config: AttentionConfig) -> Iterator[str]:
    for feature in sorted(config.features - FEATURES):
        yield contract_message(
            "features",
            f"some of {', '.join(sorted(FEATURES))}",
            feature,
            "keep the engine's own backend for these layers",
        )
    narrow = config.kv_dtype in NARROW_KV_DTYPES
    if config.device_type == "cuda" and "rotation" in config.features and narrow:
        hint = "turn K when it is appended (append_kv with rope), or keep K in the dtype of q"
        rule = "the dtype of q where a GPU turns K"
        yield contract_message("kv_dtype", rule, config.kv_dtype, hint)
    count = config.num_variant_params
    if config.device_type == "cuda" and count > MAX_VARIANT_PARAMS:
        rule = f"at most {MAX_VARIANT_PARAMS} parameters, summed over the functions of the variant"
        yield contract_message("variant", rule, count, "pack scalars into one tensor")
