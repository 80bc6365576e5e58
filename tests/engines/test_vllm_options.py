"""Engine options around attention: page sizes, dtypes, drafting, a full cache, aborted requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm_engines import (
    Engine,
    Tokens,
    chunked_prefill_beside_decodes,
    mixed_prompts,
    random_prompt,
    shared_groups,
)

from e2e_bench.demo import tiny_models
from fi_backend.integrations import vllm as adapter


@pytest.fixture(scope="module")
def expected() -> dict[str, Tokens]:
    """What vLLM's own attention says, one engine for all tests of this file."""
    with Engine("llama") as stock:
        return {
            "mixed": mixed_prompts(stock),
            "chunked": chunked_prefill_beside_decodes(stock),
            "crowd": stock.tokens(CROWD, max_tokens=60),
            "groups": shared_groups(stock),
            "crowded groups": stock.tokens(CROWDED_GROUPS, max_tokens=24),
        }


CROWD = [random_prompt(100 + 7 * i, seed=80 + i) for i in range(12)]
# In pages of 32: three prefixes of six pages, and twelve times about three pages.
CROWDED_GROUPS = [
    random_prompt(200, seed=180 + i % 3) + random_prompt(10 + 3 * i, seed=190 + i)
    for i in range(12)
]


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16},
        {"block_size": 24},
        {"attention_backend": "FI_BACKEND"},
        {"enable_prefix_caching": False},
    ],
    ids=["pages of 16", "pages of 24", "our own name", "no prefix cache"],
)
def test_tokens_do_not_depend_on(options: dict[str, Any], expected: dict[str, Tokens]) -> None:
    with Engine("llama", **({"attention_backend": "CUSTOM"} | options)) as ours:
        assert mixed_prompts(ours) == expected["mixed"]
        assert chunked_prefill_beside_decodes(ours) == expected["chunked"]
        assert adapter.stats().forwards > 0


def test_verification_of_drafted_tokens(expected: dict[str, Tokens]) -> None:
    drafting = {
        "method": "draft_model",
        "model": str(tiny_models.make("llama", tiny_models.cache_folder())),
        "num_speculative_tokens": 3,
    }
    with Engine("llama", "CUSTOM", speculative_config=drafting) as ours:
        assert mixed_prompts(ours) == expected["mixed"]
        assert shared_groups(ours) == expected["groups"]
        accepted = ours.counter("vllm:spec_decode_num_accepted_tokens")
        drafted = ours.counter("vllm:spec_decode_num_draft_tokens")
        stats = adapter.stats()
    assert accepted > 0.8 * drafted > 0, "the model drafts for itself"
    assert stats.planned_tokens > stats.planned_requests, "no request had several query tokens"
    assert stats.saved_kv_tokens > 0, "drafted tokens are verified against shared prefixes"


def test_sharing_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, expected: dict[str, Tokens]
) -> None:
    monkeypatch.setenv("FI_SHARING", "0")
    with Engine("llama", "CUSTOM") as ours:
        assert shared_groups(ours) == expected["groups"]
        stats = adapter.stats()
    assert stats.forwards > 0 and (stats.kv_tokens, stats.saved_kv_tokens) == (0, 0)


def test_samples_of_one_prompt_share_its_pages() -> None:
    prompts = [random_prompt(40, seed=70), random_prompt(300, seed=71)]
    samples = {}
    for backend in (None, "CUSTOM"):
        # vLLM cannot sample with seeds on the CPU when a prompt is prefilled in chunks.
        options = {"block_size": 32, "max_num_batched_tokens": 2048}
        with Engine("llama", backend, **options) as engine:
            samples[backend] = engine.tokens(prompts, n=4, seed=11, temperature=1.0)
    stats = adapter.stats()
    assert 0 < stats.planned_tokens < sum(4 * len(p) for p in prompts), "no page was shared"
    assert 2 * stats.saved_kv_tokens > stats.kv_tokens, "samples read their prompt once"
    assert len({tuple(sample) for sample in samples[None]}) == 8, "samples of one prompt differ"
    assert samples["CUSTOM"] == samples[None]


@pytest.fixture(scope="module")
def crowded(expected: dict[str, Tokens]) -> Iterator[Engine]:
    """An engine whose cache holds 1024 tokens: about half of what CROWD needs."""
    del expected  # its engine has stopped before this one starts
    options = {"block_size": 32, "num_gpu_blocks_override": 33, "max_model_len": 512}
    with Engine("llama", "CUSTOM", **options) as ours:
        yield ours


def test_a_full_cache_preempts_and_recovers(crowded: Engine, expected: dict[str, Tokens]) -> None:
    adapter.reset_stats()
    before = crowded.counter("vllm:num_preemptions")
    assert crowded.tokens(CROWD, max_tokens=60) == expected["crowd"]
    assert crowded.counter("vllm:num_preemptions") > before, "the cache was not full"
    assert adapter.stats().forwards > 0


def test_prefixes_come_and_go_in_a_full_cache(crowded: Engine, expected: dict[str, Tokens]) -> None:
    adapter.reset_stats()
    before = crowded.counter("vllm:num_preemptions")
    for _ in range(2):
        assert crowded.tokens(CROWDED_GROUPS, max_tokens=24) == expected["crowded groups"]
        crowded.tokens(CROWD[:6], max_tokens=2)  # takes the pages of the prefixes
    assert crowded.counter("vllm:num_preemptions") > before, "the cache was not full"
    assert adapter.stats().saved_kv_tokens > 0


def test_aborted_requests_leave_the_others_right(
    crowded: Engine, expected: dict[str, Tokens]
) -> None:
    engine = crowded.llm.llm_engine
    greedy = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for i, prompt in enumerate(CROWD):
        engine.add_request(f"crowd-{i}", {"prompt_token_ids": prompt}, greedy)
    finished: dict[str, list[int]] = {}
    for step in range(2000):
        if step in (3, 20):  # one in its prefill or waiting, one in the middle of its decodes
            engine.abort_request([f"crowd-{step % 7}"])
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        if not engine.has_unfinished_requests():
            break
    others = [i for i in range(len(CROWD)) if i not in (3, 20 % 7)]
    assert {i: finished[f"crowd-{i}"] for i in others} == {i: expected["crowd"][i] for i in others}


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}],
    ids=["bf16", "bf16 with an fp8 cache"],
)
def test_narrow_dtypes_lose_no_more_than_vllms_own(options: dict[str, str]) -> None:
    """Rounding changes tokens, so compare every prompt token's log-probability with fp32's.

    vLLM's own kernel has fp8 caches where the CPU has AVX-512. Elsewhere its bf16 is what ours is
    compared with: there, e4m3 was seen to lose four times as much.
    """
    own, margin = options, 2
    if "kv_cache_dtype" in options and not torch.cpu._is_avx512_supported():
        own, margin = {"dtype": "bfloat16"}, 8
    prompts = [random_prompt(900, seed=95), random_prompt(200, seed=96)]
    with Engine("gemma2") as exact:
        truth = exact.prompt_logprobs(prompts)
    errors: dict[str | None, torch.Tensor] = {}
    for backend, dtypes in ((None, own), ("CUSTOM", options)):
        with Engine("gemma2", backend, **dtypes) as engine:
            errors[backend] = (engine.prompt_logprobs(prompts) - truth).abs()
    assert adapter.stats().forwards > 0
    assert errors["CUSTOM"].mean() <= margin * errors[None].mean()
    assert errors["CUSTOM"].max() <= margin * errors[None].max()
