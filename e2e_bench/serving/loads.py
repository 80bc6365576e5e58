"""What is asked of a server: loads as data, the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SEED = 7


@dataclass(frozen=True)
class Load:
    """Requests of one benchmark.

    Attributes:
        input_tokens: mean of a request's own tokens.
        spread: input tokens are uniform within this share of the mean, up and down.
        prompts: requests.
        in_flight: requests at a time, each with all of its samples.
        prefix_tokens: leading tokens that all requests have in common.
        samples: continuations of each prompt: parallel generation.
        output_tokens: of each continuation.
    """

    input_tokens: int
    spread: float
    prompts: int
    in_flight: int
    prefix_tokens: int = 0
    samples: int = 1
    output_tokens: int = 128

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its output included."""
        most = round(self.input_tokens * (1 + self.spread))
        return self.prefix_tokens + most + self.output_tokens


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
}
# The same kinds of load for a small model on a CPU.
SMALL_LOADS: Mapping[str, Load] = {
    "mixed": Load(96, 0.5, prompts=12, in_flight=4, output_tokens=16),
    "shared": Load(32, 0.0, prompts=12, in_flight=4, prefix_tokens=512, output_tokens=16),
    "parallel": Load(128, 0.25, prompts=6, in_flight=2, samples=4, output_tokens=16),
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "parallel": ("parallel4", "parallel8", "parallel16", "parallel64")
}
