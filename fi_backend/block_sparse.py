"""Block-sparse attention and composable formats: matrices over query and KV tokens as a batch.

A matrix is rows of query tokens by columns of KV tokens, stored as blocks (BSR). A composable
format is a list of matrices over the same query tokens: their blocks are disjoint, their partial
results merge exactly, and one launch computes them all. A row block that several finer row blocks
share is read once for all of them.

Matrices on a GPU are laid out on the host: building a batch copies their indices there and back and
waits for the device. Build it once per pattern.

Positions are those of the composed rows, not columns of a matrix, so the layer class is ``FULL``
(no causal order, no window); an element mask goes through ``element_mask`` and a mask variant.

Source: composable formats of FlashInfer (Ye et al., MLSys 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fi_backend.checks import Int64Array, as_ints, refuse_first
from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.formats import Nodes, PagedBatch, PageTable
from fi_backend.host_batch import nodes_to, to_device, to_host
from fi_backend.storage import require_vector


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """One block-sparse matrix over query tokens (rows) and KV tokens (columns).

    Attributes:
        block_rows: query tokens of each row block: an int for all, or int32 [row blocks].
        block_cols: KV tokens of each column block: an int for all, or int32 [column blocks].
        indptr: int32 [row blocks + 1] device, blocks before each row block; the batch will lie on
            its device.
        indices: int32 [nnz], column block of each block.
        num_rows: query tokens; None: whole row blocks. The last row block may be cut short.
        num_cols: KV tokens; None: as many whole column blocks as ``indices`` names. The last
            column block may be cut short.

    Raises:
        InvalidInput: dtypes, sizes or indices that make no matrix.
    """

    block_rows: int | Tensor
    block_cols: int | Tensor
    indptr: Tensor
    indices: Tensor
    num_rows: int | None = None
    num_cols: int | None = None

    def __post_init__(self) -> None:
        require_vector(self.indptr, "indptr", (torch.int32,))
        require_vector(self.indices, "indices", (torch.int32,))
        indptr, indices = as_ints(self.indptr), as_ints(self.indices)
        require(
            indptr.size > 0
            and indptr[0] == 0
            and bool((np.diff(indptr) >= 0).all())
            and indptr[-1] == indices.size,
            "indptr",
            f"rising counts from 0 to {indices.size}, the length of indices",
            indptr.tolist(),
            "count the blocks before each row block",
        )
        _check_bounds("block_rows", self.row_bounds(), self.block_rows, self.num_rows)
        columns = self.col_bounds()
        _check_bounds("block_cols", columns, self.block_cols, self.num_cols)
        require(
            self.row_bounds().size == indptr.size,
            "block_rows",
            f"{indptr.size - 1} sizes, one per row block of indptr",
            self.row_bounds().size - 1,
            "indptr has one element more than there are row blocks",
        )
        count = columns.size - 1
        refuse_first(
            (indices < 0) | (indices >= count),
            lambda i: (
                "indices",
                f"column blocks in [0, {count})",
                f"{indices[i]} at position {i}",
                "columns are counted in blocks, not tokens",
            ),
        )

    def row_bounds(self) -> Int64Array:
        """Return the first query token of each row block, and their number at the end."""
        return _bounds(self.block_rows, self.indptr.numel() - 1, self.num_rows)

    def col_bounds(self) -> Int64Array:
        """Return the first KV token of each column block, and their number at the end."""
        if self.num_cols is not None and isinstance(self.block_cols, int):
            count = -(-self.num_cols // max(self.block_cols, 1))
        else:
            count = int(self.indices.max()) + 1 if self.indices.numel() else 0
        return _bounds(self.block_cols, count, self.num_cols)


def _bounds(sizes: int | Tensor, count: int, total: int | None) -> Int64Array:
    if isinstance(sizes, int):
        bounds = np.arange(count + 1, dtype=np.int64) * sizes
        if total is not None:
            bounds[-1] = total
    else:
        bounds = np.concatenate([[0], np.cumsum(as_ints(sizes))])
    return bounds


def _check_bounds(
    argument: str, bounds: Int64Array, sizes: int | Tensor, total: int | None
) -> None:
    blocks = np.diff(bounds)
    largest = sizes if isinstance(sizes, int) else blocks.max(initial=1)
    require(
        bool((blocks > 0).all())
        and bool((blocks <= largest).all())
        and total in (None, bounds[-1]),
        argument,
        "sizes of at least one token that add up to the matrix"
        + ("" if total is None else f" of {total}"),
        blocks.tolist(),
        "only the last block may be cut short",
    )


def block_sparse(
    block_rows: int | Tensor,
    block_cols: int | Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    num_rows: int | None = None,
    num_cols: int | None = None,
    page_size: int | None = None,
) -> PagedBatch:
    """Return the batch of one block-sparse matrix: every row block is a request.

    Blocks of one column (``block_cols=1``) are vector-sparse attention. View the K and V of the
    columns as ``KvCacheView.slots(k, v, batch.page_table.page_size)``.

    Args:
        block_rows: as in BlockSparse.
        block_cols: as in BlockSparse.
        indptr: as in BlockSparse.
        indices: as in BlockSparse.
        num_rows: as in BlockSparse.
        num_cols: as in BlockSparse.
        page_size: tokens of a page; None: the largest that divides every column block.

    Raises:
        InvalidInput: no matrix, a block named twice, or a page size that cuts blocks.
    """
    matrix = BlockSparse(block_rows, block_cols, indptr, indices, num_rows, num_cols)
    return compose([matrix], page_size=page_size)


def compose(formats: Sequence[BlockSparse], *, page_size: int | None = None) -> PagedBatch:
    """Return the batch of a composable format: a list of matrices over the same query tokens.

    Requests are the common refinement of all row blocks. A row block of several requests becomes a
    node, if the nodes so far cover equally many tokens of each of them (nested row blocks always
    do); any other is read by each of its requests. Order the matrices from coarse to fine.

    Args:
        formats: at least one matrix, disjoint, with equal numbers of rows.
        page_size: tokens of a page; None: the largest that divides every column block.

    Raises:
        InvalidInput: none given, different rows, overlapping blocks, or a page size that cuts
            blocks.
    """
    require(len(formats) > 0, "formats", "at least one matrix", "none", "pass a BlockSparse")
    rows = [f.row_bounds() for f in formats]
    for i, bounds in enumerate(rows):
        require(
            bounds[-1] == rows[0][-1],
            f"formats[{i}]",
            f"{rows[0][-1]} rows, as in formats[0]",
            int(bounds[-1]),
            "all matrices are over the same query tokens",
        )
    page_size = _page_size(formats, page_size)
    qo_indptr = np.unique(np.concatenate(rows))
    blocks = [_Blocks.of(f, page_size) for f in formats]
    # block[m][r]: row block of matrix m that request r lies in.
    block = [np.searchsorted(b, qo_indptr[:-1], side="right") - 1 for b in rows]
    nodes, in_node = _place_nodes(blocks, block, page_size)
    segments = sorted(
        (request, not in_node[m][request], m)
        for m in range(len(formats))
        for request in range(qo_indptr.size - 1)
    )
    request = np.array([s[0] for s in segments], dtype=np.int64)
    pieces = [blocks[m].pages_of(int(block[m][r])) for r, _, m in segments]
    pages = np.concatenate([*pieces, np.zeros(0, dtype=np.int64)])
    counts = np.bincount(request, [p.size for p in pieces], qo_indptr.size - 1).astype(np.int64)
    _check_disjoint(pages, counts)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    batch = PagedBatch(
        _tensor(qo_indptr),
        _tensor(counts * page_size),
        PageTable.csr(_tensor(indptr), _tensor(pages), page_size),
        nodes,
    )
    return to_device(batch, formats[0].indptr.device)


@dataclass(frozen=True)
class _Blocks:
    """Pages of each row block of one matrix, as CSR."""

    indptr: Int64Array
    pages: Int64Array

    @classmethod
    def of(cls, matrix: BlockSparse, page_size: int) -> _Blocks:
        """Expand the column blocks of a matrix to pages."""
        columns, indices = matrix.col_bounds() // page_size, as_ints(matrix.indices)
        first, count = columns[indices], np.diff(columns)[indices]
        before = np.concatenate([[0], np.cumsum(count)])
        pages = np.arange(before[-1]) + np.repeat(first - before[:-1], count)
        return cls(before[as_ints(matrix.indptr)], pages)

    def pages_of(self, block: int) -> Int64Array:
        return self.pages[self.indptr[block] : self.indptr[block + 1]]


def _page_size(formats: Sequence[BlockSparse], page_size: int | None) -> int:
    largest = int(np.gcd.reduce(np.concatenate([f.col_bounds() for f in formats])))
    if page_size is None:
        return max(largest, 1)
    require(
        page_size > 0 and largest % page_size == 0,
        "page_size",
        f"a divisor of {largest}, which divides all column blocks",
        page_size,
        "view the cache with smaller pages",
    )
    return page_size


def _place_nodes(
    blocks: Sequence[_Blocks], block: Sequence[Int64Array], page_size: int
) -> tuple[Nodes | None, list[npt.NDArray[np.bool_]]]:
    """Row blocks that become nodes, and for each matrix which requests get it through one."""
    num_requests = block[0].size
    covered = np.zeros(num_requests, dtype=np.int64)
    in_node = [np.zeros(num_requests, dtype=np.bool_) for _ in blocks]
    groups: list[tuple[Sequence[int], int, int]] = []
    for m, matrix in enumerate(blocks):
        for b in range(matrix.indptr.size - 1):
            members = np.flatnonzero(block[m] == b)
            size = matrix.pages_of(b).size * page_size
            if members.size < 2 or size == 0 or np.unique(covered[members]).size > 1:
                continue
            begin = int(covered[members[0]])
            groups.append((members.tolist(), begin, begin + size))
            covered[members] += size
            in_node[m][members] = True
    return (make_nodes(groups, num_requests) if groups else None), in_node


def make_nodes(groups: Sequence[tuple[Sequence[int], int, int]], num_requests: int) -> Nodes:
    """Return Nodes of (members, kv_begin, kv_end), read through the first member's row.

    Args:
        groups: request indices and the KV range (tokens) that they share. Ranges of each request
            must cover a prefix without gaps or overlaps.
        num_requests: of the batch.
    """
    ordered = sorted(groups, key=lambda group: group[1])
    own_begin = np.zeros(num_requests, dtype=np.int64)
    for members, _, end in ordered:
        own_begin[list(members)] = end
    counts = [len(members) for members, _, _ in ordered]
    return Nodes(
        table_row=_tensor([members[0] for members, _, _ in ordered]),
        kv_begin=_tensor([begin for _, begin, _ in ordered]),
        kv_end=_tensor([end for _, _, end in ordered]),
        member_ptr=_tensor(np.concatenate([[0], np.cumsum(counts)])),
        members=_tensor([r for members, _, _ in ordered for r in members]),
        own_begin=_tensor(own_begin),
    )


def shared_prefix(
    batch: PagedBatch, groups: Sequence[tuple[Sequence[int], int, int]]
) -> PagedBatch:
    """Return the batch with explicitly shared KV ranges, any number of groups and levels.

    Example: requests 0, 1, 2 share a 512-token system prompt and 0, 1 also a 256-token document:
    ``shared_prefix(batch, [((0, 1, 2), 0, 512), ((0, 1), 512, 768)])``.

    Args:
        batch: without nodes.
        groups: (members, kv_begin, kv_end): request indices and the KV range (tokens) they share,
            read through the first member's row of the page table. The ranges of each request must
            cover a prefix of it without gaps or overlaps; ``plan`` checks it.

    Raises:
        InvalidInput: a group without members or with requests outside the batch.
    """
    for i, (members, _, _) in enumerate(groups):
        require(
            len(members) > 0 and all(0 <= r < batch.num_requests for r in members),
            f"groups[{i}]",
            f"members among requests [0, {batch.num_requests})",
            list(members),
            "name the requests that share the range",
        )
    nodes = make_nodes(groups, batch.num_requests)
    return replace(batch, nodes=nodes_to(nodes, batch.qo_indptr.device))


def element_mask(batch: PagedBatch, mask: Tensor) -> dict[str, Tensor]:
    """Return the parameters of ``variants.shipped.custom_mask`` that mask single elements.

    Args:
        batch: what ``block_sparse`` or ``compose`` returned.
        mask: bool [num_rows, num_cols], true where a query token sees a KV token.

    Returns:
        ``mask_bits``: uint8 [num_rows, ceil(longest kv_len / 8)] on the batch's device, the mask in
        the positions of the composed rows; ``mask_offset``: int32 [requests].

    Raises:
        InvalidInput: the batch is not a composed one, or the mask has other sizes.
    """
    device, batch = batch.qo_indptr.device, to_host(batch)
    table, qo_indptr, mask = batch.page_table, as_ints(batch.qo_indptr), mask.cpu()
    if table.indptr is None:
        raise InvalidInput(
            contract_message("batch", "a CSR page table", "another", "pass what compose() returned")
        )
    columns = as_ints(table.entries)[:, None] * table.page_size + np.arange(table.page_size)
    num_cols = int(columns.max()) + 1 if columns.size else 0
    require(
        mask.dtype == torch.bool
        and mask.dim() == 2
        and mask.shape[0] == qo_indptr[-1]
        and mask.shape[1] >= num_cols,
        "mask",
        f"bool [{qo_indptr[-1]}, {num_cols} or more]",
        f"{mask.dtype} {list(mask.shape)}",
        "one element per query token and KV token",
    )
    longest = int(batch.kv_len.max()) if batch.num_requests else 0
    out = np.zeros((mask.shape[0], longest), dtype=np.bool_)
    for r, (first, last) in enumerate(pairwise(as_ints(table.indptr).tolist())):
        rows, seen = slice(qo_indptr[r], qo_indptr[r + 1]), columns[first:last].ravel()
        out[rows, : seen.size] = mask.numpy()[rows, seen]
    bits = torch.from_numpy(np.packbits(out, axis=1, bitorder="little"))
    return {"mask_bits": bits.to(device), "mask_offset": batch.qo_indptr[:-1].to(device)}


def _check_disjoint(pages: Int64Array, counts: Int64Array) -> None:
    request = np.repeat(np.arange(counts.size), counts)
    order = np.lexsort((pages, request))
    request, pages = request[order], pages[order]
    twice = (request[1:] == request[:-1]) & (pages[1:] == pages[:-1])
    refuse_first(
        twice,
        lambda i: (
            "formats",
            "disjoint blocks",
            f"page {pages[i]} twice for request {request[i]}",
            "drop the block from the finer matrix",
        ),
    )


def _tensor(values: npt.ArrayLike) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
