"""Tiny device kernels for tests of the compile pipeline, and a record of what is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from fi_backend.jit import kernels
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.jit.nvrtc import Cubin, compile_cubin

ARCH = "sm_90a"
BROKEN = DeviceKernel("broken", "f", "int f() { return nonsense; }", 0)


def make_kernel(number: int, text: str = "") -> DeviceKernel:
    source = f'{text}\nextern "C" __global__ void f(int* x) {{ *x = {number}; }}\n'
    return DeviceKernel(f"kernel {number}", "f", source, 128)


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_CACHE_DIR", str(folder))
    monkeypatch.delenv("FI_LINEINFO", raising=False)


def record_compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the title of every kernel that is compiled from now on."""
    titles: list[str] = []

    def spy(source: str, arch: str, options: tuple[str, ...], title: str) -> Cubin:
        titles.append(title)
        return compile_cubin(source, arch, options, title)

    monkeypatch.setattr(kernels, "compile_cubin", spy)
    return titles
