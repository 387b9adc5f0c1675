"""Lengths and masks of valid steps: gradients where no step counts, and how steps are encoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.backends import backend_for
from fastreg.call.reference import encoded
from tests.conftest import gpu, skip_on_formula
from tests.exact import spoil

pytestmark = pytest.mark.numbers

ALPHA, BETA = 2.0, 3.0


# Each row is a sequence, and each x is a step that counts; the names are names of arguments.
STEPS = {
    "lengths": ["xxxxx....", ".........", "xxxxxxxxx", "x........", "xx.......", "xxxxxxxxx"],
    "valid": ["xx.xx.x", "x.x.x.x", ".xx..xx", "x......"],
}
by_both = pytest.mark.parametrize("steps", STEPS)


def marks(steps: str, device: str = "cpu") -> Tensor:
    """Return the steps that count as a mask, `(batch, time)`."""
    return torch.tensor([[c == "x" for c in row] for row in STEPS[steps]], device=device)


def given(steps: str, device: str = "cpu") -> dict[str, Any]:
    """Return the argument that says which steps count."""
    valid = marks(steps, device)
    return {steps: valid.sum(1) if steps == "lengths" else valid}


@by_both
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
def test_an_upstream_gradient_that_is_not_finite(upstream: float, create_graph: bool, steps: str, device: str) -> None:
    """The gradient of a step that does not count is 0 all the same."""
    valid = marks(steps, device)
    raw, dropped, alone = torch.randn(3, *valid.shape, 12, device=device)
    for x in () if create_graph else (raw, dropped):  # the formula reads all steps
        spoil(x, valid=valid)
    raw, dropped, alone = (x.requires_grad_() for x in (raw, dropped, alone))
    mask = torch.full((len(valid), 1, 12), 2.0, device=device)
    penalty = fused_ar_tar(raw, dropped, ALPHA, BETA, **given(steps, device))
    _, other = fused_dropout_ar_tar(alone, 0.5, ALPHA, BETA, mask=mask, **given(steps, device))
    for x in torch.autograd.grad((penalty + other) * upstream, (raw, dropped, alone), create_graph=create_graph):
        assert (x[~valid] == 0).all()
        assert not x[valid].isfinite().all()
        assert not x[0, 0].isfinite().any()


def test_an_infinite_mask_is_no_part_of_tar(device: str) -> None:
    raw = torch.randn(2, 4, 3, device=device, requires_grad=True)
    mask = torch.full((2, 1, 3), torch.inf, device=device)
    for lengths in (None, torch.tensor([3, 1])):
        _, got = fused_dropout_ar_tar(raw, 0.5, 0, BETA, mask=mask, lengths=lengths)
        (want,) = torch.autograd.grad(fused_ar_tar(raw, None, 0, BETA, lengths=lengths), raw)
        torch.testing.assert_close(*torch.autograd.grad(got, raw), want)


@pytest.mark.parametrize("byte", [2, 255])
def test_marks_of_any_bytes(byte: int, device: str) -> None:
    """A view of integers as bool has such bytes, and so has memory of other libraries."""
    marks = torch.rand(2, 5, 9, device=device) < torch.tensor([0.7, 0.2], device=device).view(2, 1, 1)
    x = torch.randn(5, 9, 12, device=device)
    got, want = (
        fused_ar_tar(x, x, ALPHA, BETA, valid=valid, starts=starts, return_terms=True)
        for valid, starts in ((marks.to(torch.uint8) * byte).view(torch.bool), marks)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@gpu
@by_both
def test_a_refilled_pinned_buffer_leaves_a_queued_copy_alone(steps: str) -> None:
    ((name, argument),) = given(steps).items()
    x = torch.randn(*marks(steps).shape, 8, device="cuda")
    want, pinned = fused_ar_tar(x, x, ALPHA, BETA, **{name: argument.cuda()}), argument.pin_memory()
    torch.cuda._sleep(10**8)  # the copy waits in the queue
    got = fused_ar_tar(x, x, ALPHA, BETA, **{name: pinned})
    pinned.zero_()
    assert torch.equal(got, want)


@pytest.mark.parametrize("given", ["lengths valid starts", "lengths", "valid", "starts", "valid starts"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 5), (3, 70), (911, 9), (2, 4099)], ids=str)
def test_backends_encode_as_the_formula_and_clamp_lengths(shape: tuple[int, int], given: str, device: str) -> None:
    skip_on_formula(device)
    backend: Any = backend_for(torch.device(device))
    lengths = torch.randint(-2, shape[1] + 3, shape[:1], device=device) if "lengths" in given else None
    if lengths is not None:
        lengths[-1] = 2**40
    valid = torch.rand(shape, device=device) < 0.7 if "valid" in given else None
    starts = torch.rand(shape, device=device) < 0.2 if "starts" in given else None
    got = backend.encoder(shape, torch.device(device))(lengths, valid, starts)
    want = encoded(shape, lengths, valid, starts)
    torch.testing.assert_close([*got], [*want], rtol=0, atol=0)
