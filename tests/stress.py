"""Replays of one captured graph with random plans, everything enqueued and nothing waited for.

Every replay is compared on the device with a run of the same step in other splits, in which nothing
is shared; now and then the host compares one with the oracle. ``python tests/stress.py mixed 1000
7`` runs by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from cases import STALE
from forest_steps import handed_over
from torch import Tensor

import fi_backend as fi
from fi_backend.oracle import Problem
from fi_backend.tolerance import assert_close

if TYPE_CHECKING:
    from fi_backend.workspace import Workspace

HEADS = fi.HeadShape(8, 2, 128)
LAYER_CLASS = fi.LayerClass(HEADS, torch.bfloat16)
PAGE = 16
NUM_TABLES = 8
# Two ways to split one step differ by the rounding of P and of the output to bf16, about 2^-8 of
# values up to 4; a wrong page or a lost partial state is of the order of the values themselves.
DISAGREEMENT = 0.08


@dataclass(frozen=True)
class Load:
    """What the steps of a captured graph look like; requests past the live ones have length 0."""

    requests: int
    tokens: int
    max_kv_len: int
    max_q_len: int = 0  # 0: any
    levels: int = 0  # of shared prefixes that the planner has room for

    @property
    def capacity(self) -> fi.Capacity:
        size = fi.Capacity(self.requests, self.tokens, self.max_kv_len, max_q_len=self.max_q_len)
        return size.with_sharing(self.levels) if self.levels else size

    @property
    def without_sharing(self) -> Load:
        return replace(self, levels=0)

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return qo_indptr [count, R + 1] and kv_len [count, R] of random steps."""
        rng = np.random.default_rng(seed)
        shape = (count, self.requests)
        live = np.arange(self.requests) < rng.integers(0, self.requests + 1, (count, 1))
        longest = self.max_q_len or 60
        ones = rng.random(shape) < (0.0 if self.max_q_len else 0.6)
        q_len = np.where(ones, 1, rng.integers(1, longest + 1, shape)) * live
        ends = np.minimum(q_len.cumsum(1), self.tokens)
        indptr = np.concatenate([np.zeros((count, 1), dtype=np.int64), ends], axis=1)
        room = self.max_kv_len - longest + 1
        context = np.exp(rng.random(shape) * np.log(room)).astype(np.int64) - 1
        if self.levels:  # long enough to share something
            context = rng.integers(0, room, shape)
        kv_len = (np.diff(indptr) + context) * live
        return torch.from_numpy(indptr).int(), torch.from_numpy(kv_len).int()

    def draw_tables(self, seed: int) -> Tensor:
        """Return NUM_TABLES page tables [R, pages of the longest request]; with levels, requests
        of a table branch off each other."""
        g = torch.Generator().manual_seed(seed)
        columns = -(-self.max_kv_len // PAGE)
        pages = self.requests * columns
        ids = torch.stack([torch.randperm(pages, generator=g) for _ in range(NUM_TABLES)])
        tables = ids.int().view(NUM_TABLES, self.requests, columns)
        for table in tables if self.levels else ():
            for row in range(1, self.requests):
                other, end = (int(torch.randint(n, (), generator=g)) for n in (row, columns + 1))
                table[row, :end] = table[other, :end]
        return tables


LOADS = {
    "decode": Load(48, 48, 1024, 1),
    "drafts": Load(24, 96, 1024, 4),
    "mixed": Load(12, 160, 700),
    "shared": Load(48, 144, 1024, 4, levels=8),
}


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return a graph's replay of ``run``, once it has loaded its kernels; on the CPU ``run``."""
    if device.type == "cpu":
        return run
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        run()
    return graph.replay


class Stress:
    """A captured attention launch, the static tensors that it reads, and what was found wrong.

    Args:
        load: of the steps.
        count: steps drawn.
        seed: of the steps and of all values.
        device: of everything.
        workspace: shared with another planner of the same stream; None: an own one.
    """

    def __init__(
        self,
        load: Load,
        count: int,
        seed: int = 0,
        device: str = "cuda:0",
        workspace: Workspace | None = None,
    ) -> None:
        self.load, self.device = load, torch.device(device)
        self.steps = [t.to(self.device) for t in load.draw(count, seed)]
        self.tables = load.draw_tables(seed).to(self.device)
        columns = self.tables.shape[-1]
        self.starts = torch.arange(0, columns * PAGE, PAGE, device=self.device)
        g = torch.Generator().manual_seed(seed)
        pages = load.requests * columns
        cache = torch.randn(2, pages, PAGE, HEADS.num_kv_heads, HEADS.head_dim_qk, generator=g)
        self.kv = fi.KvCacheView.nhd(*cache.to(self.device, torch.bfloat16))
        q = torch.randn(load.tokens, HEADS.num_qo_heads, HEADS.head_dim_qk, generator=g) * 3
        self.q = q.to(self.device, torch.bfloat16)
        self.batch = fi.PagedBatch(
            torch.zeros(load.requests + 1, dtype=torch.int32, device=self.device),
            torch.zeros(load.requests, dtype=torch.int32, device=self.device),
            fi.PageTable.dense(torch.full_like(self.tables[0], STALE), PAGE),
        )
        options = {} if workspace is None else {"workspace": workspace}
        self.planner = fi.StepPlanner([LAYER_CLASS], load.capacity, self.device, **options)
        alone = load.without_sharing.capacity
        self.other = fi.StepPlanner([LAYER_CLASS], alone, self.device, num_ctas=5)
        self.out, self.lse = self._outputs()
        self.other_out, self.other_lse = self._outputs()
        self.misplaced = torch.zeros((), dtype=torch.int64, device=self.device)
        self.dirty = torch.zeros((), dtype=torch.int64, device=self.device)
        self.worst = torch.zeros((), device=self.device)
        for planner in (self.planner, self.other):
            planner.plan(self.batch)  # a dummy step: no request has a token
        self._run(self.other, self.other_out, self.other_lse)
        self.replay = capture(lambda: self._run(self.planner, self.out, self.lse), self.device)
        self.tally = capture(self._tally, self.device)
        for total in (self.misplaced, self.dirty, self.worst):
            total.zero_()

    def _outputs(self) -> tuple[Tensor, Tensor]:
        return torch.empty_like(self.q), torch.empty(self.q.shape[:2], device=self.device)

    def _run(self, planner: fi.StepPlanner, out: Tensor, lse: Tensor) -> None:
        fi.attention(planner.slot(0), self.q, self.kv, out=out, lse=lse)

    def set_step(self, index: int) -> None:
        """Enqueue the lengths and the page table of a step; entries past kv_len are stale."""
        for static, drawn in zip(
            (self.batch.qo_indptr, self.batch.kv_len), self.steps, strict=True
        ):
            static.copy_(drawn[index])
        used = self.starts < self.batch.kv_len[:, None]
        table = self.tables[index % NUM_TABLES]
        self.batch.page_table.entries.copy_(table.where(used, STALE))

    def step(self, index: int) -> None:
        """Enqueue a step, its replay and the comparison with the other planner's run."""
        self.set_step(index)
        for tensor in (self.out, self.lse, self.other_out, self.other_lse):
            tensor.fill_(torch.nan)
        self.planner.plan(self.batch)
        self.replay()
        self.other.plan(self.batch)
        self._run(self.other, self.other_out, self.other_lse)
        self.tally()

    def _tally(self) -> None:
        """Add up what is wrong with the last step, on the device."""
        rows = torch.arange(len(self.q), device=self.device) < self.batch.qo_indptr[-1]
        written = self.out.isfinite().all(-1).all(-1)
        untouched = self.out.isnan().all(-1).all(-1) & self.lse.isnan().all(-1)
        self.misplaced += (torch.where(rows, ~written, ~untouched)).sum()
        same = self.lse == self.other_lse  # -inf where nothing is seen
        for mine, theirs in ((self.out, self.other_out), (self.lse, self.other_lse)):
            difference = (mine.float() - theirs.float()).abs()
            if mine is self.lse:
                difference = difference.where(~same, 0.0)
            difference = difference.flatten(1).amax(1).where(rows, 0.0)
            self.worst.copy_(torch.maximum(self.worst, difference.nan_to_num(torch.inf).max()))
        for planner in (self.planner, self.other):
            self.dirty += planner.slot(0).arrivals.count_nonzero()
        for counter in map(handed_over, self.planner.forests):
            if counter is not None:
                self.dirty += counter.count_nonzero()

    def check(self) -> None:
        """Wait, and raise AssertionError if a step so far was wrong."""
        assert int(self.misplaced) == 0, f"{int(self.misplaced)} rows unwritten or overwritten"
        assert int(self.dirty) == 0, f"{int(self.dirty)} arrival counters left above zero"
        assert float(self.worst) < DISAGREEMENT, f"splits disagree by {float(self.worst):.3g}"
        for forest in self.planner.forests:
            assert forest.reads().saved_kv_tokens > 0, "no step shared anything"

    def check_last(self) -> None:
        """Hold the last step against the oracle, and against an eager run bit by bit."""
        self.check()
        table = self.batch.page_table
        batch = fi.PagedBatch(
            self.batch.qo_indptr.cpu(),
            self.batch.kv_len.cpu(),
            fi.PageTable.dense(table.entries.cpu(), PAGE),
        )
        kv = fi.KvCacheView.nhd(self.kv.k.cpu(), self.kv.v.cpu())
        problem = Problem(batch, self.q.cpu(), kv)
        if problem.num_tokens:
            assert_close(self.out.cpu(), self.lse.cpu(), problem)
        out, lse = self._outputs()
        self._run(self.planner, out, lse)
        rows = slice(problem.num_tokens)
        assert torch.equal(out[rows], self.out[rows]) and torch.equal(lse[rows], self.lse[rows])


def run_steps(stress: Stress, count: int, samples: int = 8) -> None:
    """Run steps 0 to count - 1 far ahead of the device, and check ``samples`` of them closely."""
    every = max(count // samples, 1)
    for index in range(count):
        if stress.device.type == "cuda" and index % 100 == 0:
            torch.cuda._sleep(10_000_000)  # about 5 ms: the next steps are planned meanwhile
        stress.step(index)
        if index % every == every - 1:
            stress.check_last()
    stress.check()


if __name__ == "__main__":
    name, steps, first_seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    place = os.environ.get("FI_TEST_DEVICE", "cuda:0")
    run_steps(Stress(LOADS[name], steps, first_seed, place), steps)
    print(f"{name}: {steps} steps clean")
