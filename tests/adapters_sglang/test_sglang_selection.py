"""The name under which SGLang finds us, what is refused at start, and what planners must hold."""

from __future__ import annotations

import importlib.metadata
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import server_args
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins import load_plugins
from sglang_parts import Layer, runner
from sglang_runner import World

from fi_backend import Capacity, Unsupported
from fi_backend.integrations import sglang as adapter
from fi_backend.integrations.sglang import limits, report
from fi_backend.integrations.sglang.backend import FiAttentionBackend
from fi_backend.integrations.sglang.registration import make_backend


def test_the_entry_point_registers_one_name() -> None:
    (point,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="fi_backend")
    assert point.value == "fi_backend.integrations.sglang:register"
    load_plugins()
    adapter.register()
    assert server_args.ATTENTION_BACKEND_CHOICES.count("fi") == 1
    assert ATTENTION_BACKENDS["fi"] is make_backend


def test_the_factory_makes_a_backend() -> None:
    assert isinstance(make_backend(runner([Layer()])), FiAttentionBackend)


@pytest.mark.parametrize(
    ("layer", "changes", "reasons"),
    [
        (
            Layer(dim=16),
            {"use_mla_backend": True},
            [r"use_mla_backend: expected unset \(multi-head latent attention is not served\)"],
        ),
        (Layer(dim=16), {}, [r"head_dim_qk: expected a multiple of 8 from 32 to 256, got 16"]),
        (
            Layer(attn_type=AttentionType.ENCODER_ONLY, window=9),
            {"kv_cache_dtype": torch.float8_e5m2},
            [
                r"kv_cache_dtype: expected auto or fp8_e4m3, got fp8_e5m2; pass --kv-cache-dtype",
                r"layer 0 sliding_window_size: expected -1 in an encoder, got 9",
            ],
        ),
        (
            Layer(attn_type=AttentionType.ENCODER_ONLY, window=9),
            {"dcp_size": 2},
            [
                r"decode_context_parallel_size: expected 1, got 2; use tensor parallelism",
                r"layer 0 sliding_window_size: expected -1 in an encoder, got 9",
            ],
        ),
        (
            Layer(window=9),
            {"drafts": 4},
            [r"layer 0 sliding_window_size: expected -1 under draft trees, got 9; pass --spec"],
        ),
        (
            Layer(sees_encoders=True),
            {"drafts": 4},
            [r"speculative_algorithm: expected none beside an encoder, got one; unset --spec"],
        ),
        (
            Layer(),
            {"token_to_kv_pool": SimpleNamespace()},
            [r"token_to_kv_pool: expected MHATokenToKVPool, or SWAKVPool of them, got Simple"],
        ),
    ],
)
def test_refusals_name_every_reason(layer: Layer, changes: dict[str, Any], reasons: Any) -> None:
    asked = runner([layer], **changes)
    with pytest.raises(Unsupported, match="expected a model that fi_backend serves, got") as error:
        FiAttentionBackend(asked)
    for reason in reasons:
        error.match(reason)
    error.match("choose one of SGLang's own with --attention-backend$")


@pytest.mark.parametrize("sign", ["images", "configuration"])
def test_tokens_that_see_later_ones_are_refused(sign: str) -> None:
    asked = runner([Layer(attn_type=AttentionType.DECODER_BIDIRECTIONAL)])
    if sign == "images":
        asked.model_config.is_multimodal = True
    else:
        asked.model_config.hf_text_config.use_bidirectional_attention = True
    served = "layer 0 attn_type: expected decoder or encoder_only, got decoder_bidirectional"
    with pytest.raises(Unsupported, match=served):
        FiAttentionBackend(asked)


def test_gemma_3_without_images_is_a_decoder() -> None:
    """SGLang 0.5.16 calls its layers bidirectional all the same, and masks them causally."""
    world = World([Layer(attn_type=AttentionType.DECODER_BIDIRECTIONAL)])
    world.request()
    world.step({0: 20})
    world.step({0: 1}, ForwardMode.DECODE)


