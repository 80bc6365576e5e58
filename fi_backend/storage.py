"""Page tables and KV caches: views of the caller's own tensors, never copies.

Every KV arrangement is one model: a pool of pages and, for each request, the pages it uses. Import
these names from ``fi_backend.formats``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fi_backend.errors import require

# Values are shared with kernels/include/fi/core/types.h (DType).
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
}
INDEX_DTYPES = (torch.int32, torch.int64)


def require_tensor(
    tensor: Tensor, argument: str, dtypes: tuple[torch.dtype, ...], ndim: int
) -> None:
    """Raise InvalidInput unless ``tensor`` has one of the dtypes and the given rank."""
    require(
        isinstance(tensor, Tensor), argument, "a tensor", type(tensor).__name__, "pass a tensor"
    )
    require(
        tensor.dtype in dtypes,
        argument,
        " or ".join(str(dtype) for dtype in dtypes),
        tensor.dtype,
        "convert it once, outside the step",
    )
    require(
        tensor.dim() == ndim,
        argument,
        f"{ndim} dimensions",
        f"shape {tuple(tensor.shape)}",
        "reshape it",
    )


def require_vector(tensor: Tensor, argument: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise InvalidInput unless ``tensor`` is one-dimensional, dense and of one of the dtypes."""
    require_tensor(tensor, argument, dtypes, 1)
    require(
        tensor.numel() < 2 or tensor.stride(0) == 1,
        argument,
        "stride 1",
        f"stride {tensor.stride(0)}",
        "call .contiguous()",
    )


def require_device(tensor: Tensor, argument: str, device: torch.device) -> None:
    """Raise InvalidInput unless ``tensor`` lies on ``device``."""
    require(
        tensor.device == device,
        argument,
        f"device {device}",
        tensor.device,
        "keep all tensors of one batch on one device",
    )


class PageTableView(NamedTuple):
    """Addresses and strides of a page table, as kernels/include/fi/attention/page_table.h has them.

    Addresses stay valid as long as the PageTable lives.
    """

    entries: int
    indptr: int
    row_index: int
    page_map: int
    row_stride: int
    entry_stride: int
    page_size: int
    slot_divisor: int
    row_index_is_int64: int
    num_rows: int


