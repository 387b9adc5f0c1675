"""Both functions: terms that are off, infinity and NaN, memory, coefficients that are tensors, and dropout."""

from __future__ import annotations

import functools
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.backends import backend_for
from fastreg.call.dropout import BACKWARDS
from tests.calls import Call, calls, cpu_tensors_by, deterministic, everything, flat, leaves, total
from tests.conftest import BF16, DOUBLE, FLOAT, HALF, PLANS, memory_of, skip_on_formula
from tests.exact import truth

pytestmark = pytest.mark.numbers


@calls()
def test_repeats_bitwise(call: Call, device: str) -> None:
    first, *more = (everything(call, leaves(300, device=device)) for _ in range(3))
    with deterministic():
        more.append(everything(call, leaves(300, device=device)))
    assert all(torch.equal(x, y) for results in more for x, y in zip(first, results, strict=True))


def test_a_term_that_is_off_is_not_read(device: str) -> None:
    x = torch.randn(2, 5, 8, device=device)
    bad = torch.full_like(x, torch.nan)
    for unread in (None, bad, "not a tensor", torch.zeros(1, dtype=torch.int64)):
        assert fused_ar_tar(x, unread, 0.0, 1.0).isfinite()  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert fused_ar_tar(unread, x, 1.0, 0.0).isfinite()  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert fused_ar_tar(x.to("meta"), x, 0, 0).is_meta
    for unread in (bad.double(), [bad.double()]):
        assert fused_ar_tar(unread, unread, 0, 0).dtype == FLOAT
    both_off = fused_ar_tar(None, None, 0, 0, return_terms=True)
    both_off.penalty.add_(1)
    assert both_off.ar == both_off.tar == 0
    assert fused_ar_tar(None, None, 0, 0) == 0


@pytest.mark.parametrize("by_formula", [True, False])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (2.0, 0.0), (0.0, 0.0)])
def test_a_term_whose_coefficient_is_0_is_only_measured(
    alpha: float, beta: float, same: bool, by_formula: bool, device: str
) -> None:
    raw, dropped = torch.randn(2, 2, 5, 8, device=device).unbind()
    raw[0, 1, 2] = dropped[0, 1, 2] = torch.inf
    raw.requires_grad_()
    dropped = raw if same else dropped.requires_grad_()
    with cpu_tensors_by(None) if by_formula else nullcontext():
        want = fused_ar_tar(raw, dropped, alpha, beta)
        got = fused_ar_tar(raw, dropped, alpha, beta, return_terms=True)
        of_tensors = fused_ar_tar(raw, dropped, *torch.tensor([alpha, beta], device=device).unbind())
    assert_close(got.ar, dropped.detach().square().mean())
    assert_close(got.tar, raw.detach().diff(dim=1).square().mean())
    assert torch.equal(got.penalty, want)
    assert torch.equal(of_tensors, want)
    assert got.penalty.requires_grad == want.requires_grad == bool(alpha or beta)
    for scale in (1, 3) if alpha or beta else ():  # the forward expects the first
        options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        gradients = [torch.autograd.grad(scale * x, (raw, dropped), **options) for x in (got.penalty, want)]
        assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, BF16, HALF], ids=str)
@pytest.mark.parametrize("where", ["raw", "dropped"])
def test_infinity_and_nan_spread_as_in_the_formula(where: str, dtype: torch.dtype, value: float, device: str) -> None:
    raw, dropped = torch.randn(2, 2, 5, 40, device=device).to(dtype).unbind()
    for at in ((0, 0, 3), (1, 2, 5), (1, 4, 39)):
        (raw if where == "raw" else dropped)[at] = value
    xs = [x.detach().requires_grad_() for x in (raw, dropped)]
    doubles = [x.detach().double().requires_grad_() for x in xs]
    got, want = fused_ar_tar(*xs, 2.0, 1.0, return_terms=True), truth(*doubles, 2.0, 1.0)
    assert_close([x.double() for x in got], [*want], rtol=1e-6, atol=0, equal_nan=True)
    for x, y in zip(torch.autograd.grad(got.penalty, xs), torch.autograd.grad(want.penalty, doubles), strict=True):
        assert x.isfinite().equal(y.isfinite())
        assert x.isnan().equal(y.isnan())


