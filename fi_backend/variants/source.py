"""Finding the syntax tree of a Python function, and pointing at a place in it."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, TypeAlias

from fi_backend.errors import UnsupportedVariant, contract_message

Definition: TypeAlias = ast.FunctionDef | ast.Lambda


@dataclass(frozen=True)
class Source:
    """A function with its tree.

    Attributes:
        role: what the function is to its variant, e.g. ``soft_cap.logits``; starts every message.
        function: the Python function.
        definition: its tree.
        lines: the text of its file.
    """

    role: str
    function: FunctionType
    definition: Definition
    lines: list[str]

    def reject(self, node: ast.AST, rule: str, got: str, hint: str) -> UnsupportedVariant:
        """Return the error for a place in the function: sentence, file:line, source line."""
        line = getattr(node, "lineno", self.definition.lineno)
        text = self.lines[line - 1].strip() if line <= len(self.lines) else ""
        sentence = contract_message(self.role, rule, got, hint)
        return UnsupportedVariant(
            f"{sentence}\n  {self.function.__code__.co_filename}:{line}: {text}"
        )


@lru_cache(maxsize=16)
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _first_line(node: ast.FunctionDef | ast.Lambda) -> int:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return min([node.lineno, *(d.lineno for d in decorators)])


def _contains(body: ast.expr, code: CodeType) -> bool:
    """Return whether all instructions of a lambda's code lie inside its body."""
    start = (body.lineno, body.col_offset)
    end = (body.end_lineno or body.lineno, body.end_col_offset or 0)
    for line, end_line, column, end_column in code.co_positions():
        if line is None or end_line is None or column is None or not end_column:
            continue  # the interpreter's own instructions have no place
        if not (start <= (line, column) and (end_line, end_column) <= end):
            return False
    return True


def _matches(node: ast.AST, code: CodeType) -> bool:
    if isinstance(node, ast.Lambda):
        names = tuple(a.arg for a in node.args.args)
        same_names = names == code.co_varnames[: code.co_argcount]
        is_lambda = code.co_name == "<lambda>" and node.lineno == code.co_firstlineno
        return is_lambda and same_names and _contains(node.body, code)
    is_def = isinstance(node, ast.FunctionDef) and node.name == code.co_name
    return is_def and _first_line(node) == code.co_firstlineno  # type: ignore[arg-type]


def find_source(role: str, function: Callable[..., Any]) -> Source:
    """Return the function with its syntax tree.

    Raises:
        UnsupportedVariant: not a plain function, or its source text is not at hand.
    """
    if not isinstance(function, FunctionType):
        hint = "pass the function itself; bound methods, partials and classes cannot be compiled"
        got = type(function).__name__
        raise UnsupportedVariant(contract_message(role, "a Python function", got, hint))
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    where = f"{code.co_filename}:{code.co_firstlineno}"
    if not lines:
        hint = f"define it in a file or a notebook cell ({where} cannot be read)"
        rule = "a function whose source text can be read"
        raise UnsupportedVariant(contract_message(role, rule, repr(function.__name__), hint))
    try:
        tree = _parse("".join(lines))
    except SyntaxError:
        tree = ast.Module(body=[], type_ignores=[])
    found = [node for node in ast.walk(tree) if _matches(node, code)]
    definition = found[0] if len(found) == 1 else None
    if not isinstance(definition, ast.FunctionDef | ast.Lambda):
        hint = "reload the module if its file has changed, and write one lambda per line"
        rule = f"one definition at {where}"
        raise UnsupportedVariant(contract_message(role, rule, str(len(found)), hint))
    return Source(role, function, definition, lines)