@dataclass(frozen=True, eq=False)
class PageTable:
    """Pages of each request, read in place from the framework's own tensor.

    Build one with ``dense`` (vLLM), ``indirect`` (SGLang) or ``csr``. Entries past
    ceil(kv_len / page_size) of a row are stale and are never read.

    Attributes:
        entries: int32 [rows, columns] (dense, indirect) or [nnz] (csr), page ids * slot_divisor.
        page_size: tokens of a page.
        indptr: int32 [num_rows + 1], pages before each row (csr); else None.
        row_index: int32 or int64 [num_rows], row of ``entries`` of each request (indirect); else
            None.
        row_stride: elements between rows of ``entries``.
        entry_stride: elements between the entries of consecutive pages. SGLang's req_to_token has
            one column per token: entry_stride = page_size reads every page's first token.
        slot_divisor: what to divide an entry by to get a page id. SGLang's entries are token slots:
            slot_divisor = page_size.
        page_map: int32 [pages], page id -> page id of another pool (sliding-window pools); or None.
        num_rows: rows that requests and nodes may name.

    Raises:
        InvalidInput: a dtype, rank, stride or device outside the above.
    """

    entries: Tensor
    page_size: int
    indptr: Tensor | None
    row_index: Tensor | None
    row_stride: int
    entry_stride: int
    slot_divisor: int
    page_map: Tensor | None
    num_rows: int

    def __post_init__(self) -> None:
        for name in ("page_size", "entry_stride", "slot_divisor"):
            value = getattr(self, name)
            require(value > 0, name, "a positive count", value, "see PageTable")
        ndim = 1 if self.indptr is not None else 2
        require_tensor(self.entries, "page_table", (torch.int32,), ndim)
        require(
            self.entries.numel() < 2 or self.entries.stride(-1) == 1,
            "page_table",
            "contiguous rows",
            f"strides {self.entries.stride()}",
            "call .contiguous()",
        )
        for tensor, name, dtypes in (
            (self.indptr, "page_table.indptr", (torch.int32,)),
            (self.row_index, "page_table.row_index", INDEX_DTYPES),
            (self.page_map, "page_table.page_map", (torch.int32,)),
        ):
            if tensor is not None:
                require_vector(tensor, name, dtypes)
                require_device(tensor, name, self.entries.device)
        if self.indptr is not None:
            require(
                self.indptr.numel() > 0,
                "page_table.indptr",
                "num_rows + 1 elements",
                "none",
                "an empty table has indptr [0]",
            )

    @classmethod
    def dense(
        cls,
        table: Tensor,
        page_size: int,
        *,
        entry_stride: int = 1,
        slot_divisor: int = 1,
        page_map: Tensor | None = None,
    ) -> PageTable:
        """Return a table whose row r is request r's pages: vLLM's block table.

        Args:
            table: int32 [requests, max_pages] device; rows may be strided.
            page_size: tokens of a page.
            entry_stride: columns between the entries of consecutive pages.
            slot_divisor: entries are page ids times this.
            page_map: int32 [pages] device, or None.
        """
        require_tensor(table, "page_table", (torch.int32,), 2)
        return cls(
            table,
            page_size,
            None,
            None,
            table.stride(0),
            entry_stride,
            slot_divisor,
            page_map,
            table.shape[0],
        )

    @classmethod
    def indirect(
        cls,
        table: Tensor,
        row_index: Tensor,
        page_size: int,
        *,
        entry_stride: int = 1,
        slot_divisor: int = 1,
        page_map: Tensor | None = None,
    ) -> PageTable:
        """Return a table where request r's pages are ``table[row_index[r]]`` (SGLang).

        SGLang's req_to_token has one column per token and token slots as entries; its call is
        ``indirect(req_to_token, req_pool_indices, page, entry_stride=page, slot_divisor=page)``.

        Args:
            table: int32 [rows, columns] device.
            row_index: int32 or int64 [requests] device.
            page_size: tokens of a page.
            entry_stride: columns between the entries of consecutive pages.
            slot_divisor: entries are page ids times this.
            page_map: int32 [pages] device, or None.
        """
        require_tensor(table, "page_table", (torch.int32,), 2)
        require_vector(row_index, "page_table.row_index", INDEX_DTYPES)
        return cls(
            table,
            page_size,
            None,
            row_index,
            table.stride(0),
            entry_stride,
            slot_divisor,
            page_map,
            row_index.numel(),
        )

    @classmethod
    def csr(
        cls, indptr: Tensor, indices: Tensor, page_size: int, *, page_map: Tensor | None = None
    ) -> PageTable:
        """Return a table whose row r is ``indices[indptr[r]:indptr[r + 1]]``.

        Args:
            indptr: int32 [rows + 1] device, counts pages.
            indices: int32 [nnz] device, page ids.
            page_size: tokens of a page.
            page_map: int32 [pages] device, or None.
        """
        require_vector(indptr, "page_table.indptr", (torch.int32,))
        return cls(indices, page_size, indptr, None, 0, 1, 1, page_map, indptr.numel() - 1)

    def view(self) -> PageTableView:
        """Return the addresses and strides that the kernels take."""
        index = self.row_index
        return PageTableView(
            self.entries.data_ptr(),
            0 if self.indptr is None else self.indptr.data_ptr(),
            0 if index is None else index.data_ptr(),
            0 if self.page_map is None else self.page_map.data_ptr(),
            self.row_stride,
            self.entry_stride,
            self.page_size,
            self.slot_divisor,
            int(index is not None and index.dtype == torch.int64),
            self.num_rows,
        )