def test_an_input_that_needs_no_gradient_is_not_kept(device: str) -> None:
    raw, dropped = torch.randn(2, 3, 7, 12, device=device).unbind()
    got = fused_ar_tar(raw, dropped.requires_grad_(), 2.0, 1.0)
    gone = weakref.ref(raw)
    del raw
    assert gone() is None
    got.backward()


@pytest.mark.parametrize("needed", ["raw dropped", "raw", "dropped", ""])
@pytest.mark.parametrize("mode", [nullcontext, deterministic])
def test_only_the_backward_allocates_gradients_and_only_those_that_are_needed(
    mode: Any, needed: str, device: str
) -> None:
    """Neither forward nor backward fills memory before the kernels write it."""
    skip_on_formula(device)
    raw, dropped = (torch.randn(8, 7, 900, device=device).requires_grad_(name in needed) for name in ("raw", "dropped"))
    xs = [x for x in (raw, dropped) if x.requires_grad]
    forward = functools.partial(fused_ar_tar, raw, dropped, 2.0, 1.0)

    def backward(penalty: Tensor) -> Any:
        return torch.autograd.grad(penalty, xs) if xs else ()

    forward()  # a plan of the usual mode is no plan of the deterministic one
    with mode():
        allocated, penalty = memory_of(forward, device)
        assert allocated < 0.5 * raw.nbytes
        allocated, _ = memory_of(functools.partial(backward, penalty), device)
        assert len(xs) * raw.nbytes <= allocated < (len(xs) + 0.5) * raw.nbytes
        with profile(activities=[ProfilerActivity.CPU], acc_events=True, record_shapes=True) as record:
            backward(forward())
    fills = [event.input_shapes[0] for event in record.events() if event.name in ("aten::fill_", "aten::zero_")]
    assert [*raw.shape] not in fills


def test_an_input_or_a_mask_changed_in_place_is_an_error(device: str) -> None:
    raw, mask = leaves(7, device=device)[0] * 1, torch.ones(3, 1, 8, device=device)
    _, of_dropout = fused_dropout_ar_tar(raw, 0.4, 2.0, 1.0, mask=mask)
    for changed, penalty in ((mask, of_dropout), (raw, fused_ar_tar(raw, raw, 2.0, 1.0))):
        changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()


@pytest.mark.parametrize("dtype", [DOUBLE, HALF, BF16, FLOAT], ids=str)
@pytest.mark.parametrize("upstream", [65536.0, -2.0, 0.0, -0.0, torch.nan, torch.inf, 1e-30])
def test_any_upstream_gradient_gives_exact_gradients(upstream: float, dtype: torch.dtype, device: str) -> None:
    """Gradients are those of the formula in float64, also in the second backward of a graph that is kept."""
    xs = leaves(7, dtype, device)
    penalty = fused_ar_tar(*xs, 2.0, 1.0)
    grad = torch.tensor(upstream, dtype=penalty.dtype, device=device)
    doubles = [x.detach().double().requires_grad_() for x in xs]
    wanted = torch.autograd.grad(fused_ar_tar(*doubles, 2.0, 1.0), doubles, grad.double())
    for _ in range(2):
        found = torch.autograd.grad(penalty, xs, grad, retain_graph=True)
        for x, want in zip(found, wanted, strict=True):
            assert_close(
                x,
                want.to(dtype),
                rtol=2**-6 if dtype == BF16 else 2**-9 if dtype == HALF else 1e-5,
                atol=0,
                equal_nan=True,
            )


# Coefficients that are tensors, read where the activations are


