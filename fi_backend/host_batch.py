"""Batches moved between host and device, for what cannot be done where they are.

Copies from a device synchronise with it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fi_backend.formats import Nodes, PagedBatch, PageTable

CPU = torch.device("cpu")


def to_host(batch: PagedBatch, *, page_ids: bool = True) -> PagedBatch:
    """Return a batch with CPU tensors.

    Args:
        batch: on any device; one on the CPU is returned as it is.
        page_ids: False: leave the table's entries undefined, for planning reads lengths alone and a
            table may hold millions of entries.
    """
    if batch.qo_indptr.device == CPU:
        return batch
    entries = batch.page_table.entries
    if page_ids:
        return _move(batch, entries.cpu(), CPU)
    return _move(batch, torch.empty(entries.shape, dtype=entries.dtype, device=CPU), CPU)


def to_device(batch: PagedBatch, device: torch.device) -> PagedBatch:
    """Return a batch of CPU tensors on a device."""
    if device == CPU:
        return batch
    return _move(batch, batch.page_table.entries.to(device), device)


def _move(batch: PagedBatch, entries: Tensor, device: torch.device) -> PagedBatch:
    table, nodes = batch.page_table, batch.nodes
    return PagedBatch(
        batch.qo_indptr.to(device),
        batch.kv_len.to(device),
        _move_table(table, entries, device),
        None if nodes is None else nodes_to(nodes, device),
    )


def _move_table(table: PageTable, entries: Tensor, device: torch.device) -> PageTable:
    return replace(
        table,
        entries=entries,
        indptr=_moved(table.indptr, device),
        row_index=_moved(table.row_index, device),
        page_map=_moved(table.page_map, device),
        # Rows with gaps between them lose the gaps.
        row_stride=0 if table.indptr is not None else entries.stride(0),
    )


def nodes_to(nodes: Nodes, device: torch.device) -> Nodes:
    """Return the nodes on a device; themselves if they lie there."""
    return Nodes(
        nodes.table_row.to(device),
        nodes.kv_begin.to(device),
        nodes.kv_end.to(device),
        nodes.member_ptr.to(device),
        nodes.members.to(device),
        _moved(nodes.own_begin, device),
    )


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
