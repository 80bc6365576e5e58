"""Finding shared prefixes: the host against a naive search, the device's code against the host."""

from __future__ import annotations

import ctypes

import forest_fibers
import numpy as np
import pytest
import torch
from forest_steps import MAX_MEMBER_TOKENS, Step, nodes_of, random_step, shared_ranges

from fi_backend import Capacity, InvalidInput, PagedBatch, PageTable, prefix_forest
from fi_backend.jit.nvrtc import compile_cubin
from fi_backend.plan_records import NODES_DECLINED

LAUNCHES = [(4, False), (8, True), (32, False), (64, True)]


@pytest.fixture(scope="module")
def fibers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return forest_fibers.build(tmp_path_factory.mktemp("forest"))


@pytest.fixture(scope="module")
def full_warps(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return forest_fibers.build(tmp_path_factory.mktemp("forest-of-32"), 32)


def decodes(rows: list[list[int]], page: int, kv: list[int] | None = None, **most: int) -> Step:
    """One query token for each row of pages."""
    count = len(rows)
    table = torch.zeros(count, max(map(len, rows)), dtype=torch.int32)
    for r, row in enumerate(rows):
        table[r, : len(row)] = torch.tensor(row)
    lengths = torch.tensor(kv or [len(row) * page for row in rows], dtype=torch.int32)
    limits = {"max_nodes": count, "max_links": 8 * count, "max_shared_tokens": 8 * count} | most
    batch = PagedBatch(
        torch.arange(count + 1, dtype=torch.int32), lengths, PageTable.dense(table, page)
    )
    return Step("", batch, Capacity(count, count, 1 << 20, **limits), rows)


def found(step: Step) -> list[tuple[int, int, tuple[int, ...]]]:
    return nodes_of(step.arrays(step.find_on_host()))


def test_one_prefix_is_one_node() -> None:
    rows = [[*range(100, 132), 200 + r] for r in range(4)]
    assert found(decodes(rows, 16)) == [(0, 512, (0, 1, 2, 3))]


def test_levels_nest_and_requests_come_in_any_order() -> None:
    # system prompt 0-15, documents 16-47 (two of them), conversations behind
    system, documents = [*range(1000, 1016)], [[*range(1100, 1132)], [*range(1200, 1232)]]
    rows = [system + documents[r % 2] + [2000 + r] for r in range(8)]
    assert found(decodes(rows, 16)) == [
        (0, 256, (0, 1, 2, 3, 4, 5, 6, 7)),
        (256, 768, (0, 2, 4, 6)),
        (256, 768, (1, 3, 5, 7)),
    ]


def test_nodes_end_before_the_query_tokens_of_their_members() -> None:
    row = [*range(64)]
    step = decodes([row] * 6, 16, kv=[1024, 1024, 705, 1024, 384, 1024])
    ends = {r: end for _, end, members in found(step) for r in members}
    assert ends == {0: 960, 1: 960, 2: 704, 3: 960, 4: 320, 5: 960}


def test_what_does_not_pay_is_read_by_each() -> None:
    two = [[1, 2, 3, 4, 5, 6, 7, 8, 100 + r] for r in range(2)]
    assert found(decodes(two, 16)) == []  # 128 tokens once less
    assert found(decodes([[*range(12), 100 + r] for r in range(2)], 16)) == [(0, 192, (0, 1))]


def test_equal_pages_behind_different_ones_are_not_shared() -> None:
    common = [*range(500, 564)]
    rows = [[7, *common], [8, *common], [7, *common]]
    assert found(decodes(rows, 16)) == [(0, 1024, (0, 2))]


def test_long_queries_are_no_members() -> None:
    row = [*range(128)]
    q = [1, MAX_MEMBER_TOKENS, MAX_MEMBER_TOKENS + 1, 0, 1]
    step = decodes([row] * 5, 16, max_shared_tokens=200)
    indptr = torch.tensor([0, *np.cumsum(q)], dtype=torch.int32)
    batch = PagedBatch(indptr, step.batch.kv_len, step.batch.page_table)
    members = {m for _, _, ms in found(Step("", batch, step.capacity, step.pages)) for m in ms}
    assert members == {0, 1, 4}


@pytest.mark.parametrize(
    ("most", "count"),
    [({"max_nodes": 1}, 1), ({"max_links": 9}, 1), ({"max_shared_tokens": 12}, 2)],
)
def test_sharing_beyond_capacity_is_declined_in_order(most: dict[str, int], count: int) -> None:
    system, documents = [*range(1000, 1016)], [[*range(1100, 1132)], [*range(1200, 1232)]]
    rows = [system + documents[r % 2] + [2000 + r] for r in range(8)]
    step = decodes(rows, 16, **most)
    arrays = step.arrays(step.find_on_host())
    assert arrays["header"]["status"][0] == NODES_DECLINED
    assert nodes_of(arrays) == found(decodes(rows, 16))[:count]


def test_the_ninth_level_is_left_to_each_request() -> None:
    rows = [
        [*range(8 * (r + 1)), *range(10_000 * (r + 1), 10_000 * (r + 1) + 8)] for r in range(40)
    ]
    nodes = found(decodes(rows, 16))
    begins = {begin: end for begin, end, _ in nodes}
    assert len(nodes) == 8
    assert max(begins.values()) == 8 * 128  # every level is two checkpoints


@pytest.mark.parametrize("seed", range(300))
def test_random_steps_share_what_a_naive_search_finds(seed: int) -> None:
    step = random_step(seed)
    arrays = step.arrays(step.find_on_host())
    nodes, wanted = nodes_of(arrays), shared_ranges(step)
    if arrays["header"]["status"][0] == 0:
        assert sorted(nodes) == sorted(wanted), step.name
    else:
        assert set(nodes) < set(wanted)
    for _, end, members in nodes:
        pages = {tuple(step.pages[r][: end // step.batch.page_table.page_size]) for r in members}
        assert len(pages) == 1
    creators = [(members[0], end) for _, end, members in nodes]
    assert creators == sorted(creators)
    header = arrays["header"][0]
    assert header["kv_tokens"] == step.batch.kv_len.sum()
    assert header["saved_kv_tokens"] == sum((len(m) - 1) * (e - b) for b, e, m in nodes)
    for r, request in enumerate(arrays["requests"]):
        ends = [n[1] for n in nodes if r in n[2]]
        assert request["own_begin"] == max(ends, default=0)


def assert_the_device_finds_the_same(
    fibers: ctypes.CDLL, step: Step, launch: tuple[int, bool]
) -> None:
    expected = step.find_on_host()
    got = forest_fibers.find_on_fibers(fibers, step, *launch)
    if not np.array_equal(expected, got):
        wanted, arrays = step.arrays(expected), step.arrays(got)
        for name, array in wanted.items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=f"{step.name}: {name}")
        raise AssertionError(f"{step.name}: {np.flatnonzero(expected != got)[:8]}")


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_the_device_finds_the_same_bytes(fibers: ctypes.CDLL, launch: tuple[int, bool]) -> None:
    for seed in range(1000 * LAUNCHES.index(launch), 1000 * LAUNCHES.index(launch) + 120):
        assert_the_device_finds_the_same(fibers, random_step(seed), launch)


@pytest.mark.parametrize("launch", [(64, False), (96, True)], ids=str)
def test_warps_as_wide_as_the_devices(full_warps: ctypes.CDLL, launch: tuple[int, bool]) -> None:
    """Forests around as many nodes as a warp has lanes, and deeper than levels are kept."""
    for seed in range(5000, 5060):
        assert_the_device_finds_the_same(full_warps, random_step(seed), launch)
    for count in (9, 10, 31, 32, 33, 34, 70):
        # Each request goes on where the one before it leaves: a chain of count - 1 nodes.
        chain = [[*range(100, 108 + 8 * r), 9000 + r] for r in range(count)]
        # Pairs that share with nobody else: half as many nodes.
        pairs = [[*range(1000 * (r // 2), 1000 * (r // 2) + 40), 90_000 + r] for r in range(count)]
        for rows in (chain, chain[::-1], pairs, pairs[::2] + pairs[1::2]):
            assert_the_device_finds_the_same(full_warps, decodes(rows, 16), launch)
            tight = decodes(rows, 16, max_nodes=5, max_links=40, max_shared_tokens=33)
            assert_the_device_finds_the_same(full_warps, tight, launch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("max_requests", [256, 4096])
def test_compiles_without_spills(arch: str, max_requests: int) -> None:
    capacity = Capacity(max_requests, 8192, 131_072, max_requests, max_requests, max_requests)
    cubin = compile_cubin(prefix_forest.forest_kernel(capacity).source, arch)
    assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0), cubin.log
    assert "warning" not in cubin.log
    assert cubin.shared_bytes + prefix_forest._MAX_SHARED_BYTES <= 99 << 10, "of sm_89, sm_120"


def test_more_nodes_than_the_kernel_can_number_are_refused() -> None:
    many = Capacity(40_000, 40_000, 1024)
    prefix_forest.PrefixForest(many.with_sharing(), torch.device("cpu"))
    too_many = Capacity(40_000, 40_000, 1024, 40_000, 40_000, 40_000)
    with pytest.raises(
        InvalidInput, match=r"capacity\.max_nodes: expected at most 32767, got 40000"
    ):
        prefix_forest.PrefixForest(too_many, torch.device("cpu"))
