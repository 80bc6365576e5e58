"""The matrix of backends and loads, measured on one server at a time, as JSON that grows.

A run that was interrupted goes on where it stopped: what the file holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_bench.demo.load import run_wave
from e2e_bench.demo.server import Server, ServerFailed
from e2e_bench.engine_environment import run_header
from e2e_bench.serving import figures as tables
from e2e_bench.serving.client import Client
from e2e_bench.serving.engines import ENGINES, ServedEngine, known_figures, split_backend
from e2e_bench.serving.loads import GROUPS, LOADS, SMALL_LOADS, Load
from e2e_bench.serving.shapes import SHAPES, kv_token_bytes, make_shape
from e2e_bench.vllm_gpu.models import make_small

TINY = "tiny"
SERVER = "server"  # the row of what a server says about itself
GPUS_OPTION = "--tensor-parallel-size"  # of both engines' servers
COUNTED = ("kv_tokens", "saved_kv_tokens")
ANSWER_PROMPTS = ("t5 t77 t9 t14", "t901 t12 t8", " ".join(f"t{i}" for i in range(40, 240)))
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Job:
    """Loads for one server.

    Attributes:
        backend: the engine's name, with environment variables behind it or not.
        drafts: tokens that the server drafts for each step.
        loads: by name.
    """

    backend: str
    drafts: int
    loads: Mapping[str, Load]

    @property
    def name(self) -> str:
        """The engine's name of the backend."""
        return split_backend(self.backend)[0]

    @property
    def row(self) -> str:
        """Name of the row of what the server says about itself."""
        return SERVER + _suffix(self.drafts)


@dataclass(frozen=True)
class Served:
    """A server that was started, and the clients of its loads, which wait for their turns."""

    server: Server
    clients: Mapping[str, Client]

    def stop(self) -> None:
        """End all of them."""
        for client in self.clients.values():
            client.stop()
        self.server.stop()


