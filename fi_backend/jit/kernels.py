"""Device kernels: from generated text to a cubin in the cache and a kernel loaded on a device."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from fi_backend import _core
from fi_backend.errors import CompileFailed, InvalidInput, Unsupported, contract_message, require
from fi_backend.jit.cache import Built, default_cache
from fi_backend.jit.nvrtc import compile_cubin, cubin_key
from fi_backend.jit.parts import Parts, compile_in_parts, parts_key
from fi_backend.jit.progress import Progress

OLDEST_ARCH = (8, 0)  # cp.async and bf16 mma
# From here on an architecture has instructions of its own (wgmma, tcgen05), behind the suffix.
_FIRST_WITH_SUFFIX = 9
# Shared memory of a multiprocessor. Source: CUDA C++ Programming Guide, compute capabilities.
HOPPER_SHARED_BYTES = 228 << 10
_SHARED_KIB = {
    **dict.fromkeys((80, 87), 164),
    **dict.fromkeys((86, 88, 89, 120, 121), 100),
    **dict.fromkeys((90, 100, 103, 110), 228),
}
_MAJORS_WITH_BOXES = (9, 10)  # sm_120 has them too, but kernels then need a stack there

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceKernel:
    """One specialisation of a kernel, before it is compiled for an architecture.

    Attributes:
        title: one line for listings and messages; no part of the identity.
        entry: name of the extern "C" __global__ function.
        source: translation unit that instantiates it.
        shared_bytes: dynamic shared memory of one CTA.
        parts: the same kernel for a compilation in threads; None: it has one part. No part of the
            identity: ``source`` decides them.
    """

    title: str = field(compare=False)
    entry: str
    source: str
    shared_bytes: int
    parts: Parts | None = field(default=None, compare=False)


def bool_literal(flag: bool) -> str:
    """Return how C++ writes it."""
    return "true" if flag else "false"


def cubin_path(kernel: DeviceKernel, arch: str) -> Path:
    """Return the cubin's path, from the cache if any process compiled it before.

    FI_LINEINFO=1 adds source lines for profilers, in entries of their own.

    Args:
        kernel: what to compile.
        arch: such as "sm_90a".

    Raises:
        Unsupported: no NVRTC, or no CUDA headers, on this machine.
        CompileFailed: the compiler refused, or there is no folder to write to.
    """
    try:
        options = _options()
        key = _key(kernel, arch, options)
        return default_cache().get_or_build(key, lambda: _build(kernel, arch, options))
    except OSError as error:
        hint = "free space in the temporary folder, or set FI_CACHE_DIR and TMPDIR"
        message = contract_message(kernel.title, "a folder to compile in", error, hint)
        raise CompileFailed(message) from error


def load(kernel: DeviceKernel, device: torch.device) -> _core.Kernel:
    """Return the kernel on a device, compiled and loaded on first use in this process.

    Safe to call from several threads. A kernel once loaded stays, and is found in about 1 µs.

    Args:
        kernel: what to load.
        device: a CUDA device; without an index: the current one.

    Raises:
        Unsupported: the kernel is not loaded yet and the current stream is capturing a graph; the
            device is too old; no NVRTC on this machine.
        CompileFailed: as ``cubin_path``.
        DeviceError: the driver refused the cubin.
    """
    index = _index_of(device)
    found = _loaded.get((kernel, index))
    if found is not None:
        return found
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        rule = "kernels that were loaded before a graph capture"
        hint = "run the same step once before capturing it, or call jit.kernels.load at start"
        got = "a capture that needs it first"
        raise Unsupported(contract_message(kernel.title, rule, got, hint))
    image = _read_image(kernel, arch_of(torch.device("cuda", index)))
    with _lock:  # threads that missed together load it once
        found = _loaded.get((kernel, index))
        if found is None:
            found = _core.Kernel(image, kernel.entry, index, kernel.shared_bytes)
            _loaded[kernel, index] = found
        return found


def distinct(kernels: Iterable[DeviceKernel]) -> list[DeviceKernel]:
    """Return the first kernel of every source: cubins know no amount of dynamic shared memory."""
    first: dict[str, DeviceKernel] = {}
    for kernel in kernels:
        first.setdefault(kernel.source, kernel)
    return list(first.values())


def prebuild(kernels: Iterable[DeviceKernel], arch: str, progress: bool | None = None) -> None:
    """Compile kernels into the cache, in threads over all cores; needs no GPU.

    Args:
        kernels: what to compile; repeated ones count once.
        arch: such as "sm_90a".
        progress: whether to report on stderr; None: when that is a terminal.

    Raises:
        Unsupported, CompileFailed: as ``cubin_path``, for the first kernel that fails; what was
            compiled until then is kept.
    """
    start = time.perf_counter()
    wanted = distinct(kernels)
    missing = [kernel for kernel in wanted if not _is_cached(kernel, arch)]
    bar = Progress(len(missing), progress)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        running: dict[Future[Path], DeviceKernel] = {
            pool.submit(cubin_path, kernel, arch): kernel for kernel in missing
        }
        for done in as_completed(running):
            done.result()
            bar.step(running[done].title)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    if missing or progress:
        seconds = time.perf_counter() - start
        cached = len(wanted) - len(missing)
        summary = f"compiled {len(missing)} kernels for {arch} in {seconds:.1f} s, {cached} cached"
        logger.info(summary)
        bar.say(summary)


def arch_of(device: torch.device) -> str:
    """Return the architecture to compile for, such as "sm_90a" on Hopper.

    Raises:
        Unsupported: a GPU older than sm_80.
        DeviceError: no driver, or no such device.
    """
    return _arch_of_index(_index_of(device))


def arch_copies_boxes(arch: str) -> bool:
    """Return whether GPUs of an architecture such as "sm_90a" copy boxes of tensor maps."""
    match = re.fullmatch(r"sm_(\d+)[af]?", arch)
    return match is not None and int(match[1]) // 10 in _MAJORS_WITH_BOXES


def shared_bytes_of_arch(arch: str) -> int:
    """Return the shared memory of a multiprocessor of an architecture such as "sm_90a".

    Raises:
        InvalidInput: an architecture that is not known.
    """
    match = re.fullmatch(r"sm_(\d+)[af]?", arch)
    kib = _SHARED_KIB.get(int(match[1])) if match else None
    if kib is None:
        names = ", ".join(f"sm_{number}" for number in sorted(_SHARED_KIB))
        rule = f"one of {names}, with the suffix a from sm_90 on"
        hint = "name the GPU that the kernels are for"
        raise InvalidInput(contract_message("arch", rule, repr(arch), hint))
    return kib << 10


@lru_cache(maxsize=64)
def _arch_of_index(index: int) -> str:
    info = _core.device_info(index)
    version = (info.major, info.minor)
    rule = "a GPU of compute capability {}.{} or newer".format(*OLDEST_ARCH)
    got = f"{info.name}, {info.major}.{info.minor}"
    hint = "use the CPU engine, or the attention that torch and the engine bring"
    require(version >= OLDEST_ARCH, "device", rule, got, hint, kind=Unsupported)
    suffix = "a" if info.major >= _FIRST_WITH_SUFFIX else ""
    return f"sm_{info.major}{info.minor}{suffix}"


_loaded: dict[tuple[DeviceKernel, int], _core.Kernel] = {}
_lock = threading.Lock()


def _index_of(device: torch.device) -> int:
    is_cuda = device.type == "cuda"
    require(is_cuda, "device", "a CUDA device", device, "device kernels run on NVIDIA GPUs only")
    return torch.cuda.current_device() if device.index is None else device.index


def _options() -> tuple[str, ...]:
    return ("-lineinfo",) if os.environ.get("FI_LINEINFO") == "1" else ()


def _key(kernel: DeviceKernel, arch: str, options: tuple[str, ...]) -> str:
    return cubin_key(kernel.source, arch, options, parts_key(kernel.parts))


def _build(kernel: DeviceKernel, arch: str, options: tuple[str, ...]) -> Built:
    start = time.perf_counter()
    if kernel.parts is None:
        cubin = compile_cubin(kernel.source, arch, options, kernel.title)
    else:
        cubin = compile_in_parts(kernel.source, kernel.parts, arch, options, kernel.title)
    seconds = time.perf_counter() - start
    logger.info("compiled %s for %s in %.2f s", kernel.title, arch, seconds)
    return Built(cubin.image, f"{kernel.title} {arch}", cubin.log)


def _is_cached(kernel: DeviceKernel, arch: str) -> bool:
    try:
        return default_cache().get(_key(kernel, arch, _options())) is not None
    except OSError:  # the build will say what is wrong with the folder
        return False


def _read_image(kernel: DeviceKernel, arch: str) -> bytes:
    try:
        return cubin_path(kernel, arch).read_bytes()
    except FileNotFoundError:
        return cubin_path(kernel, arch).read_bytes()  # evicted by another process since
