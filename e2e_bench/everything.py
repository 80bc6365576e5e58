"""All benchmarks of kernels on a GPU, one after the other, each in a process of its own.

A GPU is left by each as it was found: no graph, pool or module of one weighs on the next.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("kernels", "plan", "sharing", "ops", "streaming", "jit")


def run(out: Path, slug: str, impls: Sequence[str]) -> int:
    """Run them; return the exit status, 1 if any failed.

    Args:
        out: folder of the JSON, named as ``e2e_bench/results`` names them, and of logs.
        slug: of the GPU, such as "h200".
        impls: beginnings of names of the implementations that ``kernels`` runs; empty: all.
    """
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for command in COMMANDS:
        options = ["--out", str(out / f"{command}-{slug}.json")]
        if command == "kernels" and impls:
            options += ["--impls", ",".join(impls)]
        log, start = out / f"{command}.log", time.monotonic()
        print(f"{command:10}", end=" ", flush=True)
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, "-m", "e2e_bench", command, *options],
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        words = f"failed, see {log}" if done.returncode else "done"
        failed += [command] if done.returncode else []
        print(f"{time.monotonic() - start:6.1f} s  {words}", flush=True)
    return 1 if failed else 0
