"""The kernel that copies rows of req_to_token: in Triton's interpreter, and compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fi_backend.integrations.sglang import copy_kernel

SCRIPT = """
import torch
from fi_backend.integrations.sglang import copy_kernel, tables

copy_kernel.BLOCK, copy_kernel.PROGRAMS = 8, 2
draw = torch.Generator().manual_seed(1)
slots = torch.randint(0, 4000, (9, 700), generator=draw, dtype=torch.int32)
slot_map = torch.randint(0, 4000, (4000,), generator=draw)
for page in (1, 4, 16):
    for mapped, left, begin in (
        (None, None, None),
        (slot_map, 17, None),
        (slot_map, 0, None),
        (None, None, torch.tensor([9, 0, 1, 690, 400])),
    ):
        rows = torch.randperm(9, generator=draw)[:5]
        kv_len = torch.tensor([1, 700, 33, 64, 300])
        if begin is not None:
            kv_len = torch.minimum(kv_len, 700 - begin)
        qo_indptr = torch.tensor([0, 1, 41, 42, 106, 107], dtype=torch.int32)
        expected, own = (torch.full((5, 700 // page + 1), -7, dtype=torch.int32) for _ in range(2))
        step = tables.StepRequests(rows, qo_indptr, kv_len, begin)
        tables.copy_rows(expected, slots, step, page, mapped, left)
        copy_kernel.launch_copy(own, slots, step, page, mapped, left)
        assert torch.equal(own, expected), (page, left)
        assert (expected[0, 1:] == -7).all() and (expected[1, : 700 // page] != -7).any()
print("equal")
"""


def test_kernel_copies_what_torch_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stdout + done.stderr


@pytest.mark.parametrize("present", ["slot_map", "begin"])
def test_kernel_compiles_for_a_gpu(present: str) -> None:
    integers = dict.fromkeys(("own_stride", "slot_stride", "window_left"), "i32")
    signature = {"own": "*i32", "slots": "*i32", "rows": "*i64", "qo_indptr": "*i32"}
    signature |= {"kv_len": "*i64", "begin": "*i64", "slot_map": "*i64"} | integers
    absent = "begin" if present == "slot_map" else "slot_map"
    constants = {"page_size": 16, "block": copy_kernel.BLOCK, absent: None}
    source = ASTSource(
        fn=copy_kernel.fi_copy_rows,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000
