"""The oracle: a variant function's expression computed with torch.

Broadcasts over the shapes of the context, so that one call covers all (query, KV) pairs, and
computes floats in the dtype of the logits: fp64 logits give an fp64 oracle.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fi_backend.errors import InvalidInput, contract_message
from fi_backend.variants.frontend import Function
from fi_backend.variants.ir import Const, Input, Load, Node, Op, ScalarRead, Type, walk
from fi_backend.variants.ops import meaning
from fi_backend.variants.params import FLOAT_WORDS, Scalar

Context = Mapping[str, Tensor | int | float]
Params = Mapping[str, Tensor | float | int]


def evaluate(function: Function, context: Context, params: Params, dtype: torch.dtype) -> Tensor:
    """Return the function's value for every element of the broadcast context.

    Args:
        function: what to compute.
        context: words of the vocabulary by name: integer tensors or ints; ``logit`` or ``out``.
        params: values of the unbound parameters, by their public names.
        dtype: of floats, float32 or float64.

    Raises:
        InvalidInput: a word or parameter is missing, or a subscript lies outside its tensor.
    """
    environment = _Environment(function, context, params, dtype)
    values: dict[int, Tensor] = {}
    for node in walk(function.result):
        values[id(node)] = environment.value(node, values)
    return values[id(function.result)]


class _Environment:
    def __init__(
        self, function: Function, context: Context, params: Params, dtype: torch.dtype
    ) -> None:
        self._context = context
        self._dtype = dtype
        self._params: dict[str, Tensor | float | int] = {}
        for param in function.params:
            if isinstance(param, Scalar) and param.value is not None:
                self._params[param.argument] = param.value
            else:
                self._params[param.argument] = param.checked(_get(params, param.name, "params"))
        tensors = [v for v in (*context.values(), *params.values()) if isinstance(v, Tensor)]
        self._device = tensors[0].device if tensors else torch.device("cpu")

    def _tensor(self, value: Tensor | float | int | bool, kind: Type) -> Tensor:
        dtype = {Type.BOOL: torch.bool, Type.I32: torch.int32, Type.F32: self._dtype}[kind]
        return torch.as_tensor(value, device=self._device).to(dtype)

    def value(self, node: Node, values: Mapping[int, Tensor]) -> Tensor:
        if isinstance(node, Const):
            return self._tensor(node.value, node.type)
        if isinstance(node, Input):
            word = _get(self._context, node.name, "context")
            if isinstance(word, Tensor) and (node.name in FLOAT_WORDS) != word.is_floating_point():
                rule = "floats" if node.name in FLOAT_WORDS else "integers"
                raise InvalidInput(
                    contract_message(f"context[{node.name!r}]", rule, word.dtype, "convert it")
                )
            return self._tensor(word, node.type)
        if isinstance(node, ScalarRead):
            number = self._params[node.argument]
            if node.type is Type.F32:  # kernels see the fp32 value
                number = torch.as_tensor(number, dtype=torch.float32)
            return self._tensor(number, node.type)
        if isinstance(node, Load):
            return self._load(node, values)
        assert isinstance(node, Op)
        args = [values[id(arg)] for arg in node.args]
        if node.name == "to_f32":
            return args[0].to(self._dtype)
        return meaning(node.name, node.args[-1].type).on_tensors(*args)

    def _load(self, node: Load, values: Mapping[int, Tensor]) -> Tensor:
        tensor = self._params[node.argument]
        assert isinstance(tensor, Tensor)
        guard = values[id(node.guard)]
        indices = []
        for axis, index_node in enumerate(node.indices):
            index = torch.where(guard, values[id(index_node)], 0).long()
            size = tensor.shape[axis]
            outside = index[guard.expand_as(index) & ((index < 0) | (index >= size))]
            if outside.numel():
                raise InvalidInput(
                    contract_message(
                        f"params[{node.argument!r}]",
                        f"subscripts of axis {axis} in [0, {size})",
                        int(outside[0]),
                        "pass a larger tensor, or guard the read with `where` or `and`",
                    )
                )
            indices.append(index)
        if tensor.numel() == 0:
            tensor = tensor.new_zeros([1] * tensor.ndim)  # no element is wanted
        element = tensor[tuple(indices)]
        return torch.where(guard, self._tensor(element, node.type), self._tensor(0, node.type))


def _get(values: Mapping[str, Tensor | float | int], name: str, where: str) -> Tensor | float | int:
    if name not in values:
        given = ", ".join(values) or "nothing"
        hint = f"pass a value for {name!r}"
        raise InvalidInput(contract_message(where, f"an entry {name!r}", given, hint))
    return values[name]
