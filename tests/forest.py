"""Batches whose requests share prefixes, as a prefix cache leaves them: any groups, any levels."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cases import STALE, Case, make_problem
from torch import Tensor

from fi_backend import PagedBatch, PageTable
from fi_backend.oracle import Problem

Group = tuple[tuple[int, ...], int, int]  # members, kv_begin, kv_end


@dataclass(frozen=True)
class Tree:
    """A node of a forest: requests and how far their KV agrees; children agree further."""

    members: tuple[int, ...]
    kv_end: int
    children: tuple[Tree, ...] = ()

    def groups(self, kv_begin: int = 0) -> list[Group]:
        """All nodes at and below this one, parents first."""
        below = [g for child in self.children for g in child.groups(self.kv_end)]
        return [(self.members, kv_begin, self.kv_end), *below]


def random_tree(
    rng: random.Random, members: Sequence[int], kv_len: Sequence[int], granule: int, begin: int = 0
) -> tuple[Tree, ...]:
    """Partition some of the members at random; ends are multiples of the granule."""
    pool, trees = list(members), []
    rng.shuffle(pool)
    while pool:
        size = min(len(pool), rng.choice((1, 2, 3, 5, 9)))
        chosen, pool = pool[:size], pool[size:]
        room = (min(kv_len[r] for r in chosen) - begin) // granule
        if room < 1 or rng.random() < 0.15:
            continue
        end = begin + granule * rng.randint(1, room)
        below = random_tree(rng, chosen, kv_len, granule, end) if size > 1 else ()
        trees.append(Tree(tuple(chosen), end, below))
    return tuple(trees)


def share(problem: Problem, trees: Sequence[Tree]) -> Problem:
    """Make the members of every group hold the first member's pages in the group's range."""
    table = problem.batch.page_table
    entries = table.entries.clone()
    for tree in trees:
        for members, begin, end in tree.groups():
            pages = slice(begin // table.page_size, end // table.page_size)
            entries[list(members), pages] = entries[members[0], pages].clone()
    batch = PagedBatch(
        problem.batch.qo_indptr,
        problem.batch.kv_len,
        PageTable.dense(entries, table.page_size, page_map=table.page_map),
    )
    return dataclasses.replace(problem, batch=batch)


def make_shared(case: Case, trees: Sequence[Tree], seed: int = 0) -> Problem:
    """A problem whose requests share the prefixes that the trees name."""
    return share(make_problem(case, seed), trees)


def groups_of(trees: Sequence[Tree]) -> list[Group]:
    return [group for tree in trees for group in tree.groups()]


def hide_shared_entries(batch: PagedBatch) -> PagedBatch:
    """Replace entries that nodes read through another row by stale ones."""
    assert batch.nodes is not None and batch.nodes.own_begin is not None
    table = batch.page_table
    entries: Tensor = table.entries.clone()
    keep = torch.zeros_like(entries, dtype=torch.bool)
    for row, begin in enumerate(batch.nodes.own_begin.tolist()):
        keep[row, begin // table.page_size :] = True
    for row, begin, end in zip(
        batch.nodes.table_row, batch.nodes.kv_begin, batch.nodes.kv_end, strict=True
    ):
        keep[int(row), int(begin) // table.page_size : -(-int(end) // table.page_size)] = True
    entries[~keep] = STALE
    return dataclasses.replace(batch, page_table=PageTable.dense(entries, table.page_size))
