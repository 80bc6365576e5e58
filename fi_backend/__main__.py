"""The ``fi-backend`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from fi_backend import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: words after the command's name; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog="fi-backend", description="An attention engine for LLMs.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="say, with reasons, what this machine can run")
    check.add_argument("--json", action="store_true", help="the same report as JSON")
    check.add_argument(
        "--require",
        choices=doctor.CAPABILITIES,
        help="exit with status 2 unless this can run",
    )
    options = parser.parse_args(arguments)
    report = doctor.examine()
    print(json.dumps(report.as_dict(), indent=2) if options.json else report.text())
    if options.require:
        verdict = report.verdicts[options.require]
        if not verdict.ok:
            print(f"\n{options.require}: {verdict.reason}", file=sys.stderr)
        return 0 if verdict.ok else 2
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
