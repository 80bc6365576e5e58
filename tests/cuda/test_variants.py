"""Variants that a user writes: their Python, evaluated by the oracle, against their device code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Case, make_problem
from named_cases import BF16, DRAFTS, FP8, MIXED, capacity_of, heads
from running import Place, check_problem
from specialisations import kernel_of

from fi_backend.formats import FULL
from fi_backend.jit.kernels import DeviceKernel
from fi_backend.oracle import Problem
from fi_backend.variants import Scalar, Tensor, Variant, math
from fi_backend.variants.shipped import alibi, sinks, soft_cap

BLOCK = 32


def block_mask(q_pos: Any, kv_pos: Any, first: Any) -> Any:
    """Own block and the leading tokens."""
    return q_pos // BLOCK == kv_pos // BLOCK or kv_pos < first


def relative_bias(logit: Any, q_pos: Any, kv_pos: Any, q_head: Any, bias: Any) -> Any:
    distance = math.maximum(q_pos - kv_pos, 0)
    return logit + bias[q_head, math.minimum(distance, 63)]


def odd_tokens(logit: Any, kv_pos: Any, token: Any, gain: Any, flags: Any) -> Any:
    scaled = logit * gain
    return scaled - 1.5 if flags[token] and kv_pos % 3 == 0 else scaled


def gate(out: Any, dim: Any, token: Any, q_head: Any, gates: Any) -> Any:
    return out * math.sigmoid(gates[token, q_head]) + dim * 0.01


def squared(logit: Any) -> Any:
    return math.maximum(logit, 0.0) ** 2


def per_length(out: Any, kv_len: Any) -> Any:
    return out / kv_len if kv_len > 0 else out


def documents(q_pos: Any, kv_pos: Any, request: Any, starts: Any) -> Any:
    """A request is two documents that do not see each other."""
    start = starts[request]
    return (q_pos < start) == (kv_pos < start)


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


MIXED_CASE = Case("user", MIXED, heads(4, 128), BF16)


@dataclass(frozen=True)
class User:
    """A variant with the parameters that it takes for a problem."""

    name: str
    variant: Variant
    params: Callable[[Problem], dict[str, Any]]
    case: Case = MIXED_CASE


BIAS = Variant("bias", logits=relative_bias, params=(Tensor("bias", torch.float32, 2),))
ODD = Variant("odd", logits=odd_tokens, params=(Scalar("gain"), Tensor("flags", torch.bool)))
GATE = Variant("gate", output=gate, params=(Tensor("gates", torch.float32, 2),))
BLOCKS = Variant("blocks", mask=block_mask, params=(Scalar("first", int, 5),))
RELU = Variant("relu", logits=squared, output=per_length, softmax=False)
DOCUMENTS = Variant("documents", mask=documents, params=(Tensor("starts", torch.int64),))


def flags(problem: Problem) -> torch.Tensor:
    return seeded(problem.num_tokens) > 0


USERS = [
    User("mask", BLOCKS, lambda _: {}),
    User("mask-of-all", BLOCKS, lambda _: {}, Case("user", MIXED, heads(2), BF16, band=FULL)),
    User("tensor-of-2", BIAS, lambda _: {"bias": seeded(8, 64)}),
    # Strides of a parameter are its own: a transposed tensor, and a slice with gaps.
    User("transposed", BIAS, lambda _: {"bias": seeded(64, 8).T}),
    User("gaps", BIAS, lambda _: {"bias": seeded(8, 200)[:, 3:67]}),
    User("number-and-flags", ODD, lambda p: {"gain": 0.75, "flags": flags(p)}),
    User("output", GATE, lambda p: {"gates": seeded(p.num_tokens, 8)}),
    User("output-without-softmax", RELU, lambda _: {}),
    User(
        "int64-and-fp8",
        DOCUMENTS,
        lambda p: {"starts": p.batch.kv_len.long() // 2},
        Case("user", MIXED, heads(4, 128), BF16, FP8, scales="one"),
    ),
    User(
        "chain",
        BIAS.then(soft_cap(6.0)).then(BLOCKS).then(sinks()).then(GATE),
        lambda p: {
            "bias": seeded(8, 64),
            "sinks": seeded(8),
            "gates": seeded(p.num_tokens, 8),
        },
    ),
    User(
        "same-name-twice",
        alibi().then(alibi().renamed(slopes="more")),
        lambda _: {"slopes": seeded(8).abs(), "more": seeded(8).abs() * 0.1},
    ),
    User(
        "drafts",
        ODD.then(sinks()),
        lambda p: {"gain": -1.25, "flags": flags(p), "sinks": seeded(8)},
        Case("user", DRAFTS, heads(4, 128), BF16),
    ),
]


def kernels_of(_: str, arguments: Mapping[str, Any]) -> Iterator[DeviceKernel]:
    user = arguments["user"]
    yield kernel_of(user.case, variant=user.variant)


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.name)
@pytest.mark.parametrize("num_ctas", [None, 7])
def test_user_variants(device: str, user: User, num_ctas: int | None) -> None:
    problem = make_problem(user.case)
    problem = dataclasses.replace(problem, variant=user.variant, params=user.params(problem))
    check_problem(user.case, problem, num_ctas, Place(device, capacity_of("any")))
