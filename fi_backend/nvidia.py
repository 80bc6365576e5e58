"""What NVIDIA software and hardware this machine has, asked at run time.

Nothing here needs a driver, a GPU or a toolkit to be present: what is missing is an answer too.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# CUDA driver API, CUdevice_attribute. Source: cuda.h.
_MULTIPROCESSOR_COUNT = 16
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
DRIVER_LIBRARY = "libcuda.so.1"
# Where the wheels put NVRTC, below the folder of the `nvidia` namespace package. Newest first.
NVRTC_IN_WHEELS = (
    ("nvidia-cuda-nvrtc (CUDA 13)", "cu13/lib", "libnvrtc.so.13"),
    ("nvidia-cuda-nvrtc-cu12 (CUDA 12)", "cuda_nvrtc/lib", "libnvrtc.so.12"),
)


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver describes it."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """The CUDA driver.

    Attributes:
        cuda_version: newest CUDA that it runs, such as "13.0"; None without a driver.
        gpus: what it drives.
        problem: why there is no driver or no GPU; empty when there is one.
    """

    cuda_version: str | None
    gpus: tuple[Gpu, ...]
    problem: str


@dataclass(frozen=True)
class Nvrtc:
    """The run-time compiler of CUDA.

    Attributes:
        path: the library; None when it was found nowhere.
        source: which package brought it.
        version: such as "13.0"; None when the library does not load.
        searched: every place that was looked at, in order, up to the one that had it.
    """

    path: Path | None
    source: str
    version: str | None
    searched: tuple[str, ...]


def find_driver(library: str = DRIVER_LIBRARY) -> Driver:
    """Open the CUDA driver and list its GPUs; creates no context and holds no GPU memory."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver(None, (), f"{library} is not installed: no NVIDIA driver")
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)):
        return Driver(None, (), f"{library} does not tell its version")
    name = _version_name(version.value)
    code = cuda.cuInit(0)
    if code:
        return Driver(name, (), f"cuInit failed with error {code}: no usable GPU")
    count = ctypes.c_int()
    code = cuda.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return Driver(name, (), f"cuDeviceGetCount failed with error {code}")
    gpus = tuple(_describe_gpu(cuda, i) for i in range(count.value))
    return Driver(name, gpus, "" if gpus else "the driver sees no GPU")


def _version_name(version: int) -> str:
    # 13000 is 13.0 and 12080 is 12.8.
    return f"{version // 1000}.{version % 1000 // 10}"


def _describe_gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, value = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return Gpu(
        index,
        name.value.decode(),
        (attribute(_COMPUTE_CAPABILITY_MAJOR), attribute(_COMPUTE_CAPABILITY_MINOR)),
        attribute(_MULTIPROCESSOR_COUNT),
        memory.value,
    )


def find_nvrtc(
    wheel_folders: Sequence[Path] | None = None, torch_folder: Path | None = None
) -> Nvrtc:
    """Find NVRTC: first in its own wheels, then among torch's libraries.

    Args:
        wheel_folders: folders of the ``nvidia`` namespace package; None: those of this interpreter.
        torch_folder: torch's library folder; None: that of this interpreter.
    """
    searched = []
    for source, path in _nvrtc_places(wheel_folders, torch_folder):
        searched.append(f"{source}: {path}")
        if path.is_file():
            return Nvrtc(path, source, _nvrtc_version(path), tuple(searched))
    return Nvrtc(None, "", None, tuple(searched))


def _nvrtc_places(
    wheel_folders: Sequence[Path] | None, torch_folder: Path | None
) -> Iterator[tuple[str, Path]]:
    if wheel_folders is None:
        spec = find_spec("nvidia")
        found = spec.submodule_search_locations if spec is not None else None
        wheel_folders = [Path(folder) for folder in found or (_default_wheel_folder(),)]
    for source, folder, library in NVRTC_IN_WHEELS:
        yield from ((source, base / folder / library) for base in wheel_folders)
    if torch_folder is None:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return
        torch_folder = Path(spec.origin).parent / "lib"
    # Bundled copies carry a hash in their name; the builtins are a part, not the compiler.
    bundled = [p for p in torch_folder.glob("libnvrtc[-.]*so*") if "builtins" not in p.name]
    yield from (("torch", p) for p in sorted(bundled) or [torch_folder / "libnvrtc.so.*"])


def _default_wheel_folder() -> str:
    return os.path.join(sysconfig.get_path("purelib"), "nvidia")


def _nvrtc_version(path: Path) -> str | None:
    major, minor = ctypes.c_int(), ctypes.c_int()
    try:
        ctypes.CDLL(str(path)).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    except (OSError, AttributeError):
        return None
    return f"{major.value}.{minor.value}"
