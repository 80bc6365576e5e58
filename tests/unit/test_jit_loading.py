"""Device kernels: loaded once per device, never under a capture, prebuilt in parallel."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_kernels import ARCH, BROKEN, make_kernel, record_compiles, use_cache

from fi_backend import _core
from fi_backend.errors import CompileFailed, InvalidInput, Unsupported
from fi_backend.jit import kernels
from fi_backend.jit.kernels import arch_of, cubin_path, load, prebuild, shared_bytes_of_arch


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(tmp_path / "cache", monkeypatch)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of what is compiled during the test."""
    return record_compiles(monkeypatch)


@dataclass
class FakeKernel:
    """What is left of a kernel without a GPU: the arguments of its loading."""

    image: bytes
    entry: str
    device: int
    shared_bytes: int


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "Kernel", FakeKernel)
    monkeypatch.setattr(kernels, "_loaded", {})
    describe(monkeypatch, 9, 0)


def describe(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    info = SimpleNamespace(name="a GPU", major=major, minor=minor)
    monkeypatch.setattr(_core, "device_info", lambda index: info)
    kernels._arch_of_index.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_loaded_once_per_device(monkeypatch: pytest.MonkeyPatch, compiled: list[str]) -> None:
    first: Any = load(make_kernel(1), torch.device("cuda", 0))
    assert first.image == cubin_path(make_kernel(1), ARCH).read_bytes()
    assert (first.entry, first.device, first.shared_bytes) == ("f", 0, 128)
    monkeypatch.setattr(kernels, "cubin_path", None)  # a memoised kernel touches no file
    assert load(make_kernel(1), torch.device("cuda", 0)) is first
    monkeypatch.undo()
    assert compiled == ["kernel 1"]


@pytest.mark.usefixtures("gpu")
def test_every_device_has_its_own(compiled: list[str]) -> None:
    loaded: list[Any] = [load(make_kernel(1), torch.device("cuda", i)) for i in range(2)]
    assert [kernel.device for kernel in loaded] == [0, 1]
    assert compiled == ["kernel 1"]


@pytest.mark.usefixtures("gpu")
def test_threads_share_one_kernel(compiled: list[str]) -> None:
    found: list[Any] = []
    device = torch.device("cuda", 0)
    threads = [
        threading.Thread(target=lambda: found.append(load(make_kernel(5), device)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    assert compiled == ["kernel 5"]


@pytest.mark.usefixtures("gpu")
def test_a_cubin_that_was_evicted_before_it_was_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = [tmp_path / "gone"]
    monkeypatch.setattr(
        kernels, "cubin_path", lambda *args: answers.pop() if answers else cubin_path(*args)
    )
    kernel: Any = load(make_kernel(1), torch.device("cuda", 0))
    assert kernel.image.startswith(b"\x7fELF")


@pytest.mark.usefixtures("gpu")
def test_a_miss_under_capture_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    device = torch.device("cuda", 0)
    known = load(make_kernel(1), device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert load(make_kernel(1), device) is known
    with pytest.raises(Unsupported, match=r"kernel 2: expected .*; run the same step once before"):
        load(make_kernel(2), device)
    assert compiled == ["kernel 1"]


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"),
     ((12, 0), "sm_120a")],
)  # fmt: skip
def test_architectures(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str
) -> None:
    describe(monkeypatch, *capability)
    assert arch_of(torch.device("cuda", 0)) == arch


def test_devices_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    describe(monkeypatch, 7, 5)
    with pytest.raises(Unsupported, match=r"device: expected .* 8.0 or newer, got a GPU, 7.5; use"):
        arch_of(torch.device("cuda", 0))
    with pytest.raises(InvalidInput, match="device: expected a CUDA device, got cpu"):
        load(make_kernel(1), torch.device("cpu"))


def test_prebuild_compiles_each_missing_kernel_once(
    capsys: pytest.CaptureFixture[str], compiled: list[str]
) -> None:
    cubin_path(make_kernel(1), ARCH)
    same_code = replace(make_kernel(2), shared_bytes=256)
    prebuild([make_kernel(1), make_kernel(2), make_kernel(3), same_code], ARCH, progress=True)
    assert sorted(compiled) == ["kernel 1", "kernel 2", "kernel 3"]
    *steps, total = capsys.readouterr().err.splitlines()
    assert [step.split()[0] for step in steps] == ["1/2", "2/2"]
    assert sorted(step[-8:] for step in steps) == ["kernel 2", "kernel 3"]
    assert total.startswith("compiled 2 kernels for sm_90a in ")
    assert total.endswith(" s, 1 cached")


def test_prebuild_draws_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    prebuild([make_kernel(1), make_kernel(2)], ARCH)
    first, second, *_ = capsys.readouterr().err.removeprefix("\r").split("\r")
    assert first.startswith("[############            ] 1/2 ")
    assert second.startswith("[########################] 2/2 ")
    assert len(first) == 59
    prebuild([make_kernel(1), make_kernel(2)], ARCH)
    assert capsys.readouterr().err == ""


def test_prebuild_is_silent_unless_asked(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prebuild([make_kernel(1)], ARCH)
    assert capsys.readouterr().err == ""
    assert "compiled 1 kernels for sm_90a in" in caplog.text


def test_prebuild_reports_what_fails() -> None:
    with pytest.raises(CompileFailed, match="broken: expected device code that compiles"):
        prebuild([BROKEN, make_kernel(1)], ARCH, progress=False)


@pytest.mark.parametrize("arch", ["sm_90b", "sm_70", "90a", ""])
def test_unknown_architectures(arch: str) -> None:
    with pytest.raises(InvalidInput, match=f"arch: expected one of sm_80, .*, got '{arch}'"):
        shared_bytes_of_arch(arch)


def test_shared_memory_of_architectures() -> None:
    assert shared_bytes_of_arch("sm_90a") == kernels.HOPPER_SHARED_BYTES == 233472
    assert shared_bytes_of_arch("sm_89") == 102400
