"""What attention on a GPU hands to the driver, and what it refuses; the launch itself is faked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_launch import (
    STREAM,
    Choice,
    Launches,
    fake_launches,
    make_batch,
    make_kv,
    make_q,
    make_slot,
    plan,
)
from torch import Tensor

import fi_backend as fi
from fi_backend import cuda_launch
from fi_backend.cuda_launch import has_aligned_strides, is_plain


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return fake_launches(monkeypatch)


TABLES: dict[str, tuple[bool, Callable[[], fi.PageTable]]] = {
    "dense": (True, lambda: make_batch().page_table),
    "one token": (True, lambda: make_batch(1).page_table),
    "24 tokens": (False, lambda: make_batch(24).page_table),
    "strided": (True, lambda: make_batch(entry_stride=2).page_table),
    "slots": (False, lambda: make_batch(slot_divisor=16).page_table),
    "mapped": (False, lambda: make_batch(page_map=torch.arange(9).int()).page_table),
}


@pytest.mark.parametrize(("plain", "make"), TABLES.values(), ids=TABLES)
def test_plain_tables(plain: bool, make: Callable[[], fi.PageTable]) -> None:
    assert is_plain(make()) == plain


@pytest.mark.parametrize(
    ("tensor", "aligned"),
    [
        (make_q(), True),
        (make_q(4, 4, 65)[..., :64], False),  # 130 bytes from head to head
        (make_q(4, 4, 72)[..., :64], True),
        (make_q(1, 1, 64).as_strided((1, 1, 64), (3, 5, 1)), True),  # never stepped
        (make_q(4, 1, 64).as_strided((4, 1, 64), (64, 3, 1)), True),
        (torch.zeros(4, 2, 24, dtype=torch.float8_e4m3fn), False),
        (torch.zeros(4, 2, 32, dtype=torch.float8_e4m3fn), True),
        (torch.zeros(4, 2, 4), True),
    ],
)
def test_aligned_strides(tensor: Tensor, aligned: bool) -> None:
    assert has_aligned_strides(tensor) == aligned
    assert has_aligned_strides(make_q(), tensor) == aligned


def test_the_parameter_block(launches: Launches) -> None:
    slot, batch = make_slot(), make_batch(32)
    plan(slot, batch)
    q, kv, out, lse = make_q(), make_kv(page=32), make_q().float(), torch.zeros(4, 4)
    fi.attention(slot, q, kv, out=out, lse=lse, scale=0.5, partial=True)
    kernel, p, grid, threads, stream = launches.calls[0]
    assert (kernel, grid, threads, stream) == (Choice(True, True), 6, 128, STREAM)
    assert (p.q, p.out, p.lse) == (q.data_ptr(), out.data_ptr(), lse.data_ptr())
    assert (p.q_stride_token, p.q_stride_head) == (256, 64)
    assert (p.out_stride_token, p.out_stride_head) == (256, 64)
    assert (p.kv.k, p.kv.v) == (kv.k.data_ptr(), kv.v.data_ptr())
    assert (p.kv.k_stride.page, p.kv.k_stride.token, p.kv.k_stride.head) == (4096, 128, 64)
    assert (p.kv.num_pages, p.kv.page_size, p.kv.dtype) == (5, 32, 1)
    assert (p.table.entries, p.table.page_size) == (batch.page_table.entries.data_ptr(), 32)
    assert (p.page_shift, p.num_qo_heads, p.num_kv_heads) == (5, 4, 2)
    assert (p.band.left, p.band.right) == (-1, 0)
    assert (p.scale, p.out_is_float32, p.is_partial, p.sinks) == (0.5, 1, 1, 0)
    assert (p.plan, p.partial_o) == (slot.plan.data_ptr(), slot.partial_o.data_ptr())
    assert (p.partial_lse, p.arrivals) == (slot.partial_lse.data_ptr(), slot.arrivals.data_ptr())
    fi.attention(slot, q, kv, out=q)
    assert (p.lse, p.out, p.is_partial, p.out_is_float32) == (0, q.data_ptr(), 0, 0)
    assert p.scale == 64**-0.5


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan")])
def test_scales_that_masks_do_not_survive(launches: Launches, scale: float) -> None:
    slot = make_slot()
    plan(slot, make_batch())
    with pytest.raises(fi.InvalidInput, match="scale: expected a positive number on a GPU, got"):
        fi.attention(slot, make_q(), make_kv(), scale=scale)
    assert not launches.calls


def test_every_layer_and_step_brings_its_own_addresses(launches: Launches) -> None:
    slot = make_slot()
    plan(slot)
    for kv in (make_kv(), make_kv()):
        q = make_q()
        out = fi.attention(slot, q, kv)
        p = launches.params
        assert (p.q, p.kv.k, p.out) == (q.data_ptr(), kv.k.data_ptr(), out.data_ptr())
    for page in (32, 16):
        batch = make_batch(page)
        plan(slot, batch)
        fi.attention(slot, make_q(), make_kv(page=page))
        assert launches.params.table.entries == batch.page_table.entries.data_ptr()
        assert launches.params.page_shift == page.bit_length() - 1


def test_kernels_follow_tables_and_tensors(
    launches: Launches, caplog: pytest.LogCaptureFixture
) -> None:
    slot = make_slot()
    assert launches.loaded == [Choice(plain=True, aligned=True)]  # before any capture
    plan(slot)
    odd = torch.zeros(4 * 4 * 64 + 1, dtype=torch.float16)[1:].view(4, 4, 64)
    gaps = make_q(4, 4, 65)[..., :64]
    for q, aligned in ((make_q(), True), (odd, False), (gaps, False), (make_q(), True)):
        fi.attention(slot, q, make_kv())
        assert launches.kernel == Choice(True, aligned)
        fi.attention(slot, make_q(), make_kv(), out=q)
        assert launches.kernel == Choice(True, aligned)
    plan(slot, make_batch(24))
    fi.attention(slot, odd, make_kv(page=24))
    fi.attention(slot, make_q(), make_kv(page=24))
    loaded = [(True, True), (True, False), (False, True), (False, False)]
    assert launches.loaded == [Choice(*one) for one in loaded]
    plan(make_slot())
    slow = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(slow) == 2  # one sentence each, said once
    assert "not multiples of 16 bytes" in slow[0].message and "page_map" in slow[1].message


def test_boxes_need_plain_pages_of_some_tokens_and_alignment(launches: Launches) -> None:
    """Maps are not asked for: what tells that tensors are taken is replaced."""
    slot = make_slot(boxes=True)
    tensors = Taken()
    slot.launch._tensors = tensors  # type: ignore[attr-defined]
    assert launches.loaded == [Choice(True, True, True)]
    odd = torch.zeros(4 * 4 * 64 + 1, dtype=torch.float16)[1:].view(4, 4, 64)
    for page, q, expected in (
        (16, make_q(), Choice(True, True, True)),
        (16, odd, Choice(True, False, False)),
        (8, make_q(), Choice(True, True, False)),
        (24, make_q(), Choice(False, True, False)),
        (32, make_q(), Choice(True, True, True)),
    ):
        plan(slot, make_batch(page))
        before = len(launches.loaded)
        fi.attention(slot, q, make_kv(page=page))
        assert launches.kernel == expected
        assert tensors.boxes is (page in (16, 32))
        assert expected.aligned is False or len(launches.loaded) == before, "loaded by planning"


class Taken:
    """CallTensors that remember nothing and make no maps."""

    boxes = False

    def take(self, *_: Any) -> int:
        return -1

    def remember(self, _: Any, *tensors: Any) -> int:
        addresses = [tensor.data_ptr() for tensor in tensors[:4]]
        return addresses[0] % 16 | addresses[1] % 16

    def forget(self) -> None:
        """There is nothing."""


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "dtype": (r"q: expected float16 \[tokens, 4, 64\] on cpu", {"q": make_q().float()}),
    "device": ("q: expected .* on cpu.* on meta", {"q": make_q().to("meta"), "out": make_q()}),
    "heads": (r"q: expected .* got float16 \[4, 2, 64\]", {"q": make_q(4, 2, 64)}),
    "page": ("kv: expected pages of 16 tokens", {"kv": make_kv(page=8)}),
    "out": (r"out: expected float16 or float32 \[4, 4, 64\]", {"out": make_q(3, 4, 64)}),
    "lse": ("lse: expected a contiguous tensor", {"lse": torch.zeros(8, 4)[::2]}),
    "scale": ("k_scale: expected a contiguous float32 tensor", {"k_scale": torch.ones(3)}),
    "params": ("params: expected none for a layer class", {"params": {"cap": 3.0}}),
}


@pytest.mark.parametrize(("match", "changes"), REFUSED.values(), ids=REFUSED)
def test_refusals_leave_the_slot_usable(
    launches: Launches, match: str, changes: dict[str, Any]
) -> None:
    slot = make_slot()
    with pytest.raises(fi.InvalidInput, match=r"slot: expected a plan, got none"):
        fi.attention(slot, make_q(), make_kv())
    plan(slot)
    for _ in range(2):
        arguments = {"q": make_q(), "kv": make_kv()} | changes
        with pytest.raises(fi.InvalidInput, match=match):
            slot.launch.run(slot, *call_of(**arguments))
    assert not launches.calls
    fi.attention(slot, make_q(), make_kv())
    assert len(launches.calls) == 1


def call_of(q: Tensor, kv: fi.KvCacheView, **options: Any) -> Any:
    """The op's arguments; torch itself would refuse a mix of devices."""
    params = options.pop("params", {})
    out = options.pop("out", None)
    out = torch.empty_like(q) if out is None else out
    names, numbers = ",".join(params), [float(value) for value in params.values()]
    return cuda_launch.Call(q, kv.k, kv.v, out, 1.0, names=names, numbers=numbers, **options)


def test_scales_come_and_go(launches: Launches) -> None:
    slot = make_slot()
    plan(slot)
    one, per_head = torch.ones(1), torch.ones(2)
    for k_scale, v_scale in ((one, per_head), (per_head, None), (None, None), (None, one)):
        fi.attention(slot, make_q(), make_kv(), k_scale=k_scale, v_scale=v_scale)
        p = launches.params
        for scale, bound in ((None, p.q_scale), (k_scale, p.k_scale), (v_scale, p.v_scale)):
            assert bound.data == (0 if scale is None else scale.data_ptr())
            assert bound.per_head == (scale is per_head)
