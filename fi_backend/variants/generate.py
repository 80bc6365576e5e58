"""Writes kernels/cpu/shipped_variants.cc: ``python -m fi_backend.variants.generate [--check]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fi_backend.variants.shipped import all_shipped
from fi_backend.variants.source_text import core_source

SHIPPED_SOURCE = Path(__file__).parents[2] / "kernels" / "cpu" / "shipped_variants.cc"


def generate() -> str:
    """Return the text of the file."""
    functions = {
        function: f"{variant.name}: {function.kind}"
        for variant in all_shipped()
        for function in variant.all_functions()
    }
    return core_source([(title, function) for function, title in functions.items()])


def main(argv: list[str] | None = None) -> int:
    """Write the file, or compare it with ``--check``; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the file is out of date")
    check = parser.parse_args(argv).check
    text = generate()
    if check:
        return 0 if SHIPPED_SOURCE.read_text() == text else 1
    SHIPPED_SOURCE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
