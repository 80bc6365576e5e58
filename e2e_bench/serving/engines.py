"""How each engine is served, and driven by the client that it comes with."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from e2e_bench.demo.server import MODEL_NAME, Server, SglangServer
from e2e_bench.engine_environment import (
    PANDAS,
    engine_environment,
    sglang_environment,
    with_stand_ins,
)
from e2e_bench.serving.client import OUT, Client
from e2e_bench.serving.loads import SEED, Load
from e2e_bench.serving.prompts import write_requests

REQUESTS = "requests.jsonl"  # beside a client's figures
FIGURES = (
    "completed",
    "failed",
    "duration",
    "total_input_tokens",
    "total_output_tokens",
    "output_throughput",
    "mean_itl_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "mean_tpot_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    # Tokens per step of a server that drafts: vLLM's name, SGLang's.
    "spec_decode_acceptance_length",
    "accept_length",
)
# vLLM's part that answers fi_backend_stats, and what lets it be asked.
VLLM_WORKER = "fi_backend.integrations.vllm.worker.FiWorkerExtension"
VLLM_DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}


class ServedEngine(ABC):
    """An engine that can be served.

    Attributes:
        name: of its package.
        ours: its names of this backend.
        peers: backends to compare with where nobody names others.
        facts: what a server's log says about it, as regular expressions of one group.
        cpu_server: of a small model on a CPU.
        gpu_server: of a model on a GPU.
        variables: of its environment, beside those of clients too.
        idle_options: of a server that keeps out of the way while it has nothing to do.
        client_imports: modules that its client imports ahead of its turn.
    """

    name: str
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    facts: Mapping[str, str]
    cpu_server: type[Server] = Server
    gpu_server: type[Server] = Server
    variables: Mapping[str, str] = {}
    idle_options: tuple[str, ...] = ()
    client_imports: tuple[str, ...]

    def server(
        self,
        model: Path,
        backend: str,
        log: Path,
        environment: Mapping[str, str],
        length: int | None,
    ) -> Server:
        """Return a server that is not started.

        Args:
            model: folder of the model.
            backend: the engine's name of one.
            log: where its output goes.
            environment: variables.
            length: tokens of the longest request on a GPU, where the model has dummy weights;
                None: a small model on a CPU.
        """
        kind = self.cpu_server if length is None else self.gpu_server
        options = self.server_options(backend, length)
        return kind(model, backend, log, options, {**environment, **self.variables})

    @abstractmethod
    def server_options(self, backend: str, length: int | None) -> list[str]:
        """Return the command line of a server behind that of the demo; arguments as ``server``."""

    @abstractmethod
    def draft_options(self, drafts: int) -> list[str]:
        """Return options of a server that drafts so many tokens by n-grams for each step."""

    @abstractmethod
    def client(self, url: str, model: Path, load: Load, out: Path) -> list[str]:
        """Return module and arguments of what drives a server and writes figures to a file.

        Requests that we write are in the file REQUESTS beside ``out``.
        """

    def why_not(self, load: Load, *, on_cpu: bool) -> str | None:
        """Return why server or client cannot make a load; None: they can."""
        del load, on_cpu
        return None

    def environment(self, scratch: Path) -> dict[str, str]:
        """Return the environment of servers and clients, with a folder for what has to be there."""
        return engine_environment(scratch)

    def client_environment(self, environment: Mapping[str, str], folder: Path) -> dict[str, str]:
        """Return the environment of a client, with its own folder for what has to be there."""
        del folder
        return dict(environment)

    @abstractmethod
    def cache_options(self, kv_bytes: int, token_bytes: int) -> list[str]:
        """Return options of a GPU's server whose KV cache has a fixed size.

        Args:
            kv_bytes: of the cache, on each GPU.
            token_bytes: of a token in it.
        """

    def start_client(
        self, server: Server, model: Path, load: Load, environment: Mapping[str, str]
    ) -> Client:
        """Return the client of a load, which waits for its turn; the server has its address."""
        folder = TemporaryDirectory()
        out = Path(folder.name) / OUT
        if load.written:
            write_requests(load, model, out.with_name(REQUESTS))
        command = self.client(server.url, model, load, out)
        variables = self.client_environment(environment, out.parent)
        return Client(command, self.client_imports, load, folder, variables)


def known_figures(found: Mapping[str, Any], load: Load) -> dict[str, Any]:
    """Return what is kept of a client's figures, as it is for one sample."""
    known = {name: found[name] for name in FIGURES if found.get(name) is not None}
    return per_sample(known, load)


