"""Kernels of append_kv and merge_states: compiled without a GPU, launched on a made-up one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fake_cuda
import pytest
import torch

from fi_backend.cuda_ops import (
    AppendSpec,
    RopeSpec,
    append_kernel,
    append_kernels,
    merge_kernel,
)
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.jit.nvrtc import compile_cubin

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
LLAMA = AppendSpec(BF16, BF16, 128, 128)
LLAMA_FP8 = replace(LLAMA, cache_dtype=FP8)
NEOX, GPTJ = RopeSpec(FP32, 128), RopeSpec(BF16, 64, interleaved=True)

KERNELS = [
    *append_kernels(LLAMA),
    *append_kernels(LLAMA_FP8),
    *append_kernels(replace(LLAMA, rope=NEOX)),
    *append_kernels(replace(LLAMA_FP8, rope=NEOX)),
    *append_kernels(replace(LLAMA, rope=GPTJ)),
    append_kernel(AppendSpec(FP16, FP16, 192, 128)),
    append_kernel(AppendSpec(FP16, FP8, 256, 256)),
    append_kernel(AppendSpec(BF16, BF16, 80, 80, RopeSpec(FP32, 20), aligned=False)),
    append_kernel(AppendSpec(FP16, FP8, 64, 64, RopeSpec(FP16, 64))),
    append_kernel(AppendSpec(BF16, BF16, 24, 40, RopeSpec(FP32, 6, True), aligned=False)),
    merge_kernel(128),
    merge_kernel(128, softmax=False),
    merge_kernel(127, aligned=False),
    merge_kernel(576),
    merge_kernel(36),
    merge_kernel(96, aligned=False),
]
# sm_80 has no instruction that rounds to fp8: the CUDA header does it by integers.
ELSEWHERE = [
    *((append_kernel(LLAMA_FP8), a) for a in ("sm_80", "sm_89", "sm_100a", "sm_120a")),
    (append_kernel(replace(LLAMA_FP8, rope=NEOX)), "sm_80"),
    (append_kernel(replace(LLAMA, rope=NEOX)), "sm_100a"),
    (merge_kernel(128), "sm_80"),
]


def check_code(kernel: DeviceKernel, arch: str) -> None:
    cubin = compile_cubin(kernel.source, arch)
    assert (cubin.spill_bytes, cubin.stack_bytes, cubin.advice) == (0, 0, []), cubin.log
    assert "warning" not in cubin.log
    # Two CTAs of 256 threads on an SM; the copies without rotation need four.
    assert 0 < cubin.registers <= (128 if "Rope" in kernel.title else 64)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.title)
def test_compiles_without_spills(kernel: DeviceKernel) -> None:
    check_code(kernel, "sm_90a")


@pytest.mark.parametrize(("kernel", "arch"), ELSEWHERE, ids=lambda x: getattr(x, "title", x))
def test_compiles_for_other_architectures(kernel: DeviceKernel, arch: str) -> None:
    check_code(kernel, arch)


def test_partly_rotated_chunks_have_no_aligned_kernel() -> None:
    """Rotary dim 20 pairs element 0 with 10: the partner of a chunk is no chunk."""
    assert len(append_kernels(replace(LLAMA, rope=RopeSpec(FP32, 20)))) == 1
    assert len(append_kernels(replace(LLAMA, rope=RopeSpec(FP32, 32)))) == 2
    assert len(append_kernels(replace(LLAMA, rope=RopeSpec(FP32, 24, interleaved=True)))) == 2


GRIDS = """
def grid(tokens, kv_heads, dims, qo_heads=0, rotary_dim=0):
    params = _core.AppendParams(2)
    params.num_tokens, params.num_kv_heads, params.num_qo_heads = tokens, kv_heads, qo_heads
    params.head_dim_qk, params.head_dim_vo = dims
    view = _core.KvCacheView()
    view.num_pages, view.page_size = 10, 16
    params.kv = view
    params.rope = _core.RopeParams(rotary_dim, False, 0, rotary_dim, 100, True)
    _core.launch_append(load(), params, (0,) * 11, 7)
    # Overlapping the kernel before: the stream is followed by one attribute, which is set.
    return [(int(c.split()[2], 16), int(c.split()[5], 16), c.split()[-3]) for c in calls()
            if c.startswith("cuLaunchKernelEx")]

def merge_grid(rows, dim, aligned=True):
    _core.launch_merge(load(), (0,) * 4, 2, rows, dim, aligned, 0)
    return [int(c.split()[2], 16) for c in calls() if c.startswith("cuLaunchKernel")]

fake.fake_enter(0x10000)
"""


def test_grids(tmp_path: Path) -> None:
    """8 threads per row of 128 elements: 32 rows per CTA, twice as many in large steps."""
    cases = {
        "grid(64, 8, (128, 128))": [(16 + 16, 256, "0x7")],
        "grid(64, 8, (72, 72))": [(19 + 19, 256, "0x7")],
        "grid(1, 1, (128, 128))": [(1 + 1, 256, "0x7")],
        "grid(14, 3, (192, 128))": [(2 + 2, 256, "0x7")],
        "grid(8192, 8, (128, 128))": [(1024 + 1024, 256, "0x7")],
        "grid(64, 8, (128, 128), 32, 128)": [(16 + 16 + 64, 256, "0x7")],
        "grid(8192, 8, (128, 128), 32, 128)": [(1024 + 1024 + 4096, 256, "0x7")],
        "grid(0, 8, (128, 128))": [],
        "merge_grid(1000, 128)": [63],
        "merge_grid(1000, 36)": [36],
        "merge_grid(1000, 33, False)": [129],
        "merge_grid(0, 128)": [],
    }
    script = GRIDS + "".join(f"\nprint({call})" for call in cases)
    output = fake_cuda.run(fake_cuda.build_fake(tmp_path), script)
    assert output.splitlines() == [str(expected) for expected in cases.values()]
