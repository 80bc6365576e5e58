"""The generated text of attention kernels: it only names an instantiation of fi/sm80/kernel.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fi_backend import _core
from fi_backend.errors import Unsupported, require
from fi_backend.formats import HeadShape
from fi_backend.jit.kernels import HOPPER_SHARED_BYTES, DeviceKernel, bool_literal
from fi_backend.jit.parts import Parts
from fi_backend.variants import Variant
from fi_backend.variants.source_text import device_structs, device_variant

ENTRY = "fi_attention"
MAX_VARIANT_PARAMS = 16  # kMaxVariantParams of kernel_params.h
_ELEMENTS = {torch.bfloat16: ("BFloat16", "bf16"), torch.float16: ("Float16", "fp16")}
_KV_ELEMENTS = {**_ELEMENTS, torch.float8_e4m3fn: ("Float8E4M3", "fp8")}


@dataclass(frozen=True)
class AttentionSpec:
    """What one specialisation of the attention kernel is made for.

    Attributes:
        head_dim_qk: components of q and k.
        head_dim_vo: components of v and of the output.
        dtype: of q: bfloat16 or float16.
        kv_dtype: of the cache: ``dtype`` or float8_e4m3fn.
        group_size: query heads per KV head.
        variant: what happens to logits; None: plain softmax attention. Bands and sinks are
            arguments of the launch and need no specialisation.
        tiles: (rows, kv_tile, stages) of each item class, in the planner's order.
        warps: of a CTA.
        ctas_per_sm: CTAs that share a multiprocessor, which bounds registers.
        plain_pages: table entries are page ids and the page size is a power of two.
        aligned: addresses and strides of q, K and V are multiples of 16 bytes.
        boxes: K and V are copied as boxes of tensor maps (``takes_boxes``); never where pages are
            not plain or tensors not aligned.
        decodes: steps have no shared prefixes and one query token per request, so that code for
            both is left out. Longer requests are computed too, more slowly.
        macros: names and values defined ahead of the headers, by which experiments tell what to
            compile (e2e_bench/tune.py).
    """

    head_dim_qk: int
    head_dim_vo: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    group_size: int
    variant: Variant | None
    tiles: tuple[tuple[int, int, int], ...]
    warps: int
    ctas_per_sm: int
    plain_pages: bool
    aligned: bool
    boxes: bool
    decodes: bool
    macros: tuple[tuple[str, int], ...] = ()


def attention_spec(
    heads: HeadShape,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    variant: Variant | None,
    *,
    max_q_len: int,
    max_requests: int,
    has_nodes: bool = True,
    plain_pages: bool = True,
    aligned: bool = True,
    boxes: bool = False,
    max_shared_bytes_per_sm: int = HOPPER_SHARED_BYTES,
) -> AttentionSpec:
    """Return the specialisation for a layer class, with the item classes that its steps can need.

    Args:
        heads: of one rank.
        dtype: of q.
        kv_dtype: of the cache.
        variant: as in ``AttentionSpec``.
        max_q_len: query tokens of one request at most; 1 in decode-only steps.
        max_requests: requests of a step at most.
        has_nodes: whether a step may have shared prefixes.
        plain_pages: as in ``AttentionSpec``.
        aligned: as in ``AttentionSpec``.
        boxes: as in ``AttentionSpec``.
        max_shared_bytes_per_sm: of the GPU: ``_core.device_info`` knows it where there is one,
            ``kernels.shared_bytes_of_arch`` elsewhere.
    """
    dims = (heads.head_dim_qk, heads.head_dim_vo)
    table = _core.sm80_tiles(
        *dims,
        kv_dtype.itemsize,
        heads.group_size,
        max_q_len,
        max_requests,
        max_shared_bytes_per_sm,
        boxes,
    )
    tiles = tuple(
        (c.rows, c.kv_tile, stages) for c, stages in zip(table.classes, table.stages, strict=True)
    )
    return AttentionSpec(
        *dims,
        dtype,
        kv_dtype,
        heads.group_size,
        variant,
        tiles,
        table.warps,
        table.ctas_per_sm,
        plain_pages,
        aligned,
        boxes,
        decodes=max_q_len == 1 and not has_nodes,
    )


def takes_boxes(
    heads: HeadShape, kv_dtype: torch.dtype, variant: Variant | None, page_size: int
) -> bool:
    """Return whether a GPU that can copy boxes of tensor maps does, for plain and aligned pages.

    Args:
        heads: of one rank.
        kv_dtype: of the cache.
        variant: one that turns K does that in rows that threads have copied.
        page_size: tokens of a page.
    """
    turns = variant is not None and variant.rotation is not None
    dims = (heads.head_dim_qk, heads.head_dim_vo)
    return not turns and _core.fits_boxes(*dims, kv_dtype.itemsize, page_size)


@lru_cache(maxsize=1024)
def attention_kernel(spec: AttentionSpec) -> DeviceKernel:
    """Return the kernel of a specialisation.

    Raises:
        Unsupported: dtypes without a kernel, or a variant with too many parameters.
    """
    _require_dtypes(spec)
    functions = () if spec.variant is None else tuple(spec.variant.all_functions())
    count = sum(len(function.params) for function in functions)
    rule = f"at most {MAX_VARIANT_PARAMS} parameters, summed over the functions of the variant"
    hint = "pack scalars into one tensor"
    require(count <= MAX_VARIANT_PARAMS, "variant", rule, count, hint, kind=Unsupported)
    shared_bytes = _core.sm80_shared_bytes(
        spec.head_dim_qk,
        spec.head_dim_vo,
        spec.kv_dtype.itemsize,
        list(spec.tiles),
        spec.warps,
        spec.boxes,
    )
    structs = device_structs(functions)
    macros = "".join(f"#define {name} {value}\n" for name, value in spec.macros)

    def unit(function: str, tiles: Sequence[tuple[int, int, int]]) -> str:
        headers = '#include "fi/sm80/kernel.h"\n'
        texts = (macros, headers, structs, _entry(spec, function, tiles))
        return "\n".join(filter(None, texts))

    parts = None
    if len(spec.tiles) > 1:
        works = tuple(
            ("{}x{}x{}".format(*tile), unit("run_part", [tile, *spec.tiles])) for tile in spec.tiles
        )
        parts = Parts(unit("run_frame", spec.tiles), works)
    return DeviceKernel(_title(spec), ENTRY, unit("run", spec.tiles), shared_bytes, parts)


def _require_dtypes(spec: AttentionSpec) -> None:
    names = {"dtype": (spec.dtype, _ELEMENTS), "kv_dtype": (spec.kv_dtype, _KV_ELEMENTS)}
    for name, (dtype, known) in names.items():
        rule = " or ".join(str(one).removeprefix("torch.") for one in known)
        hint = "convert it, or use the CPU engine"
        require(dtype in known, name, rule, dtype, hint, kind=Unsupported)
    is_fp8 = spec.kv_dtype == torch.float8_e4m3fn
    hint = "store the cache in the dtype of q or in float8_e4m3fn"
    rule = f"{spec.dtype} or torch.float8_e4m3fn"
    served = is_fp8 or spec.kv_dtype == spec.dtype
    require(served, "kv_dtype", rule, spec.kv_dtype, hint, kind=Unsupported)


def _entry(spec: AttentionSpec, function: str, tiles: Sequence[tuple[int, int, int]]) -> str:
    shape = ", ".join(
        (
            _ELEMENTS[spec.dtype][0],
            _KV_ELEMENTS[spec.kv_dtype][0],
            *map(str, (spec.head_dim_qk, spec.head_dim_vo, spec.group_size)),
            bool_literal(spec.plain_pages),
            bool_literal(spec.aligned),
            bool_literal(spec.boxes),
            bool_literal(spec.decodes),
        )
    )
    names = ",\n      ".join("Tile<{}, {}, {}, {}>".format(*tile, spec.warps) for tile in tiles)
    return (
        f'extern "C" __global__ void __launch_bounds__({32 * spec.warps}, {spec.ctas_per_sm})\n'
        f"{ENTRY}(const __grid_constant__ fi::KernelParams p) {{\n"
        "  using namespace fi;\n  using namespace fi::sm80;\n"
        f"  {function}<Shape<{shape}>,\n      {device_variant(spec.variant)},\n"
        f"      {names}>(p);\n}}\n"
    )


def _title(spec: AttentionSpec) -> str:
    """For example "attention d128 g4 bf16 kv fp8 16x64+64x64 soft_cap plain"."""
    dims = (spec.head_dim_qk, spec.head_dim_vo)
    words = [
        "attention",
        f"d{dims[0]}" if dims[0] == dims[1] else f"d{dims[0]}/{dims[1]}",
        f"g{spec.group_size}",
        _ELEMENTS[spec.dtype][1],
        f"kv {_KV_ELEMENTS[spec.kv_dtype][1]}",
        "+".join(f"{rows}x{kv_tile}" for rows, kv_tile, _ in spec.tiles),
        "softmax" if spec.variant is None else spec.variant.name,
        *(["decode"] if spec.decodes else []),
        "plain" if spec.plain_pages else "any-table",
    ]
    words += ["boxes"] if spec.boxes else []
    return " ".join(words if spec.aligned else [*words, "unaligned"])
