"""From a variant to the functions and parameters that the CPU engine runs.

Functions that equal a shipped one are in the core; others are compiled once into the on-disk
cache. Addresses stay valid for the life of the process.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch

from fi_backend import _core
from fi_backend.errors import CompileFailed, contract_message
from fi_backend.jit.host_compiler import compile_library
from fi_backend.variants.binding import ParamTuple, bind_params
from fi_backend.variants.evaluate import Params
from fi_backend.variants.frontend import Function
from fi_backend.variants.printer import content_key
from fi_backend.variants.source_text import library_source, symbols
from fi_backend.variants.variant import Variant

# (logits, mask, mask_kind, output addresses, parameters): fi::VariantStage; 0: none.
StageTuple: TypeAlias = tuple[int, int, int, int, list[ParamTuple]]


@dataclass(frozen=True)
class StageFunctions:
    """One link of a variant's chain, compiled.

    Attributes:
        logits_addr: fi::LogitsFn, 0: none.
        mask_addr: fi::MaskFn, 0: none.
        mask_kind_addr: fi::MaskKindFn, 0: none.
        output_addr: fi::OutputFn, 0: none.
    """

    logits_addr: int
    mask_addr: int
    mask_kind_addr: int
    output_addr: int


@dataclass(frozen=True)
class BoundVariant:
    """A variant with its parameters, as the engine takes it.

    Attributes:
        stages: arguments of ``_core.AttentionParams.set_variant``.
        softmax: whether weights are normalised.
        sinks_addr: float32 [num_qo_heads], 0: none.
        angles: as in ``BoundParams``.
        tensors: what the addresses point into; keep it alive until the call returns.
    """

    stages: list[StageTuple]
    softmax: bool
    sinks_addr: int
    angles: torch.Tensor | None
    tensors: tuple[torch.Tensor, ...]


_lock = threading.Lock()
_loaded: dict[str, tuple[int, int]] = {}  # content key -> (loop, mask kind) addresses


@lru_cache(maxsize=256)
def compile_stages(variant: Variant) -> tuple[StageFunctions, ...]:
    """Return the compiled functions of a variant: all logits, then all masks, then all outputs.

    Raises:
        Unsupported: a function is not a shipped one and there is no C++ compiler or no ninja.
        CompileFailed: the compiler refused the generated code, or the library cannot be loaded.
    """
    functions = list(variant.all_functions())
    with _lock:
        _load_missing(variant.name, functions)
        return tuple(_stage(function) for function in functions)


def bind_stages(
    variant: Variant, params: Params | None = None, sizes: Mapping[str, int] | None = None
) -> BoundVariant:
    """Return what the engine needs to run a variant on the CPU.

    Args:
        variant: any variant.
        params: values of its open parameters by name: numbers, and CPU tensors of any strides.
        sizes: how many values the words ``q_head``, ``token``, ``request`` (and any other) take
            in this call; tensors subscripted by such a word are checked against it.

    Raises:
        InvalidInput: a parameter is missing, unknown, of the wrong kind, too small or not on the
            CPU.
        Unsupported, CompileFailed: as ``compile_stages``.
    """
    bound = bind_params(variant, params, sizes)
    stages: list[StageTuple] = [
        (f.logits_addr, f.mask_addr, f.mask_kind_addr, f.output_addr, list(values))
        for f, values in zip(compile_stages(variant), bound.functions, strict=True)
    ]
    return BoundVariant(stages, variant.softmax, bound.sinks_addr, bound.angles, bound.tensors)


def _stage(function: Function) -> StageFunctions:
    run, kind = _loaded[content_key(function)]
    return StageFunctions(
        logits_addr=run if function.kind == "logits" else 0,
        mask_addr=run if function.kind == "mask" else 0,
        mask_kind_addr=kind,
        output_addr=run if function.kind == "output" else 0,
    )


def _load_missing(name: str, functions: list[Function]) -> None:
    missing: dict[str, Function] = {}
    for function in functions:
        key = content_key(function)
        if key in _loaded:
            continue
        shipped = _core.find_variant_function(key)
        if shipped is not None:
            _loaded[key] = shipped
        else:
            missing[key] = function
    if not missing:
        return
    source = library_source([missing[key] for key in sorted(missing)])
    library = _open(name, source)
    for key, function in missing.items():
        run, kind = (
            ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value if symbol else 0
            for symbol in symbols(function)
        )
        _loaded[key] = (run or 0, kind or 0)


def _open(name: str, source: str) -> ctypes.CDLL:
    path = compile_library(source, name)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path = compile_library(source, name)  # evicted by another process since
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        hint = "set FI_CACHE_DIR to a folder whose file system allows executing code"
        rule = "a library that can be loaded"
        raise CompileFailed(contract_message(name, rule, error, hint)) from error
