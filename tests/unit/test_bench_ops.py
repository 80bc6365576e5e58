"""The benchmark of append_kv and merge_states checks what it times."""

from __future__ import annotations

import pytest
import torch

from e2e_bench import ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "TOKENS", 256)
    monkeypatch.setattr(ops, "MERGED_TOKENS", 80)


@pytest.mark.parametrize("name", ops.MAKERS)
def test_every_operation_passes_its_own_check(name: str) -> None:
    op = ops.MAKERS[name](CPU)
    with pytest.raises((AssertionError, IndexError)):
        op.check()  # before it ran
    op.call()
    op.check()


def test_the_check_sees_keys_that_are_not_rotated() -> None:
    rotated = ops.append(CPU, torch.bfloat16, rotates=True)
    with pytest.MonkeyPatch.context() as patch:
        append = ops.fi.append_kv
        patch.setattr(ops.fi, "append_kv", lambda k, v, kv, slots, **_: append(k, v, kv, slots))
        rotated.call()
        with pytest.raises(AssertionError):
            rotated.check()
    rotated.call()
    rotated.check()


def test_bytes_count_what_is_read_and_written() -> None:
    row = 8 * 128  # elements of a token
    plain = ops.append(CPU, torch.bfloat16, rotates=False)
    assert plain.num_bytes == 256 * row * 2 * (2 + 2)  # K and V, in and out
    small_cache = ops.append(CPU, torch.float8_e4m3fn, rotates=False)
    assert small_cache.num_bytes == 256 * row * 2 * (2 + 1)
    rotated = ops.append(CPU, torch.bfloat16, rotates=True)
    assert rotated.num_bytes == plain.num_bytes + 256 * (32 * 128 * 2 * 2 + 128 * 4)
    assert ops.merge(CPU, 4).num_bytes == 5 * 80 * 32 * (128 + 1) * 4
