"""Greedy tokens of SGLang on a GPU with this backend, compared with those of SGLang's own.

``python -m e2e_bench.sglang_gpu.tokens --out tokens.json`` runs every case of ``runs``, several
engines beside each other, prints one JSON line per case and ends with 1 unless all agree. The same
command goes on where it was interrupted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2e_bench.engine_environment import run_header, sglang_environment
from e2e_bench.engine_tokens import Board, Record, Result, Runner, is_wanted, parser
from e2e_bench.sglang_gpu.runs import Case, cases
from e2e_bench.vllm_gpu.compare import compare, judge
from e2e_bench.vllm_gpu.models import make_small

ENGINE = (sys.executable, "-m", "e2e_bench.sglang_gpu.engine")


def report(case: Case, results: Mapping[str, Result]) -> Result:
    """Return a case's outcome: how it differs, what it did, and every reason why it fails."""
    reference, other = case.noise
    line: Result = {"case": case.ours.name, "reference": reference.name}
    used = {run.name: results[run.name] for run in (case.ours, *case.noise)}
    broken = {name: result for name, result in used.items() if "failed" in result}
    if broken:
        reasons = [f"{name}: {result['failed']}" for name, result in broken.items()]
        logs = {name: result.get("log") for name, result in broken.items()}
        return line | {"ok": False, "reasons": reasons, "logs": logs}
    ours = results[case.ours.name]
    found = compare(ours, results[reference.name])
    noise = compare(results[other.name], results[reference.name])
    reasons = judge(found, noise)
    reasons += [f"{name} is zero" for name in case.shows if not ours["counts"].get(name)]
    for run in case.noise:
        if results[run.name]["counts"]:
            reasons.append(f"{run.name}: our attention ran in the reference")
    worst = sorted(found.divergences, key=lambda where: -where["gap"])[:1]
    return line | {
        "ok": not reasons,
        "reasons": reasons,
        "tokens": found.tokens,
        "divergences": len(found.divergences),
        "worst_divergence": worst[0] if worst else None,
        "logprob_max": round(found.largest, 5),
        "logprob_mean": round(found.mean, 6),
        "noise_max": round(noise.largest, 5),
        "noise_mean": round(noise.mean, 6),
        "counts": ours["counts"],
        "ready_s": ours["ready_s"],
        "seconds": ours["total_s"],
    }


def run_cases(wanted: list[Case], runner: Runner, jobs: int, record: Record) -> None:
    """Record the outcome of each case, running each engine once."""
    by_name = {case.ours.name: case for case in wanted}
    needs = {name: [run.name for run in (*case.noise, case.ours)] for name, case in by_name.items()}
    board = Board(needs, lambda name, results: report(by_name[name], results), record.add)
    runs = {run.name: run for case in wanted for run in (*case.noise, case.ours)}
    for model in dict.fromkeys(run.model for run in runs.values()):
        make_small(model)

    def finish(name: str) -> None:
        board.add(name, runner.run(name))

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(finish, name) for name in runs]:
            future.result()


def main() -> int:
    """Run the cases that the command line names."""
    args = parser(__doc__).parse_args()
    wanted = [case for case in cases() if is_wanted(case.ours.name, args.only)]
    record = Record(args.out, run_header("sglang"))
    missing = [case for case in wanted if case.ours.name not in record.agreed]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + args.limit_s
        environment = sglang_environment(folder)
        limit_s = args.limit_s  # some take 110 s to start beside each other
        # SGLang's processes outlive the one that started them.
        runner = Runner(folder, ENGINE, environment, deadline, limit_s, ends_well=False)
        run_cases(missing, runner, args.jobs, record)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
