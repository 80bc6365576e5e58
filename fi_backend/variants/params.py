"""Parameters that a variant declares: numbers and tensors its functions read by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.variants.ir import Type, fits_i32

# Element type in printed text, and the type a function sees.
ELEMENTS: dict[torch.dtype, tuple[str, Type]] = {
    torch.float32: ("float", Type.F32),
    torch.int32: ("int32_t", Type.I32),
    torch.int64: ("int64_t", Type.I32),
    torch.uint8: ("uint8_t", Type.I32),
    torch.bool: ("bool", Type.BOOL),
}
MAX_NDIM = 3

# Words that every function may take as an argument, by what it is asked for.
POSITION_WORDS = ("q_pos", "q_len", "kv_len", "q_head", "kv_head", "token", "request")
VOCABULARY: dict[str, tuple[str, ...]] = {
    "logits": ("logit", "kv_pos", *POSITION_WORDS),
    "mask": ("kv_pos", *POSITION_WORDS),
    "output": ("out", "dim", *POSITION_WORDS),
}
FLOAT_WORDS = ("logit", "out")
_RESERVED = frozenset(word for words in VOCABULARY.values() for word in words)


def _require_name(name: str, argument: str) -> None:
    for text in (name, argument):
        require(
            text.isidentifier() and text not in _RESERVED,
            "param.name",
            "an identifier outside the vocabulary of variant functions",
            repr(text),
            f"rename it; reserved: {', '.join(sorted(_RESERVED))}",
        )


@dataclass(frozen=True)
class Scalar:
    """A number: an fp32 float or a 32-bit int.

    Attributes:
        name: key of the value in ``attention(..., params={name: value})``.
        kind: float or int.
        value: bound value; None: the caller of ``attention`` gives one.
        argument: name inside the functions; empty: ``name``.

    Raises:
        InvalidInput: a reserved name, an unknown kind, a value that does not fit.
    """

    name: str
    kind: type = float
    value: float | int | None = None
    argument: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "argument", self.argument or self.name)
        _require_name(self.name, self.argument)
        known = self.kind in (int, float)
        require(known, "scalar.kind", "float or int", self.kind, "use a tensor for anything else")
        if self.value is not None:
            object.__setattr__(self, "value", self.checked(self.value))

    def checked(self, value: object) -> float | int:
        """Return a value as this parameter's kind.

        Raises:
            InvalidInput: not a number of this kind.
        """
        rule, hint = "a float", "a value on the device is a Tensor parameter"
        if self.kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        else:
            rule = "a 32-bit int"
            if isinstance(value, int) and not isinstance(value, bool) and fits_i32(value):
                return value
        raise InvalidInput(contract_message(f"params[{self.name!r}]", rule, repr(value), hint))


@dataclass(frozen=True)
class Tensor:
    """A strided tensor of up to three dimensions, subscripted inside the functions.

    Attributes:
        name: key of the tensor in ``attention(..., params={name: tensor})``.
        dtype: float32, int32, uint8, bool, or int64 with values that fit 32 bits.
        ndim: number of subscripts, 1 to 3.
        argument: name inside the functions; empty: ``name``.

    Raises:
        InvalidInput: a reserved name, a dtype or rank outside the above.
    """

    name: str
    dtype: torch.dtype = torch.float32
    ndim: int = 1
    argument: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "argument", self.argument or self.name)
        _require_name(self.name, self.argument)
        names = ", ".join(str(d).removeprefix("torch.") for d in ELEMENTS)
        hint = "uint32 words can be viewed as int32"
        require(self.dtype in ELEMENTS, "tensor.dtype", f"one of {names}", self.dtype, hint)
        valid = 1 <= self.ndim <= MAX_NDIM
        require(valid, "tensor.ndim", f"1 to {MAX_NDIM}", self.ndim, "flatten leading dimensions")

    def checked(self, value: object) -> torch.Tensor:
        """Return a tensor that was given for this parameter.

        Raises:
            InvalidInput: not a tensor of the declared dtype and rank.
        """
        name = f"params[{self.name!r}]"
        if not isinstance(value, torch.Tensor):
            hint = "wrap it in torch.tensor"
            raise InvalidInput(contract_message(name, "a tensor", type(value).__name__, hint))
        hint = "convert it once, outside the step"
        require(value.dtype == self.dtype, name, f"dtype {self.dtype}", value.dtype, hint)
        require(value.ndim == self.ndim, name, f"{self.ndim} dimensions", value.ndim, hint)
        return value


Param: TypeAlias = Scalar | Tensor


def same_declaration(a: Param, b: Param) -> bool:
    """Return whether two parameters of one name can be one: all but the inner name agrees."""
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        return (a.kind, a.value) == (b.kind, b.value)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.dtype, a.ndim) == (b.dtype, b.ndim)
    return False
