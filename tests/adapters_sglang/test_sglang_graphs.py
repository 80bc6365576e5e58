"""CUDA graph hooks: a step is planned and copied, its tables are taken away, then layers run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_parts import Layer
from sglang_runner import World
from torch import Tensor

from fi_backend import PageTable
from fi_backend.integrations import sglang as adapter
from fi_backend.integrations.sglang.verify import TreeBits

DECODE, VERIFY = ForwardMode.DECODE, ForwardMode.TARGET_VERIFY
SINKS = torch.tensor([1.0, -2.0, 3.0, 0.5])
MODELS = {
    "plain": [Layer(), Layer()],
    "window pool": [Layer(window=17, in_window_pool=True), Layer()],
    "sinks": [Layer(sinks=SINKS, cap=4.0)],
    "encoders": [Layer(), Layer(sees_encoders=True)],
}


def world_of(name: str, page: int, **options: Any) -> World:
    world = World(MODELS[name], page=page, **options)
    world.backend.init_cuda_graph_state(8, 8 * max(1, options.get("drafts", 1)))
    encoders = any(layer.sees_encoders for layer in MODELS[name])
    for request in range(5):
        world.request(encoder=encoders * (16, 33, 0, 0, 7)[request])
    world.step({0: 50, 1: 3, 2: 17})
    world.share(world.requests[3], world.requests[0], 48)
    world.step({3: 2, 4: 1})
    return world


def capture(world: World, size: int) -> tuple[int, list[int]]:
    """Plan the dummy step of a capture; return the addresses that its graph would read."""
    dummy = SimpleNamespace(
        batch_size=size,
        forward_mode=DECODE,
        req_pool_indices=torch.zeros(size, dtype=torch.int64),
        seq_lens=torch.ones(size, dtype=torch.int64),
        out_cache_loc=torch.zeros(size, dtype=torch.int64),
        encoder_lens=torch.ones(size, dtype=torch.int64),
        spec_info=None,
    )
    world.backend.init_forward_metadata_out_graph(dummy, in_capture=True)
    return addresses(world)


def addresses(world: World) -> tuple[int, list[int]]:
    step = world.backend.forward_metadata
    assert step is not None
    tables: list[PageTable] = [batch.page_table for batch in step.batches]
    workspace = step.plan.planner.workspace.partial_o.data_ptr()
    slots = [] if step.window_slots is None else [step.window_slots.data_ptr()]
    return workspace, [table.entries.data_ptr() for table in tables] + slots


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_replays_read_nothing_of_sglangs_tables(name: str, page: int) -> None:
    world = world_of(name, page)
    captured = [capture(world, size) for size in (8, 4, 2, 1)]
    assert len({str(one) for one in captured}) == 1, "all captured sizes read the same memory"
    for chosen, size in (([0, 1, 2, 3, 4], 8), ([4, 0], 2), ([2], 4), ([3, 0, 1], 4)):
        world.replay(world.batch(dict.fromkeys(chosen, 1), DECODE), size)
        assert addresses(world) == captured[0]
    world.step({0: 20, 1: 1})
    world.replay(world.batch({0: 1, 3: 1}, DECODE), 2)


def test_captures_do_not_count_as_sharing() -> None:
    world = world_of("plain", 16)
    adapter.reset_stats()
    capture(world, 8)
    assert (adapter.stats().graph_steps, adapter.stats().kv_tokens) == (1, 0)


def test_more_requests_than_the_pool_holds_are_made_room_for() -> None:
    world = World(MODELS["window pool"])
    world.backend.init_cuda_graph_state(13, 13)
    capture(world, 13)
    for _ in range(8):
        world.request()
    world.step(dict.fromkeys(range(8), 2))
    world.replay(world.batch(dict.fromkeys(range(8), 1), DECODE), 13)


def test_tables_may_be_refilled_once_a_graphs_step_is_planned() -> None:
    from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds  # since 0.5.23

    backend = World(MODELS["plain"]).backend
    assert backend.shared_read_ends(DECODE) is SharedReadEnds.PRE_REPLAY
    assert backend.shared_read_ends(VERIFY) is SharedReadEnds.PRE_REPLAY
    assert backend.shared_read_ends(ForwardMode.EXTEND) is SharedReadEnds.UNKNOWN
    assert backend.needs_cpu_seq_lens is False
    assert backend.get_cuda_graph_seq_len_fill_value() == 1


# Token 0 is the last accepted one; 1 and 2 are its children, 3 continues 1.
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()


def full_mask(batch: Any, tree: Tensor) -> Tensor:
    """SGLang's flat mask: for each request [drafts, tokens before + drafts]."""
    parts = []
    for length in batch.seq_lens.tolist():
        before = torch.ones(tree.shape[0], length, dtype=torch.bool)
        parts.append(torch.cat([before, tree], dim=1).flatten())
    return torch.cat(parts)