def test_temperatures_chunks_and_strange_cross_attention_are_refused() -> None:
    asked = runner([Layer(), Layer(), Layer(cap=3.0)])
    asked.model.parents[0].attn.is_cross_attention = True
    asked.model.parents[1].attn.xai_temperature_len = 64
    asked.model.parents[2].attn.logit_capping_method = "sigmoid"
    asked.model_config.attention_chunk_size = 8192
    with pytest.raises(Unsupported) as error:
        FiAttentionBackend(asked)
    assert [
        reason.split(";")[0] for reason in str(error.value).split("got ", 1)[1].split(" | ")
    ] == [
        "attention_chunk_size: expected unset (chunked local attention is not served), got 8192",
        "layer 0 is_cross_attention: expected False in a model without an encoder, got True",
        "layer 1 xai_temperature_len: expected -1, got 64",
        "layer 2 logit_capping_method: expected tanh, got sigmoid",
    ]


def test_window_pools_beside_encoders_are_refused() -> None:
    asked = runner([Layer(sees_encoders=True), Layer(window=9, in_window_pool=True)])
    with pytest.raises(Unsupported, match="expected MHATokenToKVPool beside an encoder, got SWAKV"):
        FiAttentionBackend(asked)


def test_head_major_caches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    with pytest.raises(Unsupported, match=r"SGLANG_USE_HND_KVCACHE: expected 0 \(slots of one"):
        FiAttentionBackend(runner([Layer()]))


def test_plans_beside_the_step_before_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "1")
    with pytest.raises(Unsupported, match=r"OVERLAP_PLAN_STREAM: expected 0 \(plans in the order"):
        FiAttentionBackend(runner([Layer()]))


def test_whole_prefill_graphs_are_refused() -> None:
    """They are captured before there is memory for their tables, which graphs of decodes size."""
    asked = runner([Layer()])
    asked.settings.cuda_graph_config.prefill.backend = "full"
    with pytest.raises(
        Unsupported, match=r"prefill\]\.backend: expected breakable or disabled, got"
    ):
        FiAttentionBackend(asked)


def test_verification_without_drafts_is_refused() -> None:
    world = World([Layer()])
    world.request()
    batch = world.batch({0: 3}, ForwardMode.TARGET_VERIFY)
    with pytest.raises(Unsupported, match="forward_mode: expected no verification, got TARGET_V"):
        world.backend.init_forward_metadata(batch)


def test_diffusion_is_refused() -> None:
    world = World([Layer()])
    world.request()
    batch = world.batch({0: 3}, ForwardMode.DLLM_EXTEND)
    with pytest.raises(Unsupported, match="forward_mode: expected causal steps, got DLLM_EXT"):
        world.backend.init_forward_metadata(batch)


def test_limits_follow_pools_and_settings() -> None:
    asked = runner([Layer()], drafts=3)
    found = limits.StepLimits.of(asked)
    assert found.general == Capacity(8, 256 + 8 * 3, 320)
    assert found.decode == Capacity(8, 8, 320, max_q_len=1)
    assert found.verify == Capacity(8, 24, 320, max_q_len=3)
    # Ranks that share attention pad 8 requests to a multiple of their number.
    asked.ps.tp_size = 3
    assert limits.StepLimits.of(asked).decode == Capacity(9, 9, 320, max_q_len=1)
    asked.ps.tp_size = 1
    more = found.with_requests(10)
    assert more.verify == Capacity(10, 30, 320, max_q_len=3)
    assert (more.general.max_requests, more.decode.max_tokens) == (10, 10)
    asked.settings.chunked_prefill_size = -1
    assert limits.StepLimits.of(asked).general.max_tokens == 512 + 320 + 24
    asked.settings.max_prefill_tokens = 99_999
    assert limits.StepLimits.of(asked).general.max_tokens == 1025, "slots of the pool"
    asked.is_draft_worker = True
    assert limits.StepLimits.of(asked).verify is None


def test_a_scheduler_tells_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scheduler:
        def get_internal_state(self, request: object) -> Any:
            return SimpleNamespace(internal_state={"asked": request})

    module = SimpleNamespace(Scheduler=Scheduler)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.scheduler", module)
    report.report_stats()
    patched = Scheduler.get_internal_state
    report.report_stats()
    assert Scheduler.get_internal_state is patched
    state = Scheduler().get_internal_state("it").internal_state
    assert state == {"asked": "it", "fi_backend": adapter.stats().as_dict()}
