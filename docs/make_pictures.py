"""Draws the pictures of docs/layouts.md: ``python docs/make_pictures.py [folder]``.

The last one comes from a real plan; the others are drawn by hand from the same small batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import fi_backend as fi
from fi_backend.explaining.picture import INK, node_color, request_color

Color = tuple[float, float, float] | str

STALE: Color = "#e4e4e4"
KEY: Color = "#f2c14e"
VALUE: Color = "#7fb7be"
# Two requests on pages of 4 tokens; the second has pages 2, 5, 0, and 3 of its tokens are new.
PAGE = 4
PAGES = ((4, 1), (2, 5, 0))
KV_LENS = (7, 11)
Q_LENS = (1, 3)


def canvas(width: float, height: float, x_end: float, y_end: float) -> tuple[Figure, Axes]:
    """Return a figure of the given inches with coordinates from 0, y downwards, and no frame."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, x_end)
    axes.set_ylim(y_end, 0)
    axes.set_axis_off()
    return figure, axes


def box(axes: Axes, at: tuple[float, float], size: tuple[float, float], fill: Color) -> None:
    """Draw one filled cell."""
    axes.add_patch(Rectangle(at, *size, facecolor=fill, edgecolor="white", linewidth=1.0))


def label(axes: Axes, x: float, y: float, text: str, **style: str | float) -> None:
    """Write centred text, or text that starts at x with ``ha="left"``."""
    options = {"ha": "center", "va": "center", "fontsize": 9, "color": INK} | style
    axes.text(x, y, text, **options)  # type: ignore[arg-type]


def cells(
    axes: Axes, at: tuple[float, float], texts: Sequence[str], fills: Sequence[Color]
) -> None:
    """Draw a row of unit cells with their texts."""
    for i, (text, fill) in enumerate(zip(texts, fills, strict=True)):
        box(axes, (at[0] + i, at[1]), (1, 1), fill)
        label(axes, at[0] + i + 0.5, at[1] + 0.5, text)


def owner_of(page: int) -> tuple[int, int] | None:
    """Return (request, index among its pages) of a page of the pool."""
    for request, pages in enumerate(PAGES):
        if page in pages:
            return request, pages.index(page)
    return None


def draw_pages() -> Figure:
    """The pool: six pages of four tokens, and whose tokens they hold."""
    figure, axes = canvas(9, 1.9, 29, 3.6)
    for page in range(6):
        owner = owner_of(page)
        left = 0.2 + page * 4.8
        label(axes, left + 2, 0.5, f"page {page}")
        for offset in range(PAGE):
            text, fill = "", STALE
            if owner is not None:
                position = owner[1] * PAGE + offset
                if position < KV_LENS[owner[0]]:
                    text, fill = f"r{owner[0]}:{position}", request_color(owner[0])
            box(axes, (left + offset, 1), (1, 1), fill)
            label(axes, left + offset + 0.5, 1.5, text, fontsize=8)
    note = "r1:5 = KV token at position 5 of request 1. Grey slots hold nothing that may be read."
    label(axes, 0.2, 2.9, note, ha="left")
    return figure


