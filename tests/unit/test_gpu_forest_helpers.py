"""What the GPU tests of shared prefixes stand on: problems, steps, kernels, loads."""

from __future__ import annotations

import dataclasses

import pytest
import sanitizer_work
import torch
from cases import Case, make_problem
from forest_problems import LAYERS, MAX_LEVELS, Q_LENS, random_shared, sharing_capacity
from forest_steps import MOST_TOKENS, UNUSED, nodes_of, serving_step
from named_cases import BF16, STEPS, heads
from running import layer_class_of
from specialisations import kernel_of
from stress import LOADS, PAGE, Stress, run_steps

from fi_backend.class_plans import plan_class
from fi_backend.jit.attention_kernels import attention_kernel
from fi_backend.oracle import solve
from fi_backend.prefix_forest import PrefixForest

CPU = torch.device("cpu")


def table_of(kind: str, seed: int = 0) -> list[list[int]]:
    """Rows of a serving step as its table has them."""
    step = serving_step(seed, 12, 16, kind)
    table = step.batch.page_table
    counts = [-(-kv // 16) for kv in step.batch.kv_len.tolist()]
    if table.indptr is not None:
        return [row.tolist() for row in table.entries.split(table.indptr.diff().tolist())]
    entries = table.entries if table.row_index is None else table.entries[table.row_index]
    assert all((row[count:] == UNUSED).all() for row, count in zip(entries, counts, strict=True))
    return [row[:count].tolist() for row, count in zip(entries, counts, strict=True)]


def test_steps_of_serving_size_are_the_same_in_any_table() -> None:
    dense = table_of("dense")
    assert table_of("csr") == table_of("indirect") == dense
    assert all(page >= 0 for row in dense for page in row)
    assert table_of("dense", 1) != dense
    one, two = (serving_step(seed, 256, 16) for seed in (0, 2))
    assert one.batch.page_table.entries.shape == two.batch.page_table.entries.shape
    assert one.batch.kv_len.dtype == torch.int64
    assert serving_step(1, 256, 16).batch.kv_len.dtype == torch.int32
    for step in (one, two):
        q_len, kv_len = step.batch.qo_indptr.diff(), step.batch.kv_len
        assert (q_len <= kv_len).all() and int(kv_len.max()) <= MOST_TOKENS
        assert int(step.batch.qo_indptr[-1]) <= step.capacity.max_tokens
        assert len(nodes_of(step.arrays(step.find_on_host()))) > 10


def test_found_problems_are_in_contract_and_share() -> None:
    nodes, kinds = 0, set()
    for seed in range(0, 3 * len(LAYERS) * len(Q_LENS), 7):
        step, case, problem = random_shared(seed)
        batch, capacity = problem.batch, sharing_capacity(step)
        kinds.add((case.heads.group_size, case.heads.head_dim_qk, step))
        assert batch.num_requests <= capacity.max_requests
        assert problem.num_tokens <= capacity.max_tokens
        assert int(batch.kv_len.max()) <= capacity.max_kv_len
        forest = PrefixForest(capacity, CPU)
        forest.find(batch)
        nodes += forest.reads().saved_kv_tokens > 0
    assert nodes > 5 and len(kinds) > 8


@pytest.mark.parametrize("seed", [0, 11, 22])
def test_no_request_reads_what_nobody_wrote(seed: int) -> None:
    """The oracle would be NaN where a shared page is not full."""
    assert solve(random_shared(seed).problem)[0].isfinite().all()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_the_kernels_named_are_those_that_planners_load(group: int, step: str) -> None:
    case = Case("any", ((1, 1),), heads(group, 128), BF16)
    layer_class = layer_class_of(case, make_problem(case))
    planned = plan_class(
        layer_class,
        sharing_capacity(step),
        torch.device("cuda"),
        num_ctas=None,
        invariant_chunk=0,
    )
    assert planned.spec is not None
    assert attention_kernel(planned.spec) == kernel_of(case, step, shares=True)


def test_tables_of_the_shared_load_branch_off_each_other() -> None:
    load = LOADS["shared"]
    tables, alone = load.draw_tables(1), load.without_sharing.draw_tables(1)
    assert tables.shape == alone.shape == (8, 48, 1024 // PAGE)
    assert all(len(set(table.flatten().tolist())) == table.numel() for table in alone)
    for table in tables:
        assert len(set(table[:, 8].tolist())) < 40  # past two checkpoints
    assert load.capacity.max_nodes == 48 and load.without_sharing.capacity.max_nodes == 0
    assert load.capacity.max_links == MAX_LEVELS * 48


def test_the_shared_load_on_the_cpu() -> None:
    load = dataclasses.replace(LOADS["shared"], requests=8, tokens=24, max_kv_len=512)
    stress = Stress(load, 20, seed=1, device="cpu")
    run_steps(stress, 5, samples=1)
    assert stress.other.forests == ()
    (forest,) = stress.planner.forests
    forest.totals.zero_()
    with pytest.raises(AssertionError, match="no step shared anything"):
        stress.check()


def test_what_the_sanitizer_watches_of_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer_work, "DEVICE", "cpu")
    found: list[int] = []
    find = PrefixForest.find

    def spy(forest: PrefixForest, batch: object, stream: int = 0) -> None:
        find(forest, batch, stream)  # type: ignore[arg-type]
        found.append(forest.reads().saved_kv_tokens)

    monkeypatch.setattr(PrefixForest, "find", spy)
    sanitizer_work.run_forests()
    assert len(found) == 2 * 4 + len(sanitizer_work.FOUND)
    assert all(found[-3:])  # the large step and both problems
