"""The generated text of attention kernels names one instantiation and nothing else."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from fi_backend import _core
from fi_backend.errors import Unsupported
from fi_backend.formats import HeadShape
from fi_backend.jit.attention_kernels import (
    MAX_VARIANT_PARAMS,
    AttentionSpec,
    attention_kernel,
    attention_spec,
    takes_boxes,
)
from fi_backend.jit.headers import INCLUDE_ROOT
from fi_backend.jit.kernels import HOPPER_SHARED_BYTES
from fi_backend.variants import Scalar, Variant, shipped
from fi_backend.variants.source_text import device_structs, device_variant

PLAIN = AttentionSpec(
    128,
    128,
    torch.bfloat16,
    torch.bfloat16,
    4,
    None,
    ((16, 64, 2), (64, 64, 2)),
    4,
    2,
    True,
    True,
    boxes=False,
    decodes=False,
)


def test_the_text_of_plain_attention() -> None:
    kernel = attention_kernel(PLAIN)
    assert kernel.source == (
        '#include "fi/sm80/kernel.h"\n'
        "\n"
        'extern "C" __global__ void __launch_bounds__(128, 2)\n'
        "fi_attention(const __grid_constant__ fi::KernelParams p) {\n"
        "  using namespace fi;\n"
        "  using namespace fi::sm80;\n"
        "  run<Shape<BFloat16, BFloat16, 128, 128, 4, true, true, false, false>,\n"
        "      Variant<true, Functions<>, Functions<>, Functions<>>,\n"
        "      Tile<16, 64, 2, 4>,\n"
        "      Tile<64, 64, 2, 4>>(p);\n"
        "}\n"
    )
    assert kernel.parts is not None
    assert kernel.parts.frame == kernel.source.replace("  run<", "  run_frame<")
    small, large = kernel.parts.works
    work = kernel.source.replace("  run<", "  run_part<")
    first, second = "      Tile<16, 64, 2, 4>,\n", "      Tile<64, 64, 2, 4>,\n"
    assert small == ("16x64x2", work.replace(first, first + first))
    assert large == ("64x64x2", work.replace(first, second + first))
    assert attention_kernel(replace(PLAIN, tiles=PLAIN.tiles[:1])).parts is None
    assert kernel.entry == "fi_attention"
    assert kernel.title == "attention d128 g4 bf16 kv bf16 16x64+64x64 softmax plain"
    assert attention_kernel(replace(PLAIN)) is kernel


def test_every_choice_is_in_the_text_and_the_title() -> None:
    kernel = attention_kernel(
        AttentionSpec(192, 128, torch.float16, torch.float8_e4m3fn, 16, shipped.soft_cap(30.0),
                      ((16, 64, 3),), 4, 1, False, False, False, True)
    )  # fmt: skip
    assert "Shape<Float16, Float8E4M3, 192, 128, 16, false, false, false, true>" in kernel.source
    assert "__launch_bounds__(128, 1)" in kernel.source
    assert "Tile<16, 64, 3, 4>>(p)" in kernel.source
    expected = "attention d192/128 g16 fp16 kv fp8 16x64 soft_cap decode any-table unaligned"
    assert kernel.title == expected


def test_boxes_are_named_and_take_no_more_memory() -> None:
    kernel = attention_kernel(replace(PLAIN, boxes=True))
    assert "4, true, true, true, false>" in kernel.source
    assert kernel.title == "attention d128 g4 bf16 kv bf16 16x64+64x64 softmax plain boxes"
    assert kernel.shared_bytes == attention_kernel(PLAIN).shared_bytes, "64 rows are no boxes"
    decode = replace(PLAIN, tiles=((16, 64, 2),), decodes=True)
    boxes = attention_kernel(replace(decode, boxes=True))
    assert boxes.shared_bytes < attention_kernel(decode).shared_bytes


def test_boxes_leave_decodes_of_dimension_64_room_for_a_third_cta() -> None:
    def ctas(*, boxes: bool) -> int:
        spec = attention_spec(
            HeadShape(32, 8, 64),
            torch.bfloat16,
            torch.bfloat16,
            None,
            max_q_len=1,
            max_requests=256,
            has_nodes=False,
            boxes=boxes,
        )
        shared = attention_kernel(spec).shared_bytes
        assert spec.ctas_per_sm * (shared + 1024 + 384) <= HOPPER_SHARED_BYTES
        return spec.ctas_per_sm

    assert (ctas(boxes=False), ctas(boxes=True)) == (2, 3)


def test_boxes_are_of_whole_rows_of_128_bytes_and_of_16_tokens() -> None:
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    heads = {dim: HeadShape(8, 2, dim) for dim in (64, 80, 128, 256)}
    taken = {(d, kv) for d in heads for kv in (bf16, fp8) if takes_boxes(heads[d], kv, None, 16)}
    assert taken == {(64, bf16), (128, bf16), (128, fp8), (256, bf16), (256, fp8)}
    assert takes_boxes(HeadShape(8, 2, 192, 128), bf16, None, 16)
    assert [takes_boxes(heads[128], bf16, None, size) for size in (1, 8, 16, 512)] == [
        *(False, False),
        *(True, True),
    ]
    assert takes_boxes(heads[128], bf16, shipped.soft_cap(30.0), 16)
    assert not takes_boxes(heads[128], bf16, shipped.rope(), 16), "threads turn what they copied"


def test_shared_memory_grows_with_tiles_and_elements() -> None:
    fp8 = replace(PLAIN, kv_dtype=torch.float8_e4m3fn)
    deeper = replace(PLAIN, tiles=((16, 64, 3), (64, 64, 3)))
    sizes = [attention_kernel(spec).shared_bytes for spec in (fp8, PLAIN, deeper)]
    assert sizes == sorted(set(sizes))
    assert sizes[0] > 16 * 1024
    assert sizes[-1] < 228 * 1024


def added(logit: Any, a: Any, b: Any) -> Any:
    return logit + a + b


def halved(out: Any) -> Any:
    return out / 2


MINE = Variant("mine", added, output=halved, params=(Scalar("a", int, 1), Scalar("b", int, 2)))


def test_parameters_follow_one_another() -> None:
    cap, window, tree = shipped.soft_cap(1.0), shipped.sliding_window(4), shipped.tree_mask()
    chain = window.then(MINE).then(cap).then(tree)
    text = device_variant(chain)
    pattern = (
        r"Variant<true, Functions<Bound<variants::Logits_\w+, 0>, Bound<variants::Logits_\w+, 2>>, "
        r"Functions<Bound<variants::Mask_\w+, 3>, Bound<variants::Mask_\w+, 5>>, "
        r"Functions<Bound<variants::Output_\w+, 6>>>"
    )
    assert re.fullmatch(pattern, text)
    structs = device_structs(tuple(chain.all_functions()))
    assert set(re.findall(r"variants::(\w+)", text)) == set(re.findall(r"struct (\w+)", structs))


def test_a_function_that_is_used_twice_is_printed_once() -> None:
    cap = shipped.soft_cap(1.0)
    twice = cap.then(cap.renamed(cap="other"))
    assert device_structs(tuple(twice.all_functions())).count("struct Logits_") == 1
    assert device_variant(twice).count("Bound<variants::Logits_") == 2


def test_no_softmax() -> None:
    assert device_variant(shipped.sigmoid_attention()).startswith("Variant<false, Functions<Bound<")


def test_bound_values_and_sinks_need_no_specialisation() -> None:
    plain, sinks, low, high = (
        attention_kernel(replace(PLAIN, variant=variant))
        for variant in (None, shipped.sinks(), shipped.soft_cap(30.0), shipped.soft_cap(50.0))
    )
    assert sinks == plain
    assert low == high != plain


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "message"),
    [
        (torch.float32, torch.float32, "dtype: expected bfloat16 or float16, got torch.float32"),
        (torch.bfloat16, torch.int8, "kv_dtype: expected bfloat16 or float16 or float8_e4m3fn,"),
        (torch.bfloat16, torch.float16, "kv_dtype: expected torch.bfloat16 or torch.float8_e4m3fn"),
    ],
)
def test_dtypes_without_a_kernel(dtype: torch.dtype, kv_dtype: torch.dtype, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        attention_kernel(replace(PLAIN, dtype=dtype, kv_dtype=kv_dtype))


def test_too_many_parameters() -> None:
    long = MINE
    for i in range(MAX_VARIANT_PARAMS // 2):
        long = long.then(MINE.renamed(a=f"a{i}", b=f"b{i}"))
    with pytest.raises(Unsupported, match=r"variant: expected at most 16 parameters, .*, got 18"):
        attention_kernel(replace(PLAIN, variant=long))
    text = (INCLUDE_ROOT / "fi/attention/kernel_params.h").read_text()
    assert f"kMaxVariantParams = {MAX_VARIANT_PARAMS};" in text


def test_a_spec_takes_the_tile_table() -> None:
    heads = HeadShape(32, 8, 128)
    dtypes = (torch.bfloat16, torch.float8_e4m3fn)
    decode = attention_spec(heads, *dtypes, None, max_q_len=1, max_requests=64, has_nodes=False)
    shared = attention_spec(heads, *dtypes, None, max_q_len=1, max_requests=64)
    general = attention_spec(heads, *dtypes, None, max_q_len=8192, max_requests=64)
    assert [rows for rows, _, _ in decode.tiles] == [16]
    assert len(general.tiles) > 1
    assert decode.decodes and not shared.decodes and not general.decodes
    assert (decode.group_size, decode.plain_pages, decode.aligned) == (4, True, True)


@pytest.mark.parametrize(
    ("group_size", "kv_dtype", "rows"),
    [
        *((g, torch.bfloat16, 8) for g in (1, 4, 8)),
        *((g, torch.bfloat16, 16) for g in (9, 16)),
        (4, torch.float8_e4m3fn, 16),
    ],
)
def test_decodes_of_few_heads_have_narrow_tiles(
    group_size: int, kv_dtype: torch.dtype, rows: int
) -> None:
    heads = HeadShape(group_size, 1, 128)
    decode = attention_spec(
        heads, torch.bfloat16, kv_dtype, None, max_q_len=1, max_requests=64, has_nodes=False
    )
    assert [tile[0] for tile in decode.tiles] == [rows]


def test_queries_have_the_tile_that_holds_them() -> None:
    heads = HeadShape(4, 1, 128)
    dtypes = (torch.bfloat16, torch.bfloat16)
    two = attention_spec(heads, *dtypes, None, max_q_len=2, max_requests=64)
    four = attention_spec(heads, *dtypes, None, max_q_len=4, max_requests=64)
    assert [tile[0] for tile in two.tiles] == [8]
    assert [tile[0] for tile in four.tiles] == [8, 16]


# Shared memory of a multiprocessor: sm_80, sm_89 and sm_120, sm_90.
@pytest.mark.parametrize("shared_bytes", [167_936, 102_400, HOPPER_SHARED_BYTES])
def test_every_shape_has_a_cta_on_every_gpu(shared_bytes: int) -> None:
    dims = ((16, 16), (64, 64), (80, 80), (128, 128), (160, 160), (192, 128), (256, 256))
    for dim, kv_bytes, group_size, max_q_len in itertools.product(
        dims, (1, 2), (1, 4, 8, 16, 64), (1, 4, 1024)
    ):
        for boxes in (False, True):
            shape = (*dim, kv_bytes, group_size, max_q_len, 64, shared_bytes, boxes)
            table = _core.sm80_tiles(*shape)
            assert table.ctas_per_sm >= 1, shape
            assert table.classes[-1].rows >= min(64, max_q_len * group_size), shape
