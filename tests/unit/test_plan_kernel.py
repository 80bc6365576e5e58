"""The planner kernel without a GPU: its body on fibers writes the host planner's bytes."""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
import torch
from plan_batches import PlanCase, assert_same, plan_on_host, random_case
from plan_fibers import Launch, build, empty_plan, plan_on_fibers, run_params

from fi_backend import PagedBatch, _core, errors, plan_kernel
from fi_backend.formats import Nodes
from fi_backend.jit.nvrtc import compile_cubin
from fi_backend.plan_kernel import MAX_SHARED_BYTES, PlanKernel, scratch_bytes
from fi_backend.plan_records import BAD_INDPTR, KV_TOO_LONG, plan_arrays
from fi_backend.storage import PageTable

CPU = torch.device("cpu")
LAUNCHES = [
    Launch(1, 4, 4),
    Launch(5, 32, 1, is_descending=True),
    Launch(2, 64, 4),
    Launch(3, 256, 1, is_descending=True),
    Launch(40, 128, 4, is_descending=True),
    Launch(1, 512, 1),
]
DECODE_CLASS = [(16, 64, 40, 190)]
DECODES = PlanCase(
    "1024 decodes",
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


@pytest.fixture(scope="module")
def fibers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("planner"))


def test_division_by_reciprocals_is_exact(fibers: ctypes.CDLL) -> None:
    draw = Random(0)
    for d in [1, 2, 3, 5, 7, 64, 192, 2**15 - 1, 2**30, 2**31 - 1]:
        around = [k * d + e for k in (1, 2, 2**31 // d - 1) for e in (-1, 0, 1)]
        for n in [0, 2**31 - 1, *around, *(draw.randrange(2**31) for _ in range(50))]:
            if 0 <= n < 2**31:
                assert fibers.divisor_quotient(n, d) == n // d, (n, d)


def test_division_of_64_bits_is_exact(fibers: ctypes.CDLL) -> None:
    draw = Random(1)
    for _ in range(2000):
        b = draw.choice([1, 3, 190, 1240, draw.randrange(1, 2**31)])
        q = draw.choice([0, 1, 2047, draw.randrange(2**24), draw.randrange(2**31 - 1)])
        a = q * b + draw.choice([0, b - 1, draw.randrange(b)])
        assert fibers.quotient_of(a, b) == q, (a, b)
        d = draw.choice([1, 2, 3, 132, 2**31 - 1, draw.randrange(1, 2**31)])
        n = draw.choice([2**63 - 1, 2**62 // d * d - 1, draw.randrange(2 ** draw.randrange(1, 64))])
        rest = ctypes.c_int()
        assert (fibers.long_quotient(n, d, ctypes.byref(rest)), rest.value) == divmod(n, d)


def test_small_quotients_are_exact(fibers: ctypes.CDLL) -> None:
    draw = Random(2)
    rest = ctypes.c_uint()
    for _ in range(5000):
        b = draw.choice([1, 2, 3, 190, 2**30, 2**31 - 1, draw.randrange(1, 2**31)])
        factor = draw.choice([1, 2, 8, 64, 128, draw.randrange(1, 2**16)])
        most = min(b, 2**31) - 1  # a < b: the quotient is below the factor
        a = draw.choice([0, most, most // 2, draw.randrange(most + 1)])
        part = draw.choice([0, factor - 1, draw.randrange(factor)])
        got = fibers.small_quotient(a, factor, part, b, ctypes.byref(rest))
        assert (got, rest.value) == divmod(a * factor + part, b), (a, factor, part, b)
        a = min(draw.randrange(2**16) * b + draw.choice([0, b - 1]), 2**31 - 1)
        if a // b < 2**16:
            got = fibers.small_quotient(a, 1, 0, b, ctypes.byref(rest))
            assert (got, rest.value) == divmod(a, b), (a, b)


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_random_steps_give_the_bytes_of_the_host(fibers: ctypes.CDLL, launch: Launch) -> None:
    for seed in range(LAUNCHES.index(launch) * 80, LAUNCHES.index(launch) * 80 + 80):
        case = random_case(seed, max_requests=300)
        expected = plan_on_host(case)
        got, status = plan_on_fibers(fibers, case, launch)
        assert_same(case, expected, got)
        assert status == plan_arrays(expected, case.config().layout())["header"]["status"], case


@pytest.mark.parametrize("num_requests", [1024, 256])
@pytest.mark.parametrize("band", [(-1, 0, 0), (4095, 0, 4)])
def test_steps_of_serving_size(
    fibers: ctypes.CDLL, num_requests: int, band: tuple[int, int, int]
) -> None:
    draw = Random(num_requests)
    kv = np.array([draw.randint(1, 131_072) for _ in range(num_requests)], np.int64)
    q = [min(int(k), draw.choice([1] * 60 + [4, 8, 512])) for k in kv]
    indptr = np.concatenate([[0], np.cumsum(q)]).astype(np.int32)
    capacity = (1024, max(8192, sum(q)), 131_072)
    case = dataclasses.replace(
        DECODES, band=band, num_requests=num_requests, qo_indptr=indptr, kv_len=kv,
        capacity=capacity,
    )  # fmt: skip
    got, _ = plan_on_fibers(fibers, case, Launch(3, 288, 4))
    assert_same(case, plan_on_host(case), got)


def steps_of(base: PlanCase, q_lens: list[int], kv_lens: list[int]) -> PlanCase:
    indptr = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    return dataclasses.replace(
        base, num_requests=len(q_lens), qo_indptr=indptr, kv_len=np.array(kv_lens, np.int32)
    )


# Query tokens of requests by their index: fibers have warps of four, which spread two of them.
LARGE = {
    "one": {17: 1024},
    "the first and the last": {0: 300, 39: 33},
    "two of a warp": {8: 100, 11: 260},
    "three of a warp": {8: 100, 9: 70, 11: 260},
    "two of a thread": {20: 90, 22: 64},
    "one of many tiles": {5: 3000},
    "everywhere": dict.fromkeys(range(40), 40),
    "among requests of no tokens": {4: 100, 5: 0, 6: 0, 7: 0, 39: 0},
}


@pytest.mark.parametrize("per_thread", [1, 4])
@pytest.mark.parametrize("band", [(-1, 0, 0), (-1, -1, 0), (-1, 5, 0), (150, 0, 4)], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_requests_spread_over_their_tiles(
    fibers: ctypes.CDLL, name: str, band: tuple[int, int, int], per_thread: int
) -> None:
    q_lens = [LARGE[name].get(r, 1) for r in range(40)]
    base = dataclasses.replace(DECODES, name=name, band=band, capacity=(40, 4096, 131_072))
    case = steps_of(base, q_lens, [q + 61 * r for r, q in enumerate(q_lens)])
    for is_narrow in (True, False):
        if not is_narrow:  # the same step where the costs of others would not fit
            case = dataclasses.replace(case, capacity=(40, 1 << 20, 131_072))
        config = case.config()
        assert _core.PlanKernelParams(config, config.layout()).is_narrow == is_narrow
        for threads, is_descending in ((40, False), (64, True), (8, True)):
            launch = Launch(2, threads, per_thread, is_descending)
            got, _ = plan_on_fibers(fibers, case, launch)
            assert_same(case, plan_on_host(case), got)


@pytest.mark.parametrize(("c_tile", "is_narrow"), [(818, True), (820, False)])
def test_costs_on_both_sides_of_32_bits(fibers: ctypes.CDLL, c_tile: int, is_narrow: bool) -> None:
    base = dataclasses.replace(
        DECODES, num_ctas=396, classes=[(16, 64, 290, c_tile)], capacity=(1024, 1024, 131_072)
    )
    draw = Random(c_tile)
    config = base.config()
    assert _core.PlanKernelParams(config, config.layout()).is_narrow == is_narrow
    full = [131_072] * 1024
    for kv_lens in (full, [draw.randint(100_000, 131_072) for _ in range(1024)], full[:1]):
        case = steps_of(base, [1] * len(kv_lens), kv_lens)
        got, _ = plan_on_fibers(fibers, case, Launch(2, 416, 4))
        assert_same(case, plan_on_host(case), got)


@pytest.mark.parametrize("planner_ctas", [1, 2, 7, 16])
@pytest.mark.parametrize("num_ctas", [1, 2, 33, 400])
def test_spans_meet_the_runs_of_every_cta(
    fibers: ctypes.CDLL, num_ctas: int, planner_ctas: int
) -> None:
    base = dataclasses.replace(DECODES, num_ctas=num_ctas, capacity=(64, 64, 131_072))
    for kv_lens in ([900] * 64, [1, 131_072, 1, 1, 64, 65], [5], [*range(0, 6400, 100)]):
        case = steps_of(base, [1] * len(kv_lens), kv_lens)
        for threads in (4, 32):
            got, _ = plan_on_fibers(fibers, case, Launch(planner_ctas, threads))
            assert_same(case, plan_on_host(case), got)


@pytest.mark.parametrize("per_thread", [1, 4])
@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize(
    "indptr",
    [
        [0, 8, 16, 24, 9, 30],  # out of order once the capacity of 10 tokens is used up
        [0, 3, 5, 2, 4, 9],
        [0, -1, 4, 4, 3, 11],
        [2, 3, 5, 7, 8, 9],
        [-4, -3, -2, 1, 0, 2],
    ],
    ids=str,
)
def test_an_indptr_out_of_order_is_clamped_as_on_the_host(
    fibers: ctypes.CDLL, indptr: list[int], num_threads: int, per_thread: int
) -> None:
    case = dataclasses.replace(
        DECODES,
        capacity=(8, 10, 1000),
        num_requests=5,
        qo_indptr=np.array(indptr, np.int32),
        kv_len=np.full(5, 700, np.int32),
    )
    expected = plan_on_host(case)
    got, status = plan_on_fibers(fibers, case, Launch(1, num_threads, per_thread))
    assert_same(case, expected, got)
    assert status & BAD_INDPTR


def test_an_empty_step_clears_what_the_last_one_left(fibers: ctypes.CDLL) -> None:
    case = dataclasses.replace(DECODES, num_requests=0)
    got, _ = plan_on_fibers(fibers, case, Launch(4, 256))
    arrays = plan_arrays(got, case.config().layout())
    assert len(arrays["items"]) == 0
    assert arrays["cta_ptr"].tolist() == [0] * 265


@dataclass
class NoDevice:
    """Stands for the driver and a GPU of nine multiprocessors: launches run on fibers."""

    library: ctypes.CDLL
    device: int = 0
    num_sms: int = 9

    def launch(
        self, _: object, params: object, grid: int, threads: int, stream: int, overlaps: bool
    ) -> None:
        assert (stream, overlaps) == (77, False)
        assert grid in (1, 2, 4, 8)
        run_params(self.library, params, Launch(grid, threads, 4))


@pytest.fixture
def no_device(fibers: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = NoDevice(fibers)
    monkeypatch.setattr(plan_kernel, "load", lambda kernel, device: fake)
    monkeypatch.setattr(_core, "device_info", lambda index: fake)
    monkeypatch.setattr(_core, "launch_plan", fake.launch)


def batch_of(case: PlanCase) -> PagedBatch:
    table = PageTable.dense(torch.zeros(len(case.kv_len), 1, dtype=torch.int32), page_size=16)
    return PagedBatch(torch.from_numpy(case.qo_indptr), torch.from_numpy(case.kv_len), table)


@pytest.mark.usefixtures("no_device")
def test_enqueue_launches_what_the_batch_says() -> None:
    for seed in range(100, 112):
        case = random_case(seed, max_requests=200)
        case = dataclasses.replace(case, num_requests=len(case.kv_len))
        config = case.config()
        plan = empty_plan(config.layout().total_bytes)
        planner = PlanKernel(config, config.layout(), CPU)
        planner.enqueue(batch_of(case), torch.from_numpy(plan), None, 77)
        assert_same(case, plan_on_host(case), plan)


@pytest.mark.usefixtures("no_device")
def test_one_planner_serves_step_after_step() -> None:
    config = DECODES.config()
    planner = PlanKernel(config, config.layout(), CPU)
    plan = empty_plan(config.layout().total_bytes)
    status = torch.zeros(1, dtype=torch.int32)
    for length in (131_072, 131_073, 70):
        case = dataclasses.replace(DECODES, kv_len=np.full(1024, length, np.int64))
        planner.enqueue(batch_of(case), torch.from_numpy(plan), status, 77)
        arrays = plan_arrays(plan, config.layout())
        wanted = plan_arrays(plan_on_host(case), config.layout())
        for name, array in wanted.items():
            assert np.asarray(array).tobytes() == np.asarray(arrays[name]).tobytes(), name
        # The word keeps what a step reported until its reader clears it.
        assert status.item() == (0 if length == 131_072 else KV_TOO_LONG)


@pytest.mark.usefixtures("no_device")
def test_a_batch_with_nodes_is_refused() -> None:
    config = DECODES.config()
    planner = PlanKernel(config, config.layout(), CPU)
    none = torch.zeros(0, dtype=torch.int32)
    nodes = Nodes(none, none, none, torch.zeros(1, dtype=torch.int32), none)
    batch = dataclasses.replace(batch_of(DECODES), nodes=nodes)
    with pytest.raises(errors.Unsupported, match=r"batch\.nodes: expected none on the device"):
        planner.enqueue(batch, torch.zeros(0), None, 77)


def with_capacity(requests: int, tokens: int) -> PlanCase:
    return dataclasses.replace(DECODES, capacity=(requests, tokens, 131_072))


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (with_capacity(64, 64), "288, true, fi::planner::Mode{1, 2, false, true, true, false}"),
        (
            with_capacity(1024, 8192),
            "288, true, fi::planner::Mode{4, 2, false, true, false, false}",
        ),
        (
            dataclasses.replace(with_capacity(1024, 8192), num_ctas=132, classes=DECODE_CLASS),
            "256, true, fi::planner::Mode{4, 1, false, true, true, false}",
        ),
        (
            dataclasses.replace(with_capacity(8, 64), num_ctas=78, band=(4095, 0, 4)),
            "128, true, fi::planner::Mode{1, 2, false, false, true, false}",
        ),
        (
            dataclasses.replace(with_capacity(8, 64), chunk=512),
            "288, true, fi::planner::Mode{1, 2, true, false, false, false}",
        ),
    ],
)
def test_usual_capacities_plan_in_shared_memory(case: PlanCase, shape: str) -> None:
    config = case.config()
    kernel = PlanKernel.device_kernel(config, config.layout())
    assert f"fi::planner::run<{shape}>" in kernel.source
    assert 0 < kernel.shared_bytes <= MAX_SHARED_BYTES


def test_a_huge_capacity_plans_in_global_memory() -> None:
    config = with_capacity(1024, 1 << 20).config()
    kernel = PlanKernel.device_kernel(config, config.layout())
    assert "run<288, false, fi::planner::Mode{4, 2, false, true, false, false}>" in kernel.source
    assert kernel.shared_bytes == 0
    assert scratch_bytes(config, config.layout()) > 16 * MAX_SHARED_BYTES
    assert scratch_bytes(DECODES.config(), DECODES.config().layout()) == 0


@pytest.mark.parametrize(
    ("arch", "threads", "in_shared", "mode"),
    [
        ("sm_90a", 128, "true", "1, 1, false, true, true, false"),
        ("sm_90a", 416, "true", "4, 1, false, true, true, false"),
        ("sm_90a", 288, "true", "4, 3, false, true, true, false"),
        ("sm_90a", 512, "false", "1, 4, false, false, true, false"),
        ("sm_90a", 512, "false", "4, 3, false, true, false, false"),
        ("sm_90a", 512, "true", "1, 3, false, false, false, false"),
        ("sm_90a", 512, "true", "1, 3, true, false, false, false"),
        ("sm_80", 512, "false", "1, 3, true, false, false, false"),
        ("sm_80", 512, "true", "4, 3, false, true, true, false"),
        ("sm_120a", 288, "true", "1, 3, false, false, true, false"),
        ("sm_89", 512, "true", "4, 3, false, true, true, true"),
    ],
)
def test_compiles_without_spills(arch: str, threads: int, in_shared: str, mode: str) -> None:
    source = plan_kernel.SOURCE.format(threads=threads, in_shared=in_shared, mode=mode)
    cubin = compile_cubin(source, arch)
    assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0), cubin.log
    assert "warning" not in cubin.log
    assert cubin.shared_bytes + MAX_SHARED_BYTES <= 99 << 10, "of sm_86, sm_89 and sm_120"


def test_too_many_ctas_are_refused() -> None:
    config = dataclasses.replace(DECODES, num_ctas=1 << 15).config()
    with pytest.raises(ValueError, match="num_ctas: expected fewer than 32768, got 32768"):
        _core.PlanKernelParams(config, config.layout())
