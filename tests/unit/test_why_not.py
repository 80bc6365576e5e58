"""why_not lists every reason, each in the error contract's sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fi_backend import gpu, nvidia
from fi_backend.errors import Unsupported
from fi_backend.formats import Band, HeadShape
from fi_backend.layers import Capacity, LayerClass
from fi_backend.planner import StepPlanner
from fi_backend.variants import Scalar, Variant
from fi_backend.why_not import AttentionConfig, why_not

SERVED = AttentionConfig(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64)

SERVED_CASES = {
    "plain": {},
    "half precision": {"dtype": torch.float16},
    "bfloat16 with fp8 cache": {"dtype": torch.bfloat16, "kv_dtype": torch.float8_e4m3fn},
    "odd group": {"num_qo_heads": 7, "num_kv_heads": 1},
    "smallest and largest head": {"head_dim_qk": 256, "head_dim_vo": 32},
    "head dim 72": {"head_dim_qk": 72},
    "page of one token": {"page_size": 1},
    "odd page": {"page_size": 24},
    "window with sinks": {"band": Band.window(128, sink_prefix=4)},
    "features": {"features": frozenset({"sinks", "soft_cap"})},
}

# Change -> the sentence that it must bring.
REFUSED = {
    "device": (
        {"device": "xpu:1"},
        "device: expected cpu or cuda, got xpu:1; keep the engine's own backend on this device",
    ),
    "no kv heads": (
        {"num_kv_heads": 0},
        "num_kv_heads: expected at least 1, got 0; pass the heads of one rank",
    ),
    "heads do not divide": (
        {"num_qo_heads": 6, "num_kv_heads": 4},
        "num_qo_heads: expected a positive multiple of num_kv_heads=4, got 6;"
        " pass the heads of one rank",
    ),
    "narrow head": (
        {"head_dim_qk": 24},
        "head_dim_qk: expected a multiple of 8 from 32 to 256, got 24;"
        " pad the head dimension with zeros",
    ),
    "ragged head": (
        {"head_dim_qk": 100},
        "head_dim_qk: expected a multiple of 8 from 32 to 256, got 100;"
        " pad the head dimension with zeros",
    ),
    "wide value head": (
        {"head_dim_vo": 264},
        "head_dim_vo: expected a multiple of 8 from 32 to 256, got 264;"
        " pad the head dimension with zeros",
    ),
    "double": (
        {"dtype": torch.float64},
        "dtype: expected float32 or float16 or bfloat16, got float64; convert q first",
    ),
    "mixed cache": (
        {"dtype": torch.float16, "kv_dtype": torch.bfloat16},
        "kv_dtype: expected float16 or float8_e4m3fn, got bfloat16;"
        " store the cache in the dtype of q or in float8_e4m3fn",
    ),
    "empty page": (
        {"page_size": 0},
        "page_size: expected at least 1 token, got 0; any positive size is served",
    ),
    "unknown feature": (
        {"features": frozenset({"mla", "sinks"})},
        "features: expected some of alibi, batch_invariant, lse, partial_states, rotation,"
        " shared_prefix, sinks, sliding_window, soft_cap, variant, got mla;"
        " keep the engine's own backend for these layers",
    ),
}


@pytest.mark.parametrize("change", SERVED_CASES.values(), ids=SERVED_CASES)
def test_served(change: dict[str, object]) -> None:
    assert why_not(replace(SERVED, **change)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    assert why_not(replace(SERVED, **change)) == [reason]  # type: ignore[arg-type]


def test_all_reasons_are_listed() -> None:
    config = replace(SERVED, device="tpu", num_qo_heads=3, head_dim_qk=8, dtype=torch.int8)
    arguments = [reason.split(":")[0] for reason in why_not(config)]
    assert arguments == ["device", "num_qo_heads", "head_dim_qk", "dtype"]


def test_config_of_a_layer_class() -> None:
    layer = LayerClass(HeadShape(8, 2, 64, 32), torch.float16, band=Band.window(16))
    assert AttentionConfig.of(layer, "cpu") == replace(
        SERVED, head_dim_vo=32, dtype=torch.float16, band=Band(15, 0)
    )


@pytest.mark.parametrize("head_dim", [32, 40, 256])
def test_the_planner_takes_what_is_served(head_dim: int) -> None:
    layer = LayerClass(HeadShape(4, 2, head_dim), torch.float32)
    assert why_not(AttentionConfig.of(layer, "cpu")) == []
    StepPlanner([layer], Capacity(1, 1, 16))


ON_GPU = replace(SERVED, device="cuda", dtype=torch.bfloat16)
H100 = nvidia.Gpu(0, "H100", (9, 0), 132, 80 << 30)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one H100, torch's CUDA build and NVRTC."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvidia, "find_driver", lambda: nvidia.Driver("13.0", (H100,), ""))
    monkeypatch.setattr(gpu, "compiler_identity", lambda: "nvrtc 13.0")


GPU_SERVED = {
    "plain": {},
    "by index": {"device": "cuda:0"},
    "half precision": {"dtype": torch.float16},
    "fp8 cache": {"kv_dtype": torch.float8_e4m3fn},
    "same cache": {"kv_dtype": torch.bfloat16},
    "any group": {"num_qo_heads": 64, "num_kv_heads": 1},
    "wide and narrow": {"head_dim_qk": 192, "head_dim_vo": 128},
    "head dim 80": {"head_dim_qk": 80},
    "odd page": {"page_size": 24},
    "as many parameters as fit": {"num_variant_params": 16},
    "oldest": {"compute_capability": (8, 0)},
}
GPU_REFUSED = {
    "float32": (
        {"dtype": torch.float32},
        "dtype: expected float16 or bfloat16, got float32; convert q first",
    ),
    "mixed cache": (
        {"kv_dtype": torch.float16},
        "kv_dtype: expected bfloat16 or float8_e4m3fn, got float16;"
        " store the cache in the dtype of q or in float8_e4m3fn",
    ),
    "head dim 72": (
        {"head_dim_qk": 72},
        "head_dim_qk: expected a multiple of 16 from 32 to 256, got 72;"
        " pad the head dimension with zeros",
    ),
    "parameters": (
        {"num_variant_params": 17},
        "variant: expected at most 16 parameters, summed over the functions of the variant, got 17;"
        " pack scalars into one tensor",
    ),
    "index": (
        {"device": "cuda:1"},
        "device: expected a GPU in [0, 1), got 1; CUDA_VISIBLE_DEVICES hides the others",
    ),
    "no index": (
        {"device": "cuda:x"},
        "device: expected cpu or cuda, got cuda:x; keep the engine's own backend on this device",
    ),
    "known to be old": (
        {"compute_capability": (7, 5)},
        "device: expected a GPU of compute capability 8.0 or newer, got the GPU, 7.5;"
        " the CPU engine still works: pass device='cpu'",
    ),
}


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("change", GPU_SERVED.values(), ids=GPU_SERVED)
def test_served_on_a_gpu(change: dict[str, object]) -> None:
    assert why_not(replace(ON_GPU, **change)) == []  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(("change", "reason"), GPU_REFUSED.values(), ids=GPU_REFUSED)
def test_refused_on_a_gpu(change: dict[str, object], reason: str) -> None:
    assert why_not(replace(ON_GPU, **change)) == [reason]  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (
            nvidia.Driver(None, (), "libcuda.so.1 is not installed: no NVIDIA driver"),
            "device: expected an NVIDIA GPU, got libcuda.so.1 is not installed: no NVIDIA driver;"
            " the CPU engine still works: pass device='cpu'",
        ),
        (
            nvidia.Driver("12.8", (replace(H100, name="T4", compute_capability=(7, 5)),), ""),
            "device: expected a GPU of compute capability 8.0 or newer, got T4, 7.5;"
            " the CPU engine still works: pass device='cpu'",
        ),
    ],
)
def test_a_machine_without_a_usable_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: nvidia.Driver, reason: str
) -> None:
    monkeypatch.setattr(nvidia, "find_driver", lambda: driver)
    assert why_not(ON_GPU) == [reason]
    assert why_not(SERVED) == []
    layer = LayerClass(HeadShape(8, 2, 64), torch.bfloat16)
    with pytest.raises(Unsupported, match=r"layer_classes\[0\]: .*" + reason[:40]):
        StepPlanner([layer], Capacity(1, 1, 16), "cuda")


@pytest.mark.usefixtures("one_gpu")
def test_all_reasons_of_a_machine_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise Unsupported("nvrtc: expected NVIDIA's run-time compiler, got none; install it")

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(gpu, "compiler_identity", missing)
    reasons = why_not(replace(ON_GPU, compute_capability=(7, 0)))
    assert [reason.split(", got")[0] for reason in reasons] == [
        "device: expected a build of torch with CUDA",
        "device: expected a GPU of compute capability 8.0 or newer",
        "nvrtc: expected NVIDIA's run-time compiler",
    ]


def test_a_known_capability_asks_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_driver() -> nvidia.Driver:
        raise AssertionError("a process that asked the driver cannot fork")

    monkeypatch.setattr(nvidia, "find_driver", find_driver)
    why_not(replace(ON_GPU, compute_capability=(9, 0)))


def test_config_counts_the_parameters_of_all_functions() -> None:
    gain = Variant("gain", lambda logit, gain: logit * gain, params=(Scalar("gain"),))
    both = gain.then(gain.renamed(gain="other"))
    config = AttentionConfig.of(LayerClass(HeadShape(8, 2, 64), torch.float16, variant=both), "cpu")
    assert config.num_variant_params == 2