def test_verification_of_trees() -> None:
    world = world_of("plain", 16, drafts=4)
    batch = world.batch({0: 4, 3: 4, 2: 4}, VERIFY)
    batch.spec_info = SimpleNamespace(custom_mask=full_mask(batch, TREE))
    world.backend.init_forward_metadata(batch)
    for index in range(2):
        world.run(batch, index, seen=TREE)
    world.grow(batch)
    for chosen, size in (([0, 1, 3], 4), ([2, 4], 2)):
        batch = world.batch(dict.fromkeys(chosen, 4), VERIFY)
        batch.spec_info = SimpleNamespace(custom_mask=full_mask(batch, TREE))
        world.replay(batch, size, seen=TREE)
    batch = world.batch({0: 4, 1: 4}, VERIFY)
    batch.spec_info = SimpleNamespace(custom_mask=None)
    world.replay(batch, 2)  # chains


def test_chains_need_no_mask() -> None:
    """Drafts of EAGLE with top-k 1: each sees all before it, in windows and with sinks too."""
    for name in ("plain", "window pool", "sinks"):
        world = world_of(name, 16, drafts=4, topk=1)
        for size in (2, 4):
            batch = world.batch({0: 4, 1: 4}, VERIFY)
            batch.spec_info = SimpleNamespace(custom_mask=None)
            world.replay(batch, size)
        step = world.backend.forward_metadata
        assert step is not None and step.params == {}
        batch = world.batch({0: 4, 1: 4}, VERIFY)
        batch.spec_info = SimpleNamespace(custom_mask=full_mask(batch, TREE.new_ones(4, 4).tril()))
        world.backend.init_forward_metadata(batch)
        world.backend.update_verify_buffers_to_fill_after_draft(batch.spec_info, None)
        world.run(batch, 0)


def test_a_mask_drafted_after_planning_is_taken_over() -> None:
    world = world_of("plain", 1, drafts=4)
    batch = world.batch({0: 4, 1: 4}, VERIFY)
    batch.spec_info = SimpleNamespace(custom_mask=full_mask(batch, TREE.new_ones(4, 4)))
    world.backend.init_forward_metadata(batch)
    batch.spec_info.custom_mask = full_mask(batch, TREE)
    world.backend.update_verify_buffers_to_fill_after_draft(batch.spec_info, None)
    world.run(batch, 0, seen=TREE)


def test_sglang_fills_the_small_mask_where_it_can() -> None:
    world = world_of("plain", 1, drafts=4)
    mask = world.backend.verify_mask
    assert mask.mode.name == "QLEN_ONLY" and mask.fits(8) and not mask.fits(9)
    batch = world.batch({0: 4, 1: 4}, VERIFY)
    mask.buffer[:32] = TREE.flatten().repeat(2)
    batch.spec_info = SimpleNamespace(custom_mask=mask.buffer)
    world.replay(batch, 4, seen=TREE)
    assert World(MODELS["plain"]).backend.verify_mask is None


def test_bits_of_wide_trees() -> None:
    trees = TreeBits(2, 40, torch.device("cpu"))
    bits = trees.fill(None, torch.tensor([7]))
    assert bits.shape == (40, 2) and bits.dtype == torch.int32
    assert bits[0].tolist() == [1, 0]
    assert bits[31].tolist() == [-1, 0] and bits[32].tolist() == [-1, 1]
    assert bits[39].tolist() == [-1, 255]
