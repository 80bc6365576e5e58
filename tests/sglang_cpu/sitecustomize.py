"""Lets SGLang run on a CPU from packages that are made for GPUs. Tests put this on PYTHONPATH.

transformers imports torchvision, whose wheel for GPUs fails beside a CPU build of torch: it
describes the shapes of two operators that its native part, which does not load, would define.
They are declared before it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing, but sees that torchvision is about to be imported."""

    library: Any = None  # declarations last as long as it

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision" and self.library is None:
            import torch

            if torch.version.cuda is None:
                self.library = torch.library.Library("torchvision", "DEF")
                for operator in OPERATORS:
                    self.library.define(operator)
        return None


sys.meta_path.insert(0, DeclareOperators())
