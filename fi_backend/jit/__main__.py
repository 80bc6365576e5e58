"""Looks after compiled code: ``python -m fi_backend.jit {list,prebuild,clear}``."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from fi_backend.errors import FiError
from fi_backend.jit import kernels
from fi_backend.jit.cache import default_cache
from fi_backend.jit.models import MODELS, find_model
from fi_backend.jit.serving import Serving, serving_kernels

KV_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn}


def main(argv: list[str] | None = None) -> int:
    """Run one action on the cache; return the exit status."""
    args = _parser().parse_args(argv)
    actions = {"list": _list, "clear": _clear, "prebuild": _prebuild}
    try:
        actions[args.action](args)
    except FiError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fi_backend.jit", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="show what the cache holds, least recently used first")
    actions.add_parser("clear", help="remove everything from the cache")
    prebuild = actions.add_parser(
        "prebuild", help="compile all that a model needs; no GPU is needed"
    )
    add = prebuild.add_argument
    serving = Serving()
    names = ", ".join(MODELS)
    add("--model", required=True, help=f"a folder with a config.json, or one of {names}")
    add("--arch", required=True, help="sm_90a for H100 and H200, sm_100a, sm_120a, sm_89, sm_80")
    add("--tp", type=int, default=serving.tensor_parallel, help="tensor-parallel ranks")
    add("--kv-dtype", choices=KV_DTYPES, default="auto", help="of the cache; auto: the model's")
    add("--page-size", type=int, default=serving.page_size, help="tokens of a KV page")
    add("--max-requests", type=int, default=serving.max_requests, help="requests of a step")
    add("--max-tokens", type=int, default=serving.max_tokens, help="query tokens of a step")
    add("--max-kv-len", type=int, default=serving.max_kv_len, help="KV tokens of a request")
    return parser


def _list(_args: Any) -> None:
    cache = default_cache()
    entries = cache.entries()
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        print(f"{entry.key[:16]}  {entry.num_bytes >> 10:6d} KiB  {used}  {entry.title}")
    print(f"{len(entries)} entries in {cache.root}")


def _clear(_args: Any) -> None:
    cache = default_cache()
    print(f"removed {cache.clear()} entries from {cache.root}")


def _prebuild(args: Any) -> None:
    serving = Serving(
        tensor_parallel=args.tp,
        kv_dtype=KV_DTYPES[args.kv_dtype],
        page_size=args.page_size,
        max_requests=args.max_requests,
        max_tokens=args.max_tokens,
        max_kv_len=args.max_kv_len,
        max_shared_bytes_per_sm=kernels.shared_bytes_of_arch(args.arch),
        copies_boxes=kernels.arch_copies_boxes(args.arch),
    )
    wanted = serving_kernels(find_model(args.model), serving)
    kernels.prebuild(wanted, args.arch, progress=True)
    print(f"{len(wanted)} kernels for {args.arch} in {default_cache().root}")


if __name__ == "__main__":
    sys.exit(main())
