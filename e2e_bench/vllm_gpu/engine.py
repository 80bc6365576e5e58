"""One vLLM engine in this process: asked everything a run names, its answers written as JSON.

``python -m e2e_bench.vllm_gpu.engine "llama FULL" answers.json``; ``tokens`` starts it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from e2e_bench.vllm_gpu.models import make_small
from e2e_bench.vllm_gpu.runs import Run, cases

WORKER = "fi_backend.integrations.vllm.worker.FiWorkerExtension"
# Counters of vLLM by the names that cases use.
COUNTERS = {
    "preemptions": "vllm:num_preemptions",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}
Answers = list[dict[str, list[float]]]


def prompt(length: int, seed: int) -> list[int]:
    """Return random token ids, none of them the end of text."""
    draw = random.Random(seed)
    return [1 + draw.randrange(2000) for _ in range(length)]


class Engine:
    """A model under vLLM, and what to ask it."""

    def __init__(self, run: Run) -> None:
        from vllm import LLM  # seconds: not for those who read the list of runs only

        self.run = run
        folder = str(make_small(run.model))
        self.llm: Any = LLM(folder, worker_extension_cls=WORKER, **_options(run))

    def ask(self, prompts: Sequence[list[int]], tokens: int, samples: int = 1) -> Answers:
        """Return the greedy continuations of prompts that are in flight together.

        Each has its token ids, their log-probabilities, and how far the runner-up was behind.
        Samples of a prompt follow one another.
        """
        from vllm import SamplingParams

        wanted = 2 if self.run.logprobs else None
        # vLLM refuses several greedy samples; the likeliest token alone is left to draw from.
        greedy = {"temperature": 0.0} if samples == 1 else {"temperature": 1.0, "top_k": 1}
        params = SamplingParams(
            n=samples, max_tokens=tokens, ignore_eos=True, logprobs=wanted, **greedy
        )
        requests: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        return [_answer(sample) for output in outputs for sample in output.outputs]

    def score(self, prompts: Sequence[list[int]]) -> list[float]:
        """Return the log-probability of every prompt token given those before it."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        requests: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        values = []
        for output in self.llm.generate(requests, params, use_tqdm=False):
            entries = (output.prompt_logprobs or [])[1:]
            for token, entry in zip(output.prompt_token_ids[1:], entries, strict=True):
                values.append(entry[token].logprob)
        return values

    def counts(self) -> dict[str, float]:
        """Return what the adapter did, summed over ranks, and counters of vLLM."""
        total: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        for rank in self.llm.collective_rpc("fi_backend_stats"):
            for name, value in rank.items():
                total[name] = total.get(name, 0) + value
        for metric in self.llm.get_metrics():
            for name, theirs in COUNTERS.items():
                if metric.name == theirs:
                    total[name] += metric.value
        return total


def _options(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.engine_options().items() if value is not None}


def _answer(output: Any) -> dict[str, list[float]]:
    answer: dict[str, list[float]] = {"tokens": list(output.token_ids)}
    if output.logprobs:
        answer["logprobs"] = [
            entry[token].logprob
            for token, entry in zip(output.token_ids, output.logprobs, strict=True)
        ]
        ranked = [sorted((x.logprob for x in e.values()), reverse=True) for e in output.logprobs]
        answer["gaps"] = [values[0] - values[1] for values in ranked]
    return answer


def _mixed(engine: Engine) -> Answers:
    return engine.ask([prompt(n, 10 + n) for n in (5, 33, 64, 2, 130, 17, 300, 9)], 32)


def _edges(engine: Engine) -> Answers:
    return engine.ask([prompt(n, 400 + n) for n in (1, 15, 16, 17, 127, 128, 129, 255, 511)], 20)


def _long(engine: Engine) -> Answers:
    return engine.ask([prompt(3000, 1), prompt(1900, 2)], 48)


