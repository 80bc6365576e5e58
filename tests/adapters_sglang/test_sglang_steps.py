"""Eager steps through SGLang's own pools and layers, against plain attention."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_parts import Layer
from sglang_runner import World

from fi_backend import Unsupported
from fi_backend.integrations import sglang as adapter

SINKS = torch.tensor([1.0, -2.0, 3.0, 0.5])
MODELS: dict[str, list[Layer]] = {
    "plain": [Layer(), Layer()],
    "soft cap": [Layer(cap=3.0)],
    "windows": [Layer(window=17), Layer()],
    "window pool": [Layer(window=17, in_window_pool=True), Layer(cap=5.0)],
    "sinks": [Layer(sinks=SINKS, window=40), Layer(sinks=SINKS)],
}


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_a_life_of_requests(name: str, page: int) -> None:
    world = World(MODELS[name], page=page)
    a, b = world.request(), world.request()
    world.step({0: 37})
    world.step({0: 40, 1: 1})  # a chunk behind a prefix, beside another request
    world.step({0: 1, 1: 1}, ForwardMode.DECODE)
    world.share(world.request(), a, 64)
    world.step({2: 9, 1: 1}, ForwardMode.MIXED)
    for _ in range(3):
        world.step({0: 1, 2: 1, 1: 1}, ForwardMode.DECODE)
    assert (a.length, b.length) == (81, 6)


def test_random_steps() -> None:
    draw, world = random.Random(17), World(MODELS["window pool"], page=4)
    for _ in range(5):
        world.request()
    for _ in range(25):
        chosen = draw.sample(range(5), draw.randint(1, 5))
        if draw.random() < 0.6:
            world.step(dict.fromkeys(chosen, 1), ForwardMode.DECODE)
        else:
            world.step({i: draw.choice([1, 1, 3, 11]) for i in chosen})


def test_shared_prefixes_are_read_once() -> None:
    world = World([Layer()], page=16)
    first = world.request()
    world.step({0: 260})
    for _ in range(3):
        world.share(world.request(), first, 256)
    world.step({1: 5, 2: 7, 3: 1})
    adapter.reset_stats()
    world.step(dict.fromkeys(range(4), 1), ForwardMode.DECODE)
    stats = adapter.stats()
    assert stats.saved_kv_tokens == 3 * 256
    assert stats.kv_tokens == sum(request.length for request in world.requests)


def test_sharing_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_SHARING", "0")
    world = World([Layer()], page=16)
    first = world.request()
    world.step({0: 260})
    world.share(world.request(), first, 256)
    adapter.reset_stats()
    world.step({0: 1, 1: 1})
    assert (adapter.stats().steps, adapter.stats().kv_tokens) == (1, 0)


def test_narrow_dtypes_and_scales() -> None:
    world = World([Layer()], dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    module = world.runner.model.parents[0].attn
    module.k_scale, module.v_scale = torch.tensor(0.5), torch.tensor(0.25)
    batch = world.batch({world.requests.index(world.request()): 12}, ForwardMode.EXTEND)
    world.backend.init_forward_metadata(batch)
    q = world.noise(12, 4 * 32).bfloat16()
    k, v = (world.noise(12, 2, 32).bfloat16() for _ in range(2))
    kept = k.clone()
    world.backend.forward_extend(q, k, v, module, batch)
    pool = world.runner.token_to_kv_pool
    stored = pool.get_key_buffer(0)[batch.out_cache_loc].float() * 0.5
    torch.testing.assert_close(stored, k.float(), rtol=0.07, atol=0.01)
    assert torch.equal(k, kept), "SGLang's own write divides K in place"
    stored = pool.get_value_buffer(0)[batch.out_cache_loc].float() * 0.25
    torch.testing.assert_close(stored, v.float(), rtol=0.07, atol=0.01)


def test_padded_rows_and_idle_steps() -> None:
    world = World([Layer()])
    world.request()
    batch = world.batch({0: 6}, ForwardMode.EXTEND)
    world.backend.init_forward_metadata(batch)
    batch.out_cache_loc = torch.cat([batch.out_cache_loc, torch.zeros(3, dtype=torch.int64)])
    world.run(batch, 0, padding=3)
    adapter.reset_stats()
    idle: Any = type(batch)(batch_size=0, forward_mode=ForwardMode.IDLE)
    world.backend.init_forward_metadata(idle)
    assert adapter.stats().steps == 0


def test_encoders_see_all() -> None:
    world = World([Layer(attn_type=AttentionType.ENCODER_ONLY)])
    world.request()
    world.step({0: 33})


@pytest.mark.parametrize("page", [1, 16])
def test_texts_look_at_their_encoders(page: int) -> None:
    """Texts longer and shorter than the encoder, one without, and encoders kept from before."""
    world = World([Layer(), Layer(sees_encoders=True)], page=page)
    a, b, _ = world.request(encoder=21), world.request(encoder=47), world.request()
    world.step({0: 37})
    world.step({0: 5, 1: 3, 2: 4})  # the first request's encoder ran before
    for _ in range(2):
        world.step({2: 1, 0: 1, 1: 1}, ForwardMode.DECODE)
    world.share(world.request(), b, 1)
    world.step({3: 2, 2: 7}, ForwardMode.MIXED)
    world.step(dict.fromkeys(range(4), 1), ForwardMode.DECODE)
    assert (a.length, b.length) == (45, 6)


def test_steps_without_encoder_lengths_have_none() -> None:
    world = World([Layer(), Layer(sees_encoders=True)])
    world.request()
    batch = world.batch({0: 7}, ForwardMode.EXTEND)
    batch.encoder_lens = None
    world.backend.init_forward_metadata(batch)
    for index in range(2):
        world.run(batch, index)


def test_an_encoder_beside_a_decoder_is_not_planned_until_it_is_run() -> None:
    layers = [Layer(attn_type=AttentionType.ENCODER_ONLY), Layer(), Layer(sees_encoders=True)]
    world = World(layers)
    own = [parent.attn for parent in world.runner.model.parents]
    assert list(world.backend._layers) == own[1:]
    world.request(encoder=12)
    world.step({0: 9})
    assert list(world.backend._layers) == [*own[1:], own[0]]


def test_a_mask_over_the_encoder_is_refused() -> None:
    world = World([Layer(), Layer(sees_encoders=True)])
    world.request(encoder=9)
    batch = world.batch({0: 3}, ForwardMode.EXTEND)
    batch.cross_attention_custom_mask = torch.ones(3, 9, dtype=torch.bool)
    with pytest.raises(
        Unsupported, match="cross_attention_custom_mask: expected unset, got a mask"
    ):
        world.backend.init_forward_metadata(batch)


def test_layers_that_share_a_cache_do_not_write() -> None:
    world = World([Layer()])
    world.request()
    world.step({0: 20})
    batch = world.batch({0: 1}, ForwardMode.DECODE)
    world.backend.init_forward_metadata(batch)
    world.run(batch, 0)
    adapter.reset_stats()
    module = world.runner.model.parents[0].attn
    q = world.noise(1, 4 * 32)
    out = world.backend.forward_decode(q, None, None, module, batch)
    assert out.isfinite().all() and adapter.stats().appended_tokens == 0


def test_sinks_that_only_the_call_shows_are_served() -> None:
    layer = Layer(sinks=SINKS)
    world = World([layer, layer])
    for parent in world.runner.model.parents:
        del parent.sinks
    world.backend = type(world.backend)(world.runner)
    world.request()
    world.step({0: 30})
    world.step({0: 1}, ForwardMode.DECODE)


def test_sinks_loaded_again_are_taken_over() -> None:
    sinks = SINKS.clone().bfloat16()
    world = World([Layer(sinks=sinks)])
    world.request()
    world.step({0: 8})
    sinks.add_(2.0)
    world.step({0: 8})


def test_arguments_that_are_not_known_are_refused() -> None:
    world = World([Layer()])
    world.request()
    batch = world.batch({0: 1}, ForwardMode.EXTEND)
    world.backend.init_forward_metadata(batch)
    module, q = world.runner.model.parents[0].attn, world.noise(1, 128)
    with pytest.raises(Unsupported, match=r"q_rope: expected unset .* \| rel_bias: expected"):
        world.backend.forward_extend(
            q, None, None, module, batch, q_rope=q, k_rope=None, rel_bias=q
        )
