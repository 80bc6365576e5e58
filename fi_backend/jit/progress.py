"""Progress of a long compilation on stderr."""

from __future__ import annotations

import shutil
import sys
import time

BAR_WIDTH = 24


class Progress:
    """One line that is rewritten on a terminal, one line per step elsewhere."""

    def __init__(self, total: int, enabled: bool | None) -> None:
        """Count to ``total``; ``enabled`` None: only when stderr is a terminal."""
        self._total = total
        self._is_terminal = sys.stderr.isatty()
        self._enabled = self._is_terminal if enabled is None else enabled
        self._start = time.perf_counter()
        self._done = 0

    def step(self, title: str) -> None:
        """Count one that is done."""
        self._done += 1
        if not self._enabled:
            return
        seconds = time.perf_counter() - self._start
        text = f"{self._done}/{self._total} {seconds:5.1f} s  {title}"
        if not self._is_terminal:
            print(text, file=sys.stderr, flush=True)
            return
        filled = BAR_WIDTH * self._done // self._total
        text = f"[{'#' * filled:<{BAR_WIDTH}}] {text}"
        width = shutil.get_terminal_size().columns - 1  # a full line would wrap
        print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line."""
        if self._enabled and self._is_terminal and self._done:
            print(file=sys.stderr)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._enabled:
            print(text, file=sys.stderr, flush=True)