def _shared(engine: Engine) -> Answers:
    stem = prompt(700, 3)
    first = engine.ask([stem], 16)
    tails = [[], prompt(1, 4), prompt(60, 5), prompt(500, 6)]
    return first + engine.ask([stem + tail for tail in tails] + [stem[:300] + prompt(40, 7)], 16)


def _chunked(engine: Engine) -> Answers:
    return engine.ask([prompt(1300, 8), *(prompt(12, 900 + i) for i in range(6))], 40)


def _many(engine: Engine) -> Answers:
    stem = prompt(200, 9)
    return engine.ask([stem + prompt(3 + i, 60 + i) for i in range(32)], 24)


def _crowd(engine: Engine) -> Answers:
    return engine.ask([prompt(100 + 7 * i, 80 + i) for i in range(12)], 60)


def _every_token(engine: Engine) -> Answers:
    """Prompts that hold every token: an n-gram drafter finds a match at each step."""
    prompts = []
    for seed in range(4):
        ids = list(range(1, 2001))
        random.Random(seed).shuffle(ids)
        prompts.append(ids)
    return engine.ask(prompts, 48)


def _groups(prefix: int, own: int, per_group: int) -> list[list[int]]:
    """Prompts of three groups, whose prefixes have their first half in common."""
    half, prompts = prefix // 2, []
    for group in range(3):
        stem = prompt(half, 200) + prompt(half + 64 * group, 201 + group)
        prompts += [stem + prompt(own + 5 * i, 300 + 10 * group + i) for i in range(per_group)]
    return prompts


def _shared_groups(engine: Engine) -> Answers:
    return engine.ask(_groups(800, 3, per_group=8), 40)


def _samples(engine: Engine) -> Answers:
    """Several samples of each prompt, which share its pages."""
    prompts = [prompt(1300, 210), prompt(333, 211), prompt(700, 212)]
    return engine.ask(prompts, 40, samples=4)


def _crowded_groups(engine: Engine) -> Answers:
    """Groups whose prefixes are evicted by others, and come back."""
    prompts = _groups(256, 20, per_group=4)
    first = engine.ask(prompts, 60)
    between = engine.ask([prompt(150 + i, 220 + i) for i in range(6)], 2)
    return first + between + engine.ask(prompts[::-1], 60)


# Asked where a run names them.
SHARING: dict[str, Callable[[Engine], Answers]] = {
    "shared groups": _shared_groups,
    "samples": _samples,
    "crowded groups": _crowded_groups,
}
WORKLOADS: dict[str, Callable[[Engine], Answers]] = {
    "mixed": _mixed,
    "page edges": _edges,
    "long": _long,
    "prefix cache": _shared,
    "chunked": _chunked,
    "32 in flight": _many,
    "crowd": _crowd,
    "every token": _every_token,
}


def answer(run: Run) -> dict[str, Any]:
    """Return everything that a run's engine said, and what it did for that."""
    started = time.monotonic()
    engine = Engine(run)
    ready_s = time.monotonic() - started
    at_start = engine.counts()
    names = run.workloads or tuple(WORKLOADS)
    answers = {name: (WORKLOADS | SHARING)[name](engine) for name in names}
    scored = engine.score([prompt(900, 95), prompt(200, 96)]) if not run.workloads else []
    done = engine.counts()
    config = engine.llm.llm_engine.vllm_config
    return {
        "run": run.name,
        "backend": run.backend,
        "runner_v2": bool(config.use_v2_model_runner),
        "async_scheduling": config.scheduler_config.async_scheduling,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "ready_s": round(ready_s, 1),
        "total_s": round(time.monotonic() - started, 1),
        "counts_at_start": at_start,
        # Forwards inside graphs count when they are captured, steps when they are served.
        "counts": done | {"steps": done["steps"] - at_start["steps"]},
        "answers": answers,
        "scored": scored,
    }


def find_run(name: str) -> Run:
    """Return the run of a name, from all cases."""
    known = [run for case in cases() for run in (case.ours, case.reference, *case.noise)]
    return next(run for run in known if run.name == name)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answer(find_run(sys.argv[1]))))
