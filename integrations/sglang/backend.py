"""The attention of one model runner: a plan per step, two launches per layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.attention import base_attn_backend
from torch import Tensor

from fi_backend import append_kv, attention

from ..common.reasons import sentence
from . import NAME, support
from .counters import counts
from .layers import ServedLayer, attention_modules
from .limits import StepLimits, drafts_branch, num_draft_tokens, setting
from .plans import Plan, Step, StepPlans
from .sharing import logger, shared_reads
from .tables import SlotTables, StepRequests
from .verify import TreeBits


class FiAttentionBackend(base_attn_backend.AttentionBackend):
    """fi_backend as SGLang calls it.

    Args:
        runner: SGLang's ModelRunner, whose model and memory pools exist.

    Attributes:
        needs_cpu_seq_lens: False: lengths are read on the device, by the planner.
        forward_metadata: the step planned last.

    Raises:
        Unsupported: something that is not served; the message lists all reasons.
    """

    needs_cpu_seq_lens = False
    extend_dummy_seqs_capped_by_req_pool = True

    def __init__(self, runner: Any) -> None:
        super().__init__()
        # Speculation asks for it.
        self.max_context_len = runner.model_config.context_len
        self._drafts = num_draft_tokens(runner)
        topk = setting(runner, "spec", "speculative_eagle_topk") if self._drafts else 1
        self._has_trees = self._drafts > 0 and drafts_branch(runner)
        self._has_encoders = runner.model_config.is_encoder_decoder
        modules = attention_modules(runner.model, with_encoders=not self._has_encoders)
        reasons = support.runner_reasons(runner)
        self._looks_ahead = support.looks_ahead(runner.model_config)
        for module in modules:
            reasons += self._reasons_against(module, verifies_trees=(topk or 1) > 1)
        support.refuse(reasons)
        self.device = torch.device(runner.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._dtype, self._kv_dtype = runner.dtype, runner.kv_cache_dtype
        self._pool = runner.token_to_kv_pool
        # A text begins where its encoder ends, inside a page.
        self._page_size = 1 if self._has_encoders else runner.page_size
        self._layers = {one: self._served(one, sinks) for one, sinks in modules.items()}
        self._limits = StepLimits.of(runner)
        ranks = torch.distributed
        self._writes = not ranks.is_initialized() or ranks.get_rank() == 0
        self._plans = self._make_plans()
        requests = self._limits.general.max_requests
        self._tables = SlotTables(
            runner.req_to_token_pool.req_to_token,
            self._page_size,
            self._pool,
            self._window_left(),
            has_encoders=self._has_encoders,
        )
        self._trees = TreeBits(requests, self._drafts, self.device)
        self._ones = self._counting(requests)
        self._graph_window_slots: Tensor | None = None
        self.forward_metadata: Step | None = None
        logger.info("fi_backend serves attention, as selected by attention backend %s", NAME)

    def _served(self, module: Any, sinks: Tensor | None) -> ServedLayer:
        return ServedLayer(module, self._dtype, self._kv_dtype, self._pool, self._page_size, sinks)

    def _make_plans(self) -> StepPlans:
        layers = list(self._layers.values())
        place = (self._limits, self.device, self._page_size)
        return StepPlans.of(layers, *place, has_trees=self._has_trees, writes=self._writes)

    def _window_left(self) -> int | None:
        """Return the widest window of the layers with a pool of their own; None: there are none."""
        lefts = [one.layer_class.band.left for one in self._layers.values() if one.in_window_pool]
        return max(lefts, default=None)

    def _counting(self, requests: int) -> Tensor:
        return torch.arange(requests + 1, dtype=torch.int32, device=self.device)

    # Planning

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan an eager step, or one between the pieces of a breakable graph."""
        if forward_batch.batch_size > 0:
            self._plan(forward_batch, for_graph=False)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Take the memory that graphs read: one for all captured batch sizes.

        Args:
            max_bs: requests of the largest captured step, padding included.
            max_num_tokens: its query tokens.
        """
        if max_bs > self._limits.general.max_requests:
            self._limits = self._limits.with_requests(max_bs)
            self._plans = self._make_plans()
            self._trees = TreeBits(max_bs, self._drafts, self.device)
            self._ones = self._counting(max_bs)
        self._tables.reserve(max_bs)
        if self._window_left() is not None:
            self._graph_window_slots = torch.zeros(
                max_num_tokens, dtype=torch.int64, device=self.device
            )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan the step that a graph is captured with, or that it runs next.

        Nothing waits, and nothing of SGLang's tables is read after the kernels enqueued here.

        Args:
            forward_batch: a batch, or SGLang's view of one: batch size, rows, lengths and slots,
                padded to the captured size.
            in_capture: the step is a dummy.
        """
        if in_capture:
            with shared_reads.not_counted():
                self._plan(forward_batch, for_graph=True)
        else:
            self._plan(forward_batch, for_graph=True)

    @property
    def verify_mask(self) -> Any:
        """The mask that SGLang fills after drafting (0.5.23): [drafts, drafts] of each request."""
        if self._plans.verify is None:
            return None
        from sglang.srt.layers.attention.verify_mask import VerifyMask
        from sglang.srt.speculative.eagle_utils import TreeMaskMode

        mask = self._trees.square_mask
        requests = mask.numel() // self._drafts**2
        return VerifyMask(buffer=mask, mode=TreeMaskMode.QLEN_ONLY, max_bs=requests)

    def update_verify_buffers_to_fill_after_draft(
        self, spec_info: Any, cuda_graph_bs: int | None
    ) -> None:
        """Take over a mask that was not drafted yet when the step was planned.

        Args:
            spec_info: of the step.
            cuda_graph_bs: not used; the bits lie where graphs read them.
        """
        step = self.forward_metadata
        if step is not None and "tree_bits" in step.params:
            self._trees.fill(spec_info.custom_mask, step.seq_lens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of padded requests: their token is read from the padding row."""
        return 1

    def shared_read_ends(self, mode: Any) -> Any:
        """Return when SGLang may refill its tables (0.5.23): for graphs, once a step is planned."""
        ends = base_attn_backend.SharedReadEnds
        is_graphs = mode.is_decode() or mode.is_target_verify()
        return ends.PRE_REPLAY if is_graphs else ends.UNKNOWN

    def _plan(self, fb: Any, *, for_graph: bool) -> None:
        plan, qo_indptr, kv_len = self._lengths(fb)
        step = StepRequests(fb.req_pool_indices, qo_indptr, kv_len, self._encoder_lens(fb))
        batches = self._tables.copied(step) if for_graph else self._tables.in_place(step)
        plan.planner.plan(batches[: plan.planner.num_page_tables])
        shared_reads.after_plan()
        window_slots = self._window_slots(fb.out_cache_loc, for_graph=for_graph)
        params = {}
        if self._has_trees and plan is self._plans.verify:
            mask = getattr(fb.spec_info, "custom_mask", None)
            params["tree_bits"] = self._trees.fill(mask, fb.seq_lens)
        self.forward_metadata = Step(plan, batches, fb.seq_lens, window_slots, params)
        counts.steps += 1
        counts.graph_steps += for_graph
        counts.planned_requests += kv_len.numel()

    def _lengths(self, fb: Any) -> tuple[Plan, Tensor, Tensor]:
        """Return the plan that a step takes, its qo_indptr and its kv_len."""
        requests, mode = fb.batch_size, fb.forward_mode
        kv_len = fb.seq_lens[:requests]
        if mode.is_decode_or_idle():
            counts.decode_steps += 1
            return self._plans.decode, self._ones[: requests + 1], kv_len
        if mode.is_target_verify():
            if self._plans.verify is None:
                hint = "set --speculative-num-draft-tokens"
                support.refuse([sentence("forward_mode", "no verification", mode.name, hint)])
            assert self._plans.verify is not None
            counts.verify_steps += 1
            # The lengths do not count the drafted tokens yet.
            qo_indptr = self._ones[: requests + 1] * self._drafts
            return self._plans.verify, qo_indptr, kv_len + self._drafts
        if mode.is_dllm_extend():
            hint = "diffusion models see their blocks both ways; " + support.KEEP_SGLANG
            support.refuse([sentence("forward_mode", "causal steps", mode.name, hint)])
        qo_indptr = torch.zeros(requests + 1, dtype=torch.int32, device=self.device)
        torch.cumsum(fb.extend_seq_lens, 0, dtype=torch.int32, out=qo_indptr[1:])
        return self._plans.general, qo_indptr, kv_len

    def _encoder_lens(self, fb: Any) -> Tensor | None:
        """Return the tokens of the encoder of each request; None: the model has none."""
        if not self._has_encoders:
            return None
        if getattr(fb, "cross_attention_custom_mask", None) is not None:
            what = "cross_attention_custom_mask"
            support.refuse([sentence(what, "unset", "a mask", support.KEEP_SGLANG)])
        if fb.encoder_lens is None:  # dummies of a prefill graph
            return torch.zeros_like(fb.seq_lens[: fb.batch_size])
        lens: Tensor = fb.encoder_lens[: fb.batch_size]
        return lens.to(fb.seq_lens.dtype)

    def _window_slots(self, slots: Tensor | None, *, for_graph: bool) -> Tensor | None:
        """Return where a step's K and V go in the pool of window layers."""
        if slots is None or self._window_left() is None:
            return None
        own = self._pool.translate_loc_from_full_to_swa(slots)
        kept = self._graph_window_slots
        if not for_graph or kept is None:
            return own if isinstance(own, Tensor) else None
        # Padded tokens go to the slot that swallows them.
        kept[slots.numel() :].zero_()
        kept[: slots.numel()].copy_(own)
        return kept

    # Layers

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **arguments: Any,
    ) -> Tensor:
        """Run a layer of any step.

        Args:
            q: [tokens or more, num_qo_heads * head_dim_qk]; rows past the step are not read.
            k: [tokens or more, num_kv_heads, head_dim_qk]; None: another layer has written them, or
                an earlier step where the layer sees encoders: there, tokens are theirs.
            v: [tokens or more, num_kv_heads, head_dim_vo]; None as k.
            layer: SGLang's RadixAttention.
            forward_batch: the step, planned before.
            save_kv_cache: whether k and v go into the cache.
            arguments: ``sinks``: [num_qo_heads] or None; others are refused.

        Returns:
            [rows of q, num_qo_heads * head_dim_vo], dtype of q.

        Raises:
            Unsupported: an argument that is not served.
        """
        return self._run(
            q, k, v, layer, forward_batch, save_kv_cache, arguments, refresh_sinks=True
        )

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **arguments: Any,
    ) -> Tensor:
        """Run a layer of a step with one token per request; arguments are as in forward_extend."""
        return self._run(
            q, k, v, layer, forward_batch, save_kv_cache, arguments, refresh_sinks=False
        )

    def _run(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        arguments: dict[str, Any],
        *,
        refresh_sinks: bool,
    ) -> Tensor:
        if arguments:
            support.refuse(support.call_reasons(arguments))
        sinks = arguments.get("sinks")
        served = self._layers.get(layer)
        if served is None or served.has_sinks != (sinks is not None):
            served = self._adopt(layer, sinks)
        elif refresh_sinks:  # weights may have been loaded again since
            served.logits.bind_weights()
        step = self.forward_metadata
        assert step is not None
        to_read, to_write = served.caches()
        k_scale, v_scale = served.scales()
        if save_kv_cache and k is not None and v is not None:
            slots = self._slots_to_write(served, step, forward_batch)[: k.shape[0]]
            append_kv(k, v, to_write, slots, k_scale=k_scale, v_scale=v_scale)
            counts.appended_tokens += slots.numel()
        heads = served.layer_class.heads
        out = attention(
            step.plan.slots[layer],
            q.view(-1, heads.num_qo_heads, heads.head_dim_qk),
            to_read,
            scale=layer.scaling,
            k_scale=k_scale,
            v_scale=v_scale,
            params={**served.logits.params, **step.params},
        )
        counts.forwards += 1
        return out.view(-1, heads.num_qo_heads * heads.head_dim_vo)

    @staticmethod
    def _slots_to_write(served: ServedLayer, step: Step, forward_batch: Any) -> Any:
        if served.sees_encoders:
            return forward_batch.encoder_out_cache_loc
        if served.in_window_pool and step.window_slots is not None:
            return step.window_slots
        return forward_batch.out_cache_loc

    def _reasons_against(self, layer: Any, *, verifies_trees: bool) -> list[str]:
        return list(
            support.layer_reasons(
                layer,
                verifies_trees=verifies_trees,
                looks_ahead=self._looks_ahead,
                has_encoders=self._has_encoders,
            )
        )

    def _adopt(self, layer: Any, sinks: Tensor | None) -> ServedLayer:
        """Serve a layer that was not known, or not to have sinks or not: its call tells.

        The planners are made anew with its class, and the step is planned again.
        """
        support.refuse(self._reasons_against(layer, verifies_trees=False))
        self._layers[layer] = self._served(layer, sinks)
        step = self.forward_metadata
        assert step is not None
        kind = next(name for name, plan in vars(self._plans).items() if plan is step.plan)
        self._plans = self._make_plans()
        plan = getattr(self._plans, kind)
        plan.planner.plan(step.batches[: plan.planner.num_page_tables])
        self.forward_metadata = replace(step, plan=plan)
        return self._layers[layer]
