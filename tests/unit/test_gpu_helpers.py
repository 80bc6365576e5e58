"""What the GPU tests stand on: hostile copies, steps in contract, reports, evidence."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_evidence
import pytest
import sanitize
import torch
from cases import Case, make_out, make_problem
from named_cases import (
    BF16,
    CASES,
    FP16,
    GPU_CASES,
    MIXED,
    capacity_of,
    gpu_cases,
    random_gpu_case,
)
from placing import copy_to, elements_around, misplace, to_device
from running import check_problem
from sanitizer_report import DONE, findings_of, is_complete
from stress import LOADS, Stress, run_steps
from variant_cases import GPU_KV_LEN, GPU_TOKENS, VARIANTS

import fi_backend as fi
from e2e_bench import report

HOSTILE = [
    Case("hostile", MIXED, fi.HeadShape(4, 2, 64), BF16, layout=layout, table=table, strided=True,
         scales="per_head", variant="tree", padding=2)
    for layout, table in (("stacked", "wide"), ("packed", "indirect64"), ("slots", "mapped"))
]  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.layout)
def test_copies_keep_strides_offsets_and_aliases(case: Case) -> None:
    problem = make_problem(case)
    there = to_device(problem, "cpu")
    pairs = [(problem.q, there.q), (problem.kv.k, there.kv.k), (problem.kv.v, there.kv.v)]
    pairs.append((problem.batch.page_table.entries, there.batch.page_table.entries))
    for mine, copy in pairs:
        assert (copy.stride(), copy.storage_offset()) == (mine.stride(), mine.storage_offset())
        assert copy.data_ptr() != mine.data_ptr()
        assert copy.untyped_storage().nbytes() == mine.untyped_storage().nbytes()
        assert torch.equal(copy.float().nan_to_num(7), mine.float().nan_to_num(7))
    storages = {t.untyped_storage().data_ptr() for t in (there.kv.k, there.kv.v)}
    assert len(storages) == (1 if case.layout in {"stacked", "packed"} else 2)
    assert there.params.keys() == problem.params.keys()
    check_problem(case, there)


def test_what_lies_around_a_view_comes_along() -> None:
    case = Case("gaps", ((3, 5),), dtype=BF16, strided=True)
    out = make_out(case, make_problem(case))
    around = elements_around(out)
    assert around.numel() == 3 * 8 * 128 - 3 * 4 * 64 and around.isnan().all()
    out.fill_(1.0)
    assert elements_around(copy_to(out, "cpu")).isnan().all()
    out.as_strided((1,), (1,), 64).fill_(2.0)  # the first element of a gap
    assert elements_around(out).isnan().sum() == around.numel() - 1


def test_misplaced_problems_are_the_same_problems() -> None:
    case = Case("odd", MIXED, dtype=BF16)
    problem = make_problem(case)
    odd = misplace(problem, 1, 2, 3, widen=1)
    assert [t.storage_offset() for t in (odd.q, odd.kv.k, odd.kv.v)] == [1, 2, 3]
    assert odd.q.stride(1) == 65
    assert odd.q.data_ptr() % 16 != 0
    assert elements_around(odd.kv.k).isnan().all()
    first, second = check_problem(case, problem), check_problem(case, odd)
    assert torch.equal(first.out, second.out)


def test_every_case_is_one_that_tensor_cores_take() -> None:
    pairs = gpu_cases()
    assert len({(step, case.name) for step, case in pairs}) == len(pairs)
    assert {case.name for _, case in pairs} == {case.name for case in (*CASES, *GPU_CASES)}
    for case in [case for _, case in pairs] + [random_gpu_case(seed) for seed in range(300)]:
        assert case.dtype in {BF16, FP16}
        assert case.heads.head_dim_qk % 16 == case.heads.head_dim_vo % 16 == 0
        assert len(case.lengths) <= 64 and sum(q for q, _ in case.lengths) <= GPU_TOKENS
        assert max((kv for _, kv in case.lengths), default=0) <= GPU_KV_LEN
    decodes = [case for step, case in pairs if step == "decode"]
    assert len(decodes) > 20 and all(q <= 1 for case in decodes for q, _ in case.lengths)


ROTATED = [pair for pair in gpu_cases() if "gpu-" in pair[1].variant]


@pytest.mark.parametrize(("step", "case"), ROTATED, ids=[f"{c.name}-{s}" for s, c in ROTATED])
def test_angles_reach_as_far_as_the_capacity(step: str, case: Case) -> None:
    variant, params = VARIANTS[case.variant](case, torch.Generator())
    capacity, rotation = capacity_of(step), variant.rotation
    assert rotation is not None
    table = torch.as_tensor(params[rotation.cos_sin])
    dims = case.heads.head_dim_qk, capacity.longest_q_len, capacity.max_kv_len
    rotation.check_table(table, *dims)


@pytest.mark.parametrize("name", LOADS)
def test_random_steps_are_in_contract(name: str) -> None:
    load = LOADS[name]
    indptr, kv_len = load.draw(2000, 1)
    q_len = indptr.diff(dim=1)
    assert (indptr[:, 0] == 0).all() and (q_len >= 0).all() and (kv_len >= q_len).all()
    assert int(indptr.max()) <= load.tokens and int(kv_len.max()) <= load.max_kv_len
    assert load.max_q_len == 0 or int(q_len.max()) == load.max_q_len
    live = (kv_len > 0).sum(1)
    assert (live == 0).any() and (live == load.requests).any()


SPOILERS = {
    "splits disagree by": lambda stress, tokens: stress.out[tokens - 1].add_(1),
    "1 rows unwritten or overwritten": lambda stress, tokens: stress.out[tokens].fill_(0),
    "1 arrival counters": lambda stress, _: stress.planner.slot(0).arrivals[3:4].fill_(1),
}


@pytest.mark.parametrize("message", SPOILERS)
def test_stress_finds_what_it_looks_for(message: str) -> None:
    """On the CPU engine, whose outputs are then spoilt."""
    stress = Stress(LOADS["mixed"], 20, seed=1, device="cpu")
    run_steps(stress, 6, samples=1)
    step = next(i for i, ends in enumerate(stress.steps[0][:, -1].tolist()) if 0 < ends < 160)
    replay = stress.replay

    def spoilt() -> None:
        replay()
        SPOILERS[message](stress, int(stress.batch.qo_indptr[-1]))

    stress.replay = spoilt
    stress.step(step)
    with pytest.raises(AssertionError, match=message):
        stress.check()


REPORT = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at fi_attention+0x70
=========     by thread (0,0,0) in block (3,0,0)
=========     Host Frame: run in /x/fi_backend/_core.cpython-312.so
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::fill_kernel<float>(float *)+0x88
=========     Host Frame: run in /x/fi_backend/_core.cpython-312.so
=========
========= Error: Race reported between Write access at fi_plan+0x90 and Read access at fi_plan+0xa0
{}
"""