@dataclass(frozen=True, eq=False)
class KvCacheView:
    """K and V of one layer as pages, read in place through strides.

    Attributes:
        k: [num_pages, page_size, num_kv_heads, head_dim_qk] float32, float16, bfloat16 or
            float8_e4m3fn, any strides but 1 in the last dimension.
        v: [num_pages, page_size, num_kv_heads, head_dim_vo], dtype and device of k; may alias k's
            storage (stacked or packed caches).

    Raises:
        InvalidInput: dtype, rank, stride, device, or K and V that disagree.
    """

    k: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        for tensor, name in ((self.k, "k"), (self.v, "v")):
            require_tensor(tensor, name, tuple(DTYPE_CODES), 4)
            require(
                tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or tensor.numel() == 0,
                name,
                "stride 1 in the head dimension",
                f"strides {tensor.stride()}",
                "permute the cache, not the head dimension",
            )
        require(
            self.k.shape[:-1] == self.v.shape[:-1],
            "v",
            f"the pages, tokens and heads of k {tuple(self.k.shape[:-1])}",
            tuple(self.v.shape[:-1]),
            "pass both halves of one cache",
        )
        require(
            self.k.dtype == self.v.dtype,
            "v",
            f"dtype {self.k.dtype} of k",
            self.v.dtype,
            "store K and V in one dtype",
        )
        require_device(self.v, "v", self.k.device)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.k.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[1]

    @classmethod
    def nhd(cls, k: Tensor, v: Tensor) -> KvCacheView:
        """View k, v: [num_pages, page_size, num_kv_heads, head_dim]."""
        return cls(k, v)

    @classmethod
    def hnd(cls, k: Tensor, v: Tensor) -> KvCacheView:
        """View k, v: [num_pages, num_kv_heads, page_size, head_dim]."""
        require_tensor(k, "k", tuple(DTYPE_CODES), 4)
        require_tensor(v, "v", tuple(DTYPE_CODES), 4)
        return cls(k.transpose(1, 2), v.transpose(1, 2))

    @classmethod
    def stacked(cls, kv: Tensor) -> KvCacheView:
        """View kv: [num_pages, 2, page_size, num_kv_heads, head_dim] (vLLM 0.25)."""
        require_tensor(kv, "kv", tuple(DTYPE_CODES), 5)
        require(
            kv.shape[1] == 2,
            "kv",
            "2 in dimension 1 (K, V)",
            f"shape {tuple(kv.shape)}",
            "use nhd() for K and V apart",
        )
        return cls(kv[:, 0], kv[:, 1])

    @classmethod
    def packed(cls, kv: Tensor, head_dim_k: int) -> KvCacheView:
        """View kv: [num_pages, page_size, num_kv_heads, head_dim_k + head_dim_v] (vLLM >= 0.32).

        vLLM hands out [num_pages, heads, page_size, C]: transpose(1, 2) it first.
        """
        require_tensor(kv, "kv", tuple(DTYPE_CODES), 4)
        require(
            0 < head_dim_k < kv.shape[-1],
            "head_dim_k",
            f"between 1 and {kv.shape[-1] - 1}",
            head_dim_k,
            "K lies before V in the last dimension",
        )
        return cls(kv[..., :head_dim_k], kv[..., head_dim_k:])

    @classmethod
    def slots(cls, k: Tensor, v: Tensor, page_size: int) -> KvCacheView:
        """View token slots k, v: [num_slots, num_kv_heads, head_dim] as pages (SGLang)."""
        for tensor, name in ((k, "k"), (v, "v")):
            require_tensor(tensor, name, tuple(DTYPE_CODES), 3)
            require(
                page_size > 0 and tensor.shape[0] % page_size == 0,
                name,
                f"a multiple of page_size={page_size} slots",
                tensor.shape[0],
                "pass whole pages",
            )
        return cls(_to_pages(k, page_size), _to_pages(v, page_size))

    @classmethod
    def ragged(cls, k: Tensor, v: Tensor) -> KvCacheView:
        """View contiguous k, v: [num_tokens, num_kv_heads, head_dim] as pages of one token."""
        require_tensor(k, "k", tuple(DTYPE_CODES), 3)
        require_tensor(v, "v", tuple(DTYPE_CODES), 3)
        return cls(k.unsqueeze(1), v.unsqueeze(1))


def _to_pages(slots: Tensor, page_size: int) -> Tensor:
    return slots.view(slots.shape[0] // page_size, page_size, *slots.shape[1:])
