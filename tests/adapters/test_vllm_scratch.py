"""Scratch memory of a GPU: shared by layers and planners, large enough, freed with the layers."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_layers import Layer, vllm_config, vllm_layer

from fi_backend import CAUSAL, Capacity, HeadShape, LayerClass, StepPlanner, workspace_size
from fi_backend.integrations.vllm import impl, scratch
from fi_backend.integrations.vllm.limits import StepLimits

CPU = torch.device("cpu")
SMALL = LayerClass(HeadShape(4, 2, 32), torch.float32)
LARGE = LayerClass(HeadShape(16, 2, 128), torch.float32)


def limits(**scheduler: int) -> StepLimits:
    return StepLimits.of(vllm_config([], torch.float32, **scheduler))


def test_limits_of_an_engine() -> None:
    config = vllm_config([], torch.float32, max_num_seqs=8, max_num_batched_tokens=256)
    plain = StepLimits.of(config)
    assert (plain.general.max_requests, plain.general.max_tokens) == (8, 264)
    assert (plain.decode.max_tokens, plain.decode.max_q_len) == (8, 1)
    config.speculative_config = SimpleNamespace(num_speculative_tokens=3)
    drafting = StepLimits.of(config)
    assert (drafting.decode.max_tokens, drafting.decode.max_q_len) == (32, 4)
    assert drafting.general.max_kv_len == drafting.decode.max_kv_len == 512 + 4
    assert StepLimits.of(config, attention_chunk_size=32).decode.max_requests == 2 * 8 + 288 // 32


def test_layers_share_one_workspace_that_holds_the_largest() -> None:
    small = scratch.reserve_scratch(CPU, [SMALL], limits())
    first = small.workspace
    assert scratch.reserve_scratch(CPU, [SMALL], limits()) is small and small.workspace is first
    assert scratch.reserve_scratch(CPU, [LARGE], limits()) is small
    assert small.workspace is not first, "it was too small"
    last = small.workspace
    scratch.reserve_scratch(CPU, [SMALL], limits())
    assert small.workspace is last
    plain, shared = limits(), limits().with_sharing()
    scratch.reserve_scratch(CPU, [LARGE], shared)
    assert small.workspace is not last, "shared rows have partial states"
    last = small.workspace
    for layer_class in (SMALL, LARGE):
        for capacity in (plain.general, plain.decode, shared.general, shared.decode):
            size = workspace_size([layer_class], capacity)
            assert last.size | size == last.size
            assert StepPlanner([layer_class], capacity, workspace=last).workspace is last


def test_batch_invariance_costs_little_however_long_a_request_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every query token may need a partial state for each cut: at most 16."""
    assert scratch.invariant_chunk(1 << 17) == 0
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert [scratch.invariant_chunk(n) for n in (100, 8192, 8193, 131072)] == [
        *(512, 512, 1024, 8192)
    ]
    layer = LayerClass(HeadShape(32, 8, 128), torch.bfloat16)
    sizes = [
        workspace_size(
            [layer],
            Capacity(256, 8192, length),
            torch.device("cuda"),
            batch_invariant_chunk=scratch.invariant_chunk(length),
        ).num_bytes
        for length in (8192, 131072)
    ]
    assert sizes[0] == sizes[1] < 2.2 * (1 << 30)


def test_it_is_freed_with_the_layers_of_its_engine() -> None:
    held = scratch.reserve_scratch(CPU, [SMALL], limits())
    assert scratch._by_device.get(CPU) is held
    del held
    gc.collect()
    assert scratch._by_device.get(CPU) is None


def test_overlapping_micro_batches_do_not_share() -> None:
    config = vllm_config([], torch.float32)
    config.parallel_config.use_ubatching = True
    gpu = torch.device("cuda", 0)
    assert scratch.shared_workspace(gpu, config, [SMALL], limits()) is None
    assert scratch.shared_workspace(CPU, config, [SMALL], limits()) is None


def test_a_layer_on_a_gpu_reserves_when_it_is_constructed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(impl, "current_platform", SimpleNamespace(device_type="cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    config = vllm_config([], torch.bfloat16)
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: config)

    def record(*arguments: Any) -> str:
        asked.append(arguments)
        return "scratch"

    monkeypatch.setattr(impl, "reserve_scratch", record)
    layer = vllm_layer(Layer(head_size=64))
    expected = LayerClass(HeadShape(4, 2, 64), torch.bfloat16, band=CAUSAL)
    shared = StepLimits.of(config).with_sharing()
    assert asked.pop() == (torch.device("cuda", 1), [expected], shared)
    assert layer.impl._scratch == "scratch", "the layer keeps it alive"
    monkeypatch.setenv("FI_SHARING", "0")
    Layer(head_size=64).impl()
    assert asked.pop()[2] == StepLimits.of(config)
    monkeypatch.delenv("FI_SHARING")
    Layer(head_size=64, sliding_window=9).impl()
    assert asked.pop()[2] == StepLimits.of(config)


def test_a_layer_on_the_cpu_reserves_nothing() -> None:
    assert vllm_layer(Layer()).impl._scratch is None
