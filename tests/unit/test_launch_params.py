"""The attention kernel's parameter block: Python, host compiler and NVRTC see the same bytes."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from fake_cuda import build_fake, compile_cxx, run

from fi_backend import _core
from fi_backend.jit.nvrtc import compile_cubin


def leaves(block: object, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Paths and values of all numbers in a bound struct and the structs in it."""
    for name, member in sorted(vars(type(block)).items()):
        if isinstance(member, property):
            value = getattr(block, name)
            if isinstance(value, int | float):
                yield prefix + name, value
            else:
                yield from leaves(value, f"{prefix}{name}.")


def fill(block: object, number: int = 0) -> int:
    """Give every writable number in a bound struct another value; returns the last."""
    for name, member in sorted(vars(type(block)).items()):
        if not isinstance(member, property) or member.fset is None:
            continue
        value = getattr(block, name)
        number += 1
        if name == "dtype":
            value = 3
        elif isinstance(value, bool):
            value = True
        elif isinstance(value, int | float):
            value = type(value)(number + 0.5)
        else:
            number = fill(value, number)
        setattr(block, name, value)
    return number


def filled_params(core: ModuleType) -> _core.KernelParams:
    """Return a block without two equal addresses, strides or sizes."""
    params = core.KernelParams()
    fill(params)
    capacity = core.PlanCapacity(3, 50, 1000, 2, 5, 40)
    tiles = [core.TileClass(16, 64, 1, 1)]
    params.layout = core.PlanConfig(8, 2, 7, core.Band(-1, 0, 0), 0, tiles, capacity).layout()
    # Addresses have 64 bits, and -1 is a band without an end.
    params.q, params.band = 0x7FED_CBA9_8765_4321, core.Band(-1, 0, 4)
    params.set_variant_params([(i + 1, (i + 2, i + 3, -i), i + 0.25) for i in range(16)])
    return params


PATHS = [path for path, _ in leaves(filled_params(_core))]
FLAGS = {f"{name}_scale.per_head" for name in "qkv"}
PARAM_PATHS = [
    f"variant_params[{i}].{field}"
    for i in range(16)
    for field in ("data", "strides[0]", "strides[1]", "strides[2]", "scalar")
]
# Written by CallTensors, for kernels that copy boxes.
MAP_PATHS = [f"{name}_boxes.words[{i}]" for name in "kv" for i in range(16)]


@dataclass(frozen=True)
class Place:
    """Where a number lies in the struct of the host compiler."""

    offset: int
    size: int
    is_float: bool


@dataclass(frozen=True)
class HostView:
    size: int
    places: dict[str, Place]


@pytest.fixture(scope="module")
def fake_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostView:
    folder = tmp_path_factory.mktemp("host")
    lines = [
        f"show(offsetof(fi::KernelParams, {path}), params.{path});"
        for path in PATHS + PARAM_PATHS + MAP_PATHS
    ]
    source = folder / "places.cc"
    source.write_text(
        """#include <cstddef>
#include <cstdio>
#include <type_traits>
#include "fi/attention/kernel_params.h"
template <class T>
void show(std::size_t offset, const T&) {
  std::printf("%zu %zu %d\\n", offset, sizeof(T), std::is_floating_point_v<T>);
}
int main() {
  static fi::KernelParams params;
  std::printf("%zu\\n", sizeof(params));
"""
        + "\n".join(lines)
        + "\n}\n"
    )
    program = compile_cxx(source, folder / "places")
    size, *places = subprocess.check_output([program], text=True).splitlines()
    return HostView(
        int(size),
        {
            path: Place(int(offset), int(bytes_), is_float == "1")
            for path, (offset, bytes_, is_float) in zip(
                PATHS + PARAM_PATHS + MAP_PATHS, map(str.split, places), strict=True
            )
        },
    )


def test_fields_keep_what_they_are_given() -> None:
    params = _core.KernelParams()
    fill(params)
    values = dict(leaves(params))
    assert {name for name, value in values.items() if value is True} == FLAGS
    numbers = [
        value
        for name, value in values.items()
        if name not in {*FLAGS, "kv.dtype"} and not name.startswith("layout.")
    ]
    assert len(numbers) > 40
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) > 0


def test_a_fresh_block_is_neutral() -> None:
    values = dict(leaves(_core.KernelParams()))
    assert {name: value for name, value in values.items() if value} == {
        "band.left": -1,
        "band.right": -1,
        "scale": 1.0,
        "table.entry_stride": 1,
        "table.slot_divisor": 1,
    }


def test_every_field_is_bound(host: HostView) -> None:
    end = 0
    for path, place in sorted(host.places.items(), key=lambda entry: entry[1].offset):
        padding = -end % place.size
        aligned = {end + padding, end + -end % 8, end + -end % 128 * (path == MAP_PATHS[0])}
        assert place.offset in aligned, path
        end = place.offset + place.size
    assert host.size == end


def test_the_launch_gets_the_bytes_of_the_block(fake_folder: Path, host: HostView) -> None:
    functions = "\n".join(inspect.getsource(f) for f in (fill, filled_params))
    script = f"""
from types import ModuleType
{functions}
params = filled_params(_core)
_core.launch_attention(load(), params, 1, 128, 0)
print(ctypes.string_at(fake.fake_params(), {host.size}).hex())
"""
    block = bytes.fromhex(run(fake_folder, script))
    expected = dict(leaves(filled_params(_core)))
    for i in range(16):
        numbers = (i + 1, i + 2, i + 3, -i, i + 0.25)
        expected |= zip(PARAM_PATHS[5 * i : 5 * i + 5], numbers, strict=True)
    expected |= dict.fromkeys(MAP_PATHS, 0)
    assert {path: read(block, place) for path, place in host.places.items()} == expected


def read(block: bytes, place: Place) -> float:
    value = memoryview(block)[place.offset : place.offset + place.size]
    code = {(4, False): "i", (8, False): "q", (4, True): "f", (8, True): "d"}
    number: float = value.cast(code[place.size, place.is_float])[0]
    return number


def test_nvrtc_lays_the_block_out_as_the_host_compiler(host: HostView) -> None:
    # NVRTC has no offsetof without <cstddef>; this is what its own compiler makes of one.
    claims = [
        f'static_assert(__INTADDR__(&((fi::KernelParams*)0)->{path}) == {place.offset}, "{path}");'
        for path, place in host.places.items()
    ]
    source = "\n".join(
        [
            '#include "fi/attention/kernel_params.h"',
            *claims,
            f"static_assert(sizeof(fi::KernelParams) == {host.size});",
            'extern "C" __global__ void empty(const __grid_constant__ fi::KernelParams p) {}',
        ]
    )
    assert compile_cubin(source, "sm_90a").image


def test_too_many_variant_parameters_are_refused() -> None:
    message = "params: expected at most 16 parameters of a variant, got 17; pack scalars into one"
    with pytest.raises(ValueError, match=message):
        _core.KernelParams().set_variant_params([(0, (0, 0, 0), 1.0)] * 17)
