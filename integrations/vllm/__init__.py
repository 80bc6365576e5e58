"""fi_backend as the attention backend of vLLM.

vLLM loads the entry point ``vllm.general_plugins: fi_backend`` in each of its processes; it calls
``register``. Select the backend with ``--attention-backend CUSTOM`` (any version) or ``FI_BACKEND``
(0.32 and later). See docs/vllm.md.
"""

from __future__ import annotations

from .counters import Stats, reset_stats, stats

__all__ = ["OWN_NAME", "Stats", "register", "reset_stats", "stats"]

# Name of the backend where vLLM's list of backends can grow.
OWN_NAME = "FI_BACKEND"


def register() -> None:
    """Make the backend selectable in this process. Idempotent; vLLM calls it."""
    from .registration import register_backends  # needs vLLM

    register_backends()
