"""append_kv on a GPU, held against the CPU engine on the same inputs.

The copies are whole storages: what lies between and around the rows is compared too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import lay_out
from placing import Mover, misplaced
from stress import capture
from torch import Tensor

import fi_backend as fi
from fi_backend import append_call
from fi_backend.cuda_ops import AppendSpec, RopeSpec, append_kernels
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.ops import Rope

FP8, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
CPU = "cpu"
POSITIONS = 300


@dataclass(frozen=True)
class Append:
    """One call of append_kv.

    Attributes:
        dims: of K and V.
        offset: elements by which k, v, q and cache lie past aligned addresses.
        gap: elements between the rows of all of them.
        scales: "", "one", "per_head" or "mixed": per head, every third of them awkward.
        rope: what is rotated; q_heads 0: K alone.
    """

    name: str
    dtype: torch.dtype = BF16
    cache_dtype: torch.dtype = BF16
    dims: tuple[int, int] = (128, 128)
    kv_heads: int = 8
    tokens: int = 64
    page_size: int = 16
    layout: str = "nhd"
    offset: int = 0
    gap: int = 0
    scales: str = ""
    rope: RopeSpec | None = None
    q_heads: int = 0
    in_place: bool = False


def neox(dim: int, dtype: torch.dtype = FP32) -> RopeSpec:
    return RopeSpec(dtype, dim)


def gptj(dim: int, dtype: torch.dtype = FP32) -> RopeSpec:
    return RopeSpec(dtype, dim, interleaved=True)


APPENDS = [
    Append("decode"),
    Append("prefill", tokens=3000),
    Append("one-token", tokens=1),
    Append("hnd", layout="hnd"),
    Append("packed", layout="packed"),
    Append("stacked", layout="stacked", page_size=48),
    Append("token-slots", layout="slots", page_size=1, kv_heads=1, tokens=777),
    Append("fp16-mla-dims", FP16, FP16, dims=(192, 128), kv_heads=3, tokens=130),
    Append("page-5-dims-24-40", dims=(24, 40), page_size=5, kv_heads=7, tokens=500),
    Append("d256", dims=(256, 256), kv_heads=2, tokens=2100),
    Append("gaps", gap=8),
    Append("unaligned", offset=1, gap=3, dims=(80, 80), kv_heads=5),
    Append("unaligned-large", FP16, FP16, offset=3, tokens=2500),
    Append("fp8", cache_dtype=FP8),
    Append("fp8-one-scale", FP16, FP8, scales="one", tokens=2000, layout="hnd"),
    Append("fp8-per-head", cache_dtype=FP8, scales="per_head", layout="packed", dims=(72, 72)),
    Append("fp8-unaligned", cache_dtype=FP8, scales="per_head", offset=5, gap=1, tokens=300),
    Append("rope-k", rope=neox(128)),
    Append("rope", rope=neox(128), q_heads=32, in_place=True),
    Append("rope-prefill", rope=neox(128, BF16), q_heads=32, tokens=2000),
    Append("rope-partial", FP16, FP16, rope=neox(32), q_heads=6, kv_heads=3, dims=(80, 80)),
    Append("rope-odd-half", rope=neox(20), q_heads=5, kv_heads=5, dims=(80, 64), in_place=True),
    Append("rope-gptj", rope=gptj(64, BF16), q_heads=16, kv_heads=2, in_place=True),
    Append("rope-gptj-odd", rope=gptj(6), q_heads=2, kv_heads=2, dims=(24, 24), tokens=400),
    Append("rope-gaps", FP16, FP16, rope=gptj(128), q_heads=8, gap=8, tokens=900),
    Append("rope-unaligned", rope=neox(64), q_heads=9, kv_heads=3, offset=1, gap=1, in_place=True),
    Append("rope-fp8", cache_dtype=FP8, rope=neox(128), q_heads=4, scales="per_head"),
    Append("rope-fp8-gptj", FP16, FP8, rope=gptj(64), tokens=1500, scales="one", in_place=True),
    Append("fp8-mixed", cache_dtype=FP8, scales="mixed", tokens=2500),
    Append("fp8-mixed-unaligned", FP16, FP8, scales="mixed", offset=1, gap=3, dims=(80, 72)),
    Append("rope-fp8-mixed", cache_dtype=FP8, rope=neox(64, BF16), q_heads=4, scales="mixed"),
]


def spec_of(case: Append) -> AppendSpec:
    return AppendSpec(case.dtype, case.cache_dtype, *case.dims, case.rope)


def kernels_of(test: str, arguments: Mapping[str, Any]) -> list[DeviceKernel]:
    """What a test compiles: conftest.py builds all of it in advance, on all cores."""
    case = arguments.get("case")
    if isinstance(case, Append):
        return append_kernels(spec_of(case))
    return append_kernels(spec_of(APPENDS[0]))


def make_append(case: Append, seed: int = 0) -> dict[str, Any]:
    """The arguments of a call, on the CPU; a fifth of the tokens is skipped."""
    g = torch.Generator().manual_seed(seed)
    dim_qk, dim_vo = case.dims
    rows = case.tokens + 3  # the last three are padding
    pages = case.tokens // case.page_size + 3
    new = [
        misplaced((torch.randn(rows, heads, dim, generator=g) * 3).to(case.dtype), *off(case))
        for heads, dim in ((case.kv_heads, dim_qk), (case.kv_heads, dim_vo), (case.q_heads, dim_qk))
    ]
    shape = (pages, case.page_size, case.kv_heads)
    caches = [torch.full((*shape, dim), 7.0).to(case.cache_dtype) for dim in case.dims]
    if case.offset or case.gap:
        caches = [misplaced(cache, *off(case)) for cache in caches]
    slots = torch.randperm(pages * case.page_size, generator=g)[: case.tokens]
    slots[torch.rand(case.tokens, generator=g) < 0.2] = -1
    arguments = {"k": new[0], "v": new[1], "kv": lay_out(case.layout, *caches), "slots": slots}
    if case.scales:
        count = () if case.scales == "one" else (case.kv_heads,)
        for name in ("k_scale", "v_scale"):
            arguments[name] = torch.rand(count, generator=g) * 3 + 0.01
            if case.scales == "mixed":
                arguments[name][::3] = 1 + 2**-23
    if case.rope is not None:
        cos_sin = torch.randn(POSITIONS, case.rope.rotary_dim, generator=g)
        wide = torch.int32 if case.rope.interleaved else torch.int64
        positions = torch.randint(POSITIONS, (rows,), generator=g).to(wide)
        turning = cos_sin.to(case.rope.cos_sin_dtype), positions, case.rope.interleaved
        arguments["rope"] = Rope(*turning)
        if case.q_heads:
            arguments["q"] = new[2]
            arguments["q_out"] = None if case.in_place else torch.full_like(new[2], math.nan)
    return arguments


def off(case: Append) -> tuple[int, int]:
    return case.offset, case.gap


def move(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """A copy of the arguments, whole storages at a time."""
    mover = Mover(device)

    def moved(value: Any) -> Any:
        if isinstance(value, fi.KvCacheView):
            return fi.KvCacheView(mover.tensor(value.k), mover.tensor(value.v))
        if isinstance(value, Rope):
            cos_sin, positions = mover.tensor(value.cos_sin), mover.tensor(value.positions)
            return Rope(cos_sin, positions, value.interleaved)
        return mover.tensor(value) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in arguments.items()}


def written(arguments: dict[str, Any]) -> list[Tensor]:
    """Every byte of the storages that a call may write, and of those that it may not."""
    kv, rope = arguments["kv"], arguments.get("rope")
    tensors = [kv.k, kv.v, arguments["k"], arguments["v"], arguments.get("q")]
    tensors += [arguments.get("q_out"), None if rope is None else rope.cos_sin]
    return [
        torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).cpu()
        for t in tensors
        if t is not None
    ]


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    pairs = zip(written(left), written(right), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def append(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    there = move(arguments, device)
    fi.append_kv(**there)
    return there


@pytest.mark.parametrize("case", APPENDS, ids=lambda case: case.name)
def test_equals_the_cpu_bit_by_bit(case: Append, device: str) -> None:
    arguments = make_append(case)
    result = append(arguments, device)
    assert same(result, append(arguments, CPU))
    assert not same(result, arguments)


def test_slots_past_the_cache_are_skipped(device: str) -> None:
    arguments = make_append(Append("bad-slots", rope=neox(64), q_heads=2))
    kv, slots = arguments["kv"], arguments["slots"]
    num_slots = kv.num_pages * kv.page_size
    bad = torch.tensor([num_slots, 2**31, 2**32, 2**40 + 3, -2, -(2**40)])
    skipped = slots.clone()
    slots[10:16], skipped[10:16] = bad, -1
    assert same(append(arguments, device), append(arguments | {"slots": skipped}, CPU))


def test_positions_outside_of_the_table_are_not_written(device: str) -> None:
    arguments = make_append(Append("bad-positions", rope=neox(64), q_heads=2, tokens=6))
    good, rope = arguments["slots"].copy_(torch.arange(6)), arguments["rope"]
    expected = append(arguments | {"q": None, "q_out": None}, CPU)
    before = arguments["kv"].k.clone()
    rope.positions[2:4] = torch.tensor([POSITIONS, -1])
    result = append(arguments, device)
    assert torch.equal(result["kv"].k[0, 2:4].cpu(), before[0, 2:4])
    keep = good != 2
    keep[3] = False
    assert torch.equal(result["kv"].k[0, :6].cpu()[keep], expected["kv"].k[0, :6][keep])
    assert result["q_out"][2:4].isnan().all() and not result["q_out"][:2].isnan().any()


@pytest.mark.parametrize("name", ["slots", "positions"])
def test_values_are_checked_on_demand(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append_call, "CHECKS_VALUES", True)
    arguments = make_append(Append("checked", rope=neox(64)))
    append(arguments, device)
    where = arguments["slots"] if name == "slots" else arguments["rope"].positions
    where[17] = 99_999
    with pytest.raises(fi.InvalidInput, match=f"{name}: expected .*got 99999 at token 17"):
        append(arguments, device)


@pytest.mark.parametrize("case", [APPENDS[0], APPENDS[18]], ids=lambda case: case.name)
def test_replays_with_new_values(case: Append, device: str) -> None:
    """Captured once, also with FI_CHECK=1; slots, positions and tensors are read at replay."""
    first, second = make_append(case, 1), make_append(case, 2)
    there = move(first, device)
    replay = capture(lambda: fi.append_kv(**there), torch.device(device))
    for name, value in move(second, device).items():
        if isinstance(value, Tensor):
            there[name].copy_(value)
    if case.rope is not None:
        there["rope"].positions.copy_(second["rope"].positions)
        there["rope"].cos_sin.copy_(second["rope"].cos_sin)
    for cache, fresh in zip(vars(there["kv"]).values(), vars(second["kv"]).values(), strict=True):
        cache.copy_(fresh)
    replay()
    assert same(there, append(second, CPU))


def test_every_device_whichever_is_current() -> None:
    """Kernel and stream follow the tensors; the current device stays what it was."""
    arguments = make_append(APPENDS[0])
    expected = append(arguments, CPU)
    for index in range(torch.cuda.device_count()):
        assert same(append(arguments, f"cuda:{index}"), expected)
        assert torch.cuda.current_device() == 0


def test_refusals(device: str) -> None:
    arguments = make_append(APPENDS[0])
    there = move(arguments, device)
    for wrong, match in (
        ({"k": arguments["k"]}, f"k: expected .* on {device}.* on cpu"),
        ({"slots": arguments["slots"]}, f"slots: expected .* on {device}.* on cpu"),
    ):
        with pytest.raises(fi.InvalidInput, match=match):
            fi.append_kv(**(there | wrong))
    cache = torch.zeros(2, 16, 8, 128, device=device)
    floats = {"k": there["k"].float(), "v": there["v"].float()}
    with pytest.raises(fi.InvalidInput, match=r"k: expected torch\.bfloat16 or torch\.float16 on"):
        fi.append_kv(**(there | floats | {"kv": fi.KvCacheView.nhd(cache, cache)}))
