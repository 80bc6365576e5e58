"""Registering with vLLM: names, class paths, and the CPU platform's choice of backend.

Nothing here imports the engine: vLLM logs errors of plugins and goes on, and its CPU platform would
then serve the model with its own backend without a word. The engine is imported when a layer
selects it, where an error stops the start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from . import OWN_NAME

CUSTOM_CLASS = "fi_backend.integrations.vllm.backend.FiBackend"
OWN_CLASS = "fi_backend.integrations.vllm.backend.NamedFiBackend"
_PATCHED = "_fi_backend_patched"


def register_backends() -> None:
    """Make the backend selectable in this process. Idempotent."""
    register_backend(AttentionBackendEnum.CUSTOM, CUSTOM_CLASS)
    _register_own_name()
    _patch_cpu_platform()


def backend_member(name: str) -> Any:
    """Return vLLM's enum member ``name`` after registering ours.

    This is what our own member unpickles through: vLLM sends its configuration to a spawned process
    that has not loaded plugins yet.
    """
    register_backends()
    return AttentionBackendEnum[name]


def _register_own_name() -> None:
    """Add FI_BACKEND to vLLM's enum where it can grow (0.32 and later)."""
    known = AttentionBackendEnum.__members__
    if OWN_NAME in known or not hasattr(AttentionBackendEnum, "register"):
        return
    register_backend(OWN_NAME, OWN_CLASS)
    member = AttentionBackendEnum[OWN_NAME]

    def reduce(protocol: int) -> tuple[Callable[[str], Any], tuple[str]]:
        return backend_member, (OWN_NAME,)

    vars(member)["__reduce_ex__"] = reduce


def _patch_cpu_platform() -> None:
    """Let the CPU platform honour a selected backend of ours; it knows only its own."""
    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform  # only where it is the platform

    stock = inspect.getattr_static(CpuPlatform, "get_attn_backend_cls")
    if hasattr(stock, _PATCHED):
        return

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if getattr(selected_backend, "name", None) in ("CUSTOM", OWN_NAME):
            from .selection import select_on_cpu  # late: see the module's docstring

            path = select_on_cpu(selected_backend, attn_selector_config)
            if path is not None:
                return path
        chosen = stock.__get__(None, cls)(selected_backend, attn_selector_config, *args, **kwargs)
        return str(chosen)

    patched = classmethod(get_attn_backend_cls)
    setattr(patched, _PATCHED, True)
    CpuPlatform.get_attn_backend_cls = patched  # type: ignore[method-assign, assignment]
