"""Which graphs are replayed before others are timed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from e2e_bench import graph_timing
from e2e_bench.graph_timing import Recorded

CALLS = 3


@dataclass(frozen=True)
class Replayed:
    """Stands for a graph; writes its name when replayed, in capitals while it is timed."""

    name: str
    log: list[str]

    def replay(self) -> None:
        is_timed = self.log[-1:] == ["("]
        self.log.append(self.name.upper() if is_timed else self.name)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replays on a GPU that takes 6 ms each; a warm-up has room for two rounds."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append(")" if "(" in log[-2:] else "(")

        def elapsed_time(self, _: Event) -> float:
            return 6.0

    clock = count()
    step = graph_timing.WARM_UP_S / 2.5
    time = SimpleNamespace(perf_counter=lambda: next(clock) * step)
    monkeypatch.setattr(graph_timing, "time", time)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    return log


def graphs(log: list[str]) -> dict[str, Recorded]:
    made: dict[str, Any] = {name: Replayed(name, log) for name in "ab"}
    return {name: Recorded(graph, CALLS, lambda _: None) for name, graph in made.items()}


def test_all_run_before_any_is_timed(log: list[str]) -> None:
    times = graph_timing.time_in_turns(graphs(log), 2)
    assert "".join(log) == "abab" + "(A)(B)" * 2
    assert times == {"a": [2000.0] * 2, "b": [2000.0] * 2}


def test_each_is_timed_behind_itself(log: list[str]) -> None:
    times = graph_timing.time_apart(graphs(log), 3)
    assert "".join(log) == "aa(A)(A)bb(B)(B)" + "aa(A)bb(B)"
    assert times == {"a": [2000.0] * 3, "b": [2000.0] * 3}
