"""Results as Markdown tables, one line per workload or per quantity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from e2e_bench.limits import NOTHING_SHARED_RATIO, limit_us
from e2e_bench.report import Row

OURS = "fi_backend"
APART = "apart"  # RoPE in a kernel of its own, in the streaming benchmark
OURS_NO_SHARING = "fi_backend_no_sharing"  # only beside ours, in the sharing benchmark
SHORT = {
    "fa3": "FA3",
    "flashinfer_decode": "FlashInfer decode",
    "flashinfer_fa2": "FlashInfer fa2",
    "flashinfer_fa3": "FlashInfer fa3",
    "flashinfer_persistent": "FlashInfer persistent",
    "flashinfer_cascade": "FlashInfer cascade",
}
IMPLS = (OURS, *SHORT)


def by_workload(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Return the rows by workload and implementation, in the order of their first mention."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.workload, {})[row.impl] = row
    return found


def best_peer(rows: dict[str, Row]) -> Row | None:
    """Return the fastest row of a workload that is not ours."""
    peers = [row for name, row in rows.items() if name != OURS]
    return min(peers, key=lambda row: row.us_median, default=None)


def microseconds(value: float) -> str:
    """Return a time with three digits: 0.953, 8.25, 17.2, 2,773."""
    if value < 1:
        return f"{value:.3f}"
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def duration(value_us: float) -> str:
    """Return a time with its unit: 0.410 µs, 21.0 µs, 1,849 ms."""
    if value_us < 10_000:
        return f"{microseconds(value_us)} µs"
    return f"{microseconds(value_us / 1e3)} ms"


def kernel_table(rows: Sequence[Row]) -> str:
    """Return times in µs beside the floor, and ours over the best peer's and over the floor's.

    Where a workload has a limit there is a column of them.
    """
    grouped = by_workload(rows)
    present = {row.impl for row in rows}
    impls = [name for name in IMPLS if name in present]
    titles = [SHORT.get(name, name) for name in impls]
    limits = ["limit"] if any(limit_us(row) for row in rows) else []
    header = ["workload", "floor", *limits, *titles, "of best peer", "of floor"]
    lines = [_line(header), _line(["---"] * len(header))]
    for workload, found in grouped.items():
        ours, peer = found.get(OURS), best_peer(found)
        first = next(iter(found.values()))
        cells = [workload, _microseconds(first.floor_us)]
        if limits:
            cells.append(_microseconds(limit_us(first)))
        for name in impls:
            cells.append(_cell(found.get(name), peer))
        cells.append(_ratio(ours, None if peer is None else peer.us_median))
        cells.append(_ratio(ours, first.floor_us))
        lines.append(_line(cells))
    return "\n".join(lines)


def _microseconds(value: float | None) -> str:
    return "" if value is None else microseconds(value)


def _cell(row: Row | None, best: Row | None) -> str:
    if row is None:
        return "–"
    text = microseconds(row.us_median)
    return f"**{text}**" if row is best else text


def _ratio(row: Row | None, base: float | None) -> str:
    return "–" if row is None or not base else f"{row.us_median / base:.2f}"


def spread_table(rows: Sequence[Row]) -> str:
    """Return every row with its spread, bandwidth, rate and error."""
    lines = [
        "| workload | implementation | µs median | min – max | GB/s | TFLOP/s | error ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{microseconds(row.us_min)} – {microseconds(row.us_max)}"
        figures = [
            "–" if value is None else f"{value:,.{digits}f}"
            for value, digits in ((row.gbs, 0), (row.tflops, 1), (row.error_ratio, 2))
        ]
        lines.append(_line([row.workload, row.impl, microseconds(row.us_median), spread, *figures]))
    return "\n".join(lines)


def time_table(rows: Sequence[Row]) -> str:
    """Return times of things that are no attention calls: a line each, a column per peer.

    Where a line has a limit there is a column of them.
    """
    grouped = by_workload(rows)
    impls = list(dict.fromkeys(row.impl for row in rows))
    limits = ["limit"] if any(limit_us(row) for row in rows) else []
    header = ["", *(SHORT.get(name, name) for name in impls), *limits]
    lines = [_line(header), _line(["---"] * len(header))]
    for workload, found in grouped.items():
        cells = [_time(found.get(name)) for name in impls]
        if limits:
            limit = limit_us(next(iter(found.values())))
            cells.append("" if limit is None else duration(limit))
        lines.append(_line([workload, *cells]))
    return "\n".join(lines)


def _time(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{duration(row.us_median)} ({duration(row.us_min)} – {duration(row.us_max)})"


def sharing_table(rows: Sequence[Row]) -> str:
    """Return times in µs with prefixes looked for and not, and what looking costs or saves."""
    header = ["", "looked for", "not", "of not looking", "limit"]
    lines = [_line(header), _line(["---"] * len(header))]
    for workload, found in by_workload(rows).items():
        on, off = found.get(OURS), found.get(OURS_NO_SHARING)
        ratio = "–" if on is None or off is None else f"{on.us_median / off.us_median:.3f}"
        is_limited = workload.startswith("nothing.") and workload.endswith(".step")
        limit = f"{NOTHING_SHARED_RATIO:.2f}" if is_limited else ""
        lines.append(_line([workload, _time(on), _time(off), ratio, limit]))
    return "\n".join(lines)


def streaming_table(rows: Sequence[Row]) -> str:
    """Return times in µs with RoPE inside attention and apart, and what is saved."""
    header = ["", "RoPE inside", "apart", "less"]
    lines = [_line(header), _line(["---"] * len(header))]
    for workload, found in by_workload(rows).items():
        inside, apart = found.get(OURS), found.get(APART)
        saved = "–" if inside is None or apart is None else inside.us_median / apart.us_median
        less = saved if isinstance(saved, str) else f"{1 - saved:.1%}"
        lines.append(_line([workload, _time(inside), _time(apart), less]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
