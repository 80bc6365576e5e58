"""Loading and launching kernels, against a library that stands for the CUDA driver."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_cuda import PREAMBLE, build_fake, compile_cxx, run


@pytest.fixture(scope="module")
def fake_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake(tmp_path_factory.mktemp("driver"))


ASK = """
try:
    _core.device_info(0)
except DeviceError as error:
    print(error)
"""


def test_a_driver_that_does_not_open_is_named(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    library.write_text("not a library")
    assert run(tmp_path, ASK, PREAMBLE) == (
        f"driver: expected libcuda.so.1, got {library}: file too short; "
        "install the NVIDIA driver, or use CPU tensors"
    )


def test_a_driver_that_is_too_old_is_named(tmp_path: Path) -> None:
    source = tmp_path / "old.cc"
    source.write_text('extern "C" int cuInit(unsigned) { return 0; }')
    compile_cxx(source, tmp_path / "libcuda.so.1", "-shared", "-fPIC")
    assert run(tmp_path, ASK, PREAMBLE) == (
        "driver: expected cuGetErrorName in libcuda.so.1, got no such function; "
        "install a newer NVIDIA driver"
    )


def test_a_device_is_described(fake_folder: Path) -> None:
    script = """
    info = _core.device_info(1)
    print(info.name, info.major, info.minor, info.num_sms, info.max_shared_bytes,
          info.max_shared_bytes_per_sm, info.copies_boxes)
    """
    assert run(fake_folder, script) == "Some GPU 9 0 132 232448 233472 True"


def test_the_driver_starts_once_and_again_after_a_failure(fake_folder: Path) -> None:
    script = """
    from threading import Barrier, Thread
    fake.fake_fail(b"cuInit", 100)
    print(error(_core.device_info, 0))
    fake.fake_fail(b"cuInit", 0)
    fake.fake_forget()
    barrier = Barrier(8)
    threads = [Thread(target=lambda: (barrier.wait(), _core.device_info(0))) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(calls().count("cuInit"))
    """
    assert run(fake_folder, script).splitlines() == [
        "driver: expected an NVIDIA driver that starts in this process, got CUDA_ERROR_OF_TEST: "
        "as the test asked; run fi-backend doctor; start worker processes by spawn, not fork",
        "1",
    ]


@pytest.mark.parametrize(
    ("shared", "attributes"),
    [
        (0, []),
        (32768, ["cuFuncSetAttribute 9 64"]),  # hexadecimal: all of shared memory, 100 percent
        # What the kernel declares itself may make these more than the 48 KB that need no asking.
        (40961, ["cuFuncSetAttribute 8 a001", "cuFuncSetAttribute 9 64"]),
    ],
)
def test_loading_a_kernel(fake_folder: Path, shared: int, attributes: list[str]) -> None:
    script = f"""
    kernel = _core.Kernel(IMAGE, "fi_attention", 1, {shared})
    assert kernel.device == 1
    print(*calls(), sep="\\n")
    del kernel
    print(*calls(), sep="\\n")
    """
    assert run(fake_folder, script).splitlines() == [
        "cuInit",
        "cuDeviceGetAttribute 4b",  # compute capability
        "cuDevicePrimaryCtxRetain 1",
        "cuCtxPushCurrent 0x10001",
        "cuModuleLoadData",
        "cuModuleGetFunction fi_attention",
        *attributes,
        "cuCtxPopCurrent 0x10001",
        "cuCtxPushCurrent 0x10001",
        "cuModuleUnload 0x20001",
        "cuCtxPopCurrent 0x10001",
        "cuDevicePrimaryCtxRelease 1",
    ]


def test_a_kernel_tells_its_resources(fake_folder: Path) -> None:
    script = """
    kernel = load(shared=100000)
    print(kernel.num_registers, kernel.ctas_per_sm(128), *calls())
    """
    assert run(fake_folder, script) == (
        "168 2 cuCtxPushCurrent 0x10000 cuFuncGetAttribute 4 cuCtxPopCurrent 0x10000 "
        "cuCtxPushCurrent 0x10000 cuOccupancy 80 186a0 cuCtxPopCurrent 0x10000"
    )


# What the thread has current -> calls of a launch on device 1.
# Attribute 6 of cuda.h is CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION.
LAUNCH = "cuLaunchKernelEx 0x30001 84 1 1 80 1 1 186a0 0xabcd 6 1"
LAUNCHES = {
    "nothing": (0, ["cuCtxPushCurrent 0x10001", LAUNCH, "cuCtxPopCurrent 0x10001"]),
    "another-device": (0x10000, ["cuCtxPushCurrent 0x10001", LAUNCH, "cuCtxPopCurrent 0x10001"]),
    "its-own": (0x10001, [LAUNCH]),
}


OVERLAPS = """
kernel = load(shared=100000)
fake.fake_enter(ctypes.c_long(0x10000))
config = _core.PlanConfig(8, 2, 4, _core.Band(-1, 0, 0), 0, [_core.TileClass(16, 64, 1, 1)],
                          _core.PlanCapacity(4, 4, 64, 0, 0, 0))
params = _core.PlanKernelParams(config, config.layout())
for overlaps in (False, True):
    _core.launch_plan(kernel, params, 4, 128, 0xabcd, overlaps)
print(*calls(), sep="\\n")
fake.fake_fail(b"cuLaunchKernelEx", 700)
print(error(_core.launch_plan, kernel, params, 4, 128, 0, True))
"""


def test_a_planner_may_overlap_the_grid_before_it(fake_folder: Path) -> None:
    launch, overlapping, failure = run(fake_folder, OVERLAPS).splitlines()
    assert launch == "cuLaunchKernel 0x30000 4 1 1 80 1 1 186a0 0xabcd"
    assert overlapping == "cuLaunchKernelEx 0x30000 4 1 1 80 1 1 186a0 0xabcd 6 1"
    assert "expected a launch of 4 x 1 CTAs of 128 threads" in failure


@pytest.mark.parametrize(("current", "expected"), LAUNCHES.values(), ids=LAUNCHES)
def test_a_launch_leaves_the_thread_as_it_was(
    fake_folder: Path, current: int, expected: list[str]
) -> None:
    script = f"""
    kernel = load(shared=100000, device=1)
    fake.fake_enter(ctypes.c_long({current}))
    _core.launch_attention(kernel, _core.KernelParams(), 132, 128, 0xabcd)
    assert fake.fake_current() == {current}
    print(*calls(), sep="\\n")
    fake.fake_fail(b"cuLaunchKernelEx", 700)
    assert error(_core.launch_attention, kernel, _core.KernelParams(), 132, 128, 0xabcd)
    assert fake.fake_current() == {current}
    """
    assert run(fake_folder, script).splitlines() == expected


def test_an_older_driver_is_not_asked_to_overlap_grids(fake_folder: Path) -> None:
    script = """
    fake.fake_version(12020)
    kernel = load()
    _core.launch_attention(kernel, _core.KernelParams(), 132, 128, 0xabcd)
    print(*(call for call in calls() if "Launch" in call))
    """
    assert run(fake_folder, script) == "cuLaunchKernel 0x30000 84 1 1 80 1 1 0 0xabcd"


ERRORS = {
    "no-device": (
        'error(_core.Kernel, IMAGE, "fi_attention", 2, 0)',
        "device: expected device 2 to exist, got CUDA_ERROR_INVALID_DEVICE: invalid device "
        "ordinal; choose one that CUDA_VISIBLE_DEVICES leaves visible",
    ),
    "no-context": (
        'fake.fake_fail(b"cuDevicePrimaryCtxRetain", 2) or error(load)',
        "device: expected room for a context on device 0, got CUDA_ERROR_OF_TEST: as the test "
        "asked; free memory on the device, or choose another one",
    ),
    "no-description": (
        'fake.fake_fail(b"cuDeviceGetAttribute", 3) or error(_core.device_info, 0)',
        "device: expected a description of device 0, got CUDA_ERROR_OF_TEST: as the test asked; "
        "run fi-backend doctor",
    ),
    "short-image": (
        'error(_core.Kernel, b"ELF", "fi_attention", 0, 0)',
        "fi_attention: expected a cubin, got 3 bytes; clear the kernel cache and compile again",
    ),
    "foreign-image": (
        'error(_core.Kernel, bytes(64), "fi_attention", 0, 0)',
        "fi_attention: expected a cubin that this device loads, got CUDA_ERROR_OF_TEST: as the "
        "test asked; compile it for the device's own architecture",
    ),
    "no-entry": (
        'error(_core.Kernel, IMAGE, "other", 0, 0)',
        "other: expected an entry point of that name in the cubin, got CUDA_ERROR_OF_TEST: as "
        'the test asked; declare the kernel extern "C"',
    ),
    "shared-memory": (
        'error(_core.Kernel, IMAGE, "fi_attention", 0, 300000)',
        "fi_attention: expected 300000 bytes of shared memory for a CTA, got CUDA_ERROR_OF_TEST: "
        "as the test asked; use smaller tiles or fewer stages",
    ),
    "context-lost": (
        'kernel := load(), fake.fake_fail(b"cuCtxGetCurrent", 4), error(kernel.ctas_per_sm, 128)',
        "context: expected the device's primary context to become current, got CUDA_ERROR_OF_TEST"
        ": as the test asked; do not reset the device while kernels are in use",
    ),
    "launch": (
        'kernel := load(), fake.fake_fail(b"cuLaunchKernelEx", 700), '
        "error(_core.launch_attention, kernel, _core.KernelParams(), 132, 128, 0)",
        "fi_attention: expected a launch of 132 x 1 CTAs of 128 threads, got CUDA_ERROR_OF_TEST: "
        "as the test asked; an error of an earlier kernel shows here too: "
        "CUDA_LAUNCH_BLOCKING=1 names the culprit",
    ),
    "unnamed-error": (
        'fake.fake_fail(b"cuInit", 999999) or error(_core.device_info, 0)',
        "driver: expected an NVIDIA driver that starts in this process, got CUDA error 999999; "
        "run fi-backend doctor; start worker processes by spawn, not fork",
    ),
}


@pytest.mark.parametrize(("expression", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_carry_the_drivers_words(fake_folder: Path, expression: str, message: str) -> None:
    script = f"result = ({expression})\nprint(result[-1] if type(result) is tuple else result)"
    assert run(fake_folder, script) == message


def test_what_a_failed_load_took_is_given_back(fake_folder: Path) -> None:
    script = """
    error(_core.Kernel, IMAGE, "other", 0, 0)
    print(*calls()[-4:], fake.fake_current(), sep="\\n")
    """
    assert run(fake_folder, script).splitlines() == [
        "cuCtxPushCurrent 0x10000",
        "cuModuleUnload 0x20000",
        "cuCtxPopCurrent 0x10000",
        "cuDevicePrimaryCtxRelease 0",
        "0",
    ]


def test_kernels_may_outlive_the_driver(fake_folder: Path) -> None:
    script = """
    kernel = load()
    fake.fake_fail(b"cuCtxGetCurrent", 4)
    fake.fake_fail(b"cuDevicePrimaryCtxRelease", 4)
    del kernel
    print(*calls(), sep="\\n")
    """
    assert run(fake_folder, script) == "cuDevicePrimaryCtxRelease 0"


def test_maps_of_caches_are_made_once_for_each_address(fake_folder: Path) -> None:
    """[pages, page_size, heads, dim] as (dim, heads, page_size, pages), boxes of 128 bytes."""
    script = """
    import torch
    _core.device_info(0)
    fake.fake_forget()
    def tensors(page, heads, dim, dtype):
        q, out = torch.zeros(2, 4, 3, 128, dtype=torch.bfloat16)
        k, v = torch.zeros(2, 5, page, heads, dim).to(dtype)
        return q, k, v, out, None
    for sizes in ((16, 2, 128, torch.bfloat16), (256, 1, 256, torch.float8_e4m3fn)):
        seen, params = _core.CallTensors(), _core.KernelParams()
        seen.boxes = True
        first, second = tensors(*sizes), tensors(*sizes)
        seen.remember(params, *first, 1.0, False)
        for call in (second, first, second):
            assert seen.take(params, *call, 1.0, False) == 0
        print(*calls(), sep="\\n")
    k = torch.zeros(50, 16, 2, 128, dtype=torch.bfloat16)
    q, out = torch.zeros(2, 4, 3, 128, dtype=torch.bfloat16)
    for cache in (k[:5], k, k.view(50, 2, 16, 128).transpose(1, 2), k[:0]):  # at one address
        seen.remember(params, q, cache, cache, out, None, 1.0, False)
    print(*calls(), sep="\\n")
    seen.remember(params, *first, 1.0, False)
    fake.fake_forget()
    odd = list(first)
    odd[0] = torch.zeros(4 * 3 * 128 + 1, dtype=torch.bfloat16)[1:].view(4, 3, 128)
    third = tensors(*sizes)
    assert seen.take(params, odd[0], *third[1:], 1.0, False) == 2 and not calls()
    seen.boxes = False
    assert seen.take(params, *third, 1.0, False) == 0 and not calls()
    seen.boxes = True
    fake.fake_fail(b"cuTensorMapEncodeTiled", 1)
    for _ in range(2):
        print(error(seen.take, params, *third, 1.0, False))
    fake.fake_fail(b"cuTensorMapEncodeTiled", 0)
    assert seen.take(params, *third, 1.0, False) == 0
    """
    bf16 = "cuTensorMapEncodeTiled 1 80 2 10 5 100 200 2000 40 1 10 1 0 3 2 0"
    # One head: its stride means nothing, and is that of a row.
    fp8 = "cuTensorMapEncodeTiled 0 100 1 100 5 100 100 10000 80 1 40 1 0 3 2 0"
    refused = (
        "kv: expected a cache of 5 pages that a tensor map describes, got CUDA_ERROR_OF_TEST: as"
        " the test asked; keep strides below 2^40 bytes"
    )
    more = bf16.replace("10 5", "10 32")
    other = more.replace("100 200", "1000 100")  # heads before tokens
    printed = run(fake_folder, script).splitlines()
    assert printed[:-2] == [bf16] * 4 + [fp8] * 4 + [bf16] * 2 + [more] * 2 + [other] * 2
    assert printed[-2:] == [refused] * 2
