"""One attention layer: what it is, and its two calls per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl

from fi_backend import (
    CAUSAL,
    FULL,
    Band,
    HeadShape,
    KvCacheView,
    LayerClass,
    append_kv,
    attention,
)

from ..common.logits import LayerLogits
from ..common.reasons import sentence
from ..common.sharing import shares_prefixes
from . import support
from .counters import counts
from .kv_layout import kv_view
from .limits import StepLimits
from .metadata import StepMetadata
from .scratch import DeviceScratch, invariant_chunk, reserve_scratch


class FiAttentionImpl(AttentionImpl[StepMetadata]):
    """The attention of one vLLM layer.

    Raises:
        Unsupported: the model asks for something that is not served; the message lists all of it.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = support.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **extra: Any,
    ) -> None:
        support.refuse(
            support.layer_reasons(
                extra=extra,
                dcp_world_size=self.dcp_world_size,
                pcp_world_size=getattr(self, "pcp_world_size", 1),
            )
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = str(getattr(attn_type, "value", attn_type))
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.logits = LayerLogits(logits_soft_cap, alibi_slopes, sinks)
        self._fp8 = kv_cache_dtype in support.FP8_NAMES
        self._bound: Tensor | None = None
        self._view: KvCacheView | None = None
        self._scratch = self._reserve_scratch()

    def _reserve_scratch(self) -> DeviceScratch | None:
        """Take a GPU's scratch memory now, while vLLM counts what the model holds.

        vLLM sizes the KV cache by what is left; the planners that use it come after that.
        """
        if current_platform.device_type != "cuda":
            return None
        vllm_config = get_current_vllm_config()
        model: Any = vllm_config.model_config  # its dtype is declared wider than it is by now
        causal = self.attn_type == support.DECODER
        layer_class = self.layer_class(causal, model.dtype, self.head_size)
        limits = StepLimits.of(vllm_config)
        chunk = invariant_chunk(limits.general.max_kv_len)
        if self.may_share and shares_prefixes([layer_class], chunk):
            limits = limits.with_sharing()
        device = torch.device("cuda", torch.cuda.current_device())
        return reserve_scratch(device, [layer_class], limits)

    @property
    def reads_cache(self) -> bool:
        """Whether K and V come from the KV cache, not from the step's own tensors."""
        return self.attn_type != support.ENCODER_ONLY

    @property
    def may_share(self) -> bool:
        """Whether requests can hold the same pages; an encoder's keys are each request's own."""
        return self.attn_type == support.DECODER

    def band(self, causal: bool) -> Band:
        """Return what a query sees. vLLM's window counts the query's own token."""
        if self.sliding_window is None:
            return CAUSAL if causal else FULL
        left = self.sliding_window - 1
        return Band(left, 0 if causal else left)

    def layer_class(self, causal: bool, dtype: torch.dtype, head_size_v: int) -> LayerClass:
        """Return the class of this layer, the key that layers share a plan by."""
        return LayerClass(
            HeadShape(self.num_heads, self.num_kv_heads, self.head_size, head_size_v),
            dtype,
            support.KV_DTYPES[self.kv_cache_dtype] if self.reads_cache else None,
            self.band(causal),
            self.logits.variant,
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take over parameters that the checkpoint has just filled."""
        self.logits.bind_weights()

    def do_kv_cache_update(
        self,
        layer: Any,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Write the step's K and V into the cache; called before ``forward``.

        Args:
            layer: vLLM's layer, holds the scales of an fp8 cache.
            key: [tokens or more, num_kv_heads, head_size].
            value: [tokens or more, num_kv_heads, head_size_v].
            kv_cache: the layer's cache.
            slot_mapping: int64 [tokens], page * page_size + offset; -1: skip.
        """
        if not self.reads_cache:
            return
        slots = slot_mapping[: key.shape[0]]
        k_scale, v_scale = self._kv_scales(layer)
        append_kv(key, value, self._cache_view(kv_cache), slots, k_scale=k_scale, v_scale=v_scale)
        counts.appended_tokens += slots.numel()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Run the layer's attention.

        Args:
            layer: vLLM's layer.
            query: [tokens or more, num_heads, head_size]; rows past the batch are not read.
            key: [tokens or more, num_kv_heads, head_size], read by encoder-only layers.
            value: [tokens or more, num_kv_heads, head_size_v], read by encoder-only layers.
            kv_cache: the layer's cache, holds the step's K and V already.
            attn_metadata: the planned step; None while vLLM profiles memory.
            output: [tokens or more, num_heads, head_size_v], written in place.
            output_scale: set when the output is to be quantised: not served.
            output_block_scale: same.

        Returns:
            ``output``.
        """
        if output_scale is not None or output_block_scale is not None:
            support.refuse([sentence("output_scale", "None", "a scale", support.KEEP_VLLM)])
        if attn_metadata is None:
            counts.profiling_forwards += 1
            return output.zero_()
        if self.reads_cache:
            kv = self._cache_view(kv_cache)
            k_scale, v_scale = self._kv_scales(layer)
        else:
            tokens = attn_metadata.num_tokens
            kv = KvCacheView.ragged(key[:tokens], value[:tokens])
            k_scale = v_scale = None
        attention(
            attn_metadata.slots[layer.layer_name],
            query,
            kv,
            out=output,
            scale=self.scale,
            k_scale=k_scale,
            v_scale=v_scale,
            params=self.logits.params,
        )
        counts.forwards += 1
        return output

    def forget_cache(self) -> None:
        """Let go of the cache seen last."""
        self._bound = self._view = None

    def _cache_view(self, kv_cache: Tensor) -> KvCacheView:
        """Return the view of a cache; vLLM passes the same tensor at every step."""
        if self._view is None or self._bound is not kv_cache:
            self._view = kv_view(kv_cache, self.head_size, fp8=self._fp8)
            self._bound = kv_cache
        return self._view

    def _kv_scales(self, layer: Any) -> tuple[Tensor | None, Tensor | None]:
        return (layer._k_scale, layer._v_scale) if self._fp8 else (None, None)
