"""Processes whose libcuda.so.1 is fake_cuda.cc: launches are tested without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from fi_backend import _core
from fi_backend.jit.headers import INCLUDE_ROOT
from fi_backend.jit.host_compiler import find_compiler

CORE_ROOT = Path(__file__).parents[1] / "kernels"

# Every process of a test starts with this. The bare package keeps torch out: 50 ms, not 3 s.
PREAMBLE = """
import ctypes, sys, types
package = types.ModuleType("fi_backend")
package.__path__ = [{folder!r}]
sys.modules["fi_backend"] = package
from fi_backend import _core
from fi_backend.errors import DeviceError
"""
FAKE = """
fake = ctypes.CDLL("libcuda.so.1")
fake.fake_fail.restype = None
fake.fake_calls.restype = ctypes.c_char_p
fake.fake_params.restype = ctypes.c_void_p
fake.fake_current.restype = ctypes.c_long
IMAGE = b"\\x7fELF" + bytes(60)

def calls():
    text = fake.fake_calls().decode()
    fake.fake_forget()
    return text.splitlines()

def load(shared=0, device=0):
    kernel = _core.Kernel(IMAGE, "fi_attention", device, shared)
    fake.fake_forget()
    return kernel

def error(function, *arguments):
    try:
        function(*arguments)
    except DeviceError as raised:
        assert isinstance(raised, RuntimeError)
        return str(raised)
"""


def compile_cxx(source: Path, output: Path, *flags: str) -> Path:
    roots = [f"-I{INCLUDE_ROOT}", f"-I{CORE_ROOT}"]
    command = [*find_compiler().command, "-std=c++20", *flags, *roots]
    subprocess.run([*command, str(source), "-o", str(output)], check=True)
    return output


def build_fake(folder: Path) -> Path:
    """Build the library into `folder`, which `run` takes."""
    source = Path(__file__).with_suffix(".cc")
    compile_cxx(source, folder / "libcuda.so.1", "-shared", "-fPIC", "-Wall")
    return folder


def run(folder: Path, script: str, preamble: str = PREAMBLE + FAKE) -> str:
    """Run a script in a process of its own, where the driver is the one in `folder`."""
    start = preamble.replace("{folder!r}", repr(str(Path(_core.__file__).parent)))
    result = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.rstrip("\n")
