"""A client that is ready when its turn comes: ``client_process IMPORTS MODULE ARGUMENT...``.

Imports the modules of IMPORTS, by comma, which takes engines' clients ten seconds and more, waits
for a line on its input, and goes on as ``python -m MODULE ARGUMENT...``.
"""

from __future__ import annotations

import contextlib
import importlib
import runpy
import sys


def main() -> None:
    """Do that; end at once where the input ends without a line."""
    imports, module, *arguments = sys.argv[1:]
    for name in imports.split(","):
        with contextlib.suppress(ImportError):  # the module itself says what it misses
            importlib.import_module(name)
    if not sys.stdin.readline():
        sys.exit("no turn came")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
