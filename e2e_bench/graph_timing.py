"""Times on the GPU: CUDA graphs of many calls, replayed in turns.

A graph has no host work between its launches, which is how a serving engine runs attention. All
implementations take turns, so that a slow phase or a hot chip hits them alike. Before, they run for
a while that is not timed: a GPU that waited for the host, or reached the limit of its power, may
have other clocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

# Keeps the GPU busy while the host enqueues events and graph: about 1 ms at 1.98 GHz.
HEAD_START_CYCLES = 2_000_000
MIN_GRAPH_US = 3000.0  # so that the gap before the first launch of a graph does not count
MAX_CALLS = 600
WARM_UP_S = 0.3  # clocks of an H200 have recovered from its power limit by then
TURNS = 2


@dataclass(frozen=True)
class Recorded:
    """A captured graph of ``calls`` calls, and what keeps the memory it names alive."""

    graph: torch.cuda.CUDAGraph
    calls: int
    call: Callable[[int], None]


def calls_per_graph(layers: int, floor_us: float) -> int:
    """Return a multiple of the layers that makes a graph long enough to time.

    Example: 9 layers with a floor of 15 µs: 200 calls would be long enough, 207 are whole turns.
    """
    wanted = MIN_GRAPH_US / max(floor_us, 5.0)
    turns = max(1, -(-int(wanted) // layers))
    return layers * min(turns, max(1, MAX_CALLS // layers))


def record(call: Callable[[int], None], layers: int, calls: int) -> Recorded:
    """Capture ``call(0), call(1), ...``, the layers in turn; each layer was called before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % layers)
    graph.replay()
    torch.cuda.synchronize()
    return Recorded(graph, calls, call)


def time_in_turns(graphs: Mapping[str, Recorded], repeats: int) -> dict[str, list[float]]:
    """Return µs per call, ``repeats`` times for each graph, one replay each in turn.

    For graphs that draw like power: one that makes the GPU lower its clocks does so for all.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    _warm_up(graphs.values())
    for _ in range(repeats):
        for name, recorded in graphs.items():
            times[name].append(_time(recorded))
    return times


def time_apart(graphs: Mapping[str, Recorded], repeats: int) -> dict[str, list[float]]:
    """Return the same at the clocks that each graph's own power leaves.

    A graph is replayed alone until clocks have followed, and then for its times; all have two turns
    of that, so that a slow phase or a hot chip hits them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(TURNS):
        for name, recorded in graphs.items():
            _warm_up([recorded])
            times[name] += [_time(recorded) for _ in range(turn, repeats, TURNS)]
    return times


def _time(recorded: Recorded) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    recorded.graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / recorded.calls


def _warm_up(recorded: Collection[Recorded]) -> None:
    begin = time.perf_counter()
    while recorded and time.perf_counter() - begin < WARM_UP_S:
        for one in recorded:
            one.graph.replay()
        torch.cuda.synchronize()
