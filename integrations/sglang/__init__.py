"""fi_backend as an attention backend of SGLang.

SGLang loads the entry point ``sglang.srt.plugins: fi_backend`` in each of its processes; it calls
``register``. Select the backend with ``--attention-backend fi``. See docs/sglang.md.
"""

from __future__ import annotations

from .counters import Stats, reset_stats, stats

__all__ = ["NAME", "Stats", "register", "reset_stats", "stats"]

# What users write behind --attention-backend.
NAME = "fi"


def register() -> None:
    """Make the backend selectable in this process. Idempotent; SGLang calls it."""
    from .registration import register_backend  # needs SGLang

    register_backend()
