"""Greedy tokens through our attention equal those of SGLang's torch_native."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sglang_engines import REFERENCE, WORKLOADS, Engine, Tokens


@dataclass(frozen=True)
class Case:
    """An engine with our attention.

    Attributes:
        model: of tiny_models; torch_native serves it too.
        layers: that are ours in every step.
        shares: layers without windows have prefixes to share.
        options: of the engine.
    """

    model: str
    layers: int = 4
    shares: bool = True
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("llama"),
    "llama, pages of 16": Case("llama", options={"page_size": 16}),
    "llama, prefill by torch_native": Case(
        "llama",
        options={"prefill_attention_backend": REFERENCE, "decode_attention_backend": "fi"},
    ),
    "llama, decode by torch_native": Case(
        "llama",
        options={"prefill_attention_backend": "fi", "decode_attention_backend": REFERENCE},
    ),
    "gemma3: windows": Case("gemma3"),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tokens]]:
    """Answers of torch_native by model and workload."""
    return {}


def answers(engine: Engine) -> dict[str, Tokens]:
    return {name: workload(engine) for name, workload in WORKLOADS.items()}


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, expected: dict[str, dict[str, Tokens]]
) -> Iterator[tuple[Case, Engine, dict[str, Tokens]]]:
    found = CASES[request.param]
    if found.model not in expected:
        with Engine(found.model, REFERENCE) as stock:
            expected[found.model] = answers(stock)
            assert stock.stats() == {}, "the reference must not be ours"
    with Engine(found.model, **found.options) as ours:
        yield found, ours, expected[found.model]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_tokens_equal_those_of_torch_native(
    case: tuple[Case, Engine, dict[str, Tokens]], workload: str
) -> None:
    found, ours, expected = case
    before = ours.stats()
    tokens = WORKLOADS[workload](ours)
    counts = {name: count - before[name] for name, count in ours.stats().items()}
    assert tokens == expected[workload]
    assert counts["forwards"] == counts["steps"] * found.layers > 0
    if workload == "shared groups":
        assert (counts["saved_kv_tokens"] > 0) is found.shares
