"""Encoder-only models: bidirectional attention over the step's own tokens, no KV cache."""

from __future__ import annotations

import torch
from vllm import LLM
from vllm_engines import clean_up, random_prompt

from e2e_bench.demo import tiny_models
from fi_backend.integrations import vllm as adapter

LENGTHS = (1, 2, 17, 128, 129, 300, 5)


def embeddings(backend: str | None) -> torch.Tensor:
    options = {} if backend is None else {"attention_backend": backend}
    folder = tiny_models.make("bert", tiny_models.cache_folder())
    llm = LLM(
        str(folder),
        runner="pooling",
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        **options,
    )
    adapter.reset_stats()
    prompts = [{"prompt_token_ids": random_prompt(n, seed=n)} for n in LENGTHS]
    outputs = llm.embed(prompts, use_tqdm=False)
    result = torch.tensor([output.outputs.embedding for output in outputs])
    llm.llm_engine.engine_core.shutdown()
    del llm
    clean_up()
    return result


def test_embeddings_equal_those_of_vllms_own_attention() -> None:
    expected = embeddings(None)
    assert adapter.stats().forwards == 0
    ours = embeddings("CUSTOM")
    stats = adapter.stats()
    assert (stats.forwards > 0, stats.appended_tokens) == (True, 0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
