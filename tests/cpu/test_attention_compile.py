"""The operators under torch.compile: one graph, same results, shapes known without running."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_problem
from running import make_layer
from torch import Tensor

import fi_backend as fi

CASE = Case("compiled", ((3, 40), (1, 20)), variant="sinks")


def test_attention_is_one_graph() -> None:
    """Allocated and given outputs, lse and variant parameters; another plan needs no new graph."""
    problem, other = make_problem(CASE), make_problem(CASE, seed=1)
    layer = make_layer(CASE, problem)
    layer.plan(problem.batch)
    slot = layer.slot

    def model(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        kv = fi.KvCacheView.nhd(k, v)
        first = fi.attention(slot, q + 1, kv, params={"sinks": sinks}) * 2
        out = torch.zeros_like(q)
        fi.attention(slot, q, kv, out=out, lse=lse, params={"sinks": sinks})
        return first, out + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step, stance in ((problem, "default"), (other, "fail_on_recompile")):
        layer.plan(step.batch)
        lses = torch.empty(2, 4, 4)
        tensors = (step.q, step.kv.k, step.kv.v)
        expected = model(*tensors, lses[0], step.params["sinks"])
        with torch.compiler.set_stance(stance):
            actual = compiled(*tensors, lses[1], step.params["sinks"])
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert torch.equal(lses[0], lses[1]) and lses.isfinite().all()


def test_graphs_follow_their_slot() -> None:
    problem = make_problem(CASE)
    layers = [fi.Attention(CASE.heads, torch.float32, band=b) for b in (fi.CAUSAL, fi.Band(3, 0))]
    for layer in layers:
        layer.plan(problem.batch)

    def model(slot: fi.PlanSlot, q: Tensor) -> Tensor:
        return fi.attention(slot, q, problem.kv)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [compiled(layer.slot, problem.q) for layer in layers]
    for layer, result in zip(layers, results, strict=True):
        assert torch.equal(result, layer(problem.q, problem.kv))
    assert not torch.equal(results[0], results[1])


def test_append_and_merge_are_one_graph() -> None:
    cache = torch.zeros(2, 2, 4, 1, 8)

    def model(k: Tensor, slots: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        fi.append_kv(k, k * 2, fi.KvCacheView.nhd(cache[0], cache[1]), slots)
        return fi.merge_states(o, lse)

    arguments = (
        torch.randn(3, 1, 8),
        torch.tensor([0, -1, 6]),
        torch.randn(2, 3, 1, 8),
        torch.randn(2, 3, 1),
    )
    expected = model(*arguments)
    written = cache.clone()
    cache.zero_()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(cache, written) and written.count_nonzero() == 32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["attention", "append_kv", "merge_states"])
def test_schemas_tell_the_truth(name: str) -> None:
    """torch's own checks: aliasing, mutation, fake shapes."""
    problem = make_problem(Case("opcheck", ((2, 9),)))
    layer = make_layer(Case("opcheck", ()), problem)
    layer.plan(problem.batch)
    kv = problem.kv
    calls = {
        "attention": (
            (layer.slot.handle, problem.q, kv.k, kv.v, torch.zeros(2, 4, 64)),
            {"lse": torch.zeros(2, 4), "scale": 1.0},
        ),
        "append_kv": (
            (
                torch.ones(2, 2, 64),
                torch.ones(2, 2, 64),
                kv.k.clone(),
                kv.v.clone(),
                torch.tensor([3, -1]),
            ),
            {"k_scale": None, "v_scale": None},
        ),
        "merge_states": ((torch.ones(2, 3, 1, 8), torch.ones(2, 3, 1), True), {}),
    }
    op = getattr(torch.ops.fi_backend, name).default
    torch.library.opcheck(op, *calls[name], test_utils=("test_schema", "test_faketensor"))
