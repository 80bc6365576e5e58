"""Who may import whom (CONTRIBUTING.md has the table): the tree obeys, planted files fail."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CXX_SUFFIXES = (".h", ".cc", ".cuh", ".cu")
CUDA_TEXT = re.compile(
    r"\b(__global__|__shared__|__launch_bounds__|threadIdx|blockIdx|cuLaunchKernel)\b|asm\s+volatile"
)
HOST_SYSTEM_HEADERS = {"dlfcn.h", "immintrin.h", "pthread.h", "sched.h", "unistd.h"}
DEVICE_SYSTEM_HEADERS = {"cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h"}
# Third-party modules by folder of Python code; fi_backend and the standard library come on top.
PYTHON_LAYERS = {
    "fi_backend": {"torch", "numpy"},
    "fi_backend/explaining": {"torch", "numpy", "matplotlib"},
    "fi_backend/jit": {"torch", "numpy", "ninja"},
    "integrations": {"torch", "numpy"},
    "integrations/common": {"torch", "numpy"},
    "integrations/vllm": {"torch", "numpy", "vllm"},
    # Triton comes with SGLang, which needs it on a GPU.
    "integrations/sglang": {"torch", "numpy", "sglang", "triton"},
}


@dataclass(frozen=True)
class CxxLayer:
    """Files under `folder` may include quoted paths with these prefixes."""

    folder: str
    quoted: tuple[str, ...]
    system: frozenset[str] | None = None  # None: C++ standard headers and HOST_SYSTEM_HEADERS
    pybind11: bool = False
    cuda_text: bool = False


# The deepest folder that holds a file decides.
CXX_LAYERS = (
    CxxLayer("kernels/include/fi", ("fi/",), frozenset(DEVICE_SYSTEM_HEADERS), cuda_text=True),
    # Code for user variants on the CPU: compiled by a host compiler, never by NVRTC.
    CxxLayer("kernels/include/fi/cpu", ("fi/",)),
    CxxLayer(
        "kernels/host",
        ("host/", "fi/core/", "fi/plan/", "fi/attention/page_table.h", "fi/sm80/config.h"),
    ),
    CxxLayer("kernels/cpu", ("cpu/", "host/", "fi/")),
    CxxLayer("kernels/launch", ("launch/", "fi/"), cuda_text=True),
    CxxLayer("kernels/bindings", ("bindings/", "host/", "cpu/", "launch/", "fi/"), pybind11=True),
)


def deepest(folders: Iterator[str], relative: str) -> str | None:
    """Return the longest of `folders` that contains the file."""
    return max((f for f in folders if relative.startswith(f + "/")), key=len, default=None)


def cxx_violations(root: Path) -> Iterator[str]:
    layers = {layer.folder: layer for layer in CXX_LAYERS}
    for path in sorted((root / "kernels").rglob("*")):
        if path.suffix not in CXX_SUFFIXES:
            continue
        relative = path.relative_to(root).as_posix()
        folder = deepest(iter(layers), relative)
        if folder is None:
            yield f"{relative}: in no layer"
            continue
        text = path.read_text()
        for opening, header in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', text, re.M):
            if not include_allowed(layers[folder], relative, opening, header):
                yield f"{relative}: includes {header}"
        if not layers[folder].cuda_text and CUDA_TEXT.search(text):
            yield f"{relative}: CUDA text"


def include_allowed(layer: CxxLayer, relative: str, opening: str, header: str) -> bool:
    if opening == '"':
        return header.startswith(layer.quoted)
    if header.startswith("pybind11/"):
        return layer.pybind11
    if layer.system is not None:
        # core/types.h takes the host's integers outside NVRTC, which spells its own.
        own = relative == "kernels/include/fi/core/types.h" and header == "cstdint"
        return own or header in layer.system
    return header in HOST_SYSTEM_HEADERS or re.fullmatch(r"[a-z_]+", header) is not None


def python_violations(root: Path) -> Iterator[str]:
    # Helpers of tests are importable by their bare names there.
    helpers = {path.stem for path in (root / "tests").glob("*.py")}
    for top in ("fi_backend", "integrations", "e2e_bench", "docs"):
        for path in sorted((root / top).rglob("*.py")):
            relative = path.relative_to(root).as_posix()
            if relative.startswith(("fi_backend/integrations/", "fi_backend/include/")):
                continue  # links to folders that are read under their own names
            for module in imported_modules(path, relative):
                reason = import_violation(relative, module, helpers)
                if reason:
                    yield f"{relative}: imports {module}: {reason}"


def imported_modules(path: Path, relative: str) -> Iterator[str]:
    """Absolute names of all imports of a file, `from a import b` as a.b."""
    parts = relative.removesuffix(".py").split("/")
    if parts[0] == "integrations":
        parts.insert(0, "fi_backend")
    package = parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), relative)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def import_violation(relative: str, module: str, test_helpers: set[str]) -> str | None:
    parts = module.split(".")
    if parts[0] in {"tests", "integrations", *test_helpers} or parts[:2] in (
        ["fi_backend", "fi_backend"],
        ["fi_backend", "tests"],
    ):
        return "a second copy of a module, or a test"
    layer = deepest(iter(PYTHON_LAYERS), relative)
    if layer is None:
        return None  # benchmarks and docs may use what they like
    if parts[0] == "fi_backend":
        return own_import_violation(layer, parts[1:])
    if parts[0] in sys.stdlib_module_names or parts[0] in PYTHON_LAYERS[layer]:
        return None
    return f"{layer} may use {', '.join(sorted(PYTHON_LAYERS[layer]))}"


def own_import_violation(layer: str, inner: list[str]) -> str | None:
    if layer.startswith("fi_backend"):
        return "the core package knows no adapter" if inner[:1] == ["integrations"] else None
    own = layer.split("/")[1:]
    if inner[:1] == ["integrations"]:
        return None if not own or inner[1:2] in (own, ["common"]) else "another adapter"
    private = any(part.startswith("_") and not part.endswith("__") for part in inner)
    return "private to fi_backend" if private else None


def test_the_tree_obeys() -> None:
    assert [*cxx_violations(ROOT), *python_violations(ROOT)] == []


@pytest.mark.parametrize("folder", ["host", "cpu", "launch", "bindings"])
def test_every_layer_has_files_to_check(folder: str) -> None:
    assert list((ROOT / "kernels" / folder).glob("*.cc"))


def test_python_imports_are_seen() -> None:
    path = ROOT / "fi_backend/planner.py"
    assert {"torch", "fi_backend._core"} <= set(imported_modules(path, "fi_backend/planner.py"))


PLANTED = {
    "kernels/host/a.h": ('#include "cpu/attention.h"', "includes cpu/attention.h"),
    "kernels/host/b.cc": ("#include <torch/torch.h>", "includes torch/torch.h"),
    "kernels/host/c.cc": ("#include <cuda_runtime.h>", "includes cuda_runtime.h"),
    "kernels/cpu/a.cc": ("#include <pybind11/pybind11.h>", "includes pybind11/pybind11.h"),
    "kernels/cpu/b.cc": ("int x = threadIdx.x;", "CUDA text"),
    "kernels/cpu/c.cc": ("#include <Python.h>", "includes Python.h"),
    "kernels/bindings/a.cc": ('#include "../cpu/x.h"', "includes ../cpu/x.h"),
    "kernels/include/fi/sm80/a.h": ("#include <type_traits>", "includes type_traits"),
    "kernels/include/fi/sm80/b.h": ('#include "host/planner.h"', "includes host/planner.h"),
    "kernels/elsewhere/a.cc": ("int x;", "in no layer"),
    "fi_backend/a.py": ("import vllm", "imports vllm"),
    "fi_backend/b.py": ("def f():\n    from sglang.srt import x", "imports sglang.srt.x"),
    "fi_backend/c.py": ("from .integrations import vllm", "imports fi_backend.integrations.vllm"),
    "fi_backend/d.py": ("import matplotlib", "imports matplotlib"),
    "fi_backend/e.py": ("import fi_backend.fi_backend", "imports fi_backend.fi_backend"),
    "fi_backend/f.py": ("from fi_backend import tests", "imports fi_backend.tests"),
    "integrations/vllm/a.py": ("from ... import _core", "imports fi_backend._core"),
    "integrations/vllm/b.py": ("import sglang", "imports sglang"),
    "integrations/vllm/c.py": ("from ..sglang import x", "another adapter"),
    "integrations/vllm/d.py": ("import integrations.vllm", "imports integrations.vllm"),
    "integrations/common/a.py": ("import vllm", "imports vllm"),
    "integrations/common/b.py": ("from ..vllm import x", "another adapter"),
    "e2e_bench/a.py": ("from tests.unit import x", "imports tests.unit.x"),
}


@pytest.mark.parametrize(("path", "planted"), PLANTED.items(), ids=PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, planted: tuple[str, str]) -> None:
    text, expected = planted
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text + "\n")
    found = [*cxx_violations(tmp_path), *python_violations(tmp_path)]
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")
    assert expected in found[0]


def test_a_helper_of_tests_stays_there(tmp_path: Path) -> None:
    for path, text in {"tests/cases.py": "", "e2e_bench/a.py": "from cases import Case"}.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    assert [v.split(":")[0] for v in python_violations(tmp_path)] == ["e2e_bench/a.py"]


ALLOWED = {
    "kernels/include/fi/core/types.h": "#include <cstdint>",
    "kernels/include/fi/sm80/a.h": '#include <cuda_bf16.h>\n#include "fi/core/types.h"',
    "kernels/include/fi/cpu/a.h": "#include <cmath>",
    "kernels/host/a.cc": '#include <vector>\n#include "fi/plan/records.h"',
    "fi_backend/explaining/a.py": "from matplotlib.figure import Figure",
    "integrations/vllm/a.py": "from ...planner import StepPlanner\nfrom vllm.v1 import x\n"
    "from .metadata import y\nfrom ... import __version__\nfrom ..common.sharing import z",
}


@pytest.mark.parametrize(("path", "text"), ALLOWED.items(), ids=ALLOWED)
def test_legal_imports_pass(tmp_path: Path, path: str, text: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text + "\n")
    assert [*cxx_violations(tmp_path), *python_violations(tmp_path)] == []
