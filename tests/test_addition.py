"""`Addition`: the gradient of a penalty added to one that arrives, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fastreg.addition import Addition
from fastreg.kernels.view import Steps
from fastreg.problem import Call, divisors, is_on
from fastreg.reference import ar_tar_gradients, counted, marked
from tests.conftest import skip_on_formula
from tests.exact import eps, rounding
from tests.samples import BF16, DOUBLE, FLOAT, HALF, SAMPLES, Sample

ONE_TENSOR = [s for s in SAMPLES if s.dtypes[0] == s.dtypes[1] and not s.same and s.layouts[0] == s.layouts[1]]


def expanded_number(x: Tensor) -> Tensor:
    """As `sum()` gives it to all elements."""
    return x.flatten()[:1].reshape([1] * x.dim()).expand_as(x)


def call_of(raw: Tensor) -> Call:
    """The call of raw alone, of both terms."""
    return Sample().call(raw)


def addition_of(call: Call) -> Addition:
    """The addition of the terms that a call of raw has."""
    return Addition(call, True, is_on(call.alpha), is_on(call.beta))


# Each sample with each of the terms, and of the layouts of the gradient that arrives; half of them masked.
CASES = [
    (sample, terms, (i + j) % 2 > 0, [torch.clone, sample.layouts[0], expanded_number][(i + j) % 3])
    for i, sample in enumerate(ONE_TENSOR)
    for j, terms in enumerate(["both", "ar", "tar"])
]


@pytest.mark.parametrize(
    ("sample", "terms", "masked", "arrange"), CASES, ids=lambda x: getattr(x, "__name__", None) or str(x)
)
def test_the_sum(sample: Sample, terms: str, masked: bool, arrange: Any, device: str, poison: None) -> None:
    dtype, steps = sample.dtypes[0], None
    if dtype in (HALF, BF16):
        skip_on_formula(device)
    raw = sample.leaves(device)[0].detach()
    if masked:
        batch, time = 1 if raw.dim() == 2 else raw.shape[1 - sample.time_dim], raw.shape[sample.time_dim]
        marks, counts = marked((batch, time), None, (torch.rand(batch, time) < 0.7).to(device), None)
        steps = Steps(marks, counts if sample.reduction == "mean" else None)
    coefficients: Any = {"alpha": 0.0 if terms == "tar" else 2.0, "beta": 0.0 if terms == "ar" else 1.5}
    call = sample.call(raw, **coefficients, steps=steps, measured=False)
    padding = counted(torch.ones_like(raw), call) == 0
    if sample.layouts[0].__name__ not in ("expanded", "overlapping"):  # whose elements share memory
        raw.masked_fill_(padding, torch.inf)
    upstream = torch.tensor(300.0, device=device, dtype=torch.promote_types(dtype, FLOAT))
    arrived = arrange(torch.randn(raw.shape, device=device).to(dtype))
    with torch.no_grad():  # as in a backward
        got = addition_of(call)(upstream, call, arrived)
    penalty, _ = ar_tar_gradients(upstream.double(), call._replace(raw=raw.double()))
    assert penalty is not None
    assert got.dtype == dtype
    assert torch.equal(got[padding], arrived[padding])
    # Four products at most are rounded before they cancel.
    factors = [300 * 2 * c / n for c, n in zip(coefficients.values(), divisors(call), strict=True)]
    largest = 4 * float(max(factors)) * torch.where(padding, 0, raw).double().abs().max().item()
    want = arrived.double() + penalty
    torch.testing.assert_close(got.double(), want, rtol=rounding(got), atol=4 * eps(dtype) * largest)


def test_it_is_differentiable_where_pytorch_sees_it(device: str) -> None:
    raw, arrived = (torch.randn(2, 3, 4, device=device, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    upstream = torch.tensor(2.0, device=device, dtype=DOUBLE, requires_grad=True)
    addition = addition_of(call_of(raw))
    assert gradcheck(lambda a, u, r: addition(u, call_of(r), a), (arrived, upstream, raw))
    with pytest.raises(RuntimeError, match="second derivatives need an activation that was freed"):
        addition(upstream, call_of(raw.detach()), arrived)


def test_a_negated_view_is_read_with_its_sign(device: str) -> None:
    raw = torch._neg_view(torch.randn(2, 3, 4, device=device))  # dense, so that no copy resolves the sign
    assert raw.is_neg()
    arrived, upstream = torch.zeros(2, 3, 4, device=device), torch.ones((), device=device)
    call, plain = call_of(raw), call_of(raw.resolve_neg())
    with torch.no_grad():
        got = addition_of(call)(upstream, call, arrived)
        want = addition_of(plain)(upstream, plain, arrived)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [DOUBLE, HALF], ids=str)
def test_an_upstream_gradient_of_another_dtype(dtype: torch.dtype, device: str) -> None:
    raw, arrived = torch.randn(2, 2, 3, 4, device=device)
    call = call_of(raw)
    addition = addition_of(call)
    with torch.no_grad():
        got, want = (addition(torch.tensor(3.0, device=device, dtype=x), call, arrived) for x in (dtype, FLOAT))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("hidden", [3, 16])
def test_packed_rows(hidden: int, dtype: torch.dtype, device: str) -> None:
    offsets = torch.tensor([0, 4, 8, 11, 12, 13])
    raw, arrived = torch.randn(2, 13, hidden, device=device).to(dtype)
    call = call_of(raw)._replace(steps=Steps(offsets=offsets))
    upstream = torch.tensor(30.0, device=device)
    with torch.no_grad():
        got = addition_of(call)(upstream, call, arrived)
    penalty, _ = ar_tar_gradients(upstream.double(), call._replace(raw=raw.double()))
    assert penalty is not None
    want = arrived.double() + penalty
    torch.testing.assert_close(got.double(), want, rtol=rounding(got), atol=8 * eps(dtype) * float(penalty.abs().max()))
