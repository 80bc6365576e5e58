"""Prebuilding for a model: named shapes, config.json, the kernels listed, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fi_backend.errors import InvalidInput, Unsupported
from fi_backend.formats import HeadShape
from fi_backend.jit import __main__ as cli
from fi_backend.jit.cache import default_cache
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.jit.models import MODELS, ModelShape, find_model
from fi_backend.jit.serving import Serving, serving_kernels

LLAMA = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}

ENTRIES = {"fi_attention", "fi_forest", "fi_plan", "fi_append_kv", "fi_merge_states"}


def write(folder: Path, **fields: Any) -> str:
    known = {name: value for name, value in fields.items() if value != "leave out"}
    (folder / "config.json").write_text(json.dumps(known))
    return str(folder)


def test_a_plain_config(tmp_path: Path) -> None:
    expected = ModelShape(HeadShape(32, 8, 128), torch.bfloat16, None)
    assert find_model(write(tmp_path, **LLAMA)) == expected
    assert find_model(str(tmp_path / "config.json")) == expected
    assert find_model("llama-3.1-8b") == expected


CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, int, int], torch.dtype, str]] = {
    "own head dim": ({"head_dim": 256}, (32, 8, 256), torch.bfloat16, ""),
    "no grouping": ({"num_key_value_heads": "leave out"}, (32, 32, 128), torch.bfloat16, ""),
    "fp16, new name": ({"dtype": "float16"}, (32, 8, 128), torch.float16, ""),
    "fp32 runs in 16 bits": ({"torch_dtype": "float32"}, (32, 8, 128), torch.bfloat16, ""),
    "soft cap": ({"attn_logit_softcapping": 50}, (32, 8, 128), torch.bfloat16, "soft_cap"),
    "sinks": ({"model_type": "gpt_oss"}, (32, 8, 128), torch.bfloat16, "sinks"),
    "alibi": ({"alibi": True}, (32, 8, 128), torch.bfloat16, "alibi"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_of_a_config(tmp_path: Path, name: str) -> None:
    fields, heads, dtype, variant = CONFIGS[name]
    shape = find_model(write(tmp_path, **{**LLAMA, **fields}))
    assert (shape.heads, shape.dtype) == (HeadShape(*heads), dtype)
    assert ("" if shape.variant is None else shape.variant.name) == variant


def test_the_text_part_of_a_multimodal_config(tmp_path: Path) -> None:
    assert find_model(write(tmp_path, text_config=LLAMA)).heads == HeadShape(32, 8, 128)


def test_an_unknown_model_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"model: expected one of llama-3.1-8b, .*got 'gpt-5'"):
        find_model("gpt-5")
    with pytest.raises(InvalidInput, match=r"or a folder with a config\.json, got"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": "leave out"}, "num_attention_heads to be a positive integer"),
        ({"hidden_size": "leave out"}, "hidden_size to be a positive integer, got None"),
        ({"head_dim": 0}, "head_dim to be a positive integer, got 0"),
        ({"num_key_value_heads": 5}, "num_qo_heads: expected a multiple of num_kv_heads=5"),
    ],
)
def test_a_config_without_what_is_needed(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        find_model(write(tmp_path, **{**LLAMA, **fields}))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"config\.json: expected a JSON object, got"):
        find_model(str(tmp_path))


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="expected attention with K and V heads, got latent"):
        find_model(write(tmp_path, **LLAMA, kv_lora_rank=512))


@pytest.mark.parametrize(
    ("ranks", "expected"), [(1, (64, 8)), (4, (16, 2)), (8, (8, 1)), (16, (4, 1))]
)
def test_heads_of_a_rank(ranks: int, expected: tuple[int, int]) -> None:
    heads = MODELS["llama-3.1-70b"].heads_of_rank(ranks)
    assert (heads.num_qo_heads, heads.num_kv_heads) == expected


@pytest.mark.parametrize("ranks", [0, 3, 128])
def test_ranks_that_do_not_fit(ranks: int) -> None:
    with pytest.raises(InvalidInput, match=f"tp: expected .*, got {ranks}; pass the tensor_par"):
        MODELS["llama-3.1-70b"].heads_of_rank(ranks)


@pytest.mark.parametrize("name", ["page_size", "max_requests", "max_tokens", "max_kv_len"])
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"{name}: expected a positive count, got 0"):
        Serving(**{name: 0})


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_has_decode_and_general_kernels(name: str) -> None:
    listed = serving_kernels(MODELS[name], Serving())
    titles = [kernel.title for kernel in listed if kernel.entry == "fi_attention"]
    assert len(titles) >= 2
    assert {kernel.entry for kernel in listed} == ENTRIES
    assert len({kernel.source for kernel in listed}) == len(listed)
    assert min(title.count("+") for title in titles) == 0  # decoding: one class of items
    assert max(title.count("+") for title in titles) >= 1


def test_how_a_model_is_served_decides_its_kernels() -> None:
    llama = MODELS["llama-3.1-8b"]
    fp8 = Serving(kv_dtype=torch.float8_e4m3fn, page_size=48, tensor_parallel=8)
    titles = [k.title for k in serving_kernels(llama, fp8) if k.entry == "fi_attention"]
    assert all(" d128 g4 bf16 kv fp8 " in f"{title} " for title in titles)
    assert all(title.endswith("any-table") for title in titles)


def test_prebuild_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[ModelShape, Serving]] = []

    def one_small_kernel(shape: ModelShape, serving: Serving) -> list[DeviceKernel]:
        asked.append((shape, serving))
        return [DeviceKernel("small", "f", 'extern "C" __global__ void f() {}', 0)]

    monkeypatch.setenv("FI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cli, "serving_kernels", one_small_kernel)
    command = ["prebuild", "--model", "qwen3-8b", "--arch", "sm_90a"]
    assert cli.main([*command, "--tp", "2", "--kv-dtype", "fp8", "--page-size", "32"]) == 0
    assert asked == [(MODELS["qwen3-8b"], Serving(2, torch.float8_e4m3fn, 32))]
    written = capsys.readouterr()
    assert written.out == f"1 kernels for sm_90a in {tmp_path}\n"
    assert "1/1" in written.err
    (entry,) = default_cache().entries()
    assert entry.title == "small sm_90a"


def test_the_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prebuild", "--model", "nothing", "--arch", "sm_90a"]) == 1
    assert capsys.readouterr().err.startswith("model: expected one of llama-3.1-8b, ")


def test_a_real_kernel_is_built_for_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def decode_only(shape: ModelShape, serving: Serving) -> list[DeviceKernel]:
        return serving_kernels(shape, serving)[:1]

    monkeypatch.setenv("FI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cli, "serving_kernels", decode_only)
    assert cli.main(["prebuild", "--model", "gpt-oss-20b-like", "--arch", "sm_90a"]) == 0
    (entry,) = default_cache().entries()
    assert entry.title.startswith("attention d64 g8 bf16 kv bf16 8x")
    assert (tmp_path / entry.key / "artifact").read_bytes().startswith(b"\x7fELF")
