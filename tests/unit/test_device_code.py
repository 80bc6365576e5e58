"""Device code compiles for every architecture we name, on a machine without a GPU.

The specialisations are those that planners pick: tiles come from the shipped tables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from fi_backend import errors
from fi_backend.formats import HeadShape
from fi_backend.jit.attention_kernels import (
    AttentionSpec,
    attention_kernel,
    attention_spec,
    takes_boxes,
)
from fi_backend.jit.kernels import (
    DeviceKernel,
    arch_copies_boxes,
    cubin_path,
    shared_bytes_of_arch,
)
from fi_backend.jit.nvrtc import Cubin, compile_cubin
from fi_backend.jit.parts import IN_PARTS
from fi_backend.variants import Scalar, Variant, shipped
from fi_backend.variants.printer import content_key

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
# Query tokens of a request: decoding, verification of speculated tokens, prefill chunks.
DECODE, VERIFY, GENERAL = 1, 8, 8192
# What the system keeps of a multiprocessor's shared memory for every CTA.
# Source: CUDA C++ Programming Guide, compute capabilities.
RESERVED_BYTES = 1024


def gated(out: Any, dim: Any, gate: Any) -> Any:
    return out * (gate + dim)


GATE = Variant("gate", output=gated, params=(Scalar("gate"),))
GEMMA = shipped.soft_cap(50.0).then(shipped.causal()).then(shipped.sliding_window(4096))
SINK_WINDOW = shipped.sinks().then(shipped.sliding_window(128, sink_prefix=4))


@dataclass(frozen=True)
class Case:
    """A specialisation by what its layer class and steps are."""

    name: str
    head_dim: int | tuple[int, int]
    group_size: int
    max_q_len: int
    dtype: torch.dtype = BF16
    kv_dtype: torch.dtype | None = None
    variant: Variant | None = None
    plain_pages: bool = True
    aligned: bool = True
    page_size: int = 16
    arch: str = "sm_90a"

    @property
    def spec(self) -> AttentionSpec:
        dims = self.head_dim if isinstance(self.head_dim, tuple) else (self.head_dim,)
        heads, cache_dtype = HeadShape(self.group_size, 1, *dims), self.kv_dtype or self.dtype
        can = arch_copies_boxes(self.arch) and self.plain_pages and self.aligned
        return attention_spec(
            heads,
            self.dtype,
            cache_dtype,
            self.variant,
            max_q_len=self.max_q_len,
            max_requests=256,
            has_nodes=self.max_q_len != DECODE,
            plain_pages=self.plain_pages,
            aligned=self.aligned,
            boxes=can and takes_boxes(heads, cache_dtype, self.variant, self.page_size),
            max_shared_bytes_per_sm=shared_bytes_of_arch(self.arch),
        )

    @property
    def kernel(self) -> DeviceKernel:
        return attention_kernel(self.spec)


OTHER_ARCHS = ("sm_80", "sm_89", "sm_100a", "sm_120a")
CASES = [
    Case("decode-d64", 64, 8, DECODE),
    Case("decode-d80", 80, 1, DECODE),
    Case("decode-d96", 96, 4, DECODE, FP16),
    Case("decode-d112", 112, 6, DECODE),
    Case("decode-d128", 128, 4, DECODE),
    Case("decode-d128-fp16", 128, 8, DECODE, FP16),
    Case("decode-d128-fp8", 128, 8, DECODE, kv_dtype=FP8),
    Case("decode-d192-128", (192, 128), 16, DECODE),
    Case("decode-d256", 256, 2, DECODE),
    Case("decode-d256-fp8", 256, 2, DECODE, FP16, FP8),
    Case("decode-g5-any-table", 128, 5, DECODE, plain_pages=False),
    Case("decode-g7", 128, 7, DECODE),
    Case("decode-g16", 128, 16, DECODE),
    Case("decode-g64", 128, 64, DECODE),
    Case("decode-unaligned", 128, 4, DECODE, aligned=False, plain_pages=False),
    Case("decode-soft-cap-fp8", 128, 4, DECODE, kv_dtype=FP8, variant=shipped.soft_cap(30.0)),
    Case("decode-sinks-window", 64, 8, DECODE, variant=SINK_WINDOW),
    Case("decode-d64-page-1", 64, 8, DECODE, page_size=1),
    Case("decode-d128-page-4", 128, 4, DECODE, page_size=4),
    Case("decode-d256-fp8-page-1", 256, 2, DECODE, FP16, FP8, page_size=1),
    Case("verify-d128", 128, 4, VERIFY),
    Case("verify-few", 128, 4, 4),
    Case("verify-tree", 128, 8, VERIFY, variant=shipped.tree_mask()),
    Case("general-d64", 64, 8, GENERAL),
    Case("general-d80", 80, 1, GENERAL),
    Case("general-d96", 96, 4, GENERAL),
    Case("general-d112", 112, 6, GENERAL, FP16),
    Case("general-d128", 128, 4, GENERAL),
    Case("general-d128-fp8", 128, 4, GENERAL, kv_dtype=FP8),
    Case("general-d192-128", (192, 128), 1, GENERAL),
    Case("general-d256", 256, 2, GENERAL),
    Case("general-g5-any-table", 128, 5, GENERAL, plain_pages=False),
    Case("general-d64-page-1", 64, 8, GENERAL, page_size=1),
    Case("general-d128-page-1", 128, 4, GENERAL, page_size=1),
    Case("general-d256-page-1", 256, 2, GENERAL, page_size=1),
    Case("general-unaligned", 128, 4, GENERAL, aligned=False),
    Case("general-gemma", 256, 2, GENERAL, variant=GEMMA),
    Case("general-alibi", 128, 1, GENERAL, FP16, variant=shipped.alibi()),
    Case("general-sigmoid", 128, 4, GENERAL, variant=shipped.sigmoid_attention()),
    Case("general-custom-mask", 128, 4, GENERAL, variant=shipped.custom_mask()),
    Case("general-own-output", 64, 4, GENERAL, variant=GATE),
    Case("decode-rope", 128, 4, DECODE, variant=shipped.rope()),
    Case("decode-streaming", 128, 4, DECODE, variant=shipped.streaming_rope(1000)),
    Case("general-streaming", 128, 4, GENERAL, variant=shipped.streaming_rope(1000)),
    Case("decode-streaming-steps", 128, 1, DECODE,
         variant=shipped.streaming_rope(1000, multiples=True)),
    Case("general-streaming-steps", 128, 4, GENERAL,
         variant=shipped.streaming_rope(1000, multiples=True)),
    Case("general-d256-rope-steps", 256, 4, GENERAL, variant=shipped.rope(multiples=True)),
    Case("general-rope-pairs", 64, 8, GENERAL, FP16, variant=shipped.rope(interleaved=True)),
    Case("general-rope-sm_80", 128, 4, GENERAL, variant=shipped.rope(), arch="sm_80"),
    Case("general-d256-fp8-sm_80", 256, 4, GENERAL, kv_dtype=FP8, arch="sm_80"),
    *(Case(f"decode-{arch}", 128, 4, DECODE, arch=arch) for arch in OTHER_ARCHS),
    *(
        Case(f"general-d256-{arch}", 256, 4, GENERAL, arch=arch) for arch in OTHER_ARCHS
    ),
    *(
        Case(f"fp8-soft-cap-{arch}", 64, 8, GENERAL, kv_dtype=FP8, arch=arch,
             variant=shipped.soft_cap(30.0))
        for arch in OTHER_ARCHS
    ),
]  # fmt: skip

Compiled = Callable[[Case], Cubin]


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compiled]:
    """Compiles the cases that were collected, in threads over the cores, ahead of their tests."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [call.params.get("case") for call in calls if call]
    cases = {case for case in wanted if isinstance(case, Case)}  # other files have cases too
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(os.cpu_count()) as pool:
        # The tests' own cache: a specialisation is compiled again when its text, a header that it
        # reaches or the compiler has changed.
        kept = getattr(request.config, "cache", None)
        folder = tmp_path_factory.mktemp("cubins") if kept is None else kept.mkdir("device_code")
        patch.setenv("FI_CACHE_DIR", str(folder))
        running: dict[Case, Future[Cubin]] = {
            case: pool.submit(partial(cached_cubin, case)) for case in CASES if case in cases
        }
        yield lambda case: running[case].result()
        pool.shutdown(cancel_futures=True)


