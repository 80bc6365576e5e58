"""Clients of served engines: ready ahead of their turn, gone with it, and what they say."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from e2e_bench.demo.server import ServerFailed
from e2e_bench.serving.client import OUT, Client
from e2e_bench.serving.engines import ENGINES, known_figures
from e2e_bench.serving.loads import SMALL_LOADS

ROOT = Path(__file__).parents[2]
LOAD = SMALL_LOADS["mixed"]
# Imported ahead it leaves a mark; run, it writes what its name and arguments are.
MODULE = f"""
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
(folder / "imported").touch()
if __name__ == "__main__":
    said, status, completed = sys.argv[1:]
    print(said)
    figures = {{"completed": int(completed), "output_throughput": 9.0, "unknown": 1}}
    (folder / "{OUT}").write_text(json.dumps(figures))
    sys.exit(int(status))
"""


@pytest.fixture
def folder() -> Iterator[TemporaryDirectory[str]]:
    with TemporaryDirectory() as name:
        made = TemporaryDirectory(dir=name)
        Path(made.name, "the_client.py").write_text(MODULE)
        yield made


def start(folder: TemporaryDirectory[str], *arguments: str) -> Client:
    paths = {"PYTHONPATH": f"{ROOT}:{folder.name}", "PYTHONSAFEPATH": "1"}
    imports = ("the_client", "a_module_that_is_not_there")
    return Client(["the_client", *arguments], imports, LOAD, folder, paths)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)


def test_clients_import_ahead_and_wait(folder: TemporaryDirectory[str]) -> None:
    client = start(folder, "done", "0", str(LOAD.prompts))
    wait_for(Path(folder.name, "imported"))
    time.sleep(0.1)
    assert not Path(folder.name, OUT).exists()
    found = client.figures()
    assert found["completed"] == LOAD.prompts
    assert known_figures(found, LOAD) == {"completed": 12, "output_throughput": 9.0}
    client.stop()
    client.stop()
    assert not Path(folder.name).exists()


def test_clients_that_wait_end_with_their_server(folder: TemporaryDirectory[str]) -> None:
    client = start(folder, "done", "0", "12")
    wait_for(Path(folder.name, "imported"))
    client.stop()
    assert client._process.returncode == -9


@pytest.mark.parametrize(
    ("status", "completed", "why"),
    [(3, 12, "the_client boom 3 ended with 3: boom"), (0, 11, "11 of 12 requests were answered")],
)
def test_failed_clients_say_why(
    folder: TemporaryDirectory[str], status: int, completed: int, why: str
) -> None:
    client = start(folder, "boom", str(status), str(completed))
    with pytest.raises(ServerFailed, match=why):
        client.figures()
    client.stop()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_clients_know_their_server_and_their_folder(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("e2e_bench.serving.engines.Client", lambda *given: started.append(given))
    server = SimpleNamespace(url="http://127.0.0.1:7")
    environment = {"PYTHONPATH": "p"}
    engine.start_client(server, tmp_path, LOAD, environment)
    command, imports, load, folder, variables = started[0]
    assert load is LOAD and server.url in command and command[0].split(".")[0] == engine.name
    assert {folder.name, f"{folder.name}/{OUT}"} & set(map(str, command))
    assert imports[0].startswith(engine.name) and variables["PYTHONPATH"].startswith("p")
    folder.cleanup()


def test_without_a_turn_nothing_is_run(folder: TemporaryDirectory[str]) -> None:
    """Where who started it is gone, its input ends."""
    client = start(folder, "done", "0", "12")
    client._process.communicate(b"")
    assert client._process.returncode == 1 and not Path(folder.name, OUT).exists()
    assert "no turn came" in Path(folder.name, "said.txt").read_text()
    assert sys.executable in client._process.args  # type: ignore[operator]
    client.stop()