def per_sample(figures: Mapping[str, Any], load: Load) -> dict[str, Any]:
    """Return figures as they are for one sample: the client takes all of a prompt for one stream.

    It then divides the time after the first token by the tokens of all samples, and times gaps
    between tokens of different samples, which say nothing. Nor do gaps of a server that drafts:
    they are between pieces of one token or several.
    """
    if load.samples == 1 and not load.drafts:
        return dict(figures)
    tokens = load.output_tokens
    factor = (load.samples * tokens - 1) / (tokens - 1)
    kept = {name: value for name, value in figures.items() if "_itl_" not in name}
    return {name: value * factor if "_tpot_" in name else value for name, value in kept.items()}


def _flat(options: Mapping[str, object]) -> list[str]:
    return [str(part) for pair in options.items() for part in pair]


class Vllm(ServedEngine):
    """``vllm serve`` and ``vllm bench serve``."""

    name = "vllm"
    ours = ("CUSTOM", "FI_BACKEND")
    peers = ("TRITON_ATTN", "FLASH_ATTN")
    facts: Mapping[str, str] = {
        "kv_cache_tokens": r"GPU KV cache size: ([\d,]+) tokens",
        "graph_capture_s": r"Graph capturing finished in ([\d.]+) secs",
        "graph_capture_gib": r"Graph capturing finished in [\d.]+ secs, took ([-\d.]+) GiB",
        "model_gib": r"Model loading took ([\d.]+) GiB",
    }

    variables: Mapping[str, str] = VLLM_DEV_MODE
    client_imports = (
        "vllm.entrypoints.cli.main",
        "vllm.entrypoints.cli.serve",
        "vllm.entrypoints.cli.benchmark.main",
        "vllm.benchmarks.serve",
    )

    def cache_options(self, kv_bytes: int, token_bytes: int) -> list[str]:
        """Memory is not profiled, which others would disturb; a share must be free all the same."""
        del token_bytes
        return _flat({"--kv-cache-memory-bytes": kv_bytes, "--gpu-memory-utilization": 0.1})

    def server_options(self, backend: str, length: int | None) -> list[str]:
        """Options that repeat those of the demo count: the last one does."""
        options = ["--worker-extension-cls", VLLM_WORKER] if backend in self.ours else []
        if length is None:
            small = ["--max-model-len", "2048", "--max-num-seqs", "16", "--block-size", "32"]
            return options + small
        options += ["--dtype", "bfloat16", "--no-enforce-eager", "--load-format", "dummy"]
        return [*options, "--max-model-len", str(length)]

    def draft_options(self, drafts: int) -> list[str]:
        """Drafts are what followed the last 2 to 4 tokens in the request before."""
        lookup = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
        config = {"method": "ngram", "num_speculative_tokens": drafts, **lookup}
        return ["--speculative-config", json.dumps(config)]

    def client(self, url: str, model: Path, load: Load, out: Path) -> list[str]:
        """Of several greedy samples vLLM wants none: they are drawn."""
        options: dict[str, object] = {
            "--backend": "vllm",
            "--base-url": url,
            "--model": MODEL_NAME,
            "--tokenizer": model,
            "--num-prompts": load.prompts,
            "--max-concurrency": load.in_flight,
            "--temperature": 0 if load.samples == 1 else 1,
            "--seed": SEED,
            "--percentile-metrics": "ttft,tpot,itl",
            "--metric-percentiles": 99,
            "--result-dir": out.parent,
            "--result-filename": out.name,
        }
        flags = ["--ignore-eos", "--disable-tqdm", "--save-result"]
        if load.written:
            options |= {
                "--dataset-name": "custom",
                "--dataset-path": out.with_name(REQUESTS),
                "--custom-output-len": -1,  # those of the file
            }
            flags.append("--skip-chat-template")
        else:
            options |= {
                "--dataset-name": "random",
                "--random-input-len": load.input_tokens,
                "--random-output-len": load.output_tokens,
                "--random-range-ratio": json.dumps({"input": load.spread, "output": 0.0}),
                "--random-prefix-len": load.prefix_tokens,
            }
        if load.rate:
            options["--request-rate"] = load.rate
        if load.samples > 1:
            options["--extra-body"] = json.dumps({"n": load.samples})
        return ["vllm.entrypoints.cli.main", "bench", "serve", *_flat(options), *flags]

    def client_environment(self, environment: Mapping[str, str], folder: Path) -> dict[str, str]:
        """Return the environment, with a stand-in for pandas where that is not installed."""
        return with_stand_ins(environment, folder, {"pandas": PANDAS})


