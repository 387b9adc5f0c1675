"""Any axis of time: which layouts are read in place, and random calls (`python -m tests.random_calls` makes more)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg import FusedRNNDropout, fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import INTERPRETED, memory_of, skip_on_formula
from tests.exact import assert_terms, truth
from tests.random_calls import Kind
from tests.samples import transposed

pytestmark = pytest.mark.numbers

KINDS = 5  # a test
FIRST = range(0, 60 if INTERPRETED else 200, KINDS)
X = torch.randn(2, 5, 80)
NARROW = 64  # time steps from which kernels on a CPU read the innermost axis in place, as docs/calls.md says


@pytest.mark.parametrize("first", FIRST)
def test_random_calls_give_the_results_of_the_formulas(first: int, device: str, poison: None) -> None:
    compared = 0
    for seed in range(first, first + KINDS):
        kind = Kind(seed, device)
        try:
            kind.play()
        finally:
            print(f"seed {seed}: {kind}")  # pytest shows it if the test fails
        compared += kind.counts["gradients"]
    assert compared > 0


def laid_out(memory_order: str) -> Tensor:
    """Return `(batch, channels, time, height, width)` of 2, 3, 5, 4, 7 whose axes have some order in memory."""
    names = ["batch", "channels", "time", "height", "width"]
    order = [names.index(name) for name in memory_order.split()]
    return torch.randn([(2, 3, 5, 4, 7)[axis] for axis in order]).permute([order.index(axis) for axis in range(5)])


@pytest.mark.parametrize(
    ("x", "options", "copied"),
    [
        (transposed(X), {}, False),
        (X[..., 1:70], {}, False),
        (X[..., ::2], {}, True),
        (torch.randn(80, 2, 5).movedim(0, 2), {}, True),
        (laid_out("batch time channels height width"), {"time_dim": 2}, False),
        (laid_out("time batch channels height width"), {"time_dim": 2}, False),
        (laid_out("channels batch time height width"), {"time_dim": -3}, False),
        (laid_out("batch height time channels width"), {"time_dim": 2}, False),
        (laid_out("batch channels height width time"), {"time_dim": 2}, True),
        (torch.randn(2, 30, 5, 4), {"time_dim": 2}, False),
        (torch.randn(2, 30, 5, 4), {"time_dim": 2, "lengths": torch.tensor([5, 3])}, True),
        (torch.randn(2, 3, NARROW - 1), {"time_dim": -1}, True),
        (torch.randn(2, 3, NARROW), {"time_dim": -1}, False),
        (torch.randn(2, 3, 2 * NARROW)[..., ::2], {"time_dim": -1}, True),
    ],
)
def test_axes_that_fold_are_read_in_place(x: Tensor, options: dict[str, Any], copied: bool) -> None:
    skip_on_formula("cpu")
    allocated, got = memory_of(lambda: fused_ar_tar(x, None, 0.0, 1.0, **options), "cpu")
    assert (allocated >= x.nbytes) == copied
    torch.testing.assert_close(got.double(), truth(x.double(), x.double(), 0.0, 1.0, **options).tar, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(6, 16, 3), (7, 7, 3)], ids=str)
def test_a_mask_of_time_steps_has_the_axes_of_its_tensor_in_their_order(shape: tuple[int, ...], device: str) -> None:
    """A rollout, (time, batch), needs no transpose; (7, 7) shows that shapes do not decide which axis is time."""
    raw = torch.randn(shape, device=device)
    valid, starts = torch.rand(2, *shape[:2], device=device) < 0.6
    options: Any = {"valid": valid, "starts": starts, "batch_first": False}
    module: Any = FusedRNNDropout(0.0, 2.0, 1.0, batch_first=False)
    module(raw, valid=valid, starts=starts)
    _, of_dropout = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, training=False, return_terms=True, **options)
    for got in (fused_ar_tar([raw], [raw], 2.0, 1.0, return_terms=True, **options), of_dropout, module.take()):
        assert_terms(got, truth(raw.double(), raw.double(), 2.0, 1.0, **options), raw.dtype)


def test_a_mask_of_one_row_is_copied_as_one_row(device: str) -> None:
    skip_on_formula(device)
    raw = torch.randn(2, 3, 40, 50, device=device)
    mask = torch.randn(50, 1, 3, 2, device=device).permute(3, 2, 1, 0).expand(2, 3, 40, 50)
    allocated, (dropped, _) = memory_of(lambda: fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, time_dim=2, mask=mask), device)
    assert torch.equal(dropped, raw * mask)
    assert allocated < 1.5 * raw.nbytes


def test_gradients_are_in_the_order_of_their_tensors(device: str) -> None:
    skip_on_formula(device)
    x = torch.randn(4, 7, 3, 2, 5, device=device).movedim(2, 1).requires_grad_()  # (batch, channels, time, ...)
    leaf = x.detach().requires_grad_()
    fused_ar_tar(leaf, leaf, 2.0, 1.0, time_dim=2).backward()
    assert leaf.grad is not None
    assert leaf.grad.stride() == leaf.stride()
    dropped, penalty = fused_dropout_ar_tar(x, 0.5, 2.0, 1.0, time_dim=2)
    assert dropped.stride() == x.stride()
    assert torch.equal(dropped != 0, (dropped[:, :, :1] != 0).expand_as(dropped))  # the mask has one row
    (gradient,) = torch.autograd.grad(dropped.sum() + penalty, x)
    assert gradient.stride() == x.stride()
    repeated = torch.randn(3, 2, device=device).t()[:, None].expand(2, 4, 3).requires_grad_()  # so that TAR is 0
    (gradient,) = torch.autograd.grad(fused_ar_tar(repeated, repeated, 12.0, 1.0), repeated)
    torch.testing.assert_close(gradient, repeated.detach())
