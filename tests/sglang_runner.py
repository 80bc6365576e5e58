"""Steps of SGLang without an engine, on made-up tensors, beside plain attention.

Everything that attention must not read is poisoned: NaN in unused slots, stale slots in unused
entries of the table.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_parts import DEVICE, Layer, runner
from torch import Tensor

from fi_backend.integrations.sglang.backend import FiAttentionBackend


@dataclass
class Request:
    """A request in the pools.

    Attributes:
        row: of req_to_token.
        encoder: tokens of its encoder, before its text in the row.
        length: tokens of its text in the cache.
        keys, values: per layer [length, kv_heads, dim], in the order of positions; of a layer that
            sees encoders [encoder, kv_heads, dim], once it ran.
    """

    row: int
    encoder: int = 0
    length: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class World:
    """A backend, its requests, and what their attention should be."""

    def __init__(self, layers: list[Layer], **options: Any) -> None:
        self.layers, self.runner = layers, runner(layers, **options)
        self.backend = FiAttentionBackend(self.runner)
        self.page = self.runner.page_size
        self.table = self.runner.req_to_token_pool.req_to_token
        self._pages = self.runner.token_to_kv_pool.size // self.page
        self.table.fill_(self._pages * self.page)  # a page that nobody owns, full of NaN
        self.table[0] = 0  # of padded requests
        self.requests: list[Request] = []
        self._free = list(range(1, self._pages))
        random.Random(3).shuffle(self._free)
        self._draw = torch.Generator("cpu").manual_seed(5)

    def noise(self, *shape: int) -> Tensor:
        """Values that the model's dtype has, in float32."""
        drawn = 2 * torch.randn(*shape, generator=self._draw, device="cpu")
        return drawn.to(DEVICE, self.runner.dtype).float()

    def request(self, encoder: int = 0) -> Request:
        shape = (0, self.layers[0].kv_heads, self.layers[0].dim)
        empty = [torch.zeros(shape) for _ in self.layers]
        request = Request(len(self.requests) + 1, encoder, keys=list(empty), values=list(empty))
        self.requests.append(request)
        return request

    def share(self, request: Request, other: Request, tokens: int) -> None:
        """Begin a request with the pages of another, as a radix cache does: of encoder and text."""
        columns = other.encoder + tokens
        self.table[request.row, :columns] = self.table[other.row, :columns]
        request.encoder, request.length = other.encoder, tokens
        kept = [None if layer.sees_encoders else tokens for layer in self.layers]
        request.keys = [k[:end] for k, end in zip(other.keys, kept, strict=True)]
        request.values = [v[:end] for v, end in zip(other.values, kept, strict=True)]

    def slots(self, request: Request, begin: int, new: int) -> Tensor:
        """Take slots for columns of a request's row, pages at a time and in any order."""
        taken = []
        for position in range(begin, begin + new):
            if position % self.page == 0:
                page = self._free.pop()
                slot = page * self.page
                mapping = getattr(self.runner.token_to_kv_pool, "full_to_swa_index_mapping", None)
                if mapping is not None:  # pages of the other pool lie elsewhere
                    other = (self._pages - page) * self.page
                    mapping[slot : slot + self.page] = torch.arange(other, other + self.page)
            else:
                slot = int(self.table[request.row, position - 1]) + 1
            self.table[request.row, position] = slot
            taken.append(slot)
        return torch.tensor(taken, dtype=torch.int64)

    def batch(self, step: dict[int, int], mode: ForwardMode) -> Any:
        """A step of {request: new tokens}; its slots are taken."""
        chosen = [self.requests[i] for i in step]
        new = torch.tensor(list(step.values()), dtype=torch.int32)
        fresh = [r for r in chosen if r.length == 0]  # SGLang runs their encoders in this step
        encoders = [self.slots(r, 0, r.encoder) for r in fresh]
        slots = [
            self.slots(r, r.encoder + r.length, n)
            for r, n in zip(chosen, new.tolist(), strict=True)
        ]
        before = torch.tensor([r.length for r in chosen])
        counted = before if mode.is_target_verify() else before + new
        return SimpleNamespace(
            batch_size=len(chosen),
            forward_mode=mode,
            req_pool_indices=torch.tensor([r.row for r in chosen]),
            seq_lens=counted,
            seq_lens_cpu=None,
            seq_lens_sum=None,
            out_cache_loc=torch.cat(slots),
            encoder_lens=torch.tensor([r.encoder for r in chosen]),
            encoder_out_cache_loc=torch.cat([*encoders, torch.zeros(0, dtype=torch.int64)]),
            fresh=fresh,
            extend_seq_lens=new,
            spec_info=None,
            chosen=chosen,
            new=new.tolist(),
        )

    def run(self, batch: Any, index: int, padding: int = 0, seen: Tensor | None = None) -> None:
        """Run a layer of a planned step and compare it with plain attention.

        Args:
            batch: from ``batch``.
            index: of the layer.
            padding: rows past the tokens of the step.
            seen: bool [tokens of a request, the same], which new tokens see which; None: causal.
        """
        layer, tokens = self.layers[index], sum(batch.new)
        module = self.runner.model.parents[index].attn
        q = self.noise(tokens + padding, layer.heads * layer.dim)
        written = batch.encoder_out_cache_loc.numel() if layer.sees_encoders else tokens + padding
        k, v = (self.noise(written, layer.kv_heads, layer.dim) for _ in range(2))
        arguments = {} if layer.sinks is None else {"sinks": layer.sinks}
        decodes = batch.forward_mode.is_decode()
        call = self.backend.forward_decode if decodes else self.backend.forward_extend
        dtype = self.runner.dtype
        new_kv = (k.to(dtype), v.to(dtype)) if written else (None, None)
        out = call(q.to(dtype), *new_kv, module, batch, **arguments)
        assert out.shape == (tokens + padding, layer.heads * layer.dim)
        at = encoded = 0
        for request, new in zip(batch.chosen, batch.new, strict=True):
            rows = fresh = slice(at, at + new)
            if layer.sees_encoders:
                fresh = slice(encoded, encoded + request.encoder * (request in batch.fresh))
                encoded = fresh.stop
            keys = torch.cat([request.keys[index], k[fresh]])
            values = torch.cat([request.values[index], v[fresh]])
            expected = plain(layer, module.scaling, q[rows], keys, values, seen)
            tolerance = 1e-4 if dtype == torch.float32 else 0.06
            torch.testing.assert_close(
                out[rows].float().view_as(expected), expected, rtol=tolerance, atol=tolerance
            )
            request.keys[index], request.values[index] = keys, values
            at += new

    def step(self, step: dict[int, int], mode: ForwardMode = ForwardMode.EXTEND) -> None:
        """Plan a step, run all layers, and let its requests grow."""
        batch = self.batch(step, mode)
        self.backend.init_forward_metadata(batch)
        for index in range(len(self.layers)):
            self.run(batch, index)
        self.grow(batch)

    def graph_view(self, batch: Any, size: int) -> Any:
        """SGLang's view of a batch for a graph of ``size`` requests, and nothing else of it."""
        extra, drafts = size - batch.batch_size, max(batch.new)
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        pad = torch.nn.functional.pad
        return SimpleNamespace(
            batch_size=size,
            forward_mode=batch.forward_mode,
            actual_forward_mode=batch.forward_mode,
            num_padding=extra,
            req_pool_indices=pad(batch.req_pool_indices, (0, extra)),
            seq_lens=pad(batch.seq_lens, (0, extra), value=fill),
            seq_lens_cpu=None,
            seq_lens_sum=None,
            positions=None,
            input_ids=torch.zeros(size * drafts, dtype=torch.int64),
            out_cache_loc=batch.out_cache_loc,
            encoder_lens=pad(batch.encoder_lens, (0, extra), value=fill),
            spec_info=batch.spec_info,
        )

    def replay(self, batch: Any, size: int, seen: Tensor | None = None) -> None:
        """Plan a step for a graph, take SGLang's tables away, and run all layers on static rows.

        There is no GPU here: what a graph would replay is run.
        """
        view = self.graph_view(batch, size)
        self.backend.init_forward_metadata_out_graph(view)
        self.backend.init_forward_metadata_in_graph(view)
        mapping = getattr(self.runner.token_to_kv_pool, "full_to_swa_index_mapping", None)
        kept = [self.table.clone(), None if mapping is None else mapping.clone()]
        for taken in (self.table, mapping):
            if taken is not None:
                taken.fill_(self._pages * self.page)
        padding = (size - batch.batch_size) * max(batch.new)
        slots = batch.out_cache_loc
        batch.out_cache_loc = torch.nn.functional.pad(slots, (0, padding))
        for index in range(len(self.layers)):
            self.run(batch, index, padding, seen)
        self.table.copy_(kept[0])
        if mapping is not None:
            mapping.copy_(kept[1])
        self.grow(batch)

    def grow(self, batch: Any) -> None:
        for request, new in zip(batch.chosen, batch.new, strict=True):
            request.length += new


def plain(  # noqa: PLR0917 (named words)
    layer: Layer, scale: float, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None
) -> Tensor:
    """Attention of one request in float64: [new tokens, heads, dim]."""
    new, length = q.shape[0], k.shape[0]
    group = layer.heads // layer.kv_heads
    q = q.view(new, layer.heads, layer.dim).double()
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if layer.cap:
        logits = layer.cap * torch.tanh(logits / layer.cap)
    position = torch.arange(length - new, length)[:, None]
    key = torch.arange(length)
    visible = key <= position
    if layer.attn_type == AttentionType.ENCODER_ONLY or layer.sees_encoders:
        visible = torch.ones_like(visible)
    if layer.window > 0:
        visible &= key >= position - layer.window
    if seen is not None:
        visible[:, length - new :] = seen
    logits = logits.masked_fill(~visible, float("-inf"))
    if layer.sinks is not None:
        column = layer.sinks.double().view(-1, 1, 1).expand(-1, new, 1)
        weights = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).float()
