"""The on-disk cache: hits, damage, races, folders that cannot be used, eviction."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fi_backend.errors import InvalidInput
from fi_backend.jit import __main__ as cli
from fi_backend.jit import cache as cache_module
from fi_backend.jit.cache import ArtifactCache, Built, default_cache


def make(root: Path, max_bytes: int = 1 << 20) -> ArtifactCache:
    return ArtifactCache(root, max_bytes)


class Builds:
    """A build that counts its calls."""

    def __init__(self, data: bytes = b"code") -> None:
        self.calls = 0
        self._data = data

    def __call__(self) -> Built:
        self.calls += 1
        return Built(self._data, "a title", "a log")


def refuse() -> Built:
    raise AssertionError("built again")


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    cache_module._warn_once.cache_clear()


def test_the_second_use_builds_nothing(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    assert cache.get("key") is None
    path = cache.get_or_build("key", Builds(b"abc"))
    assert path.read_bytes() == b"abc"
    assert cache.get_or_build("key", refuse) == path
    assert make(tmp_path / "cache").get("key") == path
    assert (path.parent / "log.txt").read_text() == "a log"


def test_nobody_else_can_read_or_write(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        path = make(tmp_path / "a" / "cache").get_or_build("key", Builds())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a" / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files = [*path.parent.iterdir(), path.parent.parent / "key.lock"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "another byte": lambda path: path.write_bytes(b"cobe"),
    "truncated": lambda path: path.write_bytes(b"co"),
    "emptied": lambda path: path.write_bytes(b""),
    "other hash": lambda path: (path.parent / "sha256").write_text("0" * 64),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_rebuilt(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    cache = make(tmp_path)
    path = cache.get_or_build("key", Builds())
    damage(path)
    builds = Builds()
    assert cache.get_or_build("key", builds).read_bytes() == b"code"
    assert builds.calls == 1
    assert "is damaged and will be rebuilt" in caplog.text
    assert cache.get("key") == path


@pytest.mark.parametrize("name", ["artifact", "sha256"])
def test_a_missing_file_is_rebuilt(tmp_path: Path, name: str) -> None:
    cache = make(tmp_path)
    (cache.get_or_build("key", Builds()).parent / name).unlink()
    builds = Builds()
    cache.get_or_build("key", builds)
    assert builds.calls == 1


def test_a_failing_build_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Built:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        make(tmp_path).get_or_build("key", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["key.lock"]
    assert make(tmp_path).get_or_build("key", Builds()).is_file()


def test_a_folder_that_cannot_be_made_falls_back_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = make(tmp_path / "file" / "cache")
    builds = Builds(b"elsewhere")
    path = cache.get_or_build("unwritable", builds)
    assert path.read_bytes() == b"elsewhere"
    assert tmp_path not in path.parents
    assert stat.S_IMODE(path.parents[1].stat().st_mode) == 0o700
    assert cache.get_or_build("unwritable", builds) == path
    assert builds.calls == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot be used" in record.message
    assert "set FI_CACHE_DIR to a writable folder" in record.message


def test_a_full_folder_keeps_what_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rename = Path.rename

    def full(source: Path, target: Path) -> Path:
        if tmp_path in target.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", full)
    builds = Builds(b"too much")
    assert make(tmp_path).get_or_build("full", builds).read_bytes() == b"too much"
    assert builds.calls == 1
    assert "No space left on device" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["full.lock"]


def test_a_hit_needs_no_write_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path).get_or_build("key", Builds())

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache_module.fcntl, "flock", read_only)
    monkeypatch.setattr(os, "utime", read_only)
    assert make(tmp_path).get_or_build("key", refuse) == path


def test_a_folder_that_others_can_write_to_is_not_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path).get_or_build("planted", Builds(b"bad"))
    tmp_path.chmod(0o777)
    path = make(tmp_path).get_or_build("planted", Builds(b"good"))
    assert path.read_bytes() == b"good"
    assert tmp_path not in path.parents
    assert "can be written by, another user" in caplog.text


def slow_build(log: Path) -> Built:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.2)
    return Built(b"shared")


def use(root: Path, log: Path) -> None:
    path = make(root).get_or_build("key", lambda: slow_build(log))
    os._exit(0 if path.read_bytes() == b"shared" else 1)


def die_while_building(root: Path) -> None:
    make(root).get_or_build("key", lambda: os._exit(7))


def test_one_of_many_processes_builds(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    log = tmp_path / "builds"
    processes = [fork.Process(target=use, args=(tmp_path / "cache", log)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(log.read_text().splitlines()) == 1


def test_a_builder_that_dies_blocks_nobody(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=die_while_building, args=(tmp_path,)
    )
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 7
    assert make(tmp_path).get_or_build("key", Builds()).is_file()


def test_the_least_recently_used_is_evicted(tmp_path: Path) -> None:
    cache = make(tmp_path, max_bytes=3500)
    for i, key in enumerate(("old", "older", "new")):
        cache.get_or_build(key, Builds(bytes(1000)))
        os.utime(tmp_path / key, (1000 - i, 1000 - i))
    assert cache.get("older") is not None  # a use counts
    cache.get_or_build("last", Builds(bytes(1000)))
    assert {entry.key for entry in cache.entries()} == {"older", "old", "last"}
    cache.get_or_build("huge", Builds(bytes(9000)))
    assert [entry.key for entry in cache.entries()] == ["huge"]


def test_leftovers_of_dead_builds_go_when_they_are_old(tmp_path: Path) -> None:
    for name, age in ((".tmp-old", 7200), (".tmp-new", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    make(tmp_path).get_or_build("key", Builds())
    assert not (tmp_path / ".tmp-old").exists()
    assert (tmp_path / ".tmp-new").exists()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FI_CACHE_DIR", raising=False)
    assert default_cache().root == tmp_path / ".cache" / "fi_backend"
    monkeypatch.setenv("FI_CACHE_DIR", "~/mine")
    assert default_cache().root == tmp_path / "mine"


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_the_size_limit_must_be_a_count(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FI_CACHE_MAX_MB", text)
    with pytest.raises(
        InvalidInput, match="FI_CACHE_MAX_MB: expected a positive number of megabytes"
    ):
        default_cache()


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FI_CACHE_DIR", str(tmp_path))
    make(tmp_path).get_or_build("0123456789abcdef0123", Builds(bytes(5000)))
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "0123456789abcdef       4 KiB" in listed
    assert "a title\n1 entries in" in listed
    assert cli.main(["clear"]) == 0
    assert capsys.readouterr().out == f"removed 1 entries from {tmp_path}\n"
    assert make(tmp_path).entries() == []
