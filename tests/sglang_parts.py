"""SGLang's model runner as the adapter sees it, without an engine: real layers and pools."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch import Tensor

NAN = float("nan")
DEVICE = os.environ.get("FI_TEST_DEVICE", "cpu")  # of tensors; a GPU for work on the tests


@dataclass(frozen=True)
class Layer:
    """A layer as a model makes it, one of its kind in the model."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    window: int = -1
    cap: float = 0.0
    sinks: Tensor | None = None
    attn_type: AttentionType = AttentionType.DECODER
    in_window_pool: bool = False
    sees_encoders: bool = False


class Model(torch.nn.Module):
    """Attention layers, each inside a module that has its sinks."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.parents = torch.nn.ModuleList()
        for index, layer in enumerate(layers):
            parent = torch.nn.Module()
            parent.attn = RadixAttention(
                layer.heads,
                layer.dim,
                1.5 * layer.dim**-0.5,
                layer.kv_heads,
                index,
                logit_cap=layer.cap,
                sliding_window_size=layer.window,
                attn_type=layer.attn_type,
                is_cross_attention=layer.sees_encoders,
            )
            if layer.sinks is not None:
                parent.sinks = torch.nn.Parameter(layer.sinks, requires_grad=False)
            self.parents.append(parent)


def kv_pool(size: int, page: int, layers: list[Layer], dtype: torch.dtype) -> Any:
    """The pool that SGLang makes for these layers, NaN in all slots but those for padding."""
    common = {
        "size": size,
        "page_size": page,
        "dtype": dtype,
        "head_num": layers[0].kv_heads,
        "head_dim": layers[0].dim,
        "device": DEVICE,
    }
    windows = [index for index, layer in enumerate(layers) if layer.in_window_pool]
    pool: Any
    if windows:
        others = [index for index in range(len(layers)) if index not in windows]
        pool = SWAKVPool(
            size_swa=size,
            swa_attention_layer_ids=windows,
            full_attention_layer_ids=others,
            **common,
        )
        pool.register_mapping(torch.zeros(size + page, dtype=torch.int64, device=DEVICE))
    else:
        pool = MHATokenToKVPool(layer_num=len(layers), enable_memory_saver=False, **common)
    for index in range(len(layers)):
        for buffer in (pool.get_key_buffer(index), pool.get_value_buffer(index)):
            if dtype.itemsize > 1:
                buffer.fill_(NAN)
                buffer[:page] = 0  # swallows what padded tokens write
    return pool


def runner(
    layers: list[Layer],
    page: int = 1,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    drafts: int = 0,
    *,
    topk: int = 2,
    **changes: Any,
) -> Any:
    """The parts of ModelRunner that the adapter reads."""
    requests = ReqToTokenPool(8, 320, DEVICE, enable_memory_saver=False)
    pool = kv_pool(1024, page, layers, kv_dtype or dtype)
    settings = SimpleNamespace(
        chunked_prefill_size=256,
        max_prefill_tokens=512,
        speculative_num_draft_tokens=drafts,
        speculative_eagle_topk=topk,
        cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend="breakable")),
    )
    made = SimpleNamespace(
        model=Model(layers),
        model_config=SimpleNamespace(
            is_encoder_decoder=any(layer.sees_encoders for layer in layers),
            is_multimodal=False,
            hf_text_config=SimpleNamespace(),
            context_len=316,
        ),
        req_to_token_pool=requests,
        token_to_kv_pool=pool,
        page_size=page,
        device=DEVICE,
        dtype=dtype,
        kv_cache_dtype=kv_dtype or dtype,
        use_mla_backend=False,
        dcp_size=1,
        ps=SimpleNamespace(tp_size=1),
        is_draft_worker=False,
        spec_algorithm=SimpleNamespace(
            is_none=lambda: drafts == 0, is_eagle=lambda: True, is_standalone=lambda: False
        ),
        server_args=settings,
        settings=settings,
    )
    vars(made).update(changes)
    return made
