"""Whether two engines agree: equal greedy tokens but for near ties, close log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Two backends round alike on average; the largest of a few thousand differences varies more. A
# choice flips when two logits move towards each other, each by up to the noise.
MEAN_FACTOR, MAX_FACTOR, GAP_FACTOR = 1.5, 2.5, 3.0
# Log-probabilities of a bf16 model come in steps of about this size.
LEAST_NOISE = 0.01


@dataclass
class Agreement:
    """How two runs differ.

    Attributes:
        differences: absolute differences of log-probabilities, where both had seen equal tokens.
        divergences: where greedy tokens part: workload, prompt, position, and by how much the
            reference preferred its own.
        tokens: compared until they part.
    """

    differences: list[float] = field(default_factory=list)
    divergences: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0

    @property
    def largest(self) -> float:
        """Largest difference."""
        return max(self.differences, default=0.0)

    @property
    def mean(self) -> float:
        """Mean difference."""
        return sum(self.differences) / len(self.differences) if self.differences else 0.0


def compare(ours: Mapping[str, Any], reference: Mapping[str, Any]) -> Agreement:
    """Return how the answers of two runs differ, over the workloads that both were asked."""
    found = Agreement()
    for name, answers in ours["answers"].items():
        if name not in reference["answers"]:
            continue
        pairs = zip(answers, reference["answers"][name], strict=True)
        for i, (mine, theirs) in enumerate(pairs):
            position = _compare_one(found, mine, theirs)
            if position is not None:
                gap = theirs["gaps"][position] if "gaps" in theirs else float("inf")
                where = {"workload": name, "prompt": i, "position": position, "gap": gap}
                found.divergences.append(where)
    if ours["scored"] and reference["scored"]:
        scored = zip(ours["scored"], reference["scored"], strict=True)
        found.differences += [abs(a - b) for a, b in scored]
    return found


def _compare_one(
    found: Agreement, mine: Mapping[str, Sequence[Any]], theirs: Mapping[str, Sequence[Any]]
) -> int | None:
    """Add one continuation; return the position where tokens part, None where they do not."""
    pairs = list(zip(mine["tokens"], theirs["tokens"], strict=True))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    found.tokens += equal
    if "logprobs" in mine and "logprobs" in theirs:
        for a, b in zip(mine["logprobs"][:equal], theirs["logprobs"][:equal], strict=True):
            found.differences.append(abs(a - b))
    return None if equal == len(pairs) else equal


def judge(found: Agreement, noise: Agreement) -> list[str]:
    """Return why two runs do not agree; empty when they do.

    Args:
        found: how they differ.
        noise: how two other backends differ on the same model.
    """
    largest, mean = max(noise.largest, LEAST_NOISE), max(noise.mean, LEAST_NOISE / 4)
    reasons = []
    for where in found.divergences:
        if not where["gap"] <= GAP_FACTOR * largest:
            reasons.append(f"tokens part where they should not: {where}")
    if not found.largest <= MAX_FACTOR * largest:
        reasons.append(f"log-probabilities differ by {found.largest:.4f}, noise is {largest:.4f}")
    if not found.mean <= MEAN_FACTOR * mean:
        reasons.append(
            f"log-probabilities differ by {found.mean:.5f} on average, noise is {mean:.5f}"
        )
    if found.tokens == 0:
        reasons.append("nothing was compared")
    return reasons
