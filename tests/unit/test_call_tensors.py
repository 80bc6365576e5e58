"""CallTensors: what a launch compares and writes of its tensors, without a driver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fi_backend import _core

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def make_tensors(cache_dtype: torch.dtype = BF16) -> list[Tensor | None]:
    """q, k, v, out and lse of a call with 4 tokens, 5 pages."""
    cache = [torch.zeros(5, 16, 2, 64, dtype=cache_dtype) for _ in range(2)]
    q, out = (torch.zeros(4, 4, 64, dtype=BF16) for _ in range(2))
    return [q, *cache, out, torch.zeros(4, 4)]


@pytest.mark.parametrize("cache_dtype", [BF16, torch.float16, FP8, torch.float32])
def test_other_tensors_of_the_same_shapes_are_taken(cache_dtype: torch.dtype) -> None:
    seen, params = _core.CallTensors(), _core.KernelParams()
    first, second = make_tensors(cache_dtype), make_tensors(cache_dtype)
    assert seen.take(params, *first, 1.0, False) == -1
    assert seen.remember(params, *first, 0.25, False) == 0
    assert (params.scale, params.is_partial) == (0.25, 0)
    assert seen.take(params, *second, 0.5, True) == 0
    addresses = (params.q, params.kv.k, params.kv.v, params.out, params.lse)
    assert addresses == tuple(0 if t is None else t.data_ptr() for t in second)
    assert (params.scale, params.is_partial) == (0.5, 1)
    seen.forget()
    assert seen.take(params, *second, 0.5, True) == -1


# Which of q, k, v, out, lse becomes what.
OTHERS: dict[str, tuple[int, Callable[[Tensor], Tensor | None]]] = {
    "fewer tokens": (0, lambda q: q[:3]),
    "other strides": (0, lambda q: torch.zeros(4, 8, 64, dtype=BF16)[:, ::2]),
    "five dimensions": (0, lambda q: q[None, None]),
    "another dtype of equal size": (1, lambda k: k.view(torch.float16)),
    "fewer pages": (2, lambda v: v[:4]),
    "a wider output": (3, lambda out: out.float()),
    "no lse": (4, lambda lse: None),
    "no memory": (3, lambda out: out.to("meta")),
}


@pytest.mark.parametrize(("place", "change"), OTHERS.values(), ids=OTHERS)
def test_what_differs_in_more_than_addresses_is_not_taken(
    place: int, change: Callable[[Tensor], Tensor | None]
) -> None:
    seen, params, tensors = _core.CallTensors(), _core.KernelParams(), make_tensors()
    seen.remember(params, *tensors, 1.0, False)
    address = params.q
    other, old = make_tensors(), tensors[place]
    assert old is not None
    other[place] = change(old)
    assert seen.take(params, *other, 2.0, True) == -1
    assert (params.q, params.scale, params.is_partial) == (address, 1.0, 0)


@pytest.mark.parametrize(("place", "bits"), [(0, 2), (1, 2), (2, 2), (3, 2), (4, 0)])
def test_addresses_that_are_not_aligned_are_told(place: int, bits: int) -> None:
    seen, params, tensors = _core.CallTensors(), _core.KernelParams(), make_tensors()
    seen.remember(params, *tensors, 1.0, False)
    old = tensors[place]
    assert old is not None
    storage = torch.zeros(old.numel() + 1, dtype=old.dtype)
    tensors[place] = storage[1:].view(old.shape)
    assert seen.take(params, *tensors, 1.0, False) == bits


def test_tensors_without_memory_are_not_remembered() -> None:
    q, *others = make_tensors()
    assert q is not None
    with pytest.raises(RuntimeError, match="meta"):
        _core.CallTensors().remember(_core.KernelParams(), q.to("meta"), *others, 1.0, False)


def test_an_older_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    with pytest.raises(RuntimeError, match=r"torch: expected 2\.11 or newer.*pip install"):
        _core.CallTensors()
