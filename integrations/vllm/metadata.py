"""One step of one KV cache group: vLLM's metadata becomes a batch and a plan."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
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

from ..common.reasons import sentence
from ..common.sharing import shares_prefixes
from . import support
from .counters import counts
from .graphs import takes_decode_plan
from .limits import StepLimits
from .recorder import recorder
from .scratch import invariant_chunk, shared_workspace
from .sharing import shared_reads
from .threads import start_threads

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

    from .impl import FiAttentionImpl


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


@dataclass(frozen=True)
class _GroupPlans:
    """The planner of any step, and that of decode steps, whose kernel holds nothing else."""

    general: _GroupPlan
    decode: _GroupPlan | None


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Plans each step of one group of layers, which share a page table.

    On a GPU, ``build`` enqueues the planning kernels and returns: nothing is read back, nothing
    waits. vLLM calls it before it replays a graph, and the graph reads the plan it wrote.

    Raises:
        Unsupported: a layer that is not served; the message lists all reasons.
    """

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
        chunk = getattr(kv_cache_spec, "attention_chunk_size", None)
        self._limits = StepLimits.of(vllm_config, chunk)
        # vLLM passes the chunks of local attention as requests of their own, which are short.
        self._may_share = not chunk and all(impl.may_share for impl in impls)
        # vLLM then drops what lies in its pool, ours too, and nobody tells backends when.
        self._may_sleep = bool(vllm_config.model_config.enable_sleep_mode)
        self._plans: dict[bool, _GroupPlans] = {}
        if device.type == "cpu":
            start_threads()
        # What the group will ask for first, so that memory is taken, kernels are compiled and
        # refusals come at start.
        self._plans_for(causal=all(impl.attn_type == support.DECODER for impl in impls))
        self._seen: tuple[tuple[object, ...], PagedBatch | None] = ((), None)
        self._own_pages: Tensor | None = None
        if not self._reads_cache:
            tokens = self._limits.general.max_tokens
            self._own_pages = torch.arange(tokens, dtype=torch.int32, device=device)
        # vLLM builds a small cache and builders to measure graphs, then drops both and takes all
        # memory that is left: a view of the small cache must not outlive them.
        weakref.finalize(self, _forget_caches, impls).atexit = False

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Return that a GPU's graphs replay any batch within their captured size."""
        on_gpu = current_platform.device_type == "cuda"
        return AttentionCGSupport.ALWAYS if on_gpu else AttentionCGSupport.NEVER

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

        Graphs: a captured layer keeps the address of the page table and of its slot. vLLM passes
        the same table memory at every step, and ``takes_decode_plan`` chooses the same slot.
        """
        step = common_attn_metadata
        causal = step.causal
        if isinstance(causal, Tensor):
            what = "one value for the whole batch"
            support.refuse([sentence("causal", what, "one per request", support.KEEP_VLLM)])
        batch = self._batch(step)
        group = self._plan_of(step, causal=bool(causal))
        if self._may_sleep:
            group.planner.clear_counters()
            if self._own_pages is not None:
                torch.arange(len(self._own_pages), out=self._own_pages)
        group.planner.plan(batch)
        shared_reads.after_plan()
        # In vLLM's host copy: padded requests of a captured size have no tokens.
        num_tokens = int(step.query_start_loc_cpu[step.num_reqs])
        recorder.offer(batch, num_tokens, group.slots)
        counts.steps += 1
        counts.planned_requests += step.num_reqs
        counts.planned_tokens += num_tokens
        return StepMetadata(num_tokens, group.slots, step.slot_mapping)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> StepMetadata:
        """Plan the dummy step that a graph is captured with."""
        with shared_reads.not_counted():
            return super().build_for_cudagraph_capture(common_attn_metadata)

    def _batch(self, step: CommonAttentionMetadata) -> PagedBatch:
        """Return the step as views of vLLM's memory.

        vLLM refills the same memory at every step: as long as the number of requests stays, so do
        the views. The ones kept keep their memory alive, so equal addresses mean equal memory.
        """
        requests, pages = step.num_reqs, step.block_table_tensor
        lengths = (step.query_start_loc.data_ptr(), step.seq_lens.data_ptr())
        key = (requests, *lengths, pages.data_ptr(), pages.stride(), pages.shape[1])
        known, batch = self._seen
        if batch is not None and key == known:
            return batch
        qo_indptr = step.query_start_loc[: requests + 1]
        if self._own_pages is None:
            table = PageTable.dense(pages[:requests], self._page_size)
        else:  # K and V are the step's own tokens: request r's pages are its query rows
            table = PageTable.csr(qo_indptr, self._own_pages, 1)
        batch = PagedBatch(qo_indptr, step.seq_lens[:requests], table)
        self._seen = (key, batch)
        return batch

    def _plan_of(self, step: CommonAttentionMetadata, *, causal: bool) -> _GroupPlan:
        plans, longest = self._plans_for(causal=causal), self._limits.decode.max_q_len
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if plans.decode is None or not takes_decode_plan(mode, step.max_query_len, longest):
            return plans.general
        counts.decode_steps += 1
        return plans.decode

    def _plans_for(self, *, causal: bool) -> _GroupPlans:
        if causal not in self._plans:
            self._plans[causal] = self._make_plans(causal)
        return self._plans[causal]

    def _make_plans(self, causal: bool) -> _GroupPlans:
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
        limits = self._limits
        chunk = invariant_chunk(limits.general.max_kv_len)
        if self._may_share and shares_prefixes(classes, chunk):
            limits = limits.with_sharing()

        def plan_within(capacity: Capacity) -> _GroupPlan:
            planner = StepPlanner(
                classes,
                capacity,
                self.device,
                batch_invariant_chunk=chunk,
                workspace=shared_workspace(self.device, self.vllm_config, classes, limits),
                page_size=self._page_size,
            )
            shared_reads.watch(planner, writes=self.vllm_config.parallel_config.rank == 0)
            return _GroupPlan(planner, {name: planner.slot(i) for name, i in slot_of.items()})

        # A request's bits must not depend on whether others of its step are prefilled: one kernel.
        decodes = has_decode_kernel(self.device) and self._reads_cache and not chunk
        decode = plan_within(limits.decode) if decodes else None
        return _GroupPlans(plan_within(limits.general), decode)


def has_decode_kernel(device: torch.device) -> bool:
    """Return whether steps without prefills have a kernel of their own."""
    return device.type == "cuda"


def _forget_caches(impls: list[FiAttentionImpl]) -> None:
    for impl in impls:
        impl.forget_cache()