@dataclass(frozen=True)
class Matrix:
    """What is measured.

    Attributes:
        engine: the server and its client.
        shape: of the model: a key of ``shapes.SHAPES``, with dummy weights, or TINY. The
            ending -tp4 has each layer shared by 4 GPUs.
        backends: the engine's names, each with environment variables behind it or not.
        loads: by name.
        out: JSON to write, or to go on with.
        logs: folder of the servers' logs.
        options: further command line of servers.
        at_once: servers that are started together; when all are ready, loads run on one at a time.
        kv_bytes: of each server's KV cache on each GPU; None: as much as there is.
    """

    engine: ServedEngine
    shape: str
    backends: Sequence[str]
    loads: Mapping[str, Load]
    out: Path
    logs: Path
    options: Sequence[str] = ()
    at_once: int = 1
    kv_bytes: int | None = None

    def run(self) -> int:
        """Measure what is missing, print tables, draw; return how many backends failed.

        Raises:
            ValueError: the file holds rows of another tree or machine.
        """
        results = Results(self.out, self.engine.name, self.shape)
        jobs = self._missing(results)
        if jobs:
            results.describe(self.engine.name, [*self.options, *self._share()])
        for job in jobs:
            results.forget(job.backend, "failed")
        reasons: dict[str, list[str]] = {}
        for first in range(0, len(jobs), self.at_once):
            together = jobs[first : first + self.at_once]
            for job, why in zip(together, self._measure_all(together, results), strict=True):
                if why:
                    reasons.setdefault(job.backend, []).extend(why)
                    results.save(job.backend, "failed", {"why": "; ".join(reasons[job.backend])})
        print(tables.table(results.rows))
        tables.draw(self.out, results.meta, results.rows)
        return len(reasons)

    def _missing(self, results: Results) -> list[Job]:
        jobs: list[Job] = []
        loads = {name: one for name, one in self.loads.items() if self._can_make(name, one)}
        for backend in self.backends:
            missing = {name: one for name, one in loads.items() if not results.has(backend, name)}
            if not missing:
                print(f"{backend}: measured before", flush=True)
            # Drafting is an option of the server: one for each number of drafts.
            for drafts in sorted({load.drafts for load in missing.values()}):
                part = {name: one for name, one in missing.items() if one.drafts == drafts}
                jobs.append(Job(backend, drafts, part))
        return jobs

    def _can_make(self, name: str, load: Load) -> bool:
        reason = self.engine.why_not(load, on_cpu=self.shape == TINY)
        if reason:
            print(f"{name} is not run: {reason}", flush=True)
        return reason is None

    def _measure_all(self, jobs: Sequence[Job], results: Results) -> list[list[str]]:
        """Measure jobs on servers that start together; return of each why loads failed."""
        environment = self.engine.environment(self.logs)
        found: list[list[str]] = []
        # The stack ends servers first, for whose starts the pool would wait.
        with ThreadPoolExecutor(len(jobs)) as pool, ExitStack() as stack:
            served: list[Served] = []
            for job in jobs:
                print(f"{job.backend}: starting a {job.row} …", flush=True)
                served.append(self._start(job, environment, stack))
            ready = [pool.submit(one.server.wait) for one in served]
            wait(ready)  # one that still captures or compiles takes GPU and cores from the first
            for job, one, waited in zip(jobs, served, ready, strict=True):
                try:
                    waited.result()
                    found.append(self._measure(job, one, results))
                except ServerFailed as error:
                    found.append([str(error)])
                one.stop()
        return found

    def _start(self, job: Job, environment: Mapping[str, str], stack: ExitStack) -> Served:
        """Start a server and its clients, which import while it loads."""
        server, model = self._server(job, environment)
        stack.callback(server.stop)
        server.start()
        clients: dict[str, Client] = {}
        for name, load in job.loads.items():
            client = self.engine.start_client(server, model, load, environment)
            stack.callback(client.stop)
            clients[name] = client
        return Served(server, clients)

    def _measure(self, job: Job, served: Served, results: Results) -> list[str]:
        """Measure loads on one server, as long as it lives; return why some failed."""
        reasons: list[str] = []
        server, backend = served.server, job.backend
        results.save(backend, job.row, self._facts(server, results, backend, job.row))
        for name, load in job.loads.items():
            started, before = time.monotonic(), self._counts(server, job.name)
            try:
                found = known_figures(served.clients[name].figures(), load)
            except ServerFailed as error:
                reasons.append(f"{name}: {error}")
                if server.lives:
                    continue
                break
            found["wall_s"] = round(time.monotonic() - started, 1)
            after = self._counts(server, job.name)
            results.save(backend, name, found | {key: after[key] - before[key] for key in after})
        return reasons

    def _server(self, job: Job, environment: Mapping[str, str]) -> tuple[Server, Path]:
        """Return a server that is not started, and the folder of its model."""
        shape, gpus = split_shape(self.shape)
        tiny = shape == TINY
        model = make_small("demo") if tiny else make_shape(shape, self.logs)
        name, settings = split_backend(job.backend)
        file = f"{self.engine.name}-{job.backend.replace(' ', '-')}{_suffix(job.drafts)}.log"
        # The client draws tokens and sends text, which may come back as a few tokens more.
        length = None if tiny else max(load.longest for load in self.loads.values()) * 5 // 4
        variables = {**environment, **settings}
        server = self.engine.server(model, name, self.logs / file, variables, length)
        options = [*server.options, *self._share()]
        if gpus > 1:
            options += [GPUS_OPTION, str(gpus)]
        if job.drafts:
            options += self.engine.draft_options(job.drafts)
        server.options = [*options, *self.options]
        return server, model

    def _share(self) -> list[str]:
        """Options of a server beside others; a small model's cache on a CPU is fixed already."""
        shape, gpus = split_shape(self.shape)
        options = list(self.engine.idle_options) if self.at_once > 1 else []
        if self.kv_bytes is not None and shape != TINY:
            options += self.engine.cache_options(self.kv_bytes, kv_token_bytes(shape) // gpus)
        return options

    def _facts(self, server: Server, results: Results, backend: str, row: str) -> dict[str, Any]:
        """What the log says, memory, and how many answers are those of the first server."""
        text = server.log.read_text(errors="replace")
        facts: dict[str, Any] = {"ready_s": round(server.ready_s, 1), "gpu_mib": _gpu_mib()}
        for fact, pattern in self.engine.facts.items():
            match = re.search(pattern, text)
            facts[fact] = float(match[1].replace(",", "")) if match else None
        answers = [stream.text for stream in run_wave(server, ANSWER_PROMPTS, ANSWER_TOKENS)]
        first = results.first_answers(backend, row) or answers
        same = sum(one == other for one, other in zip(answers, first, strict=True))
        return facts | {"answers": answers, "answers_as_the_first": f"{same} of {len(answers)}"}

    def _counts(self, server: Server, name: str) -> dict[str, int]:
        if name not in self.engine.ours:
            return {}
        counts = server.counts()
        return {key: counts.get(key, 0) for key in COUNTED}


class Results:
    """Figures of one engine and shape, written after each is there."""

    def __init__(self, path: Path, engine: str, shape: str) -> None:
        self.path = path
        held = json.loads(path.read_text()) if path.exists() else {}
        self.meta: dict[str, Any] = held.get("meta", {})
        self.rows: list[dict[str, Any]] = held.get("rows", [])
        self._key = {"engine": engine, "shape": shape}

    def describe(self, engine: str, options: list[str]) -> None:
        """Write down what is run, and where.

        Raises:
            ValueError: the rows that the file holds are of another tree or machine.
        """
        now = run_header(engine, options=options)
        for key in ("kernels_hash", "gpu", "cpu"):
            if self.rows and self.meta.get(key) != now.get(key):
                held = f"{key} {self.meta.get(key)}, as its rows have"
                found = f"{now.get(key)}; name a new file"
                raise ValueError(f"{self.path}: expected {held}, got {found}")
        self.meta |= now

    def has(self, backend: str, workload: str) -> bool:
        """Whether that was measured."""
        wanted = self._key | {"backend": backend, "workload": workload}
        return any(wanted.items() <= row.items() for row in self.rows)

    def first_answers(self, backend: str, workload: str) -> list[str] | None:
        """Return what the first server other than this one said."""
        for row in self.rows:
            other = (row["backend"], row["workload"]) != (backend, workload)
            if other and self._key.items() <= row.items() and "answers" in row:
                answers: list[str] = row["answers"]
                return answers
        return None

    def forget(self, backend: str, workload: str) -> None:
        """Drop a row, if there is one."""
        key = self._key | {"backend": backend, "workload": workload}
        self.rows = [row for row in self.rows if not key.items() <= row.items()]

    def save(self, backend: str, workload: str, figures: Mapping[str, Any]) -> None:
        """Add a row, in the place of an older one, and write the file."""
        self.forget(backend, workload)
        self.rows.append(self._key | {"backend": backend, "workload": workload, **figures})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")
        partial.replace(self.path)
        shown = {name: value for name, value in figures.items() if name != "answers"}
        print(json.dumps({"backend": backend, "workload": workload, **shown}), flush=True)


def split_shape(text: str) -> tuple[str, int]:
    """Return a shape's name and the number of GPUs that share each layer: ``llama-3.1-70b-tp4``.

    Raises:
        ValueError: a name that is not known, or a small model on several GPUs.
    """
    match = re.fullmatch(r"(.+)-tp([1-9]\d*)", text)
    name, gpus = (match[1], int(match[2])) if match else (text, 1)
    if name not in SHAPES and (name, gpus) != (TINY, 1):
        known = f"{TINY}, {', '.join(SHAPES)}, the latter also with -tp<GPUs>"
        raise ValueError(f"--shape: expected {known}, got {text!r}")
    return name, gpus


def _suffix(drafts: int) -> str:
    return f"-ngram{drafts}" if drafts else ""


def _gpu_mib() -> float | None:
    """Memory in use on all GPUs; None without any."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return float(sum(float(line) for line in done.stdout.split()))


def run_command(args: argparse.Namespace) -> int:
    """Run what the command line names; return the exit status."""
    engine = ENGINES[args.engine]
    known = SMALL_LOADS if args.shape == TINY else LOADS
    try:
        loads = choose_loads(args.workloads, known)
        split_shape(args.shape)
        kv_bytes = None if args.kv_gib is None else round(args.kv_gib * (1 << 30))
        if args.at_once < 1:
            raise ValueError(f"--at-once: expected 1 or more servers, got {args.at_once}")
        if args.at_once > 1 and kv_bytes is None and args.shape != TINY:
            raise ValueError("--at-once: expected --kv-gib too, got none; servers share the GPU")
        peers = engine.peers if args.peers is None else args.peers
        backends = tuple(peers) if args.not_ours else (engine.ours[0], *peers)
        with tempfile.TemporaryDirectory() as temporary:
            logs = (args.logs or Path(temporary)).absolute()
            logs.mkdir(parents=True, exist_ok=True)
            place = (args.out, logs, args.options, args.at_once, kv_bytes)
            matrix = Matrix(engine, args.shape, backends, loads, *place)
            signal.signal(signal.SIGTERM, _end)
            return 1 if matrix.run() else 0
    except ValueError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2


def _end(*_: object) -> None:
    """End by an exception, so that servers and clients end too: they are in other groups."""
    sys.exit(128 + signal.SIGTERM)


def choose_loads(names: Sequence[str], known: Mapping[str, Load]) -> dict[str, Load]:
    """Return loads by name, of a name of several all; none named: all.

    Raises:
        ValueError: a name that is not known.
    """
    wanted: list[str] = []
    for name in names or known:
        wanted += (name,) if name in known else GROUPS.get(name, (name,))
    for name in wanted:
        if name not in known:
            raise ValueError(f"--workloads: expected some of {', '.join(known)}, got {name!r}")
    return {name: known[name] for name in wanted}