def cached_cubin(case: Case) -> Cubin:
    path = cubin_path(case.kernel, case.arch)
    return Cubin(path.read_bytes(), (path.parent / "log.txt").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_without_spills(case: Case, compiled: Compiled) -> None:
    cubin = compiled(case)
    assert cubin.image.startswith(b"\x7fELF")
    assert f".text.{case.kernel.entry}\0".encode() in cubin.image
    assert (IN_PARTS in cubin.log) == (len(case.spec.tiles) > 1)
    assert (cubin.spill_bytes, cubin.stack_bytes, cubin.advice) == (0, 0, []), cubin.log
    assert cubin.registers > 0
    assert "warning" not in cubin.log
    needed = case.spec.ctas_per_sm * (case.kernel.shared_bytes + RESERVED_BYTES)
    assert needed <= shared_bytes_of_arch(case.arch)


def test_the_cases_cover_what_is_served() -> None:
    dims = {case.head_dim for case in CASES}
    assert dims == {64, 80, 96, 112, 128, (192, 128), 256}
    assert {case.group_size for case in CASES} >= {1, 4, 5, 6, 7, 8, 16, 64}
    used = {f for case in CASES if case.variant for f in case.variant.all_functions()}
    for variant in shipped.all_shipped():
        assert {content_key(f) for f in variant.all_functions()} <= {content_key(f) for f in used}
    tiles = {case.kernel.source.count("Tile<") for case in CASES}
    assert tiles >= {1, 2, 3, 4}


def test_a_failing_compile_shows_log_and_source() -> None:
    with pytest.raises(
        errors.CompileFailed, match=r'(?s)identifier "nonsense" is undefined.*int f'
    ):
        compile_cubin("__device__ int f() { return nonsense; }", "sm_90a")


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(errors.CompileFailed, match="gpu-architecture"):
        compile_cubin("", "sm_1")
