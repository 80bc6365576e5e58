"""The CPU platform's selection: what vLLM's CUDA platform does for every backend by itself."""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm.logger import init_logger

from .backend import FiBackend
from .support import refuse

# vLLM shows the lines of its own loggers only.
logger = init_logger("vllm.plugins.fi_backend")


def select_on_cpu(selected_backend: Any, attn_selector_config: Any) -> str | None:
    """Return the path of our class for a layer of the CPU engine.

    Args:
        selected_backend: the enum member that the user asked for.
        attn_selector_config: vLLM's AttentionSelectorConfig.

    Returns:
        the class path; None when another plugin has taken CUSTOM.

    Raises:
        Unsupported: the layer is not served; the message lists all reasons.
    """
    path = str(selected_backend.get_path())
    if not path.startswith(FiBackend.__module__):
        return None
    fields = attn_selector_config._asdict()
    refuse(FiBackend.validate_configuration(device_capability=None, **fields))
    _announce(selected_backend.name)
    return path


@cache
def _announce(name: str) -> None:
    logger.info("fi_backend serves attention on the CPU, as selected by attention backend %s", name)
