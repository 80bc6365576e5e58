"""Compiling device code with NVRTC: no CUDA toolkit, no host compiler, no GPU needed.

The generated source only names an instantiation of the templates under ``fi_backend/include``.
Source: NVRTC documentation, CUDA 13.0.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fi_backend.errors import CompileFailed, Unsupported, contract_message
from fi_backend.nvidia import Nvrtc, find_nvrtc

INCLUDE_ROOT = Path(__file__).parent.parent / "include"
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
    def advice(self) -> list[str]:
        """Codes of assembler messages such as C7510 (wgmma serialised)."""
        return sorted(set(_ASSEMBLER_ADVICE.findall(self.log)))


def compile_cubin(source: str, arch: str, options: Sequence[str] = ()) -> Cubin:
    """Compile device code to machine code.

    Args:
        source: one translation unit; includes come from the package and the CUDA headers.
        arch: such as "sm_90a"; wgmma needs exactly that.
        options: further NVRTC options.

    Returns:
        The cubin and the compiler's report.

    Raises:
        Unsupported: no NVRTC, or no CUDA headers, on this machine.
        CompileFailed: the source does not compile; the message carries the log.
    """
    library, headers = _load()
    flags = [
        f"--gpu-architecture={arch}",
        "--std=c++20",
        f"-I{INCLUDE_ROOT}",
        *(f"-I{folder}" for folder in headers),
        "--ptxas-options=-v",
        *options,
    ]
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"fi.cu",
                                               0, None, None))  # fmt: skip
    try:
        encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = library.nvrtcCompileProgram(program, len(flags), encoded)
        log = _read(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise CompileFailed(
                contract_message("source", "device code that compiles", f"\n{log}", source)
            )
        return Cubin(_read(library, program, "CUBIN"), log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(library: ctypes.CDLL, code: int) -> None:
    if code:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        reason = library.nvrtcGetErrorString(code).decode()
        raise CompileFailed(contract_message("nvrtc", "success", reason, "run fi-backend doctor"))


@cache
def _load() -> tuple[ctypes.CDLL, tuple[Path, ...]]:
    found = find_nvrtc()
    if found.path is None:
        places = "; ".join(found.searched)
        hint = "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"
        raise Unsupported(contract_message("nvrtc", f"a library at {places}", "none", hint))
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
        raise Unsupported(
            contract_message("cuda headers", rule, "none", "pip install nvidia-cuda-runtime")
        )
    return headers
