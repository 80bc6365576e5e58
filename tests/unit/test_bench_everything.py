"""All GPU benchmarks by one command; their processes are stood in for."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from e2e_bench import __main__ as command_line
from e2e_bench import everything


def test_each_benchmark_runs_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *, stdout: Any, **_: object) -> SimpleNamespace:
        commands.append(command[3:])
        stdout.write("what it says")
        return SimpleNamespace(returncode=int(command[3] == "ops"))

    monkeypatch.setattr(subprocess, "run", run)
    assert everything.run(tmp_path / "new", "h200", ["fa3", "fi_backend"]) == 1, "one failed"
    assert [command[0] for command in commands] == list(everything.COMMANDS)
    for command in commands:
        args = command_line.parser().parse_args(command)
        assert args.out == tmp_path / "new" / f"{args.command}-h200.json"
    assert commands[0][-2:] == ["--impls", "fa3,fi_backend"]
    assert (tmp_path / "new" / "plan.log").read_text() == "what it says"
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if "failed" in line] == ["ops"]
    assert len(said) == len(everything.COMMANDS)
