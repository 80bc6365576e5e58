"""Which of the committed results still speak of this tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from e2e_bench import report


@dataclass(frozen=True)
class Evidence:
    """A file of results beside the tree.

    Attributes:
        path: the file.
        header: its meta.
        stale: sources whose hash is another one now, such as "kernels"; empty: fresh.
    """

    path: Path
    header: dict[str, str]
    stale: tuple[str, ...]

    def line(self) -> str:
        """Return one line for people."""
        header = self.header
        state = f"STALE: {' and '.join(self.stale)} changed since" if self.stale else "fresh"
        where = header.get("gpu") or header.get("cpu")
        return f"{self.path.name:24} {header['date']}  {header['commit']:10} {where}: {state}"


def gather(folder: Path = report.RESULTS) -> list[Evidence]:
    """Return all results of a folder, compared with this tree.

    Raises:
        MalformedResults: a file that does not have the format.
    """
    tree = report.tree_hashes()
    found = []
    for path in sorted(folder.glob("*.json")):
        header = report.load(path)[0] if report.has_rows(path) else report.load_meta(path)
        stale = tuple(
            key.removesuffix("_hash") for key, value in tree.items() if header[key] != value
        )
        found.append(Evidence(path, header, stale))
    return found


def summary(found: Iterable[Evidence]) -> str:
    """Return a line per file and how many are stale."""
    found = list(found)
    stale = sum(bool(one.stale) for one in found)
    return "\n".join([*(one.line() for one in found), f"{stale} of {len(found)} results are stale"])