def step(call: Any, xs: list[Tensor], *coefficients: Any) -> list[Tensor]:
    return everything(lambda *xs: call(*xs, *coefficients), xs)


@calls("pair", "same", "layers", "lengths", "packed", "mask", "mask_lengths", "evaluation")
def test_a_change_in_place_counts_in_the_next_call_and_is_an_error_before_the_backward(call: Any, device: str) -> None:
    xs = leaves(device=device)
    alpha, beta = (torch.tensor(0.0, device=device) for _ in range(2))
    assert RNNRegularizer(alpha, beta).alpha is FusedRNNDropout(0.5, alpha, beta).alpha is alpha
    for a, b in ((2.0, 1.0), (0.0, 3.0), (1.5, 0.0)):
        alpha.fill_(a)
        beta.fill_(b)
        assert_close(step(call, xs, alpha, beta), step(call, xs, a, b), rtol=0, atol=0)
    results = flat(call(*xs, alpha, beta))
    beta.fill_(1.0)
    if len(results) == 2:  # dropped depends on no coefficient
        results[0].sum().backward(retain_graph=True)
    error = pytest.raises(RuntimeError, match=r"beta: .*modified by an inplace operation")
    with nullcontext() if backend_for(torch.device(device)) is None else error:  # the formula keeps a value
        total(results).backward()


def test_a_large_upstream_gradient_overflows_in_no_product_with_a_coefficient(device: str) -> None:
    raw, dropped = (x.detach().requires_grad_() for x in torch.randn(2, 3, 50, 40, device=device))
    upstream, coefficients = torch.tensor(1e38, device=device), torch.tensor([20.0, 30.0], device=device)
    exactly = [x.detach().double().requires_grad_() for x in (raw, dropped)]
    want = torch.autograd.grad(truth(*exactly, *coefficients.tolist()).penalty, exactly, upstream.double())
    for given in (coefficients.tolist(), coefficients.unbind()):
        gradients = torch.autograd.grad(fused_ar_tar(raw, dropped, *given), (raw, dropped), upstream)
        assert_close([x.double() for x in gradients], [*want], rtol=1e-5, atol=1e30)


# Dropout: calls that drop nothing, and the backwards of a plan


@pytest.mark.parametrize("options", [{"training": False, "p": 0.5}, {"p": 0}])
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (2.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_nothing_dropped_is_raw_itself(alpha: float, beta: float, options: dict[str, Any], device: str) -> None:
    """A term whose coefficient is 0 is measured, but not read otherwise."""
    raw = torch.tensor([[[1.0], [torch.inf], [2.0]]], device=device, requires_grad=True)
    for measured in (False, True):
        dropped, got = fused_dropout_ar_tar(raw, alpha=alpha, beta=beta, return_terms=measured, **options)
        assert dropped is raw
        want = fused_ar_tar(raw, raw, alpha, beta, return_terms=measured)
        assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_a_plan_keeps_few_backwards_one_for_each_layout_and_alignment() -> None:
    """If only dropped has a gradient, the penalty has no part in it: infinity would spoil it."""
    skip_on_formula("cpu")
    raw, mask, kept = torch.full((2, 5, 8), torch.inf, requires_grad=True), torch.ones(2, 1, 8), []
    PLANS.clear()
    for gap in (0, 0, *range(BACKWARDS)):
        memory = torch.ones(2 * 5 * (8 + gap) + 1)[len(kept) == 1 :]  # the second one is not aligned
        arriving = memory[: 2 * 5 * (8 + gap)].view(2, 5, -1)[..., :8]
        dropped, _ = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, mask=mask)
        assert torch.equal(torch.autograd.grad(dropped, raw, arriving)[0], torch.ones_like(raw))
        (plan,) = PLANS.values()
        kept.append(len(plan.backwards))
    assert kept == [1, 2, *(min(2 + i, BACKWARDS) for i in range(BACKWARDS))]
