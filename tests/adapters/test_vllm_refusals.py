"""Everything that is not served is refused with a reason, and all reasons come at once."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm_layers import Layer, make_builder, make_step, vllm_layer

from fi_backend import Unsupported, gpu, nvidia
from fi_backend.integrations.vllm import backend, register
from fi_backend.integrations.vllm.backend import FiBackend
from fi_backend.integrations.vllm.selection import select_on_cpu
from fi_backend.integrations.vllm.support import REFUSED_FLAGS, SERVED_FLAGS, selection_reasons

PLAIN: dict[str, Any] = {
    "head_size": 64,
    "dtype": torch.float32,
    "kv_cache_dtype": "auto",
    "block_size": None,
}


def reasons(device: str = "cpu", **fields: Any) -> list[str]:
    config = AttentionSelectorConfig(**(PLAIN | fields))
    return selection_reasons(device, config._asdict())


def test_what_is_served_has_no_reasons() -> None:
    assert reasons() == []
    for name in ("float16", "bfloat16", "fp8", "fp8_e4m3"):
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)
        assert reasons(dtype=dtype, kv_cache_dtype=name) == []
    for attn_type in ("decoder", "encoder_only", "encoder_decoder"):
        assert reasons(attn_type=attn_type) == []
    for head_size in (32, 40, 96, 128, 256):
        assert reasons(head_size=head_size, block_size=24) == []
    for flag in SERVED_FLAGS:
        assert reasons(**{flag: True}) == []


@pytest.mark.parametrize("flag", REFUSED_FLAGS)
def test_refused_flag(flag: str) -> None:
    (reason,) = reasons(**{flag: True})
    pattern = rf"{flag}: expected False \({REFUSED_FLAGS[flag]} is not served\), got True; leave"
    assert re.match(pattern, reason)


def test_every_flag_of_this_vllm_is_known() -> None:
    flags = {f for f in AttentionSelectorConfig._fields if f.startswith(("use_", "has_"))}
    assert flags == {*SERVED_FLAGS, *REFUSED_FLAGS}


def test_a_flag_of_a_later_vllm_is_refused() -> None:
    (reason,) = selection_reasons("cpu", {**PLAIN, "use_telepathy": True})
    assert re.match(r"use_telepathy: expected False \(a feature that this version", reason)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_type": "encoder"}, r"attn_type: expected decoder or encoder_only or"),
        ({"kv_cache_dtype": "fp8_e5m2"}, r"kv_cache_dtype: expected one of .*, got fp8_e5m2"),
        ({"kv_cache_dtype": "nvfp4"}, r"kv_cache_dtype: expected one of .*, got nvfp4"),
        ({"kv_cache_dtype": "bfloat16"}, r"kv_dtype: expected float32 or float8.*got bfloat16"),
        ({"dtype": torch.float64}, r"dtype: expected .*, got float64"),
        ({"head_size": 16}, r"head_dim_qk: expected a multiple of 8 from 32 to 256, got 16"),
        ({"head_size": 36}, r"head_dim_qk: expected a multiple of 8 from 32 to 256, got 36"),
        ({"head_size": 512}, r"head_dim_qk: expected a multiple of 8 from 32 to 256, got 512"),
        ({"device": "xpu"}, r"device: expected .*, got xpu"),
    ],
)
def test_refused_value(fields: dict[str, Any], message: str) -> None:
    (reason,) = reasons(**fields)
    assert re.match(message, reason)


def test_a_gpu_is_judged_without_asking_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> None:
        raise AssertionError("vLLM forks processes of this one that use the GPU")

    monkeypatch.setattr(nvidia, "find_driver", ask)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu, "nvrtc_reasons", lambda: iter(()))
    hopper = {"device_capability": DeviceCapability(9, 0)}
    bf16 = PLAIN | hopper | {"dtype": torch.bfloat16}
    assert selection_reasons("cuda", bf16) == []
    assert selection_reasons("cuda", bf16 | {"kv_cache_dtype": "fp8"}) == []
    for fields, message in (
        (bf16 | {"dtype": torch.float32}, r"dtype: expected float16 or bfloat16, got float32"),
        (bf16 | {"head_size": 72}, r"head_dim_qk: expected a multiple of 16 from .*, got 72"),
        (bf16 | {"device_capability": DeviceCapability(7, 5)}, r"device: expected .* 8.0 or newer"),
    ):
        (reason,) = selection_reasons("cuda", fields)
        assert re.match(message, reason)
    platform = SimpleNamespace(
        device_type="cuda", get_device_capability=lambda: DeviceCapability(9, 0)
    )
    monkeypatch.setattr(backend, "current_platform", platform)
    assert FiBackend.supports_head_size(128) and not FiBackend.supports_head_size(72)
    assert FiBackend.validate_configuration(**bf16) == []


def test_all_reasons_come_at_once() -> None:
    register()
    config = AttentionSelectorConfig(
        head_size=20,
        dtype=torch.float32,
        kv_cache_dtype="fp8_e5m2",
        block_size=None,
        use_mla=True,
        use_dcp=True,
    )
    with pytest.raises(Unsupported, match="attention_backend: expected a layer that") as error:
        select_on_cpu(AttentionBackendEnum.CUSTOM, config)
    for word in ("head_dim_qk", "fp8_e5m2", "use_mla", "use_dcp"):
        assert word in str(error.value)


def test_vllms_own_questions_get_the_same_answers() -> None:
    fields = AttentionSelectorConfig(**PLAIN)._asdict()
    assert FiBackend.validate_configuration(device_capability=None, **fields) == []
    fields["use_mla"] = True
    assert len(FiBackend.validate_configuration(device_capability=None, **fields)) == 1
    assert FiBackend.supports_head_size(64) and not FiBackend.supports_head_size(16)
    assert FiBackend.supports_block_size(24)
    assert FiBackend.supports_attn_type("encoder_only")
    assert not FiBackend.supports_attn_type("encoder")
    assert FiBackend.supports_kv_cache_dtype("fp8")
    assert not FiBackend.supports_kv_cache_dtype("fp8_e5m2")
    assert not FiBackend.supports_alibi_sqrt()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"use_alibi_sqrt": True}, "use_alibi_sqrt: expected unset, got True"),
        ({"chunk_lookback": 1}, "chunk_lookback: expected unset, got 1"),
        ({"rswa_window": 64}, "rswa_window: expected unset, got 64"),
    ],
)
def test_layer_with_an_unknown_argument(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        Layer(extra=extra).impl()


def test_layer_with_arguments_that_say_none() -> None:
    Layer(extra={"use_alibi_sqrt": False, "chunk_lookback": -1, "sinks": None}).impl()


def test_context_parallel_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_dcp_world_size_and_rank", lambda *_: (2, 0))
    with pytest.raises(Unsupported, match="decode_context_parallel_size: expected 1, got 2"):
        Layer().impl()


def test_quantised_output() -> None:
    holder = vllm_layer(Layer())
    q = torch.zeros(1, 4, 32)
    with pytest.raises(Unsupported, match="output_scale: expected None, got a scale"):
        holder.impl.forward(holder, q, q, q, q, None, q, output_scale=torch.ones(1))


def test_causality_per_request() -> None:
    holder = vllm_layer(Layer())
    step = make_step([(1, 5), (2, 2)], causal=torch.tensor([True, False]))
    with pytest.raises(Unsupported, match="causal: expected one value for the whole batch"):
        make_builder([holder]).build(0, step.common)


def test_value_heads_that_the_kernels_do_not_serve() -> None:
    holder = vllm_layer(Layer(head_size_v=20))
    with pytest.raises(Unsupported, match="head_dim_vo: expected a multiple of 8"):
        make_builder([holder])
