"""The workloads of the kernel benchmark: floors, draws, page tables, sizes."""

from __future__ import annotations

import pytest
import torch

import fi_backend as fi
from e2e_bench import plan
from e2e_bench.correctness import MAX_PIECES, PIECE_ROWS, Piece, pieces
from e2e_bench.gpu_data import ROTATION_BYTES, Data, make_csr, num_layers, page_rows
from e2e_bench.workloads import WORKLOADS, Workload, decode, uniform, zipf

BY_NAME = {workload.name: workload for workload in WORKLOADS}
# Floors in µs of the runs whose figures are to be compared with.
FLOORS = {
    "dec.b1.k1k": 1.0, "dec.b1.k8k": 7.6, "dec.b1.k128k": 121, "dec.b16.k1k": 15.2,
    "dec.b64.k4k": 243, "dec.b64.k4k.page1": 243, "dec.b64.uniform": 262, "dec.b64.zipf": 243,
    "dec.b256.uniform": 259, "dec.skew": 91, "dec.tp8": 30.4, "dec.d64": 122, "dec.d256": 243,
    "pre.b1.4k": 173, "pre.b1.16k": 2773, "pre.b1.16k.page1": 2773, "pre.b16.1k": 173,
    "pre.b8.zipf": 531, "pre.d64": 693, "pre.d256": 693, "pre.chunk": 1343, "mix.chunk1k": 270,
    "mix.chunk512": 264, "spec.q4": 122, "spec.q8": 123, "shared.64": 38, "shared.16": 34,
}  # fmt: skip
HEADS = fi.HeadShape(4, 2, 32)
PAIR = Workload("pair", (5, 1), (21, 40), HEADS, page=8)


def test_every_workload_has_a_floor_and_a_name_of_its_own() -> None:
    assert list(BY_NAME) == [workload.name for workload in WORKLOADS]
    assert BY_NAME.keys() == FLOORS.keys()


@pytest.mark.parametrize("name", FLOORS)
def test_floor(name: str) -> None:
    # 1.0 was rounded from 0.95.
    assert BY_NAME[name].floor_us == pytest.approx(FLOORS[name], rel=0.03, abs=0.05)


def test_bytes_and_operations_of_a_small_workload() -> None:
    assert PAIR.num_pages == 3 + 5
    # (61 tokens * 2 heads of KV + 6 tokens * 4 heads of q and out) * (32 + 32) * 2 bytes
    assert PAIR.num_bytes == (61 * 2 + 6 * 4) * 64 * 2
    # Positions 16 to 20 see 17 to 21 tokens, the decode 40: 135 pairs, two products, 4 heads.
    assert PAIR.flops == 135 * 2 * 4 * 64
    assert not PAIR.is_decode


def test_shared_tokens_count_once() -> None:
    shared = decode("shared", (40,) * 3, heads=HEADS, page=8, shared=32)
    assert shared.num_pages == 4 + 3
    assert shared.num_bytes == ((32 + 3 * 8) * 2 + 3 * 4) * 64 * 2
    assert shared.flops == 3 * 40 * 2 * 4 * 64


def test_drawn_lengths() -> None:
    lengths = uniform(59, 64, 128, 8192)
    assert lengths == BY_NAME["dec.b64.uniform"].kv_lens
    assert lengths[:3] == uniform(59, 3, 128, 8192)
    assert 128 <= min(lengths) <= max(lengths) <= 8192
    assert set(uniform(3, 200, 5, 7)) == {5, 6, 7}
    assert sorted(zipf(0, 3, 100, 1.0)) == [54, 81, 165]
    skewed = BY_NAME["dec.b64.zipf"].kv_lens
    assert sum(skewed) == 64 * 4096
    assert 20_500 < max(skewed) < 21_500
    assert sum(BY_NAME["pre.b8.zipf"].q_lens) == 8 * 2048


def test_every_page_has_one_owner_or_all() -> None:
    shared = decode("shared", (40, 48, 33), heads=HEADS, page=8, shared=32)
    rows = page_rows(shared)
    assert [len(row) for row in rows] == [5, 6, 5]
    assert all(torch.equal(row[:4], rows[0][:4]) for row in rows)
    own = torch.cat([row[4:] for row in rows])
    assert sorted([*rows[0][:4].tolist(), *own.tolist()]) == list(range(shared.num_pages))


def test_csr() -> None:
    rows = [torch.tensor([4, 2], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)]
    csr = make_csr(rows, (16, 3), 8, torch.device("cpu"))
    assert csr.indptr.tolist() == [0, 2, 3]
    assert csr.indices.tolist() == [4, 2, 7]
    assert csr.last_page_len.tolist() == [8, 3]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_layers_outgrow_the_cache(workload: Workload) -> None:
    layers = num_layers(workload)
    assert layers >= 2
    assert layers * workload.kv_bytes >= ROTATION_BYTES
    assert layers * workload.kv_bytes <= 2.5e9  # one pool holds the largest


def test_data_of_a_workload() -> None:
    pool = torch.arange(2 * PAIR.kv_bytes // 2).bfloat16()
    data = Data(PAIR, pool, layers=2)
    k, v = data.layers[1]
    assert k.shape == v.shape == (8, 8, 2, 32)
    assert k.data_ptr() == pool.data_ptr() + PAIR.kv_bytes
    assert v.data_ptr() == k.data_ptr() + PAIR.kv_bytes // 2
    assert data.qo_indptr.tolist() == [0, 5, 6]
    assert data.table[0].tolist() == [*data.rows[0].tolist(), 0, 0]
    assert data.new_out().shape == (6, 4, 32)


def test_pieces_have_both_ends_and_the_longest() -> None:
    found = pieces(Workload("x", (1, 200, 30), (900, 200, 31)))
    assert found == [
        Piece(0, 0, 1),
        Piece(2, 0, 30),
        Piece(1, 152, 200),
        Piece(1, 0, 48),
        Piece(1, 76, 124),
    ]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_pieces_lie_inside(workload: Workload) -> None:
    found = pieces(workload)
    assert 1 <= len(found) <= MAX_PIECES
    assert all(
        0 <= p.begin < p.end <= min(p.begin + PIECE_ROWS, workload.q_lens[p.request]) for p in found
    )
    longest = max(range(len(workload.kv_lens)), key=workload.kv_lens.__getitem__)
    assert longest in {p.request for p in found}


@pytest.mark.parametrize("kind", plan.KINDS)
def test_steps_to_plan(kind: str) -> None:
    step = plan.make_step(kind, 16)
    assert step.name == f"{kind}.r16"
    assert len(step.q_lens) == len(step.kv_lens) == 16
    first, rest = {"decode": (1, 1), "mixed": (1024, 1), "verification": (4, 4)}[kind]
    assert step.q_lens == (first, *(rest,) * 15)
    batch = plan.make_batch(step, torch.device("cpu"))
    assert batch.num_requests == 16
    assert int(batch.qo_indptr[-1]) == sum(step.q_lens)
    assert all(q <= kv for q, kv in zip(step.q_lens, step.kv_lens, strict=True))
