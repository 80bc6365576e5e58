"""The serving benchmark: loads, clients' command lines, the matrix that goes on, its tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from e2e_bench.__main__ import main
from e2e_bench.demo.server import ServerFailed
from e2e_bench.serving import engines, figures, matrix
from e2e_bench.serving.engines import ENGINES, Vllm, per_sample, split_backend
from e2e_bench.serving.loads import GROUPS, LOADS, SMALL_LOADS, Load


def options(engine: str, load: Load) -> dict[str, str]:
    command = ENGINES[engine].client("http://x", Path("m"), load, Path("/out/a.json"))
    words = command[command.index("--backend") :]
    return {a: b for a, b in zip(words, [*words[1:], ""], strict=True) if a.startswith("--")}


def test_both_clients_are_asked_for_the_load() -> None:
    vllm = options("vllm", LOADS["mixed1k"])
    assert json.loads(vllm["--random-range-ratio"]) == {"input": 0.8, "output": 0.0}
    assert (vllm["--num-prompts"], vllm["--max-concurrency"]) == ("320", "64")
    assert vllm["--temperature"] == "0" and "--extra-body" not in vllm
    sglang = options("sglang", LOADS["mixed1k"])
    longest, share = int(sglang["--random-input-len"]), float(sglang["--random-range-ratio"])
    assert (longest, round(longest * share)) == (1843, 205)
    assert sglang["--seed"] == vllm["--seed"]
    shared = options("sglang", LOADS["shared8k"])
    assert (shared["--gsp-system-prompt-len"], shared["--gsp-question-len"]) == ("8192", "256")
    assert (shared["--gsp-num-groups"], shared["--gsp-prompts-per-group"]) == ("1", "192")


def test_samples_of_parallel_generation_all_count() -> None:
    loads = [LOADS[name] for name in GROUPS["parallel"]]
    assert {load.prompts * load.samples for load in loads} == {256}
    assert {load.in_flight * load.samples for load in loads} == {64}
    asked = options("vllm", loads[1])
    assert json.loads(asked["--extra-body"]) == {"n": 8} and asked["--temperature"] == "1"
    found = {"output_throughput": 900.0, "mean_tpot_ms": 1.0, "mean_itl_ms": 0.1}
    assert per_sample(found, LOADS["mixed1k"]) == found
    # The last of 8 samples came 1023 ms after the first token: 127 tokens later.
    expected = {"output_throughput": 900.0, "mean_tpot_ms": pytest.approx(1023 / 127)}
    assert per_sample(found, loads[1]) == expected
    assert ENGINES["vllm"].why_not(loads[1]) is None
    assert ENGINES["sglang"].why_not(loads[1]) == (
        "sglang.bench_serving: expected one sample a prompt, got 8"
    )


def test_a_backend_may_come_with_environment_variables() -> None:
    assert split_backend("FLASH_ATTN") == ("FLASH_ATTN", {})
    split = split_backend("CUSTOM FI_SHARING=0 FI_CHECK=1")
    assert split == ("CUSTOM", {"FI_SHARING": "0", "FI_CHECK": "1"})


def test_servers_take_the_longest_request(tmp_path: Path) -> None:
    ours = ENGINES["vllm"].server(tmp_path, "CUSTOM", tmp_path / "log", {"A": "1"}, 9000)
    assert engines.VLLM_WORKER in ours.options and "dummy" in ours.options
    assert ours.options[-2:] == ["--max-model-len", "9000"]
    assert ours.environment == {"A": "1", "VLLM_SERVER_DEV_MODE": "1"}
    peer = ENGINES["vllm"].server(tmp_path, "FLASH_ATTN", tmp_path / "log", {}, None)
    assert engines.VLLM_WORKER not in peer.options and "dummy" not in peer.options
    served = ENGINES["sglang"].server(tmp_path, "fi", tmp_path / "log", {}, 9000)
    assert "cpu" not in served.command() and "9000" in served.options
    assert "cpu" in ENGINES["sglang"].server(tmp_path, "fi", tmp_path, {}, None).command()


@pytest.mark.parametrize(("code", "text"), [(0, ""), (3, "boom")])
def test_a_client_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    done = SimpleNamespace(returncode=code, stdout=text, stderr="")
    monkeypatch.setattr(engines.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ServerFailed, match=f"ended with {code}: {text}"):
        Vllm().drive(SimpleNamespace(url="u"), Path("m"), SMALL_LOADS["mixed"], {})  # type: ignore[arg-type]


@pytest.mark.parametrize("completed", [12, 11])
def test_every_request_must_be_answered(monkeypatch: pytest.MonkeyPatch, completed: int) -> None:
    def client(command: list[str], **_: Any) -> SimpleNamespace:
        folder = Path(command[command.index("--result-dir") + 1])
        found = {"completed": completed, "output_throughput": 9.0, "unknown": 1}
        (folder / "out.json").write_text(json.dumps(found))
        return SimpleNamespace(returncode=0, stdout="done", stderr="")

    monkeypatch.setattr(engines.subprocess, "run", client)
    given: Any = (SimpleNamespace(url="u"), Path("m"), SMALL_LOADS["mixed"], {})
    if completed == 12:
        assert Vllm().drive(*given) == {"completed": 12, "output_throughput": 9.0}
        return
    with pytest.raises(ServerFailed, match="11 of 12 requests were answered: done"):
        Vllm().drive(*given)


class Played:
    """A server that never starts: what it was given, and what its worker answers."""

    def __init__(self, log: Path) -> None:
        self.log, self.options, self.ready_s, self.calls = log, ["--a"], 1.0, 0
        log.write_text("GPU KV cache size: 1,234 tokens")

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def counts(self) -> dict[str, int]:
        self.calls += 1
        return {"kv_tokens": 1000 * self.calls, "saved_kv_tokens": 700 * self.calls, "steps": 1}


class PlayedVllm(Vllm):
    """Answers at once; a load named in ``broken`` fails."""

    def __init__(self) -> None:
        self.servers: list[tuple[str, Mapping[str, str], int | None]] = []
        self.driven: list[Load] = []
        self.broken: Load | None = None

    def server(
        self,
        model: Path,
        backend: str,
        log: Path,
        environment: Mapping[str, str],
        length: int | None,
    ) -> Any:
        self.servers.append((backend, environment, length))
        return Played(log)

    def drive(self, server: Any, model: Path, load: Load, environment: Any) -> dict[str, Any]:
        if load is self.broken:
            raise ServerFailed("the client fell over")
        self.driven.append(load)
        return {"output_throughput": 100.0 + len(self.driven), "median_itl_ms": 2.5}


HEADER = {"gpu": "G", "kernels_hash": "k1", "versions": {"vllm": "1"}, "date": "d", "commit": "c"}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> PlayedVllm:
    text = iter(["same", "other", "same"] * 9)
    wave = lambda _, prompts, __: [SimpleNamespace(text=next(text)) for _ in prompts]  # noqa: E731
    monkeypatch.setattr(matrix, "run_wave", wave)
    monkeypatch.setattr(matrix, "run_header", lambda *_, **__: dict(HEADER))
    monkeypatch.setattr(matrix, "make_shape", lambda name, folder: folder / name)
    return PlayedVllm()


def make(engine: PlayedVllm, folder: Path, *backends: str) -> matrix.Matrix:
    loads = {name: LOADS[name] for name in ("mixed1k", "shared8k")}
    out = folder / "out.json"
    return matrix.Matrix(engine, "llama-3.1-8b", backends, loads, out, folder, ["--b"])


def test_a_matrix_measures_and_goes_on(
    engine: PlayedVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.broken = LOADS["shared8k"]
    assert make(engine, tmp_path, "CUSTOM FI_SHARING=0").run() == 1
    assert "CUSTOM FI_SHARING=0 failed: the client fell over" in capsys.readouterr().out
    name, environment, length = engine.servers[0]
    assert (name, environment["FI_SHARING"], length) == ("CUSTOM", "0", (8192 + 256 + 128) * 5 // 4)
    engine.broken = None
    assert make(engine, tmp_path, "CUSTOM FI_SHARING=0", "FLASH_ATTN").run() == 0
    # What was measured before is not again.
    assert engine.driven == [LOADS[name] for name in ("mixed1k", "shared8k", "mixed1k", "shared8k")]
    assert make(engine, tmp_path, "CUSTOM FI_SHARING=0", "FLASH_ATTN").run() == 0
    assert len(engine.servers) == 3 and len(engine.driven) == 4
    text = capsys.readouterr().out
    assert "FLASH_ATTN: measured before" in text
    assert "| CUSTOM FI_SHARING=0 | 101 | 2.5 |  |  |  |  |  |  | 70.0 % |" in text
    assert "| FLASH_ATTN | 103 | 2.5 |  |  |  |  |  |  |  |" in text
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "failed" not in {row["workload"] for row in rows}
    facts = [row for row in rows if row["workload"] == "server"]
    assert [row["kv_cache_tokens"] for row in facts] == [1234.0, 1234.0]
    assert [row["answers_as_the_first"] for row in facts] == ["3 of 3", "3 of 3"]
    page = (tmp_path / "out.html").read_text()
    assert "<td>FLASH_ATTN</td><td>103</td>".replace("><", ">\n<") in page
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_another_tree_are_not_added_to(
    engine: PlayedVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(engine, tmp_path, "CUSTOM").run()
    changed = HEADER | {"kernels_hash": "k2"}
    monkeypatch.setattr(matrix, "run_header", lambda *_, **__: changed)
    with pytest.raises(ValueError, match=r"expected kernels_hash k1, .*, got k2; name a new file"):
        make(engine, tmp_path, "FLASH_ATTN").run()


def test_loads_by_name() -> None:
    assert matrix.choose_loads((), LOADS) == dict(LOADS)
    assert list(matrix.choose_loads(("long32k", "parallel"), LOADS)) == [
        "long32k",
        *GROUPS["parallel"],
    ]
    assert list(matrix.choose_loads(("parallel",), SMALL_LOADS)) == ["parallel"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "nothing"], "--workloads: expected some of mixed1k, fixed1k,"),
        (
            ["--shape", "gpt-9"],
            "--shape: expected tiny, llama-3.1-8b, llama-3.1-70b, qwen3-8b",
        ),
    ],
)
def test_bad_names(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--out", str(tmp_path / "o.json"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nothing_measured_draws_nothing(tmp_path: Path) -> None:
    figures.draw(tmp_path / "o.json", HEADER, [])
    assert list(tmp_path.iterdir()) == []
