"""An engine's client at work: started ahead of its turn, asked for a load's figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from e2e_bench.demo.server import ServerFailed
from e2e_bench.serving.loads import Load

PROCESS = "e2e_bench.serving.client_process"
OUT = "out.json"


class Client:
    """A client's process, which waits for its turn; ``stop`` ends it."""

    def __init__(
        self,
        command: Sequence[str],
        imports: Sequence[str],
        load: Load,
        folder: TemporaryDirectory[str],
        environment: Mapping[str, str],
    ) -> None:
        """Start it.

        Args:
            command: module and arguments.
            imports: modules that it imports ahead.
            load: that the command names.
            folder: that goes with the client; the command writes figures to OUT in it, one JSON
                object in a line.
            environment: of the process.
        """
        self._command, self._load, self._folder = command, load, folder
        self._out, self._log = Path(folder.name) / OUT, Path(folder.name) / "said.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROCESS, ",".join(imports), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
            )

    def figures(self) -> dict[str, Any]:
        """Let the client drive its server; return what it measured.

        Raises:
            ServerFailed: the client failed, or requests did; the message carries the end of what it
                said.
        """
        self._process.communicate(b"go\n")
        status, said = self._process.returncode, self._log.read_text(errors="replace")[-3000:]
        if status != 0 or not self._out.exists():
            raise ServerFailed(f"{' '.join(self._command[:3])} ended with {status}: {said}")
        found: dict[str, Any] = json.loads(self._out.read_text().strip().splitlines()[-1])
        if found["completed"] != self._load.prompts:
            answered = f"{found['completed']} of {self._load.prompts} requests were answered"
            raise ServerFailed(f"{answered}: {said}")
        return found

    def stop(self) -> None:
        """End the process if it still waits or runs, and remove its folder; again: nothing."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()
