"""Prefill over contiguous K and V."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from running import Result, compare

import fi_backend as fi
from fi_backend.oracle import Problem

HEADS = fi.HeadShape(4, 2, 64)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_rows_are_consecutive_tokens() -> None:
    batch = fi.ragged(ints(0, 1, 1, 3), ints(0, 2, 2, 5))
    assert batch.kv_len.tolist() == [2, 0, 3]
    assert batch.page_table.page_size == 1
    assert batch.page_table.entries.tolist() == [0, 1, 2, 3, 4]
    assert batch.page_table.indptr is not None
    assert batch.page_table.indptr.tolist() == [0, 2, 2, 5]


def test_a_known_number_of_tokens_is_not_read() -> None:
    """Padding after the last request is nobody's; on a device its values stay where they are."""
    batch = fi.ragged(ints(0, 1, 3), ints(0, 2, 5), num_kv_tokens=8)
    assert batch.kv_len.tolist() == [2, 3]
    assert batch.page_table.entries.tolist() == list(range(8))
    with pytest.raises(fi.InvalidInput, match=r"num_kv_tokens=4 at the end, got 5;"):
        fi.ragged(ints(0, 1, 3), ints(0, 2, 5), num_kv_tokens=4)
    unreadable = [torch.empty(3, dtype=torch.int32, device="meta") for _ in range(2)]
    there = fi.ragged(*unreadable, num_kv_tokens=8)
    assert there.page_table.entries.device.type == "meta" and there.page_table.num_rows == 2


@pytest.mark.parametrize("band", [fi.CAUSAL, fi.FULL, fi.Band.window(20)])
def test_against_the_oracle(band: fi.Band) -> None:
    """K and V as slices of one fused projection: nothing is copied."""
    batch = fi.ragged(ints(0, 65, 65, 68, 85), ints(0, 65, 65, 105, 122))
    g = torch.Generator().manual_seed(0)
    q = torch.randn(85, 4, 64, generator=g) * 3
    fused = torch.randn(122, 4, 64, generator=g)
    kv = fi.KvCacheView.ragged(fused[:, :2], fused[:, 2:])
    layer = fi.Attention(HEADS, torch.float32, band=band)
    layer.plan(batch)
    lse = torch.empty(85, 4)
    compare(Result(layer(q, kv, lse=lse), lse), Problem(batch, q, kv, band))


def test_nothing() -> None:
    batch = fi.ragged(ints(0), ints(0))
    layer = fi.Attention(HEADS, torch.float32)
    layer.plan(batch)
    kv = fi.KvCacheView.ragged(torch.zeros(0, 2, 64), torch.zeros(0, 2, 64))
    assert layer(torch.zeros(0, 4, 64), kv).shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("match", "kv_indptr"),
    [
        ("kv_indptr: expected torch.int32, got torch.int64", torch.tensor([0, 2])),
        ("kv_indptr: expected at least 5 at index 2, got 4", ints(0, 5, 4)),
        ("kv_indptr: expected R . 1 elements, got none", ints()),
        ("kv_indptr: expected 0 at index 0, got 1", ints(1, 2)),
        ("qo_indptr: expected 4 elements for 3 requests", ints(0, 1, 2, 3)),
    ],
)
def test_refusals(match: str, kv_indptr: Any) -> None:
    with pytest.raises(fi.InvalidInput, match=match):
        fi.ragged(ints(0, 2), kv_indptr)
