"""Tile tables by text, for the tuning of kernels."""

from __future__ import annotations

import pytest
import torch

from e2e_bench import graph_timing, kernels, tune
from e2e_bench.graph_timing import Recorded
from e2e_bench.workloads import Workload
from fi_backend import Capacity, HeadShape, LayerClass, _core, class_plans
from fi_backend.jit.attention_kernels import attention_kernel

SHAPE = (128, 128, 2, 4, 32, 64, 233472)


def fields(classes: list[_core.TileClass]) -> list[tuple[int, int, int, int]]:
    return [(c.rows, c.kv_tile, c.c_fixed, c.c_tile) for c in classes]


def test_an_entry_takes_the_place_of_the_class_of_as_many_rows() -> None:
    own = _core.sm80_tiles(*SHAPE)
    with tune.Change.parse("8x32x4:300/90").applied():
        changed = _core.sm80_tiles(*SHAPE)
    assert fields(changed.classes) == [(8, 32, 300, 90), *fields(own.classes)[1:]]
    assert changed.stages == [4, *own.stages[1:]]
    assert (changed.warps, changed.ctas_per_sm) == (own.warps, own.ctas_per_sm)
    assert fields(_core.sm80_tiles(*SHAPE).classes) == fields(own.classes), "left changed"


def test_plans_may_be_cut_finer_than_tiles() -> None:
    layer = LayerClass(HeadShape(32, 8, 128), torch.bfloat16)
    capacity = Capacity(4, 4, 1024, max_q_len=1)
    with tune.Change.parse("8x64x2:290/95@32").applied():
        plan = class_plans.plan_class(
            layer, capacity, torch.device("cuda"), num_ctas=None, invariant_chunk=0
        )
    assert plan.spec is not None
    assert plan.spec.tiles == ((8, 64, 2),)
    assert fields(plan.config.classes) == [(8, 32, 290, 95)]


def test_macros_are_defined_ahead_of_the_headers() -> None:
    layer = LayerClass(HeadShape(32, 8, 128), torch.bfloat16)
    place = (layer, Capacity(4, 4, 1024, max_q_len=1), torch.device("cuda"))
    kernels = []
    for text in ("FI_TRIED=1,FI_OTHER=-2", "own"):
        with tune.Change.parse(text).applied():
            plan = class_plans.plan_class(*place, num_ctas=None, invariant_chunk=0)
        assert plan.spec is not None
        kernels.append(attention_kernel(plan.spec))
    changed, own = (kernel.source for kernel in kernels)
    assert changed == "#define FI_TRIED 1\n#define FI_OTHER -2\n\n" + own


@pytest.mark.parametrize("text", ["16x64:290/190", "16x64x2", "own,16x64x2:1/1", "A=b", ""])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected ROWSxKV_TILExSTAGES:FIXED/COST or NAME=VALUE, "):
        tune.Change.parse(text)


def test_tables_are_checked_and_take_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = Workload("tiny", (1, 1), (90, 33), HeadShape(4, 2, 64))
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(4 * workload.kv_bytes, generator=generator).bfloat16()
    tables = ["own", "16x64x2:300/200"]
    monkeypatch.setattr("e2e_bench.gpu_data.num_layers", lambda _: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels, "chosen_workloads", lambda _: [workload])
    monkeypatch.setattr(tune, "make_pool", lambda *_: pool)
    monkeypatch.setattr(graph_timing, "record", lambda call, *_: Recorded(None, 1, call))
    monkeypatch.setattr(
        graph_timing, "time_in_turns", lambda graphs, _: {text: [3.0, 1.0, 2.0] for text in graphs}
    )
    assert tune.run(tables, ["tiny"], None, quick=True) == 0
    assert capsys.readouterr().out.splitlines()[-1].split("|")[1:] == [" 2.00 ", " 2.00"]
    monkeypatch.setattr(tune.Ours, "prepare", lambda *_: 1 / 0)
    assert tune.run(tables, ["tiny"], None, quick=True) == 1, "what fails has no time"
