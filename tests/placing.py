"""Where tensors lie: copies of problems on another device, and tensors at unaligned addresses.

A copy keeps what a kernel could trip over: strides, offsets into storage, K and V in one storage,
and the poison between and around the elements of a view.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from fi_backend import KvCacheView, Nodes, PagedBatch, PageTable
from fi_backend.oracle import Problem

T = TypeVar("T", Nodes, PageTable)


class Mover:
    """Copies tensors to a device, whole storages at a time: views of one storage stay so."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}  # address -> (bytes there, copy)

    def tensor(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            there = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            there.set_(storage, 0, (storage.nbytes(),), (1,))
            self._storages[storage.data_ptr()] = there, there.to(self.device, copy=True)
        copy = self._storages[storage.data_ptr()][1].untyped_storage()
        moved = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return moved.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())

    def optional(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self.tensor(tensor)

    def fields(self, value: T) -> T:
        """A dataclass with all its tensors moved."""
        tensors = {n: self.tensor(t) for n, t in vars(value).items() if isinstance(t, Tensor)}
        return dataclasses.replace(value, **tensors)

    def batch(self, batch: PagedBatch) -> PagedBatch:
        return PagedBatch(
            self.tensor(batch.qo_indptr),
            self.tensor(batch.kv_len),
            self.fields(batch.page_table),
            None if batch.nodes is None else self.fields(batch.nodes),
        )


def to_device(problem: Problem, device: torch.device | str) -> Problem:
    """Return a copy of a problem, all tensors on ``device`` with the same strides and poison."""
    move = Mover(device)
    return dataclasses.replace(
        problem,
        batch=move.batch(problem.batch),
        q=move.tensor(problem.q),
        kv=KvCacheView(move.tensor(problem.kv.k), move.tensor(problem.kv.v)),
        params={
            name: move.tensor(value) if isinstance(value, Tensor) else value
            for name, value in problem.params.items()
        },
        q_scale=move.optional(problem.q_scale),
        k_scale=move.optional(problem.k_scale),
        v_scale=move.optional(problem.v_scale),
    )


def copy_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a copy of one tensor on ``device``, its whole storage with it."""
    return Mover(device).tensor(tensor)


def misplaced(tensor: Tensor, elements: int, widen: int = 0) -> Tensor:
    """Return a copy that starts ``elements`` past an aligned address, NaN all around it.

    Args:
        tensor: floating point.
        elements: offset of the first element.
        widen: elements added between rows of the last dimension, so that their strides are odd too.
    """
    shape = (*tensor.shape[:-1], tensor.shape[-1] + widen)
    room = torch.full((elements + torch.Size(shape).numel(),), torch.nan).to(tensor.dtype)
    copy = room[elements:].view(shape)[..., : tensor.shape[-1]]
    copy.copy_(tensor)
    return copy


def misplace(problem: Problem, q: int, k: int, v: int, widen: int = 0) -> Problem:
    """Return the problem with q, k and v that start so many elements past aligned addresses."""
    return dataclasses.replace(
        problem,
        q=misplaced(problem.q, q, widen),
        kv=KvCacheView(misplaced(problem.kv.k, k, widen), misplaced(problem.kv.v, v, widen)),
    )


def elements_around(tensor: Tensor) -> Tensor:
    """Return every element of a CPU tensor's storage that is not the tensor's own."""
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype).set_(
        storage, 0, (storage.nbytes() // tensor.element_size(),), (1,)
    )
    inside = torch.zeros(whole.shape, dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return whole[~inside]
