"""Shared prefixes under vLLM: who looks for them, what is counted and what the log says."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.model_executor.layers.attention.encoder_only_attention import (
    create_encoder_only_attention_backend,
)
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, EncoderOnlyAttentionSpec
from vllm_layers import Layer, Step, make_builder, make_step, run_layer, vllm_config, vllm_layer

from fi_backend import Capacity
from fi_backend.integrations.common.sharing import SharedReads, in_short
from fi_backend.integrations.vllm import metadata, reset_stats, sharing, stats
from fi_backend.integrations.vllm.backend import FiBackend
from fi_backend.integrations.vllm.limits import StepLimits
from fi_backend.integrations.vllm.metadata import StepMetadataBuilder

PAGE = 16
# Four decodes that hold the same first 256 tokens, and one that shares nothing.
LENGTHS = [(1, 300), (1, 290), (1, 400), (1, 270), (1, 100)]
KV_TOKENS = sum(kv for _, kv in LENGTHS)
SAVED = 3 * 256


def shared_step(lengths: list[tuple[int, int]] = LENGTHS, members: int = 4) -> Step:
    """A step whose first requests hold the same 16 pages."""
    step = make_step(lengths, PAGE)
    for row in range(1, members):
        step.pages[row][:16] = step.pages[0][:16]
        step.common.block_table_tensor[row, :16] = step.common.block_table_tensor[0, :16]
    return step


@pytest.fixture(autouse=True)
def from_zero() -> None:
    gc.collect()  # planners of earlier tests
    reset_stats()


@pytest.fixture
def two_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders make a planner for decode steps too, as they do on a GPU."""
    monkeypatch.setattr(metadata, "has_decode_kernel", lambda _: True)


def saved() -> tuple[int, int]:
    return stats().kv_tokens, stats().saved_kv_tokens


def test_limits_have_room_for_verification_in_both_plans() -> None:
    config = vllm_config([], torch.float32)
    plain, shared = StepLimits.of(config), StepLimits.of(config).with_sharing()
    assert shared.decode == plain.decode.with_sharing()
    assert shared.general == plain.general.with_sharing()
    assert (shared.general.max_nodes, shared.general.max_shared_tokens) == (8, 24)
    config.speculative_config = SimpleNamespace(num_speculative_tokens=3)
    shared = StepLimits.of(config).with_sharing()
    for capacity in (shared.general, shared.decode):
        assert (capacity.max_links, capacity.max_shared_tokens) == (24, 4 * 24)
    assert shared.general == Capacity(8, 288, 516, 8, 24, 96), "what picks its kernel is as before"


def local_builder(holder: Any) -> StepMetadataBuilder:
    cls = create_chunked_local_attention_backend(FiBackend, 32).get_builder_cls()
    sizes = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    spec = ChunkedLocalAttentionSpec(PAGE, attention_chunk_size=32, **sizes)
    return make_builder([holder], builder_cls=cls, spec=spec)


