"""A server process of an engine: started, waited for, asked, stopped. Demo and tests use it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]

CACHE = Path(__file__).parents[2] / ".cache"
MODEL_NAME = "tiny"
STARTUP_LIMIT_S = 300.0
STOP_LIMIT_S = 20.0

# The engine on a small machine: no network, no reports, a KV cache of 1 GiB.
ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONSAFEPATH": "1",  # an installed fi_backend must not be shadowed by a checkout
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
}


# On a CPU SGLang's default is a backend for AMX; the cache and steps are small.
SGLANG_OPTIONS = (
    *("--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.1"),
    *("--max-total-tokens", "8192", "--max-running-requests", "16", "--context-length", "2048"),
    *("--chunked-prefill-size", "512", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none"),
)


class ServerFailed(RuntimeError):
    """The server ended or did not answer in time; the message carries the end of its log."""


@dataclass
class Server:
    """One ``vllm serve``, a context manager.

    Attributes:
        model: folder of the model.
        backend: attention backend; None: the engine's own choice.
        log: where its output goes.
        options: further command line.
        environment: further environment variables.
    """

    program = "vllm serve"

    model: Path
    backend: str | None
    log: Path
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    ready_s: float = 0.0
    _started: float = 0.0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of the OpenAI API."""
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Return the command line up to address, backend and options."""
        engine = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)]
        return [*engine, "--dtype", "float32", "--enforce-eager"]

    def start(self) -> None:
        """Start the process; ``wait`` returns when it answers."""
        self.port = self.port or free_port()
        command = [*self.command(), "--served-model-name", MODEL_NAME]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += [] if self.backend is None else ["--attention-backend", self.backend]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *self.options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENGINE_ENVIRONMENT | dict(self.environment),
                start_new_session=True,  # so that stop() reaches the engine's processes too
            )

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            ServerFailed: it ended, or did not answer within STARTUP_LIMIT_S.
        """
        process = self._process  # of which stop() may lose sight meanwhile
        assert process is not None
        while time.monotonic() - self._started < STARTUP_LIMIT_S:
            if process.poll() is not None:
                raise ServerFailed(f"{self.program} ended with {process.returncode}: {self.tail}")
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
                continue
            self.ready_s = time.monotonic() - self._started
            return
        raise ServerFailed(f"no answer within {STARTUP_LIMIT_S:.0f} s: {self.tail}")

    @property
    def lives(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def tail(self) -> str:
        """End of the log."""
        return self.log.read_text(errors="replace")[-3000:]

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON answer to a JSON request."""
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def counts(self) -> dict[str, int]:
        """Return what our adapter counted; as ``call_worker``."""
        counted: dict[str, int] = self.call_worker("fi_backend_stats")
        return counted

    def call_worker(self, method: str, *args: Any) -> Any:
        """Return the first worker's answer to a method; needs VLLM_SERVER_DEV_MODE=1."""
        answer = self.post("/collective_rpc", {"method": method, "args": list(args)})
        return answer["results"][0]

    def metric(self, name: str) -> float:
        """Return the sum of a Prometheus counter over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def stop(self) -> None:
        """End the server and its engine processes; returns when all of them are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            deadline = time.monotonic() + STOP_LIMIT_S
            while time.monotonic() < deadline:
                if process.poll() is not None and not _group_lives(process.pid):
                    return
                time.sleep(0.1)

    def __enter__(self) -> Server:
        """Start and wait."""
        try:
            self.start()
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()


class SglangServer(Server):
    """One ``sglang.launch_server``; the package's interpreter must have SGLang."""

    program = "sglang.launch_server"

    def command(self) -> list[str]:
        """Return the command line up to address, backend and options."""
        engine = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model)]
        return [*engine, *SGLANG_OPTIONS]

    def counts(self) -> dict[str, int]:
        """Return what our adapter counted in the scheduler's process; empty: it did not run."""
        with urllib.request.urlopen(f"{self.url}/server_info", timeout=30) as answer:
            states = json.loads(answer.read())["internal_states"]
        counted: dict[str, int] = states[0].get("fi_backend", {})
        return counted


def _group_lives(group: int) -> bool:
    """Whether a process of the group still runs; one that has ended unreaped does not count."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
