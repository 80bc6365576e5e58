"""Reading what compute-sanitizer prints."""

from __future__ import annotations

import re

# What the watched program prints at its end.
DONE = "sanitizer: all work done"
# Our kernels; the rest of a process is torch's, and paths of this package.
KERNEL = re.compile(r"\bfi_(?!backend)\w+")
_LINE = re.compile(r"^========= ?(.*)$", re.MULTILINE)
_SUMMARY = re.compile(r"^(ERROR|RACECHECK) SUMMARY:")


def is_complete(output: str) -> bool:
    """Whether the tool came to its summary: it knew the device and watched to the end."""
    return any(_SUMMARY.match(line) for line in _LINE.findall(output))


def findings_of(output: str) -> list[str]:
    """Return the first lines of all reports that name one of our kernels.

    A report is a headline, and below it indented lines that say where and by whom:

        ========= Invalid __global__ write of size 4 bytes
        =========     at fi_attention+0x70
        =========     by thread (0,0,0) in block (3,0,0)
    """
    reports: list[list[str]] = []
    for line in _LINE.findall(output):
        if line[:1].isspace():
            if reports:
                reports[-1].append(line.strip())
        elif line and not _SUMMARY.match(line):
            reports.append([line])
    found = []
    for report in reports:
        kernel = next(filter(None, map(KERNEL.search, report)), None)
        if kernel is not None:
            known = kernel.group() in report[0]
            found.append(report[0] if known else f"{report[0]} in {kernel.group()}")
    return found
