"""Attention variants: what happens to logits, written as Python functions over scalars."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.variants.evaluate import Context, Params, evaluate
from fi_backend.variants.frontend import Function, translate
from fi_backend.variants.params import Param, Scalar, Tensor, same_declaration
from fi_backend.variants.rotation import Rotation

KINDS = ("logits", "mask", "output")


@dataclass(frozen=True)
class Variant:
    """What makes an attention layer differ from plain softmax attention.

    The functions take arguments by name. Words of the vocabulary: ``logit`` (logits only, natural
    units, after all scales), ``out`` and ``dim`` (output only: a component of the final output and
    its index), ``kv_pos`` (not in output), ``q_pos q_len kv_len q_head kv_head token request``
    (ints; ``token`` is the row of q in the batch, lengths are those of the request). Any other
    argument is a declared parameter. They may use arithmetic, comparisons, ``and or not``, the
    conditional expression, ``fi_backend.variants.math``, assignments to local names, subscripts of
    tensor parameters, and int, float and bool constants of the module, which are captured when the
    variant is made. Integers are 32 bits and wrap; division by zero gives 0; shift counts are taken
    modulo 32. A tensor read whose index may be out of range belongs inside ``where``, ``and``,
    ``or`` or a conditional expression: it is read only where it is asked for.

    Attributes:
        name: for messages.
        logits: (logit, ...) -> logit; None: unchanged.
        mask: (kv_pos, q_pos, ...) -> bool, True = visible; None: everything is.
        output: (out, ...) -> out, applied once to the merged output; None: unchanged.
        softmax: False: the transformed logits themselves are the weights, 0 where masked.
        sinks: name of a float32 tensor parameter [num_qo_heads]: a logit per query head that takes
            part in the softmax and has no value.
        rotation: how q and K turn before their product; None: they are as they should be.
        params: declared parameters.
        parts: the links of a chain made by ``then``; empty otherwise.

    Raises:
        InvalidInput: parameters that clash, sinks or angles that are not declared, sinks without
            softmax.
        UnsupportedVariant: a function uses something outside the above.
    """

    name: str
    logits: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    output: Callable[..., Any] | None = None
    softmax: bool = True
    sinks: str | None = None
    rotation: Rotation | None = None
    params: tuple[Param, ...] = ()
    parts: tuple[Variant, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", tuple(self.params))
        seen: dict[str, Param] = {}
        for param in self.params:
            same = seen.setdefault(param.name, param) is param
            hint = "give each parameter its own name"
            require(same, f"{self.name}.params", "distinct names", repr(param.name), hint)
        if self.sinks is not None:
            declared = seen.get(self.sinks)
            valid = isinstance(declared, Tensor) and (
                (declared.dtype, declared.ndim) == (torch.float32, 1)
            )
            rule = "the name of a declared Tensor parameter, float32, one dimension"
            hint = f"add Tensor({self.sinks!r}) to params"
            require(valid, f"{self.name}.sinks", rule, repr(self.sinks), hint)
            hint = "sinks are logits of a softmax; drop them or keep softmax=True"
            require(self.softmax, f"{self.name}.sinks", "None without softmax", self.sinks, hint)
        if self.rotation is not None:
            name = self.rotation.cos_sin
            declared = seen.get(name)
            valid = isinstance(declared, Tensor) and (
                (declared.dtype, declared.ndim) == (torch.float32, 2)
            )
            rule = "the name of a declared Tensor parameter, float32, two dimensions"
            hint = f"add Tensor({name!r}, ndim=2) to params"
            require(valid, f"{self.name}.rotation.cos_sin", rule, repr(name), hint)
        _ = self._functions  # errors belong where the variant is written

    @cached_property
    def _functions(self) -> dict[str, tuple[Function, ...]]:
        if self.parts:
            return {
                kind: tuple(f for part in self.parts for f in part.functions(kind))
                for kind in KINDS
            }
        written = {"logits": self.logits, "mask": self.mask, "output": self.output}
        return {
            kind: () if python is None else (translate(kind, self.name, python, self.params),)
            for kind, python in written.items()
        }

    def functions(self, kind: str) -> tuple[Function, ...]:
        """Return the compiled expressions of one kind (logits, mask, output), in order."""
        return self._functions[kind]

    def all_functions(self) -> Iterator[Function]:
        """Yield all expressions in the order in which an engine applies them.

        All logits, then all masks, then all outputs: a masked logit is never edited again.
        """
        for kind in KINDS:
            yield from self.functions(kind)

    def then(self, other: Variant) -> Variant:
        """Return the chain of two variants: this one's logits function first; both masks hold.

        Parameters of one name and equal declaration become one.

        Raises:
            InvalidInput: parameters of one name that differ; softmax turned off by both; sinks in
                both, or in one while the other turns softmax off; a rotation in both.
        """
        merged = {p.name: p for p in self.params}
        for param in other.params:
            mine = merged.setdefault(param.name, param)
            require(
                same_declaration(mine, param),
                f"params of {self.name!r} and {other.name!r}",
                "equal declarations of one name",
                f"{mine} and {param}",
                f"rename one: variant.renamed({param.name}='other_{param.name}')",
            )
        name = f"{self.name}+{other.name}"
        hint = "only one variant of a chain may turn softmax off"
        require(self.softmax or other.softmax, name, "one softmax=False at most", "two", hint)
        hint = "one set of sinks joins the softmax"
        sinks = [v.sinks for v in (self, other) if v.sinks is not None]
        require(len(sinks) < 2, name, "sinks in one variant at most", sinks, hint)
        rotations = [v.rotation for v in (self, other) if v.rotation is not None]
        hint = "q and K turn once"
        require(len(rotations) < 2, name, "a rotation in one variant at most", rotations, hint)
        return Variant(
            name,
            softmax=self.softmax and other.softmax,
            sinks=sinks[0] if sinks else None,
            rotation=rotations[0] if rotations else None,
            params=tuple(merged.values()),
            parts=(*(self.parts or (self,)), *(other.parts or (other,))),
        )

    def renamed(self, **names: str) -> Variant:
        """Return the variant with parameters under other names; its functions stay as written.

        Args:
            names: old name = new name.

        Raises:
            InvalidInput: no parameter of an old name.
        """
        known = {p.name for p in self.params}
        for old in names:
            hint = f"parameters: {', '.join(sorted(known)) or 'none'}"
            require(old in known, "names", "names of parameters", repr(old), hint)

        def rename_table(rotation: Rotation | None) -> Rotation | None:
            if rotation is None:
                return None
            table = rotation.cos_sin
            return dataclasses.replace(rotation, cos_sin=names.get(table, table))

        def rename(variant: Variant) -> Variant:
            return dataclasses.replace(
                variant,
                sinks=names.get(variant.sinks, variant.sinks) if variant.sinks else None,
                rotation=rename_table(variant.rotation),
                params=tuple(
                    dataclasses.replace(p, name=names.get(p.name, p.name)) for p in variant.params
                ),
                parts=tuple(rename(part) for part in variant.parts),
            )

        return rename(self)

    def evaluate_logits(
        self, logits: torch.Tensor, context: Context, params: Params | None = None
    ) -> torch.Tensor:
        """Return the transformed logits, computed with torch in the dtype of ``logits``.

        Args:
            logits: float32 or float64, natural units.
            context: words of the vocabulary by name, broadcastable to ``logits``.
            params: values of the parameters that have none bound.

        Raises:
            InvalidInput: a word or parameter is missing, or read out of range.
        """
        for function in self.functions("logits"):
            words = {**context, "logit": logits}
            value = evaluate(function, words, params or {}, logits.dtype)
            logits = value + torch.zeros_like(logits)  # a constant takes the shape too
        return logits

    def evaluate_mask(self, context: Context, params: Params | None = None) -> torch.Tensor:
        """Return which pairs are visible: a bool tensor that broadcasts to the logits.

        Raises:
            InvalidInput: as ``evaluate_logits``.
        """
        visible = torch.tensor(True, device="cpu")
        for function in self.functions("mask"):
            visible = visible & evaluate(function, context, params or {}, torch.float32)
        return visible

    def evaluate_output(
        self, out: torch.Tensor, context: Context, params: Params | None = None
    ) -> torch.Tensor:
        """Return the transformed output, computed with torch in the dtype of ``out``.

        Raises:
            InvalidInput: as ``evaluate_logits``.
        """
        for function in self.functions("output"):
            value = evaluate(function, {**context, "out": out}, params or {}, out.dtype)
            out = value + torch.zeros_like(out)
        return out

    def values(self, given: Params | None = None) -> dict[str, torch.Tensor | float | int]:
        """Return the value of every parameter by name: bound ones and those given.

        Raises:
            InvalidInput: a value is missing, unknown, already bound or of the wrong kind.
        """
        given = given or {}
        open_names = [p.name for p in self.params if getattr(p, "value", None) is None]
        for name in given:
            rule = f"the parameters of {self.name!r} without a bound value"
            hint = f"pass {', '.join(open_names) or 'none'}"
            require(name in open_names, "params", rule, repr(name), hint)
        result: dict[str, torch.Tensor | float | int] = {}
        for param in self.params:
            if isinstance(param, Scalar) and param.value is not None:
                result[param.name] = param.value
                continue
            if param.name not in given:
                hint = f"pass {', '.join(open_names)}"
                names = ", ".join(given) or "nothing"
                message = contract_message("params", f"a value for {param.name!r}", names, hint)
                raise InvalidInput(message)
            result[param.name] = param.checked(given[param.name])
        return result
