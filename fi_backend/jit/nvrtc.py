"""Compiling device code with NVRTC: no CUDA toolkit, no host compiler, no GPU needed.

The generated source only names an instantiation of the templates under ``fi_backend/include``.
Source: NVRTC documentation, CUDA 13.0.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fi_backend.errors import CompileFailed, Unsupported, contract_message, require
from fi_backend.jit.headers import headers_hash, reachable_headers
from fi_backend.nvidia import Nvrtc, find_nvrtc

# No fast math: variant functions agree with their oracle to rounding, and what may be approximate
# (exp2 of the softmax) says so in its own name. The assembler's report is kept with the cubin.
FLAGS = ("--std=c++20", "--ptxas-options=-v")
CPU_ENGINE_WORKS = "the CPU engine works without it"
# What the device headers take from CUDA's.
_CUDA_HEADERS = ("cuda_fp16", "cuda_bf16", "cuda_fp8")
# Messages of the assembler that mean a slower kernel although compilation succeeds.
_ASSEMBLER_ADVICE = re.compile(r"\((C75\d\d)\)")


@dataclass(frozen=True)
class Cubin:
    """Machine code of one architecture and what the compiler said about it.

    Attributes:
        image: bytes of the cubin.
        log: output of the compiler and the assembler.
    """

    image: bytes
    log: str

    @property
    def registers(self) -> int:
        """Registers per thread, the most over the kernels."""
        return max((int(n) for n in re.findall(r"Used (\d+) registers", self.log)), default=0)

    @property
    def spill_bytes(self) -> int:
        """Bytes of registers that a thread keeps in local memory, stores and loads."""
        return sum(int(n) for n in re.findall(r"(\d+) bytes spill", self.log))

    @property
    def stack_bytes(self) -> int:
        """Bytes of stack frame per thread."""
        return sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", self.log))

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a CTA takes beside what its launch asks for."""
        return max((int(n) for n in re.findall(r"(\d+) bytes smem", self.log)), default=0)

    @property
    def advice(self) -> list[str]:
        """Codes of assembler messages such as C7510 (wgmma serialised)."""
        return sorted(set(_ASSEMBLER_ADVICE.findall(self.log)))


@dataclass(frozen=True)
class Ptx:
    """PTX and what the compiler said about it."""

    text: str
    log: str


def cubin_key(source: str, arch: str, options: Sequence[str] = (), more: Sequence[str] = ()) -> str:
    """Return the hash of everything that machine code depends on; file-name-safe.

    Args:
        source: as in ``compile_cubin``.
        arch: as in ``compile_cubin``.
        options: as in ``compile_cubin``.
        more: what else it depends on; the headers are those of ``source``.

    Raises:
        Unsupported: no NVRTC, or no CUDA headers, on this machine.
    """
    parts = [source, arch, *FLAGS, *options, compiler_identity(), headers_hash(source), *more]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def compiler_identity() -> str:
    """Return what tells this NVRTC and its CUDA headers from others, wherever they are installed.

    The library knows its version as major.minor only; file sizes tell patch releases apart.

    Raises:
        Unsupported: no NVRTC, or no CUDA headers, on this machine.
    """
    found = _found()
    files = [found.path]
    for folder in _cuda_headers(found):
        files += [folder / f"{name}{end}" for name in _CUDA_HEADERS for end in (".h", ".hpp")]
    sizes = [file.stat().st_size for file in files if file is not None and file.is_file()]
    return f"nvrtc {found.version} {sizes}"


def compile_cubin(
    source: str,
    arch: str,
    options: Sequence[str] = (),
    title: str = "source",
    more: Sequence[str] = (),
) -> Cubin:
    """Compile device code to machine code; safe to call from many threads at once.

    Args:
        source: one translation unit; includes come from the package and the CUDA headers.
        arch: such as "sm_90a"; wgmma needs exactly that.
        options: further NVRTC options.
        title: what it is, for messages.
        more: as in ``cubin_key``, for messages.

    Returns:
        The cubin and the compiler's report.

    Raises:
        Unsupported: no NVRTC, or no CUDA headers, on this machine.
        CompileFailed: the source does not compile; the message has the key, the command, the log
            and the source.
    """
    try:
        return Cubin(*_compile(source, arch, options, "CUBIN"))
    except _Refused as refused:
        raise refused.failure(title, cubin_key(source, arch, options, more), source) from refused


