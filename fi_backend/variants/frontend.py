"""From the syntax tree of a variant function to its typed expression."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fi_backend.variants import math as vocabulary
from fi_backend.variants.ir import Builder, Const, Node, Type, TypeMismatch
from fi_backend.variants.ops import fold
from fi_backend.variants.params import ELEMENTS, FLOAT_WORDS, VOCABULARY, Param, Scalar, Tensor
from fi_backend.variants.source import Source, find_source

MAX_POWER = 16
_MISSING = object()
_FUNCTIONS: dict[int, tuple[str, int]] = {
    **{id(getattr(vocabulary, n)): (n, 1) for n in ("tanh", "exp", "log", "sqrt", "sigmoid")},
    **{id(getattr(vocabulary, n)): (n, 2) for n in ("minimum", "maximum")},
    id(vocabulary.abs): ("abs", 1),
    id(builtins.abs): ("abs", 1),
    id(vocabulary.where): ("where", 3),
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floor_div",
    ast.Mod: "floor_mod",
}
_BITS: dict[type[ast.operator], str] = {
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.LShift: "shl",
    ast.RShift: "shr",
}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
}
# What to write instead of the constructs people try first.
_INSTEAD: dict[type[ast.AST], str] = {
    ast.If: "write `x if condition else y` or where(condition, x, y)",
    ast.For: "write the terms out; a function sees one logit",
    ast.While: "write the terms out; a function sees one logit",
    ast.Attribute: "take what the function needs as an argument or a module-level constant",
    ast.Call: "call only functions of fi_backend.variants.math",
    ast.Tuple: "assign and return one value at a time",
}
_ACCEPTED = "arithmetic, comparisons, fi_backend.variants.math, parameters, assignments, return"


@dataclass(frozen=True, eq=False)
class Function:
    """A compiled-to-expression variant function.

    Attributes:
        kind: logits, mask or output.
        result: the returned value.
        params: parameters that the function takes, in the order of its arguments.
    """

    kind: str
    result: Node
    params: tuple[Param, ...]


def translate(
    kind: str, variant_name: str, function: Callable[..., Any], params: Sequence[Param]
) -> Function:
    """Return the expression of a variant function.

    Args:
        kind: logits, mask or output: decides the vocabulary and the result type.
        variant_name: for messages.
        function: plain Python function or lambda.
        params: what its variant declares.

    Raises:
        UnsupportedVariant: the function uses something outside the accepted subset.
    """
    source = find_source(f"{variant_name}.{kind}", function)
    return _Translator(kind, source, {p.argument: p for p in params}).run()


class _Translator:
    def __init__(self, kind: str, source: Source, declared: Mapping[str, Param]) -> None:
        self._kind = kind
        self._source = source
        self._builder = Builder(fold)
        self._declared = declared
        self._tensors: dict[str, Tensor] = {}
        self._values: dict[str, Node] = {}  # arguments and local variables, as last assigned
        self._guard: Node = self._builder.const(True)
        code = source.function.__code__
        cells = dict(zip(code.co_freevars, source.function.__closure__ or (), strict=True))
        self._cells = cells

    def run(self) -> Function:
        definition = self._source.definition
        params = self._bind_arguments(definition.args)
        if isinstance(definition, ast.Lambda):
            result = self._expression(definition.body)
        else:
            result = self._body(definition)
        where = definition.body if isinstance(definition, ast.Lambda) else definition.body[-1]
        if self._kind == "mask":
            self._require_condition(where, result)
        else:
            result = self._builder.convert(result, Type.F32)
        return Function(self._kind, result, params)

    def _reject(self, node: ast.AST, got: str, hint: str, rule: str = _ACCEPTED) -> Exception:
        return self._source.reject(node, rule, got, hint)

    def _bind_arguments(self, args: ast.arguments) -> tuple[Param, ...]:
        words = VOCABULARY[self._kind]
        extra = [args.vararg, args.kwarg, *args.posonlyargs, *args.kwonlyargs, *args.defaults]
        for item in extra:
            if item is not None:
                raise self._reject(
                    item,
                    "a default, *, / or ** in the argument list",
                    "name the words and parameters that the function reads, nothing else",
                    "plain arguments",
                )
        params: list[Param] = []
        for arg in args.args:
            param = self._declared.get(arg.arg)
            if isinstance(param, Tensor):
                self._tensors[arg.arg] = param
            elif isinstance(param, Scalar):
                kind = Type.F32 if param.kind is float else Type.I32
                self._values[arg.arg] = self._builder.scalar(arg.arg, kind)
            elif arg.arg in words:
                kind = Type.F32 if arg.arg in FLOAT_WORDS else Type.I32
                self._values[arg.arg] = self._builder.input(arg.arg, kind)
            else:
                names = ", ".join((*words, *self._declared))
                hint = "declare it in params as a Scalar or Tensor"
                raise self._reject(arg, repr(arg.arg), hint, f"an argument out of {names}")
            if param is not None:
                params.append(param)
        return tuple(params)

    def _body(self, definition: ast.FunctionDef) -> Node:
        for statement in definition.body:
            match statement:
                case ast.Expr(value=ast.Constant(value=str())):
                    pass  # a docstring
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._assign(name, value)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self._assign(name, value)
                case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                    read = ast.copy_location(ast.Name(name, ast.Load()), target)
                    self._assign(name, ast.copy_location(ast.BinOp(read, op, value), statement))
                case ast.Return(value=ast.expr() as value):
                    return self._expression(value)
                case _:
                    raise self._unsupported(statement)
        hint = "end the function with `return value`"
        raise self._reject(definition, "no return value", hint, "a value for every logit")

    def _assign(self, name: str, value: ast.expr) -> None:
        self._values[name] = self._expression(value)
        self._tensors.pop(name, None)

    def _unsupported(self, node: ast.AST) -> Exception:
        hint = _INSTEAD.get(type(node), "rewrite it with the accepted constructs")
        return self._reject(node, f"`{type(node).__name__}`", hint)

    def _expression(self, node: ast.expr) -> Node:
        try:
            return self._dispatch(node)
        except TypeMismatch as error:
            hint = "compare explicitly, e.g. `bits & 1 != 0` as `(bits & 1) != 0`"
            if "floats" in str(error):
                hint = "use integers there; positions, heads and lengths are integers"
            if "32 bits" in str(error):
                hint = "use a float"
            raise self._reject(node, str(error), hint, "operands of fitting types") from None

    def _dispatch(self, node: ast.expr) -> Node:
        handlers: dict[type[ast.expr], Callable[[Any], Node]] = {
            ast.Constant: lambda e: self._constant(e, e.value),
            ast.Name: self._name,
            ast.Attribute: lambda e: self._constant(e, self._static(e)),
            ast.UnaryOp: self._unary,
            ast.BinOp: self._binary,
            ast.BoolOp: self._bool_op,
            ast.Compare: self._compare,
            ast.IfExp: lambda e: self._choose(e.test, e.body, e.orelse),
            ast.Call: self._call,
            ast.Subscript: self._subscript,
        }
        handler = handlers.get(type(node))
        if handler is None:
            raise self._unsupported(node)
        return handler(node)

    @contextmanager
    def _where(self, condition: Node) -> Iterator[None]:
        """Guard the tensor reads of what is translated inside."""
        before = self._guard
        self._guard = self._builder.logical("and", before, condition)
        yield
        self._guard = before

    def _require_condition(self, node: ast.AST, value: Node) -> Node:
        if value.type is not Type.BOOL:
            hint = "compare explicitly, e.g. `x != 0`"
            raise self._reject(node, "a number", hint, "a condition")
        return value

    def _static(self, node: ast.expr) -> object:
        """Return the Python object that a name or module attribute stands for."""
        if isinstance(node, ast.Name):
            if node.id in self._values:
                return _MISSING  # a local variable, whatever the module calls by that name
            if node.id in self._cells:
                return self._cell(node.id)
            fallback = getattr(builtins, node.id, _MISSING)
            return self._source.function.__globals__.get(node.id, fallback)
        if isinstance(node, ast.Attribute):
            owner = self._static(node.value)
            if isinstance(owner, ModuleType):
                return getattr(owner, node.attr, _MISSING)
        return _MISSING

    def _cell(self, name: str) -> object:
        try:
            return self._cells[name].cell_contents
        except ValueError:  # assigned only after the variant was made
            return _MISSING

    def _constant(self, node: ast.expr, value: object) -> Node:
        if isinstance(value, bool | int | float):
            return self._builder.const(value)
        name = ast.unparse(node)
        if value is _MISSING:
            hint = "declare it in params and take it as an argument, or define the constant"
            raise self._reject(node, f"the unknown name {name!r}", hint)
        hint = "only int, float and bool constants are captured; make it a parameter"
        raise self._reject(node, f"{name!r}, a {type(value).__name__}", hint)

    def _name(self, node: ast.Name) -> Node:
        if node.id in self._values:
            return self._values[node.id]
        if node.id in self._tensors:
            axes = ", ".join("ijk"[: self._tensors[node.id].ndim])
            raise self._reject(node, f"the whole tensor {node.id!r}", f"read {node.id}[{axes}]")
        return self._constant(node, self._static(node))

    def _unary(self, node: ast.UnaryOp) -> Node:
        match node:
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
                return self._builder.const(-number)  # 2^31 fits with its sign only
        value = self._expression(node.operand)
        match node.op:
            case ast.USub():
                return self._builder.arithmetic("neg", value)
            case ast.Not():
                return self._builder.logical("not", value)
            case ast.Invert():
                return self._builder.bits("not", value)
        return self._builder.promote(value)[0]

    def _binary(self, node: ast.BinOp) -> Node:
        left, right = self._expression(node.left), self._expression(node.right)
        operator = type(node.op)
        if operator in _ARITHMETIC:
            return self._builder.arithmetic(_ARITHMETIC[operator], left, right)
        if operator in _BITS:
            return self._builder.bits(_BITS[operator], left, right)
        if operator is ast.Pow:
            if isinstance(right, Const) and right.value in range(MAX_POWER + 1):
                return self._builder.power(left, int(right.value))
            rule = f"a constant exponent of 0 to {MAX_POWER}"
            hint = "write sqrt(x), or exp(y * log(x)) for x > 0"
            raise self._reject(node, ast.unparse(node.right), hint, rule)
        raise self._unsupported(node.op if hasattr(node.op, "lineno") else node)

    def _bool_op(self, node: ast.BoolOp) -> Node:
        name = "and" if isinstance(node.op, ast.And) else "or"
        result = self._require_condition(node.values[0], self._expression(node.values[0]))
        for operand in node.values[1:]:
            asked = result if name == "and" else self._builder.logical("not", result)
            with self._where(asked):
                value = self._require_condition(operand, self._expression(operand))
            result = self._builder.logical(name, result, value)
        return result

    def _compare(self, node: ast.Compare) -> Node:
        result = self._builder.const(True)
        left = self._expression(node.left)
        for operator, operand in zip(node.ops, node.comparators, strict=True):
            if type(operator) not in _COMPARISONS:
                hint = "use <, <=, >, >=, == or !="
                raise self._reject(node, f"`{type(operator).__name__}`", hint)
            with self._where(result):
                right = self._expression(operand)
            compared = self._builder.compare(_COMPARISONS[type(operator)], left, right)
            result = self._builder.logical("and", result, compared)
            left = right
        return result

    def _choose(self, test: ast.expr, yes: ast.expr, no: ast.expr) -> Node:
        condition = self._require_condition(test, self._expression(test))
        with self._where(condition):
            if_true = self._expression(yes)
        with self._where(self._builder.logical("not", condition)):
            if_false = self._expression(no)
        return self._builder.select(condition, if_true, if_false)

    def _call(self, node: ast.Call) -> Node:
        name, arity = _FUNCTIONS.get(id(self._static(node.func)), ("", 0))
        if not name:
            hint = f"call {', '.join(vocabulary.__all__)} of fi_backend.variants.math"
            raise self._reject(node, f"a call of `{ast.unparse(node.func)}`", hint)
        if node.keywords or len(node.args) != arity:
            rule, got = f"{arity} positional arguments of {name}", ast.unparse(node)
            raise self._reject(node, got, "pass exactly those", rule)
        if name == "where":
            return self._choose(*node.args)
        args = [self._expression(arg) for arg in node.args]
        if arity == 2 or name == "abs":
            return self._builder.arithmetic(name, *args)
        return self._builder.call(name, args[0])

    def _subscript(self, node: ast.Subscript) -> Node:
        name = ast.unparse(node.value)
        tensor = self._tensors.get(name)
        if tensor is None:
            hint = "only declared Tensor parameters have subscripts"
            raise self._reject(node, f"a subscript of {name!r}", hint)
        places = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if len(places) != tensor.ndim:
            rule = f"{tensor.ndim} subscripts of {name!r}, as declared"
            raise self._reject(node, str(len(places)), "index every dimension", rule)
        indices = [self._expression(place) for place in places]
        for place, index in zip(places, indices, strict=True):
            if index.type is not Type.I32:
                hint = "positions, heads, lengths and int constants are integers"
                got = f"`{ast.unparse(place)}`, not an integer"
                raise self._reject(place, got, hint, "integer subscripts")
        element, kind = ELEMENTS[tensor.dtype]
        return self._builder.load(name, element, kind, indices, self._guard)
