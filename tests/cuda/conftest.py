"""The GPU under test: it is there, its kernels are compiled on all cores, and what passed is kept.

FI_TEST_DEVICE names the device (default "cuda:0"). FI_EVIDENCE names a folder, or a JSON file, that
the figures of a whole run go to (gpu_evidence.py).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# At the end: an installed fi_backend must not be shadowed by the checkout's.
sys.path.append(str(ROOT))

DEVICE = os.environ.get("FI_TEST_DEVICE", "cuda:0")
_started = time.monotonic()
_passed: set[str] = set()
_failed: set[str] = set()


@pytest.fixture(scope="session")
def device() -> str:
    """The device under test."""
    return DEVICE


@pytest.fixture(scope="session", autouse=True)
def gpu_is_ready(request: pytest.FixtureRequest) -> None:
    """Without a GPU nothing here can pass; with one, compile what the chosen tests name."""
    if DEVICE == "cpu":  # for work on the tests themselves
        return
    if not torch.cuda.is_available():
        pytest.exit("tests/cuda: no NVIDIA GPU that torch can use; run `make test`", returncode=1)
    from fi_backend.jit.kernels import arch_of, prebuild

    kernels = [kernel for item in request.session.items for kernel in _kernels_of(item)]
    prebuild(kernels, arch_of(torch.device(DEVICE)))


def _kernels_of(item: pytest.Item) -> list[object]:
    """Kernels that a test's module names for the test's arguments."""
    named = getattr(getattr(item, "module", None), "kernels_of", None)
    arguments = getattr(getattr(item, "callspec", None), "params", {})
    return [] if named is None else list(named(item.originalname, arguments))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.add(report.nodeid)
    elif report.when == "call" and report.passed:
        _passed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    place = os.environ.get("FI_EVIDENCE")
    if not place or not _passed | _failed or hasattr(session.config, "workerinput"):
        return  # pytest-xdist's workers report to the session that writes
    options = session.config.option
    chosen = [a for a in session.config.args if not Path(a).is_dir()]
    if options.keyword or options.markexpr or chosen or session.shouldstop:
        print("\nno evidence written: not all tests of tests/cuda ran")
        return
    import gpu_evidence

    gpu = torch.cuda.get_device_name(DEVICE) if torch.cuda.is_available() else "none"
    path = gpu_evidence.update(
        Path(place),
        gpu,
        passed=len(_passed - _failed),
        failed=len(_failed),
        seconds=round(time.monotonic() - _started, 1),
    )
    print(f"\nevidence: {path}")
