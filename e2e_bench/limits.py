"""What a time may be: limits that tables show beside it."""

from __future__ import annotations

from e2e_bench.report import Row

# Attention over shared prefixes: three quarters of the speed of reading, and a launch.
SHARED_OF_FLOOR, SHARED_EXTRA_US = 0.75, 10.0
# Finding prefixes and planning with them: a page id of 4 bytes per token is more to read.
DETECTION_US, DETECTION_PAGE1_US = 12.0, 20.0
# A step with nothing to share, over the same step with detection switched off.
NOTHING_SHARED_RATIO = 1.02


def limit_us(row: Row) -> float | None:
    """Return the most a row may take; None: nothing is set for it."""
    name = row.workload
    if name.startswith("shared.") and row.floor_us is not None:
        return row.floor_us / SHARED_OF_FLOOR + SHARED_EXTRA_US
    if name.startswith("detect.") and name.endswith(".device"):
        return DETECTION_PAGE1_US if ".page1." in name else DETECTION_US
    return None
