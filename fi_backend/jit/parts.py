"""Kernels of several item classes, compiled in parts: each class's work by itself, in threads.

The larger half of compiling turns C++ into PTX, and a class's work is the same whichever kernel it
stands in. So the kernel is compiled without it, with a comment where each class belongs, and each
class as a kernel of its own. Their bodies then take the comments' places, and the whole goes
through the assembler once, as one function: parameters stay in constant memory and what is uniform
in uniform registers, which calls of linked functions would end (5 % more instructions for a tile
of 128 rows).

NVRTC takes PTX only as the text of an asm statement, so that is what it gets. Text that is not of
the form that is known here is refused, and the kernel compiled in one piece.
Source: PTX ISA 9.0; NVRTC documentation, CUDA 13.0.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fi_backend.errors import CompileFailed
from fi_backend.jit.nvrtc import Cubin, compile_cubin, compile_ptx

# Begins the log of a kernel that was compiled in parts.
IN_PARTS = "compiled in parts"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """A kernel in parts, each a translation unit whose kernel has the same name and parameters.

    Attributes:
        frame: the kernel, with a comment ``// fi_part NAME`` in place of each class's work.
        works: (NAME, translation unit) of each class.
    """

    frame: str
    works: tuple[tuple[str, str], ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """All translation units."""
        return (self.frame, *(source for _, source in self.works))


class NotJoinable(ValueError):
    """PTX that is not of the form that is known here."""


@dataclass(frozen=True)
class _Module:
    """The PTX of a translation unit with one kernel.

    Attributes:
        signature: the kernel's name and its parameters.
        bounds: directives on its threads.
        dynamic: names of dynamic shared memory, and their alignment.
        static: shared variables, and their declarations.
        body: what the kernel does.
    """

    signature: str
    bounds: str
    dynamic: Mapping[str, int]
    static: Mapping[str, str]
    body: str


# One kernel, whose parameters are one structure. Declarations are lines.
_MODULE = re.compile(
    r"(?P<head>.*?)"
    r"^\.visible \.entry (?P<signature>\w+\(\n\s*\.param \.align \d+ \.b8 \w+\[\d+\]\n\))\n"
    r"(?P<bounds>(?:\.\w+[ \d,]*\n)*)"
    r"\{\n(?P<body>.*)\n\}\s*\Z",
    re.DOTALL | re.MULTILINE,
)
_SIGNATURE = re.compile(r"(\w+)\(\n\s*\.param \.align (\d+) \.b8 \1_param_0\[(\d+)\]\n\)")
_BOUNDS = re.compile(r"\.maxntid (\d+)(?:, 1, 1)?\n\.minnctapersm (\d+)\n")
_NOTHING = re.compile(r"\s*(//.*)?|\.(version|target|address_size) .*")
_DYNAMIC = re.compile(r"\.extern \.shared \.align (\d+) \.b8 (\w+)\[\];")
_GLOBAL = re.compile(
    r"(?:\.visible |\.weak )?\.(?:global|const) [^;={]*?(\w+)(?:\[\d+\])?(?: = .*)?;"
)
_STATIC = re.compile(r"\s*(\.shared \.align \d+ \.\w+ (\w+)(?:\[\d+\])?;)")
_PLACE = re.compile(r"^\s*// fi_part (\w+)$", re.MULTILINE)


def compile_in_parts(
    source: str, parts: Parts, arch: str, options: Sequence[str] = (), title: str = "source"
) -> Cubin:
    """Compile a kernel in threads, a class's work in each, or in one piece where that fails.

    Args:
        source: the kernel in one piece. What it says about it is what a caller hears of a failure.
        parts: the same kernel.
        arch: as in ``compile_cubin``.
        options: as in ``compile_cubin``; with any the kernel is compiled in one piece: the
            assembler would not know the lines of several sources.
        title: as in ``compile_cubin``.

    Raises:
        Unsupported, CompileFailed: as ``compile_cubin``.
    """
    if not options:
        try:
            return _compile_joined(parts, arch, title)
        except (CompileFailed, NotJoinable) as reason:
            first_line = str(reason).partition("\n")[0]
            logger.info("%s is compiled in one piece: %s", title, first_line)
    return compile_cubin(source, arch, options, title, parts_key(parts))


def parts_key(parts: Parts | None) -> list[str]:
    """Return what the code of a kernel in parts depends on beside its source in one piece."""
    return [] if parts is None else [*parts.sources, _joiner_hash()]


def join(frame: str, works: Mapping[str, str]) -> str:
    """Return a translation unit whose kernel does what the frame's does, with the works in place.

    Args:
        frame: PTX of the kernel without its works.
        works: PTX of each, by the name that the frame has for it.

    Raises:
        NotJoinable: PTX of another form.
    """
    module = _parse(frame)
    modules = {name: _parse(work) for name, work in works.items()}
    if sorted(_PLACE.findall(module.body)) != sorted(modules):
        raise NotJoinable("places of other parts than these")
    dynamic, static = dict(module.dynamic), dict(module.static)
    bodies: dict[str, str] = {}
    for index, (name, work) in enumerate(modules.items()):
        if work.signature != module.signature:
            raise NotJoinable("parts of different parameters")
        for array, alignment in work.dynamic.items():
            dynamic[array] = max(alignment, dynamic.get(array, 0))
        for variable, declaration in work.static.items():
            if static.setdefault(variable, declaration) != declaration:
                raise NotJoinable(f"two variables {variable}")
        bodies[name] = _scope(work.body, f"$L_{index}_")
    body = _PLACE.sub(lambda place: bodies[place[1]], _scope(module.body, "$L_"))
    return _translation_unit(module, dynamic, "\n".join(static.values()), body)


def _compile_joined(parts: Parts, arch: str, title: str) -> Cubin:
    with ThreadPoolExecutor(len(parts.sources)) as pool:  # of this compile: processes may fork
        running = [pool.submit(compile_ptx, source, arch, title) for source in parts.sources]
        frame, *works = [one.result() for one in running]
    names = [name for name, _ in parts.works]
    joined = join(frame.text, dict(zip(names, (work.text for work in works), strict=True)))
    cubin = compile_cubin(joined, arch, (), title)
    logs = [f"{IN_PARTS}: {len(parts.sources)}", *(one.log for one in (frame, *works)), cubin.log]
    return Cubin(cubin.image, "\n".join(filter(None, logs)))


def _parse(text: str) -> _Module:
    match = _MODULE.fullmatch(text)
    if match is None:
        raise NotJoinable("not one kernel with one parameter")
    dynamic: dict[str, int] = {}
    variables: set[str] = set()
    for line in match["head"].splitlines():
        if found := _DYNAMIC.fullmatch(line):
            dynamic[found[2]] = int(found[1])
        elif found := _GLOBAL.fullmatch(line):
            variables.add(found[1])
        elif not _NOTHING.fullmatch(line):
            raise NotJoinable(line)
    static: dict[str, str] = {}
    lines = []
    for line in match["body"].splitlines():
        if found := _STATIC.fullmatch(line):
            static[found[2]] = found[1]
        elif line.lstrip().startswith(".shared"):
            raise NotJoinable(line)
        else:
            lines.append(line)
    body = "\n".join(lines)
    # The compiler declares class constants too, which nothing uses.
    used = variables.intersection(re.findall(r"\w+", body))
    if used:
        raise NotJoinable(f"a variable outside the kernel: {used.pop()}")
    return _Module(match["signature"], match["bounds"], dynamic, static, body)


def _scope(body: str, labels: str) -> str:
    """Return a body whose names are its own, and which is left at its end."""
    body = re.sub(r"\$L_", lambda _: labels, body)
    body = re.sub(r"\bret(\.uni)?;", lambda _: f"bra {labels}end;", body)
    return f"{{\n{body}\n}}\n{labels}end:"


def _translation_unit(module: _Module, dynamic: Mapping[str, int], static: str, body: str) -> str:
    signature, bounds = _SIGNATURE.fullmatch(module.signature), _BOUNDS.fullmatch(module.bounds)
    if signature is None or bounds is None or ')ptx"' in body:
        raise NotJoinable("a kernel of another form")
    entry, alignment, size = signature.groups()
    arrays = [
        f'extern "C" {{ extern __shared__ __align__({align}) char {name}[]; }}\n'
        for name, align in dynamic.items()
    ]
    # Operands that the text does not name: what is not used is not declared.
    operands = ", ".join(f'"l"({name})' for name in dynamic)
    text = f"{{\n{static}\n{body}\n}}".replace("%", "%%")
    return (
        f"struct alignas({alignment}) FiParams {{ char bytes[{size}]; }};\n"
        + "".join(arrays)
        + f'extern "C" __global__ void __launch_bounds__({", ".join(bounds.groups())})\n'
        f"{entry}(const __grid_constant__ FiParams p) {{\n"
        f'  asm volatile(R"ptx({text})ptx" :: {operands} : "memory");\n}}\n'
    )


@cache
def _joiner_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
