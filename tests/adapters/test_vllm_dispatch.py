"""The choice of a plan against vLLM's own dispatchers: the same at capture and at every replay."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from fi_backend.integrations.vllm.graphs import takes_decode_plan

MAX_REQUESTS = 8
SIZES = [1, 2, 4, 8, 16, 24, 32]
FULL_MODES = [
    CUDAGraphMode.FULL,
    CUDAGraphMode.FULL_DECODE_ONLY,
    CUDAGraphMode.FULL_AND_PIECEWISE,
]


@pytest.mark.parametrize(
    ("mode", "max_query_len", "expected"),
    [
        (CUDAGraphMode.FULL_AND_PIECEWISE, 1, True),
        (CUDAGraphMode.FULL_AND_PIECEWISE, 3, True),
        (CUDAGraphMode.FULL_AND_PIECEWISE, 4, False),
        (CUDAGraphMode.FULL_DECODE_ONLY, 3, True),
        (CUDAGraphMode.PIECEWISE, 3, True),
        (CUDAGraphMode.NONE, 3, True),
        (None, 4, False),
        # One graph of 8 tokens is captured with 8 requests and replays one prefill of 8.
        (CUDAGraphMode.FULL, 1, False),
    ],
)
def test_which_plan(mode: CUDAGraphMode | None, max_query_len: int, expected: bool) -> None:
    assert takes_decode_plan(mode, max_query_len, longest=3) is expected


def config(mode: CUDAGraphMode, drafts: int) -> Any:
    """The parts of VllmConfig that the dispatchers read."""
    compilation = SimpleNamespace(
        cudagraph_capture_sizes=SIZES,
        max_cudagraph_capture_size=SIZES[-1],
        cudagraph_mode=mode,
        compile_sizes=None,
        is_attention_compiled_piecewise=lambda: True,
    )
    return SimpleNamespace(
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQUESTS),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        speculative_config=None,
        lora_config=None,
        num_speculative_tokens=drafts,
    )


# How a graph was captured, as far as builders are told: its longest query; None: no full graph.
Dispatch = Callable[[list[int]], int | None]


def runner_v2(monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode, drafts: int) -> Dispatch:
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    pool = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", pool)
    device = torch.device("cpu")
    manager = cudagraph_utils.CudaGraphManager(config(mode, drafts), device, mode, 1 + drafts)
    manager._graphs_captured = True
    buffers = InputBuffers(MAX_REQUESTS, SIZES[-1], device)

    def dispatch(q_lens: list[int]) -> int | None:
        uniform = q_lens[0] if len(set(q_lens)) == 1 else None
        found = manager.dispatch(len(q_lens), sum(q_lens), uniform, 0)
        if found.cg_mode is not CUDAGraphMode.FULL:
            return None
        dummy = InputBatch.make_dummy(found.num_reqs or 0, found.num_tokens, buffers)
        return int(dummy.num_scheduled_tokens.max())

    return dispatch


def runner_v1(monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode, drafts: int) -> Dispatch:
    dispatcher = CudagraphDispatcher(config(mode, drafts))
    dispatcher.initialize_cudagraph_keys(mode, 1 + drafts)

    def dispatch(q_lens: list[int]) -> int | None:
        # GPUModelRunner._is_uniform_decode, and the longest query that _dummy_run names.
        is_uniform = set(q_lens) == {1 + drafts}
        found, descriptor = dispatcher.dispatch(sum(q_lens), is_uniform)
        if found is not CUDAGraphMode.FULL:
            return None
        return 1 + drafts if descriptor.uniform else descriptor.num_tokens

    return dispatch


@pytest.mark.parametrize("runner", [runner_v1, runner_v2])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("mode", FULL_MODES, ids=lambda mode: mode.name)
def test_capture_and_replay_choose_the_same_plan(
    monkeypatch: pytest.MonkeyPatch, runner: Any, drafts: int, mode: CUDAGraphMode
) -> None:
    dispatch = runner(monkeypatch, mode, drafts)
    sizes = [size for size in SIZES if drafts == 0 or size % (1 + drafts) == 0]
    draw, replayed = random.Random(11), 0
    for _ in range(3000):
        count = draw.randint(1, MAX_REQUESTS)
        longest = draw.choice([1, 1 + drafts, 1 + drafts, 9])
        uniform = draw.random() < 0.5
        q_lens = [longest if uniform else draw.randint(1, longest) for _ in range(count)]
        if sum(q_lens) > sizes[-1]:
            continue
        captured_with = dispatch(q_lens)
        if captured_with is None:
            continue
        replayed += 1
        at_capture = takes_decode_plan(mode, captured_with, 1 + drafts)
        assert takes_decode_plan(mode, max(q_lens), 1 + drafts) is at_capture, q_lens
    assert replayed > 300
