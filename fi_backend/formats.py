"""How the requests of a step are described: views of the caller's own tensors.

Nothing here copies or reads tensor contents; the constructors check what is cheap (dtype, rank,
strides, devices) and ``checks.validate`` checks the values. Every KV arrangement is one model: a
block-sparse matrix with query tokens as rows and pages as columns.

Words: ``qo_indptr`` counts tokens, ``indptr`` of a page table counts pages, ``kv_len`` counts
tokens and includes those of the step itself. Query token i of request r sits at position
``kv_len[r] - q_len[r] + i``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.storage import (
    DTYPE_CODES,
    INDEX_DTYPES,
    KvCacheView,
    PageTable,
    PageTableView,
    require_device,
    require_vector,
)

__all__ = [
    "CAUSAL",
    "DTYPE_CODES",
    "FULL",
    "INDEX_DTYPES",
    "Band",
    "HeadShape",
    "KvCacheView",
    "Nodes",
    "PageTable",
    "PageTableView",
    "PagedBatch",
]


@dataclass(frozen=True, init=False)
class HeadShape:
    """Heads and head dimensions of an attention layer.

    Attributes:
        num_qo_heads: query heads, a multiple of num_kv_heads.
        num_kv_heads: KV heads.
        head_dim_qk: components of q and k.
        head_dim_vo: components of v and of the output; None means head_dim_qk.

    Raises:
        InvalidInput: a count is not positive or the heads do not divide.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int

    def __init__(
        self,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
    ) -> None:
        values = {
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim_qk": head_dim_qk,
            "head_dim_vo": head_dim_qk if head_dim_vo is None else head_dim_vo,
        }
        for name, value in values.items():
            require(value > 0, name, "a positive count", value, "check the model configuration")
            object.__setattr__(self, name, value)
        require(
            num_qo_heads % num_kv_heads == 0,
            "num_qo_heads",
            f"a multiple of num_kv_heads={num_kv_heads}",
            num_qo_heads,
            "use the per-rank head counts",
        )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_qo_heads // self.num_kv_heads


@dataclass(frozen=True)
class Band:
    """Which KV positions j a query at position i may see.

    Visible: j <= i + right, and j >= i - left or j < sink_prefix.

    Attributes:
        left: tokens visible before the query's own position; -1: unbounded.
        right: tokens visible after it; -1: unbounded, 0: causal.
        sink_prefix: leading tokens of the request that stay visible however small ``left`` is.

    Raises:
        InvalidInput: a bound below -1 or a negative prefix.
    """

    left: int = -1
    right: int = -1
    sink_prefix: int = 0

    def __post_init__(self) -> None:
        hint = "-1 means unbounded"
        require(self.left >= -1, "band.left", "at least -1", self.left, hint)
        require(self.right >= -1, "band.right", "at least -1", self.right, hint)
        require(
            self.sink_prefix >= 0,
            "band.sink_prefix",
            "at least 0",
            self.sink_prefix,
            "0 means no sink tokens",
        )

    @classmethod
    def window(cls, num_tokens: int, sink_prefix: int = 0) -> Band:
        """Return a causal window: the query's own token and the ``num_tokens - 1`` before it."""
        require(num_tokens > 0, "num_tokens", "a positive count", num_tokens, "pass Band(-1, 0)")
        return cls(num_tokens - 1, 0, sink_prefix)


_INT32 = (torch.int32,)
CAUSAL = Band(-1, 0)
FULL = Band(-1, -1)


@dataclass(frozen=True, eq=False)
class Nodes:
    """Shared KV ranges: row blocks whose query tokens are gathered from several requests.

    Node n covers KV positions [kv_begin[n], kv_end[n]) of table row table_row[n] for the requests
    members[member_ptr[n]:member_ptr[n + 1]]: read once, it serves all of them. Nodes are ascending
    by kv_begin for each request.

    With ``own_begin``, the nodes of request r cover [0, own_begin[r]) without gap or overlap and
    its own row is read from there on: the shared pages need not be in it. Without, nodes only tell
    what the members' own rows share: a node that does not continue its members' nodes, or exceeds
    the planner's capacity, is declined and its pages are read through the members' rows.

    Attributes:
        table_row: int32 [n], device of the batch; may name rows past the requests'.
        kv_begin: int32 [n], tokens.
        kv_end: int32 [n], tokens.
        member_ptr: int32 [n + 1].
        members: int32 [links], request indices.
        own_begin: int32 [R], tokens; or None.

    Raises:
        InvalidInput: a dtype, rank, stride, length or device outside the above.
    """

    table_row: Tensor
    kv_begin: Tensor
    kv_end: Tensor
    member_ptr: Tensor
    members: Tensor
    own_begin: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in vars(self).items():
            if name == "own_begin" and tensor is None:
                continue
            require_vector(tensor, f"nodes.{name}", _INT32)
            require_device(tensor, f"nodes.{name}", self.table_row.device)
        count = self.num_nodes
        for name, extra in (("kv_begin", 0), ("kv_end", 0), ("member_ptr", 1)):
            length = getattr(self, name).numel()
            require(
                length == count + extra,
                f"nodes.{name}",
                f"{count + extra} elements for {count} nodes",
                length,
                "one entry per node; member_ptr one more",
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.table_row.numel()


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """The requests of one step.

    Attributes:
        qo_indptr: int32 [R + 1], query tokens before each request; zero-length requests are legal.
        kv_len: int32 or int64 [R], KV tokens of each request, those of this step included.
        page_table: pages of at least R rows; rows past R belong to nodes or to nobody.
        nodes: shared KV ranges given by the caller; None: the planner looks for them itself.

    Raises:
        InvalidInput: a dtype, rank, stride, length or device outside the above.
    """

    qo_indptr: Tensor
    kv_len: Tensor
    page_table: PageTable
    nodes: Nodes | None = None

    def __post_init__(self) -> None:
        require_vector(self.qo_indptr, "qo_indptr", _INT32)
        device = self.qo_indptr.device
        require_vector(self.kv_len, "kv_len", INDEX_DTYPES)
        require_device(self.kv_len, "kv_len", device)
        require_device(self.page_table.entries, "page_table", device)
        requests, rows = self.kv_len.numel(), self.page_table.num_rows
        if self.qo_indptr.numel() != requests + 1:
            rule = f"{requests + 1} elements for {requests} requests in kv_len"
            got, hint = self.qo_indptr.numel(), "an empty batch has qo_indptr [0]"
            raise InvalidInput(contract_message("qo_indptr", rule, got, hint))
        if rows < requests:
            rule = f"at least {requests} rows for {requests} requests"
            hint = "give every request a row"
            raise InvalidInput(contract_message("page_table", rule, rows, hint))
        if self.nodes is None:
            return
        require_device(self.nodes.table_row, "nodes", device)
        own_begin = self.nodes.own_begin
        if own_begin is not None:
            require(
                own_begin.numel() == requests,
                "nodes.own_begin",
                f"{requests} elements for {requests} requests",
                own_begin.numel(),
                "0 for requests outside every node",
            )

    @property
    def num_requests(self) -> int:
        """Number of requests, zero-length ones included."""
        return self.kv_len.numel()
