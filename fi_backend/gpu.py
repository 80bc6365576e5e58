"""Which GPU a device names, and why it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fi_backend import nvidia
from fi_backend.errors import Unsupported, contract_message
from fi_backend.jit.nvrtc import compiler_identity

# cp.async and bf16 mma. The doctor reads this without a core: it is not the one of jit.kernels.
OLDEST_CAPABILITY = (8, 0)
USE_CPU = "the CPU engine still works: pass device='cpu'"


def resolve_device(device: torch.device | str) -> torch.device:
    """Return ``device`` with its index: "cuda" means the current GPU."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def gpu_reasons(index: int | None, capability: tuple[int, int] | None) -> Iterator[str]:
    """Yield every reason why a GPU cannot be used, as sentences about ``device``.

    Args:
        index: of the GPU; None: torch's current one.
        capability: compute capability where the caller knows it; None: the driver is asked, which
            makes this process unfit to fork others that use the GPU.
    """
    if torch.version.cuda is None:
        got = f"torch {torch.__version__}"
        yield contract_message("device", "a build of torch with CUDA", got, USE_CPU)
    if capability is None:
        yield from _driver_reasons(_current_index() if index is None else index)
    else:
        yield from _capability_reasons("the GPU", capability)
    yield from nvrtc_reasons()


def _current_index() -> int:
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device() if started else 0


def nvrtc_reasons() -> Iterator[str]:
    """Yield the reason why kernels cannot be compiled here, if there is one."""
    try:
        compiler_identity()
    except Unsupported as error:
        yield str(error)


def arch_name(capability: tuple[int, int]) -> str:
    """Return what NVRTC calls an architecture: from Hopper on, the one with its own features."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def _driver_reasons(index: int) -> Iterator[str]:
    driver = nvidia.find_driver()
    if driver.problem:
        yield contract_message("device", "an NVIDIA GPU", driver.problem, USE_CPU)
    elif index >= len(driver.gpus):
        rule = f"a GPU in [0, {len(driver.gpus)})"
        yield contract_message("device", rule, index, "CUDA_VISIBLE_DEVICES hides the others")
    else:
        gpu = driver.gpus[index]
        yield from _capability_reasons(gpu.name, gpu.compute_capability)


def _capability_reasons(name: str, capability: tuple[int, int]) -> Iterator[str]:
    if capability < OLDEST_CAPABILITY:
        rule = "a GPU of compute capability {}.{} or newer".format(*OLDEST_CAPABILITY)
        got = f"{name}, {capability[0]}.{capability[1]}"
        yield contract_message("device", rule, got, USE_CPU)
