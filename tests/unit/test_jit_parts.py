"""Kernels of several item classes are compiled in parts, and in one piece where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fi_backend.errors import CompileFailed
from fi_backend.jit import kernels, nvrtc, parts
from fi_backend.jit.kernels import DeviceKernel, cubin_path
from fi_backend.jit.parts import IN_PARTS, NotJoinable, Parts, compile_in_parts, join
from tests.device_kernels import ARCH, use_cache

HEAD = """
struct Params { int* to; int number; };
template <class T>
__device__ T* dynamic() { extern __shared__ __align__(128) char bytes[]; return (T*)bytes; }
inline __device__ int& current() { __shared__ int value; return value; }
"""
ENTRY = """
extern "C" __global__ void __launch_bounds__(64, 2) f(const __grid_constant__ Params p) {{
  current() = p.number;
  __syncthreads();
  {0}
  __syncthreads();
  p.to[threadIdx.x] = dynamic<int>()[0];
}}
"""
DOUBLES = "if (current() > 3) return; dynamic<int>()[0] = 2 * current();"
SQUARES = "dynamic<int>()[0] = current() * current();"
PLACE = 'asm volatile("// fi_part {}" ::"l"(&current()) : "memory");'
CHOICE = "if (p.number & 1) {{ {} }} else {{ {} }}"


def work_of(text: str) -> str:
    return (
        f'{HEAD}\nextern "C" __global__ void __launch_bounds__(64, 2) '
        f"f(const __grid_constant__ Params p) {{ "
        f'asm volatile("" ::"l"(&current()) : "memory"); {text} }}\n'
    )


WHOLE = HEAD + ENTRY.format(CHOICE.format(DOUBLES, SQUARES))
FRAME = HEAD + ENTRY.format(CHOICE.format(PLACE.format("doubles"), PLACE.format("squares")))
PARTS = Parts(FRAME, (("doubles", work_of(DOUBLES)), ("squares", work_of(SQUARES))))
KERNEL = DeviceKernel("in parts", "f", WHOLE, 128, PARTS)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_cache(tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


def test_parts_become_one_kernel() -> None:
    path = cubin_path(KERNEL, ARCH)
    image, log = path.read_bytes(), (path.parent / "log.txt").read_text()
    assert image.startswith(b"\x7fELF")
    assert b".text.f\0" in image
    assert log.startswith(f"{IN_PARTS}: 3\n")
    cubin = nvrtc.Cubin(image, log)
    assert cubin.registers > 0
    assert (cubin.spill_bytes, cubin.stack_bytes, cubin.advice) == (0, 0, [])


def test_bodies_keep_their_names_to_themselves() -> None:
    texts = {name: nvrtc.compile_ptx(source, ARCH).text for name, source in PARTS.works}
    joined = join(nvrtc.compile_ptx(FRAME, ARCH).text, texts)
    assert "fi_part" not in joined
    assert "ret;" not in joined
    assert "%p" not in joined.replace("%%", "")
    assert joined.count("$L_0_end:") == joined.count("$L_1_end:") == joined.count("$L_end:") == 1
    assert joined.count(".shared .align 4") == 1  # one `value` for all
    assert "__align__(128) char" in joined


def without_a_place(_: pytest.MonkeyPatch) -> Parts:
    return replace(PARTS, frame=FRAME.replace("fi_part squares", "fi_part cubes"))


def with_a_place_twice(_: pytest.MonkeyPatch) -> Parts:
    return replace(PARTS, frame=FRAME.replace("fi_part squares", "fi_part doubles"))


def with_other_parameters(_: pytest.MonkeyPatch) -> Parts:
    name, source = PARTS.works[0]
    other = source.replace("int number;", "int number, more[2];")
    return replace(PARTS, works=((name, other), *PARTS.works[1:]))


def with_a_table(_: pytest.MonkeyPatch) -> Parts:
    name, source = PARTS.works[0]
    text = source.replace("= 2 *", "= table[threadIdx.x % 4] *")
    return replace(PARTS, works=((name, f"__device__ int table[4];{text}"), PARTS.works[1]))


def with_a_function(_: pytest.MonkeyPatch) -> Parts:
    name, source = PARTS.works[0]
    text = source.replace("= 2 *", "= other(3) *")
    other = "__device__ __noinline__ int other(int x) { return x + clock(); }"
    return replace(PARTS, works=((name, other + text), PARTS.works[1]))


def with_a_failing_part(_: pytest.MonkeyPatch) -> Parts:
    return replace(PARTS, works=((PARTS.works[0][0], "nonsense"), PARTS.works[1]))


def with_a_failing_whole(monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setattr(parts, "join", lambda *_: "nonsense")
    return PARTS


@pytest.mark.parametrize(
    "change",
    [
        without_a_place,
        with_a_place_twice,
        with_other_parameters,
        with_a_table,
        with_a_function,
        with_a_failing_part,
        with_a_failing_whole,
    ],
)
def test_what_cannot_be_joined_is_compiled_in_one_piece(
    change: Callable[[pytest.MonkeyPatch], Parts],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    cubin = compile_in_parts(WHOLE, change(monkeypatch), ARCH, (), "a kernel")
    assert b".text.f\0" in cubin.image
    assert IN_PARTS not in cubin.log
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("a kernel is compiled in one piece: ")
    assert "\n" not in message


def test_lines_of_sources_are_known_for_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cubin_path(KERNEL, ARCH)
    monkeypatch.setenv("FI_LINEINFO", "1")
    path = cubin_path(KERNEL, ARCH)
    assert path != before
    assert IN_PARTS not in (path.parent / "log.txt").read_text()
    assert b".debug_line" in path.read_bytes()


def test_the_key_knows_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(kernel: DeviceKernel) -> str:
        return kernels._key(kernel, ARCH, ())

    keys = {key(KERNEL), key(replace(KERNEL, parts=None))}
    for index in range(len(PARTS.works)):
        works = list(PARTS.works)
        works[index] = (works[index][0], works[index][1] + "\n")
        keys.add(key(replace(KERNEL, parts=Parts(FRAME, tuple(works)))))
    keys.add(key(replace(KERNEL, parts=replace(PARTS, frame=FRAME + "\n"))))
    monkeypatch.setattr(parts, "_joiner_hash", lambda: "edited")
    keys.add(key(KERNEL))
    assert len(keys) == 6


def test_a_failing_compile_shows_the_one_piece() -> None:
    broken = replace(KERNEL, source="int f() { return nonsense; }")
    failing = replace(broken, parts=Parts("nonsense", (("a", "nonsense"),)))
    with pytest.raises(CompileFailed) as caught:
        cubin_path(failing, ARCH)
    lines = str(caught.value).splitlines()
    assert lines[1] == f"key: {kernels._key(failing, ARCH, ())}"
    assert lines[2].startswith("command: nvrtc --gpu-architecture=sm_90a ")
    assert lines[3] == "log:"
    assert lines[-2:] == ["source:", broken.source]


@pytest.mark.parametrize("text", ["", "no PTX", ".visible .entry f(\n)\n{\n}\n"])
def test_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(NotJoinable):
        join(text, {})
