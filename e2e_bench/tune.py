"""Tile tables tried on a GPU: our attention with other tiles, stages and costs, beside its own.

A table is text, entries by comma, each in place of the class of as many rows:
ROWSxKV_TILExSTAGES:FIXED/COST, such as "16x64x3:290/150,128x64x2:600/320"; "own" is the table as it
is. @TOKENS at the end of an entry: cuts are at multiples of as many, of which each costs COST. An
entry NAME=VALUE defines a macro for our kernel, so that one tree holds both sides of an experiment.
All tables of a run take turns on each workload.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from e2e_bench import graph_timing, kernels
from e2e_bench.correctness import Reference
from e2e_bench.gpu_data import Data, make_pool
from e2e_bench.impls import Ours
from e2e_bench.run_log import RunLog
from fi_backend import _core, class_plans
from fi_backend.jit.attention_kernels import AttentionSpec

OWN = "own"
_ENTRY = re.compile(r"(\d+)x(\d+)x(\d+):(\d+)/(\d+)(?:@(\d+))?")
_MACRO = re.compile(r"([A-Z][A-Z_0-9]*)=(-?\d+)")


@dataclass(frozen=True)
class Table:
    """What a kernel is made of and planned with; the fields of _core.KernelTiles."""

    classes: list[_core.TileClass]
    stages: list[int]
    warps: int
    ctas_per_sm: int


@dataclass(frozen=True)
class Change:
    """Classes in place of those with as many rows.

    Attributes:
        text: that named them.
        classes: of each number of rows: class and stages.
        steps: of each number of rows: its class as plans cut it.
        macros: names and values.
    """

    text: str
    classes: dict[int, tuple[_core.TileClass, int]]
    steps: dict[int, _core.TileClass]
    macros: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Change:
        """Return the change that a text names.

        Raises:
            ValueError: it is not of the form above.
        """
        classes, steps, macros = {}, {}, []
        for entry in [] if text == OWN else text.split(","):
            if macro := _MACRO.fullmatch(entry):
                macros.append((macro[1], int(macro[2])))
                continue
            match = _ENTRY.fullmatch(entry)
            if match is None:
                rule = "ROWSxKV_TILExSTAGES:FIXED/COST or NAME=VALUE"
                raise ValueError(f"expected {rule}, got {entry!r}")
            rows, kv_tile, stages, fixed, cost = map(int, match.groups()[:5])
            classes[rows] = (_core.TileClass(rows, kv_tile, fixed, cost), stages)
            steps[rows] = _core.TileClass(rows, int(match[6] or kv_tile), fixed, cost)
        return cls(text, classes, steps, tuple(macros))

    def of(self, table: Any) -> Table:
        """Return the table changed."""
        pairs = [
            self.classes.get(one.rows, (one, stages))
            for one, stages in zip(table.classes, table.stages, strict=True)
        ]
        classes, stages = map(list, zip(*pairs, strict=True))
        return Table(classes, stages, table.warps, table.ctas_per_sm)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Planners that are built meanwhile are of the changed table."""
        own, own_classes = _core.sm80_tiles, class_plans._tile_classes
        own_spec = class_plans.attention_spec

        def planned(*args: Any, **kwargs: Any) -> list[_core.TileClass]:
            return [self.steps.get(one.rows, one) for one in own_classes(*args, **kwargs)]

        def specified(*args: Any, **kwargs: Any) -> AttentionSpec:
            return replace(own_spec(*args, **kwargs), macros=self.macros)

        _core.sm80_tiles = lambda *shape: self.of(own(*shape))  # type: ignore[assignment]
        class_plans._tile_classes = planned
        class_plans.attention_spec = specified
        try:
            yield
        finally:
            _core.sm80_tiles = own  # type: ignore[assignment]
            class_plans._tile_classes = own_classes
            class_plans.attention_spec = own_spec


def run(texts: Sequence[str], only: Sequence[str], levels: int | None, quick: bool) -> int:
    """Run the tables on the workloads named; return the exit status.

    Args:
        texts: tables.
        only: words in the names of workloads.
        levels: of prefixes that planners have room for; None: as many as the workload has.
        quick: three repeats instead of ten.
    """
    device, log = torch.device("cuda", torch.cuda.current_device()), RunLog()
    changes = [Change.parse(text) for text in texts]
    workloads = kernels.chosen_workloads(only)
    pool = make_pool(workloads, device)
    print(f"{'µs, median':20}", *(change.text for change in changes), sep=" | ", flush=True)
    for workload in workloads:
        data = Data(workload, pool)
        reference = Reference(data)
        calls = graph_timing.calls_per_graph(len(data.layers), workload.floor_us)
        graphs = {}
        for change in changes:
            with log.attempt(workload.name, change.text), change.applied():
                prepared = Ours(levels).prepare(data)
                reference.error_ratio(prepared.result())
                graphs[change.text] = graph_timing.record(prepared.call, len(data.layers), calls)
        times = graph_timing.time_in_turns(graphs, 3 if quick else 10)
        cells = [f"{median(times[c.text]):.2f}" if c.text in times else "–" for c in changes]
        print(f"{workload.name:20}", *cells, sep=" | ", flush=True)
        if log.device_is_lost:
            break
    return log.finish()
