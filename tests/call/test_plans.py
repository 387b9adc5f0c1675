"""The memory of plans: calls that differ in one fact keep their results in any order, and values are read each time."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.key import facts_of
from tests.calls import CALLS, Decorated, Nothing, flat, leaves, marks_for, mask_for, packed, total, transposed
from tests.conftest import PLANS, memory_of, skip_on_formula

RAW, DROPPED = (x.detach() for x in leaves())
MASK = mask_for(RAW)
LENGTHS, VALID, STARTS = torch.tensor([5, 0, 3]), marks_for(RAW), marks_for(RAW).roll(1, 1)
ONE_SEQUENCE = {"raw": RAW[0], "dropped": DROPPED[0], "time_dim": 0, "valid": VALID[0]}
FOUR_AXES = {"raw": torch.randn(3, 2, 5, 4), "dropped": torch.randn(3, 2, 5, 4), "time_dim": 2}
TWO_DEVICES = {"raw": [RAW, RAW.to("meta")], "dropped": [DROPPED, DROPPED.to("meta")]}
A_BATCH = ONE_SEQUENCE | {"raw": RAW[:1], "dropped": DROPPED[:1], "time_dim": 1}
MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "hooks": lambda: saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
    "dispatch": Nothing,
    "plain": nullcontext,
}
# Each changes one fact of the calls below. A `mode` is no argument, but the context of the call.
EITHER: dict[str, dict[str, Any]] = {
    "raw without a gradient": {"frozen": ("raw",)},
    "alpha": {"alpha": 3.0},
    "alpha of 0": {"alpha": 0.0},
    "alpha as a flag": {"alpha": True},
    "alpha as a tensor": {"alpha": torch.tensor(2.0)},
    "beta": {"beta": 3.0},
    "beta as a tensor": {"beta": torch.tensor(1.0)},
    "lengths": {"lengths": LENGTHS},
    "valid": {"valid": VALID},
    "valid transposed in memory": {"valid": VALID.t().contiguous().t()},
    "starts": {"starts": STARTS},
    "time first": {"batch_first": False},
    "time last": {"time_dim": -1},
    "a sum": {"reduction": "sum"},
    "terms": {"return_terms": True},
    "without gradients": {"mode": "no_grad"},
    "inference mode": {"mode": "inference"},
    "hooks on saved tensors": {"mode": "hooks"},
    "a dispatch mode, which sees the formula": {"mode": "dispatch"},
}
PENALTY: dict[str, dict[str, Any]] = EITHER | {
    "another shape of as many elements": {"raw": RAW.reshape(5, 3, 8), "dropped": DROPPED.reshape(5, 3, 8)},
    "strides of raw": {"raw": transposed(RAW)},
    "dtype of raw": {"raw": RAW.bfloat16()},
    "dtype of dropped": {"dropped": DROPPED.double()},
    "alignment of raw": {"raw": torch.cat([torch.zeros(1), RAW.flatten()])[1:].view_as(RAW)},
    "device": {"raw": RAW.to("meta"), "dropped": DROPPED.to("meta")},
    "neither with a gradient": {"frozen": ("raw", "dropped")},
    "one tensor": {"dropped": RAW},
    "no raw": {"raw": None, "beta": 0.0},
    "a subclass": {"raw": RAW.as_subclass(Decorated)},
    "a negated view": {"raw": torch._neg_view(-RAW)},
    "a list with a layer in float64": {"raw": [RAW, RAW.double()], "dropped": [DROPPED, DROPPED.double()]},
}
DROPOUT: dict[str, dict[str, Any]] = EITHER | {
    "shape": {"raw": RAW[:, :4]},
    "p": {"p": 0.25},
    "p of 0": {"p": 0.0},
    "evaluation": {"training": False},
    "a mask": {"mask": MASK},
    "a mask of the shape of raw": {"mask": MASK.expand_as(RAW).contiguous()},
    "a mask with a gradient": {"mask": MASK.clone().requires_grad_()},
}

BASE = {
    fused_ar_tar: {"raw": RAW, "dropped": DROPPED, "alpha": 2.0, "beta": 1.0},
    fused_dropout_ar_tar: {"raw": RAW, "p": 0.5, "alpha": 2.0, "beta": 1.0},
}
PAIRS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    **{f"penalty, {name}": (fused_ar_tar, {}, change) for name, change in PENALTY.items()},
    **{f"dropout, {name}": (fused_dropout_ar_tar, {}, change) for name, change in DROPOUT.items()},
    "dtype of alpha": (fused_ar_tar, {"alpha": torch.tensor(2.0)}, {"alpha": torch.tensor(2.0).double()}),
    "valid, a subclass": (fused_ar_tar, {"valid": VALID}, {"valid": VALID.as_subclass(Decorated)}),
    "terms as a number after a flag": (fused_ar_tar, {"return_terms": True}, {"return_terms": 1}),
    "four axes, lengths": (fused_ar_tar, FOUR_AXES, FOUR_AXES | {"lengths": LENGTHS}),
    "one sequence, a batch of one": (fused_ar_tar, ONE_SEQUENCE, A_BATCH),
    "lengths of layers on two devices": (fused_ar_tar, {"lengths": LENGTHS}, {"lengths": LENGTHS} | TWO_DEVICES),
}


def fresh(x: Any, frozen: bool, leaves: dict[int, Tensor]) -> Any:
    """Return detached copies with the same layout, one of each tensor, that require a gradient unless frozen."""
    if isinstance(x, list):
        return [fresh(y, frozen, leaves) for y in x]
    if not isinstance(x, Tensor):
        return x
    return leaves.setdefault(id(x), x.detach().requires_grad_(not frozen))


def outcome(function: Callable[..., Any], options: dict[str, Any]) -> list[Any]:
    """Call the function; return a full description of its results and gradients, or its error."""
    options, leaves = dict(options), {}
    mode, frozen = options.pop("mode", "plain"), options.pop("frozen", ())
    for name in options.keys() & {"raw", "dropped"}:
        options[name] = fresh(options[name], name in frozen, leaves)
    torch.manual_seed(0)
    try:
        with MODES[mode]():
            results = function(**options)
    except (TypeError, ValueError) as error:
        return [type(error), str(error)]
    described: list[Any] = [type(results), *map(type, results if isinstance(results, tuple) else [])]
    xs: list[Any] = flat(results)
    if differentiable := [x for x in xs if x.requires_grad and not x.is_meta]:
        total = torch.stack([x.float().sum() for x in differentiable]).sum() * 3
        xs += torch.autograd.grad(total, [x for x in leaves.values() if x.requires_grad], allow_unused=True)
    for x in [x for x in xs if x is not None]:
        described += x.dtype, x.shape, x.stride(), x.requires_grad, x.is_meta or x.tolist()
    return described


def test_each_gpu_has_its_own_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = []
    for i in range(2):
        monkeypatch.setattr(Tensor, "device", torch.device("cuda", i))
        facts.append(facts_of([RAW]))
    assert facts[0] != facts[1]


# Values are no part of a key.
ONE_PLAN = {"alpha", "beta", "p", "a subclass", "hooks on saved tensors"}


@pytest.mark.parametrize("name", PAIRS)
def test_two_calls_that_differ_in_one_fact_keep_their_results(name: str) -> None:
    function, first, change = PAIRS[name]
    calls = BASE[function] | first, BASE[function] | change
    alone, keys = [], []
    for options in calls:
        PLANS.clear()
        alone.append(outcome(function, options))
        keys.append({*PLANS})
    if alone[1][0] not in (TypeError, ValueError):
        assert (keys[0] == keys[1]) == (name.partition(", ")[2] in ONE_PLAN)
    for order in ((0, 1), (1, 0)):
        PLANS.clear()
        assert [outcome(function, calls[i]) for i in order * 2] == [alone[i] for i in order * 2]


@pytest.mark.parametrize("name", ["lengths", "valid", "starts", "alpha", "raw", "dropped"])
def test_values_are_checked_in_every_call(name: str) -> None:
    given: dict[str, Any] = {"lengths": LENGTHS.clone(), "valid": VALID.long(), "starts": STARTS.long()}
    given |= {"alpha": torch.tensor(2.0), "raw": packed(RAW, [3, 2, 2]), "dropped": packed(DROPPED, [3, 2, 2])}
    names = ("raw", "dropped") if name in ("raw", "dropped") else (name,)
    options = BASE[fused_ar_tar] | {name: given[name] for name in names}
    fused_ar_tar(**options)
    (given[name].batch_sizes if len(names) == 2 else given[name]).fill_(-1)
    with pytest.raises(ValueError, match=f"^{name}\\b"):
        fused_ar_tar(**options)


def test_one_tensor_of_a_subclass_gets_one_gradient() -> None:
    skip_on_formula("cpu")
    x = torch.randn(8, 7, 900, requires_grad=True).as_subclass(Decorated)
    for raw in (x, [x], (x,)):
        assert memory_of(lambda raw=raw: fused_ar_tar(raw, raw, 2.0, 1.0), "cpu")[0] < 1.5 * x.nbytes


def test_packed_rows_are_selected_once_and_any_number_takes_few_plans() -> None:
    skip_on_formula("cpu")
    x = packed(torch.randn(4000, 200), [50] * 80)
    assert memory_of(lambda: fused_ar_tar(x, x, 2.0, 1.0), "cpu")[0] < 1.5 * x.data.nbytes
    PLANS.clear()
    for count in range(129, 161):
        x = packed(torch.randn(count, 2), [count])
        fused_ar_tar(x, x, 2.0, 1.0)
    assert len(PLANS) == 4  # for 136, 144, 152 and 160 rows


def test_plans_hold_no_tensor_and_graphs_no_gradient_that_was_taken() -> None:
    (raw, dropped), alpha = leaves(), torch.tensor(2.0)
    lengths, valid, mask = LENGTHS.clone(), VALID.clone(), MASK.clone()
    graphs = [
        fused_ar_tar(raw, dropped, alpha, 1.0, lengths=lengths),
        fused_ar_tar([raw, dropped], [raw, raw], 2.0, 1.0, valid=valid),
        sum(x.sum() for x in fused_dropout_ar_tar(raw + dropped, 0.5, 2.0, 1.0, mask=mask)),
    ]
    gradients = [x for graph in graphs for x in torch.autograd.grad(graph, (raw, dropped), retain_graph=True)]
    taken = [weakref.ref(x) for x in gradients]
    del gradients
    gc.collect()
    assert [x() for x in taken] == [None] * 6
    alive = [weakref.ref(x) for x in (raw, dropped, lengths, valid, alpha, mask, *graphs)]
    del raw, dropped, lengths, valid, alpha, mask, graphs
    gc.collect()
    assert [x() for x in alive] == [None] * 9


def test_a_full_memory_drops_all_plans_and_nothing_else_keeps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastreg.call.key.SIZE", 64)
    total(CALLS["lengths"](*leaves(1))).backward()
    PLANS.clear()
    kept = []
    tracemalloc.start()
    for time in range(2, 67):
        total(CALLS["lengths"](*leaves(time))).backward()
        kept.append(len(PLANS))
    gc.collect()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept == [*range(1, 65), 1]
    assert held < 100_000
    assert peak < 64 * 7500  # bytes of the host
