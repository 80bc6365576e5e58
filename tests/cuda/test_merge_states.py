"""merge_states on a GPU, held against the CPU engine on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from placing import copy_to, misplaced

import fi_backend as fi
from fi_backend.cuda_ops import merge_kernel
from fi_backend.jit.kernels import DeviceKernel


@dataclass(frozen=True)
class Merge:
    """States to merge; offset: elements by which they lie past an aligned address."""

    name: str
    states: int
    tokens: int
    heads: int
    dim: int
    softmax: bool = True
    offset: int = 0


MERGES = [
    Merge("two", 2, 1000, 32, 128),
    Merge("one-state", 1, 5, 3, 64),
    Merge("many", 37, 9, 8, 128),
    *(Merge(f"states-{states}", states, 40, 4, 128) for states in range(3, 10)),
    Merge("dim-36", 2, 60, 4, 36),
    Merge("dim-2", 4, 77, 3, 2),
    Merge("dim-33", 5, 100, 5, 33),
    Merge("dim-127", 9, 20, 2, 127),
    Merge("dim-576", 3, 33, 16, 576),
    Merge("unaligned", 4, 50, 8, 96, offset=1),
    Merge("sums", 6, 123, 7, 80, softmax=False),
    Merge("sums-odd", 3, 50, 2, 31, softmax=False),
    Merge("no-tokens", 3, 0, 2, 64),
]


def kernels_of(test: str, arguments: Mapping[str, Any]) -> list[DeviceKernel]:
    """What a test compiles: conftest.py builds all of it in advance, on all cores."""
    case = arguments["case"]
    return [merge_kernel(case.dim, case.softmax, case.dim % 4 == 0 and not case.offset)]


@pytest.mark.parametrize("case", MERGES, ids=lambda case: case.name)
def test_merges_as_the_cpu(case: Merge, device: str) -> None:
    """Twice with equal bits; empty states hold NaN and do not count."""
    g = torch.Generator().manual_seed(case.dim)
    shape = (case.states, case.tokens, case.heads)
    o, lse = torch.randn(*shape, case.dim, generator=g), 5 * torch.randn(shape, generator=g)
    if case.softmax:
        lse[torch.rand(shape, generator=g) < 0.3] = -math.inf
        lse[:, :1] = -math.inf
        o[lse == -math.inf] = math.nan
    states = [copy_to(misplaced(t, case.offset), device) for t in (o, lse)]
    merged = fi.merge_states(*states, softmax=case.softmax)
    again = fi.merge_states(*states, softmax=case.softmax)
    expected = fi.merge_states(o, lse, softmax=case.softmax)
    tolerance = {"rtol": 3e-6, "atol": 3e-6} if case.softmax else {"rtol": 0.0, "atol": 0.0}
    for actual, repeated, wanted in zip(merged, again, expected, strict=True):
        assert torch.equal(actual, repeated)
        torch.testing.assert_close(actual.cpu(), wanted, **tolerance)
