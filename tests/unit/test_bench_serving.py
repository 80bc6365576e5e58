"""The serving benchmark: loads, clients' command lines, the matrix that goes on, its tables."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from e2e_bench.__main__ import main
from e2e_bench.demo.server import ServerFailed
from e2e_bench.serving import engines, figures, matrix
from e2e_bench.serving.engines import ENGINES, Vllm, per_sample, split_backend
from e2e_bench.serving.loads import GROUPS, LOADS, SMALL_LOADS, Load
from e2e_bench.serving.prompts import make_requests, one_token_words, write_requests
from e2e_bench.serving.shapes import kv_token_bytes, make_shape
from e2e_bench.vllm_gpu.models import make_small


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
    # SGLang 0.5.16 ends where prompts with a common beginning are to be sent as tokens.
    assert "--tokenize-prompt" in sglang and "--tokenize-prompt" not in shared


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
    # Drafts come in pieces of one token or several: no gaps, but every token counts.
    assert per_sample(found, LOADS["ngram2k"]) == {"output_throughput": 900.0, "mean_tpot_ms": 1.0}


def test_sglang_says_what_it_does_not_run() -> None:
    for name, rule in (("parallel8", "one sample a prompt, got 8"), ("ngram2k", "no drafts on a")):
        assert f": expected {rule}" in str(ENGINES["sglang"].why_not(LOADS[name], on_cpu=True))
        assert ENGINES["vllm"].why_not(LOADS[name], on_cpu=True) is None
    assert ENGINES["sglang"].why_not(LOADS["ngram2k"], on_cpu=False) is None


def test_lengths_have_the_published_means() -> None:
    requests = list(make_requests(LOADS["sharegpt"], WORDS))
    assert requests == list(make_requests(LOADS["sharegpt"], WORDS))  # the seed's, at each call
    inputs, outputs = [len(prompt) for prompt, _ in requests], [tokens for _, tokens in requests]
    for lengths, mean, std in ((inputs, 246, 547), (outputs, 322, 244)):
        assert statistics.mean(lengths) == pytest.approx(mean, rel=0.05)
        median = mean / (1 + (std / mean) ** 2) ** 0.5  # of a log-normal
        assert statistics.median(lengths) == pytest.approx(median, abs=1.5)
    assert max(map(sum, zip(inputs, outputs, strict=True))) <= LOADS["sharegpt"].longest
    assert abs(statistics.correlation(inputs, outputs)) < 0.1


def test_trees_have_three_levels_and_drafts_a_phrase() -> None:
    prompts = [prompt for prompt, tokens in make_requests(LOADS["tree6k"], WORDS) if tokens == 128]
    for length, starts in ((2048, 4), (6144, 16), (LOADS["tree6k"].longest - 128, 192)):
        assert len({tuple(prompt[:length]) for prompt in prompts}) == starts
    assert {len(prompt) for prompt in prompts} == {6400} and len(prompts) == 192
    prompts = [prompt for prompt, _ in make_requests(LOADS["ngram2k"], WORDS)]
    assert all(prompt == prompt[:32] * 64 for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts) == 128


@pytest.mark.parametrize("name", ["tiny", "qwen3-8b"])
def test_a_word_is_a_token_of_the_model(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = make_small("demo") if name == "tiny" else make_shape(name, tmp_path)
    tokenizer, load = AutoTokenizer.from_pretrained(model), SMALL_LOADS["sharegpt"]
    write_requests(load, model, tmp_path / "r.jsonl")
    lines = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    made = make_requests(load, one_token_words(model))
    for line, (words, tokens) in zip(lines, made, strict=True):
        prompt, answer = (turn["content"] for turn in line["conversations"])
        assert line["prompt"] == prompt and len(tokenizer(prompt).input_ids) == len(words)
        assert line["output_tokens"] == len(tokenizer(answer).input_ids) == tokens


def test_clients_read_what_was_written(tmp_path: Path) -> None:
    vllm, sglang = (options(engine, LOADS["sharegpt"]) for engine in ENGINES)
    for asked in (vllm, sglang):
        assert asked["--dataset-name"] == "custom" and asked["--dataset-path"].endswith("s.jsonl")
        assert asked["--request-rate"] == "16.0" and "--tokenize-prompt" not in asked
    assert vllm["--custom-output-len"] == "-1" and "--skip-chat-template" in vllm
    assert "--request-rate" not in options("vllm", LOADS["tree6k"])
    # vLLM's client reads with pandas, or with what stands in for it.
    (tmp_path / "r.jsonl").write_text('{"prompt": " a", "output_tokens": 3}\n')
    code = "import pandas; d = pandas.read_json(path_or_buf='r.jsonl', lines=True); "
    code += "print('prompt' in d.columns, [row.to_dict() for _, row in d.iterrows()])"
    env = Vllm().client_environment({}, tmp_path)
    read = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=env)
    assert read == b"True [{'prompt': ' a', 'output_tokens': 3}]\n"


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


class Played:
    """A server that is ready at once, unless ``fails``, and what its worker answers."""

    url = "u"
    takes_s = 0.0

    def __init__(self, log: Path, fails: bool) -> None:
        self.log, self.options, self.ready_s, self.calls = log, ["--a"], 1.0, 0
        self.fails, self.lives, self.events = fails, False, [""]
        log.write_text("GPU KV cache size: 1,234 tokens")

    def start(self) -> None:
        self.lives = True
        self.events.append("start")

    def wait(self) -> None:
        time.sleep(self.takes_s)
        self.events.append("ready")
        if self.fails:
            raise ServerFailed("it fell over")

    def stop(self) -> None:
        if self.lives:
            self.events.append("stop")
        self.lives = False

    def counts(self) -> dict[str, int]:
        self.calls += 1
        return {"kv_tokens": 1000 * self.calls, "saved_kv_tokens": 700 * self.calls, "steps": 1}


@dataclass
class PlayedClient:
    """Answers at once, or fails."""

    engine: PlayedVllm
    server: Played
    load: Load

    def figures(self) -> dict[str, Any]:
        if self.load is self.engine.broken:
            self.server.lives = not self.engine.ends
            raise ServerFailed("the client fell over")
        self.engine.driven.append(self.load)
        self.server.events.append("driven")
        throughput = 100.0 + len(self.engine.driven)
        return {"output_throughput": throughput, "median_itl_ms": 2.5, "unknown": 1}

    def stop(self) -> None: ...


class PlayedVllm(Vllm):
    """A load named in ``broken`` fails, with its server where ``ends`` is set."""

    def __init__(self) -> None:
        self.servers: list[tuple[str, Mapping[str, str], int | None]] = []
        self.played: list[Played] = []
        self.events: list[str] = []
        self.driven: list[Load] = []
        self.broken: Load | None = None
        self.ends = False
        self.dead = ""  # name of a backend whose servers do not start

    def server(self, *given: Any) -> Any:
        _, backend, log, environment, length = given
        self.servers.append((backend, environment, length))
        self.played.append(Played(log, backend == self.dead))
        self.played[-1].takes_s = 0.1 * (len(self.played) - 1)
        self.played[-1].events = self.events
        return self.played[-1]

    def start_client(self, server: Any, model: Path, load: Load, environment: Any) -> Any:
        return PlayedClient(self, server, load)


WORDS = [f"t{i}" for i in range(3, 1000)]
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
    said = "CUSTOM FI_SHARING=0 failed: shared8k: the client fell over"
    assert said in capsys.readouterr().out
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


@pytest.mark.parametrize("ends", [True, False])
def test_loads_behind_one_that_fails_are_measured_while_the_server_lives(
    engine: PlayedVllm, tmp_path: Path, ends: bool
) -> None:
    engine.broken, engine.ends = LOADS["mixed1k"], ends
    one = make(engine, tmp_path, "CUSTOM", "FLASH_ATTN")
    assert one.run() == 2
    assert engine.driven == ([] if ends else [LOADS["shared8k"]] * 2)
    rows = [row for row in json.loads(one.out.read_text())["rows"] if row["workload"] == "failed"]
    why = "mixed1k: the client fell over"
    assert [(row["backend"], row["why"]) for row in rows] == [("CUSTOM", why), ("FLASH_ATTN", why)]


def test_servers_start_together_and_are_driven_one_by_one(
    engine: PlayedVllm, tmp_path: Path
) -> None:
    engine.dead = "FLASH_ATTN"
    one = make(engine, tmp_path, "CUSTOM", "FLASH_ATTN", "TRITON_ATTN")
    assert replace(one, at_once=2, kv_bytes=1 << 35).run() == 1
    assert engine.events == [
        *("start", "start", "ready", "ready", "driven", "driven", "stop", "stop"),
        *("start", "ready", "driven", "driven", "stop"),
    ]
    cache = ["--kv-cache-memory-bytes", str(1 << 35), "--gpu-memory-utilization", "0.1"]
    assert all(server.options == ["--a", *cache, "--b"] for server in engine.played)
    rows = json.loads(one.out.read_text())["rows"]
    why = [row["why"] for row in rows if row["workload"] == "failed"]
    assert why == ["it fell over"] and len(engine.driven) == 4


def test_caches_of_a_fixed_size() -> None:
    # Llama-3.1-8B: 32 layers of K and V, 8 heads of 128 elements of two bytes.
    assert kv_token_bytes("llama-3.1-8b") == 131072
    sglang = ENGINES["sglang"]
    assert sglang.cache_options(1 << 30, 131072) == ["--max-total-tokens", "8192"]
    assert sglang.idle_options == ("--sleep-on-idle",)


def test_drafts_have_a_server_of_their_own(
    engine: PlayedVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves = iter([[SimpleNamespace(text=one) for one in said] for said in ("abc", "abd")])
    monkeypatch.setattr(matrix, "run_wave", lambda *_: next(waves))
    one, loads = make(engine, tmp_path, "CUSTOM"), {n: LOADS[n] for n in ("ngram2k", "mixed1k")}
    assert replace(one, shape="qwen3-8b-tp4", loads=loads).run() == 0
    drafting, split = ENGINES["vllm"].draft_options(4), ["--a", "--tensor-parallel-size", "4"]
    assert '"num_speculative_tokens": 4' in drafting[1]
    started = [server.options for server in engine.played]
    assert started == [[*split, "--b"], [*split, *drafting, "--b"]]
    rows = json.loads(one.out.read_text())["rows"]
    assert [row["workload"] for row in rows] == ["server", "mixed1k", "server-ngram4", "ngram2k"]
    assert (rows[2]["answers_as_the_first"], rows[2]["shape"]) == ("2 of 3", "qwen3-8b-tp4")
    assert "num-draft-tokens 5" in " ".join(ENGINES["sglang"].draft_options(4))


def test_rows_of_another_tree_are_not_added_to(
    engine: PlayedVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(engine, tmp_path, "CUSTOM").run()
    monkeypatch.setattr(matrix, "run_header", lambda *_, **__: HEADER | {"kernels_hash": "k2"})
    with pytest.raises(ValueError, match=r"expected kernels_hash k1, .*, got k2; name a new file"):
        make(engine, tmp_path, "FLASH_ATTN").run()


def test_loads_by_name() -> None:
    assert matrix.choose_loads((), LOADS) == dict(LOADS)
    chosen = matrix.choose_loads(("long32k", "parallel"), LOADS)
    assert list(chosen) == ["long32k", *GROUPS["parallel"]]
    assert list(matrix.choose_loads(("parallel",), SMALL_LOADS)) == ["parallel"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workloads nothing", "--workloads: expected some of mixed1k, fixed1k,"),
        ("--shape gpt-9", "--shape: expected tiny, llama-3.1-8b, llama-3.1-70b, qwen3-8b, gemma"),
        ("--at-once 0", "--at-once: expected 1 or more servers, got 0"),
        ("--at-once 2", "--at-once: expected --kv-gib too, got none; servers share the GPU"),
        ("--shape tiny-tp2", "gpt-oss-20b, the latter also with -tp<GPUs>, got 'tiny-tp2'"),
    ],
)
def test_bad_names(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--out", str(tmp_path / "o.json"), *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_nothing_measured_draws_nothing(tmp_path: Path) -> None:
    figures.draw(tmp_path / "o.json", HEADER, [])
    assert list(tmp_path.iterdir()) == []


def test_figures_outlive_a_picture_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> bytes:
        raise AttributeError("a broken matplotlib")

    monkeypatch.setattr(figures, "_picture", fail)
    row = {"engine": "vllm", "shape": "tiny", "backend": "CUSTOM", "workload": "mixed1k"}
    figures.draw(tmp_path / "o.json", HEADER, [{**row, "output_throughput": 1234.5}])
    assert [path.name for path in tmp_path.iterdir()] == ["o.html"]
    assert "1,234" in (tmp_path / "o.html").read_text()
    assert "no picture: AttributeError('a broken matplotlib')" in capsys.readouterr().out
