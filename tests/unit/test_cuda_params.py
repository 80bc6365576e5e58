"""Variant parameters and FI_CHECK=1 of attention on a GPU; the launch itself is faked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_launch import Launches, fake_launches, make_batch, make_kv, make_q, make_slot, plan
from torch import Tensor

import fi_backend as fi
from fi_backend import _core, cuda_launch
from fi_backend.variants import Scalar, Variant
from fi_backend.variants.shipped import alibi, sinks


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return fake_launches(monkeypatch)


def test_parameters_of_a_variant(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(_core, "KernelParams", make_params_recorder(written))
    gain = Variant("gain", lambda logit, gain: logit * gain, params=(Scalar("gain"),))
    slot = make_slot(gain.then(alibi()).then(sinks()))
    plan(slot)
    slopes, values = torch.zeros(8)[::2], torch.zeros(4)

    def run(gain: float, slopes: Tensor) -> None:
        params = {"sinks": values, "gain": gain, "slopes": slopes}
        fi.attention(slot, make_q(), make_kv(), params=params)

    run(30.0, slopes)
    assert launches.params.sinks == values.data_ptr()
    # In the order of the functions: the gain, then the slopes.
    assert written == [[(0, (0, 0, 0), 30.0), (slopes.data_ptr(), (2, 0, 0), 0.0)]]
    run(30.0, slopes)
    assert len(written) == 1  # nothing changed
    other = torch.zeros(8)[::2]
    run(30.0, other)
    run(20.0, torch.zeros(4))
    assert written[1][1][0] == other.data_ptr()
    assert written[2][0][2] == 20.0 and written[2][1][1] == (1, 0, 0)
    for match, params in (
        ("params: expected a value for 'slopes'", {"sinks": values, "gain": 1.0}),
        ("at least 4 elements along axis 0", {"sinks": values, "gain": 1.0, "slopes": values[:3]}),
        ("contiguous", {"sinks": torch.zeros(8)[::2], "gain": 1.0, "slopes": values}),
    ):
        with pytest.raises(fi.InvalidInput, match=match):
            fi.attention(slot, make_q(), make_kv(), params=params)
    run(30.0, slopes)
    assert len(written) == 4


def make_params_recorder(written: list[Any]) -> type:
    class Recorder(_core.KernelParams):  # type: ignore[misc]
        def set_variant_params(self, params: list[Any]) -> None:
            written.append(params)
            super().set_variant_params(params)

    return Recorder


def test_fi_check_sees_page_ids_and_tokens(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = make_slot()
    slot.checks_values = True
    batch = make_batch()
    for table, match in (([3, 7], "7 at row 0, page 1"), ([-1, 1], "-1 at row 0, page 0")):
        batch.page_table.entries[0, :2] = torch.tensor(table)
        slot.host_batch = batch
        plan(slot, batch)
        with pytest.raises(fi.InvalidInput, match=f"page ids in .0, 5.*got {match}"):
            fi.attention(slot, make_q(), make_kv())
    batch.page_table.entries[0, :2] = torch.tensor([3, 1])
    plan(slot, batch)
    with pytest.raises(fi.InvalidInput, match="q: expected at least 4 tokens"):
        fi.attention(slot, make_q(3, 4, 64), make_kv())
    assert slot.captured_pages == 0
    monkeypatch.setattr(cuda_launch, "is_capturing", lambda device: True)
    fi.attention(slot, make_q(), make_kv())
    assert slot.captured_pages == 5


def test_without_fi_check_the_device_is_trusted(launches: Launches) -> None:
    slot = make_slot()
    batch = make_batch()
    batch.page_table.entries.fill_(1 << 20)
    plan(slot, batch)
    fi.attention(slot, make_q(3, 4, 64), make_kv())
    assert len(launches.calls) == 1
