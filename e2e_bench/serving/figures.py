"""What a matrix measured, for people: a table per load, and a page with a picture."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e_bench.serving.engines import ENGINES

Row = Mapping[str, Any]
OURS = {name for engine in ENGINES.values() for name in engine.ours}
COLUMNS = (
    ("tokens/s", "output_throughput"),
    ("ITL median", "median_itl_ms"),
    ("mean", "mean_itl_ms"),
    ("p99", "p99_itl_ms"),
    ("TPOT median", "median_tpot_ms"),
    ("TTFT median", "median_ttft_ms"),
    ("mean", "mean_ttft_ms"),
    ("p99", "p99_ttft_ms"),
)


def measured(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Return the loads in the order they came, each with its rows."""
    titles = [_title(row) for row in rows if "output_throughput" in row]
    return [
        (title, [row for row in rows if "output_throughput" in row and _title(row) == title])
        for title in dict.fromkeys(titles)
    ]


def _title(row: Row) -> str:
    return f"{row['engine']} · {row['shape']} · {row['workload']}"


def table(rows: Sequence[Row]) -> str:
    """Return Markdown: milliseconds, and the share of KV reads that sharing saved."""
    lines = []
    for title, found in measured(rows):
        lines += [f"\n{title} (ms):\n", _line(["backend", *(name for name, _ in COLUMNS), "saved"])]
        lines.append(_line(["---"] * (len(COLUMNS) + 2)))
        lines += [_line(_cells(row)) for row in found]
    for row in rows:
        if row["workload"] == "failed":
            lines.append(f"\n{row['engine']} {row['backend']} failed: {row['why']}")
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    values = [row.get(key) for _, key in COLUMNS]
    cells = ["" if value is None else f"{value:,.4g}" for value in values]
    return [row["backend"], *cells, _saved(row)]


def _saved(row: Row) -> str:
    if not row.get("kv_tokens"):
        return ""
    return f"{100 * row['saved_kv_tokens'] / row['kv_tokens']:.1f} %"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(out: Path, meta: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write ``out`` with the endings .png and .html; nothing where nothing was measured.

    A picture that cannot be drawn is missed with a line.
    """
    loads = measured(rows)
    if not loads:
        return
    picture = b""
    if importlib.util.find_spec("matplotlib"):
        try:
            picture = _picture(loads, "png")
            out.with_suffix(".png").write_bytes(picture)
        except Exception as error:  # whatever breaks matplotlib: figures are worth more
            print(f"no picture: {error!r}; the figures are in {out}")
    else:
        print(f"no picture: matplotlib is not installed; the same command elsewhere draws {out}")
    out.with_suffix(".html").write_text(_page(meta, rows, picture))


def draw_svg(path: Path, rows: Sequence[Row]) -> None:
    """Draw committed results of servers, as SVG; equal rows give equal bytes."""
    path.write_bytes(_picture(measured(rows), "svg"))


def _picture(loads: Sequence[tuple[str, Sequence[Row]]], form: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": "fi_backend"}):
        figure = Figure(figsize=(10, 1 + 1.6 * len(loads)), layout="constrained")
        _draw_loads(figure.subplots(len(loads), 2, squeeze=False), loads)
        metadata = {"Date": None} if form == "svg" else {}
        figure.savefig(picture, format=form, dpi=110, metadata=metadata)
    return picture.getvalue()


def _draw_loads(axes: Any, loads: Sequence[tuple[str, Sequence[Row]]]) -> None:
    for (title, found), line in zip(loads, axes, strict=True):
        # Not ITL: of several samples a prompt a client times no gaps, and tokens that come in
        # bunches have a median that is far below the time of a step.
        pictures = (
            ("output_throughput", "tokens per second"),
            ("median_tpot_ms", "median TPOT, ms"),
        )
        for (key, unit), axis in zip(pictures, line, strict=True):
            shown = [row for row in found if row.get(key) is not None]
            colors = [f"C{int(row['backend'].split()[0] not in OURS)}" for row in shown]
            names = [row["backend"] for row in shown]
            bars = axis.barh(names, [row[key] for row in shown], color=colors)
            axis.bar_label(bars, fmt="%.4g", padding=3)
            axis.invert_yaxis()
            axis.margins(x=0.22)
            axis.set_title(f"{title}: {unit}", fontsize=9)


def _page(meta: Mapping[str, Any], rows: Sequence[Row], picture: bytes) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    where = f"{meta.get('gpu') or meta.get('cpu')}; {versions}; {meta['date']}, {meta['commit']}"
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Serving</title>",
        "<style>body{font:15px sans-serif;max-width:70em;margin:2em auto}"
        "td,th{padding:.2em .7em;text-align:right}td:first-child{text-align:left}</style>",
        f"<h1>Serving</h1><p>{html.escape(where)}</p>",
    ]
    if picture:
        data = base64.b64encode(picture).decode()
        parts.append(f"<img alt='tokens per second and TPOT' src='data:image/png;base64,{data}'>")
    names = ["backend", *(name for name, _ in COLUMNS), "saved"]
    for title, found in measured(rows):
        parts.append(f"<h2>{html.escape(title)}</h2><table><tr>")
        parts += [f"<th>{html.escape(name)}</th>" for name in names]
        for row in found:
            parts.append("</tr><tr>")
            parts += [f"<td>{html.escape(cell)}</td>" for cell in _cells(row)]
        parts.append("</tr></table>")
    return "\n".join(parts) + "\n"
