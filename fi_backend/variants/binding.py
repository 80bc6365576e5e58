"""From a variant and the values of its parameters to what its compiled functions read.

The same on every device: addresses and strides in the memory of the kernel, numbers by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch

from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.variants.evaluate import Params
from fi_backend.variants.frontend import Function
from fi_backend.variants.ir import Const, Input, Load, walk
from fi_backend.variants.params import Scalar
from fi_backend.variants.variant import Variant

# (data address, strides in elements, scalar): fi::VariantParam.
ParamTuple: TypeAlias = tuple[int, tuple[int, int, int], float]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Extent:
    """A tensor axis that is subscripted by a bare word: it must be as long as the word's range."""

    param: str
    axis: int
    word: str


@dataclass(frozen=True)
class BoundParams:
    """Checked values of a variant's parameters.

    Attributes:
        functions: what each function's VariantParam array holds, in the order of
            ``Variant.all_functions``.
        names: the parameters' public names, in the same places.
        sinks_addr: float32 [num_qo_heads], 0: none.
        angles: float32 [slots, rotary_dim] of the variant's rotation; None: none.
        tensors: what the addresses point into; keep it alive until the kernel has run.
    """

    functions: tuple[tuple[ParamTuple, ...], ...]
    names: tuple[tuple[str, ...], ...]
    sinks_addr: int
    angles: torch.Tensor | None
    tensors: tuple[torch.Tensor, ...]


def bind_params(
    variant: Variant,
    params: Params | None = None,
    sizes: Mapping[str, int] | None = None,
    device: torch.device = CPU,
) -> BoundParams:
    """Check the parameters of one call and return them as kernels take them.

    Args:
        variant: any variant.
        params: values of its open parameters by name: numbers, and tensors of any strides.
        sizes: how many values the words ``q_head``, ``token``, ``request`` (and any other) take
            in this call; tensors subscripted by such a word are checked against it.
        device: where the kernel runs.

    Raises:
        InvalidInput: a parameter is missing, unknown, of the wrong kind, too small or elsewhere.
    """
    sizes = sizes or {}
    values = variant.values(params)
    tensors = {name: v for name, v in values.items() if isinstance(v, torch.Tensor)}
    where = "a CPU tensor" if device.type == "cpu" else f"a tensor on {device}"
    for name, tensor in tensors.items():
        hint = "move it to the device of q"
        require(tensor.device == device, f"params[{name!r}]", where, tensor.device, hint)
    functions = tuple(variant.all_functions())
    for function in functions:
        for extent in extents(function):
            _require_extent(extent, tensors[extent.param].shape[extent.axis], sizes)
    sinks_addr = 0
    if variant.sinks is not None:
        sinks = tensors[variant.sinks]
        name = f"params[{variant.sinks!r}]"
        require(sinks.is_contiguous(), name, "a contiguous tensor", sinks.stride(), "copy it once")
        _require_extent(Extent(variant.sinks, 0, "q_head"), sinks.shape[0], sizes)
        sinks_addr = sinks.data_ptr()
    return BoundParams(
        tuple(tuple(_param_tuple(values[p.name]) for p in f.params) for f in functions),
        tuple(tuple(p.name for p in f.params) for f in functions),
        sinks_addr,
        None if variant.rotation is None else tensors[variant.rotation.cos_sin],
        tuple(tensors.values()),
    )


@lru_cache(maxsize=1024)
def extents(function: Function) -> tuple[Extent, ...]:
    """Return the tensor axes whose least length follows from how the function reads them."""
    names = {p.argument: p.name for p in function.params if not isinstance(p, Scalar)}
    return tuple(
        Extent(names[load.argument], axis, index.name)
        for load in walk(function.result)
        if isinstance(load, Load) and isinstance(load.guard, Const) and load.guard.value
        for axis, index in enumerate(load.indices)
        if isinstance(index, Input)
    )


def _require_extent(extent: Extent, length: int, sizes: Mapping[str, int]) -> None:
    needed = sizes.get(extent.word, 0)
    if length < needed:
        rule = f"at least {needed} elements along axis {extent.axis}, one per {extent.word}"
        hint = f"{extent.word} runs from 0 to {needed - 1} in this call"
        raise InvalidInput(contract_message(f"params[{extent.param!r}]", rule, length, hint))


def _param_tuple(value: torch.Tensor | float | int) -> ParamTuple:
    if not isinstance(value, torch.Tensor):
        return 0, (0, 0, 0), float(value)
    padded = (*value.stride(), 0, 0)
    return value.data_ptr(), (padded[0], padded[1], padded[2]), 0.0
