"""The demo: one tiny model, one load, first the engine's own attention, then ours.

Makes the model, starts a real server of vLLM or SGLang with each backend, one after the other,
sends requests that share a prefix, and says whether both answer with the same tokens and how fast.
Under vLLM it ends with pictures of steps that our planner drew inside the running server.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from e2e_bench.demo import tiny_models
from e2e_bench.demo.load import Figures, Stream, figures, run_wave
from e2e_bench.demo.server import Server, ServerFailed, SglangServer

MODEL = "demo"
NUM_REQUESTS = 12
NEW_TOKENS = 48
MEASURED_WAVES = 3
PREFIX_CHARACTERS = 4000  # about 1100 tokens
WORKER_EXTENSION = "fi_backend.integrations.vllm.worker.FiWorkerExtension"
OPTIONS = (
    *("--max-model-len", "2048", "--max-num-seqs", "16", "--max-num-batched-tokens", "512"),
    *("--block-size", "32"),
)
TASKS = (
    "def solve(items):",
    "class Reader:",
    "import os, sys",
    "# a loop over all files",
    "try:",
    "return [x for x in",
    "with open(path) as f:",
    "raise ValueError(",
    "assert result ==",
    "async def main():",
    "for key, value in",
    "lambda x, y:",
)


@dataclass(frozen=True)
class Engine:
    """An engine, and how to start it with its own attention and with ours.

    Attributes:
        name: as people write it.
        stock: of its attention backends the one to compare with; None: its own choice.
        ours: the name that selects fi_backend.
        server: what starts it.
        start_s: until it answers, on a small machine.
        load_s: for all waves.
        draws: whether its adapter draws steps when it is asked to.
        options: command line.
    """

    name: str
    stock: str | None
    ours: str
    server: type[Server]
    start_s: int
    load_s: int
    draws: bool = False
    options: tuple[str, ...] = ()


ENGINES = {
    "vllm": Engine("vLLM", None, "CUSTOM", Server, 30, 10, draws=True, options=OPTIONS),
    "sglang": Engine("SGLang", "torch_native", "fi", SglangServer, 45, 80),
}


@dataclass(frozen=True)
class Outcome:
    """What one backend did.

    Attributes:
        waves: streams of the measured waves.
        figures: their figures.
        counts: our adapter's counters; None for the engine's own attention.
        pictures: drawn steps.
    """

    waves: list[list[Stream]]
    figures: Figures
    counts: dict[str, int] | None
    pictures: list[Path]


class Progress:
    """Says what is going on, since when, and for about how long."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{self.elapsed_s:4.0f} s] {text}", flush=True)

    @contextmanager
    def phase(self, text: str, about_s: float) -> Iterator[None]:
        """Announce something that takes time, and say how long it took."""
        self.say(f"{text} (about {about_s:.0f} s) …")
        start = time.monotonic()
        yield
        self.say(f"  done in {time.monotonic() - start:.1f} s")


def wave_prompts(wave: int) -> list[str]:
    """Prompts that share a prefix; every wave has a prefix of its own."""
    source = Path(textwrap.__file__).read_text(encoding="utf-8")
    start = 1500 * wave
    shared = f"# part {wave}\n" + source[start : start + PREFIX_CHARACTERS]
    return [f"{shared}\n\n{task}" for task in TASKS[:NUM_REQUESTS]]


def run_backend(
    engine: Engine, *, is_ours: bool, model: Path, output: Path, progress: Progress
) -> Outcome:
    """Start a server, measure it and stop it; draws steps if the attention is ours."""
    title = "fi_backend" if is_ours else f"{engine.name}'s own attention"
    draws = is_ours and engine.draws
    options, environment = engine.options, {}
    if draws:
        options = (*options, "--worker-extension-cls", WORKER_EXTENSION)
        environment = {"VLLM_SERVER_DEV_MODE": "1"}  # opens the extension's methods to us
    log = output / f"server-{'fi_backend' if is_ours else 'stock'}.log"
    backend = engine.ours if is_ours else engine.stock
    server = engine.server(model, backend, log, options, environment)
    try:
        with progress.phase(f"starting {server.program} with {title}", engine.start_s):
            server.start()
            server.wait()
        what = f"{MEASURED_WAVES} waves of {NUM_REQUESTS} requests that share a prefix"
        with progress.phase(f"{what}, after one to warm up", engine.load_s):
            run_wave(server, wave_prompts(0), NEW_TOKENS)
            waves = [
                run_wave(server, wave_prompts(1 + i), NEW_TOKENS) for i in range(MEASURED_WAVES)
            ]
        counts = server.counts() if is_ours else None
        pictures = []
        if draws:
            with progress.phase("drawing two steps of the running engine", 8):
                pictures = draw_steps(server, output)
    finally:
        server.stop()
    return Outcome(waves, figures(waves), counts, pictures)


