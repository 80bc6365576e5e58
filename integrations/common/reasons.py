"""Reasons against what an engine asks for, one sentence each, in the form of all our errors."""

from __future__ import annotations

from collections.abc import Sequence

from fi_backend import Unsupported


def sentence(argument: str, rule: str, got: object, hint: str) -> str:
    """Return a reason: ``<argument>: expected <rule>, got <value>; <what to do>``."""
    return f"{argument}: expected {rule}, got {got}; {hint}"


def refuse(reasons: Sequence[str], what: str, hint: str) -> None:
    """Raise if there is a reason not to serve.

    Args:
        reasons: sentences.
        what: a thing that fi_backend serves, as "a layer that fi_backend serves".
        hint: what to do instead.

    Raises:
        Unsupported: the message lists all reasons.
    """
    if reasons:
        raise Unsupported(sentence("attention_backend", what, " | ".join(reasons), hint))