class GpuSglangServer(SglangServer):
    """One ``sglang.launch_server`` on a GPU."""

    def command(self) -> list[str]:
        """Return the command line up to address, backend and options."""
        return [sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model)]


class Sglang(ServedEngine):
    """``sglang.launch_server`` and ``sglang.bench_serving``."""

    name = "sglang"
    ours = ("fi",)
    peers = ("triton", "flashinfer", "fa3")
    facts: Mapping[str, str] = {"kv_cache_tokens": r"max_total_num_tokens=(\d+)"}

    cpu_server = SglangServer
    gpu_server = GpuSglangServer
    idle_options = ("--sleep-on-idle",)  # else its scheduler spins
    client_imports = ("sglang.bench_serving", "transformers")

    def cache_options(self, kv_bytes: int, token_bytes: int) -> list[str]:
        """Of what is free when the weights are there SGLang takes no more than that."""
        return ["--max-total-tokens", str(kv_bytes // token_bytes)]

    def server_options(self, backend: str, length: int | None) -> list[str]:
        """A server on a CPU has those of the demo alone."""
        del backend
        if length is None:
            return []
        options = ["--dtype", "bfloat16", "--load-format", "dummy", "--context-length", str(length)]
        # Neither is what is measured, and both compile at first use or load a library.
        return [*options, "--sampling-backend", "pytorch", "--grammar-backend", "none"]

    def draft_options(self, drafts: int) -> list[str]:
        """One chain of drafts: trees are not served by all of the peers."""
        options: dict[str, object] = {
            "--speculative-algorithm": "NGRAM",
            # SGLang counts the token that the drafts follow.
            "--speculative-num-draft-tokens": drafts + 1,
            "--speculative-ngram-min-bfs-breadth": 1,
            "--speculative-ngram-max-bfs-breadth": 1,
        }
        return _flat(options)

    def client(self, url: str, model: Path, load: Load, out: Path) -> list[str]:
        """Outputs are drawn with the spread of the inputs: the client has one for both."""
        options: dict[str, object] = {
            "--backend": "sglang",
            "--base-url": url,
            "--model": model,
            "--served-model-name": MODEL_NAME,
            "--num-prompts": load.prompts,
            "--max-concurrency": load.in_flight,
            "--seed": SEED,
            "--output-file": out,
        }
        flags = ["--disable-tqdm"]
        if load.written:
            options |= {"--dataset-name": "custom", "--dataset-path": out.with_name(REQUESTS)}
        elif load.prefix_tokens:
            options |= {
                "--dataset-name": "generated-shared-prefix",
                "--gsp-num-groups": 1,
                "--gsp-prompts-per-group": load.prompts,
                "--gsp-system-prompt-len": load.prefix_tokens,
                "--gsp-question-len": load.input_tokens,
                "--gsp-output-len": load.output_tokens,
            }
        else:
            options |= {
                "--dataset-name": "random-ids",
                "--random-input-len": round(load.input_tokens * (1 + load.spread)),
                "--random-output-len": load.output_tokens,
                "--random-range-ratio": (1 - load.spread) / (1 + load.spread),
            }
            flags.append("--tokenize-prompt")  # no file is read with it
        if load.rate:
            options["--request-rate"] = load.rate
        return ["sglang.bench_serving", *_flat(options), *flags]

    def why_not(self, load: Load, *, on_cpu: bool) -> str | None:
        """One sample a prompt is what the client counts; drafts need SGLang's own kernels."""
        if load.samples != 1:
            return f"sglang.bench_serving: expected one sample a prompt, got {load.samples}"
        if load.drafts and on_cpu:
            # Where SGLang has no wheel, its kernels that verify drafts are stood in for.
            return f"sglang.launch_server: expected no drafts on a CPU, got {load.drafts} per step"
        return None

    def environment(self, scratch: Path) -> dict[str, str]:
        """Return the environment, with empty modules for what SGLang imports and does not need."""
        return sglang_environment(scratch)


ENGINES: Mapping[str, ServedEngine] = {one.name: one for one in (Vllm(), Sglang())}


def split_backend(text: str) -> tuple[str, dict[str, str]]:
    """Return a backend's name and the environment variables that follow it: ``CUSTOM A=1 B=2``."""
    name, *settings = text.split()
    return name, dict(setting.split("=", 1) for setting in settings)
