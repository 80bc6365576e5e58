"""The named attention problems, and a generator of random ones.

There is one list. The CPU engine runs it as it stands; the GPU runs ``tensor_core_case`` of each
and ``GPU_CASES``, whose shapes are those that decide which specialisation of a kernel runs.
"""

from __future__ import annotations

import dataclasses
import random

import torch
from cases import Case
from variant_cases import GPU_KV_LEN, GPU_TOKENS

from fi_backend import Capacity
from fi_backend.formats import CAUSAL, FULL, Band, HeadShape

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
# Around the page (16) and the KV tile (64), as decodes.
EDGES = tuple((1, n) for n in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257))
MIXED = ((1, 77), (33, 33), (1, 1), (20, 90), (5, 64), (0, 0), (1, 130))


def heads(g: int, dim: int = 64, dim_vo: int | None = None) -> HeadShape:
    return HeadShape(2 * g, 2, dim, dim_vo)


CASES = [
    Case("decode-edges", EDGES),
    Case("decode-long", ((1, 1500),)),
    Case("decode-many", tuple((1, 5 + 7 * i % 90) for i in range(40)), heads(1, 32)),
    Case("prefill-edges", ((1, 1), (15, 15), (16, 16), (17, 17), (63, 63), (65, 65))),
    Case("prefill-long", ((300, 300),), heads(2, 32)),
    Case("prefill-bf16", ((130, 130), (40, 40)), dtype=BF16),
    Case("chunked", ((64, 200), (33, 129), (16, 80))),
    Case("mixed", MIXED),
    Case("mixed-bf16", MIXED, heads(4, 128), BF16),
    Case("mixed-fp16", MIXED, heads(4, 128), FP16),
    Case("verification", tuple((4, n) for n in (4, 19, 64, 67, 200)), heads(4)),
    Case("zero-length", ((0, 0), (1, 9), (0, 0), (0, 40), (3, 3), (0, 0))),
    Case("empty-batch", ()),
    Case("nothing-but-padding", ((0, 0), (0, 0)), padding=3),
    Case("padding-rows", ((1, 20), (2, 40)), padding=5),
    Case("queries-without-keys", ((5, 2), (3, 0), (1, 4))),
    Case("g2", MIXED, heads(2)),
    Case("g4-d80", MIXED, heads(4, 80)),
    Case("g5-d96", MIXED, heads(5, 96)),
    Case("g7-d112", MIXED, heads(7, 112)),
    Case("g8-d128", MIXED, heads(8, 128), BF16),
    Case("g16-d40", MIXED, HeadShape(16, 1, 40)),
    Case("d256", MIXED, heads(1, 256)),
    Case("d192-128", MIXED, heads(2, 192, 128), BF16),
    Case("d64-vo-256", MIXED, heads(2, 64, 256)),
    Case("page-1", MIXED, page_size=1, table="csr"),
    Case("page-3", MIXED, page_size=3, layout="hnd"),
    Case("page-128", MIXED, page_size=128),
    Case("hnd", MIXED, layout="hnd", table="wide"),
    Case("stacked", MIXED, layout="stacked", wide_lengths=True),
    Case("packed", MIXED, heads(2, 64, 32), layout="packed"),
    Case("sglang", MIXED, layout="slots", table="slots", page_size=8, wide_lengths=True),
    Case("sglang-tokens", MIXED, layout="slots", table="indirect64", page_size=1),
    Case("indirect", MIXED, table="indirect"),
    Case("csr", MIXED, table="csr"),
    Case("page-map", MIXED, table="mapped"),
    Case("strided", MIXED, strided=True, dtype=BF16),
    Case("scales", MIXED, scales="one"),
    Case("fp8", MIXED, heads(2), BF16, FP8, scales="per_head"),
    Case("fp8-slots", MIXED, heads(4), FP16, FP8, scales="one", layout="slots", page_size=4),
    Case("fp8-fp32", MIXED, heads(1), kv_dtype=FP8),
    Case("bidirectional", MIXED, band=FULL),
    Case("look-ahead", MIXED, band=Band(20, 7)),
    Case("window-1", MIXED, band=Band.window(1)),
    Case("window-64", ((1, 300), (70, 260), (1, 64), (40, 40)), band=Band.window(64)),
    Case("window-sinks", ((1, 400), (90, 260), (1, 64)), band=Band.window(50, 4)),
    Case("window-inside-sinks", ((10, 10), (3, 5), (1, 90)), band=Band(1, 0, 8)),
    Case("window-variant", MIXED, variant="window"),
    Case("soft-cap", MIXED, variant="soft_cap"),
    Case("alibi", MIXED, heads(4), variant="alibi"),
    Case("sinks", MIXED, heads(4), BF16, variant="sinks"),
    Case("sinks-nothing-seen", ((5, 2), (3, 0), (1, 4)), variant="sinks"),
    Case("tree-mask", tuple((q, q + c) for q, c in ((8, 60), (33, 5), (1, 70))), variant="tree"),
    Case("custom-mask", MIXED, band=FULL, variant="bits"),
    Case("sigmoid", MIXED, variant="sigmoid"),
    Case("sigmoid-scales", MIXED, variant="sigmoid", scales="per_head", dtype=BF16),
    Case("gemma-chain", MIXED, heads(2), variant="gemma", strided=True),
]

