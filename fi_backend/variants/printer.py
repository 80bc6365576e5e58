"""The C++ text of a variant function: a template over its context.

The same text runs in CPU loops, in device kernels and on intervals; the context says what a word
of the vocabulary is (kernels/include/fi/cpu/variant_loops.h, fi/attention/interval.h). The text
names parameters by position and holds no name of the user's, so that equal functions have equal
text: its hash is the function's identity.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter

from fi_backend.variants.frontend import Function
from fi_backend.variants.ir import Const, Input, Load, Node, Op, ScalarRead, Type, children, walk
from fi_backend.variants.ops import meaning

# Longest expression written in one piece: statements stay within 100 columns.
MAX_EXPRESSION = 72
MIN_NAMED = 8  # shorter operands stay in place
_INDENT = "    "


def print_function(function: Function) -> str:
    """Return the members of the struct that stands for the function."""
    lines, result = _Printer(function).statements()
    body = "\n".join(f"{_INDENT}{line}" for line in [*lines, f"return {result};"])
    return (
        f"  static constexpr int32_t kNumParams = {len(function.params)};\n\n"
        "  template <class Context>\n"
        "  FI_VARIANT_FN static auto apply(const Context& c) {\n"
        f"{body}\n"
        "  }\n"
    )


def content_key(function: Function) -> str:
    """Return the identity of a function: the hash of its kind and text."""
    return hashlib.sha256(f"{function.kind}\n{print_function(function)}".encode()).hexdigest()


def literal(value: float | int | bool, kind: Type) -> str:
    """Return a C++ literal of exactly this value and type."""
    if kind is Type.BOOL:
        return "true" if value else "false"
    if kind is Type.I32:
        return str(value) if value > -(2**31) else "(-2147483647 - 1)"
    if not math.isfinite(value):
        (bits,) = struct.unpack("<i", struct.pack("<f", value))
        return f"from_bits({bits})"
    text = next(t for d in range(1, 10) if _as_f32(t := f"{value:.{d}g}") == value)
    return text + ("f" if "." in text or "e" in text else ".0f")


def _as_f32(text: str) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", float(text)))[0])
    except OverflowError:
        return math.inf


class _Printer:
    def __init__(self, function: Function) -> None:
        self._function = function
        self._index = {p.argument: i for i, p in enumerate(function.params)}
        self._uses = Counter(
            id(child) for node in walk(function.result) for child in children(node)
        )
        self._texts: dict[int, str] = {}
        self._needs_parentheses: set[int] = set()
        self._lines: list[str] = []
        self._temporaries = 0

    def statements(self) -> tuple[list[str], str]:
        """Return the statements, and the expression of the result."""
        for node in walk(self._function.result):
            self._texts[id(node)] = self._write(node)
            if isinstance(node, Op) and meaning(node.name, node.args[-1].type).is_infix:
                self._needs_parentheses.add(id(node))
            if self._uses[id(node)] > 1 and not isinstance(node, Const):
                self._bind(node)
        return self._lines, self._texts[id(self._function.result)]

    def _bind(self, node: Node) -> None:
        """Give a value a name of its own."""
        if isinstance(node, Input):
            name = node.name
        elif isinstance(node, ScalarRead):
            name = f"p{self._index[node.argument]}"
        else:
            name = f"t{self._temporaries}"
            self._temporaries += 1
        self._lines.append(f"const auto {name} = {self._texts[id(node)]};")
        self._texts[id(node)] = name
        self._needs_parentheses.discard(id(node))

    def _write(self, node: Node) -> str:
        if isinstance(node, Const):
            return literal(node.value, node.type)
        if isinstance(node, Input):
            return f"c.{node.name}()"
        if isinstance(node, ScalarRead):
            kind = "float" if node.type is Type.F32 else "int32_t"
            return f"c.template scalar<{kind}>({self._index[node.argument]})"
        operands = children(node)
        while len(text := self._combine(node)) > MAX_EXPRESSION:
            longest = max(operands, key=lambda child: len(self._texts[id(child)]))
            if len(self._texts[id(longest)]) < MIN_NAMED:
                break
            self._bind(longest)
        return text

    def _combine(self, node: Node) -> str:
        if isinstance(node, Load):
            args = [self._texts[id(place)] for place in (node.guard, *node.indices)]
            places = ", ".join([str(self._index[node.argument]), *args])
            return f"c.template load<{node.element}>({places})"
        assert isinstance(node, Op)
        operation = meaning(node.name, node.args[-1].type)
        args = [self._texts[id(arg)] for arg in node.args]
        if operation.is_infix:
            args = [
                f"({text})" if id(arg) in self._needs_parentheses else text
                for arg, text in zip(node.args, args, strict=True)
            ]
        return operation.cpp.format(*args)
