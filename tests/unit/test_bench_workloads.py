"""The workloads of the kernel benchmark: floors, draws, page tables, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forest_steps import CHECKPOINT

import fi_backend as fi
from e2e_bench import plan
from e2e_bench.correctness import MAX_PIECES, PIECE_ROWS, Piece, pieces
from e2e_bench.gpu_data import ROTATION_BYTES, Data, make_batch, make_csr, num_layers, page_rows
from e2e_bench.impls import make_planner
from e2e_bench.workloads import (
    WORKLOADS,
    Prefix,
    Workload,
    decode_over,
    one_prefix,
    samples,
    uniform,
    zipf,
)

BY_NAME = {workload.name: workload for workload in WORKLOADS}
# Floors in µs of the runs whose figures are to be compared with.
FLOORS = {
    "dec.b1.k1k": 1.0, "dec.b1.k8k": 7.6, "dec.b1.k128k": 121, "dec.b16.k1k": 15.2,
    "dec.b64.k4k": 243, "dec.b64.k4k.page1": 243, "dec.b64.uniform": 262, "dec.b64.zipf": 243,
    "dec.b256.uniform": 259, "dec.skew": 91, "dec.tp8": 30.4, "dec.d64": 122, "dec.d256": 243,
    "pre.b1.4k": 173, "pre.b1.16k": 2773, "pre.b1.16k.page1": 2773, "pre.b16.1k": 173,
    "pre.b8.zipf": 531, "pre.d64": 693, "pre.d256": 693, "pre.chunk": 1343, "mix.chunk1k": 270,
    "mix.chunk512": 264, "spec.q4": 122, "spec.q8": 123, "shared.64": 38, "shared.16": 34,
    "shared.8x16": 91.6, "shared.tree3": 62.9, "shared.n4": 4.6, "shared.n16": 8.3,
    "shared.n64": 22.3, "shared.ragged.page1": 42.6,
}  # fmt: skip
HEADS = fi.HeadShape(4, 2, 32)
PAIR = Workload("pair", (5, 1), (21, 40), HEADS, page=8)
# 0 goes on with 1 or with 2, one request has 3, one nothing.
TREE = decode_over(
    "tree",
    (Prefix(16), Prefix(8, 0), Prefix(16, 0), Prefix(24)),
    (1, 3, 2, -1, 1, 0),
    (5, 1, 8, 20, 9, 3),
    heads=HEADS,
    page=8,
)
SHARED = [workload for workload in WORKLOADS if workload.prefixes]


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
    shared = one_prefix("shared", 32, (8,) * 3, heads=HEADS, page=8)
    assert shared.kv_lens == (40,) * 3
    assert shared.num_pages == 4 + 3
    assert shared.num_bytes == ((32 + 3 * 8) * 2 + 3 * 4) * 64 * 2
    assert shared.flops == 3 * 40 * 2 * 4 * 64


def test_a_tree_counts_every_prefix_once() -> None:
    assert [TREE.path(r) for r in range(6)] == [(0, 1), (3,), (0, 2), (), (0, 1), (0,)]
    assert TREE.kv_lens == (16 + 8 + 5, 24 + 1, 16 + 16 + 8, 20, 16 + 8 + 9, 16 + 3)
    assert TREE.own_lens == (5, 1, 8, 20, 9, 3)
    assert TREE.levels == 2
    assert TREE.page_counts == (2, 1, 2, 3, 1, 1, 1, 3, 2, 1)
    assert TREE.num_kv_tokens == 16 + 8 + 16 + 24 + 46
    assert PAIR.levels == 0


def test_samples_share_the_whole_pages_of_their_prompt() -> None:
    whole, torn = (samples("n", prompt, (7, 30)) for prompt in (64, 70))
    assert (whole.prefixes, whole.own_lens, whole.kv_lens) == ((Prefix(64),), (7, 30), (71, 94))
    assert (torn.prefixes, torn.own_lens, torn.kv_lens) == ((Prefix(64),), (13, 36), (77, 100))


@pytest.mark.parametrize(
    ("name", "requests", "tokens"),
    [
        ("shared.8x16", 128, 8 * 4096 + 128 * 512),
        ("shared.tree3", 64, 2048 + 8 * 4096 + 16 * 1024 + 64 * 256),
        ("shared.n16", 16, 4096 + sum(BY_NAME["shared.n16"].own_lens)),
        ("shared.ragged.page1", 64, 13_074 + sum(BY_NAME["shared.ragged.page1"].own_lens)),
    ],
)
def test_trees_of_the_benchmark(name: str, requests: int, tokens: int) -> None:
    workload = BY_NAME[name]
    assert (len(workload.kv_lens), workload.num_kv_tokens) == (requests, tokens)
    tree = BY_NAME["shared.tree3"]
    assert [tree.path(r) for r in (0, 1, 8, 16)] == [(0, 1, 9), (0, 2, 10), (0, 1, 17), (0, 1, 9)]


@pytest.mark.parametrize(
    "change",
    [
        {"prefixes": (Prefix(12),)},  # no whole pages
        {"prefixes": (Prefix(16, 0),)},  # its own parent
        {"prefixes": (Prefix(16), Prefix(8))},  # of no request
        {"prefixes": (Prefix(40),)},  # nothing left for the query token
        {"prefixes": (Prefix(16),), "last_prefix": (0,)},
    ],
    ids=str,
)
def test_wrong_trees_are_refused(change: dict[str, Any]) -> None:
    options = {"last_prefix": (0, 0)} | change
    with pytest.raises(AssertionError):
        Workload("wrong", (1, 1), (40, 40), page=8, **options)


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


@pytest.mark.parametrize("workload", [TREE, *SHARED, PAIR], ids=lambda w: w.name)
def test_every_page_has_one_owner_or_one_prefix(workload: Workload) -> None:
    rows = page_rows(workload)
    assert [len(row) for row in rows] == [-(-kv // workload.page) for kv in workload.kv_lens]
    of_prefix: dict[int, list[int]] = {}
    own: list[int] = []
    for request, row in enumerate(rows):
        begin = 0
        for prefix in workload.path(request):
            end = begin + workload.page_counts[prefix]
            assert of_prefix.setdefault(prefix, row[begin:end].tolist()) == row[begin:end].tolist()
            begin = end
        own += row[begin:].tolist()
    pages = [*own, *(page for pages in of_prefix.values() for page in pages)]
    assert sorted(pages) == list(range(workload.num_pages))


@pytest.mark.parametrize("workload", SHARED, ids=lambda w: w.name)
def test_the_planner_finds_every_prefix(workload: Workload) -> None:
    planner = make_planner(workload, torch.device("cpu"))
    planner.plan(make_batch(workload, page_rows(workload), torch.device("cpu")))
    assert planner.status == 0
    saved = 0
    for prefix in range(len(workload.prefixes)):
        paths = [workload.path(r) for r in range(len(workload.kv_lens))]
        chains = [path[: path.index(prefix) + 1] for path in paths if prefix in path]
        end = sum(workload.prefixes[p].tokens for p in chains[0])
        begin = end - workload.prefixes[prefix].tokens
        saved += (len(chains) - 1) * (end // CHECKPOINT - begin // CHECKPOINT) * CHECKPOINT
    (forest,) = planner.forests
    assert forest.reads() == (sum(workload.kv_lens), saved)
    assert int(planner.slot(0).arrays()["header"]["num_nodes"]) == len(workload.prefixes)  # type: ignore[index]


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
