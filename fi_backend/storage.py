"""Page tables and KV caches: views of the caller's own tensors, never copies.

Every KV arrangement is one model: a pool of pages and, for each request, the pages it uses. Import
these names from ``fi_backend.formats``. Engines build them in every step: a check writes its
sentence only when it fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fi_backend.errors import InvalidInput, contract_message, require

# Values are shared with kernels/include/fi/core/types.h (DType).
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
}
INDEX_DTYPES = (torch.int32, torch.int64)
_KV_DTYPES = tuple(DTYPE_CODES)
_INT32 = (torch.int32,)


def require_tensor(
    tensor: Tensor, argument: str, dtypes: tuple[torch.dtype, ...], ndim: int
) -> None:
    """Raise InvalidInput unless ``tensor`` has one of the dtypes and the given rank."""
    if isinstance(tensor, Tensor) and tensor.dtype in dtypes and tensor.dim() == ndim:
        return
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
    if tensor.stride(0) != 1 and tensor.numel() > 1:
        got = f"stride {tensor.stride(0)}"
        raise InvalidInput(contract_message(argument, "stride 1", got, "call .contiguous()"))


def require_device(tensor: Tensor, argument: str, device: torch.device) -> None:
    """Raise InvalidInput unless ``tensor`` lies on ``device``."""
    if tensor.device != device:
        hint = "keep all tensors of one batch on one device"
        raise InvalidInput(contract_message(argument, f"device {device}", tensor.device, hint))


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
        if min(self.page_size, self.entry_stride, self.slot_divisor) < 1:
            for name in ("page_size", "entry_stride", "slot_divisor"):
                value = getattr(self, name)
                require(value > 0, name, "a positive count", value, "see PageTable")
        entries, indptr = self.entries, self.indptr
        require_tensor(entries, "page_table", _INT32, 2 if indptr is None else 1)
        if entries.stride(-1) != 1 and entries.numel() > 1:
            got, hint = f"strides {entries.stride()}", "call .contiguous()"
            raise InvalidInput(contract_message("page_table", "contiguous rows", got, hint))
        if indptr is not None:
            self._check_vector(indptr, "page_table.indptr", _INT32)
            require(
                indptr.numel() > 0,
                "page_table.indptr",
                "num_rows + 1 elements",
                "none",
                "an empty table has indptr [0]",
            )
        if self.row_index is not None:
            self._check_vector(self.row_index, "page_table.row_index", INDEX_DTYPES)
        if self.page_map is not None:
            self._check_vector(self.page_map, "page_table.page_map", _INT32)

    def _check_vector(self, tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
        require_vector(tensor, name, dtypes)
        require_device(tensor, name, self.entries.device)

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
        require_tensor(table, "page_table", _INT32, 2)
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
        require_tensor(table, "page_table", _INT32, 2)
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
        require_vector(indptr, "page_table.indptr", _INT32)
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
        k, v = self.k, self.v
        for tensor, name in ((k, "k"), (v, "v")):
            require_tensor(tensor, name, _KV_DTYPES, 4)
            if tensor.stride(-1) != 1 and tensor.shape[-1] != 1 and tensor.numel() > 0:
                rule, got = "stride 1 in the head dimension", f"strides {tensor.stride()}"
                hint = "permute the cache, not the head dimension"
                raise InvalidInput(contract_message(name, rule, got, hint))
        of_k, of_v = k.shape[:-1], v.shape[:-1]
        if of_k != of_v:
            rule = f"the pages, tokens and heads of k {tuple(of_k)}"
            hint = "pass both halves of one cache"
            raise InvalidInput(contract_message("v", rule, tuple(of_v), hint))
        if k.dtype != v.dtype:
            rule, hint = f"dtype {k.dtype} of k", "store K and V in one dtype"
            raise InvalidInput(contract_message("v", rule, v.dtype, hint))
        require_device(v, "v", k.device)

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
        require_tensor(k, "k", _KV_DTYPES, 4)
        require_tensor(v, "v", _KV_DTYPES, 4)
        return cls(k.transpose(1, 2), v.transpose(1, 2))

    @classmethod
    def stacked(cls, kv: Tensor) -> KvCacheView:
        """View kv: [num_pages, 2, page_size, num_kv_heads, head_dim] (vLLM 0.25)."""
        require_tensor(kv, "kv", _KV_DTYPES, 5)
        if kv.shape[1] != 2:
            rule, got = "2 in dimension 1 (K, V)", f"shape {tuple(kv.shape)}"
            raise InvalidInput(contract_message("kv", rule, got, "use nhd() for K and V apart"))
        return cls(kv[:, 0], kv[:, 1])

    @classmethod
    def packed(cls, kv: Tensor, head_dim_k: int) -> KvCacheView:
        """View kv: [num_pages, page_size, num_kv_heads, head_dim_k + head_dim_v] (vLLM >= 0.32).

        vLLM hands out [num_pages, heads, page_size, C]: transpose(1, 2) it first.
        """
        require_tensor(kv, "kv", _KV_DTYPES, 4)
        if not 0 < head_dim_k < kv.shape[-1]:
            rule = f"between 1 and {kv.shape[-1] - 1}"
            hint = "K lies before V in the last dimension"
            raise InvalidInput(contract_message("head_dim_k", rule, head_dim_k, hint))
        return cls(kv[..., :head_dim_k], kv[..., head_dim_k:])

    @classmethod
    def slots(cls, k: Tensor, v: Tensor, page_size: int) -> KvCacheView:
        """View token slots k, v: [num_slots, num_kv_heads, head_dim] as pages (SGLang)."""
        for tensor, name in ((k, "k"), (v, "v")):
            require_tensor(tensor, name, _KV_DTYPES, 3)
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
        require_tensor(k, "k", _KV_DTYPES, 3)
        require_tensor(v, "v", _KV_DTYPES, 3)
        return cls(k.unsqueeze(1), v.unsqueeze(1))


def _to_pages(slots: Tensor, page_size: int) -> Tensor:
    return slots.view(slots.shape[0] // page_size, page_size, *slots.shape[1:])
