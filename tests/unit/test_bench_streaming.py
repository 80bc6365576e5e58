"""The benchmark of RoPE inside attention without a GPU; graphs are stood in for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

import fi_backend as fi
from e2e_bench import graph_timing, streaming, tables
from e2e_bench.graph_timing import Recorded
from e2e_bench.streaming import APART, STREAMS, Decoder, Engine, Stream
from e2e_bench.tables import OURS

CPU = torch.device("cpu")
SMALL = Stream("small", Decoder(2, 128, 256, fi.HeadShape(4, 2, 64)), 3, 40, 300)


@pytest.mark.parametrize("kv_len", [300, 304, 305, 44, 45, 30])
def test_both_ways_agree(kv_len: int) -> None:
    torch.manual_seed(1)
    engine = Engine(Stream("small", SMALL.decoder, 3, 40, kv_len), CPU)
    inside, apart = engine.step(OURS).float(), engine.step(APART).float()
    assert float((inside - apart).norm() / apart.norm()) < streaming.TOLERANCE
    assert inside.isfinite().all() and float(inside.norm()) > 1


def test_slots_matter() -> None:
    """What turns by positions instead of slots is told apart."""
    torch.manual_seed(1)
    engine = Engine(SMALL, CPU)
    inside = engine.step(OURS).float()
    engine.slots = engine.slots.roll(1)
    apart = engine.step(APART).float()
    assert float((inside - apart).norm() / apart.norm()) > streaming.TOLERANCE


def test_rows_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(call: Callable[[int], None], layers: int, count: int) -> Recorded:
        call(layers - 1)
        return Recorded(None, count, call)  # type: ignore[arg-type]

    def in_turns(graphs: Mapping[str, Recorded], repeats: int) -> dict[str, list[float]]:
        return {name: [7.0 if name == OURS else 10.0] * repeats for name in graphs}

    monkeypatch.setattr(graph_timing, "record", record)
    monkeypatch.setattr(graph_timing, "time_in_turns", in_turns)
    rows = streaming.bench(SMALL, CPU, 3)
    names = [("small.step", OURS), ("small.step", APART)]
    names += [("small.attention", OURS), ("small.attention", APART)]
    assert [(row.workload, row.impl) for row in rows] == names
    table = tables.streaming_table(rows)
    assert table.splitlines()[2].endswith("| 30.0% |")


def test_workloads_have_names_of_their_own() -> None:
    assert len({stream.name for stream in STREAMS}) == len(STREAMS) == 10
