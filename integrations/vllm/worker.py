"""Methods added to vLLM's worker with ``--worker-extension-cls``, for asking a running engine.

``LLM(..., worker_extension_cls="fi_backend.integrations.vllm.worker.FiWorkerExtension")`` makes
``llm.collective_rpc("fi_backend_stats")`` work.
"""

from __future__ import annotations

from .counters import stats
from .recorder import MANY, recorder


class FiWorkerExtension:
    """What the adapter did in this worker."""

    def fi_backend_stats(self) -> dict[str, int]:
        """Return the counts of ``fi_backend.integrations.vllm.stats()`` by name."""
        return stats().as_dict()

    def fi_backend_draw_next(
        self, path: str, min_requests: int = 1, min_tokens: int = 1, max_tokens: int = MANY
    ) -> None:
        """Draw the next step with this many requests and query tokens to ``path``."""
        recorder.arm(path, min_requests, min_tokens, max_tokens)

    def fi_backend_drawn(self) -> str | None:
        """Return the picture that ``fi_backend_draw_next`` asked for, once it is written."""
        return None if recorder.drawn is None else str(recorder.drawn)