def compile_ptx(source: str, arch: str, title: str = "source") -> Ptx:
    """Compile device code to PTX, which is the larger half of compiling it.

    Arguments and failures are those of ``compile_cubin``.
    """
    virtual = arch.replace("sm_", "compute_")
    try:
        text, log = _compile(source, virtual, (), "PTX")
    except _Refused as refused:
        raise refused.failure(title, cubin_key(source, virtual), source) from refused
    return Ptx(text.rstrip(b"\0").decode(), log)


class _Refused(Exception):
    """The compiler refused a source: why, called with what, its log."""

    def __init__(self, reason: str, flags: Sequence[str], log: str) -> None:
        super().__init__(reason)
        self._command, self._log = f"nvrtc {shlex.join(flags)} fi.cu", log

    def failure(self, title: str, key: str, source: str) -> CompileFailed:
        rule, hint = "device code that compiles", "the log says why"
        sentence = contract_message(title, rule, str(self), hint)
        return CompileFailed(
            f"{sentence}\nkey: {key}\ncommand: {self._command}\n"
            f"log:\n{self._log}\nsource:\n{source}"
        )


def _compile(source: str, arch: str, options: Sequence[str], what: str) -> tuple[bytes, str]:
    """Return ``what`` of a source, as NVRTC calls it, and the log."""
    library, include_folders = _load()
    flags = [f"--gpu-architecture={arch}", *FLAGS, *options]
    flags += [f"-I{folder}" for folder in include_folders]
    headers = reachable_headers(source)
    program = ctypes.c_void_p()
    _check(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program),
            source.encode(),
            b"fi.cu",
            len(headers),
            _strings(list(headers.values())),
            _strings(list(headers)),
        ),
    )
    try:
        code = library.nvrtcCompileProgram(program, len(flags), _strings(flags))
        log = _read(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            raise _Refused(_reason(library, code), flags, log)
        return _read(library, program, what), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(library: ctypes.CDLL, code: int) -> None:
    if code:
        reason = _reason(library, code)
        raise CompileFailed(contract_message("nvrtc", "success", reason, "run fi-backend doctor"))


def _reason(library: ctypes.CDLL, code: int) -> str:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    text: bytes = library.nvrtcGetErrorString(code)
    return text.decode()


@cache
def _found() -> Nvrtc:
    found = find_nvrtc()
    rule, places = "NVIDIA's run-time compiler", "; ".join(found.searched)
    hint = f"pip install nvidia-cuda-nvrtc nvidia-cuda-runtime; {CPU_ENGINE_WORKS}"
    usable = found.path is not None and found.version is not None
    got = f"{found.path}, which does not load" if found.path else f"none at {places}"
    require(usable, "nvrtc", rule, got, hint, kind=Unsupported)
    return found


@cache
def _load() -> tuple[ctypes.CDLL, tuple[Path, ...]]:
    found = _found()
    assert found.path is not None
    # Loaded by path it does not find its builtins: they must be there first.
    for builtins in sorted(found.path.parent.glob("libnvrtc-builtins*.so*")):
        if ".alt" not in builtins.name:
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(found.path)), _cuda_headers(found)


def _cuda_headers(found: Nvrtc) -> tuple[Path, ...]:
    """Return the folders of cuda_bf16.h and its friends, by where the wheels put them."""
    assert found.path is not None
    beside = found.path.parent.parent  # nvidia/cu13, or nvidia/cuda_nvrtc of CUDA 12
    places = (beside / "include", beside.parent / "cuda_runtime" / "include")
    headers = tuple(folder for folder in places if (folder / "cuda_bf16.h").is_file())
    if not headers:
        rule = f"cuda_bf16.h in {' or '.join(map(str, places))}"
        hint = f"pip install nvidia-cuda-runtime; {CPU_ENGINE_WORKS}"
        raise Unsupported(contract_message("cuda headers", rule, "none", hint))
    return headers
