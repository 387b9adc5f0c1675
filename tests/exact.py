"""The formulas in float64, and how far from them a result may be."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.problem import ARTAR
from tests.conftest import INTERPRETED
from tests.samples import BF16, DOUBLE, FLOAT, HALF


def exact(x: Tensor) -> Tensor:
    """The values of a tensor in float64, 0 where they are not finite, as a leaf."""
    return x.detach().double().nan_to_num(0, 0, 0).requires_grad_()


def eps(*dtypes: torch.dtype) -> float:
    """Return the unit of rounding of a computation with tensors of some dtypes."""
    return torch.finfo(DOUBLE if DOUBLE in dtypes else FLOAT).eps


def rounding(x: Tensor) -> float:
    """The relative error of one rounding to the dtype of `x`. Triton's interpreter cuts bfloat16 off."""
    cut_off = INTERPRETED and x.device.type == "cpu" and x.dtype == BF16
    return torch.finfo(x.dtype).eps / (1 if cut_off else 2)


def assert_terms(got: ARTAR, want: ARTAR, *dtypes: torch.dtype, ulps: int = 8) -> None:
    """Check the penalty and its terms. The dtypes are those of the activations."""
    assert got.penalty.dtype == (DOUBLE if DOUBLE in dtypes else FLOAT)
    for name, x, y in zip(ARTAR._fields, got, want, strict=True):
        torch.testing.assert_close(
            x.double().cpu(), y.detach().cpu(), rtol=ulps * eps(*dtypes), atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_gradient(
    got: Tensor | None, want: Tensor | None, largest: float | None = None, computed: torch.dtype = FLOAT
) -> None:
    """Allow one rounding of `got`, and a few of the dtype it was computed in, on parts as large as `largest`."""
    assert got is not None
    assert want is not None
    info = torch.finfo(got.dtype)
    computed = FLOAT if got.dtype in (HALF, BF16) else torch.promote_types(computed, got.dtype)  # rounded through it
    largest = want.abs().max().item() if largest is None else largest
    allowed = rounding(got) * want.abs() + 8 * eps(computed) * largest + info.smallest_normal * info.eps
    error = (got.double() - want).abs()
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.3g} times what is allowed"
