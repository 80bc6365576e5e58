"""``vllm serve`` on a GPU with several attention backends, one after another, under one load.

``python -m e2e_bench.vllm_gpu.serve --out serve.json`` serves the shape of Llama-3.1-8B with dummy
weights and drives it with ``vllm bench serve``. A run may cover a part, ``--backends CUSTOM
--workloads mixed1k``: figures are added to those that the file holds already. A backend may come
with environment variables: ``--backends CUSTOM "CUSTOM FI_SHARING=0"``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_bench.demo.server import MODEL_NAME, Server, ServerFailed
from e2e_bench.vllm_gpu.environment import engine_environment, run_header
from e2e_bench.vllm_gpu.models import make_llama_8b

BACKENDS = ("CUSTOM", "TRITON_ATTN", "FLASH_ATTN")
OURS = ("CUSTOM", "FI_BACKEND")
WORKER = "fi_backend.integrations.vllm.worker.FiWorkerExtension"
SEED = 7
OUTPUT_TOKENS = 128
MAX_MODEL_LEN = 40_960


@dataclass(frozen=True)
class Load:
    """Requests of one benchmark; each of their samples generates OUTPUT_TOKENS tokens.

    Attributes:
        input_tokens: mean of a request's own tokens.
        spread: input tokens are uniform within this share of the mean, up and down.
        prompts: requests.
        in_flight: requests at a time, each with all of its samples.
        prefix_tokens: leading tokens that all requests have in common.
        samples: continuations of each prompt: parallel generation.
    """

    input_tokens: int
    spread: float
    prompts: int
    in_flight: int
    prefix_tokens: int = 0
    samples: int = 1

    def options(self) -> list[str]:
        """Return the command line of ``vllm bench serve``."""
        spread = json.dumps({"input": self.spread, "output": 0.0})
        options = {
            "--random-input-len": self.input_tokens,
            "--random-output-len": OUTPUT_TOKENS,
            "--random-range-ratio": spread,
            "--random-prefix-len": self.prefix_tokens,
            "--num-prompts": self.prompts,
            "--max-concurrency": self.in_flight,
            "--temperature": 0 if self.samples == 1 else 1,  # vLLM refuses several greedy samples
        }
        if self.samples > 1:
            options["--extra-body"] = json.dumps({"n": self.samples})
        return [str(part) for pair in options.items() for part in pair]


LOADS = {
    "mixed1k": Load(1024, 0.8, prompts=320, in_flight=64),
    "long32k": Load(32_000, 0.0, prompts=16, in_flight=8),
    "shared8k": Load(256, 0.0, prompts=192, in_flight=64, prefix_tokens=8192),
    # 256 samples, 64 of them in flight.
    "parallel4": Load(4096, 0.25, prompts=64, in_flight=16, samples=4),
    "parallel8": Load(4096, 0.25, prompts=32, in_flight=8, samples=8),
    "parallel16": Load(4096, 0.25, prompts=16, in_flight=4, samples=16),
}
GROUPS = {"parallel": ("parallel4", "parallel8", "parallel16")}
FIGURES = (
    "completed",
    "failed",
    "duration",
    "total_output_tokens",
    "output_throughput",
    "total_token_throughput",
    "mean_itl_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "mean_tpot_ms",
    "median_tpot_ms",
    "mean_ttft_ms",
    "median_ttft_ms",
)
# What a server says about itself while it starts.
LOG_FIGURES = {
    "kv_cache_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "graph_capture_s": r"Graph capturing finished in ([\d.]+) secs",
    "graph_capture_gib": r"Graph capturing finished in [\d.]+ secs, took ([-\d.]+) GiB",
    "model_gib": r"Model loading took ([\d.]+) GiB",
}


def drive(server: Server, model: Path, load: Load, environment: Mapping[str, str]) -> Any:
    """Return the figures of one benchmark against a running server."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
        command += ["--backend", "vllm", "--base-url", server.url, "--model", MODEL_NAME]
        command += ["--tokenizer", str(model), "--dataset-name", "random", *load.options()]
        command += ["--seed", str(SEED), "--ignore-eos", "--disable-tqdm"]
        command += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "out.json"]
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, check=False
        )
        result = Path(folder) / "out.json"
        if done.returncode != 0 or not result.exists():
            raise ServerFailed(f"vllm bench serve: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        figures = json.loads(result.read_text())
    return per_sample({name: figures[name] for name in FIGURES if name in figures}, load.samples)


def per_sample(figures: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Return figures as they are for one sample: the client takes all of a prompt for one stream.

    It then divides the time after the first token by the tokens of all samples, and times gaps
    between tokens of different samples, which say nothing.
    """
    if samples == 1:
        return dict(figures)
    factor = (samples * OUTPUT_TOKENS - 1) / (OUTPUT_TOKENS - 1)
    kept = {name: value for name, value in figures.items() if "_itl_" not in name}
    return {name: value * factor if "_tpot_" in name else value for name, value in kept.items()}


def split_backend(text: str) -> tuple[str, dict[str, str]]:
    """Return a backend's name and the environment variables that follow it: ``CUSTOM A=1 B=2``."""
    name, *settings = text.split()
    return name, dict(setting.split("=", 1) for setting in settings)


def kv_reads(server: Server, name: str) -> dict[str, int]:
    """Return what our planners counted in the server so far; nothing for another backend."""
    if name not in OURS:
        return {}
    counts = server.counts()
    return {key: counts[key] for key in ("kv_tokens", "saved_kv_tokens")}


def measure(
    backend: str,
    loads: Sequence[str],
    scratch: Path,
    options: Sequence[str],
    save: Any,
) -> None:
    """Serve with one backend and measure each load.

    Args:
        backend: vLLM's name of it, and environment variables.
        loads: keys of LOADS, in order.
        scratch: folder for the model, logs and what has to be on the path.
        options: further command line of ``vllm serve``.
        save: called with (backend, load or "server", figures) as soon as they are there.
    """
    environment, model = engine_environment(scratch), make_llama_8b(scratch)
    name, settings = split_backend(backend)
    log = scratch / f"{backend.replace(' ', '-')}.log"
    # After the demo's options, which are for a small machine: the last one counts.
    gpu = ["--dtype", "bfloat16", "--no-enforce-eager", "--load-format", "dummy"]
    gpu += ["--max-model-len", str(MAX_MODEL_LEN), *options]
    if name in OURS:
        gpu += ["--worker-extension-cls", WORKER]
    dev_mode = {"VLLM_SERVER_DEV_MODE": "1"}  # lets workers be asked
    server = Server(model, name, log, gpu, environment | dev_mode | settings)
    with server:
        text = log.read_text(errors="replace")
        facts: dict[str, Any] = {"ready_s": round(server.ready_s, 1)}
        for fact, pattern in LOG_FIGURES.items():
            match = re.search(pattern, text)
            facts[fact] = float(match[1].replace(",", "")) if match else None
        save(backend, "server", facts)
        for load in loads:
            started, before = time.monotonic(), kv_reads(server, name)
            figures = drive(server, model, LOADS[load], environment)
            figures["wall_s"] = round(time.monotonic() - started, 1)
            after = kv_reads(server, name)
            save(backend, load, figures | {key: after[key] - before[key] for key in after})


def main() -> int:
    """Measure the backends and loads that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write or to add to")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    named = [*LOADS, *GROUPS]
    parser.add_argument("--workloads", nargs="+", default=list(LOADS), choices=named)
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs; else temporary")
    parser.add_argument("options", nargs="*", help="after --: further options of vllm serve")
    args = parser.parse_args()
    loads = [load for name in args.workloads for load in GROUPS.get(name, (name,))]
    rows = json.loads(args.out.read_text()) if args.out.exists() else {"meta": {}, "rows": {}}
    rows["meta"] = run_header("vllm", output_tokens=OUTPUT_TOKENS, options=list(args.options))

    def save(backend: str, name: str, figures: Mapping[str, Any]) -> None:
        rows["rows"].setdefault(backend, {})[name] = dict(figures)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps({"backend": backend, "workload": name, **figures}), flush=True)

    broken = 0
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.logs or Path(temporary)
        for backend in args.backends:
            try:
                measure(backend, loads, scratch.absolute(), args.options, save)
            except ServerFailed as error:
                broken += 1
                save(backend, "failed", {"why": str(error)})
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
