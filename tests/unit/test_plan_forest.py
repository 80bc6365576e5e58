"""Plans of prefix forests: the host's, and the planner kernel's body on fibers."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from plan_batches import (
    PlanCase,
    assert_same,
    broken_forest_case,
    forest_case,
    plan_of_explicit_nodes,
    plan_on_host,
    serving_forest,
)
from plan_fibers import Launch, build, empty_plan, plan_on_fibers, run_params
from plan_forests import (
    NODES_DECLINED,
    ForestNode,
    NodeCapacity,
    capacity_of,
    forest_bytes,
)

from fi_backend import PagedBatch, _core, errors, plan_kernel
from fi_backend.jit.nvrtc import compile_cubin
from fi_backend.plan_kernel import PlanKernel
from fi_backend.plan_records import BAD_INDPTR, KV_TOO_LONG, TOO_MANY_REQUESTS, plan_arrays
from fi_backend.storage import PageTable

LAUNCHES = [
    Launch(1, 4, 4),
    Launch(5, 32, 1, is_descending=True),
    Launch(2, 64, 4),
    Launch(3, 256, 1, is_descending=True),
    Launch(40, 128, 4, is_descending=True),
    Launch(1, 512, 1),
    Launch(3, 2, 1, is_descending=True),
    Launch(2, 1, 4),
]

# Requests 0 to 3 share [0, 2048), 0 and 2 go on together to 3072: the example of plan/forest.h.
EXAMPLE_NODES = [ForestNode((0, 1, 2, 3), 0, 2048), ForestNode((0, 2), 2048, 3072)]


@pytest.fixture(scope="module")
def fibers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("planner"), has_nodes=True)


def is_narrow(case: PlanCase) -> bool:
    return _core.PlanKernelParams(case.config(), case.config().layout()).is_narrow


def assert_planned(fibers: ctypes.CDLL, case: PlanCase, launch: Launch) -> int:
    """Hold the fibers' plan against the host's; return the status."""
    expected = plan_on_host(case)
    got, status = plan_on_fibers(fibers, case, launch)
    assert_same(case, expected, got)
    assert status == plan_arrays(expected, case.config().layout())["header"]["status"], case
    return status


def example(status: int = 0) -> PlanCase:
    q_lens, capacity = [1, 1, 2, 1], NodeCapacity(2, 6, 8)
    return PlanCase(
        "example",
        heads=(8, 2),
        num_ctas=3,
        band=(-1, 0, 0),
        chunk=0,
        classes=[(16, 64, 40, 190), (64, 64, 160, 1240)],
        capacity=(4, 5, 4096),
        num_requests=4,
        qo_indptr=np.cumsum([0, *q_lens]).astype(np.int32),
        kv_len=np.array([3200, 2100, 3100, 2049], np.int32),
        node_capacity=capacity,
        nodes=EXAMPLE_NODES,
        forest=forest_bytes(EXAMPLE_NODES, q_lens, capacity, 4, status=status),
    )


def without_nodes(case: PlanCase) -> PlanCase:
    return dataclasses.replace(case, nodes=[], forest=None)


def status_of(case: PlanCase) -> int:
    return int(plan_arrays(plan_on_host(case), case.config().layout())["header"]["status"])


def test_the_host_plans_the_example() -> None:
    case = example()
    arrays = plan_arrays(plan_on_host(case), case.config().layout())
    nodes, requests, links = arrays["nodes"], arrays["requests"], arrays["links"]
    assert nodes["kv_end"].tolist() == [2048, 3072]
    assert nodes["num_tokens"].tolist() == [5, 3]
    assert list(zip(requests["link_begin"], requests["link_end"], strict=True)) == [
        (0, 2), (2, 3), (3, 5), (5, 6)
    ]  # fmt: skip
    assert [tuple(link)[:2] for link in links] == [(0, 0), (1, 0), (0, 4), (0, 8), (1, 4), (0, 16)]
    assert (links["tile_base"] == nodes["tile_base"][links["node"]]).all()
    assert (links["tile_class"] == nodes["tile_class"][links["node"]]).all()
    assert (requests["first_link"] == links[requests["link_begin"]]).all()
    assert arrays["gathered"]["token"].tolist() == [0, 1, 2, 3, 4, 0, 2, 3]
    assert arrays["gathered"]["local"].tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    own = arrays["items"][arrays["items"]["request"] >= 0]
    assert own["kv_begin"].min() == 2048
    assert (own["partial_row"] >= 0).all()


def test_the_host_plans_a_forest_like_the_same_nodes_given_one_by_one() -> None:
    shared = 0
    for seed in range(300):
        case = forest_case(seed)
        declined = int(case.forest[12:16].view(np.int32)[0])
        expected = plan_of_explicit_nodes(case)
        plan_arrays(expected, case.config().layout())["header"]["status"] |= declined
        assert_same(case, expected, plan_on_host(case))
        shared += len(case.nodes)
    assert shared > 1000


def test_an_empty_forest_gives_the_plan_without_nodes() -> None:
    for seed in range(20):
        case = forest_case(seed)
        forest = forest_bytes([], [], case.node_capacity, case.capacity[0])
        empty = dataclasses.replace(case, nodes=[], forest=forest)
        expected = plan_on_host(without_nodes(case))
        assert_same(case, expected, plan_on_host(empty))
        assert_same(case, expected, plan_of_explicit_nodes(empty))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"kv_len": np.array([3200, 2100, 3100, 4097], np.int64)}, KV_TOO_LONG),
        ({"kv_len": np.array([-1, 2100, 3100, 2049], np.int32)}, KV_TOO_LONG),
        ({"qo_indptr": np.array([0, 1, 2, 1, 5], np.int32)}, BAD_INDPTR),
        ({"capacity": (3, 5, 4096)}, TOO_MANY_REQUESTS),
    ],
    ids=str,
)
def test_a_forest_is_ignored_where_lengths_are_out_of_contract(
    change: dict[str, object], status: int
) -> None:
    case = dataclasses.replace(example(NODES_DECLINED), **change)
    assert status_of(case) == status
    assert_same(case, plan_on_host(without_nodes(case)), plan_on_host(case))


def test_a_forest_that_left_nodes_out_says_so() -> None:
    assert status_of(example(NODES_DECLINED)) == NODES_DECLINED
    assert status_of(example()) == 0


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_random_forests_give_the_bytes_of_the_host(fibers: ctypes.CDLL, launch: Launch) -> None:
    first = 1000 + 70 * LAUNCHES.index(launch)
    cases = [forest_case(seed) for seed in range(first, first + 70)]
    for case in cases:
        assert_planned(fibers, case, launch)
    assert {is_narrow(case) for case in cases} == {True, False}
    assert max(len(case.nodes) for case in cases) > 40


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_forests_of_broken_lengths_are_ignored(fibers: ctypes.CDLL, launch: Launch) -> None:
    first, broken = 60 * LAUNCHES.index(launch), 0
    for seed in range(first, first + 60):
        case = broken_forest_case(seed)
        if status_of(without_nodes(case)) == 0:
            continue
        assert assert_planned(fibers, case, launch) & NODES_DECLINED == 0
        broken += 1
    assert broken > 30


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_steps_that_share_nothing(fibers: ctypes.CDLL, launch: Launch) -> None:
    for seed in range(20):
        case = forest_case(seed)
        expected = plan_on_host(without_nodes(case))
        zeros = np.zeros(case.config().forest_bytes, np.uint8)
        garbage = forest_bytes([], [], case.node_capacity, case.capacity[0])
        for forest in (zeros, garbage):
            empty = dataclasses.replace(case, nodes=[], forest=forest)
            got, status = plan_on_fibers(fibers, empty, launch)
            assert_same(case, expected, got)
            assert status == 0


@pytest.mark.parametrize("num_ctas", [264, 396])
@pytest.mark.parametrize("num_requests", [256, 1024])
def test_steps_of_serving_size(fibers: ctypes.CDLL, num_requests: int, num_ctas: int) -> None:
    cases = [serving_forest(num_requests, seed, num_ctas=num_ctas) for seed in range(3)]
    assert sum(len(case.nodes) for case in cases) > 10
    for case in cases:
        assert_planned(fibers, case, Launch(4, 288, 4))
        assert_planned(fibers, case, Launch(16, 256, 1, is_descending=True))


@pytest.mark.parametrize("num_requests", [2, 15, 16, 17, 64, 256])
@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (8, 8), (64, 1)])
def test_one_group_of_decodes(
    fibers: ctypes.CDLL, num_requests: int, heads: tuple[int, int]
) -> None:
    """Nodes of one row tile and of many, full ones and others, cut at any place."""
    q_lens = [1] * num_requests
    nodes = [ForestNode(tuple(range(num_requests)), 0, 8192)]
    node_capacity = capacity_of(nodes, q_lens)
    for num_ctas in (1, 7, 132, 1000):
        case = serving_forest(
            num_requests, 0, heads=heads, num_ctas=num_ctas, nodes=nodes,
            capacity=(num_requests, num_requests, 16_384), node_capacity=node_capacity,
            qo_indptr=np.arange(num_requests + 1, dtype=np.int32),
            kv_len=np.arange(8193, 8193 + num_requests, dtype=np.int32),
            forest=forest_bytes(nodes, q_lens, node_capacity, num_requests),
        )  # fmt: skip
        assert_planned(fibers, case, Launch(2, 64, 4))


class NoDevice:
    """Stands for the driver and a GPU: launches run on fibers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.device, self.num_sms = library, 0, 9
        self.overlaps: list[bool] = []

    def launch(
        self, _: object, params: object, grid: int, threads: int, stream: int, overlaps: bool
    ) -> None:
        self.overlaps.append(overlaps)
        run_params(self.library, params, Launch(grid, threads, 4))


