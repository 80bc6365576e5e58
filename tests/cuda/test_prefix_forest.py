"""The forest kernel on a GPU writes the host's bytes, whatever lay there before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from forest_steps import FILL, Step, handed_over, random_step, serving_step
from stress import capture

from fi_backend import Capacity, PagedBatch
from fi_backend.host_batch import to_device
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.prefix_forest import PrefixForest, forest_kernel

BLOCK = 50  # random steps of a test
LARGE = Capacity(4096, 8192, 131_072, 4096, 8 * 4096, 65 * 4096)


def kernels_of(test: str, arguments: Mapping[str, Any]) -> Iterator[DeviceKernel]:
    """The kernels of a test, for conftest to compile beforehand."""
    yield forest_kernel(LARGE)
    yield forest_kernel(Capacity(8, 8, 1024, 8, 8, 8))


class Finder:
    """A forest on the device under test."""

    def __init__(self, capacity: Capacity, device: str) -> None:
        self.device = torch.device(device)
        self.forest = PrefixForest(capacity, self.device)

    def find(self, batch: PagedBatch) -> None:
        """Enqueue the search in a batch that lies on the device."""
        is_cuda = self.device.type == "cuda"
        self.forest.find(batch, torch.cuda.current_stream().cuda_stream if is_cuda else 0)

    def check(self, step: Step) -> None:
        """Hold all bytes of the last forest against the host's."""
        expected, got = step.find_on_host(), self.forest.data.cpu().numpy()
        if not np.array_equal(expected, got):
            wanted, arrays = step.arrays(expected), step.arrays(got)
            for name, array in wanted.items():
                np.testing.assert_array_equal(arrays[name], array, err_msg=f"{step.name}: {name}")
            raise AssertionError(f"{step.name}: {np.flatnonzero(expected != got)[:8]}")
        left = handed_over(self.forest)
        assert left is None or not left.any(), f"{step.name}: branches left"

    def run(self, step: Step) -> None:
        """Search once, over FILL, and check."""
        self.forest.data.fill_(FILL)
        self.find(to_device(step.batch, self.device))
        self.check(step)


@pytest.mark.parametrize("first", range(0, 500, BLOCK))
def test_random_steps_give_the_bytes_of_the_host(device: str, first: int) -> None:
    for seed in range(first, first + BLOCK):
        step = random_step(seed)
        Finder(step.capacity, device).run(step)


@pytest.mark.parametrize("kind", ["dense", "csr", "indirect"])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("requests", [256, 1024])
def test_steps_of_serving_size(device: str, requests: int, page: int, kind: str) -> None:
    for seed in range(6):
        step = serving_step(seed, requests, page, kind)
        Finder(step.capacity, device).run(step)


def test_a_capacity_whose_scratch_lies_in_global_memory(device: str) -> None:
    assert forest_kernel(LARGE).shared_bytes == 0
    finder = Finder(LARGE, device)
    for seed in range(4):
        finder.run(dataclasses.replace(serving_step(seed, 1024, 16), capacity=LARGE))


def test_lengths_out_of_contract_are_no_members(device: str) -> None:
    step = serving_step(3, 256, 16)
    kv_len = step.batch.kv_len.clone()
    kv_len[::7] = step.capacity.max_kv_len + 1
    kv_len[3::7] = -5
    batch = dataclasses.replace(step.batch, kv_len=kv_len)
    broken = dataclasses.replace(step, batch=batch)
    Finder(step.capacity, device).run(broken)


@pytest.mark.parametrize("page", [1, 16])
def test_replays_of_a_graph_search_what_they_find(device: str, page: int) -> None:
    """Tables and lengths change in place between replays; the kernel counts its CTAs down."""
    steps = [serving_step(2 * seed, 256, page) for seed in range(8)]
    capacity = dataclasses.replace(steps[0].capacity, max_shared_tokens=8 * 65 * 256)
    steps = [dataclasses.replace(step, capacity=capacity) for step in steps]
    finder = Finder(capacity, device)
    static = to_device(serving_step(100, 256, page).batch, finder.device)
    replay = capture(lambda: finder.find(static), finder.device)
    before = finder.forest.reads()
    for index in range(40):
        step = steps[index % len(steps)]
        static.qo_indptr.copy_(step.batch.qo_indptr)
        static.kv_len.copy_(step.batch.kv_len)
        static.page_table.entries.copy_(step.batch.page_table.entries)
        finder.forest.data.fill_(FILL)
        replay()
        finder.check(step)
    headers = [step.arrays(step.find_on_host())["header"][0] for step in steps]
    read, saved = (sum(int(h[n]) for h in headers) * 5 for n in ("kv_tokens", "saved_kv_tokens"))
    after = finder.forest.reads()
    assert (after[0] - before[0], after[1] - before[1]) == (read, saved)
    assert saved > 0


def test_searches_enqueued_back_to_back_are_those_of_their_batches(device: str) -> None:
    steps = [serving_step(2 * seed, 256, 16) for seed in range(4)]
    capacity = dataclasses.replace(steps[0].capacity, max_shared_tokens=8 * 65 * 256)
    finder = Finder(capacity, device)
    batches = [to_device(step.batch, finder.device) for step in steps]
    for last in range(4):
        finder.forest.data.fill_(FILL)
        for index in range(100):
            finder.find(batches[(last + 1 + index) % 4])
        finder.forest.data.fill_(FILL)
        finder.find(batches[last])
        finder.check(dataclasses.replace(steps[last], capacity=capacity))


def test_a_step_without_requests(device: str) -> None:
    none, table = torch.zeros(0, dtype=torch.int32), serving_step(0, 4, 16).batch.page_table
    batch = PagedBatch(torch.zeros(1, dtype=torch.int32), none, table)
    empty = Step("empty", batch, Capacity(8, 8, 1024, 8, 8, 8), [])
    Finder(empty.capacity, device).run(empty)
