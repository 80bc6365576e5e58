"""Looks after the cache of compiled code: ``python -m fi_backend.jit {list,clear}``."""

from __future__ import annotations

import argparse
import sys
import time

from fi_backend.jit.cache import default_cache


def main(argv: list[str] | None = None) -> int:
    """List or remove the entries of the cache; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fi_backend.jit", description=__doc__)
    parser.add_argument("action", choices=("list", "clear"))
    cache = default_cache()
    if parser.parse_args(argv).action == "clear":
        print(f"removed {cache.clear()} entries from {cache.root}")
        return 0
    for entry in cache.entries():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        print(f"{entry.key[:16]}  {entry.num_bytes >> 10:6d} KiB  {used}  {entry.title}")
    print(f"{len(cache.entries())} entries in {cache.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
