"""`fused_dropout_ar_tar`: rounding, masks of inference mode, calls that drop nothing, and what a plan keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.dropout import BACKWARDS
from tests.conftest import PLANS, skip_on_formula

pytestmark = pytest.mark.numbers


def test_half_precision_is_rounded_once(device: str) -> None:
    """The two parts of the gradient cancel, and float16 has no numbers for them."""
    skip_on_formula(device)
    raw = torch.tensor([[[1.0], [1000.0]]], device=device).half().requires_grad_()
    mask = torch.ones_like(raw, requires_grad=False)
    gradients = []
    for create_graph in (False, True):
        _, of_dropout = fused_dropout_ar_tar(raw, 0.5, 99900.0, 100.0, mask=mask, reduction="sum")
        for penalty in (of_dropout, fused_ar_tar(raw, raw, 99900.0, 100.0, reduction="sum")):
            gradients += torch.autograd.grad(penalty, raw, create_graph=create_graph)
    assert gradients[0][0, 0] == 0
    assert all(torch.equal(x, gradients[0]) for x in gradients)


@pytest.mark.parametrize("time", [1, 7])
def test_a_mask_made_in_inference_mode(time: int, device: str) -> None:
    """A backward cannot keep such a mask, so it keeps a copy, which does not repeat the row of the mask."""
    raw = torch.randn(3, 7, 12, device=device, requires_grad=True)
    with torch.inference_mode():
        mask = (torch.rand(3, 1, 12, device=device) < 0.5).float().expand(3, time, 12)
    results = [fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, mask=x) for x in (mask, mask.clone())]
    assert torch.equal(*(dropped for dropped, _ in results))
    assert torch.equal(*(torch.autograd.grad(dropped.sum() + penalty, raw)[0] for dropped, penalty in results))


@pytest.mark.parametrize("options", [{"training": False, "p": 0.5}, {"p": 0}])
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (2.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_nothing_dropped_is_raw_itself(alpha: float, beta: float, options: dict[str, Any], device: str) -> None:
    """A term whose coefficient is 0 is measured, but not read otherwise."""
    raw = torch.tensor([[[1.0], [torch.inf], [2.0]]], device=device, requires_grad=True)
    for measured in (False, True):
        dropped, got = fused_dropout_ar_tar(raw, alpha=alpha, beta=beta, return_terms=measured, **options)
        assert dropped is raw
        want = fused_ar_tar(raw, raw, alpha, beta, return_terms=measured)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


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


def test_a_penalty_whose_terms_are_off_has_a_gradient_of_0(device: str) -> None:
    skip_on_formula(device)
    raw = torch.randn(2, 5, 8, device=device, requires_grad=True)
    _, got = fused_dropout_ar_tar(raw, 0.5, 0, 0)
    for graph in (False, True):
        (gradient,) = torch.autograd.grad(got, raw, create_graph=graph, retain_graph=True)
        assert (gradient == 0).all()
