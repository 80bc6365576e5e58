"""CUDA graphs: a replayed graph finds its own plan filled, whatever vLLM lets it replay.

There is no GPU here: graphs are played by keeping what a capture returned and running it after
later builds.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm_layers import (
    NAN,
    Layer,
    Run,
    Step,
    make_builder,
    make_step,
    reference,
    run_layer,
    vllm_layer,
)

from fi_backend.integrations.common.logits import LayerLogits
from fi_backend.integrations.vllm import metadata, reset_stats, stats
from fi_backend.integrations.vllm.backend import FiBackend
from fi_backend.integrations.vllm.metadata import StepMetadataBuilder

FULL_MODES = [
    CUDAGraphMode.FULL,
    CUDAGraphMode.FULL_DECODE_ONLY,
    CUDAGraphMode.FULL_AND_PIECEWISE,
]


@pytest.fixture
def two_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders make a planner for decode steps too, as they do on a GPU."""
    monkeypatch.setattr(metadata, "has_decode_kernel", lambda _: True)


def dummy(q_lens: list[int], requests: int) -> CommonAttentionMetadata:
    """A dummy batch that vLLM captures with: KV of the query's length, padded requests."""
    step = make_step([(n, n) for n in q_lens])
    return padded(step.common, requests)


def padded(common: CommonAttentionMetadata, requests: int) -> CommonAttentionMetadata:
    """The batch as a graph of more requests sees it."""
    extra = requests - common.num_reqs
    table = common.block_table_tensor
    return common.replace(
        query_start_loc=torch.cat(
            [common.query_start_loc, common.query_start_loc[-1:].repeat(extra)]
        ),
        query_start_loc_cpu=torch.cat(
            [common.query_start_loc_cpu, common.query_start_loc_cpu[-1:].repeat(extra)]
        ),
        seq_lens=torch.cat([common.seq_lens, common.seq_lens.new_zeros(extra)]),
        block_table_tensor=torch.cat([table, table.new_zeros(extra, table.shape[1])]),
        num_reqs=requests,
    )


def replay(run: Run, layer: Any, captured: Any, cache: torch.Tensor, rows: int) -> torch.Tensor:
    """Run a layer with the metadata of a capture, as a graph does, on padded rows."""
    q = torch.full((rows, *run.q.shape[1:]), NAN)
    q[: run.q.shape[0]] = run.q
    out = torch.full_like(q, NAN)
    layer.impl.forward(layer, q, q[:, :2], q[:, :2], cache, captured, out)
    return out


@pytest.mark.usefixtures("two_plans")
@pytest.mark.parametrize("mode", FULL_MODES, ids=lambda mode: mode.name)
def test_graphs_captured_with_dummies_replay_real_batches(mode: CUDAGraphMode) -> None:
    spec = Layer()
    holder = vllm_layer(spec)
    builder = make_builder([holder])
    builder.vllm_config.compilation_config.cudagraph_mode = mode
    graphs = {}
    for size in (8, 4):
        for _ in range(2):  # warm-up, then capture: the same slots
            graphs[size] = builder.build_for_cudagraph_capture(dummy([1] * size, size))
    assert graphs[8].slots["layers.0.attn"] is graphs[4].slots["layers.0.attn"]
    for lengths, size in (
        ([(1, 40), (1, 7), (1, 100)], 4),
        ([(1, 17), (1, 1), (1, 33), (1, 64), (1, 5)], 8),
        ([(1, 129)], 4),
    ):
        step = make_step(lengths)
        cache = torch.full((70, 2, 16, 64), NAN)
        run = run_layer(holder, builder, step, cache)
        builder.build(0, padded(step.common, size))
        out = replay(run, holder, graphs[size], cache, rows=size)
        expected = reference(run, spec, step)
        torch.testing.assert_close(out[: step.tokens].double(), expected, rtol=0, atol=2e-5)
        assert out[step.tokens :].isnan().all(), "padded rows were written"


