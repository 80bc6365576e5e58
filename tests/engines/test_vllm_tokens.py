"""Greedy tokens through our attention equal those of vLLM's own CPU attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from vllm_engines import WORKLOADS, Engine, Tokens

from fi_backend.integrations import vllm as adapter

# Attention layers of each model: grouped heads; q/k norms; windows and soft caps; several KV cache
# groups; sinks; ALiBi; layers that share a cache; chunked local attention.
LAYERS = {
    "llama": 4,
    "qwen3": 4,
    "gemma2": 4,
    "gemma3": 4,
    "gptoss": 4,
    "bloom": 3,
    "gemma4": 6,
    "llama4": 4,
}


@dataclass
class Pair:
    """What vLLM's attention said, and the engine with ours."""

    model: str
    expected: dict[str, Tokens]
    ours: Engine


@pytest.fixture(scope="module", params=LAYERS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with Engine(request.param) as stock:
        expected = {name: workload(stock) for name, workload in WORKLOADS.items()}
    assert adapter.stats().forwards == 0, "the reference must not be ours"
    with Engine(request.param, "CUSTOM") as ours:
        yield Pair(request.param, expected, ours)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_tokens_equal_those_of_vllms_own_attention(pair: Pair, workload: str) -> None:
    adapter.reset_stats()
    tokens = WORKLOADS[workload](pair.ours)
    stats = adapter.stats()
    steps = stats.forwards / LAYERS[pair.model]
    assert steps >= len(tokens[0]), f"too few of our layers ran: {stats}"
    assert tokens == pair.expected[workload]
    if workload == "shared groups":
        assert stats.saved_kv_tokens > 0, f"layers without a window share: {stats}"
