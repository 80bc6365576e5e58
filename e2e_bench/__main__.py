"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from e2e_bench.report import RESULTS, gpu_name, gpu_slug
from e2e_bench.tables import IMPLS


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m e2e_bench")
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cpu", help="the CPU kernels beside vLLM's CPU_ATTN and torch SDPA")
    one.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="where the JSON goes")
    one.add_argument("--repeats", type=int, default=15, help="timed runs of each implementation")
    one.add_argument("--only", default="", help="run workloads whose name contains this")
    one = commands.add_parser("kernels", help="attention on a GPU, FA3 and FlashInfer beside us")
    _gpu_options(one, "kernels")
    one.add_argument(
        "--only", type=_words, default=(), help="words, by comma: workloads whose name has one"
    )
    one.add_argument(
        "--impls",
        type=_impls,
        default=(),
        help="beginnings of names, by comma, such as fi_backend,fa3,flashinfer_fa2; default: all",
    )
    one.add_argument(
        "--fa3", type=Path, help="FA3's library; default: FI_FA3, or as gpu_host packs"
    )
    one = commands.add_parser("plan", help="planning a step, FA3's scheduler beside us")
    _gpu_options(one, "plan")
    one.add_argument("--fa3", type=Path, help="as for kernels")
    one = commands.add_parser("sharing", help="a step with shared prefixes looked for and not")
    _gpu_options(one, "sharing")
    one.add_argument("--only", type=_words, default=(), help="as for kernels")
    one = commands.add_parser("streaming", help="RoPE inside attention, and in a kernel of its own")
    _gpu_options(one, "streaming")
    one.add_argument("--only", type=_words, default=(), help="as for kernels")
    one = commands.add_parser("ops", help="append_kv and merge_states, a copy beside us")
    _gpu_options(one, "ops")
    one = commands.add_parser("jit", help="compiling and launching; partly without a GPU")
    _gpu_options(one, "jit")
    one.add_argument("--arch", default="sm_90a", help="to compile for without a GPU")
    one = commands.add_parser("all", help="the six above, one after the other, on this GPU")
    one.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and of logs")
    one.add_argument("--impls", type=_impls, default=(), help="as for kernels")
    one = commands.add_parser("tune", help="our attention with other tiles and other costs")
    one.add_argument("tables", nargs="*", default=["own"], help="see e2e_bench/tune.py")
    one.add_argument("--only", type=_words, default=(), help="as for kernels")
    one.add_argument("--levels", type=int, help="of prefixes that there is room for")
    one.add_argument("--quick", action="store_true", help="fewer repeats")
    _add_serve(commands)
    commands.add_parser("report", help="draw pictures, print tables, rewrite docs/benchmarks.md")
    commands.add_parser("evidence", help="which committed results are stale")
    return top


def _add_serve(commands: Any) -> None:
    one = commands.add_parser("serve", help="servers of an engine under load, backend by backend")
    one.add_argument("--engine", default="vllm", choices=("vllm", "sglang"))
    one.add_argument(
        "--shape",
        default="llama-3.1-8b",
        help="of the model, with dummy weights; with -tp4 at its end on 4 GPUs; tiny: a small "
        "model on a CPU",
    )
    one.add_argument(
        "--peers",
        type=_words,
        help="backends beside ours, by comma; environment variables may follow a name, as in "
        "'CUSTOM FI_SHARING=0'; default: TRITON_ATTN,FLASH_ATTN or triton,flashinfer,fa3",
    )
    one.add_argument("--not-ours", action="store_true", help="the peers alone")
    one.add_argument("--workloads", type=_words, default=(), help="loads, by comma; default: all")
    one.add_argument("--out", type=Path, required=True, help="JSON to write, or to go on with")
    one.add_argument("--logs", type=Path, help="folder of the servers' logs; else temporary")
    one.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="servers that are started together; loads run on one at a time",
    )
    one.add_argument(
        "--kv-gib", type=float, help="KV cache of each server on each GPU; default: what is free"
    )
    one.add_argument("options", nargs="*", help="after --: further options of the server")


def _gpu_options(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(
        "--out",
        type=Path,
        help=f"where the JSON goes; default of a whole run: e2e_bench/results/{name}-<gpu>.json",
    )
    command.add_argument("--quick", action="store_true", help="fewer repeats, for a first look")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _impls(text: str) -> tuple[str, ...]:
    for word in _words(text):
        if not any(name.startswith(word) for name in IMPLS):
            rule = f"expected beginnings of {', '.join(IMPLS)}"
            raise argparse.ArgumentTypeError(f"{rule}, got {word!r}")
    return _words(text)


def _default_out(name: str) -> Path:
    return RESULTS / f"{name}-{gpu_slug(gpu_name())}.json"


def main(argv: list[str] | None = None) -> int:
    """Run what the command line names; return the exit status."""
    args = parser().parse_args(argv)
    # Each command imports what it needs: no GPU library for the CPU's figures, no plot for a run.
    if args.command == "cpu":
        from e2e_bench import cpu

        cpu.run(args.out, args.repeats, args.only)
        return 0
    if args.command == "report":
        from e2e_bench import documents

        return documents.run()
    if args.command == "evidence":
        from e2e_bench import evidence

        print(evidence.summary(evidence.gather()))
        return 0
    if args.command == "serve":
        from e2e_bench.serving import matrix

        return matrix.run_command(args)
    return _run_on_gpu(args)


def _run_on_gpu(args: argparse.Namespace) -> int:
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu and args.command != "jit":
        print(f"{args.command}: expected a CUDA device, got none", file=sys.stderr)
        return 2
    if args.command in _WITHOUT_JSON:
        return _WITHOUT_JSON[args.command](args)
    partial = args.quick or getattr(args, "only", ()) or getattr(args, "impls", ())
    if args.out is None and not partial and has_gpu:
        args.out = _default_out(args.command)
    if args.out is None:
        print("no JSON is written: not a whole run on a GPU; --out names a file")
    return _WITH_JSON[args.command](args)


def _kernels(args: argparse.Namespace) -> int:
    from e2e_bench import kernels

    return kernels.run(kernels.Options(args.out, args.only, args.impls, args.quick, args.fa3))


def _plan(args: argparse.Namespace) -> int:
    from e2e_bench import plan

    return plan.run(args.out, args.fa3, args.quick)


def _sharing(args: argparse.Namespace) -> int:
    from e2e_bench import sharing

    return sharing.run(args.out, args.only, args.quick)


def _streaming(args: argparse.Namespace) -> int:
    from e2e_bench import streaming

    return streaming.run(args.out, args.only, args.quick)


def _ops(args: argparse.Namespace) -> int:
    from e2e_bench import ops

    return ops.run(args.out, args.quick)


def _jit(args: argparse.Namespace) -> int:
    from e2e_bench import jit

    return jit.run(args.out, args.arch, args.quick)


def _all(args: argparse.Namespace) -> int:
    from e2e_bench import everything

    return everything.run(args.out, gpu_slug(gpu_name()), args.impls)


def _tune(args: argparse.Namespace) -> int:
    from e2e_bench import tune

    return tune.run(args.tables, args.only, args.levels, args.quick)


_WITH_JSON = {
    "kernels": _kernels,
    "plan": _plan,
    "sharing": _sharing,
    "streaming": _streaming,
    "ops": _ops,
    "jit": _jit,
}
_WITHOUT_JSON = {"all": _all, "tune": _tune}


if __name__ == "__main__":
    sys.exit(main())
