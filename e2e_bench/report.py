"""What every benchmark writes: rows of figures under a header that says what produced them."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
META_KEYS = ("date", "commit", "kernels_hash", "planner_hash", "versions")


class MalformedResults(ValueError):
    """A file of results that does not have the format; the message names file and reason."""


@dataclass(frozen=True)
class Row:
    """One implementation on one workload. Times in µs per call; error_ratio is the largest error
    over that of plain torch in the same dtype (2 is the limit); floor_us the least time that the
    machine's memory and arithmetic allow. None where a figure does not apply."""

    workload: str
    impl: str
    us_median: float
    us_min: float
    us_max: float
    gbs: float | None = None
    tflops: float | None = None
    floor_us: float | None = None
    error_ratio: float | None = None

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
        floor_us: float | None = None,
    ) -> Row:
        """Return the row of a list of timed calls."""
        row = cls.of_times(workload, impl, times_us)
        return replace(
            row,
            gbs=round(num_bytes / row.us_median / 1e3, 2),
            tflops=round(flops / row.us_median / 1e6, 4),
            floor_us=None if floor_us is None else round(floor_us, 2),
            error_ratio=round(error_ratio, 3),
        )

    @classmethod
    def of_times(cls, workload: str, impl: str, times_us: list[float]) -> Row:
        """Return the row of something that only takes time."""
        median = statistics.median(times_us)
        return cls(
            workload, impl, round(median, 2), round(min(times_us), 2), round(max(times_us), 2)
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


def tree_hashes() -> dict[str, str]:
    """Return the hashes of this tree that a header carries."""
    return {
        "kernels_hash": hash_files(["kernels"]),
        "planner_hash": hash_files(["kernels/host", "kernels/include/fi/plan"]),
    }


def _commit() -> str:
    """The commit, from FI_COMMIT where the tree was copied without its history."""
    named = os.environ.get("FI_COMMIT")
    if named:
        return named
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def meta(versions: dict[str, str] | None = None, **extra: Any) -> dict[str, Any]:
    """Return the header: machine, date, commit, hashes, versions."""
    own = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        **tree_hashes(),
        "versions": own | (versions or {}),
        **extra,
    }


def gpu_name() -> str:
    """Return the current GPU's name."""
    return torch.cuda.get_device_name()


def gpu_slug(name: str) -> str:
    """Return the word that files of a GPU are named by: "NVIDIA H100 80GB HBM3" gives "h100"."""
    words = re.sub(r"[^a-z0-9 ]", " ", name.lower().replace("nvidia", "")).split()
    return words[0] if words else "gpu"


def write(path: Path, header: dict[str, Any], rows: list[Row]) -> None:
    """Write header and rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"meta": header, "rows": [asdict(row) for row in rows]}
    # Renamed into place: a run that is killed while it writes leaves the last complete file.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def has_rows(path: Path) -> bool:
    """Return whether a file of results is one of ``write``, by its name; others only have meta."""
    beginnings = ("kernels-", "plan-", "sharing-", "ops-", "jit-", "streaming-")
    return path.stem == "cpu" or path.stem.startswith(beginnings)


def load_meta(path: Path) -> dict[str, Any]:
    """Return the header of any file of results.

    Raises:
        MalformedResults: not JSON, or no header that says what it was measured on.
    """
    return _read(path)["meta"]


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return header and rows of a file of ``write``.

    Raises:
        MalformedResults: not JSON, or not that format.
    """
    content = _read(path)
    try:
        rows = [Row(**row) for row in content["rows"]]
    except (KeyError, TypeError) as error:
        raise MalformedResults(f"{path.name}: rows: {error}") from error
    if not rows:
        raise MalformedResults(f"{path.name}: no rows")
    for row in rows:
        _check_row(path.name, row)
    return content["meta"], rows


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        header = dict(content["meta"])
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedResults(f"{path.name}: {type(error).__name__}: {error}") from error
    missing = [key for key in META_KEYS if not header.get(key)]
    if not {"gpu", "cpu"} & header.keys():
        missing.append("gpu or cpu")
    if missing:
        raise MalformedResults(f"{path.name}: meta lacks {', '.join(missing)}")
    return content


def _check_row(name: str, row: Row) -> None:
    where = f"{name}: {row.workload} {row.impl}"
    for field in fields(row):
        value = getattr(row, field.name)
        kinds = (str,) if field.name in ("workload", "impl") else (int, float)
        optional = field.default is None
        if not (isinstance(value, kinds) or (optional and value is None)):
            raise MalformedResults(f"{where}: {field.name} is {value!r}")
    if not 0 < row.us_min <= row.us_median <= row.us_max:
        raise MalformedResults(f"{where}: times out of order")


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| workload | implementation | µs median | min – max | GB/s | GFLOP/s | error ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.workload} | {r.impl} | {r.us_median:,.0f} | {r.us_min:,.0f} – {r.us_max:,.0f} |"
            f" {r.gbs or 0:.1f} | {(r.tflops or 0) * 1e3:,.0f} | {r.error_ratio or 0:.2f} |"
        )
    return "\n".join(lines)


def cpu_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
