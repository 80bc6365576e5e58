"""What is asked of a server: loads as data, the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SEED = 7


@dataclass(frozen=True)
class LogNormal:
    """Requests with log-normal lengths; the load has the means.

    Attributes:
        input_std: standard deviation of a request's input tokens.
        output_std: of its output tokens.
        most: tokens that inputs and outputs are cut to.
    """

    input_std: float
    output_std: float
    most: int


@dataclass(frozen=True)
class Tree:
    """Requests that are questions: a system prompt, one of its documents, a question of its own.

    Attributes:
        systems: system prompts.
        system_tokens: of each.
        documents: of each system prompt; the load's prompts are spread evenly over them.
        document_tokens: of each.
    """

    systems: int
    system_tokens: int
    documents: int
    document_tokens: int


@dataclass(frozen=True)
class Repeated:
    """Requests that say one phrase, each its own, again and again: what n-grams are found in.

    Attributes:
        phrase_tokens: of the phrase.
    """

    phrase_tokens: int


@dataclass(frozen=True)
class Load:
    """Requests of one benchmark.

    Attributes:
        input_tokens: mean of a request's own tokens.
        spread: input tokens are uniform within this share of the mean, up and down; 0 where
            requests are written.
        prompts: requests.
        in_flight: requests at a time, each with all of its samples.
        prefix_tokens: leading tokens that all requests have in common.
        samples: continuations of each prompt: parallel generation.
        output_tokens: of each continuation, their mean.
        rate: requests per second, at random times (Poisson); None: each as soon as in_flight lets
            it.
        written: what we write into a file for the client; None: the client draws requests.
        drafts: tokens that the server drafts by n-grams for each step; 0: none.
    """

    input_tokens: int
    spread: float
    prompts: int
    in_flight: int
    prefix_tokens: int = 0
    samples: int = 1
    output_tokens: int = 128
    rate: float | None = None
    written: LogNormal | Tree | Repeated | None = None
    drafts: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its output included."""
        if isinstance(self.written, LogNormal):
            return 2 * self.written.most
        most = round(self.input_tokens * (1 + self.spread))
        if isinstance(self.written, Tree):
            most += self.written.system_tokens + self.written.document_tokens
        return self.prefix_tokens + most + self.output_tokens


# ShareGPT's mean lengths and, in brackets, standard deviations: input 246 (547), output 322 (244)
# tokens. Source: table 4 of NanoFlow (arXiv 2408.12757).
SHAREGPT_MEANS = (246, 322)
SHAREGPT = LogNormal(input_std=547, output_std=244, most=4096)


LOADS: Mapping[str, Load] = {
    "mixed1k": Load(1024, 0.8, prompts=320, in_flight=64),
    "fixed1k": Load(1024, 0.0, prompts=256, in_flight=64),
    "uniform2k": Load(1280, 0.6, prompts=256, in_flight=64),  # 512 to 2,048 tokens
    "long32k": Load(32_000, 0.0, prompts=16, in_flight=8),
    "shared8k": Load(256, 0.0, prompts=192, in_flight=64, prefix_tokens=8192),
    # 256 samples, 64 of them in flight.
    "parallel4": Load(4096, 0.25, prompts=64, in_flight=16, samples=4),
    "parallel8": Load(4096, 0.25, prompts=32, in_flight=8, samples=8),
    "parallel16": Load(4096, 0.25, prompts=16, in_flight=4, samples=16),
    "parallel64": Load(4096, 0.25, prompts=4, in_flight=1, samples=64),
    "sharegpt": Load(
        SHAREGPT_MEANS[0],
        0.0,
        prompts=512,
        in_flight=256,
        output_tokens=SHAREGPT_MEANS[1],
        rate=16.0,
        written=SHAREGPT,
    ),
    # 4 system prompts, 16 documents, 12 questions about each.
    "tree6k": Load(256, 0.0, prompts=192, in_flight=64, written=Tree(4, 2048, 4, 4096)),
    "ngram2k": Load(2048, 0.0, prompts=128, in_flight=32, written=Repeated(32), drafts=4),
}
# The same kinds of load for a small model on a CPU.
SMALL_LOADS: Mapping[str, Load] = {
    "mixed": Load(96, 0.5, prompts=12, in_flight=4, output_tokens=16),
    "shared": Load(32, 0.0, prompts=12, in_flight=4, prefix_tokens=512, output_tokens=16),
    "parallel": Load(128, 0.25, prompts=6, in_flight=2, samples=4, output_tokens=16),
    "sharegpt": Load(
        64,
        0.0,
        prompts=16,
        in_flight=8,
        output_tokens=16,
        rate=4.0,
        written=LogNormal(input_std=96, output_std=8, most=512),
    ),
    "tree": Load(24, 0.0, prompts=12, in_flight=4, output_tokens=16, written=Tree(2, 256, 2, 128)),
    "ngram": Load(
        256, 0.0, prompts=6, in_flight=2, output_tokens=32, written=Repeated(16), drafts=3
    ),
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "parallel": ("parallel4", "parallel8", "parallel16", "parallel64")
}