DECODES = ((1, 300), (1, 1), (1, 64), (0, 0), (1, 129), (1, 77))
ROLLING = ((1, 900), (1, 44), (90, 700), (5, 5), (0, 0), (200, 430))
DRAFTS = ((4, 300), (4, 4), (1, 64), (8, 77), (0, 0), (3, 130))
GPU_CASES = [
    *(Case(f"decode-g{g}", DECODES, heads(g, 128), BF16) for g in (1, 5, 6, 7)),
    Case("decode-g16", DECODES, heads(16, 128), FP16),
    Case("decode-g64", DECODES, HeadShape(64, 1, 64), BF16),
    Case("mixed-g64", MIXED, HeadShape(64, 1, 64), BF16),
    *(Case(f"decode-d{d}", DECODES, heads(4, d), FP16) for d in (80, 96, 112)),
    Case("decode-d192-128", DECODES, heads(8, 192, 128), BF16),
    Case("decode-d256", DECODES, heads(8, 256), BF16),
    Case("mixed-d256", MIXED, heads(8, 256), BF16),
    *(
        Case(f"mixed-d{qk}-{vo}", MIXED, heads(4, qk, vo), dtype)
        for qk, vo, dtype in ((64, 192, BF16), (128, 192, FP16), (256, 192, BF16), (128, 64, FP16))
    ),
    *(Case(f"decode-page-{p}", DECODES, heads(4, 128), BF16, page_size=p) for p in (1, 3, 128)),
    Case("decode-mapped", DECODES, heads(4, 128), BF16, table="mapped", layout="hnd"),
    Case("decode-window", DECODES, heads(4, 128), BF16, band=Band.window(50, 4)),
    Case("decode-soft-cap", DECODES, heads(4, 128), BF16, variant="soft_cap"),
    Case("decode-sinks", DECODES, heads(8), BF16, variant="sinks", band=Band.window(100)),
    Case("decode-fp8", DECODES, heads(4, 128), BF16, FP8, scales="per_head"),
    Case("mixed-fp8-d128", MIXED, heads(4, 128), FP16, FP8, page_size=1, layout="slots"),
    Case("mixed-fp8-d256", MIXED, heads(2, 256), BF16, FP8, scales="one", strided=True),
    Case("mixed-fp8-d192-128", MIXED, heads(1, 192, 128), BF16, FP8, layout="packed"),
    Case("mixed-fp8-gemma", MIXED, heads(2, 256), BF16, FP8, variant="gemma"),
    *(
        Case(f"{steps}-{variant}", lengths, heads(g, dim), dtype, variant=f"gpu-{variant}")
        for steps, lengths in (("decode", DECODES), ("mixed", MIXED), ("chunks", ROLLING))
        for variant, g, dim, dtype in (
            ("rope", 4, 128, BF16),
            ("rope-some", 8, 64, FP16),
            ("streaming", 4, 128, BF16),
            ("rope-steps", 4, 128, BF16),
            ("rope-some-steps", 1, 64, FP16),
            ("streaming-steps", 1, 128, BF16),
            ("streaming-many-sinks-steps", 4, 112, FP16),
            ("streaming-many-sinks", 1, 112, FP16),
        )
    ),
    Case("drafts", DRAFTS, heads(4, 128), BF16),
    Case("drafts-g1", DRAFTS, heads(1, 128), FP16, page_size=1, table="csr"),
    Case("drafts-tree", DRAFTS, heads(4, 128), BF16, variant="tree"),
    Case("drafts-fp8", DRAFTS, heads(8, 128), BF16, FP8, scales="one"),
]

# Most query tokens of a request (0: unlimited). Tile classes follow the capacity: all cases share
# these three and with them their specialisations.
STEPS = {"any": 0, "drafts": 8, "decode": 1}


