"""What compute-sanitizer watches, see sanitize.py: ``python tests/sanitizer_work.py cases``."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch
from cases import Case, make_problem
from forest import Tree, groups_of, make_shared
from forest_problems import sharing_capacity
from forest_steps import random_step, serving_step
from named_cases import BF16, DECODES, DRAFTS, FP8, FP16, capacity_of, heads
from placing import misplace
from running import Place, check_problem
from sanitizer_report import DONE
from specialisations import planned_kernels

import fi_backend as fi
from fi_backend import _core
from fi_backend.host_batch import to_device
from fi_backend.jit.kernels import DeviceKernel, arch_of, load, prebuild
from fi_backend.prefix_forest import PrefixForest, forest_kernel

DEVICE = os.environ.get("FI_TEST_DEVICE", "cuda:0")
MIXED = ((1, 77), (33, 33), (20, 90), (0, 0), (1, 150))
# (number of CTAs, kind of step, case); few CTAs cut the KV of one request into many splits.
CASES = [
    (7, "decode", Case("decode", DECODES, heads(4, 128), BF16)),
    (5, "any", Case("mixed", MIXED, heads(4, 128), BF16)),
    (9, "any", Case("page-1", MIXED, heads(2), FP16, page_size=1, layout="slots", table="csr")),
    (6, "any", Case("mapped", MIXED, heads(1), BF16, page_size=3, table="mapped", strided=True)),
    (6, "decode", Case("fp8", DECODES, heads(4, 128), BF16, FP8, scales="per_head")),
    (6, "any", Case("gemma-fp8", MIXED, heads(2), BF16, FP8, variant="gemma")),
    (5, "drafts", Case("tree", DRAFTS, heads(4), BF16, variant="tree")),
    (4, "any", Case("sigmoid", MIXED, heads(2), BF16, variant="sigmoid")),
    (3, "any", Case("d256", MIXED[:2], heads(8, 256), BF16)),
    (None, "any", Case("whole-grid", MIXED, heads(4, 192, 128), BF16)),
]
# Prefixes that the planner finds: one of all requests, two that continue it.
SHARERS = ((1, 400), (4, 500), (2, 390), (1, 450))
FOUND = [
    Case("found", SHARERS, heads(4, 128), BF16),
    Case("found-fp8", SHARERS, heads(2), BF16, FP8, page_size=1, scales="one"),
]
LARGE = fi.Capacity(4096, 8192, 131_072, 4096, 8 * 4096, 8 * 4096)
PLANTED = {
    "memcheck": "p.lse[1 << 24] = 1.0f;",
    "racecheck": """__shared__ float x[128];
  x[threadIdx.x] = p.scale;
  p.lse[threadIdx.x] = x[(threadIdx.x + 64) % 128];""",
    "synccheck": """if (threadIdx.x % 32 < 16) __syncthreads();
  p.lse[threadIdx.x] = 1.0f;""",
    "initcheck": "p.lse[threadIdx.x] = p.partial_lse[threadIdx.x];",
}


def run_cases() -> None:
    """Every kernel we ship, small: attention with splits and merges, planner, append, merge."""
    kernels = [kernel for _, step, case in CASES for kernel in planned_kernels(case, step)]
    for case in FOUND:
        kernels += planned_kernels(case, "drafts", shares=True)
    kernels += [forest_kernel(LARGE), forest_kernel(sharing_capacity("drafts"))]
    prebuild(kernels, arch_of(torch.device(DEVICE)))
    for num_ctas, step, case in CASES:
        check_problem(case, make_problem(case), num_ctas, Place(DEVICE, capacity_of(step)))
    case = Case("unaligned", MIXED, heads(2), BF16)
    odd = misplace(make_problem(case), 3, 5, 1, widen=1)
    check_problem(case, odd, 5, Place(DEVICE, capacity_of("any")))
    case = Case("nodes", ((1, 100), (7, 133), (1, 90)), heads(2), BF16)
    trees = (Tree((0, 1, 2), 64, (Tree((0, 1), 96),)),)
    shared = make_shared(case, trees)
    batch = fi.shared_prefix(shared.batch, groups_of(trees))
    shared = replace(shared, batch=batch)
    check_problem(case, shared, 5, Place(DEVICE, fi.Capacity(64, 1024, 2048, 16, 64, 1024)))
    run_forests()
    run_ops()


def run_forests() -> None:
    """Find prefixes, scratch in shared and in global memory; plan and attend with what is found."""
    small = [random_step(seed, 20, 2000) for seed in range(3)]
    large = replace(serving_step(1, 40, 16), capacity=LARGE)
    for step in (*small, large):
        forest = PrefixForest(step.capacity, torch.device(DEVICE))
        batch = to_device(step.batch, torch.device(DEVICE))
        for _ in range(2):
            forest.find(batch, current_stream())
        found, wanted = (step.arrays(f) for f in (forest.data.cpu().numpy(), step.find_on_host()))
        for name, array in wanted.items():
            assert array.tobytes() == found[name].tobytes(), f"{step.name}: {name}"
    trees = (Tree((0, 1, 2, 3), 128, (Tree((0, 2), 384), Tree((1, 3), 384))),)
    for case in FOUND:
        place = Place(DEVICE, sharing_capacity("drafts"))
        check_problem(case, make_shared(case, trees), 5, place)


def current_stream() -> int:
    """Return the handle of torch's current stream."""
    return torch.cuda.current_stream(DEVICE).cuda_stream if DEVICE != "cpu" else 0


def run_ops() -> None:
    """Append into caches of both kinds, with a skipped token, and merge states."""
    k, v = torch.randn(2, 5, 2, 64, device=DEVICE).to(BF16)
    slots = torch.tensor([17, -1, 0, 63], device=DEVICE)
    scale = torch.ones(2, device=DEVICE)
    for dtype, scales in ((BF16, {}), (FP8, {"k_scale": scale, "v_scale": scale})):
        cache = torch.zeros(2, 4, 16, 2, 64, device=DEVICE).to(dtype)
        fi.append_kv(k, v, fi.KvCacheView.nhd(*cache), slots, **scales)
        assert torch.equal(cache[0, 1, 1].to(BF16), k[0].to(dtype).to(BF16))
    o, lse = torch.randn(3, 9, 4, 64, device=DEVICE), torch.randn(3, 9, 4, device=DEVICE)
    merged, _ = fi.merge_states(o, lse)
    expected = (o * lse.softmax(0)[..., None]).sum(0)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def run_planted(tool: str) -> None:
    """A kernel with the kind of bug that the tool is for."""
    source = f"""#include "fi/attention/kernel_params.h"
extern "C" __global__ void fi_planted(const __grid_constant__ fi::KernelParams p) {{
  {PLANTED[tool]}
}}
"""
    kernel = load(DeviceKernel("planted", "fi_planted", source, 0), torch.device(DEVICE))
    written, unwritten = torch.zeros(128, device=DEVICE), torch.empty(128, device=DEVICE)
    params = _core.KernelParams()
    params.lse, params.partial_lse = written.data_ptr(), unwritten.data_ptr()
    _core.launch_attention(kernel, params, 1, 128, 0)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1] == "cases":
        run_cases()
    else:
        run_planted(sys.argv[1])
    print(DONE)