def batch_of(case: PlanCase) -> PagedBatch:
    table = PageTable.dense(torch.zeros(len(case.kv_len), 1, dtype=torch.int32), page_size=16)
    return PagedBatch(torch.from_numpy(case.qo_indptr), torch.from_numpy(case.kv_len), table)


@pytest.fixture
def device(fibers: ctypes.CDLL) -> NoDevice:
    return NoDevice(fibers)


@pytest.fixture
def planner(device: NoDevice, monkeypatch: pytest.MonkeyPatch) -> PlanKernel:
    fake = device
    monkeypatch.setattr(plan_kernel, "load", lambda kernel, device: fake)
    monkeypatch.setattr(_core, "device_info", lambda index: fake)
    monkeypatch.setattr(_core, "launch_plan", fake.launch)
    config = example().config()
    return PlanKernel(config, config.layout(), torch.device("cpu"))


def plan_bytes(planner: PlanKernel, case: PlanCase) -> NDArray[np.uint8]:
    plan = empty_plan(case.config().layout().total_bytes)
    assert case.forest is not None
    forest = torch.from_numpy(case.forest)
    planner.enqueue(batch_of(case), torch.from_numpy(plan), None, 0, forest)
    return plan


def test_enqueue_plans_the_forest_it_is_given(planner: PlanKernel) -> None:
    assert planner.takes_forest
    case = example(NODES_DECLINED)
    assert_same(case, plan_on_host(case), plan_bytes(planner, case))
    zeros = np.zeros(case.config().forest_bytes, np.uint8)
    empty = dataclasses.replace(case, nodes=[], forest=zeros)
    assert_same(case, plan_on_host(without_nodes(case)), plan_bytes(planner, empty))


