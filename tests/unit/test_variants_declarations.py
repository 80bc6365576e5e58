"""Declarations, chains and parameter values: what holds, and every message when it does not."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fi_backend.errors import InvalidInput
from fi_backend.variants import Param, Scalar, Tensor, Variant, shipped
from fi_backend.variants.stages import bind_stages


def cap(logit: Any, cap: Any) -> Any:
    return logit * cap


def declared(*params: Param, **more: Any) -> Callable[[], object]:
    return lambda: Variant("mine", params=params, **more)


CAP = Variant("cap", logits=cap, params=(Scalar("cap"),))
BOUND = Variant("bound", logits=cap, params=(Scalar("cap", float, 2.0),))
SLOPES = shipped.alibi()
SINKS = shipped.sinks()
SIGMOID = shipped.sigmoid_attention()
WIDE = {"q_head": 4}
INVALID: list[tuple[str, Callable[[], object], str]] = [
    ("reserved name", lambda: Scalar("q_pos"), "param.name: expected an identifier outside"),
    ("no identifier", lambda: Tensor("a-b"), "param.name: expected an identifier outside"),
    (
        "scalar kind",
        lambda: Scalar("x", str),
        "scalar.kind: expected float or int, got <class 'str'>",
    ),
    (
        "scalar value",
        lambda: Scalar("x", int, 1.5),
        r"params\['x'\]: expected a 32-bit int, got 1.5",
    ),
    ("scalar range", lambda: Scalar("x", int, 2**31), "expected a 32-bit int, got 2147483648"),
    ("tensor dtype", lambda: Tensor("x", torch.float16), "tensor.dtype: expected one of float32"),
    ("tensor ndim", lambda: Tensor("x", torch.int32, 4), "tensor.ndim: expected 1 to 3, got 4"),
    ("twice", declared(Scalar("x"), Tensor("x")), "mine.params: expected distinct names, got 'x'"),
    ("sinks undeclared", declared(sinks="s"), "mine.sinks: expected the name of a declared Tensor"),
    ("sinks dtype", declared(Tensor("s", torch.int32), sinks="s"), "mine.sinks: .*float32"),
    (
        "sinks alone",
        declared(Tensor("s"), sinks="s", softmax=False),
        "expected None without softmax",
    ),
    (
        "clash",
        lambda: CAP.then(BOUND),
        r"params of 'cap' and 'bound': .*renamed\(cap='other_cap'\)",
    ),
    ("two without softmax", lambda: SIGMOID.then(SIGMOID), "one softmax=False at most"),
    ("two sinks", lambda: SINKS.then(SINKS), "sinks in one variant at most"),
    ("sinks, no softmax", lambda: SINKS.then(SIGMOID), "None without"),
    ("rename", lambda: CAP.renamed(other="x"), "names: expected names of parameters, got 'other'"),
    ("soft cap", lambda: shipped.soft_cap(0), "cap: expected a positive number, got 0"),
    ("window", lambda: shipped.sliding_window(0), "num_tokens: expected a positive count, got 0"),
    ("prefix", lambda: shipped.sliding_window(1, -1), "sink_prefix: expected at least 0, got -1"),
    ("missing value", CAP.values, "params: expected a value for 'cap', got nothing"),
    ("unknown value", lambda: CAP.values({"x": 1}), "params: .* got 'x'; pass cap"),
    (
        "bound value",
        lambda: BOUND.values({"cap": 1}),
        "without a bound value, got 'cap'; pass none",
    ),
    ("value kind", lambda: CAP.values({"cap": "1"}), r"params\['cap'\]: expected a float, got '1'"),
    ("no tensor", lambda: SLOPES.values({"slopes": 1}), "expected a tensor, got int"),
    (
        "dtype",
        lambda: SLOPES.values({"slopes": torch.ones(1).int()}),
        "dtype torch.float32, got torch.int32",
    ),
    ("rank", lambda: SLOPES.values({"slopes": torch.ones(1, 1)}), "expected 1 dimensions, got 2"),
    (
        "device",
        lambda: bind_stages(SLOPES, {"slopes": torch.ones(1, device="meta")}),
        "expected a CPU tensor, got meta",
    ),
    (
        "extent",
        lambda: bind_stages(SLOPES, {"slopes": torch.ones(3)}, WIDE),
        "at least 4 elements along axis 0, one per q_head, got 3",
    ),
    (
        "sinks extent",
        lambda: bind_stages(SINKS, {"sinks": torch.ones(3)}, WIDE),
        "at least 4 elements along axis 0",
    ),
    (
        "sinks strides",
        lambda: bind_stages(SINKS, {"sinks": torch.ones(8)[::2]}),
        "expected a contiguous tensor",
    ),
]


@pytest.mark.parametrize(("make", "message"), [c[1:] for c in INVALID], ids=[c[0] for c in INVALID])
def test_invalid_declarations_and_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_a_chain_applies_logits_in_order_and_both_masks() -> None:
    double = Variant("double", logits=lambda logit: logit * 2, mask=lambda kv_pos: kv_pos > 0)
    add = Variant("add", logits=lambda logit: logit + 1, mask=lambda kv_pos: kv_pos < 3)
    chain = double.then(add)
    assert chain.name == "double+add"
    assert chain.evaluate_logits(torch.tensor(3.0), {}).item() == 7
    assert add.then(double).evaluate_logits(torch.tensor(3.0), {}).item() == 8
    assert chain.evaluate_mask({"kv_pos": torch.arange(4)}).tolist() == [False, True, True, False]
    assert [f.kind for f in chain.all_functions()] == ["logits", "logits", "mask", "mask"]


def test_a_chain_of_chains_is_flat_and_keeps_softmax_and_sinks() -> None:
    sinks = shipped.causal().then(SINKS).then(CAP)
    assert [part.name for part in sinks.parts] == ["causal", "sinks", "cap"]
    assert (sinks.sinks, sinks.softmax, [p.name for p in sinks.params]) == (
        "sinks",
        True,
        ["sinks", "cap"],
    )
    assert not shipped.causal().then(SIGMOID).softmax


def test_outputs_run_in_order() -> None:
    halve = Variant("halve", output=lambda out, dim: out / (dim + 1))
    chain = halve.then(Variant("negate", output=lambda out: -out))
    out = chain.evaluate_output(torch.ones(2), {"dim": torch.arange(2)})
    assert out.tolist() == [-1.0, -0.5]


def test_equal_declarations_become_one_parameter() -> None:
    chain = CAP.then(CAP)
    assert [p.name for p in chain.params] == ["cap"]
    assert chain.evaluate_logits(torch.tensor(1.0), {}, {"cap": 3.0}).item() == 9


def test_renamed_parameters_keep_functions_and_their_code() -> None:
    chain = BOUND.then(CAP.renamed(cap="second"))
    assert [p.name for p in chain.params] == ["cap", "second"]
    assert chain.evaluate_logits(torch.tensor(1.0), {}, {"second": 3.0}).item() == 6
    assert chain.values({"second": 3.0}) == {"cap": 2.0, "second": 3.0}
    renamed = shipped.causal().then(SINKS).renamed(sinks="s")
    assert (renamed.sinks, renamed.parts[1].sinks) == ("s", "s")
    bound = bind_stages(shipped.soft_cap(5).renamed(cap="c"))
    assert bound.stages[0][0] == bind_stages(shipped.soft_cap(7)).stages[0][0]


def test_bound_stages_hold_addresses_strides_and_scalars() -> None:
    table = torch.zeros(6, 8, dtype=torch.int32)[:, ::2]
    sinks = torch.zeros(4)
    chain = shipped.tree_mask().then(shipped.soft_cap(30)).then(SINKS)
    bound = bind_stages(chain, {"tree_bits": table, "sinks": sinks}, {"token": 6, "q_head": 4})
    (logits, *_, cap_params), (_, mask, kind, _, tree_params) = bound.stages
    assert logits and mask and kind
    assert cap_params == [(0, (0, 0, 0), 30.0)]
    assert tree_params == [(table.data_ptr(), (8, 2, 0), 0.0)]
    assert (bound.sinks_addr, bound.softmax) == (sinks.data_ptr(), True)
    assert {t.data_ptr() for t in bound.tensors} == {table.data_ptr(), sinks.data_ptr()}


def test_variants_of_module_functions_are_values() -> None:
    variant = shipped.causal().then(shipped.soft_cap(2))
    copy = pickle.loads(pickle.dumps(variant))
    assert (copy, hash(copy)) == (variant, hash(variant))
    assert copy.evaluate_mask({"q_pos": 1, "kv_pos": torch.arange(3)}).tolist() == [
        True,
        True,
        False,
    ]
    assert variant != shipped.causal().then(shipped.soft_cap(3))