def draw_steps(server: Server, output: Path) -> list[Path]:
    """Let the server draw a step with a prefill in it, then one of decodes only."""
    pictures = []
    for name, wave, *wanted in (
        ("step_mixed.png", 7, 3, 100),
        ("step_decode.png", 8, NUM_REQUESTS, NUM_REQUESTS, NUM_REQUESTS),
    ):
        server.call_worker("fi_backend_draw_next", str(output / name), *wanted)
        run_wave(server, wave_prompts(wave), 8)
        drawn = server.call_worker("fi_backend_drawn")
        if drawn is not None:
            pictures.append(Path(drawn))
    return pictures


def differences(stock: Outcome, ours: Outcome) -> list[str]:
    """Return where the backends' tokens differ."""
    found: list[str] = []
    for w, (first, second) in enumerate(zip(stock.waves, ours.waves, strict=True)):
        for r, (a, b) in enumerate(zip(first, second, strict=True)):
            if a.tokens != b.tokens:
                pairs = zip(a.tokens, b.tokens, strict=False)
                at = next((i for i, (x, y) in enumerate(pairs) if x != y), len(b.tokens))
                found.append(f"wave {w}, request {r}: from token {at} on")
    return found


def print_texts(waves: Sequence[Sequence[Stream]]) -> None:
    """Print what the model wrote; it has random weights, so it is nonsense."""
    for task, stream in zip(TASKS, waves[0], strict=False):
        print(f"    {task:26} {stream.text[:66]!r}")


def print_table(engine: Engine, stock: Figures, ours: Figures) -> None:
    """Print both backends' figures side by side."""
    print(f"    {'':34}{engine.name:>10}{'fi_backend':>12}")
    for name, label in (
        ("tokens_per_s", "generated tokens per second"),
        ("ttft_ms", "time to first token, median, ms"),
        ("ttft_worst_ms", "time to first token, worst, ms"),
        ("itl_ms", "time between tokens, median, ms"),
        ("itl_worst_ms", "time between tokens, worst, ms"),
    ):
        print(f"    {label:34}{getattr(stock, name):10.1f}{getattr(ours, name):12.1f}")


def main() -> None:
    """Run the demo; ends with status 1 if the backends disagree or ours did not run."""
    parser = argparse.ArgumentParser(prog="python -m e2e_bench.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where to write")
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="which one serves")
    args = parser.parse_args()
    engine, output = ENGINES[args.engine], args.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    about_s = 20 + 2 * (engine.start_s + engine.load_s)
    progress.say(f"demo of fi_backend behind {engine.name}, about {about_s} s; logs in {output}")
    with progress.phase(f"the tiny model '{MODEL}' with random weights", 6):
        model = tiny_models.make(MODEL, tiny_models.cache_folder())
    try:
        stock, ours = (
            run_backend(engine, is_ours=is_ours, model=model, output=output, progress=progress)
            for is_ours in (False, True)
        )
    except ServerFailed as error:
        sys.exit(f"{error}\n\nThe whole log is in {output}.")
    sys.exit(report(engine, stock, ours, output, progress))


def report(engine: Engine, stock: Outcome, ours: Outcome, output: Path, progress: Progress) -> int:
    """Print the summary, write it as JSON, and return the exit status."""
    different = differences(stock, ours)
    forwards = (ours.counts or {}).get("forwards", 0)
    total = sum(len(wave) for wave in ours.waves)
    print("\nWhat the model wrote through fi_backend (random weights: nonsense, but the same):")
    print_texts(ours.waves)
    print(f"\nFigures of {total} streams of {NEW_TOKENS} tokens, {NUM_REQUESTS} at a time:")
    print_table(engine, stock.figures, ours.figures)
    verdict = f"the same tokens as {engine.name}'s own attention in all streams"
    if different:
        verdict = f"OTHER TOKENS than {engine.name}'s own attention: {'; '.join(different)}"
    if not forwards:
        verdict = f"fi_backend did not run: {engine.name} served the model with its own attention"
    print(f"\nSummary: {verdict}.")
    print(f"    attention layers run by fi_backend: {forwards}")
    for picture in ours.pictures:
        print(f"    picture of a step: {picture}")
    result = {
        "equal": not different,
        "counts": ours.counts,
        engine.name.lower(): asdict(stock.figures),
        "fi_backend": asdict(ours.figures),
    }
    path = output / "figures.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"    figures: {path}")
    progress.say("end")
    return int(bool(different) or not forwards)
