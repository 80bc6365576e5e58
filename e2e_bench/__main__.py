"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

from e2e_bench import cpu

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m e2e_bench")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cpu", help="the CPU kernels beside vLLM's CPU_ATTN and torch SDPA")
    one.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="where the JSON goes")
    one.add_argument("--repeats", type=int, default=15, help="timed runs of each implementation")
    one.add_argument("--only", default="", help="run workloads whose name contains this")
    args = parser.parse_args()
    cpu.run(args.out, args.repeats, args.only)


if __name__ == "__main__":
    main()
