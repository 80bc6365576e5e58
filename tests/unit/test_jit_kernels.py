"""Device kernels: compiled once per machine, and every way it can fail."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from device_kernels import ARCH, BROKEN, make_kernel, record_compiles, use_cache

from fi_backend import nvidia
from fi_backend.errors import CompileFailed, Unsupported
from fi_backend.jit import headers, kernels, nvrtc
from fi_backend.jit.cache import ArtifactCache, default_cache
from fi_backend.jit.kernels import cubin_path
from fi_backend.jit.nvrtc import Cubin, compile_cubin


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    use_cache(folder, monkeypatch)
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of what is compiled during the test."""
    return record_compiles(monkeypatch)


def test_compiled_once_and_found_again(compiled: list[str]) -> None:
    path = cubin_path(make_kernel(1), ARCH)
    assert path.read_bytes().startswith(b"\x7fELF")
    assert cubin_path(make_kernel(1), ARCH) == path
    assert cubin_path(replace(make_kernel(1), title="another title"), ARCH) == path
    assert compiled == ["kernel 1"]
    assert "Used" in (path.parent / "log.txt").read_text()
    (entry,) = default_cache().entries()
    assert entry.title == "kernel 1 sm_90a"


def other_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "compiler_identity", lambda: "nvrtc 99.0")


def other_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "-DX"))


def other_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "headers_hash", lambda source: "other headers")


def line_info(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_LINEINFO", "1")


@pytest.mark.parametrize("change", [other_nvrtc, other_flags, other_headers, line_info])
def test_all_that_the_code_depends_on_is_in_the_key(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    before = cubin_path(make_kernel(1), ARCH)
    assert cubin_path(make_kernel(2), ARCH) != before
    assert cubin_path(make_kernel(1), "sm_80") != before
    change(monkeypatch)
    assert cubin_path(make_kernel(1), ARCH) != before


def test_the_compiler_sees_the_headers_that_were_hashed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(headers, "INCLUDE_ROOT", tmp_path)
    (tmp_path / "fi").mkdir()
    (tmp_path / "fi" / "a.h").write_text("constexpr int kAnswer = 42;\n")
    kernel = make_kernel(1, '#include "fi/a.h"\nstatic_assert(kAnswer == 42);')
    try:
        nvrtc.cubin_key(kernel.source, ARCH)
        (tmp_path / "fi" / "a.h").write_text("edited meanwhile\n")
        assert cubin_path(kernel, ARCH).is_file()
    finally:
        headers.forget_headers()


def compile_and_exit(log: Path) -> None:
    def spy(source: str, *rest: Any) -> Cubin:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return compile_cubin(source, *rest)

    kernels.compile_cubin = spy
    os._exit(0 if cubin_path(make_kernel(3), ARCH).is_file() else 1)


def test_processes_that_need_the_same_kernel_share_one_compile(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    log = tmp_path / "compiles"
    processes = [fork.Process(target=compile_and_exit, args=(log,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_a_failing_compile_shows_key_command_log_and_source(cache_folder: Path) -> None:
    with pytest.raises(CompileFailed) as caught:
        cubin_path(BROKEN, ARCH)
    sentence, key, command, *rest = str(caught.value).splitlines()
    assert sentence == (
        "broken: expected device code that compiles, got NVRTC_ERROR_COMPILATION; the log says why"
    )
    assert key == f"key: {nvrtc.cubin_key(BROKEN.source, ARCH)}"
    assert command.startswith("command: nvrtc --gpu-architecture=sm_90a --std=c++20 ")
    assert rest[0] == "log:"
    assert 'fi.cu(1): error: identifier "nonsense" is undefined' in rest
    assert rest[-2:] == ["source:", BROKEN.source]
    assert not list(cache_folder.glob("*/artifact"))


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ArtifactCache, "get_or_build", full)
    with pytest.raises(CompileFailed, match=r"kernel 1: expected a folder to compile in, got .*No"):
        cubin_path(make_kernel(1), ARCH)


def test_a_full_cache_folder_still_serves(
    monkeypatch: pytest.MonkeyPatch, cache_folder: Path, compiled: list[str]
) -> None:
    rename = Path.rename

    def full(source: Path, target: Path) -> Path:
        if cache_folder in target.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", full)
    assert cubin_path(make_kernel(4), ARCH).read_bytes().startswith(b"\x7fELF")
    assert compiled == ["kernel 4"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (nvidia.Nvrtc(None, "", None, ("wheel: /a/libnvrtc.so.13",)), "none at wheel: /a/lib"),
        (nvidia.Nvrtc(Path("/a/libnvrtc.so"), "wheel", None, ()), "/a/libnvrtc.so, which does not"),
    ],
)
def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch, found: nvidia.Nvrtc, message: str) -> None:
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: found)
    forget_nvrtc()
    try:
        with pytest.raises(Unsupported, match=f"nvrtc: expected .* got {message}") as caught:
            cubin_path(make_kernel(1), ARCH)
    finally:
        forget_nvrtc()
    assert "the CPU engine works without it" in str(caught.value)


def test_no_cuda_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "cu13" / "lib" / "libnvrtc.so.13"
    found = nvidia.Nvrtc(library, "wheel", "13.0", ())
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: found)
    forget_nvrtc()
    try:
        with pytest.raises(Unsupported, match=r"cuda headers: expected cuda_bf16.h in .*; pip"):
            cubin_path(make_kernel(1), ARCH)
    finally:
        forget_nvrtc()


def forget_nvrtc() -> None:
    for function in (nvrtc._found, nvrtc._load, nvrtc.compiler_identity):
        function.cache_clear()
