"""Environment of an engine's processes on a machine without a network, and what was run there."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e2e_bench import report
from fi_backend.nvidia import find_driver  # takes no GPU memory, unlike torch

ROOT = Path(__file__).parents[1]
GROUP = "vllm.general_plugins"

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Neither is needed, and both compile at first use.
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # The path below decides which fi_backend is imported, not the working directory.
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
}
# What SGLang imports and does not need here.
SGLANG_STAND_INS = {"deep_gemm": "", "datasets": "load_dataset = None\n"}
# As much of pandas as vLLM's client reads a file of requests with: vLLM does not bring it along.
PANDAS = """import json


class Row(dict):
    to_dict = dict.copy


class read_json:
    def __init__(self, path_or_buf, lines):
        with open(path_or_buf) as file:
            self.rows = [Row(json.loads(line)) for line in file]
        self.columns = self.rows[0].keys()

    def iterrows(self):
        return enumerate(self.rows)
"""


def engine_environment(scratch: Path) -> dict[str, str]:
    """Return the environment of a process that runs vLLM with this backend.

    Args:
        scratch: folder for what has to be on the path where fi_backend is not installed.
    """
    paths = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if not _is_installed():
        paths.append(str(_declare_entry_points(scratch)))
    # Last: an unpacked wheel that is on the path already comes before the checkout.
    paths.append(str(ROOT))
    return os.environ | OFFLINE | {"PYTHONPATH": os.pathsep.join(paths)}


def sglang_environment(scratch: Path) -> dict[str, str]:
    """Return the environment of SGLang's processes.

    Empty modules stand in for what it imports whatever the model and the load, where that is not
    installed: DeepGEMM with drafts, ``datasets`` in its client.
    """
    environment = engine_environment(scratch) | {"SGLANG_ENABLE_JIT_DEEPGEMM": "0"}
    return with_stand_ins(environment, scratch / "stand_ins", SGLANG_STAND_INS)


def with_stand_ins(
    environment: Mapping[str, str], folder: Path, modules: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment, with modules on its path where they are not installed.

    Args:
        environment: of a process.
        folder: where the modules are written.
        modules: their text by name.
    """
    folder.mkdir(exist_ok=True)
    for name, text in modules.items():
        if importlib.util.find_spec(name) is None:
            (folder / f"{name}.py").write_text(text)
    paths = [path for path in (environment.get("PYTHONPATH"), str(folder)) if path]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def run_header(engine: str, **extra: Any) -> dict[str, Any]:
    """Return the header of results: ``engine`` is the package whose version was run."""
    versions = {engine: str(importlib.import_module(engine).__version__)}
    gpus = find_driver().gpus
    machine = {"gpu": gpus[0].name} if gpus else {"cpu": report.cpu_name()}
    return report.meta(versions, cpus=os.cpu_count(), **machine, **extra)


def _is_installed() -> bool:
    return any(point.name == "fi_backend" for point in importlib.metadata.entry_points(group=GROUP))


def _declare_entry_points(scratch: Path) -> Path:
    """Return a folder that declares the checkout's entry points, as an installed wheel does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = scratch / "entry_points"
    info = folder / f"fi_backend-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata)
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder
