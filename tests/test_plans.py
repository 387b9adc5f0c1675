"""Plans: calls that differ in one fact have keys and results of their own, in whichever order they come."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence

from fastreg import ARTAR, FusedRNNDropout, RNNRegularizer, fused_ar_tar, fused_dropout_ar_tar, plans
from fastreg.dropout import DropoutPlan
from fastreg.plans import forget
from fastreg.prepare import Plan
from tests.calls import flat
from tests.conftest import memory_of, skip_on_formula
from tests.samples import Decorated, every_other, transposed

BATCH, TIME, HIDDEN = 3, 5, 8


class Scalar(float):
    """Be a float with a type of its own, as `np.float64` is."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def packed(x: Tensor, sizes: list[int]) -> PackedSequence:
    return PackedSequence(x.reshape(-1, HIDDEN)[: sum(sizes)], torch.tensor(sizes))


RAW, DROPPED = (numbers(BATCH, TIME, HIDDEN, seed=seed) for seed in (0, 1))
MASK = numbers(BATCH, 1, HIDDEN, seed=2)
LENGTHS, VALID, STARTS = torch.tensor([5, 0, 3]), *(numbers(BATCH, TIME, seed=seed) > 0 for seed in (3, 4))
PACKED, MORE_SEQUENCES, MORE_STEPS = (
    {"raw": packed(RAW, sizes), "dropped": packed(DROPPED, sizes)} for sizes in ([3, 2, 2], [4, 2, 1], [3, 2, 1, 1])
)
TWICE = {name: PackedSequence(PACKED["raw"].data, PACKED["raw"].batch_sizes) for name in PACKED}
MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "hooks": lambda: saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
    "plain": nullcontext,
}
# Each changes one fact of the calls below. A `mode` is no argument, but the context of the call.
EITHER: dict[str, dict[str, Any]] = {
    "raw without a gradient": {"frozen": ("raw",)},
    "alpha": {"alpha": 3.0},
    "alpha of 0": {"alpha": 0.0},
    "alpha as an integer": {"alpha": 2},
    "alpha of a subclass of float": {"alpha": Scalar(2.0)},
    "alpha as a flag": {"alpha": True},
    "alpha as a tensor": {"alpha": torch.tensor(2.0)},
    "beta": {"beta": 3.0},
    "beta as a tensor": {"beta": torch.tensor(1.0)},
    "lengths": {"lengths": LENGTHS},
    "valid": {"valid": VALID},
    "valid of a subclass": {"valid": VALID.as_subclass(Decorated)},
    "valid transposed in memory": {"valid": VALID.t().contiguous().t()},
    "starts": {"starts": STARTS},
    "starts and lengths": {"starts": STARTS, "lengths": LENGTHS},
    "time first": {"batch_first": False},
    "batch_first as a number": {"batch_first": 1},
    "time last": {"time_dim": -1},
    "time in front": {"time_dim": 0},
    "a sum": {"reduction": "sum"},
    "terms": {"return_terms": True},
    "terms as a number": {"return_terms": 1},
    "without gradients": {"mode": "no_grad"},
    "inference mode": {"mode": "inference"},
    "hooks on saved tensors": {"mode": "hooks"},
}
PENALTY: dict[str, dict[str, Any]] = EITHER | {
    "another shape of as many elements": {"raw": RAW.reshape(5, 3, 8), "dropped": DROPPED.reshape(5, 3, 8)},
    "strides of raw": {"raw": transposed(RAW)},
    "hidden axis of raw": {"raw": every_other(RAW)},
    "dtype of raw": {"raw": RAW.bfloat16()},
    "dtype of dropped": {"dropped": DROPPED.double()},
    "alignment of raw": {"raw": unaligned(RAW)},
    "device": {"raw": RAW.to("meta"), "dropped": DROPPED.to("meta")},
    "neither with a gradient": {"frozen": ("raw", "dropped")},
    "one tensor": {"dropped": RAW},
    "no raw": {"raw": None, "beta": 0.0},
    "a subclass": {"raw": RAW.as_subclass(Decorated)},
    "a negated view": {"raw": torch._neg_view(-RAW)},
    "a list": {"raw": [RAW], "dropped": [DROPPED]},
    "a tuple": {"raw": (RAW,), "dropped": (DROPPED,)},
    "two layers": {"raw": [RAW, DROPPED], "dropped": [DROPPED, RAW]},
    "packed": PACKED,
}
DROPOUT: dict[str, dict[str, Any]] = EITHER | {
    "shape": {"raw": RAW[:, :4]},
    "strides": {"raw": transposed(RAW)},
    "dtype": {"raw": RAW.half()},
    "alignment": {"raw": unaligned(RAW)},
    "p": {"p": 0.25},
    "p of 0": {"p": 0.0},
    "p as a flag": {"p": False},
    "evaluation": {"training": False},
    "a mask": {"mask": MASK},
    "a mask of the shape of raw": {"mask": MASK.expand_as(RAW).contiguous()},
    "a mask of another dtype": {"mask": MASK.double()},
    "a mask with a gradient": {"mask": MASK.clone().requires_grad_()},
}


def by_module(raw: Tensor, ar_of: Any) -> tuple[Tensor, ARTAR | None]:
    """Apply the dropout module, which alone can form AR of raw."""
    module = FusedRNNDropout(0.5, 2.0, 1.0, ar_of=ar_of)
    return module(raw), module.take()


def listed(given: dict[str, Any]) -> dict[str, Any]:
    return {name: [x] for name, x in given.items()}


ONE_SEQUENCE = {"raw": RAW[0], "dropped": DROPPED[0]}
BASE = {
    by_module: {"raw": RAW, "ar_of": "dropped"},
    fused_ar_tar: {"raw": RAW, "dropped": DROPPED, "alpha": 2.0, "beta": 1.0},
    fused_dropout_ar_tar: {"raw": RAW, "p": 0.5, "alpha": 2.0, "beta": 1.0},
}
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    **{f"penalty, {name}": (fused_ar_tar, {}, change) for name, change in PENALTY.items()},
    **{f"dropout, {name}": (fused_dropout_ar_tar, {}, change) for name, change in DROPOUT.items()},
    "valid, a subclass": (fused_ar_tar, {"valid": VALID}, {"valid": VALID.as_subclass(Decorated)}),
    "packed, one tensor in both": (fused_ar_tar, PACKED, TWICE),
    "a list of packed, one tensor in both": (fused_ar_tar, listed(PACKED), listed(TWICE)),
    "packed, sequences": (fused_ar_tar, PACKED, MORE_SEQUENCES),
    "packed, time steps": (fused_ar_tar, PACKED, MORE_STEPS),
    "terms as a number after a flag": (fused_ar_tar, {"return_terms": True}, {"return_terms": 1}),
    "time_dim as a flag after a number": (fused_ar_tar, {"time_dim": 1}, {"time_dim": True}),
    "one sequence, time last": (fused_ar_tar, ONE_SEQUENCE, ONE_SEQUENCE | {"time_dim": 1}),
    "module, AR of raw": (by_module, {}, {"ar_of": "raw"}),
}


def fresh(x: Any, frozen: bool, leaves: dict[int, Tensor]) -> Any:
    """Return detached copies with the same layout, one of each tensor, that require a gradient unless frozen."""
    if isinstance(x, PackedSequence):
        return x._replace(data=fresh(x.data, frozen, leaves))
    if isinstance(x, (list, tuple)):
        return type(x)(fresh(y, frozen, leaves) for y in x)
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
    results = [results] if isinstance(results, Tensor) else list(results)
    described: list[Any] = [type(x) for x in results]
    xs: list[Any] = flat(results)
    if differentiable := [x for x in xs if x.requires_grad and not x.is_meta]:
        total = torch.stack([x.float().sum() for x in differentiable]).sum() * 3
        xs += torch.autograd.grad(total, [x for x in leaves.values() if x.requires_grad], allow_unused=True)
    for x in xs:
        described.append(x if x is None else (x.dtype, x.shape, x.stride(), x.requires_grad, str(x.device)))
        described.append(None if x is None or x.is_meta else x.detach().double().flatten().tolist())
    return described


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """List the plans that calls make."""
    plans: list[Plan] = []
    prepare = Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda plan, *given: plans.append(plan) or prepare(plan, *given))
    return plans


# Values are no part of a key.
ONE_PLAN = {"alpha", "alpha as an integer", "alpha of a subclass of float", "beta", "p", "a subclass"}


@pytest.mark.parametrize("name", CASES)
def test_two_calls_that_differ_in_one_fact(name: str, made: list[Plan]) -> None:
    function, first, change = CASES[name]
    calls = BASE[function] | first, BASE[function] | change
    alone = []
    for options in calls:
        forget()
        alone.append(outcome(function, options))
    forget()
    made.clear()
    outcome(function, calls[0])
    assert len(made) == 1
    assert outcome(function, calls[0]) == alone[0]
    assert len(made) == 1
    assert outcome(function, calls[1]) == alone[1]
    if alone[1][0] not in (TypeError, ValueError):
        assert (len(made) == 1) == (name.partition(", ")[2] in ONE_PLAN)
    for order in ((0, 1), (1, 0)):
        forget()
        for i in (*order, *order):
            assert outcome(function, calls[i]) == alone[i]


def test_values_are_looked_at_in_every_call() -> None:
    """Lengths, marks, coefficients and batch sizes on the CPU are checked and read anew, though the plan is known."""
    lengths, valid, starts, alpha = LENGTHS.clone(), VALID.long(), STARTS.long(), torch.tensor(2.0)
    calls = [{"lengths": lengths}, {"valid": valid}, {"starts": starts}, {"alpha": alpha}]
    before = [fused_ar_tar(**BASE[fused_ar_tar] | options) for options in calls]
    lengths[0], valid[0], starts[...], alpha[...] = 2, 0, 1 - starts, 5.0
    for options, old in zip(calls, before, strict=True):
        new = fused_ar_tar(**BASE[fused_ar_tar] | options)
        forget()
        assert new == fused_ar_tar(**BASE[fused_ar_tar] | options) != old
    lengths[0], valid[0, 0], starts[0, 0], alpha[...] = 9, 2, -1, -1.0
    for options, name in zip(calls, ("lengths", "valid", "starts", "alpha"), strict=True):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            fused_ar_tar(**BASE[fused_ar_tar] | options)

    for changed in ("raw", "dropped"):
        xs = {"raw": packed(RAW, [3, 2, 2]), "dropped": packed(DROPPED, [3, 2, 2])}
        fused_ar_tar(**xs, alpha=2.0, beta=1.0)
        xs[changed].batch_sizes[2] = 3
        with pytest.raises(ValueError, match="batch_sizes"):
            fused_ar_tar(**xs, alpha=2.0, beta=1.0)


def test_one_tensor_of_a_subclass_stays_one(made: list[Plan]) -> None:
    x = RAW.as_subclass(Decorated)
    for raw in (x, [x]):
        fused_ar_tar(raw, raw, 2.0, 1.0)
        assert made[-1].kinds[0].ar_of_raw


def test_activations_that_no_term_reads_make_no_plans(made: list[Plan]) -> None:
    for time in range(3, 7):
        fused_ar_tar(RAW, numbers(BATCH, time), 0.0, 1.0)
        fused_ar_tar(numbers(time), DROPPED, 2.0, 0.0)
    assert len(made) == 2


def test_coefficients_that_change_make_no_plans(device: str, made: list[Plan]) -> None:
    """Neither do their dtypes in the backward of a dropout confuse its launches, nor do they pile up there."""
    raw, module, regularizer = RAW.to(device).requires_grad_(), nn.Identity(), RNNRegularizer(2.0, 1.0)
    fused = FusedRNNDropout(0.0)
    regularizer.attach(module, fused, batch_first=True)
    for alpha in (0.1, 0.25, torch.tensor(0.5), torch.tensor(0.75, dtype=torch.float64), 1.5, 2.5):
        alpha = alpha.to(device) if isinstance(alpha, Tensor) else alpha
        regularizer.alpha, fused.alpha = alpha, alpha
        got, want = (
            torch.autograd.grad(x, raw)[0]
            for x in (
                regularizer.on_backward_begin(fused(module(raw * 1)).sum()),
                raw.sum() + float(alpha) * raw.square().mean() + raw.diff(dim=1).square().mean(),
            )
        )
        torch.testing.assert_close(got, want)
    plans_of_first = 0
    for step in range(20):
        regularizer.alpha = 2.0 + step / 7
        fused_ar_tar(raw, raw, 2.0 + step / 7, 1.0).backward()
        fused_dropout_ar_tar(raw, 0.5, 2.0 + step / 7, 1.0)[1].backward()
        regularizer.on_backward_begin(fused(module(raw * 1)).sum()).backward()
        plans_of_first = len(made) if step == 0 else plans_of_first
    assert len(made) == plans_of_first
    assert max(len(getattr(x, "backward", None) or ()) for x in made if isinstance(x, DropoutPlan)) <= 4


def test_plans_hold_no_tensors_of_the_caller() -> None:
    raw, lengths, valid = numbers(BATCH, TIME, HIDDEN).requires_grad_(), LENGTHS.clone(), VALID.clone()
    alpha, mask = torch.tensor(2.0), MASK.clone()
    fused_ar_tar(raw, raw, alpha, 1.0, lengths=lengths).backward()
    fused_ar_tar([raw, raw], [raw, raw], 2.0, 1.0, valid=valid).backward()
    sum(x.sum() for x in fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, mask=mask)).backward()
    alive = [weakref.ref(x) for x in (raw, lengths, valid, alpha, mask)]
    del raw, lengths, valid, alpha, mask
    gc.collect()
    assert [x() for x in alive] == [None] * 5


def test_the_memory_of_plans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SIZE", 4)
    forget()
    for i in range(10):
        plans.keep(i, str(i))
    assert plans.PLANS == {6: "6", 7: "7", 8: "8", 9: "9"}
    forget()


def test_gradients_are_written_ahead(device: str) -> None:
    """A backward allocates nothing, nor does a forward without gradients."""
    skip_on_formula(device)
    raw, dropped = (torch.randn(8, 7, 900, device=device, requires_grad=True) for _ in range(2))
    call = functools.partial(fused_ar_tar, raw, dropped, 2.0, 1.0)
    for value in (1.0, 3.0):
        allocated, got = memory_of(call, device)
        assert 2 * raw.nbytes <= allocated < 2.5 * raw.nbytes
        grad = torch.tensor(value, device=device)
        allocated, _ = memory_of(lambda got=got, grad=grad: torch.autograd.grad(got, (raw, dropped), grad), device)
        assert allocated < 0.5 * raw.nbytes
    with torch.no_grad():
        assert memory_of(call, device)[0] < 0.5 * raw.nbytes
