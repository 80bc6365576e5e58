"""SGLang engines of small models on the CPU, one at a time, and what they are asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import sglang

from e2e_bench.demo import tiny_models

REFERENCE, OURS = "torch_native", "fi"
# Small steps, so that prompts of a few hundred tokens are prefilled in chunks.
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "context_length": 2048,
    "max_total_tokens": 8192,
    "max_running_requests": 16,
    "chunked_prefill_size": 256,
    "enable_mixed_chunk": True,
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.1,
    "skip_tokenizer_init": True,
    "log_level": "error",
}
Tokens = list[list[int]]


def random_prompt(length: int, seed: int | str) -> list[int]:
    """Token ids, none of them the end of text."""
    return [1 + random.Random(f"{seed}-{i}").randrange(2000) for i in range(length)]


class Engine:
    """A model in an engine of processes of its own, a context manager.

    Engines must not overlap: one that ends takes all processes that this one has started along.

    Attributes:
        cached_tokens: of each prompt of the last call, tokens found in the radix cache.
    """

    def __init__(self, model: str, backend: str = OURS, **options: Any) -> None:
        folder = tiny_models.make(model, tiny_models.cache_folder())
        if "prefill_attention_backend" not in options:
            options["attention_backend"] = backend
        self.engine = sglang.Engine(model_path=str(folder), **(OPTIONS | options))
        self.cached_tokens: list[int] = []

    def tokens(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 16) -> Tokens:
        """Greedy tokens of prompts that are all in flight together."""
        greedy = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        answers = self.engine.generate(
            input_ids=[list(prompt) for prompt in prompts], sampling_params=greedy
        )
        self.cached_tokens = [answer["meta_info"]["cached_tokens"] for answer in answers]
        return [list(answer["output_ids"]) for answer in answers]

    def heard(self, sounds: Sequence[bytes], max_new_tokens: int = 24) -> Tokens:
        """Greedy tokens of what a model hears, all of it in flight together."""
        greedy = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        answers = self.engine.generate(
            prompt=[""] * len(sounds), audio_data=list(sounds), sampling_params=greedy
        )
        return [list(answer["output_ids"]) for answer in answers]

    def prompt_logprobs(self, prompt: Sequence[int]) -> list[float]:
        """Log-probability of every token of a prompt but the first, given those before it."""
        answer = self.engine.generate(
            input_ids=[list(prompt)],
            sampling_params={"temperature": 0.0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
        return [entry[0] for entry in answer[0]["meta_info"]["input_token_logprobs"][1:]]

    def stats(self) -> dict[str, int]:
        """What our adapter counted in the scheduler's process; empty: it was not asked."""
        states = self.engine.get_server_info()["internal_states"]
        counts: dict[str, int] = states[0].get("fi_backend", {})
        return counts

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.shutdown()


def mixed_prompts(engine: Engine) -> Tokens:
    return engine.tokens([random_prompt(n, seed=1) for n in (5, 33, 64, 2, 130, 17, 300, 9)])


def page_edges(engine: Engine) -> Tokens:
    return engine.tokens([random_prompt(n, seed=2) for n in (1, 1, 15, 16, 17, 31, 32, 255)])


def prefix_hits(engine: Engine) -> Tokens:
    shared = random_prompt(500, seed=4)
    first = engine.tokens([shared])
    # The prompt itself, continuations of several lengths, and one that leaves it half way.
    prompts = [shared + random_prompt(n, seed=40 + n) for n in (0, 1, 60, 300)]
    found = engine.tokens([*prompts, shared[:300] + random_prompt(40, seed=41)])
    assert min(engine.cached_tokens[:-1]) >= 480, f"no hits: {engine.cached_tokens}"
    return first + found


def shared_groups(engine: Engine) -> Tokens:
    """Three groups in flight, each with a prefix of its own behind one that all have."""
    system, prompts = random_prompt(270, seed=7), []
    for group in range(3):
        prefix = system + random_prompt(140 * group, seed=70 + group)
        prompts += [prefix + random_prompt(3 + 20 * i, seed=f"{group}-{i}") for i in range(4)]
    return engine.tokens(prompts, max_new_tokens=24)


def chunks_beside_decodes(engine: Engine) -> Tokens:
    prompts = [random_prompt(12, seed=50 + i) for i in range(6)] + [random_prompt(1300, seed=5)]
    return engine.tokens(prompts, max_new_tokens=24)


WORKLOADS: dict[str, Callable[[Engine], Tokens]] = {
    "mixed prompts": mixed_prompts,
    "page edges": page_edges,
    "prefix hits": prefix_hits,
    "shared groups": shared_groups,
    "chunks beside decodes": chunks_beside_decodes,
}
