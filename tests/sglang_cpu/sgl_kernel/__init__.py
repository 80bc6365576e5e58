"""A stand-in for SGLang's kernels, which have no wheel for CPUs: names exist, calls fail.

One function works, because SGLang calls it for every request on a CPU. With none of the operators
that it looks for, SGLang computes everything else in torch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    *_: Any,
) -> None:
    """Write the slots of new tokens, request after request, into their rows of the table."""
    taken = 0
    for row, begin, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        req_to_token[row, begin:end] = out_cache_loc[taken : taken + end - begin].to(torch.int32)
        taken += end - begin


class StandIn:
    """What stands for a function or a constant: it has any attribute, and calls fail."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{self.name} is a stand-in of the tests")


def _missing(name: str) -> StandIn:
    if name.startswith("__"):
        raise AttributeError(name)
    return StandIn(name)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every submodule of this package up."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(__name__ + "."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = _missing


__getattr__ = _missing
sys.meta_path.append(StandIns())