def draw_page_tables() -> Figure:
    """The same pages in the three forms of a page table."""
    figure, axes = canvas(9, 3.6, 27, 9.4)
    colors = [request_color(r) for r in range(2)]
    label(axes, 0.2, 0.6, "dense (vLLM): row r = request r", ha="left", fontweight="bold")
    rows = [["4", "1", "?", "?"], ["2", "5", "0", "?"]]
    for r, row in enumerate(rows):
        fills = [STALE if text == "?" else colors[r] for text in row]
        cells(axes, (1.5, 1.2 + r), row, fills)
        label(axes, 0.8, 1.7 + r, f"r{r}")
    text = "indirect (SGLang): row = table[row_index[r]]"
    label(axes, 10.2, 0.6, text, ha="left", fontweight="bold")
    label(axes, 11, 1.7, "row_index")
    cells(axes, (12.6, 1.2), ["2", "0"], colors)
    slots = {0: (2, 5, 0), 2: (4, 1)}
    for row in range(3):
        entries = [str(page * PAGE) for page in slots.get(row, ())]
        for column in range(12):
            value, fill = "·", STALE
            if column % PAGE == 0 and column // PAGE < len(entries):
                value, fill = entries[column // PAGE], colors[0 if row == 2 else 1]
            cells(axes, (10.6 + column, 2.6 + row), [value], [fill])
        label(axes, 10.1, 3.1 + row, str(row), fontsize=8)
    note = "one column per token, token slots as entries:\nentry_stride = slot_divisor = page size"
    label(axes, 10.6, 6.3, note, ha="left", fontsize=8)
    label(axes, 0.2, 7.0, "CSR: row r = indices[indptr[r] : indptr[r+1]]", ha="left", weight="bold")
    label(axes, 1.1, 8.3, "indptr")
    cells(axes, (2.2, 7.8), ["0", "2", "5"], ["#f4f4f4"] * 3)
    label(axes, 7.4, 8.3, "indices")
    cells(axes, (8.6, 7.8), ["4", "1", "2", "5", "0"], [*colors[:1] * 2, *colors[1:] * 3])
    return figure


def draw_kv_layouts() -> Figure:
    """One page of two tokens and two heads in memory order, for every cache layout."""
    layouts: dict[str, list[str]] = {
        "nhd": ["K t0 h0", "K t0 h1", "K t1 h0", "K t1 h1"],
        "hnd": ["K t0 h0", "K t1 h0", "K t0 h1", "K t1 h1"],
        "stacked": [f"{kv} t{t} h{h}" for kv in "KV" for t in (0, 1) for h in (0, 1)],
        "packed": [f"{kv} t{t} h{h}" for h in (0, 1) for t in (0, 1) for kv in "KV"],
        "slots": ["K s0 h0", "K s0 h1", "K s1 h0", "K s1 h1"],
    }
    notes = {
        "nhd": "V in a tensor of its own, likewise",
        "hnd": "V in a tensor of its own, likewise",
        "stacked": "vLLM 0.25: K and V of a page in one tensor",
        "packed": "vLLM 0.32 and later: K, V in one row",
        "slots": "SGLang: token slots; page p holds slots p·size …; V likewise",
    }
    figure, axes = canvas(9, 3.4, 27, 10)
    for row, (name, order) in enumerate(layouts.items()):
        y = 0.3 + row * 1.9
        label(axes, 0.2, y + 0.6, name, ha="left", fontweight="bold")
        for i, text in enumerate(order):
            fill = KEY if text[0] == "K" else VALUE
            box(axes, (3 + i * 2, y), (2, 1.1), fill)
            label(axes, 4 + i * 2, y + 0.55, text, fontsize=7)
        label(axes, 3.2 + len(order) * 2, y + 0.55, notes[name], ha="left", fontsize=8)
    return figure


def matrix_cell(request: int, token: int, column: int) -> Color | None:
    """Return the fill of (query token, KV position) where it is visible."""
    last = KV_LENS[request] - Q_LENS[request] + token
    return request_color(request) if column <= last else None


def draw_matrix() -> Figure:
    """Rows are query tokens, columns are the pages of the pool."""
    figure, axes = canvas(9, 2.5, 29, 6.4)
    row = 0
    for request, q_len in enumerate(Q_LENS):
        for token in range(q_len):
            label(axes, 1.6, 1.5 + row, f"r{request}, query {token}")
            for page in range(6):
                owner = owner_of(page)
                for offset in range(PAGE):
                    fill: Color | None = None
                    if owner is not None and owner[0] == request:
                        fill = matrix_cell(request, token, owner[1] * PAGE + offset)
                    box(axes, (3.6 + page * 4.2 + offset, 1 + row), (1, 1), fill or "#f4f4f4")
            row += 1
    for page in range(6):
        label(axes, 5.6 + page * 4.2, 0.5, f"page {page}")
    note = "r1's three query tokens are the last three of its 11 positions: each sees one more."
    label(axes, 3.6, 5.7, note, ha="left")
    return figure


def draw_formats() -> Figure:
    """Two requests with a common prefix: one matrix, and the sum of two."""
    figure, axes = canvas(9, 2.6, 30, 6.6)
    own = [request_color(r) for r in range(2)]
    slate = node_color(0)
    label(axes, 4.5, 0.5, "one matrix: the prefix is read twice", fontweight="bold")
    for r in range(2):
        box(axes, (0.5, 1.2 + 2 * r), (5, 1.9), own[r])
        label(axes, 3, 2.1 + 2 * r, f"prefix, read for r{r}")
        box(axes, (5.6 + 1.6 * r, 1.2 + 2 * r), (1.5, 1.9), own[r])
    label(axes, 10.5, 3.1, "=", fontsize=16)
    label(axes, 14.6, 0.5, "coarse: both requests' rows", fontweight="bold")
    box(axes, (12, 1.2), (5, 3.9), slate)
    label(axes, 14.5, 3.1, "node: the prefix,\nread once", color="white")
    label(axes, 18.6, 3.1, "⊕", fontsize=16)
    label(axes, 24, 0.5, "fine: a row block per request", fontweight="bold")
    for r in range(2):
        box(axes, (22 + 1.6 * r, 1.2 + 2 * r), (1.5, 1.9), own[r])
    note = "⊕ merges partial states (o, lse) of the same query token by log-sum-exp."
    label(axes, 0.5, 5.9, note, ha="left")
    return figure


def draw_packed_rows() -> Figure:
    """Query tokens and the heads of a group become the rows of one tile."""
    figure, axes = canvas(9, 2.3, 27, 6.6)
    label(axes, 0.3, 0.5, "q: 3 tokens, 4 query heads per KV head", ha="left", fontweight="bold")
    for token in range(3):
        fills = [request_color(2 + token)] * 4
        cells(axes, (1.8, 1.2 + token), [f"h{h}" for h in range(4)], fills)
        label(axes, 0.9, 1.7 + token, f"t{token}")
    label(axes, 8.4, 2.7, "→", fontsize=16)
    text = "packed rows of one tile (M = 16): row = token · 4 + head"
    label(axes, 10.2, 0.5, text, ha="left", fontweight="bold")
    for row in range(16):
        real = row < 12
        fill = request_color(2 + row // 4) if real else STALE
        name = f"{row}" if real else "–"
        cells(axes, (10.2 + row % 8 * 2, 1.2 + row // 8 * 1.6), [name], [fill])
        if real:
            where = f"t{row // 4} h{row % 4}"
            label(axes, 11.3 + row % 8 * 2, 1.7 + row // 8 * 1.6, where, ha="left", fontsize=6)
    note = (
        "All rows of a tile read the same K and V of one KV head, so each KV tile is loaded once\n"
        "for 12 rows. A decode of one token fills 4 of 16 rows; rows 12 to 15 are never computed."
    )
    label(axes, 0.3, 5.7, note, ha="left")
    return figure


def shared_step() -> tuple[fi.PagedBatch, fi.StepPlanner]:
    """Plan six decodes and a prefill; requests 0-3 share 256 tokens, 0 and 1 another 128."""
    kv_lens = [440, 420, 300, 330, 200, 96, 160]
    table = torch.arange(7 * 28, dtype=torch.int32).view(7, 28)
    table[1:4, :16] = table[0, :16]
    table[1, 16:24] = table[0, 16:24]

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    indptr = ints(0, 1, 2, 3, 4, 5, 6, 22)
    batch = fi.PagedBatch(indptr, ints(*kv_lens), fi.PageTable.dense(table, 16))
    batch = fi.shared_prefix(batch, [((0, 1, 2, 3), 0, 256), ((0, 1), 256, 384)])
    layer = fi.LayerClass(fi.HeadShape(4, 1, 64), torch.float32)
    planner = fi.StepPlanner([layer], fi.Capacity(8, 32, 512, 2, 8, 8), num_ctas=6)
    planner.plan(batch)
    return batch, planner


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "pages": draw_pages,
    "page_tables": draw_page_tables,
    "kv_layouts": draw_kv_layouts,
    "matrix": draw_matrix,
    "formats": draw_formats,
    "packed_rows": draw_packed_rows,
}


def main(folder: Path) -> None:
    """Write every picture into ``folder``."""
    # Equal bytes from equal code: no random ids, no date, text kept as text.
    mpl.rcParams.update({"svg.hashsalt": "fi_backend", "svg.fonttype": "none"})
    for name, draw in DRAWINGS.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})
    batch, planner = shared_step()
    fi.explain(batch, planner.slot(0), folder / "step.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
