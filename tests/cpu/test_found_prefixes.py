"""Prefixes that the planner finds: results are those of requests that share nothing."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
from forest_steps import Step, random_step

import fi_backend as fi
from fi_backend.variants import shipped

STEPS_EACH = 150


def step_with_cache(seed: int) -> tuple[Step, fi.PagedBatch, fi.KvCacheView, fi.HeadShape]:
    """A random step whose page ids number a cache, NaN in pages that nobody has."""
    draw, generator = Random(seed), torch.Generator().manual_seed(seed)
    step = random_step(seed, max_requests=14, most_tokens=1500)
    heads = fi.HeadShape(*draw.choice([(2, 1), (3, 1), (2, 2), (8, 1)]), 32)
    table = step.batch.page_table
    used = sorted({p for row in step.pages for p in row})
    place = {p: i + 1 for i, p in enumerate(used)}
    entries = table.entries.clone().apply_(lambda p: place.get(p, 1 << 30))
    shape = (len(used) + 2, table.page_size, heads.num_kv_heads, heads.head_dim_qk)
    k, v = torch.randn(2, *shape, generator=generator)
    k[0] = v[0] = k[-1] = v[-1] = torch.nan
    batch = dataclasses.replace(step.batch, page_table=dataclasses.replace(table, entries=entries))
    return step, batch, fi.KvCacheView.nhd(k * 3, v), heads


def run(
    batch: fi.PagedBatch,
    kv: fi.KvCacheView,
    layer: fi.LayerClass,
    capacity: fi.Capacity,
    num_ctas: int,
) -> tuple[torch.Tensor, torch.Tensor, fi.StepPlanner]:
    planner = fi.StepPlanner([layer], capacity, num_ctas=num_ctas)
    planner.plan(batch)
    tokens, heads = int(batch.qo_indptr[-1]), layer.heads
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, heads.num_qo_heads, heads.head_dim_qk, generator=generator)
    lse = torch.full((tokens, heads.num_qo_heads), torch.nan)
    return fi.attention(planner.slot(0), q, kv, lse=lse), lse, planner


@pytest.mark.parametrize("part", range(14))
def test_random_steps_give_the_same_with_and_without_sharing(part: int) -> None:
    found = 0
    for seed in range(part * STEPS_EACH, (part + 1) * STEPS_EACH):
        step, batch, kv, heads = step_with_cache(seed)
        draw = Random(-seed)
        variant = draw.choice([None, None, shipped.soft_cap(20.0)])
        band = draw.choice([fi.CAUSAL, fi.CAUSAL, fi.FULL, fi.Band.window(200)])
        layer = fi.LayerClass(heads, torch.float32, band=band, variant=variant)
        capacity, num_ctas = step.capacity, draw.choice([1, 4, 13])
        off = dataclasses.replace(capacity, max_nodes=0)
        expected, expected_lse, _ = run(batch, kv, layer, off, num_ctas)
        out, lse, planner = run(batch, kv, layer, capacity, num_ctas)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)
        found += int(planner.slot(0).arrays()["header"]["num_nodes"])  # type: ignore[index]
    assert found > STEPS_EACH // 10


def test_reads_are_counted_over_steps() -> None:
    table = torch.arange(64, dtype=torch.int32).repeat(4, 1)
    table[:, -1] += torch.arange(4, dtype=torch.int32)
    batch = fi.PagedBatch(
        torch.arange(5, dtype=torch.int32),
        torch.full((4,), 1024, dtype=torch.int32),
        fi.PageTable.dense(table, 16),
    )
    layer = fi.LayerClass(fi.HeadShape(4, 2, 32), torch.float32)
    planner = fi.StepPlanner([layer], fi.Capacity(4, 4, 1024).with_sharing())
    planner.plan(batch)
    planner.plan(batch)
    (forest,) = planner.forests
    assert forest.reads() == (2 * 4 * 1024, 2 * 3 * 960)


def test_nothing_is_looked_for_beside_given_nodes_or_under_a_window() -> None:
    table = torch.arange(64, dtype=torch.int32).repeat(4, 1)
    indptr, lengths = torch.arange(5, dtype=torch.int32), torch.full((4,), 1024, dtype=torch.int32)
    batch = fi.PagedBatch(indptr, lengths, fi.PageTable.dense(table, 16))
    heads, capacity = fi.HeadShape(4, 2, 32), fi.Capacity(4, 4, 1024).with_sharing()
    window = fi.LayerClass(heads, torch.float32, band=fi.Band.window(300))
    planner = fi.StepPlanner([fi.LayerClass(heads, torch.float32), window], capacity)
    planner.plan(batch)
    counts = [int(planner.slot(i).arrays()["header"]["num_nodes"]) for i in (0, 1)]  # type: ignore[index]
    assert counts == [1, 0]
    given = fi.shared_prefix(batch, [((0, 1), 0, 256)])
    planner.plan(given)
    assert int(planner.slot(0).arrays()["nodes"][0]["kv_end"]) == 256  # type: ignore[index]
