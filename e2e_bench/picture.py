"""Pictures of runs: a line per workload, and a mark per implementation or part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e_bench.report import Row
from e2e_bench.tables import APART, OURS, SHORT, by_workload

# Colours that stay apart for colour-blind readers (Okabe and Ito), and a shape each.
STYLES = {
    OURS: ("#d55e00", "D"),
    "fa3": ("#0072b2", "o"),
    "flashinfer_decode": ("#009e73", "s"),
    "flashinfer_fa2": ("#56b4e9", "^"),
    "flashinfer_fa3": ("#cc79a7", "v"),
    "flashinfer_persistent": ("#e69f00", "P"),
    "flashinfer_cascade": ("#666666", "X"),
}
LINE_INCHES = 0.27
# What the FlashInfer paper reports of RoPE fused into attention: of the time apart.
PAPER_STREAMING = (0.70, 0.72)


def draw(header: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Draw the rows that have a floor, as SVG; equal rows give equal bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    grouped = by_workload(row for row in rows if row.floor_us)
    names = list(grouped)
    with rc_context({"svg.hashsalt": "fi_backend", "font.size": 9}):
        figure = Figure(figsize=(8, 1.4 + LINE_INCHES * len(names)), layout="constrained")
        axes = figure.subplots()
        for impl, (color, marker) in STYLES.items():
            points = [
                (found[impl].us_median / (found[impl].floor_us or 1), names.index(name))
                for name, found in grouped.items()
                if impl in found
            ]
            if points:
                x, y = zip(*points, strict=True)
                # Ours lies on top; the peers' marks stay visible around it.
                size, order = (34, 3) if impl == OURS else (26, 2)
                label = impl if impl == OURS else SHORT[impl]
                axes.scatter(
                    x, y, size, color, marker=marker, label=label, zorder=order, linewidths=0
                )
        axes.set_xscale("log")
        axes.set_xticks([1, 1.25, 1.5, 2, 3, 5, 10], ["1", "1.25", "1.5", "2", "3", "5", "10"])
        axes.minorticks_off()
        axes.set_xlabel("time over the floor (log scale); left is better, 1 is the machine's limit")
        _finish(axes, names, header, -0.07)
        _save(figure, path)


def draw_streaming(header: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Draw what RoPE inside attention takes of the time apart, as SVG, as ``draw`` does."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shares: dict[str, dict[str, float]] = {}
    for workload, found in by_workload(rows).items():
        if OURS in found and APART in found:
            stream, _, part = workload.rpartition(".")
            share = found[OURS].us_median / found[APART].us_median
            shares.setdefault(stream, {})[part] = share
    names = list(shares)
    with rc_context({"svg.hashsalt": "fi_backend", "font.size": 9}):
        figure = Figure(figsize=(8, 1.6 + LINE_INCHES * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.axvspan(*PAPER_STREAMING, color="#dddddd", label="the paper's step")
        for part, color, marker in (("step", "#d55e00", "D"), ("attention", "#0072b2", "o")):
            points = [(shares[name].get(part), i) for i, name in enumerate(names)]
            x, y = zip(*((share, i) for share, i in points if share is not None), strict=True)
            axes.scatter(x, y, 34, color, marker=marker, label=part, zorder=3, linewidths=0)
        axes.set_xlim(0, 1.1)
        axes.set_xlabel("time with RoPE inside attention, of that apart; left is better")
        _finish(axes, names, header, -0.14)
        _save(figure, path)


def _finish(axes: Any, names: Sequence[str], header: dict[str, Any], legend_at: float) -> None:
    """Name the lines, and say what the marks are and what was measured."""
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, legend_at), ncols=4, frameon=False)
    axes.set_title(f"{header['gpu']}, {header['date']}, kernels {header['kernels_hash']}")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
