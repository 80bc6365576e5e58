"""Greedy tokens of vLLM on a GPU with this backend, compared with those of vLLM's own backends.

``python -m e2e_bench.vllm_gpu.tokens --out tokens.json`` runs every case of ``runs``, several
engines beside each other, prints one JSON line per case and ends with 1 unless all agree. The same
command goes on where it was interrupted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from e2e_bench.engine_environment import engine_environment, run_header
from e2e_bench.engine_tokens import Board, Record, Result, Runner, is_wanted, parser
from e2e_bench.vllm_gpu.compare import compare, judge
from e2e_bench.vllm_gpu.models import make_small
from e2e_bench.vllm_gpu.runs import Case, Run, cases

# One process for engine and worker: counters are read without a server.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
ENGINE = (sys.executable, "-m", "e2e_bench.vllm_gpu.engine")


def runs_of(wanted: Iterable[Case]) -> list[Run]:
    """Return each run once, in the order in which cases need them."""
    order: dict[str, Run] = {}
    for case in wanted:
        for run in (case.reference, *case.noise, *(case.else_noise or ()), case.ours):
            order.setdefault(run.name, run)
    return list(order.values())


def report(case: Case, results: Mapping[str, Result]) -> Result:
    """Return a case's outcome: how it differs, what it did, and every reason why it fails."""
    ours = results[case.ours.name]
    pair = case.noise
    if case.else_noise and any("failed" in results[run.name] for run in pair):
        pair = case.else_noise
    used = {run.name: results[run.name] for run in (case.ours, case.reference, *pair)}
    line: Result = {"case": case.ours.name, "reference": case.reference.name}
    broken = {name: result for name, result in used.items() if "failed" in result}
    if broken:
        reasons = [f"{name}: {result['failed']}" for name, result in broken.items()]
        logs = {name: result["log"] for name, result in broken.items() if "log" in result}
        return line | {"ok": False, "reasons": reasons, "logs": logs}
    found = compare(ours, results[case.reference.name])
    noise = compare(results[pair[1].name], results[pair[0].name])
    reasons = judge(found, noise)
    reasons += [f"{name} is zero" for name in case.shows if not ours["counts"].get(name)]
    reasons += [f"{name} is not zero" for name in case.hides if ours["counts"].get(name)]
    for name in dict.fromkeys(run.name for run in (case.reference, *pair)):
        if results[name]["counts"]["forwards"]:
            reasons.append(f"{name}: our attention ran in the reference")
    by_gap = sorted(found.divergences, key=lambda where: -where["gap"])
    return line | {
        "ok": not reasons,
        "reasons": reasons,
        "tokens": found.tokens,
        "divergences": len(found.divergences),
        "worst_divergence": by_gap[0] if by_gap else None,
        "logprob_max": round(found.largest, 5),
        "logprob_mean": round(found.mean, 6),
        "noise_from": [run.name for run in pair],
        "noise_max": round(noise.largest, 5),
        "noise_mean": round(noise.mean, 6),
        **{
            name: ours[name]
            for name in ("runner_v2", "async_scheduling", "cudagraph_mode", "counts")
        },
        "seconds": ours["total_s"],
    }


def run_cases(wanted: list[Case], runner: Runner, jobs: int, record: Record) -> None:
    """Record the outcome of each case, running each engine once."""
    by_name = {case.ours.name: case for case in wanted}
    needs = {name: [run.name for run in runs_of([case])] for name, case in by_name.items()}
    board = Board(needs, lambda name, results: report(by_name[name], results), record.add)
    runs = runs_of(wanted)
    for model in dict.fromkeys(run.model for run in runs):
        make_small(model)

    def finish(run: Run) -> None:
        board.add(run.name, runner.run(run.name, run.environment))

    with ThreadPoolExecutor(jobs) as pool:

        def start(run: Run) -> Future[None]:
            return pool.submit(finish, run)

        for future in [start(run) for run in runs if not run.alone]:
            future.result()
    for run in runs:
        if run.alone:
            finish(run)


def main() -> int:
    """Run the cases that the command line names."""
    command_line = parser(__doc__)
    command_line.add_argument("--run-limit-s", type=float, default=150.0, help="for one engine")
    command_line.add_argument("--gpus", type=int, default=1, help="GPUs that runs may use")
    args = command_line.parse_args()
    wanted = [
        case
        for case in cases()
        if case.ours.gpus <= args.gpus and is_wanted(case.ours.name, args.only)
    ]
    record = Record(args.out, run_header("vllm"))
    missing = [case for case in wanted if case.ours.name not in record.agreed]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        environment = engine_environment(folder) | ONE_PROCESS
        deadline = time.monotonic() + args.limit_s
        limit_s = args.run_limit_s
        runner = Runner(folder, ENGINE, environment, deadline, limit_s, ends_well=True)
        run_cases(missing, runner, args.jobs, record)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
