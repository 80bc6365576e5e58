"""What a planner is built for: the layer classes of a model and the largest step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fi_backend.errors import require
from fi_backend.formats import CAUSAL, Band, HeadShape
from fi_backend.variants import Variant, derive_band

MAX_KV_LEN = 1 << 30
MAX_NODES = (1 << 15) - 1  # the forest's kernel numbers them with 16 bits
# Query tokens of all nodes that a planner has room for, unless it has more requests than that:
# each costs two partial states per query head, 135 MB together at 32 heads of 128.
ROOM_FOR_SHARED_TOKENS = 4096


@dataclass(frozen=True)
class LayerClass:
    """What the attention layers that share one plan have in common.

    Attributes:
        heads: heads of one rank.
        dtype: of q and of the output: float32 (CPU only), float16 or bfloat16.
        kv_dtype: of the cache; None means ``dtype``; or float8_e4m3fn.
        band: which KV positions a query may see; masked exactly.
        variant: what happens to logits; None is plain softmax attention.
        page_table_id: which of the batches given to ``plan`` this class reads.
    """

    heads: HeadShape
    dtype: torch.dtype
    kv_dtype: torch.dtype | None = None
    band: Band = CAUSAL
    variant: Variant | None = None
    page_table_id: int = 0

    @property
    def cache_dtype(self) -> torch.dtype:
        """Element type of the KV cache."""
        return self.dtype if self.kv_dtype is None else self.kv_dtype

    @property
    def shares(self) -> bool:
        """Whether prefixes are looked for: not under a window, which hides them from the end."""
        return self.planned_band.left < 0

    @property
    def planned_band(self) -> Band:
        """The band that bounds both ``band`` and the variant's mask: what the planner skips by."""
        if self.variant is None:
            return self.band
        derived = derive_band(self.variant)
        return intersect_bands(self.band, Band(derived.left, derived.right, derived.sink_prefix))


def intersect_bands(a: Band, b: Band) -> Band:
    """Return the tightest band that covers every pair visible in both.

    A pair inside one window and one sink prefix lies in the larger prefix, so the smaller window
    and the larger prefix cover the intersection.
    """

    def smaller(x: int, y: int) -> int:
        return max(x, y) if min(x, y) < 0 else min(x, y)

    return Band(
        smaller(a.left, b.left), smaller(a.right, b.right), max(a.sink_prefix, b.sink_prefix)
    )


@dataclass(frozen=True)
class Capacity:
    """The largest step a planner serves. Any batch within it fits by construction.

    Attributes:
        max_requests: requests of a step, padded ones included.
        max_tokens: query tokens of a step.
        max_kv_len: KV tokens of one request.
        max_nodes: shared prefixes of a step; 0 turns sharing off. See ``with_sharing``.
        max_links: memberships summed over nodes.
        max_shared_tokens: query tokens summed over nodes.
        max_q_len: query tokens of one request; 0: as many as the step has. Only a hint that picks
            the tile classes of a GPU's kernel: a planner for decode steps passes 1 and gets a
            kernel with nothing else in it. Longer requests are computed too, more slowly.

    Raises:
        InvalidInput: a negative count, or a KV length that 32-bit positions cannot hold.
    """

    max_requests: int
    max_tokens: int
    max_kv_len: int
    max_nodes: int = 0
    max_links: int = 0
    max_shared_tokens: int = 0
    max_q_len: int = 0

    @property
    def longest_q_len(self) -> int:
        """Query tokens of the longest request that is expected."""
        return max(1, min(self.max_q_len or self.max_tokens, self.max_tokens))

    def with_sharing(self, levels: int = 3) -> Capacity:
        """Return a capacity whose planner looks for shared prefixes and reads them once.

        Args:
            levels: nested prefixes (system prompt, document, conversation) that all requests may
                have at once. Each costs partial states of one step of decoding or verification,
                up to 4,096 query tokens in all, or one per request where that is more. Prefixes
                beyond that are read once per request.
        """
        links = levels * self.max_requests
        tokens_each = min(self.max_q_len or 1, self.longest_q_len)
        return replace(
            self,
            max_nodes=min(self.max_requests, MAX_NODES),
            max_links=links,
            max_shared_tokens=min(
                links * tokens_each, max(ROOM_FOR_SHARED_TOKENS, self.max_requests)
            ),
        )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            hint = "capacity is what the largest step needs"
            require(value >= 0, f"capacity.{name}", "at least 0", value, hint)
        require(
            self.max_kv_len <= MAX_KV_LEN,
            "capacity.max_kv_len",
            f"at most {MAX_KV_LEN} tokens",
            self.max_kv_len,
            "positions are 32-bit",
        )
