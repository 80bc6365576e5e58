"""Typed exceptions and the one sentence that all of them speak.

Every message reads ``<argument>: expected <rule>, got <value>; <what to do>``.
"""

from __future__ import annotations


class FiError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidInput(FiError, ValueError):
    """An argument breaks the contract of the function it was given to."""


class CapacityExceeded(FiError, ValueError):
    """A batch is legal but larger than the capacity its planner was built with."""


class Unsupported(FiError, RuntimeError):
    """A legal configuration that this package does not serve; ``why_not`` lists the reasons."""


class UnsupportedVariant(FiError, TypeError):
    """A variant function uses a construct outside the accepted subset of Python."""


class CompileFailed(FiError, RuntimeError):
    """Generated code did not compile; the message carries the compiler's output."""


class DeviceError(FiError, RuntimeError):
    """The CUDA driver is missing or reports an error; the message carries the driver's words."""


def contract_message(argument: str, rule: str, got: object, hint: str) -> str:
    """Return the error contract's sentence."""
    return f"{argument}: expected {rule}, got {got}; {hint}"


def require(
    condition: bool,
    argument: str,
    rule: str,
    got: object,
    hint: str,
    *,
    kind: type[FiError] = InvalidInput,
) -> None:
    """Raise ``kind`` with the error contract's sentence unless ``condition`` holds.

    Args:
        condition: what must be true.
        argument: name of the argument, as the caller spells it.
        rule: what is accepted; reads after "expected".
        got: the offending value, taken from the check itself.
        hint: what the caller can do about it.
        kind: exception type.

    Raises:
        FiError: the given ``kind``, when the condition is false.
    """
    if not condition:
        raise kind(contract_message(argument, rule, got, hint))