def test_findings_are_those_of_our_kernels() -> None:
    assert findings_of(REPORT.format("========= ERROR SUMMARY: 3 errors")) == [
        "Invalid __global__ write of size 4 bytes in fi_attention",
        "Error: Race reported between Write access at fi_plan+0x90 and Read access at fi_plan+0xa0",
    ]
    assert findings_of("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == []
    assert is_complete("x\n========= ERROR SUMMARY: 0 errors\n")
    assert is_complete("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    assert not is_complete("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n")


FAKE = """#!/bin/sh
case "$*" in
*--help*) echo "--kernel-name arg";;
*cases*) echo "{cases}"; echo "========= ERROR SUMMARY: 0 errors"; echo "{done}";;
*) printf "========= Invalid write\\n=========     at {planted}+0x70\\n";;
esac
"""


@pytest.mark.parametrize(
    ("words", "line", "good"),
    [
        ({}, "clean, finds its planted bug", True),
        ({"planted": "kernel_of_torch"}, "clean, misses its planted bug", False),
        ({"done": "Killed"}, "did not finish, finds its planted bug", False),
        ({"cases": "========= Invalid read at fi_plan+0x1"}, "1 findings, finds its", False),
    ],
)
def test_a_tool_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, str], line: str, good: bool
) -> None:
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE.format(**{"cases": "", "done": DONE, "planted": "fi_planted"} | words))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    sanitize.sanitizer.cache_clear()
    figures, text = sanitize.judge("memcheck")
    assert text.startswith("memcheck ") and line in text
    assert sanitize.is_good(figures) == good


def test_parts_of_the_evidence_meet_in_one_file(tmp_path: Path) -> None:
    gpu = "NVIDIA H200"
    path = gpu_evidence.update(tmp_path, gpu, passed=3, failed=0, seconds=1.5)
    assert path == tmp_path / "tests-h200.json"
    sanitizer = {"memcheck": {"findings": 0}}
    assert gpu_evidence.update(path, gpu, sanitizer=sanitizer) == path
    content = json.loads(path.read_text())
    assert (content["passed"], content["sanitizer"]) == (3, sanitizer)
    assert content["meta"].keys() >= {"gpu", *report.META_KEYS}
    # Parts that other kernels gave are dropped.
    content["meta"]["kernels_hash"] = "other"
    path.write_text(json.dumps(content))
    gpu_evidence.update(path, gpu, sanitizer=sanitizer)
    assert "passed" not in json.loads(path.read_text())
