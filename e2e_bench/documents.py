"""Puts results into docs/benchmarks.md: tables between markers, pictures beside the JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from e2e_bench import picture, report, tables
from e2e_bench.report import Row
from e2e_bench.serving import figures

DOCUMENT = report.ROOT / "docs" / "benchmarks.md"
MARKER = re.compile(r"<!-- results: (?P<name>[\w.-]+) -->\n.*?<!-- end -->\n", re.DOTALL)


def run() -> int:
    """Draw every picture, print every section and rewrite the document's; return the status."""
    sections = {}
    for path in filter(report.has_rows, sorted(report.RESULTS.glob("*.json"))):
        header, rows = report.load(path)
        if path.stem.startswith("kernels-"):
            picture.draw(header, rows, path.with_suffix(".svg"))
        elif path.stem.startswith("streaming-"):
            picture.draw_streaming(header, rows, path.with_suffix(".svg"))
        sections[path.stem] = section(path, header, rows)
        print(f"\n{sections[path.stem]}")
    for path in sorted(report.RESULTS.glob("serve-*.json")):
        served = json.loads(path.read_text())["rows"]
        if isinstance(served, list):  # as `e2e_bench serve` writes them
            figures.draw_svg(path.with_suffix(".svg"), served)
    DOCUMENT.write_text(rewrite(DOCUMENT.read_text(), sections))
    return 0


def section(path: Path, header: dict[str, Any], rows: list[Row]) -> str:
    """Return the Markdown of one file of results."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    where = header.get("gpu") or f"{header['cpu']}, {header.get('threads', '?')} threads"
    parts = [f"{where}; {versions}; {header['date']}, kernels {header['kernels_hash']}.\n"]
    failures = header.get("failures", [])
    if failures:
        parts.append(
            "Failed: " + "; ".join("{workload} {impl}".format(**f) for f in failures) + "\n"
        )
    if path.stem == "cpu":
        parts.append(report.table(rows))
    elif path.stem.startswith("ops-"):
        parts.append(tables.spread_table(rows))
    elif path.stem.startswith("sharing-"):
        parts.append("Median (smallest – largest):\n")
        parts.append(tables.sharing_table(rows))
    elif path.stem.startswith("streaming-"):
        parts.append("Median (smallest – largest):\n")
        parts.append(tables.streaming_table(rows))
    elif any(row.floor_us for row in rows):
        picture_path = path.with_suffix(".svg")
        parts.append(f"![time over the floor](../e2e_bench/results/{picture_path.name})\n")
        parts.append("Median µs, the best peer in bold:\n")
        parts.append(tables.kernel_table(rows) + "\n")
        parts.append("<details><summary>spread, bandwidth, rate, error</summary>\n")
        parts.append(tables.spread_table(rows) + "\n\n</details>")
    else:
        parts.append("Median (smallest – largest):\n")
        parts.append(tables.time_table(rows))
    return "\n".join(parts)


def rewrite(text: str, sections: dict[str, str]) -> str:
    """Return a document with the sections that it has markers for put in place."""

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in sections:
            return match[0]
        return f"<!-- results: {name} -->\n{sections[name]}\n<!-- end -->\n"

    return MARKER.sub(replaced, text)
