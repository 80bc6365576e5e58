"""Calls compiled variant functions through their C ABI (fi/attention/variant_hooks.h)."""

from __future__ import annotations

import ctypes
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fi_backend.variants import Variant, math
from fi_backend.variants.stages import BoundVariant, ParamTuple, bind_stages

ROW_WORDS = ("q_pos", "token", "q_head", "request", "q_len", "kv_len")
KINDS = ("empty", "full", "mixed")


class CRow(ctypes.Structure):
    _fields_ = [(word, ctypes.c_int32) for word in ROW_WORDS]


class CParam(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("scalar", ctypes.c_double),
    ]


class CTile(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.POINTER(CRow)),
        ("params", ctypes.POINTER(CParam)),
        ("row_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
        ("num_cols", ctypes.c_int32),
        ("kv_begin", ctypes.c_int32),
        ("kv_head", ctypes.c_int32),
        ("masked_value", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Tile:
    """Rows of a tile, a run of KV positions. The words are int32 [num_rows]."""

    q_pos: Tensor
    token: Tensor
    q_head: Tensor
    request: Tensor
    q_len: Tensor
    kv_len: Tensor
    kv_begin: int = 0
    num_cols: int = 1
    kv_head: int = 0

    def context(self) -> dict[str, Tensor | int | float]:
        """The oracle's view: [num_rows, 1] words, [num_cols] columns."""
        columns = torch.arange(self.num_cols, dtype=torch.int32)
        words = {word: getattr(self, word)[:, None] for word in ROW_WORDS}
        kv_pos = self.kv_begin + columns
        return {**words, "kv_pos": kv_pos, "dim": columns, "kv_head": self.kv_head}

    def box(self) -> dict[str, int]:
        """Bounds of all words that a mask's box holds."""
        box = {"kv_pos_min": self.kv_begin, "kv_pos_max": self.kv_begin + self.num_cols - 1}
        for word in ("q_pos", "q_len", "kv_len", "q_head"):
            values = getattr(self, word)
            box |= {f"{word}_min": int(values.min()), f"{word}_max": int(values.max())}
        return box


def make_tile(rows: int = 1, cols: int = 1, **words: Any) -> Tile:
    """A tile whose row words are given as an int or a list; 0 otherwise."""
    columns = {"kv_begin": 0, "kv_head": 0, **words}
    given = {
        f.name: torch.as_tensor(words.get(f.name, 0), dtype=torch.int32).expand(rows).contiguous()
        for f in fields(Tile)
        if f.name in ROW_WORDS
    }
    return Tile(**given, num_cols=cols, kv_begin=columns["kv_begin"], kv_head=columns["kv_head"])


def _c_params(params: list[ParamTuple]) -> ctypes.Array[CParam]:
    packed = [CParam(data, (ctypes.c_int64 * 3)(*strides), s) for data, strides, s in params]
    return (CParam * max(1, len(packed)))(*packed)


def run(address: int, tile: Tile, params: list[ParamTuple], x: Tensor, masked: float) -> None:
    """Edit x [num_rows, num_cols] in place with a LogitsFn, MaskFn or OutputFn."""
    rows = (CRow * x.shape[0])(
        *(CRow(*(int(getattr(tile, w)[i]) for w in ROW_WORDS)) for i in range(x.shape[0]))
    )
    c_tile = CTile(
        rows, _c_params(params), x.stride(0), *x.shape, tile.kv_begin, tile.kv_head, masked
    )
    function = ctypes.CFUNCTYPE(None, ctypes.POINTER(CTile), ctypes.c_void_p)(address)
    function(ctypes.byref(c_tile), x.data_ptr())


def mask_kind(address: int, box: Mapping[str, int], params: list[ParamTuple]) -> str:
    """Call a MaskKindFn."""
    words = ("q_pos", "kv_pos", "q_len", "kv_len", "q_head")
    bounds = [box[f"{word}_{end}"] for word in words for end in ("min", "max")]
    c_box = (ctypes.c_int32 * len(bounds))(*bounds)
    function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(address)
    c_params = _c_params(params)  # lives through the call
    return KINDS[function(ctypes.addressof(c_box), ctypes.addressof(c_params))]


def run_chain(bound: BoundVariant, tile: Tile, logits: Tensor) -> Tensor:
    """What the engine does to a tile of logits: all logits functions, then all masks."""
    x = logits.clone()
    masked = -torch.inf if bound.softmax else 0.0
    for logits_addr, mask_addr, _, _, params in bound.stages:
        for address in (logits_addr, mask_addr):
            if address:
                run(address, tile, params, x, masked)
    return x


def oracle_chain(variant: Variant, tile: Tile, logits: Tensor, params: Mapping[str, Any]) -> Tensor:
    """The same in float64 by the torch oracle."""
    edited = variant.evaluate_logits(logits.double(), tile.context(), params)
    visible = variant.evaluate_mask(tile.context(), params)
    return torch.where(visible, edited, -torch.inf if variant.softmax else 0.0)


def run_logits(variant: Variant, tile: Tile, logits: Tensor, **params: Any) -> Tensor:
    """Compile, bind and run a variant on a tile of logits."""
    return run_chain(bind_stages(variant, params), tile, logits)


def define(source: str, **constants: Any) -> Callable[..., Any]:
    """Return the function `f` of a source text, readable like that of a file."""
    name = f"<variant {abs(hash(source))}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names = {word: getattr(math, word) for word in math.__all__}
    module: dict[str, Any] = {**names, **constants}
    exec(compile(source, name, "exec"), module)
    function: Callable[..., Any] = module["f"]
    return function
