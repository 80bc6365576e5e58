"""Environment of the engines: one process, no network, this checkout's caches."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
# At the end: an installed fi_backend must not be shadowed by the checkout's.
sys.path.append(str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def plugin_is_installed() -> None:
    """Without the entry point vLLM would run its own attention and every test would compare it."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    names = [point.name for point in points]
    assert "fi_backend" in names, "install the package first: pip install --no-deps ."
