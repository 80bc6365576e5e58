"""Launches that overlap the kernel before them: nobody reads what is not written yet."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from named_cases import BF16
from stress import HEADS, LOADS, PAGE, Stress, capture
from torch import Tensor

import fi_backend as fi

STEPS, LAYERS = 30, 12
Rest = Callable[[], object]  # waits for the device, or does nothing


@pytest.mark.parametrize("name", ["decode", "mixed", "shared"])
def test_a_layer_reads_what_the_layer_before_wrote(device: str, name: str) -> None:
    """Queries are the output of the layer before, whose grid still merges when the next begins."""
    stress = Stress(LOADS[name], STEPS, 6, device)

    def layer(q: Tensor, out: Tensor, rest: Rest) -> None:
        fi.attention(stress.planner.slot(0), q, stress.kv, out=out)
        rest()

    compare_with_rests(stress, layer)


@pytest.mark.parametrize("name", ["decode", "mixed", "shared"])
def test_attention_reads_what_was_just_appended(device: str, name: str) -> None:
    """K and V, too, are of the layer before; the append lets attention start before it has ended,
    and overwrites what the attention before reads."""
    stress = Stress(LOADS[name], STEPS, 8, device)
    slots = torch.empty(stress.load.tokens, dtype=torch.int64, device=device)
    heads = HEADS.num_kv_heads

    def layer(q: Tensor, out: Tensor, rest: Rest) -> None:
        fi.append_kv(q[:, :heads], q[:, heads : 2 * heads], stress.kv, slots)
        rest()
        fi.attention(stress.planner.slot(0), q, stress.kv, out=out)
        rest()

    compare_with_rests(stress, layer, lambda: slots.copy_(new_slots(stress)))


def new_slots(stress: Stress) -> Tensor:
    """Return the slots of a step's new tokens, -1 where another token has it: pages are shared."""
    batch = stress.batch
    tokens = torch.arange(stress.load.tokens, device=stress.device, dtype=torch.int32)
    owner = torch.bucketize(tokens, batch.qo_indptr[1:], right=True)
    request = owner.clamp(max=stress.load.requests - 1)
    position = batch.kv_len[request] - batch.qo_indptr[request + 1] + tokens
    position = position.clamp(min=0).long()
    page = batch.page_table.entries[request, position // PAGE].long()
    slots = (page * PAGE + position % PAGE).where(owner < stress.load.requests, -1)
    is_taken = (slots[:, None] == slots).tril(-1).any(1)
    return slots.where(~is_taken, -1)


def compare_with_rests(
    stress: Stress,
    layer: Callable[[Tensor, Tensor, Rest], None],
    prepare: Callable[[], object] = lambda: None,
) -> None:
    """Hold a graph of layers, each on what the one before wrote, against runs of each by itself."""
    outs = torch.empty(LAYERS, *stress.q.shape, dtype=BF16, device=stress.device)
    first = stress.kv.k.clone(), stress.kv.v.clone()

    def model(rest: Rest = lambda: None) -> None:
        for q, out in pairwise([stress.q, *outs]):
            layer(q, out, rest)

    stress.set_step(0)
    stress.planner.plan(stress.batch)
    prepare()
    replay = capture(model, stress.device)
    for index in range(STEPS):
        stress.set_step(index)
        stress.planner.plan(stress.batch)
        prepare()
        results = []
        for run in (lambda: model(lambda: torch.cuda.synchronize(stress.device)), replay):
            outs.fill_(torch.nan)
            stress.kv.k.copy_(first[0])
            stress.kv.v.copy_(first[1])
            run()
            results.append(outs.view(torch.int16).cpu())  # bits: what is not written stays NaN
        assert torch.equal(*results), f"step {index}"


def test_a_captured_launch_follows_whatever_is_before_it(device: str) -> None:
    """Overlap is of two kernels: a copy, a fill and another stream are waited for as a whole."""
    stress, source = Stress(LOADS["shared"], 1, 7, device), torch.cuda.Stream(device)
    given, q = stress.q.clone(), torch.full_like(stress.q, torch.nan)
    outs = torch.empty(3, *q.shape, dtype=BF16, device=device)

    def layer(q: Tensor, out: Tensor) -> None:
        fi.attention(stress.planner.slot(0), q, stress.kv, out=out)

    def model() -> None:
        q.copy_(given)
        layer(q, outs[0])
        outs[1].zero_()
        layer(q, outs[1])
        q.fill_(torch.nan)
        source.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(source):
            q.copy_(given)
        torch.cuda.current_stream(device).wait_stream(source)
        layer(q, outs[2])

    stress.set_step(0)
    stress.planner.plan(stress.batch)
    expected = torch.zeros_like(q)
    layer(given, expected)
    replay = capture(model, stress.device)
    for _ in range(20):
        outs.zero_()
        replay()
        assert all(torch.equal(out, expected) for out in outs)


def test_streams_that_join_are_both_waited_for(device: str) -> None:
    """Attention of two planners beside each other; a third reads what the other stream wrote."""
    stress, source = Stress(LOADS["shared"], 1, 9, device), torch.cuda.Stream(device)
    q, outs = torch.zeros_like(stress.q), torch.zeros(2, *stress.q.shape, dtype=BF16, device=device)

    def model(beside: torch.cuda.Stream) -> None:
        current = torch.cuda.current_stream(device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            fi.attention(stress.other.slot(0), stress.q, stress.kv, out=q)
        fi.attention(stress.planner.slot(0), stress.q, stress.kv, out=outs[0])
        current.wait_stream(beside)
        fi.attention(stress.planner.slot(0), q, stress.kv, out=outs[1])

    stress.set_step(0)
    stress.planner.plan(stress.batch)
    stress.other.plan(stress.batch)
    model(torch.cuda.current_stream(device))  # one after the other
    torch.cuda.synchronize(device)
    expected = outs.clone()
    replay = capture(lambda: model(source), stress.device)
    for _ in range(20):
        q.fill_(torch.nan)
        outs.zero_()
        replay()
        assert torch.equal(outs, expected)
