"""Problems whose page tables share prefixes that nobody names: a planner has to find them."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import NamedTuple

import torch
from cases import Case, make_problem, make_table
from named_cases import BF16, FP8, FP16, capacity_of
from torch import Tensor

from fi_backend import CAUSAL, FULL, Capacity, HeadShape, PagedBatch
from fi_backend.oracle import Problem

MAX_LEVELS = 8
# Query tokens of requests by kind of step (named_cases.STEPS); longer ones than 64 are no members.
Q_LENS = {"decode": (1,), "drafts": (2, 3, 4, 8), "any": (0, 1, 1, 1, 3, 20, 64, 65)}
# Group size, head dimension, dtypes and variant: each is a specialisation of the kernel.
LAYERS = (
    (1, 64, BF16, None, ""),
    (4, 128, BF16, None, ""),
    (8, 128, FP16, FP8, ""),
    (4, 256, BF16, None, ""),
    (8, 256, BF16, FP8, ""),
    (1, 128, FP16, None, "soft_cap"),
    (8, 64, BF16, None, "alibi"),
    (4, 128, BF16, FP8, "sinks"),
    (4, 64, FP16, None, "tree"),
    (2, 64, BF16, None, "sigmoid"),
)


class Shared(NamedTuple):
    """A problem and its planner's kind of step (named_cases.STEPS)."""

    step: str
    case: Case
    problem: Problem


def sharing_capacity(step: str, levels: int = MAX_LEVELS) -> Capacity:
    """Return a capacity of this kind of step with room for prefixes, also of long requests."""
    capacity = capacity_of(step).with_sharing(levels)
    return dataclasses.replace(capacity, max_shared_tokens=levels * capacity.max_tokens // 2)


def random_shared(seed: int) -> Shared:
    """Return requests that branch off each other, some with equal ids behind different ones.

    Seeds that are equal modulo the number of LAYERS and of Q_LENS run the same kernels.
    """
    step, case = random_step_and_case(seed)
    draw = Random(-seed - 1)
    problem = make_problem(dataclasses.replace(case, table="dense"), seed)
    rows, whole_pages = _rows(problem.batch), [kv // case.page_size for _, kv in case.lengths]
    _branch_off(draw, rows, whole_pages)
    if draw.random() < 0.4:
        _mix_in_equal_ids(draw, rows, whole_pages)
    table = make_table(case, rows, torch.Generator().manual_seed(seed))
    batch = dataclasses.replace(problem.batch, page_table=table)
    return Shared(step, case, dataclasses.replace(problem, batch=batch))


def random_step_and_case(seed: int) -> tuple[str, Case]:
    """Return the kind of step and the case of ``random_shared``, without its tensors."""
    draw = Random(seed)
    step = list(Q_LENS)[seed // len(LAYERS) % len(Q_LENS)]
    group, dim, dtype, kv_dtype, variant = LAYERS[seed % len(LAYERS)]
    kv_heads = draw.choice((1, 2))
    lengths: list[tuple[int, int]] = []
    room = capacity_of(step).max_tokens
    for _ in range(draw.choice((4, 9, 16, 30))):
        q_len = min(draw.choice(Q_LENS[step]), room)
        room -= q_len
        context = draw.choice((draw.randint(0, 100), draw.randint(100, 700), 600))
        lengths.append((q_len, q_len + context))
    case = Case(
        f"found-{seed}",
        tuple(lengths),
        HeadShape(group * kv_heads, kv_heads, dim),
        dtype,
        kv_dtype,
        draw.choice((1, 16, 16, 64)),
        draw.choice(("nhd", "hnd", "packed")),
        draw.choice(("dense", "wide", "indirect", "indirect64", "csr")),
        draw.choice((CAUSAL, CAUSAL, FULL)),
        variant,
        wide_lengths=draw.random() < 0.3,
        scales="per_head" if kv_dtype is not None else "",
    )
    return step, case


def _rows(batch: PagedBatch) -> list[Tensor]:
    table = batch.page_table
    counts = [-(-kv // table.page_size) for kv in batch.kv_len.tolist()]
    return [row[:count].clone() for row, count in zip(table.entries, counts, strict=True)]


def _branch_off(draw: Random, rows: list[Tensor], whole_pages: list[int]) -> None:
    """Let most rows begin with the pages of another, up to anywhere."""
    order = draw.sample(range(len(rows)), len(rows))
    for i, row in enumerate(order[1:], 1):
        if draw.random() < 0.85:
            other = draw.choice((order[0], draw.choice(order[:i])))
            room = min(whole_pages[row], whole_pages[other])
            end = draw.choice((room, room * 2 // 3, draw.randint(0, room)))
            rows[row][:end] = rows[other][:end]


def _mix_in_equal_ids(draw: Random, rows: list[Tensor], whole_pages: list[int]) -> None:
    """Give rows whole pages of others at equal positions, behind different ones mostly."""
    for _ in rows:
        a, b = draw.randrange(len(rows)), draw.randrange(len(rows))
        room = min(whole_pages[a], whole_pages[b])
        if a != b and room > 0:
            at = draw.randrange(room)
            end = draw.randint(at, room)
            rows[a][at:end] = rows[b][at:end]
