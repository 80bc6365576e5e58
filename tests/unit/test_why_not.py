"""why_not lists every reason, each in the error contract's sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fi_backend.formats import Band, HeadShape
from fi_backend.layers import Capacity, LayerClass
from fi_backend.planner import StepPlanner
from fi_backend.why_not import AttentionConfig, why_not

SERVED = AttentionConfig(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64)

SERVED_CASES = {
    "plain": {},
    "half precision": {"dtype": torch.float16},
    "bfloat16 with fp8 cache": {"dtype": torch.bfloat16, "kv_dtype": torch.float8_e4m3fn},
    "odd group": {"num_qo_heads": 7, "num_kv_heads": 1},
    "smallest and largest head": {"head_dim_qk": 256, "head_dim_vo": 32},
    "head dim 72": {"head_dim_qk": 72},
    "page of one token": {"page_size": 1},
    "odd page": {"page_size": 24},
    "window with sinks": {"band": Band.window(128, sink_prefix=4)},
    "features": {"features": frozenset({"sinks", "soft_cap"})},
}

# Change -> the sentence that it must bring.
REFUSED = {
    "device": (
        {"device": "cuda"},
        "device: expected cpu, got cuda; this version has the CPU engine only;"
        " keep the engine's own backend on this device",
    ),
    "no kv heads": (
        {"num_kv_heads": 0},
        "num_kv_heads: expected at least 1, got 0; pass the heads of one rank",
    ),
    "heads do not divide": (
        {"num_qo_heads": 6, "num_kv_heads": 4},
        "num_qo_heads: expected a positive multiple of num_kv_heads=4, got 6;"
        " pass the heads of one rank",
    ),
    "narrow head": (
        {"head_dim_qk": 24},
        "head_dim_qk: expected a multiple of 8 from 32 to 256, got 24;"
        " pad the head dimension with zeros",
    ),
    "ragged head": (
        {"head_dim_qk": 100},
        "head_dim_qk: expected a multiple of 8 from 32 to 256, got 100;"
        " pad the head dimension with zeros",
    ),
    "wide value head": (
        {"head_dim_vo": 264},
        "head_dim_vo: expected a multiple of 8 from 32 to 256, got 264;"
        " pad the head dimension with zeros",
    ),
    "double": (
        {"dtype": torch.float64},
        "dtype: expected float32 or float16 or bfloat16, got float64; convert q first",
    ),
    "mixed cache": (
        {"dtype": torch.float16, "kv_dtype": torch.bfloat16},
        "kv_dtype: expected float16 or float8_e4m3fn, got bfloat16;"
        " store the cache in the dtype of q or in float8_e4m3fn",
    ),
    "empty page": (
        {"page_size": 0},
        "page_size: expected at least 1 token, got 0; any positive size is served",
    ),
    "unknown feature": (
        {"features": frozenset({"mla", "sinks"})},
        "features: expected some of alibi, batch_invariant, lse, partial_states, shared_prefix,"
        " sinks, sliding_window, soft_cap, variant, got mla;"
        " keep the engine's own backend for these layers",
    ),
}


@pytest.mark.parametrize("change", SERVED_CASES.values(), ids=SERVED_CASES)
def test_served(change: dict[str, object]) -> None:
    assert why_not(replace(SERVED, **change)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    assert why_not(replace(SERVED, **change)) == [reason]  # type: ignore[arg-type]


def test_all_reasons_are_listed() -> None:
    config = replace(SERVED, device="cuda", num_qo_heads=3, head_dim_qk=8, dtype=torch.int8)
    arguments = [reason.split(":")[0] for reason in why_not(config)]
    assert arguments == ["device", "num_qo_heads", "head_dim_qk", "dtype"]


def test_config_of_a_layer_class() -> None:
    layer = LayerClass(HeadShape(8, 2, 64, 32), torch.float16, band=Band.window(16))
    assert AttentionConfig.of(layer, "cpu") == replace(
        SERVED, head_dim_vo=32, dtype=torch.float16, band=Band(15, 0)
    )


@pytest.mark.parametrize("head_dim", [32, 40, 256])
def test_the_planner_takes_what_is_served(head_dim: int) -> None:
    layer = LayerClass(HeadShape(4, 2, head_dim), torch.float32)
    assert why_not(AttentionConfig.of(layer, "cpu")) == []
    StepPlanner([layer], Capacity(1, 1, 16))
