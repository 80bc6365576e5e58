"""Registering with SGLang: the name in its list of choices, and the factory behind the name.

Nothing here imports the engine: SGLang logs errors of plugins and goes on, and the user would see
nothing but an invalid choice. The engine is imported when a model runner selects it, where an error
stops the start.
"""

from __future__ import annotations

from typing import Any

from sglang.srt import server_args
from sglang.srt.layers.attention import attention_registry

from . import NAME


def register_backend() -> None:
    """Make the backend selectable in this process. Idempotent."""
    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])
    attention_registry.register_attention_backend(NAME)(make_backend)


def make_backend(runner: Any) -> Any:
    """Return the attention of a model runner, whose model and memory pools exist already.

    Raises:
        Unsupported: something that is not served; the message lists all reasons.
    """
    from .backend import FiAttentionBackend  # late: see the module's docstring
    from .report import report_stats

    report_stats()
    return FiAttentionBackend(runner)