def test_a_planner_overlaps_the_kernel_that_finds_its_forest(
    device: NoDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_kernel, "load", lambda kernel, place: device)
    monkeypatch.setattr(_core, "device_info", lambda index: device)
    monkeypatch.setattr(_core, "launch_plan", device.launch)
    case, plan = example(), empty_plan(example().config().layout().total_bytes)
    assert case.forest is not None
    planner = PlanKernel(case.config(), case.config().layout(), torch.device("cpu"))
    call = (batch_of(case), torch.from_numpy(plan), None, 0, torch.from_numpy(case.forest))
    planner.enqueue(*call)
    planner.enqueue(*call, follows_forest=True)
    assert device.overlaps == [False, True]
    assert_same(case, plan_on_host(case), plan)


def test_a_planner_with_nodes_wants_a_forest_of_its_capacity(planner: PlanKernel) -> None:
    batch, plan = batch_of(example()), torch.zeros(0)
    with pytest.raises(errors.InvalidInput, match=r"forest: expected 240 bytes .*, got None"):
        planner.enqueue(batch, plan, None, 0)
    with pytest.raises(errors.InvalidInput, match=r"forest: expected 240 bytes .*, got 239"):
        planner.enqueue(batch, plan, None, 0, torch.zeros(239, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("change", "mode", "takes_forest"),
    [
        ({}, "{1, 2, false, true, true, true}", True),
        ({"capacity": (1024, 1 << 24, 131_072)}, "{4, 2, false, true, false, true}", True),
        ({"node_capacity": NodeCapacity(2, 6, 1 << 22)}, "{1, 2, false, true, false, true}", True),
        ({"node_capacity": NodeCapacity()}, "{1, 2, false, true, true, false}", False),
        ({"band": (4095, 0, 4)}, "{1, 2, false, false, true, false}", False),
        ({"chunk": 512}, "{1, 2, true, false, false, false}", False),
    ],
    ids=str,
)
def test_where_planners_take_forests(
    change: dict[str, object], mode: str, takes_forest: bool
) -> None:
    config = dataclasses.replace(example(), **change).config()
    assert f"Mode{mode}" in PlanKernel.device_kernel(config, config.layout()).source
    assert _core.PlanKernelParams(config, config.layout()).has_nodes == takes_forest


def test_usual_capacities_plan_in_shared_memory() -> None:
    config = serving_forest(1024, 0).config()
    kernel = PlanKernel.device_kernel(config, config.layout())
    assert kernel.title == "planner, 288 threads of 4, 64-bit costs, nodes"
    assert 0 < kernel.shared_bytes <= plan_kernel.MAX_SHARED_BYTES


@pytest.mark.parametrize(
    ("arch", "threads", "in_shared", "mode"),
    [
        ("sm_90a", 128, "true", "1, 1, false, true, true, true"),
        ("sm_90a", 416, "true", "4, 2, false, true, true, true"),
        ("sm_90a", 288, "true", "1, 3, false, true, true, true"),
        ("sm_90a", 512, "false", "4, 3, false, true, false, true"),
        ("sm_80", 512, "true", "4, 3, false, true, true, true"),
        ("sm_120a", 512, "true", "4, 2, false, true, false, true"),
    ],
)
def test_compiles_without_spills(arch: str, threads: int, in_shared: str, mode: str) -> None:
    source = plan_kernel.SOURCE.format(threads=threads, in_shared=in_shared, mode=mode)
    cubin = compile_cubin(source, arch)
    assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0), cubin.log
    assert "warning" not in cubin.log
