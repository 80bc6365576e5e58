"""C++ source to shared library, through ninja and the host's compiler, at most once per machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

from fi_backend.errors import CompileFailed, Unsupported, contract_message
from fi_backend.jit.cache import Built, default_cache
from fi_backend.jit.headers import INCLUDE_ROOT, headers_hash

# -march=native: the CPU is part of the key. No errno, no traps: loops with sqrt and with choices
# between floats vectorise.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
)
SHIPPED_NEED_NONE = "the shipped variants need no compiler"
_CANDIDATES = ("c++", "g++", "clang++")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostCompiler:
    """A C++ compiler: the command that runs it, and what tells it from others."""

    command: tuple[str, ...]
    identity: str


def find_compiler() -> HostCompiler:
    """Return the compiler named by CXX, else the first of c++, g++, clang++ on PATH.

    Raises:
        Unsupported: there is none, or it does not run.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    commands = [named] if named else [[name] for name in _CANDIDATES]
    for command in commands:
        path = shutil.which(command[0])
        if path is not None:
            return _identified((path, *command[1:]))
    got = f"CXX={shlex.join(named)!r}, not found" if named else "none of " + ", ".join(_CANDIDATES)
    hint = f"install g++ 11 or newer, or set CXX; {SHIPPED_NEED_NONE}"
    raise Unsupported(contract_message("host compiler", "a C++20 compiler on PATH", got, hint))


@lru_cache(maxsize=8)
def _identified(command: tuple[str, ...]) -> HostCompiler:
    ask = [*command, "--version"]
    try:
        version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        hint = f"check CXX; {SHIPPED_NEED_NONE}"
        rule = "a compiler that answers --version"
        raise Unsupported(contract_message("host compiler", rule, error, hint)) from error
    return HostCompiler(command, f"{shlex.join(command)}\n{version}")


def find_ninja() -> str:
    """Return the path of ninja: that of its Python package, else the one on PATH.

    Raises:
        Unsupported: there is none.
    """
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja  # noqa: PLC0415 (optional dependency)

        bundled = shutil.which("ninja", path=str(ninja.BIN_DIR))
        if bundled:
            return bundled
    path = shutil.which("ninja")
    if path is None:
        hint = f"pip install fi-backend[jit]; {SHIPPED_NEED_NONE}"
        rule = "the ninja build tool"
        raise Unsupported(contract_message("ninja", rule, "no package and none on PATH", hint))
    return path


def compile_library(source: str, title: str) -> Path:
    """Return a shared library built from C++ source, from the cache if it was built before.

    Args:
        source: one translation unit that includes nothing but headers of fi/.
        title: what it is, for listings and messages.

    Raises:
        Unsupported: no compiler or no ninja.
        CompileFailed: the compiler refused; the message has the key, the command and its log.
    """
    compiler = find_compiler()
    command = [*compiler.command, *FLAGS, f"-I{INCLUDE_ROOT}"]
    parts = [source, compiler.identity, *FLAGS]
    parts += [headers_hash(source), package_version(), cpu_model()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    try:
        return default_cache().get_or_build(key, lambda: _build(key, source, title, command))
    except OSError as error:
        hint = "free space in the temporary folder, or set FI_CACHE_DIR and TMPDIR"
        rule = "a folder to compile in"
        raise CompileFailed(contract_message(title, rule, error, hint)) from error


def _build(key: str, source: str, title: str, command: list[str]) -> Built:
    logger.info("compiling variant %s", title)
    ninja = find_ninja()
    with tempfile.TemporaryDirectory(prefix="fi_backend-") as folder:
        root = Path(folder)
        (root / "variant.cc").write_text(source)
        full = [*command, "variant.cc", "-o", "variant.so"]
        escaped = shlex.join(full).replace("$", "$$")
        (root / "build.ninja").write_text(
            f"rule library\n  command = {escaped}\nbuild variant.so: library variant.cc\n"
        )
        done = subprocess.run(
            [ninja, "-C", folder, "--quiet"], capture_output=True, text=True, check=False
        )
        log = done.stdout + done.stderr
        if done.returncode != 0:
            hint = "the log says why; compilers before g++ 11 and clang 14 are too old"
            rule, got = "generated code that compiles", f"exit status {done.returncode}"
            raise CompileFailed(
                f"{contract_message(title, rule, got, hint)}\n"
                f"key: {key}\ncommand: {shlex.join(full)}\nlog:\n{log}"
            )
        return Built((root / "variant.so").read_bytes(), title, log)


@cache
def package_version() -> str:
    """Return the version of this package; a checkout that is not installed has none."""
    try:
        return metadata.version("fi-backend")
    except metadata.PackageNotFoundError:
        return "source"


@cache
def cpu_model() -> str:
    """Return what tells this CPU's instruction sets from others'."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
