"""The attention layers of a model: their classes, their logits and their caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fi_backend import CAUSAL, FULL, Band, HeadShape, KvCacheView, LayerClass
from fi_backend.variants import shipped

from ..common.logits import LayerLogits
from . import support

# Page tables that a step is planned with: slots of the pool, and those of a window pool or of
# encoders. No model that is served has both.
MAIN_TABLE, WINDOW_TABLE, ENCODER_TABLE = 0, 1, 1
# What models call the sinks that they pass to their RadixAttention.
SINKS = ("sinks", "attention_sink_bias")


def attention_modules(model: Any, *, with_encoders: bool) -> dict[Any, Tensor | None]:
    """Return the RadixAttention modules of a model in its order, each with its sinks or None.

    Args:
        model: SGLang's.
        with_encoders: those of encoders too. Beside a decoder (Whisper) they are there, but attend
            without the backend: they need no plan.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    found: dict[Any, Tensor | None] = {}
    for parent in model.modules():
        sinks = next((s for n in SINKS if (s := getattr(parent, n, None)) is not None), None)
        for module in parent.children():
            if not isinstance(module, RadixAttention):
                continue
            if with_encoders or support.attn_type(module) != support.ENCODER_ONLY:
                found[module] = sinks
    return found


class ServedLayer:
    """One RadixAttention: what it is for us, and its cache as the kernels read it.

    Args:
        layer: SGLang's module.
        dtype: of q and of the output.
        kv_dtype: of the cache.
        pool: SGLang's KV pool.
        page_size: tokens of a page.
        sinks: [num_qo_heads] learned logits that SGLang passes with every call; None: no sinks.
    """

    def __init__(
        self,
        layer: Any,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        pool: Any,
        page_size: int,
        sinks: Tensor | None = None,
    ) -> None:
        self.layer = layer
        self._pool, self._page_size = pool, page_size
        self._is_fp8 = kv_dtype != dtype
        mapping = getattr(pool, "layers_mapping", {})
        self.in_window_pool = layer.layer_id in mapping and mapping[layer.layer_id][1]
        self.sees_encoders = bool(layer.is_cross_attention)
        self.logits = LayerLogits(layer.logit_cap or None, None, sinks)
        self.layer_class = LayerClass(
            HeadShape(
                layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim
            ),
            dtype,
            kv_dtype if self._is_fp8 else None,
            self._band(),
            self.logits.variant,
            self._table(),
        )
        self._seen: tuple[object, ...] = ()
        self._views: tuple[KvCacheView, KvCacheView] | None = None
        self._scales: dict[str, Tensor] = {}

    def _band(self) -> Band:
        """Return what a query sees. SGLang's window does not count the query's own token."""
        if self.sees_encoders or support.attn_type(self.layer) == support.ENCODER_ONLY:
            return FULL
        window = self.layer.sliding_window_size
        return Band(window, 0) if window > 0 else CAUSAL

    def _table(self) -> int:
        if self.sees_encoders:
            return ENCODER_TABLE
        return WINDOW_TABLE if self.in_window_pool else MAIN_TABLE

    @property
    def has_sinks(self) -> bool:
        """Whether the layer was made with sinks."""
        return "sinks" in self.logits.params

    @property
    def tree_class(self) -> LayerClass:
        """The class of the layer in steps that verify a tree of drafted tokens."""
        variant, tree = self.layer_class.variant, shipped.tree_mask()
        return replace(self.layer_class, variant=tree if variant is None else variant.then(tree))

    def caches(self) -> tuple[KvCacheView, KvCacheView]:
        """Return the layer's cache by pages, to read, and by tokens, to write.

        A page is named by its first slot, as in ``req_to_token``: pages overlap in the view, and
        only every page_size-th is named. So slots need no division, neither here nor in a kernel.
        """
        k = self._pool.get_key_buffer(self.layer.layer_id)
        v = self._pool.get_value_buffer(self.layer.layer_id)
        key = (k.data_ptr(), v.data_ptr(), k.shape, k.dtype)
        if self._views is None or key != self._seen:
            size = self._page_size
            self._views = (
                KvCacheView(_pages_by_slot(k, size), _pages_by_slot(v, size)),
                KvCacheView.ragged(k, v),
            )
            self._seen = key
        return self._views

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Return what an fp8 cache's K and V are multiplied by: float32 [1] device; None: 1."""
        if not self._is_fp8:
            return None, None
        return self._scale("k_scale"), self._scale("v_scale")

    def _scale(self, name: str) -> Tensor | None:
        value = getattr(self.layer, name, None)
        if value is None:
            return None
        if name not in self._scales:  # the checkpoint has filled it by the first call
            device = self._pool.get_key_buffer(self.layer.layer_id).device
            scale = torch.as_tensor(value, dtype=torch.float32, device=device)
            self._scales[name] = scale.detach().reshape(-1)[:1].contiguous()
        return self._scales[name]


def _pages_by_slot(slots: Tensor, page_size: int) -> Tensor:
    """Return [slots, heads, dim] as [slots - page_size + 1, page_size, heads, dim]."""
    token, head, _ = slots.stride()
    shape = (slots.shape[0] - page_size + 1, page_size, *slots.shape[1:])
    return slots.as_strided(shape, (token, token, head, 1), slots.storage_offset())


def distinct(classes: Iterator[LayerClass]) -> dict[LayerClass, int]:
    """Return the classes without repetition, each with its index."""
    index: dict[LayerClass, int] = {}
    for layer_class in classes:
        index.setdefault(layer_class, len(index))
    return index
