"""What is run and what is compared: engines as data, and which of them must agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS, FA3, TRITON = "fi", "fa3", "triton"

# Small steps, so that long prompts are prefilled in chunks; few captured sizes.
OPTIONS: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "context_length": 4096,
    "max_total_tokens": 65536,
    "max_running_requests": 32,
    "chunked_prefill_size": 512,
    "cuda_graph_max_bs_decode": 32,
    "mem_fraction_static": 0.1,
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "skip_tokenizer_init": True,
    "random_seed": 0,
}
EAGER = {"disable_cuda_graph": True}
DRAFTING = {
    "speculative_algorithm": "STANDALONE",
    "speculative_num_steps": 3,
    "speculative_draft_attention_backend": TRITON,
}
CHAINS = {"speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
TREES = {"speculative_eagle_topk": 2, "speculative_num_draft_tokens": 6}


@dataclass(frozen=True)
class Run:
    """One engine and all that it is asked.

    Attributes:
        name: unique.
        model: of ``e2e_bench.vllm_gpu.models``.
        backend: SGLang's name of the attention backend; None: the options name two.
        options: further arguments of sglang.Engine.
        drafts: whether the model drafts for itself.
    """

    name: str
    model: str
    backend: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    drafts: bool = False

    def engine_options(self) -> dict[str, Any]:
        """Return the arguments of sglang.Engine but the models."""
        chosen = {} if self.backend is None else {"attention_backend": self.backend}
        return {**OPTIONS, **chosen, **self.options}


@dataclass(frozen=True)
class Case:
    """Two runs that must agree up to rounding.

    Attributes:
        ours: run under test.
        noise: two runs of other backends, whose difference is what rounding does to this model;
            the first is the reference.
        shows: counts of ``ours`` that must be positive: evidence that the case is what it says.
    """

    ours: Run
    noise: tuple[Run, Run]
    shows: tuple[str, ...] = ("steps", "forwards")


GRAPHS = ("steps", "forwards", "decode_steps", "graph_steps")
# Where a model drafts, every step after the prompt verifies drafts.
DRAFTS = ("steps", "forwards", "verify_steps", "graph_steps")


def cases() -> list[Case]:
    """Return all cases, the most telling first."""
    llama = "gpu-llama"
    plain = (Run("llama fa3", llama, FA3), Run("llama triton", llama, TRITON))
    narrow = {"kv_cache_dtype": "fp8_e4m3"}

    def ours(name: str, shows: tuple[str, ...] = GRAPHS, **options: Any) -> Case:
        return Case(Run(name, llama, OURS, options), plain, shows)

    found = [
        ours("llama", (*GRAPHS, "saved_kv_tokens")),
        ours("llama pages of 16, mixed", page_size=16, enable_mixed_chunk=True),
        ours("llama eager", ("steps", "forwards"), **EAGER),
        Case(
            Run("llama trees", llama, OURS, DRAFTING | TREES, drafts=True),
            plain,
            DRAFTS,
        ),
        Case(
            Run("llama chains", llama, OURS, DRAFTING | CHAINS, drafts=True),
            plain,
            DRAFTS,
        ),
        Case(
            Run("llama fp8", llama, OURS, narrow),
            # Triton reads the step's own tokens as they were before they were rounded.
            (plain[0], Run("llama fp8 fa3", llama, FA3, narrow)),
            GRAPHS,
        ),
        ours("llama no overlap", disable_overlap_schedule=True),
    ]
    for prefill, decode in ((FA3, OURS), (OURS, FA3)):
        both = {"prefill_attention_backend": prefill, "decode_attention_backend": decode}
        found.append(Case(Run(f"llama {prefill} {decode}", llama, None, both), plain))
    for model in ("gemma2", "gemma3"):
        stock = (Run(f"{model} triton", model, TRITON), Run(f"{model} fa3", model, FA3))
        found.append(Case(Run(model, model, OURS), stock, GRAPHS))
    return found