def encoder_builder(holder: Any, *, sleeps: bool = False) -> StepMetadataBuilder:
    cls = create_encoder_only_attention_backend(FiBackend).get_builder_cls()
    spec = EncoderOnlyAttentionSpec(PAGE, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return make_builder([holder], builder_cls=cls, spec=spec, sleeps=sleeps)


def looks(builder: StepMetadataBuilder) -> bool:
    planners = {
        id(plan.planner): plan.planner
        for plans in builder._plans.values()
        for plan in (plans.general, plans.decode)
        if plan is not None
    }
    found = {len(planner.forests) for planner in planners.values()}
    assert len(found) == 1, "both plans look, or none"
    assert all((p.capacity.max_nodes > 0) == bool(p.forests) for p in planners.values())
    return found == {1}


@pytest.mark.usefixtures("two_plans")
def test_who_looks_for_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [vllm_layer(Layer("a"))]
    window = [vllm_layer(Layer("b", sliding_window=9))]
    assert looks(make_builder(plain))
    assert looks(make_builder([vllm_layer(Layer("c", logits_soft_cap=30.0))]))
    assert looks(make_builder(plain + window)), "for the layer without a window"
    assert not looks(make_builder(window))
    assert not looks(make_builder([vllm_layer(Layer("d", attn_type="encoder_decoder"))]))
    assert not looks(encoder_builder(vllm_layer(Layer("e", attn_type="encoder_only"))))
    assert not looks(local_builder(plain[0]))
    for value, expected in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv("FI_SHARING", value)
        assert looks(make_builder(plain)) is expected
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert not looks(make_builder(plain)), "bits must not depend on the batch"


def test_counts_of_a_step() -> None:
    builder = make_builder([vllm_layer(Layer())])
    step = shared_step()
    builder.build(0, step.common)
    assert saved() == (KV_TOKENS, SAVED)
    builder.build(0, step.common)
    assert saved() == (2 * KV_TOKENS, 2 * SAVED)
    builder.build(0, make_step([(1, 300), (1, 290)]).common)
    assert saved() == (2 * KV_TOKENS + 590, 2 * SAVED)
    reset_stats()
    assert saved() == (0, 0)


@pytest.mark.usefixtures("two_plans")
def test_all_planners_of_the_process_are_added_up() -> None:
    first, second = (make_builder([vllm_layer(Layer(name))]) for name in "ab")
    first.build(0, shared_step().common)  # its decode plan
    second.build(0, shared_step([(3, 300), (1, 290), (1, 400), (1, 270), (1, 100)]).common)
    assert (stats().decode_steps, *saved()) == (1, 2 * KV_TOKENS, 2 * SAVED)
    del first
    gc.collect()
    assert saved() == (2 * KV_TOKENS, 2 * SAVED), "what a planner counted outlives it"
    third = make_builder([vllm_layer(Layer())])
    assert saved() == (2 * KV_TOKENS, 2 * SAVED)
    third.build(0, shared_step().common)
    assert saved() == (3 * KV_TOKENS, 3 * SAVED)


@pytest.mark.parametrize("sleeps", [False, True])
def test_after_sleep_steps_begin_with_clear_counters(sleeps: bool) -> None:
    builder, step = make_builder([vllm_layer(Layer())], sleeps=sleeps), shared_step()
    planner = builder._plans_for(causal=True).general.planner
    planner.workspace.arrivals.fill_(77)  # what vLLM's pool may hold when it wakes
    builder.build(0, step.common)
    assert bool((planner.workspace.arrivals == 0).all()) is sleeps


@pytest.mark.parametrize("sleeps", [False, True])
def test_after_sleep_encoders_know_their_pages(sleeps: bool) -> None:
    layer = vllm_layer(Layer("e", attn_type="encoder_only"))
    builder, step = encoder_builder(layer, sleeps=sleeps), make_step([(3, 3), (5, 5)])
    pages = builder._own_pages
    assert pages is not None
    pages.fill_(-1)
    builder.build(0, step.common)
    assert torch.equal(pages, torch.arange(len(pages), dtype=torch.int32)) is sleeps


def test_switched_off_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_SHARING", "0")
    make_builder([vllm_layer(Layer())]).build(0, shared_step().common)
    assert (stats().steps, *saved()) == (1, 0, 0)


def test_dummies_of_a_capture_are_not_counted() -> None:
    builder = make_builder([vllm_layer(Layer())])
    builder.build(0, shared_step().common)
    # vLLM may profile graphs with long dummy requests, which all hold page 0.
    builder.build_for_cudagraph_capture(shared_step([(1, 400)] * 8, members=8).common)
    assert saved() == (KV_TOKENS, SAVED)


@pytest.mark.usefixtures("two_plans")
@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_a_graph_captured_with_dummies_replays_what_is_shared(
    monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode
) -> None:
    outs = []
    for switch in ("0", "1"):
        monkeypatch.setenv("FI_SHARING", switch)
        holder = vllm_layer(Layer())
        builder = make_builder([holder])
        builder.vllm_config.compilation_config.cudagraph_mode = mode
        captured = builder.build_for_cudagraph_capture(make_step([(1, 1)] * len(LENGTHS)).common)
        step, cache = shared_step(), torch.zeros(120, 2, PAGE, 64)
        run = run_layer(holder, builder, step, cache)
        builder.build(0, step.common)
        out = torch.full_like(run.out, float("nan"))
        none = torch.empty(0, 2, 32)
        holder.impl.forward(holder, run.q, none, none, cache, captured, out)
        outs += [run.out, out]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-5)
    assert saved()[1] == 2 * SAVED


