"""The wheel: what is in it, what it links, and that it works where nothing else of ours is."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The C and C++ runtimes: no torch, no CUDA, no libpython.
ALLOWED_LIBRARIES = {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "libstdc++.so.6",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "-C", "build-dir=build/wheel", "-w", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_apart(unpacked: Path, code: str) -> str:
    """Run code with the unpacked wheel and torch, without the editable installation (-S)."""
    path = os.pathsep.join([str(unpacked), sysconfig.get_path("purelib")])
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=unpacked,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_everything_of_the_tree_is_in_it_as_real_files(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("", "include/", "integrations/")
        for path in (ROOT / "fi_backend" / folder).rglob("*")
        if path.suffix in {".py", ".pyi", ".h", ".cuh", ".typed"}
    }
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("fi_backend/")}
        links = [
            i.filename for i in archive.infolist() if (i.external_attr >> 16) & 0o120000 == 0o120000
        ]
    cores = {name for name in inside if name.endswith(".so")}
    assert links == []
    assert inside - cores == expected
    assert cores == {f"fi_backend/_core{sysconfig.get_config_var('EXT_SUFFIX')}"}
    assert {
        "fi_backend/py.typed",
        "fi_backend/include/fi/plan/records.h",
        "fi_backend/integrations/vllm/__init__.py",
    } <= expected


def test_metadata(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    points = configparser.ConfigParser()
    points.read(info / "entry_points.txt")
    assert points["console_scripts"]["fi-backend"] == "fi_backend.__main__:main"
    assert points["vllm.general_plugins"]["fi_backend"] == "fi_backend.integrations.vllm:register"
    assert points["sglang.srt.plugins"]["fi_backend"] == "fi_backend.integrations.sglang:register"
    assert (info / "licenses/LICENSE").read_text().lstrip().startswith("Apache License")
    metadata = (info / "METADATA").read_text()
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_the_core_links_neither_torch_nor_cuda(unpacked: Path) -> None:
    (core,) = (unpacked / "fi_backend").glob("_core*.so")
    command = ["readelf", "--dynamic", "--wide", str(core)]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed
    assert needed <= ALLOWED_LIBRARIES
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_the_core_loads_without_torch(unpacked: Path) -> None:
    code = (
        "import sys, importlib.machinery as m, importlib.util as u, glob\n"
        "path = glob.glob('fi_backend/_core*.so')[0]\n"
        "loader = m.ExtensionFileLoader('fi_backend._core', path)\n"
        "core = u.module_from_spec(u.spec_from_loader('fi_backend._core', loader))\n"
        "loader.exec_module(core)\n"
        "print(core.active_isa(), 'torch' in sys.modules)"
    )
    isa, has_torch = run_apart(unpacked, code).split()
    assert isa in {"v2", "v3", "v4"}
    assert has_torch == "False"


def test_the_package_works_from_the_wheel(unpacked: Path) -> None:
    code = (
        "import importlib.resources as r, fi_backend, fi_backend.planner, fi_backend._core as c\n"
        "header = r.files('fi_backend') / 'include/fi/plan/records.h'\n"
        "print(fi_backend.__file__, c.__file__, header.is_file(), sep='\\n')"
    )
    package, core, has_header = run_apart(unpacked, code).splitlines()
    assert Path(package).parent == Path(core).parent == unpacked / "fi_backend"
    assert has_header == "True"


@pytest.mark.parametrize(
    "name", ["fi_backend.fi_backend", "fi_backend.tests", "fi_backend.kernels"]
)
def test_the_editable_package_has_no_second_copies(name: str) -> None:
    assert find_spec(name) is None
