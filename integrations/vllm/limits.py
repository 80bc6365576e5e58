"""The largest steps that an engine can ask of a group of layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fi_backend import Capacity

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class StepLimits:
    """What a group must be planned for.

    Attributes:
        general: any step.
        decode: steps in which every request decodes or verifies drafted tokens.
    """

    general: Capacity
    decode: Capacity

    @classmethod
    def of(cls, vllm_config: VllmConfig, attention_chunk_size: int | None = None) -> StepLimits:
        """Return the limits that an engine's configuration sets.

        Args:
            vllm_config: of the engine.
            attention_chunk_size: tokens of a chunk of local attention; None: not local.
        """
        scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
        requests, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
        # Drafting appends up to this many tokens to every request, past the scheduler's budget.
        tokens += requests * (drafts + 1)
        kv_len = max(model.max_model_len + drafts + 1, scheduler.max_num_encoder_input_tokens)
        if attention_chunk_size:
            # vLLM cuts requests at multiples of the chunk and passes the pieces as requests: at
            # most two partial pieces each, and the whole ones.
            requests = 2 * requests + tokens // attention_chunk_size
        # A verified request has its last token and the drafted ones.
        decode = Capacity(requests, requests * (drafts + 1), kv_len, max_q_len=drafts + 1)
        return cls(Capacity(requests, tokens, kv_len), decode)

    def with_sharing(self) -> StepLimits:
        """Return the limits of planners that look for shared prefixes.

        Where one graph serves all steps, the general plan has every request verify drafted tokens:
        it holds as many shared rows as the decode plan.
        """
        decode = self.decode.with_sharing()
        general = replace(
            self.general,
            max_nodes=decode.max_nodes,
            max_links=decode.max_links,
            max_shared_tokens=decode.max_shared_tokens,
        )
        return StepLimits(general, decode)