def capacity_of(step: str) -> Capacity:
    """Return the capacity that every GPU case with steps of this kind is planned with."""
    return Capacity(64, GPU_TOKENS, GPU_KV_LEN, max_q_len=STEPS[step])


def tensor_core_case(case: Case, dtype: torch.dtype) -> Case:
    """Return the case as tensor cores take it.

    float32 becomes ``dtype``; head dimensions become the next multiple of 16 (40 becomes 48).
    """
    shape = case.heads
    dims = (-(-dim // 16) * 16 for dim in (shape.head_dim_qk, shape.head_dim_vo))
    return dataclasses.replace(
        case,
        heads=HeadShape(shape.num_qo_heads, shape.num_kv_heads, *dims),
        dtype=dtype if case.dtype == torch.float32 else case.dtype,
    )


def gpu_cases() -> list[tuple[str, Case]]:
    """Return every case for the GPU with each kind of step (STEPS) that it fits."""
    cases = [tensor_core_case(case, (BF16, FP16)[i % 2]) for i, case in enumerate(CASES)]
    pairs = []
    for case in [*cases, *GPU_CASES]:
        longest = max((q_len for q_len, _ in case.lengths), default=0)
        steps = ["any", "drafts"] if 1 < longest <= 8 else ["any"]
        pairs += [(step, case) for step in ([*steps, "decode"] if longest == 1 else steps)]
    return pairs


def random_case(seed: int) -> Case:
    """Return a case with every dimension drawn at random; small enough for the oracle."""
    rng = random.Random(seed)
    lengths = []
    for _ in range(rng.choice((1, 2, 5, 12))):
        q_len = rng.choice((0, 1, 1, 1, 2, 5, rng.randint(1, 70)))
        context = rng.choice((0, 0, rng.randint(0, 40), rng.randint(0, 200), 64 - q_len, 128))
        lengths.append((q_len, max(q_len + context, 0)))
    dtype = rng.choice((torch.float32, torch.float32, BF16, FP16))
    num_kv_heads = rng.choice((1, 2, 3))
    dim = rng.choice((32, 40, 64, 80, 128))
    variants = ("", "", "", "soft_cap", "alibi", "sinks", "tree", "bits", "sigmoid", "gemma")
    page_size = rng.choice((1, 2, 5, 16, 32))
    return Case(
        f"random-{seed}",
        tuple(lengths),
        HeadShape(
            num_kv_heads * rng.choice((1, 2, 3, 4, 6)), num_kv_heads, dim, rng.choice((None, 64))
        ),
        dtype,
        rng.choice((None, None, FP8)),
        page_size,
        rng.choice(("nhd", "hnd", "slots", "packed")),
        rng.choice(("dense", "wide", "indirect", "indirect64", "slots", "csr", "mapped")),
        rng.choice((CAUSAL, CAUSAL, FULL, Band.window(rng.randint(1, 100)), Band(9, 4, 5))),
        rng.choice(variants),
        wide_lengths=rng.random() < 0.3,
        strided=rng.random() < 0.3,
        scales=rng.choice(("", "", "one", "per_head")),
        padding=rng.choice((0, 0, 3)),
    )


# Group size, head dimensions, dtypes and variant of random cases on the GPU: each is a
# specialisation, everything else that random_case draws is not.
RANDOM_LAYERS = (
    (1, 64, 64, BF16, None, ""),
    (4, 128, 128, BF16, None, ""),
    (8, 128, 128, FP16, FP8, ""),
    (3, 192, 128, BF16, None, ""),
    (6, 64, 64, FP16, None, "alibi"),
    (7, 112, 112, BF16, None, "sinks"),
    (5, 80, 80, BF16, FP8, "tree"),
    (8, 96, 96, FP16, None, "bits"),
    (2, 256, 256, BF16, None, "gemma"),
    (16, 64, 64, BF16, None, "sigmoid"),
    (4, 128, 128, BF16, FP8, "soft_cap"),
)


def random_gpu_case(seed: int) -> Case:
    """Return a random case with one of RANDOM_LAYERS in place of its heads, dtypes and variant."""
    case = random_case(seed)
    group, dim_qk, dim_vo, dtype, kv_dtype, variant = RANDOM_LAYERS[seed % len(RANDOM_LAYERS)]
    kv_heads = case.heads.num_kv_heads
    return dataclasses.replace(
        case,
        heads=HeadShape(group * kv_heads, kv_heads, dim_qk, dim_vo),
        dtype=dtype,
        kv_dtype=kv_dtype,
        variant=variant,
    )
