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
class Prefix:
    """KV tokens that requests have in common, in the same pages.

    Attributes:
        tokens: of it alone, whole pages.
        parent: the prefix that it continues, by a lower index; -1: it begins at position 0.
    """

    tokens: int
    parent: int = -1


@dataclass(frozen=True)
class Workload:
    """One attention call of a step: bf16, causal, every request at the end of its KV.

    Attributes:
        name: as in the tables; the part before the first dot is the kind of step.
        q_lens: query tokens of each request.
        kv_lens: KV tokens of each request, its query tokens included.
        heads: heads and head dimension.
        page: tokens of a page.
        prefixes: a forest of what is shared, roots first.
        last_prefix: of each request, the last prefix of the chain that its KV begins with; -1: it
            shares nothing. Empty: no request does.
    """

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: fi.HeadShape = LLAMA
    page: int = 16
    prefixes: tuple[Prefix, ...] = ()
    last_prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check what the definitions below could get wrong."""
        assert len(self.q_lens) == len(self.kv_lens)
        assert all(p.tokens % self.page == 0 for p in self.prefixes)
        assert all(-1 <= p.parent < i for i, p in enumerate(self.prefixes))
        assert len(self.last_prefix) in (0, len(self.kv_lens))
        used = {prefix for request in range(len(self.kv_lens)) for prefix in self.path(request)}
        assert used == set(range(len(self.prefixes))), "a prefix of no request has no pages"
        assert all(q <= own for q, own in zip(self.q_lens, self.own_lens, strict=True))

    def path(self, request: int) -> tuple[int, ...]:
        """Return the prefixes that a request's KV begins with, from position 0 on."""
        found: list[int] = []
        prefix = self.last_prefix[request] if self.last_prefix else -1
        while prefix >= 0:
            found.insert(0, prefix)
            prefix = self.prefixes[prefix].parent
        return tuple(found)

    @cached_property
    def levels(self) -> int:
        """Prefixes of the longest chain."""
        return max(len(self.path(request)) for request in range(len(self.kv_lens)))

    @cached_property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return sum(self.q_lens)

    @cached_property
    def own_lens(self) -> tuple[int, ...]:
        """KV tokens of each request behind its prefixes."""
        return tuple(
            kv - sum(self.prefixes[prefix].tokens for prefix in self.path(request))
            for request, kv in enumerate(self.kv_lens)
        )

    @cached_property
    def page_counts(self) -> tuple[int, ...]:
        """Pages of each prefix and then of each request's own KV: of all there are."""
        tokens = (*(p.tokens for p in self.prefixes), *self.own_lens)
        return tuple(-(-count // self.page) for count in tokens)

    @cached_property
    def num_pages(self) -> int:
        """Pages of the cache, shared ones once."""
        return sum(self.page_counts)

    @cached_property
    def num_kv_tokens(self) -> int:
        """KV tokens of the cache, shared ones once."""
        return sum(p.tokens for p in self.prefixes) + sum(self.own_lens)

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
        vectors = self.num_kv_tokens * heads.num_kv_heads + self.num_tokens * heads.num_qo_heads
        return vectors * dims * ELEMENT_BYTES

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


def decode_over(
    name: str,
    prefixes: tuple[Prefix, ...],
    last_prefix: tuple[int, ...],
    own: tuple[int, ...],
    **options: fi.HeadShape | int,
) -> Workload:
    """Return a decode step of requests with `own` tokens behind their prefixes."""
    ends: list[int] = []
    for prefix in prefixes:
        ends.append(prefix.tokens + (ends[prefix.parent] if prefix.parent >= 0 else 0))
    kv_lens = tuple(
        tokens + (ends[last] if last >= 0 else 0)
        for last, tokens in zip(last_prefix, own, strict=True)
    )
    q_lens = (1,) * len(own)
    return Workload(name, q_lens, kv_lens, prefixes=prefixes, last_prefix=last_prefix, **options)  # type: ignore[arg-type]


def one_prefix(
    name: str, shared: int, own: tuple[int, ...], **options: fi.HeadShape | int
) -> Workload:
    """Return a decode step of requests that all begin with the same tokens."""
    return decode_over(name, (Prefix(shared),), (0,) * len(own), own, **options)


def groups(
    name: str, shared: tuple[int, ...], order: tuple[int, ...], own: tuple[int, ...], page: int = 16
) -> Workload:
    """Return a decode step of groups, each with a prefix: request r is of group order[r]."""
    prefixes = tuple(Prefix(tokens) for tokens in shared)
    return decode_over(name, prefixes, order, own, page=page)


def samples(name: str, prompt: int, generated: tuple[int, ...], page: int = 16) -> Workload:
    """Return a decode step of parallel samples of one prompt.

    They share its whole pages: each writes its first tokens into a copy of a last page that the
    prompt does not fill.
    """
    whole = prompt // page * page
    return one_prefix(name, whole, tuple(prompt - whole + tokens for tokens in generated))


def chat_tree(name: str) -> Workload:
    """Return a decode step over a tree of three levels, neighbours far apart in it.

    64 requests begin with one system prompt of 2,048 tokens, eight each go on with a document of
    4,096, four each with a conversation of 1,024 about it, and each has 256 tokens of its own.
    """
    documents = tuple(Prefix(4096, 0) for _ in range(8))
    conversations = tuple(Prefix(1024, 1 + i % 8) for i in range(16))
    last_prefix = tuple(9 + request % 16 for request in range(64))
    return decode_over(name, (Prefix(2048), *documents, *conversations), last_prefix, (256,) * 64)


def shuffled(seed: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Return index i counts[i] times, in random order."""
    order = [i for i, count in enumerate(counts) for _ in range(count)]
    random.Random(seed).shuffle(order)
    return tuple(order)


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
    one_prefix("shared.64", 8192, (512,) * 64),
    one_prefix("shared.16", 32768, (256,) * 16),
    groups("shared.8x16", (4096,) * 8, tuple(r // 16 for r in range(128)), (512,) * 128),
    chat_tree("shared.tree3"),
    samples("shared.n4", 4096, uniform(4, 4, 128, 512)),
    samples("shared.n16", 4096, uniform(16, 16, 128, 512)),
    samples("shared.n64", 4096, uniform(64, 64, 128, 512)),
    groups(
        "shared.ragged.page1",
        (613, 1009, 1777, 2311, 3271, 4093),
        shuffled(6, (20, 3, 13, 7, 16, 5)),
        uniform(6, 64, 100, 900),
        page=1,
    ),
)

# Next to no work: what is left is the cost of a call.
TINY = decode("tiny", (16,))
