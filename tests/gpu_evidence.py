"""What a run of the GPU tests leaves behind: a JSON file that is committed.

``{"meta": {gpu, date, commit, kernels_hash, planner_hash, versions}, "passed", "failed", "seconds",
"sanitizer": {tool: {"findings", "planted", "seconds"}}}``; tests and sanitizer write their parts
one after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from e2e_bench import report

HASHES = ("kernels_hash", "planner_hash")


def path_of(place: Path, gpu: str) -> Path:
    """Return the file of a GPU: ``place`` itself if it is a JSON file, else one in that folder."""
    return place if place.suffix == ".json" else place / f"tests-{report.gpu_slug(gpu)}.json"


def update(place: Path, gpu: str, **parts: Any) -> Path:
    """Write some parts of the evidence, and return its file.

    Other parts in the file stay if they came from the same GPU and the same kernels.
    """
    path = path_of(place, gpu)
    versions = {"cuda": torch.version.cuda or "none"}
    content = {"meta": report.meta(versions=versions, gpu=gpu)}
    if path.exists():
        found = json.loads(path.read_text())
        if all(found["meta"][key] == content["meta"][key] for key in (*HASHES, "gpu")):
            content = found | content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | parts, indent=1) + "\n")
    return path
