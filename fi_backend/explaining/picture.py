"""The picture of a planned step: matrix, timeline and, with shared prefixes, the forest."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from fi_backend.explaining.step import Ints, Request, Step

Floats = npt.NDArray[np.float64]
Color = tuple[float, float, float]

WIDTH_INCHES = 12.0
MAX_COLUMNS = 1600  # more pages than that share columns of the picture
MAX_LABELS = 64
MAX_PAGE_LABELS = 40
MIN_NAMED_SHARE = 0.03  # of the timeline's length
INK = "#222222"


def request_color(request: int) -> Color:
    """Return a colour that differs clearly from those of neighbouring indices."""
    hue = (0.58 + request * 0.618034) % 1.0
    return colorsys.hsv_to_rgb(hue, 0.55 + 0.2 * (request % 2), 0.86)


def node_color(level: int) -> Color:
    """Return a slate that gets lighter with each level of the forest."""
    value = min(0.3 + 0.13 * level, 0.75)
    return colorsys.hsv_to_rgb(0.6, 0.25, value)


def draw_step(step: Step, path: Path) -> Path:
    """Draw ``step`` into ``path`` and return it."""
    counts = [sum(row_heights(step.requests)), step.num_ctas]
    if step.nodes:
        counts.append(len(step.requests))
    heights = [float(np.clip(1.2 + 0.15 * count, 2.4, 9)) for count in counts]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_matrix(panels[0], step)
    draw_timeline(panels[1], step)
    if step.nodes:
        draw_forest(panels[2], step)
    figure.savefig(path, dpi=110)
    return path


def row_heights(requests: Sequence[Request]) -> list[int]:
    """Picture rows of each request: its query tokens, or their logarithm when they are many."""
    lengths = [request.q_len for request in requests]
    if sum(lengths) <= MAX_LABELS:
        return lengths
    return [n if n < 2 else 1 + int(np.ceil(np.log2(n))) for n in lengths]


# --- the block-sparse matrix -------------------------------------------------------------------


def draw_matrix(axes: Axes, step: Step) -> None:
    """Rows are query tokens by request, columns are the pages in use; shade is visibility."""
    columns = page_columns(step)
    per_column = -(-len(columns) // MAX_COLUMNS) if columns else 1
    heights = row_heights(step.requests)
    tops = np.concatenate([[0], np.cumsum(heights)]).astype(int)
    image = np.ones((max(int(tops[-1]), 1), max(-(-len(columns) // per_column), 1), 3))
    for r, request in enumerate(step.requests):
        if not heights[r]:
            continue
        tokens = np.linspace(0, request.q_len - 1, heights[r]).astype(np.int64)
        for begin, pages, color in _parts(step, r, request):
            shade = visible_fraction(step, request, tokens, begin, len(pages))
            at = np.array([columns[int(p)] // per_column for p in pages], dtype=np.int64)
            _blend(image[tops[r] : tops[r + 1]], at, shade, color)
    axes.imshow(
        image,
        aspect="auto",
        interpolation="nearest",
        extent=(0, max(len(columns), 1), float(tops[-1]) or 1.0, 0),
    )
    _outline_nodes(axes, step, columns, tops)
    for top in tops[1:-1]:
        axes.axhline(top, color="white", linewidth=0.6)
    centers = [(a + b) / 2 for a, b in pairwise(tops)]
    names = [f"r{r} · {q.q_len:,} q · {q.kv_len:,} kv" for r, q in enumerate(step.requests)]
    _label_rows(axes, centers, names)
    if len(columns) <= MAX_PAGE_LABELS:
        axes.set_xticks([c + 0.5 for c in columns.values()], [str(p) for p in columns], fontsize=7)
    axes.set_xlabel(f"pages of the pool in use, in order of first use ({step.page_size} tokens)")
    axes.set_title(
        "Block-sparse matrix: query tokens by pages"
        + (" (outlined: nodes, read once for all their rows)" if step.nodes else ""),
        loc="left",
    )


def page_columns(step: Step) -> dict[int, int]:
    """Page id -> column, by first use: nodes first, then each request's own pages."""
    columns: dict[int, int] = {}
    for pages in step.page_lists():
        for page in pages:
            columns.setdefault(int(page), len(columns))
    return columns


def _parts(step: Step, r: int, request: Request) -> Iterable[tuple[int, Ints, Color]]:
    """KV ranges of a request by first position: shared ones, then its own."""
    for n in request.nodes:
        node = step.nodes[n]
        yield node.kv_begin, node.pages, node_color(node.level)
    yield request.own_begin, request.pages, request_color(r)


def visible_fraction(
    step: Step, request: Request, tokens: Ints, begin: int, num_pages: int
) -> Floats:
    """Return the share of each page that the tokens' band lets them see.

    Args:
        step: gives band and page size.
        request: whose tokens ask.
        tokens: [rows] query tokens, counted from the request's first.
        begin: a KV position in the first page.
        num_pages: consecutive pages that are asked about.

    Returns:
        [rows, num_pages], 0 to 1.
    """
    band, size = step.band, step.page_size
    position = request.kv_len - request.q_len + tokens[:, None]
    end = np.full_like(position, request.kv_len)
    if band.right >= 0:
        end = np.minimum(end, position + band.right + 1)
    low = np.maximum(position - band.left, 0) if band.left >= 0 else np.zeros_like(position)
    first = (begin // size + np.arange(num_pages, dtype=np.int64)) * size

    def overlap(a: Ints, b: Ints) -> Ints:
        length: Ints = np.minimum(first + size, b) - np.maximum(first, a)
        return np.where(length > 0, length, 0)

    sink_end = np.minimum(np.minimum(low, end), band.sink_prefix)
    fraction: Floats = (overlap(low, end) + overlap(np.zeros_like(low), sink_end)) / size
    return fraction


def _blend(rows: Floats, at: Ints, shade: Floats, color: Color) -> None:
    """Lay a colour over picture columns; any visible token leaves a visible tint."""
    strength = np.zeros(rows.shape[:2])
    tint = np.where(shade > 0, 0.25 + 0.75 * shade, 0.0)
    for column, of_page in zip(at, tint.T, strict=True):
        np.maximum(strength[:, column], of_page, out=strength[:, column])
    rows *= 1 - strength[..., None]
    rows += strength[..., None] * np.asarray(color)


def _outline_nodes(axes: Axes, step: Step, columns: dict[int, int], tops: Ints) -> None:
    for n, node in enumerate(step.nodes):
        if not len(node.pages):
            continue
        at = sorted(columns[int(p)] for p in node.pages)
        for first, last in _runs(node.members):
            for left, right in _runs(at):
                corner, height = (left, tops[first]), tops[last + 1] - tops[first]
                box = Rectangle(corner, right + 1 - left, height, fill=False)
                box.set(edgecolor=INK, linewidth=1.4)
                axes.add_patch(box)
        first, last = _runs(node.members)[0]
        middle = (at[0] + at[-1] + 1) / 2, (tops[first] + tops[last + 1]) / 2
        axes.text(*middle, f"n{n}", ha="center", va="center", color="white", fontsize=8)


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of consecutive integers, first and last included."""
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return runs


def _label_rows(axes: Axes, centers: Sequence[float], names: Sequence[str]) -> None:
    """Name the rows, leaving out names that would touch the one above."""
    height = abs(axes.get_ylim()[0] - axes.get_ylim()[1])
    kept: list[int] = []
    for i, center in enumerate(centers):
        if not kept or center - centers[kept[-1]] >= height / MAX_LABELS:
            kept.append(i)
    size = 8 if len(kept) <= 24 else 6
    axes.set_yticks([centers[i] for i in kept], [names[i] for i in kept], fontsize=size)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


# --- the timeline ------------------------------------------------------------------------------


def draw_timeline(axes: Axes, step: Step) -> None:
    """One row per CTA, one bar per work item; hatched bars leave partial states."""
    whole: list[Rectangle] = []
    partial: list[Rectangle] = []
    for bar in step.bars:
        box = Rectangle((bar.start, bar.cta - 0.42), bar.end - bar.start, 0.84)
        node = bar.request < 0
        color = node_color(step.nodes[~bar.request].level) if node else request_color(bar.request)
        box.set_facecolor(color)
        (partial if bar.partial else whole).append(box)
    _add_boxes(axes, whole, None)
    _add_boxes(axes, partial, "////")
    _name_bars(axes, step)
    if step.merges:
        ctas, times = zip(*step.merges, strict=True)
        axes.scatter(times, ctas, marker="D", s=14, color=INK, linewidths=0, zorder=3)
    costs = step.span_costs
    if costs.any():
        axes.axvline(float(costs.mean()), color=INK, linestyle=":", linewidth=1)
    axes.set_xlim(0, float(costs.max(initial=1)) * 1.01)
    axes.set_ylim(step.num_ctas - 0.4, -0.6)
    stride = max(1, step.num_ctas // 32)
    axes.set_yticks(range(0, step.num_ctas, stride))
    axes.set_ylabel("CTA")
    axes.set_xlabel("cost units (dotted: the mean over CTAs)")
    axes.set_title(f"Timeline: {len(step.bars):,} work items on {step.num_ctas} CTAs", loc="left")
    handles: list[Patch] = [
        Patch(facecolor="#bbbbbb", label="writes the output"),
        Patch(facecolor="#bbbbbb", edgecolor="white", hatch="////", label="split or shared range"),
    ]
    if step.nodes:
        handles.append(Patch(facecolor=node_color(0), label="item of a node"))
    (diamond,) = axes.plot([], [], "D", color=INK, markersize=4, label="last arriver merges")
    axes.legend(
        handles=[*handles, diamond], fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1)
    )
    axes.spines[["top", "right"]].set_visible(False)


def _name_bars(axes: Axes, step: Step) -> None:
    """Write the request or node once over consecutive bars, where there is room."""
    room = float(step.span_costs.max(initial=1)) * MIN_NAMED_SHARE
    for (_, request), run in groupby(step.bars, key=lambda bar: (bar.cta, bar.request)):
        bars = list(run)
        if bars[-1].end - bars[0].start < room:
            continue
        name = f"r{request}" if request >= 0 else f"n{~request}"
        text = axes.text(bars[0].start + room / 6, bars[0].cta, name, color="white")
        text.set(va="center", fontsize=7, fontweight="bold")
        text.set_path_effects([withStroke(linewidth=2, foreground=INK)])


def _add_boxes(axes: Axes, boxes: list[Rectangle], hatch: str | None) -> None:
    if not boxes:
        return
    collection = PatchCollection(boxes, match_original=True)
    collection.set(edgecolor="white", linewidth=0.4, hatch=hatch)
    axes.add_collection(collection)


# --- the forest --------------------------------------------------------------------------------


def draw_forest(axes: Axes, step: Step) -> None:
    """KV positions to the right, a row per request; a node spans the rows of its members."""
    order = sorted(range(len(step.requests)), key=lambda r: (step.requests[r].nodes, r))
    row_of = {r: row for row, r in enumerate(order)}
    for n, node in enumerate(step.nodes):
        rows = sorted(row_of[r] for r in node.members)
        width = node.kv_end - node.kv_begin
        for first, last in _runs(rows):
            box = Rectangle((node.kv_begin, first), width, last + 1 - first)
            box.set(facecolor=node_color(node.level), edgecolor="white", linewidth=1.2)
            axes.add_patch(box)
        label = f"n{n}: {width:,} tokens, {len(rows)} requests"
        middle = (node.kv_begin + node.kv_end) / 2
        row = (rows[0] + rows[-1] + 1) / 2
        axes.text(middle, row, label, ha="center", va="center", color="white", fontsize=8)
    for r, request in enumerate(step.requests):
        box = Rectangle((request.own_begin, row_of[r] + 0.06), 0, 0.88)
        box.set_width(request.kv_len - request.own_begin)
        box.set(facecolor=request_color(r), edgecolor="white", linewidth=0.4)
        axes.add_patch(box)
    longest = max((request.kv_len for request in step.requests), default=1)
    axes.set_xlim(0, max(longest, 1) * 1.01)
    axes.set_ylim(len(order), 0)
    _label_rows(axes, [row + 0.5 for row in range(len(order))], [f"r{r}" for r in order])
    axes.set_xlabel("KV position (tokens)")
    axes.set_title("Forest: shared prefixes (slate) and each request's own part", loc="left")
