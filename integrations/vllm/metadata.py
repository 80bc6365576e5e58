"""One step of one KV cache group: vLLM's metadata becomes a batch and a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm import envs
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
)

from fi_backend import (
    AttentionConfig,
    Capacity,
    LayerClass,
    PagedBatch,
    PageTable,
    PlanSlot,
    StepPlanner,
    why_not,
)

from . import support
from .counters import counts
from .recorder import recorder
from .threads import start_threads

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

    from .impl import FiAttentionImpl

# KV positions between cuts when vLLM asks for batch invariance: a few tiles, so that one long
# request still spreads over all threads.
INVARIANT_CHUNK = 512


@dataclass
class StepMetadata(AttentionMetadata):
    """A planned step, shared by the layers of one group.

    Attributes:
        num_tokens: query tokens of the batch; tensors may hold padded rows past them.
        slots: the plan of each layer, by the layer's name.
        slot_mapping: int64 [num_tokens] where the step's K and V go.
    """

    num_tokens: int
    slots: Mapping[str, PlanSlot]
    slot_mapping: Tensor


@dataclass(frozen=True)
class _GroupPlan:
    """The planner of a group and the slot of each of its layers."""

    planner: StepPlanner
    slots: Mapping[str, PlanSlot]


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Plans each step of one group of layers, which share a page table.

    Raises:
        Unsupported: a layer that is not served; the message lists all reasons.
    """

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context: Mapping[str, Any] = vllm_config.compilation_config.static_forward_context
        self._layers = {name: context[name] for name in layer_names}
        impls: list[FiAttentionImpl] = [layer.impl for layer in self._layers.values()]
        self._reads_cache = all(impl.reads_cache for impl in impls)
        self._page_size: int = kv_cache_spec.block_size
        self._capacity = _capacity(vllm_config, kv_cache_spec)
        self._plans: dict[bool, _GroupPlan] = {}
        if device.type == "cpu":
            start_threads()
        # What the group will ask for first, so that memory is taken and refusals come at start.
        self._plan_for(causal=all(impl.attn_type == support.DECODER for impl in impls))
        self._own_pages: Tensor | None = None
        if not self._reads_cache:
            self._own_pages = torch.arange(
                self._capacity.max_tokens, dtype=torch.int32, device=device
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        """Plan one step.

        Args:
            common_prefix_len: not used; vLLM passes 0.
            common_attn_metadata: the step, in vLLM's words.
            fast_build: not used; planning costs the same either way.
        """
        step = common_attn_metadata
        causal = step.causal
        if isinstance(causal, Tensor):
            what = "one value for the whole batch"
            support.refuse([support.sentence("causal", what, "one per request", support.KEEP_VLLM)])
        batch = self._batch(step)
        group = self._plan_for(causal=bool(causal))
        group.planner.plan(batch)
        num_tokens = int(step.query_start_loc_cpu[step.num_reqs])
        recorder.offer(batch, num_tokens, group.slots)
        counts.steps += 1
        counts.planned_requests += step.num_reqs
        counts.planned_tokens += num_tokens
        return StepMetadata(num_tokens, group.slots, step.slot_mapping)

    def _batch(self, step: CommonAttentionMetadata) -> PagedBatch:
        requests = step.num_reqs
        qo_indptr = step.query_start_loc[: requests + 1]
        kv_len = step.seq_lens[:requests]
        if self._own_pages is None:
            table = PageTable.dense(step.block_table_tensor[:requests], self._page_size)
        else:  # K and V are the step's own tokens: request r's pages are its query rows
            table = PageTable.csr(qo_indptr, self._own_pages, 1)
        return PagedBatch(qo_indptr, kv_len, table)

    def _plan_for(self, *, causal: bool) -> _GroupPlan:
        if causal not in self._plans:
            self._plans[causal] = self._make_plan(causal)
        return self._plans[causal]

    def _make_plan(self, causal: bool) -> _GroupPlan:
        dtype = self.vllm_config.model_config.dtype
        index: dict[LayerClass, int] = {}
        slot_of: dict[str, int] = {}
        for name, layer in self._layers.items():
            head_size_v = getattr(layer, "head_size_v", layer.head_size)
            layer_class = layer.impl.layer_class(causal, dtype, head_size_v)
            slot_of[name] = index.setdefault(layer_class, len(index))
        classes = list(index)
        support.refuse(
            [
                reason
                for layer_class in classes
                for reason in why_not(AttentionConfig.of(layer_class, self.device))
            ]
        )
        planner = StepPlanner(
            classes,
            self._capacity,
            self.device,
            batch_invariant_chunk=INVARIANT_CHUNK if envs.VLLM_BATCH_INVARIANT else 0,
        )
        return _GroupPlan(planner, {name: planner.slot(i) for name, i in slot_of.items()})


def _capacity(vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> Capacity:
    """Return the largest step that the engine can ask of one group."""
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    requests, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
    # Drafting appends up to this many tokens to every request, past the scheduler's budget.
    tokens += requests * (drafts + 1)
    kv_len = model.max_model_len + drafts + 1
    chunk = getattr(kv_cache_spec, "attention_chunk_size", None)
    if chunk:
        # Local attention: vLLM cuts requests at multiples of the chunk and passes the pieces as
        # requests: at most two partial pieces each, and the whole ones.
        requests = 2 * requests + tokens // chunk
    return Capacity(requests, tokens, max(kv_len, scheduler.max_num_encoder_input_tokens))
