"""The planner kernel on a GPU writes the host planner's bytes, whatever lay there before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from plan_batches import PlanCase, assert_same, plan_on_host, random_case
from torch import Tensor

from fi_backend import PagedBatch
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.plan_kernel import PlanKernel, scratch_bytes
from fi_backend.plan_records import KV_TOO_LONG, plan_arrays
from fi_backend.storage import PageTable

CUDA = torch.device("cuda")
FILL = 0xAB
BLOCK = 50  # random steps of a test
SERVING = PlanCase(
    "serving",
    heads=(32, 8),
    num_ctas=264,
    band=(-1, 0, 0),
    chunk=0,
    classes=[(16, 64, 40, 190), (64, 64, 160, 1240)],
    capacity=(1024, 8192, 131_072),
    num_requests=1024,
    qo_indptr=np.arange(1025, dtype=np.int32),
    kv_len=np.full(1024, 131_072, np.int32),
)
# With the costs of a GPU's tiles, those of one KV head fit in 32 bits.
NARROW = dataclasses.replace(
    SERVING,
    num_ctas=396,
    classes=[(16, 64, 290, 190), (64, 64, 220, 240), (128, 64, 150, 400)],
)


def kernels_of(test: str, arguments: Mapping[str, Any]) -> Iterator[DeviceKernel]:
    """The kernels of a test, for conftest to compile beforehand."""
    for seed in range(BLOCK) if "first" in arguments else ():
        config = random_case(arguments["first"] + seed).config()
        yield PlanKernel.device_kernel(config, config.layout())


def on_device(case: PlanCase) -> PagedBatch:
    table = PageTable.dense(torch.zeros(len(case.kv_len), 1, dtype=torch.int32, device=CUDA), 16)
    indptr, kv_len = torch.from_numpy(case.qo_indptr), torch.from_numpy(case.kv_len)
    return PagedBatch(indptr.to(CUDA), kv_len.to(CUDA), table)


def empty_plan(case: PlanCase) -> Tensor:
    num_bytes = case.config().layout().total_bytes
    return torch.full((num_bytes,), FILL, dtype=torch.uint8, device=CUDA)


def planner_of(case: PlanCase) -> PlanKernel:
    config = case.config()
    return PlanKernel(config, config.layout(), CUDA)


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def random_serving(seed: int, most_query_tokens: int, base: PlanCase = SERVING) -> PlanCase:
    """1,024 requests of up to 131,072 tokens within the capacity of `base`."""
    draw = Random(seed)
    kv = np.array([draw.randint(0, 131_072) for _ in range(1024)], np.int32)
    q = [draw.randint(0, min(int(k), most_query_tokens)) for k in kv]
    indptr = np.concatenate([[0], np.cumsum(q)]).astype(np.int32)
    return dataclasses.replace(base, name=f"serving-{seed}", qo_indptr=indptr, kv_len=kv)


@pytest.mark.parametrize("first", range(0, 400, BLOCK))
def test_random_steps_give_the_bytes_of_the_host(first: int) -> None:
    for seed in range(first, first + BLOCK):
        case = random_case(seed)
        case = dataclasses.replace(case, num_requests=len(case.kv_len))
        plan = empty_plan(case)
        status = torch.zeros(1, dtype=torch.int32).pin_memory()
        planner_of(case).enqueue(on_device(case), plan, status, stream())
        assert_same(case, plan_on_host(case, FILL), plan.cpu().numpy())
        layout = case.config().layout()
        header = plan_arrays(plan_on_host(case), layout)["header"]
        torch.cuda.synchronize()
        assert status.item() == header["status"], case


@pytest.mark.parametrize("base", [SERVING, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("most_query_tokens", [1, 8, 15])
def test_steps_of_serving_size(most_query_tokens: int, base: PlanCase) -> None:
    planner = planner_of(base)
    for seed in range(20):
        case = random_serving(seed, most_query_tokens, base)
        plan = empty_plan(case)
        planner.enqueue(on_device(case), plan, None, stream())
        assert_same(case, plan_on_host(case, FILL), plan.cpu().numpy())


@pytest.mark.parametrize("band", [(-1, 0, 0), (4095, 0, 4)], ids=str)
@pytest.mark.parametrize("requests", [1, 256, 1024])
def test_chunks_among_decodes(requests: int, band: tuple[int, int, int]) -> None:
    base = dataclasses.replace(NARROW, band=band, capacity=(requests, 8192, 131_072))
    planner = planner_of(base)
    for seed in range(20):
        draw = Random(seed)
        q = [1] * requests
        for _ in range(draw.choice([1, 1, 2, 5, 40])):  # a few are spread by their warps
            q[draw.randrange(requests)] = draw.choice([30, 100, 160])
        q[draw.randrange(requests)] = draw.choice([1, 1024, min(5000, 8192 - sum(q))])
        if sum(q) > 8192:
            continue
        kv = np.array([draw.randint(k, 131_072) for k in q], np.int32)
        indptr = np.concatenate([[0], np.cumsum(q)]).astype(np.int32)
        case = dataclasses.replace(base, num_requests=requests, qo_indptr=indptr, kv_len=kv)
        plan = empty_plan(case)
        planner.enqueue(on_device(case), plan, None, stream())
        assert_same(case, plan_on_host(case, FILL), plan.cpu().numpy())


def test_a_capacity_whose_scratch_lies_in_global_memory() -> None:
    large = dataclasses.replace(SERVING, capacity=(1024, 1 << 20, 131_072))
    assert scratch_bytes(large.config(), large.config().layout()) > 0
    planner = planner_of(large)
    for seed in range(5):
        case = random_serving(seed, 2000)
        case = dataclasses.replace(case, capacity=(1024, 1 << 20, 131_072))
        plan = empty_plan(case)
        planner.enqueue(on_device(case), plan, None, stream())
        assert_same(case, plan_on_host(case, FILL), plan.cpu().numpy())


def test_a_captured_launch_plans_the_lengths_of_its_replay() -> None:
    planner, plan, batch = planner_of(SERVING), empty_plan(SERVING), on_device(SERVING)
    planner.enqueue(batch, plan, None, stream())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planner.enqueue(batch, plan, None, stream())
    for seed in range(50):
        case = random_serving(seed, 8)
        batch.qo_indptr.copy_(torch.from_numpy(case.qo_indptr))
        batch.kv_len.copy_(torch.from_numpy(case.kv_len))
        plan.fill_(FILL)
        graph.replay()
        assert_same(case, plan_on_host(case, FILL), plan.cpu().numpy())


def test_plans_enqueued_back_to_back_are_those_of_their_batches() -> None:
    planner = planner_of(SERVING)
    cases = [random_serving(seed, 8) for seed in range(8)]
    batches = [on_device(case) for case in cases]
    plan = empty_plan(SERVING)
    seen = []
    for i in range(200):
        planner.enqueue(batches[i % 8], plan, None, stream())
        if i % 25 == 24:
            seen.append((i % 8, plan.clone()))  # in stream order
    for index, copy in seen:
        layout = SERVING.config().layout()
        expected = plan_arrays(plan_on_host(cases[index]), layout)
        arrays = plan_arrays(copy.cpu().numpy(), layout)
        for name, array in expected.items():
            assert np.asarray(array).tobytes() == np.asarray(arrays[name]).tobytes(), name


def test_the_status_word_in_pinned_memory_collects_bits() -> None:
    planner = planner_of(SERVING)
    kv_len = SERVING.kv_len.copy()
    kv_len[17] = 131_073
    case = dataclasses.replace(SERVING, kv_len=kv_len)
    status = torch.zeros(1, dtype=torch.int32).pin_memory()
    status[0] = 64
    plan = empty_plan(case)
    planner.enqueue(on_device(case), plan, status, stream())
    planner.enqueue(on_device(SERVING), plan, status, stream())
    torch.cuda.synchronize()
    assert status.item() == 64 | KV_TOO_LONG
