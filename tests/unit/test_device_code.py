"""Device code compiles for every architecture we name, on a machine without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fi_backend import errors
from fi_backend.jit.nvrtc import compile_cubin


@dataclass(frozen=True)
class Kernel:
    """One specialisation of the sm80-class kernel."""

    name: str
    tiles: str
    element: str = "__nv_bfloat16"
    shape: str = "128, 128, 4, 16, true"  # head dims, group size, page size, plain page ids
    ctas_per_sm: int = 2
    arch: str = "sm_90a"

    @property
    def source(self) -> str:
        return f"""#include "fi/sm80/kernel.h"
using namespace fi::sm80;
extern "C" __global__ void __launch_bounds__(kThreads, {self.ctas_per_sm})
fi_attention(const __grid_constant__ fi::KernelParams p) {{
  run<Shape<{self.element}, {self.shape}>, {self.tiles}>(p);
}}
"""


DECODE, VERIFY = "Tile<16, 64, 2>", "Tile<64, 64, 2>"
KERNELS = [
    Kernel("decode", DECODE, ctas_per_sm=3),
    Kernel("decode-fp16", DECODE, element="__half"),
    Kernel("decode-page-1", DECODE, shape="128, 128, 4, 1, true"),
    Kernel("decode-any-page-any-table", DECODE, shape="128, 128, 5, 0, false"),
    Kernel("decode-d64", "Tile<16, 128, 2>", shape="64, 64, 8, 16, true"),
    Kernel("decode-d80", DECODE, shape="80, 80, 1, 16, true"),
    Kernel("decode-d192-128", DECODE, shape="192, 128, 16, 16, true", ctas_per_sm=1),
    Kernel("decode-d256", DECODE, shape="256, 256, 2, 16, true", ctas_per_sm=1),
    Kernel("64-rows", VERIFY),
    Kernel("two-classes", f"{DECODE}, {VERIFY}"),
    *(Kernel(f"decode-{a}", DECODE, arch=a) for a in ("sm_80", "sm_89", "sm_100a", "sm_120a")),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_compiles_without_spills(kernel: Kernel) -> None:
    cubin = compile_cubin(kernel.source, kernel.arch)
    assert cubin.image.startswith(b"\x7fELF")
    assert (cubin.spill_bytes, cubin.stack_bytes, cubin.advice) == (0, 0, []), cubin.log
    assert 0 < cubin.registers <= 65536 // (128 * kernel.ctas_per_sm)
    assert "warning" not in cubin.log


def test_a_failing_compile_shows_log_and_source() -> None:
    with pytest.raises(
        errors.CompileFailed, match=r'(?s)identifier "nonsense" is undefined.*int f'
    ):
        compile_cubin("__device__ int f() { return nonsense; }", "sm_90a")


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(errors.CompileFailed, match="gpu-architecture"):
        compile_cubin("", "sm_1")
