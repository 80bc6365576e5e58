"""Tile tables by text, for the tuning of kernels."""

from __future__ import annotations

import pytest
import torch

from e2e_bench import tune
from fi_backend import Capacity, HeadShape, LayerClass, _core, class_plans

SHAPE = (128, 128, 2, 4, 32, 64, 233472)


def fields(classes: list[_core.TileClass]) -> list[tuple[int, int, int, int]]:
    return [(c.rows, c.kv_tile, c.c_fixed, c.c_tile) for c in classes]


def test_an_entry_takes_the_place_of_the_class_of_as_many_rows() -> None:
    own = _core.sm80_tiles(*SHAPE)
    with tune.Change.parse("16x32x4:300/90").applied():
        changed = _core.sm80_tiles(*SHAPE)
    assert fields(changed.classes) == [(16, 32, 300, 90), *fields(own.classes)[1:]]
    assert changed.stages == [4, *own.stages[1:]]
    assert (changed.warps, changed.ctas_per_sm) == (own.warps, own.ctas_per_sm)
    assert fields(_core.sm80_tiles(*SHAPE).classes) == fields(own.classes), "left changed"


def test_plans_may_be_cut_finer_than_tiles() -> None:
    layer = LayerClass(HeadShape(32, 8, 128), torch.bfloat16)
    capacity = Capacity(4, 4, 1024, max_q_len=1)
    with tune.Change.parse("16x64x2:290/95@32").applied():
        plan = class_plans.plan_class(
            layer, capacity, torch.device("cuda"), num_ctas=None, invariant_chunk=0
        )
    assert plan.spec is not None
    assert plan.spec.tiles == ((16, 64, 2),)
    assert fields(plan.config.classes) == [(16, 32, 290, 95)]


@pytest.mark.parametrize("text", ["16x64:290/190", "16x64x2", "own,16x64x2:1/1", ""])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected ROWSxKV_TILExSTAGES:FIXED/COST, got"):
        tune.Change.parse(text)
