"""User variants through the host compiler: built once, found again, and every way it can fail."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from variant_abi import make_tile, run_logits

from fi_backend.errors import CompileFailed, Unsupported
from fi_backend.jit import headers, host_compiler
from fi_backend.jit.cache import ArtifactCache
from fi_backend.variants import Scalar, Variant, shipped, stages

LIBRARY = """
extern "C" __attribute__((visibility("default"))) int fi_answer() { return 42; }
"""


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FI_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has loaded."""
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_loaded", {})
    stages.compile_stages.cache_clear()
    host_compiler._identified.cache_clear()


def shifted(logit: Any, shift: Any) -> Any:
    return logit + shift * 2


MINE = Variant("mine", logits=shifted, params=(Scalar("shift", float, 1.5),))


def run_mine() -> list[float]:
    out = run_logits(MINE, make_tile(1, 3), torch.tensor([[0.0, 1.0, 2.0]]))
    row: list[float] = out[0].tolist()
    return row


def test_built_once_and_found_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache_folder: Path
) -> None:
    caplog.set_level(logging.INFO)
    assert run_mine() == [3, 4, 5]
    assert run_mine() == [3, 4, 5]
    forget(monkeypatch)
    assert run_mine() == [3, 4, 5]
    assert caplog.text.count("compiling variant mine") == 1
    assert len(list(cache_folder.glob("*/artifact"))) == 1


def compile_and_exit(folder: Path) -> None:
    path = host_compiler.compile_library(LIBRARY, f"process {os.getpid()}")
    os._exit(0 if ctypes.CDLL(str(path)).fi_answer() == 42 and folder in path.parents else 1)


def test_processes_that_compile_the_same_share_one_build(cache_folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=compile_and_exit, args=(cache_folder,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(cache_folder.glob("*/artifact"))) == 1


def test_a_damaged_library_is_rebuilt(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    run_mine()
    (artifact,) = cache_folder.glob("*/artifact")
    good = artifact.read_bytes()
    artifact.unlink()  # the loaded one stays mapped
    artifact.write_bytes(good[: len(good) // 2])
    forget(monkeypatch)
    assert run_mine() == [3, 4, 5]


def test_an_unusable_cache_folder_still_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FI_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert run_mine() == [3, 4, 5]


def test_no_folder_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(ArtifactCache, "get_or_build", full)
    with pytest.raises(CompileFailed, match=r"mine: expected a folder to compile in, got No space"):
        run_mine()


def test_a_library_that_was_evicted_before_it_was_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = [tmp_path / "gone", None]

    def compile_library(source: str, title: str) -> Path:
        return answers.pop(0) or host_compiler.compile_library(source, title)

    monkeypatch.setattr(stages, "compile_library", compile_library)
    assert run_mine() == [3, 4, 5]
    assert answers == []


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no library")
    monkeypatch.setattr(stages, "compile_library", lambda *_: tmp_path / "text")
    with pytest.raises(CompileFailed, match=r"mine: expected a library that can be loaded, got"):
        run_mine()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PATH": ""}, r"expected a C\+\+20 compiler on PATH, got none of c\+\+, g\+\+, clang\+\+"),
        ({"CXX": "no-such-c++ -v"}, r"got CXX='no-such-c\+\+ -v', not found; install g\+\+ 11"),
        ({"CXX": "false"}, "expected a compiler that answers --version, got .*; check CXX"),
    ],
)
def test_no_compiler(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unsupported, match=message) as caught:
        run_mine()
    assert "the shipped variants need no compiler" in str(caught.value)
    out = run_logits(shipped.soft_cap(2.0), make_tile(), torch.ones(1, 1))
    assert out.item() == pytest.approx(0.9242343)


def test_no_ninja(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = host_compiler.find_compiler()
    monkeypatch.setattr(host_compiler, "find_compiler", lambda: compiler)
    monkeypatch.setattr(host_compiler.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unsupported, match=r"ninja: expected the ninja build tool, got no package"):
        run_mine()


def test_a_failing_compile_shows_key_command_and_log() -> None:
    with pytest.raises(CompileFailed) as caught:
        host_compiler.compile_library("int broken(;\n", "broken")
    sentence, key, command, log, *rest = str(caught.value).splitlines()
    assert sentence.startswith("broken: expected generated code that compiles, got exit status 1; ")
    assert len(key.removeprefix("key: ")) == 64
    assert "-std=c++20" in command and command.endswith("variant.cc -o variant.so")
    assert log == "log:"
    assert any("variant.cc:1:" in line and "error" in line for line in rest)


def test_the_compiler_may_carry_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = host_compiler.find_compiler().command[0]
    monkeypatch.setenv("CXX", f"env FI_TEST='a $b' {compiler}")
    assert host_compiler.compile_library(LIBRARY, "answer").is_file()


CHANGES: dict[str, Any] = {
    "flags": ("FLAGS", (*host_compiler.FLAGS, "-DX")),
    "version": ("package_version", lambda: "9.9"),
    "cpu": ("cpu_model", lambda: "another CPU"),
    "compiler": (
        "_identified",
        lambda command: host_compiler.HostCompiler(command, "another compiler"),
    ),
    "headers": ("headers_hash", lambda source: "other headers"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_that_the_code_depends_on_is_in_the_key(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = host_compiler.compile_library(LIBRARY, "answer")
    assert host_compiler.compile_library(LIBRARY, "another title") == before
    assert host_compiler.compile_library(LIBRARY + "\n", "answer") != before
    name, value = CHANGES[change]
    if name == "_identified":
        value.cache_clear = lambda: None
    monkeypatch.setattr(host_compiler, name, value)
    assert host_compiler.compile_library(LIBRARY, "answer") != before


def test_all_reachable_headers_are_hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(headers, "INCLUDE_ROOT", tmp_path)
    (tmp_path / "fi").mkdir()
    (tmp_path / "fi" / "a.h").write_text('#include "fi/b.h"\n')
    (tmp_path / "fi" / "b.h").write_text('#include "fi/a.h"\n')
    source = '#include "fi/a.h"\n'
    try:
        headers.forget_headers()
        before = headers.headers_hash(source)
        assert list(headers.reachable_headers(source)) == ["fi/a.h", "fi/b.h"]
        (tmp_path / "fi" / "b.h").write_text('#include "fi/a.h"\nint x;\n')
        assert headers.headers_hash(source) == before  # a process reads a header once
        headers.forget_headers()
        assert headers.headers_hash(source) != before
    finally:
        headers.forget_headers()
