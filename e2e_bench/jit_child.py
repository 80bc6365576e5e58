"""One process of the JIT benchmark: times what a fresh process would spend, prints JSON.

``python -m e2e_bench.jit_child {compile,disk,first_call} [--turn N] [--arch ARCH]``; the cache is
the folder that FI_CACHE_DIR names.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import fi_backend as fi
from e2e_bench.gpu_data import Data, tiny_data
from e2e_bench.impls import Ours
from e2e_bench.workloads import D64, D256, LLAMA
from fi_backend.jit import kernels
from fi_backend.jit.attention_kernels import attention_kernel, attention_spec
from fi_backend.jit.cache import default_cache
from fi_backend.jit.parts import Parts
from fi_backend.variants import Variant, shipped

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DECODE, VERIFY, GENERAL = 1, 8, 8192  # query tokens of a request at most
COMPILE_TURNS = 3
MEMORY_CALLS = 1000


@dataclass(frozen=True)
class Case:
    """A specialisation of the attention kernel."""

    name: str
    heads: fi.HeadShape
    max_q_len: int
    kv_dtype: torch.dtype = BF16
    variant: Variant | None = None

    def kernel(self) -> kernels.DeviceKernel:
        """Return what the JIT compiles."""
        spec = attention_spec(
            self.heads,
            BF16,
            self.kv_dtype,
            self.variant,
            max_q_len=self.max_q_len,
            max_requests=256,
            has_nodes=self.max_q_len != DECODE,
        )
        return attention_kernel(spec)


CASES = (
    Case("decode d64", D64, DECODE),
    Case("decode d128", LLAMA, DECODE),
    Case("decode d128, fp8 KV", LLAMA, DECODE, FP8),
    Case("decode d128, soft cap", LLAMA, DECODE, variant=shipped.soft_cap(30.0)),
    Case("decode d256", D256, DECODE),
    Case("verification d128", LLAMA, VERIFY),
    Case("all classes d64", D64, GENERAL),
    Case("all classes d128", LLAMA, GENERAL),
    Case("all classes d128, fp8 KV", LLAMA, GENERAL, FP8),
    Case("all classes d128, ALiBi", LLAMA, GENERAL, variant=shipped.alibi()),
    Case("all classes d256", D256, GENERAL),
)


def compile_all(arch: str) -> dict[str, list[float]]:
    """Return µs of compiling each case, one at a time, several times; leave all in the cache.

    "first" is the first of all, which finds and opens the compiler too. Beside each case the time
    that cores worked, one for a kernel of one class: on a host with other work the difference is
    what the others took.
    """
    times: dict[str, list[float]] = {"first": [_timed(_compile, _never_seen(CASES[0]), arch)]}
    for _ in range(COMPILE_TURNS):
        for case in CASES:
            kernel, began = _never_seen(case), time.process_time()
            times.setdefault(case.name, []).append(_timed(_compile, kernel, arch))
            worked = (time.process_time() - began) * 1e6
            times.setdefault(f"{case.name}, CPU time", []).append(worked)
    default_cache().clear()
    kernels.prebuild([case.kernel() for case in CASES], arch)
    return times


def _never_seen(case: Case) -> kernels.DeviceKernel:
    """Return a kernel that nobody compiled before: another cache than ours may know the case.

    NVRTC keeps what it compiled in the driver's cache, where there is a driver (NVRTC
    documentation, CUDA 12.9, "Caching").
    """
    kernel = case.kernel()
    nonce = f'\nextern "C" {{ __device__ int fi_nonce_{secrets.token_hex(8)}; }}\n'
    parts = kernel.parts
    if parts is not None:
        works = tuple((name, source + nonce) for name, source in parts.works)
        parts = Parts(parts.frame + nonce, works)
    return replace(kernel, source=kernel.source + nonce, parts=parts)


def _compile(kernel: kernels.DeviceKernel, arch: str) -> None:
    kernels.cubin_path(kernel, arch).read_bytes()


def load_all(arch: str, turn: int) -> dict[str, list[float]]:
    """Return µs of taking each case from the disk cache, loaded on the GPU if there is one.

    "first" is the first of the process, which reads headers and asks the compiler for its version;
    ``turn`` chooses which case that is. "memory" is a kernel that is loaded already.
    """
    device, num_entries = _warm_device(), len(default_cache().entries())
    times: dict[str, list[float]] = {}
    for case in (*CASES[turn:], *CASES[:turn]):
        kernel = case.kernel()
        name = case.name if times else "first"
        if device is None:
            times[name] = [_timed(_compile, kernel, arch)]
        else:
            times[name] = [_timed(kernels.load, kernel, device)]
    if len(default_cache().entries()) != num_entries:
        raise RuntimeError("some kernels were not in the cache: did the headers change?")
    if device is not None:
        found = CASES[0].kernel()
        times["memory"] = [_timed(kernels.load, found, device) for _ in range(MEMORY_CALLS)]
    return times


def first_call() -> dict[str, list[float]]:
    """Return µs from building a planner to the end of its first attention, then of another one."""
    device = _warm_device()
    assert device is not None
    data = tiny_data(device)
    data.new_out()  # torch's own kernels
    return {
        "first call": [_timed(_plan_and_run, data)],
        "next planner": [_timed(_plan_and_run, data)],
    }


def _plan_and_run(data: Data) -> None:
    Ours().prepare(data).call(0)
    torch.cuda.synchronize()


def _timed(call: Callable[..., object], *arguments: object) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - begin) * 1e6


def _warm_device() -> torch.device | None:
    """Return the GPU, its context made and torch's own kernels loaded; None: there is none."""
    if not torch.cuda.is_available():
        return None
    torch.zeros(8, device="cuda").add_(1)
    torch.cuda.synchronize()
    return torch.device("cuda", torch.cuda.current_device())


def main() -> None:
    """Time one thing and print it as the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("compile", "disk", "first_call"))
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--turn", type=int, default=0)
    args = parser.parse_args()
    if args.what == "compile":
        times = compile_all(args.arch)
    elif args.what == "disk":
        times = load_all(args.arch, args.turn)
    else:
        times = first_call()
    print(json.dumps(times))


if __name__ == "__main__":
    main()
