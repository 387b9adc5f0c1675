"""The formulas in float64, and how far from them a result may be."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.problem import ARTAR
from tests.conftest import INTERPRETED
from tests.samples import BF16, DOUBLE, FLOAT


def exact(x: Tensor) -> Tensor:
    """The values of a tensor in float64, 0 where they are not finite, as a leaf."""
    return x.detach().double().nan_to_num(0, 0, 0).requires_grad_()


def eps(*dtypes: torch.dtype) -> float:
    """The unit of rounding of what is computed from these dtypes."""
    return torch.finfo(DOUBLE if DOUBLE in dtypes else FLOAT).eps


def assert_terms(got: ARTAR, want: ARTAR, *dtypes: torch.dtype, ulps: int = 8) -> None:
    """Check the penalty and its terms, of activations of these dtypes."""
    assert got.penalty.dtype == (DOUBLE if DOUBLE in dtypes else FLOAT)
    for name, x, y in zip(ARTAR._fields, got, want, strict=True):
        torch.testing.assert_close(
            x.double().cpu(), y.detach().cpu(), rtol=ulps * eps(*dtypes), atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_gradient(got: Tensor | None, want: Tensor | None, largest: float | None = None, roundings: int = 1) -> None:
    """Allow half a unit of `got` for each rounding, and some of the computation on parts as large as `largest`."""
    assert got is not None
    assert want is not None
    info = torch.finfo(got.dtype)
    unit = info.eps if INTERPRETED and got.device.type == "cpu" and got.dtype == BF16 else info.eps / 2  # it cuts off
    largest = want.abs().max().item() if largest is None else largest
    allowed = roundings * unit * want.abs() + 8 * eps(got.dtype) * largest + info.smallest_normal * info.eps
    error = (got.double() - want).abs()
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.3g} times what is allowed"