class Forest:
    def __init__(self) -> None:
        self.totals = torch.zeros(2, dtype=torch.int64)


class Played:
    """A planner that counts what it is told, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.forest = Forest()
        self.reads = SharedReads(sharing.logger, lambda: self.now)
        planner: Any = SimpleNamespace(forests=(self.forest,))
        self.reads.watch(planner, writes=True)

    def step(self, at: float, tokens: int, saved: int) -> None:
        self.now = at
        self.forest.totals += torch.tensor([tokens, saved])
        self.reads.after_plan()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []
    monkeypatch.setattr(sharing.logger, "info", lambda text, *args: written.append(text % args))
    return written


def test_what_was_saved_is_logged(lines: list[str]) -> None:
    played = Played()
    played.step(0.5, 9_000_000, 7_000_000)
    assert lines == [], "not at every step"
    played.step(2.0, 8_200_000, 5_300_000)
    assert lines == [
        "fi_backend: shared prefixes saved 71.5 % of KV reads (12.3 M of 17.2 M tokens) "
        "in the last 2 s"
    ]
    played.step(11.0, 1000, 500)
    assert len(lines) == 1, "at most every ten seconds"
    played.step(12.5, 3000, 1500)
    assert lines[1:] == [
        "fi_backend: shared prefixes saved 50.0 % of KV reads (2.0 k of 4.0 k tokens) "
        "in the last 10 s"
    ]


def test_nothing_is_logged_where_nothing_was_saved(lines: list[str]) -> None:
    played = Played()
    for second in range(1, 40):
        played.step(float(second), 1000, 0)
    assert lines == []
    played.step(40.0, 500, 400)  # the line is about the time since 31 s
    assert [line.split("saved ")[1].split(" %")[0] for line in lines] == ["4.2"]


def test_one_rank_of_several_writes(lines: list[str]) -> None:
    played = Played()
    planner: Any = SimpleNamespace(forests=(played.forest,))
    played.reads.watch(planner, writes=False)
    played.step(20.0, 1000, 500)
    assert lines == [] and played.reads.read() == (2000, 1000), "the same forest twice"


def test_a_gpus_counters_are_read_when_they_have_arrived(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    events: list[Any] = []

    class Event:
        done, recorded = False, False

        def __init__(self) -> None:
            events.append(self)

        def record(self) -> None:
            self.recorded = True

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            raise AssertionError("a step must not wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    played = Played()
    played.reads._pinned = torch.zeros(2, dtype=torch.int64)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    played.step(2.0, 1000, 400)
    assert events == [], "a copy must not become a part of a graph"
    capturing = False
    played.step(4.0, 1000, 400)
    (event,) = events
    assert event.recorded and lines == []
    played.step(6.0, 7, 7)
    assert len(events) == 1 and lines == [], "one copy at a time"
    event.done = True
    played.step(6.1, 7, 7)
    assert [line.split("KV reads ")[1] for line in lines] == [
        "(800 of 2.0 k tokens) in the last 6 s"
    ]


def test_lines_go_where_vllm_shows_them() -> None:
    assert sharing.logger is logging.getLogger("vllm.plugins.fi_backend")
    counts = [7, 999, 1000, 12_345_678, 4_200_000_000]
    assert [in_short(n) for n in counts] == ["7", "999", "1.0 k", "12.3 M", "4.2 G"]
