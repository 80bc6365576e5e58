"""How layers share plans, and the groups that vLLM makes by wrapping a backend."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.model_executor.layers.attention.encoder_only_attention import (
    create_encoder_only_attention_backend,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
)
from vllm_layers import (
    NAN,
    Layer,
    make_builder,
    make_step,
    reference,
    run_layer,
    vllm_layer,
)

from fi_backend import Band
from fi_backend.integrations.vllm import reset_stats, scratch, stats, threads
from fi_backend.integrations.vllm.backend import FiBackend

PAGE = 16


def test_layers_of_one_class_share_a_plan() -> None:
    specs = [
        Layer("a"),
        Layer("b", sliding_window=9),
        Layer("c"),
        Layer("d", logits_soft_cap=30.0),
        Layer("e", logits_soft_cap=30.0),
    ]
    builder = make_builder([vllm_layer(spec) for spec in specs])
    reset_stats()
    slots = builder.build(0, make_step([(3, 40), (1, 7)]).common).slots
    assert slots["a"] is slots["c"] and slots["d"] is slots["e"]
    assert len({id(slot) for slot in slots.values()}) == 3
    assert slots["b"].layer_class.band == Band(8, 0)
    assert (stats().steps, stats().planned_requests, stats().planned_tokens) == (1, 2, 4)


def test_a_bidirectional_window_reaches_both_ways() -> None:
    impl = Layer(sliding_window=9).impl()
    assert impl.band(causal=True) == Band(8, 0)
    assert impl.band(causal=False) == Band(8, 8)


def test_slots_stay_in_place_from_step_to_step() -> None:
    builder = make_builder([vllm_layer(Layer("a"))])
    first = builder.build(0, make_step([(3, 40)]).common).slots["a"]
    assert builder.build(0, make_step([(1, 41), (9, 9)]).common).slots["a"] is first


def test_encoder_only_layers_read_the_steps_own_tokens() -> None:
    spec = Layer(attn_type="encoder_only")
    holder = vllm_layer(spec)
    kv_spec = EncoderOnlyAttentionSpec(PAGE, num_kv_heads=2, head_size=32, dtype=torch.float32)
    cls = create_encoder_only_attention_backend(FiBackend).get_builder_cls()
    step = make_step([(5, 5), (1, 1), (33, 33)], PAGE)
    run = run_layer(
        holder, make_builder([holder], builder_cls=cls, spec=kv_spec), step, torch.tensor([])
    )
    expected = reference(run, spec, step, causal=False)
    torch.testing.assert_close(run.out.double(), expected, rtol=0, atol=2e-5)


def test_cross_attention_reads_the_encoders_tokens() -> None:
    spec = Layer(attn_type="encoder_decoder")
    holder, encoder = vllm_layer(spec), [(4, 50), (1, 20)]
    backend = create_cross_attention_backend(FiBackend)
    kv_spec = CrossAttentionSpec(PAGE, num_kv_heads=2, head_size=32, dtype=torch.float32)
    builder = make_builder([holder], builder_cls=backend.get_builder_cls(), spec=kv_spec)
    step = make_step(encoder, PAGE)  # page table and history of the encoder's keys
    step.common.encoder_seq_lens = step.common.seq_lens
    step.common.encoder_seq_lens_cpu = np.array([kv for _, kv in encoder])
    step.common.seq_lens_cpu_upper_bound = torch.tensor([90, 33])  # the decoder's own lengths
    cache = torch.full((12, 2, PAGE, 64), NAN)
    run = run_layer(holder, make_builder([holder], PAGE), step, cache)
    decode = builder.build(0, step.common)
    out = torch.full_like(run.out, NAN)
    none = torch.empty(0, 2, 32)
    holder.impl.forward(holder, run.q, none, none, cache, decode, out)
    expected = reference(run, spec, step, causal=False)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    assert decode.slot_mapping.numel() == 0, "the encoder's keys were written earlier"


def test_chunked_local_attention_cuts_requests_at_multiples_of_the_chunk() -> None:
    chunk, spec = 32, Layer()
    holder = vllm_layer(spec)
    backend = create_chunked_local_attention_backend(FiBackend, chunk)
    kv_spec = ChunkedLocalAttentionSpec(
        PAGE, num_kv_heads=2, head_size=32, dtype=torch.float32, attention_chunk_size=chunk
    )
    builder = make_builder([holder], builder_cls=backend.get_builder_cls(), spec=kv_spec)
    step = make_step([(70, 100), (1, 33), (5, 64)], PAGE)
    step.common.block_table_tensor[:, 8:] = 0  # vLLM clips its page index to the table's width
    run = run_layer(holder, builder, step, torch.full((20, 2, PAGE, 64), NAN))
    expected = []
    for i, (q_len, kv) in enumerate(step.lengths):
        for n, position in enumerate(range(kv - q_len, kv)):
            start = position // chunk * chunk
            token = sum(q for q, _ in step.lengths[:i]) + n
            keys = (side[i][start : position + 1] for side in (run.keys, run.values))
            k, v = (x.double().repeat_interleave(2, 1) for x in keys)
            logits = torch.einsum("hd,khd->hk", run.q[token].double(), k) * spec.scale
            expected.append(torch.einsum("hk,khd->hd", logits.softmax(-1), v))
    torch.testing.assert_close(run.out.double(), torch.stack(expected), rtol=0, atol=2e-5)


def test_batch_invariance_keeps_a_requests_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setattr(scratch, "LEAST_INVARIANT_CHUNK", 128)
    holder = vllm_layer(Layer())
    builder = make_builder([holder])
    lengths = [(1, 500), (40, 300), (1, 77)]
    step, cache = make_step(lengths), torch.full((70, 2, PAGE, 64), NAN)
    together = run_layer(holder, builder, step, cache)
    alone = builder.build(0, step.common.unpadded(num_actual_tokens=1, num_actual_reqs=1))
    q, out = together.q[:1], torch.empty(1, 4, 32)
    none = torch.empty(0, 2, 32)
    holder.impl.forward(holder, q, none, none, cache, alone, out)
    assert torch.equal(out, together.out[:1])


def test_more_requests_than_the_engine_allows_are_refused() -> None:
    builder = make_builder([vllm_layer(Layer())])
    with pytest.raises(ValueError, match="max_requests <= 8, got 9"):
        builder.build(0, make_step([(1, 4)] * 9).common)


def test_threads_start_where_torchs_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = {0: {3}, 11: {3}, 12: {4}, 13: {5}}
    log: list[object] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(os, "listdir", lambda _: ["11", "12", "13"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda task: bound[task])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: log.append(set(cores)))
    monkeypatch.setattr(threads, "merge_states", lambda o, _: log.append(o.shape[1]))
    threads.start_threads()
    assert log == [{3, 4, 5}, 3 * threads.ROWS_PER_THREAD, {3}]
    log.clear()
    bound.update({12: {3}, 13: {3}})
    threads.start_threads()
    assert log == [], "nothing is bound apart"
