"""What is run and what is compared: engines as data, and which of them must agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS, FA, TRITON = "CUSTOM", "FLASH_ATTN", "TRITON_ATTN"

# Small steps, so that long prompts are prefilled in chunks; few sizes, so that graphs are captured
# quickly; a fixed cache, so that engines beside each other on one GPU do not disturb vLLM's
# memory profiling.
OPTIONS: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 1 << 31,
    "disable_log_stats": False,
    "seed": 0,
}
GRAPH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


@dataclass(frozen=True)
class Run:
    """One engine and all that it is asked.

    Attributes:
        name: unique.
        model: of ``tiny_models``.
        backend: vLLM's name of the attention backend.
        graphs: CUDAGraphMode; "NONE": eager, without torch.compile too.
        options: further arguments of vllm.LLM.
        environment: further environment variables.
        workloads: names of ``engine.WORKLOADS`` or ``engine.SHARING``; empty: all of the former.
        logprobs: whether log-probabilities are asked for.
        alone: must not share the GPU with another run.
        gpus: how many it needs.
    """

    name: str
    model: str
    backend: str
    graphs: str = "NONE"
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    workloads: tuple[str, ...] = ()
    logprobs: bool = True
    alone: bool = False
    gpus: int = 1

    def engine_options(self) -> dict[str, Any]:
        """Return the arguments of vllm.LLM but the model."""
        options = {**OPTIONS, "attention_backend": self.backend, **self.options}
        if self.graphs == "NONE":
            return options | {"enforce_eager": True}
        compilation = {"cudagraph_mode": self.graphs, "cudagraph_capture_sizes": GRAPH_SIZES}
        return options | {"compilation_config": compilation}


@dataclass(frozen=True)
class Case:
    """Two runs that must agree up to rounding.

    Attributes:
        ours: run under test.
        reference: what it is compared with.
        noise: two runs of other backends, whose difference is what rounding does to this model.
        else_noise: taken instead where one of the former fails.
        shows: counts of ``ours`` that must be positive: evidence that the case is what it says.
        hides: counts of ``ours`` that must be zero.
    """

    ours: Run
    reference: Run
    noise: tuple[Run, Run]
    shows: tuple[str, ...] = ("steps", "forwards")
    else_noise: tuple[Run, Run] | None = None
    hides: tuple[str, ...] = ()


DECODE_GRAPHS = ("steps", "forwards", "decode_steps")
SAVED = ("steps", "forwards", "saved_kv_tokens")
SHARING = ("shared groups", "samples", "crowded groups")
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}
# A cache of about half of what the workload needs.
FULL_CACHE = {"num_gpu_blocks_override": 81, "max_model_len": 1024}


def _pair(
    name: str, model: str, graphs: str = "NONE", workloads: tuple[str, ...] = ()
) -> tuple[Run, Run]:
    """Two backends of vLLM on one model."""
    fa = Run(f"{name} fa", model, FA, graphs, workloads=workloads)
    return fa, Run(f"{name} triton", model, TRITON, graphs, workloads=workloads)


def cases() -> list[Case]:
    """Return all cases of one GPU, the most telling first, and one of two GPUs."""
    llama = "gpu-llama"
    plain = _pair("llama", llama)
    fp8, fp16 = {"kv_cache_dtype": "fp8"}, {"dtype": "float16"}
    both = "FULL_AND_PIECEWISE"
    found = [
        Case(Run("llama", llama, OURS, both), plain[0], plain, DECODE_GRAPHS),
        Case(Run("llama FULL", llama, OURS, "FULL"), plain[0], plain),
        Case(Run("llama eager", llama, OURS), plain[0], plain),
        Case(
            Run(
                "llama ngram",
                llama,
                OURS,
                both,
                {"speculative_config": NGRAM},
                workloads=("every token", "mixed", "chunked"),
                logprobs=False,
            ),
            plain[0],
            plain,
            (*DECODE_GRAPHS, "drafted"),
        ),
        Case(
            Run("llama full cache", llama, OURS, both, FULL_CACHE, workloads=("crowd",)),
            plain[0],
            plain,
            (*DECODE_GRAPHS, "preemptions"),
        ),
        Case(
            Run("llama fp8", llama, OURS, both, fp8),
            plain[0],
            (plain[0], Run("llama fp8 triton", llama, TRITON, options=fp8)),
            DECODE_GRAPHS,
        ),
    ]
    found += _sharing_cases(llama)
    # Windows with soft caps, with sinks, alone. Triton serves all of it in every build of vLLM, FA3
    # caps and sinks in most.
    for model in ("gemma2", "gemma3"):
        fa, triton = _pair(model, model)
        ours = Run(model, model, OURS, both)
        found.append(Case(ours, triton, (triton, fa), DECODE_GRAPHS, else_noise=plain))
    # Experts are chosen by a narrow margin: what torch.compile rounds otherwise must be the same on
    # both sides.
    for name, graphs in (("gptoss eager", "NONE"), ("gptoss", both)):
        fa, triton = _pair(name, "gpu-gptoss", graphs)
        ours = Run(name, "gpu-gptoss", OURS, graphs)
        shows = DECODE_GRAPHS if graphs == both else ("steps", "forwards")
        found.append(Case(ours, triton, (triton, fa), shows))
    found += [
        # The packed FA3 is bf16 only: the noise is that of another backend in the same dtype.
        Case(
            Run("llama fp16", llama, OURS, both, fp16),
            plain[0],
            (plain[0], Run("llama fp16 triton", llama, TRITON, options=fp16)),
            DECODE_GRAPHS,
        ),
        Case(
            Run(
                "llama runner V1, memory profiled",
                llama,
                OURS,
                both,
                {"kv_cache_memory_bytes": None},
                {"VLLM_USE_V2_MODEL_RUNNER": "0"},
                alone=True,
            ),
            plain[0],
            plain,
            DECODE_GRAPHS,
        ),
        Case(
            Run(
                "llama two GPUs",
                llama,
                OURS,
                both,
                {"tensor_parallel_size": 2},
                {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
                alone=True,
                gpus=2,
            ),
            plain[0],
            plain,
            DECODE_GRAPHS,
        ),
    ]
    return found


def _sharing_cases(model: str) -> list[Case]:
    """Return cases whose requests share prefixes, found by the engine or not looked for."""
    pair, both = _pair("llama shared", model, workloads=SHARING), "FULL_AND_PIECEWISE"
    ngram, runner_v1 = {"speculative_config": NGRAM}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    crowded, greedy = ("crowded groups",), ("shared groups",)

    def ours(name: str, graphs: str = both, **fields: Any) -> Run:
        return Run(name, model, OURS, graphs, **({"workloads": SHARING} | fields))

    full_cache = ours("llama shared full cache", options=FULL_CACHE, workloads=crowded)
    drafting = ours("llama shared ngram", options=ngram, workloads=greedy, logprobs=False)
    off = ours("llama shared off", environment={"FI_SHARING": "0"})
    return [
        Case(ours("llama shared"), pair[0], pair, (*SAVED, "decode_steps")),
        Case(ours("llama shared FULL", "FULL"), pair[0], pair, SAVED),
        Case(full_cache, pair[0], pair, (*SAVED, "preemptions")),
        Case(drafting, pair[0], pair, (*SAVED, "drafted")),
        Case(ours("llama shared runner V1", environment=runner_v1), pair[0], pair, SAVED),
        Case(off, pair[0], pair, DECODE_GRAPHS, hides=("kv_tokens", "saved_kv_tokens")),
    ]
