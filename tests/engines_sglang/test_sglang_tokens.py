"""Greedy tokens through our attention equal those of SGLang's torch_native."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_engines import OPTIONS, REFERENCE, WORKLOADS, Engine, Tokens, random_prompt
from transformers import AutoModelForCausalLM

from e2e_bench.demo import tiny_models


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


def test_bf16_loses_no_more_than_in_torch_native() -> None:
    """Rounding changes tokens, so compare every prompt token's log-probability with fp32's."""
    prompt = random_prompt(700, seed=95)
    folder = tiny_models.make("llama", tiny_models.cache_folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    truth = logits.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    errors = {}
    for backend in (REFERENCE, "fi"):
        with Engine("llama", backend, dtype="bfloat16") as engine:
            errors[backend] = (torch.tensor(engine.prompt_logprobs(prompt)) - truth).abs()
            assert bool(engine.stats()) is (backend == "fi")
    assert 0 < errors["fi"].mean() <= 2 * errors[REFERENCE].mean()
    assert errors["fi"].max() <= 2 * errors[REFERENCE].max()


def test_an_engine_that_cannot_be_served_says_why(tmp_path: Path) -> None:
    """In a session of its own: SGLang ends all processes where a scheduler does not start."""
    folder = tiny_models.make("llama-head16", tiny_models.cache_folder())
    options = OPTIONS | {"model_path": str(folder), "attention_backend": "fi"}
    script = tmp_path / "script.py"
    code = f"import sglang\nif __name__ == '__main__':\n    sglang.Engine(**{options})\n"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        start_new_session=True,
    )
    assert done.returncode != 0
    expected = (
        "attention_backend: expected a model that fi_backend serves, got head_dim_qk: expected a "
        "multiple of 8 from 32 to 256, got 16; pad the head dimension with zeros; choose one of "
        "SGLang's own with --attention-backend"
    )
    assert expected in done.stdout + done.stderr
