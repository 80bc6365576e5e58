"""What every benchmark writes: rows of figures under a header that says what produced them."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    """One implementation on one workload. Times in µs per call; error_ratio is the largest error
    over that of plain torch in the same dtype (2 is the limit)."""

    workload: str
    impl: str
    us_median: float
    us_min: float
    us_max: float
    gbs: float
    tflops: float
    error_ratio: float

    @classmethod
    def of(
        cls,
        workload: str,
        impl: str,
        times_us: list[float],
        *,
        num_bytes: float,
        flops: float,
        error_ratio: float,
    ) -> Row:
        """Return the row of a list of timed calls."""
        median = statistics.median(times_us)
        return cls(
            workload,
            impl,
            round(median, 1),
            round(min(times_us), 1),
            round(max(times_us), 1),
            round(num_bytes / median / 1e3, 2),
            round(flops / median / 1e6, 4),
            round(error_ratio, 3),
        )


def hash_files(folders: Iterable[str]) -> str:
    """Return a short hash of the sources under ``folders``: figures with another one are stale."""
    digest = hashlib.sha256()
    for folder in sorted(folders):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".h", ".cc", ".cuh", ".cu"}:
                digest.update(str(path.relative_to(ROOT)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _git_commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def meta(**extra: Any) -> dict[str, Any]:
    """Return the header: machine, date, commit, hashes, versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _git_commit(),
        "kernels_hash": hash_files(["kernels"]),
        "planner_hash": hash_files(["kernels/host", "kernels/include/fi/plan"]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **extra,
    }


def write(path: Path, header: dict[str, Any], rows: list[Row]) -> None:
    """Write header and rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"meta": header, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| workload | implementation | µs median | min – max | GB/s | GFLOP/s | error ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.workload} | {r.impl} | {r.us_median:,.0f} | {r.us_min:,.0f} – {r.us_max:,.0f} |"
            f" {r.gbs:.1f} | {r.tflops * 1e3:,.0f} | {r.error_ratio:.2f} |"
        )
    return "\n".join(lines)


def cpu_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
