"""One SGLang engine: asked everything, its answers written as JSON.

``python -m e2e_bench.sglang_gpu.engine "llama eager" answers.json``; ``tokens`` starts it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e_bench.sglang_gpu.runs import Run, cases
from e2e_bench.vllm_gpu.models import make_small

Answers = list[dict[str, list[float]]]


def prompt(length: int, seed: int) -> list[int]:
    """Return random token ids, none of them the end of text."""
    draw = random.Random(seed)
    return [1 + draw.randrange(2000) for _ in range(length)]


class Engine:
    """A model under SGLang, and what to ask it."""

    def __init__(self, run: Run) -> None:
        import sglang  # seconds: not for those who read the list of runs only

        folder = str(make_small(run.model))
        options = run.engine_options()
        if run.drafts:
            options["speculative_draft_model_path"] = folder
        self._logprobs = not run.drafts
        self.engine: Any = sglang.Engine(model_path=folder, **options)

    def ask(self, prompts: Sequence[list[int]], tokens: int) -> Answers:
        """Return the greedy continuations of prompts that are in flight together.

        Each has its token ids, their log-probabilities, and how far the runner-up was behind.
        """
        params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
        wanted = {"return_logprob": True, "top_logprobs_num": 2} if self._logprobs else {}
        found = self.engine.generate(input_ids=list(prompts), sampling_params=params, **wanted)
        return [_answer(one) for one in found]

    def score(self, prompts: Sequence[list[int]]) -> list[float]:
        """Return the log-probability of every prompt token given those before it."""
        params = {"temperature": 0.0, "max_new_tokens": 1}
        values = []
        for ids in prompts:
            (found,) = self.engine.generate(
                input_ids=[ids], sampling_params=params, return_logprob=True, logprob_start_len=0
            )
            values += [entry[0] for entry in found["meta_info"]["input_token_logprobs"][1:]]
        return values

    def counts(self) -> dict[str, int]:
        """Return what the adapter did; nothing where it was not asked."""
        (state, *_) = self.engine.get_server_info()["internal_states"]
        counts: dict[str, int] = state.get("fi_backend", {})
        return counts


def _answer(found: dict[str, Any]) -> dict[str, list[float]]:
    answer: dict[str, list[float]] = {"tokens": list(found["output_ids"])}
    meta = found["meta_info"]
    if meta.get("output_token_logprobs"):
        answer["logprobs"] = [entry[0] for entry in meta["output_token_logprobs"]]
        answer["gaps"] = [best[0] - next_[0] for best, next_ in meta["output_top_logprobs"]]
    return answer


def ask_everything(engine: Engine) -> dict[str, Answers]:
    """Return the answers of all workloads."""
    stem, tails = prompt(700, 3), [[], prompt(1, 4), prompt(60, 5), prompt(500, 6)]
    groups = [prompt(400, 200) + prompt(300 + 64 * i, 201 + i) for i in range(3)]
    grouped = [stem + prompt(3 + 5 * i, 300 + i) for stem in groups for i in range(8)]
    lengths = (1, 15, 16, 17, 127, 128, 129, 255, 511)
    return {
        "mixed": engine.ask([prompt(n, 10 + n) for n in (5, 33, 64, 2, 130, 17, 300, 9)], 32),
        "page edges": engine.ask([prompt(n, 400 + n) for n in lengths], 20),
        "long": engine.ask([prompt(3000, 1), prompt(1900, 2)], 48),
        "prefix": engine.ask([stem], 16) + engine.ask([stem + tail for tail in tails], 16),
        "chunked": engine.ask([prompt(12, 900 + i) for i in range(6)] + [prompt(1300, 8)], 40),
        "shared groups": engine.ask(grouped, 40),
        "32 in flight": engine.ask([stem[:200] + prompt(3 + i, 60 + i) for i in range(32)], 24),
    }


def answer(run: Run) -> dict[str, Any]:
    """Return everything that a run's engine said, and what it did for that."""
    started = time.monotonic()
    engine = Engine(run)
    ready_s = time.monotonic() - started
    answers = ask_everything(engine)
    scored = [] if run.drafts else engine.score([prompt(900, 95), prompt(200, 96)])
    found = {
        "run": run.name,
        "ready_s": round(ready_s, 1),
        "total_s": round(time.monotonic() - started, 1),
        "counts": engine.counts(),
        "answers": answers,
        "scored": scored,
    }
    return found


def find_run(name: str) -> Run:
    """Return the run of a name, from all cases."""
    return next(run for case in cases() for run in (case.ours, *case.noise) if run.name == name)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answer(find_run(sys.argv[1]))))
