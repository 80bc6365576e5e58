"""The on-disk cache of compiled code: bytes in, path out.

An entry is a folder named by its key, with the artifact, the hash of its bytes and the log of its
making. It appears by a rename, so it is there whole or not at all; the hash is checked on every
use. Of many processes that miss the same key one builds and the others wait. Where the folder
cannot be used (read-only, full, not ours) a private temporary folder serves this process.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fi_backend.errors import require

DEFAULT_MAX_MB = 1024
# Temporary folders of builds that died are removed when older than any build takes.
STALE_SECONDS = 3600.0
_ARTIFACT, _DIGEST, _LOG, _TITLE = "artifact", "sha256", "log.txt", "title.txt"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """What a build gives: the bytes to keep, one line for listings, the compiler's log."""

    data: bytes
    title: str = ""
    log: str = ""


@dataclass(frozen=True)
class Entry:
    """An entry as listed."""

    key: str
    title: str
    num_bytes: int
    last_used: float  # seconds since the epoch


class ArtifactCache:
    """A folder of artifacts, least recently used evicted first."""

    def __init__(self, root: Path, max_bytes: int, is_private: bool = False) -> None:
        """Use ``root``, which is created on the first build; private: there is no fallback."""
        self.root = root
        self._max_bytes = max_bytes
        self._is_private = is_private

    def get(self, key: str) -> Path | None:
        """Return the artifact's path, or None if it is missing or damaged."""
        entry = self.root / key
        try:
            self._require_trusted()
            data = (entry / _ARTIFACT).read_bytes()
            digest = (entry / _DIGEST).read_text()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            logger.warning("cache entry %s is damaged and will be rebuilt", entry)
            return None
        with suppress(OSError):  # a read-only cache keeps no record of use
            os.utime(entry)
        return entry / _ARTIFACT

    def get_or_build(self, key: str, build: Callable[[], Built]) -> Path:
        """Return the artifact's path; build it if it is missing, in one process of many.

        Args:
            key: file-name-safe hash of everything the artifact depends on.
            build: makes the artifact; its exceptions pass through.

        Raises:
            OSError: neither this folder nor a temporary one can be written.
        """
        built: Built | None = None
        try:
            path = self.get(key)
            if path is not None:
                return path
            with self._lock(key):
                path = self.get(key)
                if path is not None:
                    return path
                built = build()
                return self._store(key, built)
        except OSError as error:
            if self._is_private:
                raise
            private = _private_cache(self._max_bytes)
            _warn_once(self.root, str(error), private.root)
            made = built
            return private.get_or_build(key, build if made is None else lambda: made)

    def entries(self) -> list[Entry]:
        """Return all entries, least recently used first."""
        found = []
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            try:
                if not (folder / _DIGEST).is_file():
                    continue
                title = (folder / _TITLE).read_text()
                size = sum(file.stat().st_size for file in folder.iterdir())
                found.append(Entry(folder.name, title, size, folder.stat().st_mtime))
            except OSError:
                continue  # removed by another process meanwhile
        return sorted(found, key=lambda entry: entry.last_used)

    def clear(self) -> int:
        """Remove all entries; return how many there were."""
        entries = self.entries()
        for entry in entries:
            shutil.rmtree(self.root / entry.key, ignore_errors=True)
        return len(entries)

    def _require_trusted(self) -> None:
        """Refuse a folder that others can write to: what lies in it will be executed."""
        info = self.root.stat()
        if info.st_mode & stat.S_IWOTH or info.st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"{self.root} belongs to, or can be written by, another user")

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._require_trusted()
        descriptor = os.open(self.root / f"{key}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released by the system if we die
            yield
        finally:
            os.close(descriptor)

    def _store(self, key: str, built: Built) -> Path:
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root))  # mode 0700
        files = {
            _ARTIFACT: built.data,
            _LOG: built.log.encode(),
            _TITLE: built.title.encode(),
            _DIGEST: hashlib.sha256(built.data).hexdigest().encode(),
        }
        try:
            for name, data in files.items():
                descriptor = os.open(temporary / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
            shutil.rmtree(self.root / key, ignore_errors=True)  # a damaged one
            temporary.rename(self.root / key)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._evict(keep=key)
        return self.root / key / _ARTIFACT

    def _evict(self, keep: str) -> None:
        entries = self.entries()
        total = sum(entry.num_bytes for entry in entries)
        for entry in entries:
            if total <= self._max_bytes:
                break
            if entry.key != keep:
                shutil.rmtree(self.root / entry.key, ignore_errors=True)
                total -= entry.num_bytes
        for leftover in self.root.glob(".tmp-*"):
            try:
                is_stale = time.time() - leftover.stat().st_mtime > STALE_SECONDS
            except FileNotFoundError:
                continue
            if is_stale:
                shutil.rmtree(leftover, ignore_errors=True)


def default_cache() -> ArtifactCache:
    """Return the cache at FI_CACHE_DIR or ~/.cache/fi_backend, of FI_CACHE_MAX_MB megabytes.

    Raises:
        InvalidInput: FI_CACHE_MAX_MB is not a positive number.
    """
    root = os.environ.get("FI_CACHE_DIR") or os.path.join("~", ".cache", "fi_backend")
    text = os.environ.get("FI_CACHE_MAX_MB", str(DEFAULT_MAX_MB))
    is_count = text.isdecimal() and int(text) > 0
    require(is_count, "FI_CACHE_MAX_MB", "a positive number of megabytes", repr(text), "unset it")
    return ArtifactCache(Path(root).expanduser(), int(text) << 20)


@cache
def _private_root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="fi_backend-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(root, ignore_errors=True)

    atexit.register(remove)
    return root


def _private_cache(max_bytes: int) -> ArtifactCache:
    return ArtifactCache(_private_root(), max_bytes, is_private=True)


@cache
def _warn_once(root: Path, reason: str, private: Path) -> None:
    logger.warning(
        "the cache folder %s cannot be used (%s): compiled code is kept in %s and lost when this "
        "process ends; set FI_CACHE_DIR to a writable folder of your own",
        root,
        reason,
        private,
    )
