"""`fused_dropout_ar_tar` and its module, against a mask multiplied in and the formula, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastreg import FusedRNNDropout, fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import skip_on_formula
from tests.exact import check_dropout
from tests.samples import BF16, DOUBLE, FLOAT, HALF, SAMPLES, Sample

pytestmark = pytest.mark.numbers

# Dropout computes the second tensor, so the second tensor of a sample is not used.
ONE_TENSOR = [s for s in SAMPLES if s.dtypes[0] == s.dtypes[1] and not s.same and s.layouts[0] == s.layouts[1]]


def mask_for(sample: Sample, raw: Tensor, full: bool, p: float = 0.4) -> Tensor:
    shape = list(raw.shape)
    if not full:
        shape[sample.time_dim] = 1
    return raw.detach().new_empty(shape).bernoulli_(1 - p).div_(1 - p)


@pytest.mark.parametrize("sample", ONE_TENSOR, ids=str)
@pytest.mark.parametrize("kind", ["locked", "full", "AR of raw"])
def test_values_and_gradients(sample: Sample, kind: str, device: str, poison: None) -> None:
    if sample.dtypes[0] in (HALF, BF16):
        skip_on_formula(device)
    raw, _ = sample.leaves(device)
    options = sample.options
    if kind == "AR of raw":
        del options["reduction"]
        options["module"] = FusedRNNDropout(0.4, sample.alpha, sample.beta, ar_of="raw", **options)
    torch.manual_seed(5)
    mask = mask_for(sample, raw, kind == "full")
    torch.manual_seed(5)
    check_dropout(raw, mask, sample.alpha, sample.beta, **options)


@pytest.mark.parametrize("used", ["dropped", "penalty"])
def test_an_output_that_goes_unused_costs_no_zeros(used: str, device: str) -> None:
    skip_on_formula(device)
    raw = torch.randn(3, 7, 12, device=device, requires_grad=True)
    dropped, got = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0)
    output = dropped if used == "dropped" else got
    grad = torch.ones_like(output)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:  # torch 2.11 warns without
        torch.autograd.grad(output, raw, grad)
    assert not any("zeros" in event.name for event in record.events())


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


def test_a_mask_is_used_with_any_p(device: str) -> None:
    raw = torch.randn(3, 7, 12, device=device)
    mask = mask_for(Sample(), raw, True)
    assert torch.equal(fused_dropout_ar_tar(raw, 0, 2.0, 1.0, mask=mask)[0], raw * mask)


@pytest.mark.parametrize(
    ("options", "one_row"),
    [
        ({}, (3, 1, 12)),
        ({"batch_first": False}, (1, 7, 12)),
        ({"time_dim": 0}, (1, 12)),
        ({"time_dim": 2}, (4, 3, 1, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
def test_the_mask_is_drawn_as_fastai_draws_it(
    options: dict[str, Any], one_row: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    raw = torch.ones([n if n > 1 else 9 for n in one_row], dtype=dtype, device=device)
    torch.manual_seed(3)
    dropped, _ = fused_dropout_ar_tar(raw, 0.3, 2.0, 1.0, **options)
    torch.manual_seed(3)
    mask = raw.new_empty(one_row).bernoulli_(1 - 0.3).div_(1 - 0.3)
    assert torch.equal(dropped, raw * mask)
    assert len(dropped.unique()) == 2


@pytest.mark.parametrize("options", [{"training": False, "p": 0.5}, {"p": 0}])
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (2.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_nothing_dropped_is_raw_itself(alpha: float, beta: float, options: dict[str, Any], device: str) -> None:
    """A term whose coefficient is 0 is measured, but not read otherwise."""
    raw = torch.tensor([[[1.0], [torch.inf], [2.0]]], device=device, requires_grad=True)
    dropped, got = fused_dropout_ar_tar(raw, alpha=alpha, beta=beta, **options)
    want = fused_ar_tar(raw, raw, alpha, beta)
    assert dropped is raw
    assert torch.equal(got, want) or (got.isnan() and want.isnan())
    assert (got == 0) == (alpha == 0 == beta)
    measured = fused_dropout_ar_tar(raw, alpha=alpha, beta=beta, return_terms=True, **options)[1]
    assert torch.equal(measured.penalty, got)
    assert measured.ar.isinf()
    assert measured.tar.isinf()


def test_both_terms_off(device: str) -> None:
    skip_on_formula(device)
    raw = torch.randn(2, 5, 8, device=device, requires_grad=True)
    _, got = fused_dropout_ar_tar(raw, 0.5, 0, 0)
    for graph in (False, True):
        (gradient,) = torch.autograd.grad(got, raw, create_graph=graph, retain_graph=True)
        assert (gradient == 0).all()
