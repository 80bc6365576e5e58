"""A run: what fails does not end it, but the exit status and the results say so."""

from __future__ import annotations

import importlib.metadata
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from e2e_bench import report


@dataclass
class RunLog:
    """What failed so far.

    Attributes:
        failures: workload, impl and error of each.
        device_is_lost: a fault on the device after which no call of this process succeeds.
    """

    failures: list[dict[str, str]] = field(default_factory=list)
    device_is_lost: bool = False

    @contextmanager
    def attempt(self, workload: str, impl: str) -> Iterator[None]:
        """Record an error of the block, with its last lines, instead of raising it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(limit=-6)
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            self.failures.append({"workload": workload, "impl": impl, "error": text})
            print(f"FAILED {workload} {impl}: {text}", flush=True)
            self._probe_device()

    def _probe_device(self) -> None:
        if not torch.cuda.is_available():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self.device_is_lost = True
            print(f"the device is lost, what is left is not run: {error}", flush=True)

    def write(self, out: Path | None, rows: list[report.Row], **more: str) -> None:
        """Write rows of the current GPU, and what failed; without ``out`` or rows, nothing.

        Args:
            out: the file.
            rows: measured so far.
            more: further entries of the header.
        """
        if out is None or not rows:
            return
        name = report.gpu_name()
        header = report.meta(gpu_versions(), gpu=name, failures=self.failures, **more)
        report.write(out, header, rows)

    def finish(self) -> int:
        """Print all failures; return the exit status."""
        for failure in self.failures:
            print("FAILED {workload} {impl}: {error}".format(**failure))
        return 1 if self.failures else 0


def gpu_versions() -> dict[str, str]:
    """Return versions of what a run on a GPU depends on."""
    found = {"cuda": str(torch.version.cuda), "driver": _driver()}
    for package in ("fi-backend", "flashinfer-python", "vllm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
