"""Engines that must not start with our attention, and say why."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_engines import Engine

from e2e_bench.demo.tiny_models import MODELS
from fi_backend import Unsupported

CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "e5m2 cache": (
        "llama",
        {"kv_cache_dtype": "fp8_e5m2"},
        ["kv_cache_dtype: expected one of auto, float16, bfloat16, fp8, fp8_e4m3, got fp8_e5m2"],
    ),
    "small heads and a bf16 cache beside fp32": (
        "llama-head16",
        {"kv_cache_dtype": "bfloat16"},
        ["head_dim_qk: expected a multiple of 8 from 32 to 256, got 16", "kv_dtype: expected"],
    ),
    "KV connector": (
        "llama",
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        ["use_kv_connector: expected False"],
    ),
    "multi-head latent attention": (
        "deepseek",
        {},
        ["use_mla: expected False (multi-head latent attention is not served), got True"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_engine_refuses_to_start(name: str) -> None:
    model, options, reasons = CASES[name]
    assert model in MODELS
    with (
        pytest.raises(Unsupported, match="attention_backend: expected a layer that fi_b") as error,
        Engine(model, "CUSTOM", **options),
    ):
        pass
    for reason in reasons:
        assert reason in str(error.value)
    assert "leave --attention-backend unset to keep vLLM's own" in str(error.value)
