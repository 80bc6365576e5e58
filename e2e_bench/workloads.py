"""The workloads of the kernel benchmark, as data, each with the time no machine can beat.

Lengths that are drawn come from a seed that is part of the workload: every run times the same
batch. The seeds are those whose total is the one the floors of earlier runs were taken from.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import fi_backend as fi

# Ceilings measured on one H200: a pure read of memory, and an 8192³ bf16 matrix product.
READ_BYTES_PER_S = 4.42e12
FLOPS_PER_S = 793e12
ELEMENT_BYTES = 2  # bf16

LLAMA = fi.HeadShape(32, 8, 128)


@dataclass(frozen=True)
class Workload:
    """One attention call of a step: bf16, causal, every request at the end of its KV.

    Attributes:
        name: as in the tables; the part before the first dot is the kind of step.
        q_lens: query tokens of each request.
        kv_lens: KV tokens of each request, its query tokens included.
        heads: heads and head dimension.
        page: tokens of a page.
        shared: leading tokens that all requests have in common, in the same pages.
    """

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: fi.HeadShape = LLAMA
    page: int = 16
    shared: int = 0

    def __post_init__(self) -> None:
        """Check what the definitions below could get wrong."""
        assert len(self.q_lens) == len(self.kv_lens)
        assert all(q <= kv for q, kv in zip(self.q_lens, self.kv_lens, strict=True))
        assert self.shared % self.page == 0
        assert self.shared <= min(self.kv_lens)

    @cached_property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return sum(self.q_lens)

    @cached_property
    def pages_per_request(self) -> tuple[int, ...]:
        """Entries of each row of the page table."""
        return tuple(-(-kv // self.page) for kv in self.kv_lens)

    @cached_property
    def shared_pages(self) -> int:
        """Pages that all requests name."""
        return self.shared // self.page

    @cached_property
    def num_pages(self) -> int:
        """Pages of the cache, shared ones once."""
        own = sum(self.pages_per_request) - len(self.kv_lens) * self.shared_pages
        return own + self.shared_pages

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one layer, pages filled up."""
        dims = self.heads.head_dim_qk + self.heads.head_dim_vo
        return self.num_pages * self.page * self.heads.num_kv_heads * dims * ELEMENT_BYTES

    @cached_property
    def num_bytes(self) -> int:
        """Bytes that must move: each KV token once, queries in, outputs out."""
        heads = self.heads
        dims = heads.head_dim_qk + heads.head_dim_vo
        kv_tokens = sum(self.kv_lens) - (len(self.kv_lens) - 1) * self.shared
        elements = (kv_tokens * heads.num_kv_heads + self.num_tokens * heads.num_qo_heads) * dims
        return elements * ELEMENT_BYTES

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the visible pairs, both products."""
        pairs = sum(
            q * kv - q * (q - 1) // 2 for q, kv in zip(self.q_lens, self.kv_lens, strict=True)
        )
        dims = self.heads.head_dim_qk + self.heads.head_dim_vo
        return 2 * pairs * self.heads.num_qo_heads * dims

    @property
    def floor_us(self) -> float:
        """Least time: all bytes at the speed of reading, or all operations at that of products."""
        return max(self.num_bytes / READ_BYTES_PER_S, self.flops / FLOPS_PER_S) * 1e6

    @property
    def is_decode(self) -> bool:
        """Whether every request has one query token."""
        return max(self.q_lens) == 1


def uniform(seed: int, count: int, low: int, high: int) -> tuple[int, ...]:
    """Return lengths drawn evenly from low to high, both included."""
    rng = random.Random(seed)
    return tuple(low + int(rng.random() * (high - low + 1)) for _ in range(count))


def zipf(seed: int, count: int, mean: int, exponent: float) -> tuple[int, ...]:
    """Return lengths of the given mean in random order, the k-th longest ~ k ** -exponent.

    Example: zipf(0, 3, 100, 1.0) holds 164, 82 and 54, for 1 : 1/2 : 1/3.
    """
    weights = [(k + 1) ** -exponent for k in range(count)]
    unit = count * mean / sum(weights)
    lengths = [int(w * unit) for w in weights]
    lengths[0] += count * mean - sum(lengths)
    random.Random(seed).shuffle(lengths)
    return tuple(lengths)


def decode(name: str, kv_lens: tuple[int, ...], **options: fi.HeadShape | int) -> Workload:
    """Return a step of one query token per request."""
    return Workload(name, (1,) * len(kv_lens), kv_lens, **options)  # type: ignore[arg-type]


def prefill(name: str, lens: tuple[int, ...], **options: fi.HeadShape | int) -> Workload:
    """Return a step whose requests have no KV but their own."""
    return Workload(name, lens, lens, **options)  # type: ignore[arg-type]


def with_decodes(name: str, q_len: int, kv_len: int, decodes: tuple[int, ...]) -> Workload:
    """Return a step of one prefill chunk and decodes of the given KV lengths."""
    return Workload(name, (q_len, *(1,) * len(decodes)), (kv_len, *decodes))


D64 = fi.HeadShape(64, 8, 64)
D256 = fi.HeadShape(16, 8, 256)

WORKLOADS = (
    decode("dec.b1.k1k", (1024,)),
    decode("dec.b1.k8k", (8192,)),
    decode("dec.b1.k128k", (131072,)),
    decode("dec.b16.k1k", (1024,) * 16),
    decode("dec.b64.k4k", (4096,) * 64),
    decode("dec.b64.k4k.page1", (4096,) * 64, page=1),
    decode("dec.b64.uniform", uniform(59, 64, 128, 8192)),
    decode("dec.b64.zipf", zipf(1, 64, 4096, 0.56)),
    decode("dec.b256.uniform", uniform(55, 256, 64, 2048)),
    decode("dec.skew", (65536, *(512,) * 63)),
    decode("dec.tp8", (4096,) * 64, heads=fi.HeadShape(8, 1, 128)),
    decode("dec.d64", (4096,) * 64, heads=D64),
    decode("dec.d256", (4096,) * 32, heads=D256),
    prefill("pre.b1.4k", (4096,)),
    prefill("pre.b1.16k", (16384,)),
    prefill("pre.b1.16k.page1", (16384,), page=1),
    prefill("pre.b16.1k", (1024,) * 16),
    prefill("pre.b8.zipf", zipf(1, 8, 2048, 0.91)),
    prefill("pre.d64", (8192,), heads=D64),
    prefill("pre.d256", (8192,), heads=D256),
    Workload("pre.chunk", (2048,), (32768,)),
    with_decodes("mix.chunk1k", 1024, 4096, uniform(26, 63, 512, 8192)),
    with_decodes("mix.chunk512", 512, 512, uniform(34, 255, 64, 2048)),
    Workload("spec.q4", (4,) * 32, (4096,) * 32),
    Workload("spec.q8", (8,) * 64, (2048,) * 64),
    decode("shared.64", (8192 + 512,) * 64, shared=8192),
    decode("shared.16", (32768 + 256,) * 16, shared=32768),
)

# Next to no work: what is left is the cost of a call.
TINY = decode("tiny", (16,))