@pytest.mark.usefixtures("two_plans")
def test_one_graph_for_all_replays_a_prefill() -> None:
    spec = Layer()
    holder = vllm_layer(spec)
    builder = make_builder([holder])
    builder.vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    captured = builder.build_for_cudagraph_capture(dummy([1] * 8, 8))
    step = make_step([(6, 50), (1, 9)])
    cache = torch.full((20, 2, 16, 64), NAN)
    run = run_layer(holder, builder, step, cache)
    builder.build(0, padded(step.common, 8))
    out = replay(run, holder, captured, cache, rows=8)
    torch.testing.assert_close(out[:7].double(), reference(run, spec, step), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("two_plans")
def test_prefill_between_replays_leaves_the_decode_plan_alone() -> None:
    builder = make_builder([vllm_layer(Layer())])
    reset_stats()
    decode = builder.build(0, make_step([(1, 40), (1, 7)]).common).slots["layers.0.attn"]
    before = decode.plan.clone()
    mixed = builder.build(0, make_step([(1, 41), (30, 30)]).common).slots["layers.0.attn"]
    assert mixed is not decode and torch.equal(decode.plan, before)
    assert (stats().steps, stats().decode_steps) == (2, 1)


def test_views_of_vllms_memory_are_made_once() -> None:
    spec = Layer()
    holder = vllm_layer(spec)
    builder = make_builder([holder])
    step = make_step([(1, 40), (1, 7)])
    slot = builder.build(0, step.common).slots["layers.0.attn"]
    first = slot.batch
    assert builder.build(0, step.common).slots["layers.0.attn"].batch is first
    fewer = step.common.unpadded(num_actual_tokens=1, num_actual_reqs=1)
    assert builder.build(0, fewer).slots["layers.0.attn"].batch is not first
    # The next step in the same memory, as vLLM prepares it: lengths change, addresses do not.
    later = make_step([(1, 33), (1, 20)])
    for name in ("seq_lens", "query_start_loc"):
        getattr(step.common, name).copy_(getattr(later.common, name))
    table = step.common.block_table_tensor[:, : later.common.block_table_tensor.shape[1]]
    table.copy_(later.common.block_table_tensor)
    same_memory = Step(later.lengths, step.common, later.pages)
    same_memory.common.slot_mapping = later.common.slot_mapping
    run = run_layer(holder, builder, same_memory, torch.full((9, 2, 16, 64), NAN))
    torch.testing.assert_close(run.out.double(), reference(run, spec, later), rtol=0, atol=2e-5)


def test_verification_steps_take_the_decode_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "has_decode_kernel", lambda _: True)
    drafting = SimpleNamespace(num_speculative_tokens=3)
    builder = make_builder([vllm_layer(Layer())], speculative_config=drafting)
    reset_stats()
    for lengths in ([(4, 40), (4, 9)], [(4, 40), (1, 9)], [(5, 40)]):
        builder.build(0, make_step(lengths).common)
    assert stats().decode_steps == 2


@pytest.mark.usefixtures("two_plans")
def test_batch_invariance_has_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    builder = make_builder([vllm_layer(Layer())])
    reset_stats()
    builder.build(0, make_step([(1, 40)]).common)
    assert stats().decode_steps == 0


def test_support_that_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def support(builder: type[StepMetadataBuilder]) -> AttentionCGSupport:
        nothing: Any = None
        return builder.get_cudagraph_support(nothing, nothing)

    assert support(StepMetadataBuilder) is AttentionCGSupport.NEVER
    monkeypatch.setattr(metadata, "current_platform", SimpleNamespace(device_type="cuda"))
    assert support(StepMetadataBuilder) is AttentionCGSupport.ALWAYS
    # Its virtual requests get a new page table at every step, which a graph would not see.
    local = create_chunked_local_attention_backend(FiBackend, 32).get_builder_cls()
    assert support(local) is AttentionCGSupport.NEVER


def test_a_cache_is_forgotten_with_the_builders_that_served_it() -> None:
    holder = vllm_layer(Layer())
    builder = make_builder([holder])
    run_layer(holder, builder, make_step([(3, 40)]), torch.full((5, 2, 16, 64), NAN))
    assert holder.impl._view is not None
    del builder
    gc.collect()
    assert holder.impl._view is None and holder.impl._bound is None


def test_sinks_loaded_again_stay_where_graphs_read_them() -> None:
    weights = torch.tensor([1.0, 2.0]).bfloat16()
    logits = LayerLogits(None, None, weights)
    logits.bind_weights()
    first = logits.params["sinks"]
    weights.copy_(torch.tensor([3.0, 4.0]))
    logits.bind_weights()
    assert logits.params["sinks"] is first
    assert isinstance(first, torch.Tensor) and first.tolist() == [3.0, 4.0]
