"""vLLM engines inside the test process, one at a time, and what they are asked."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from e2e_bench.demo import tiny_models
from fi_backend.integrations import vllm as adapter

# Small steps, so that prompts of a few hundred tokens are prefilled in chunks.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "disable_log_stats": False,
}
Tokens = list[list[int]]


def random_prompt(length: int, seed: int | str) -> list[int]:
    """Token ids, none of them the end of text."""
    return [1 + random.Random(f"{seed}-{i}").randrange(2000) for i in range(length)]


class Engine:
    """A model in an engine, a context manager: engines of one process must not overlap."""

    def __init__(self, model: str, backend: str | None = None, **options: Any) -> None:
        if backend is not None:
            options["attention_backend"] = backend
        folder = tiny_models.make(model, tiny_models.cache_folder())
        adapter.reset_stats()
        try:
            self.llm = LLM(str(folder), **(OPTIONS | options))
        except BaseException:
            clean_up()
            raise

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        """The outputs of prompts that are all in flight together; greedy unless told otherwise."""
        options = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | sampling
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return self.llm.generate(requests, SamplingParams(**options), use_tqdm=False)

    def tokens(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> Tokens:
        """Their token ids, all samples of a prompt one after the other."""
        outputs = self.generate(prompts, **sampling)
        return [list(sample.token_ids) for output in outputs for sample in output.outputs]

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Log-probability of every prompt token given those before it: float32 [tokens]."""
        outputs = self.generate(prompts, max_tokens=1, prompt_logprobs=0)
        values = [
            entry[token].logprob
            for output in outputs
            for token, entry in zip(
                output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
            )
        ]
        return torch.tensor(values)

    def counter(self, name: str) -> float:
        """One of vLLM's own counters."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        clean_up()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clean_up() -> None:
    """Forget an engine so far that the next one can start."""
    gc.collect()
    cleanup_dist_env_and_memory()


def mixed_prompts(engine: Engine) -> Tokens:
    return engine.tokens([random_prompt(n, seed=1) for n in (5, 33, 64, 2, 130, 17, 300, 9)])


def one_token_and_page_edges(engine: Engine) -> Tokens:
    return engine.tokens([random_prompt(n, seed=2) for n in (1, 1, 127, 128, 129, 31, 32, 255)])


def long_prompt(engine: Engine) -> Tokens:
    return engine.tokens([random_prompt(1900, seed=3)], max_tokens=40)


def prefix_cache_hits(engine: Engine) -> Tokens:
    shared = random_prompt(700, seed=4)
    first = engine.tokens([shared])
    # The prompt itself, continuations of several lengths, and one that leaves it half way. Models
    # with windows keep a prefix's last blocks only and cannot hit the latter.
    tails = [[], *(random_prompt(n, seed=40 + n) for n in (1, 60, 500))]
    prompts = [shared + tail for tail in tails] + [shared[:300] + random_prompt(40, seed=41)]
    outputs = engine.generate(prompts)
    cached = [output.num_cached_tokens for output in outputs]
    assert min(cached[: len(tails)]) >= 640, f"no prefix cache hits: {cached}"
    return first + [list(output.outputs[0].token_ids) for output in outputs]


def shared_groups(engine: Engine) -> Tokens:
    """Three groups in flight, each with a prefix of its own behind one that all have."""
    system, prompts = random_prompt(270, seed=7), []
    for group in range(3):
        prefix = system + random_prompt(140 * group, seed=70 + group)
        prompts += [prefix + random_prompt(3 + 20 * i, seed=f"{group}-{i}") for i in range(4)]
    return engine.tokens(prompts, max_tokens=24)


def chunked_prefill_beside_decodes(engine: Engine) -> Tokens:
    prompts = [random_prompt(1300, seed=5)] + [random_prompt(12, seed=50 + i) for i in range(6)]
    return engine.tokens(prompts, max_tokens=24)


def thirty_two_in_flight(engine: Engine) -> Tokens:
    stem = random_prompt(200, seed=6)
    return engine.tokens([stem + random_prompt(3 + i, seed=60 + i) for i in range(32)])


WORKLOADS: dict[str, Callable[[Engine], Tokens]] = {
    "mixed prompts": mixed_prompts,
    "one token, page edges": one_token_and_page_edges,
    "long prompt": long_prompt,
    "prefix cache hits": prefix_cache_hits,
    "shared groups": shared_groups,
    "chunked prefill beside decodes": chunked_prefill_beside_decodes,
    "32 in flight": thirty_two_in_flight,
}
