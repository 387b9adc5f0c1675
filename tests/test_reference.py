"""The formula itself, against another way to write it, and its gradient against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastreg.kernels.view import Steps
from fastreg.problem import Call, Kind, divisors
from fastreg.reference import ar_tar, ar_tar_gradients, marked
from tests.exact import truth
from tests.samples import DOUBLE, SAMPLES, Sample


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_values(sample: Sample) -> None:
    leaves = sample.leaves("cpu", DOUBLE)
    want = truth(*leaves, sample.alpha, sample.beta, **sample.options)
    torch.testing.assert_close([*ar_tar(sample.call(*leaves))], [*want])


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_gradients_are_those_of_autograd(sample: Sample) -> None:
    leaves = sample.leaves("cpu", DOUBLE)
    call = sample.call(*leaves, measured=False)
    grad = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)
    written_out = ar_tar_gradients(grad, call)
    got, inputs = zip(*((g, x) for g, x in zip(written_out, leaves, strict=True) if g is not None), strict=True)
    torch.testing.assert_close(got, torch.autograd.grad(ar_tar(call).penalty, inputs, grad))


@pytest.mark.parametrize(
    "lengths", [torch.tensor([0, 3], dtype=torch.uint8), torch.tensor([0, 3], dtype=torch.int8), torch.tensor([-3, 9])]
)
def test_lengths_of_few_bits_and_out_of_range(lengths: Tensor) -> None:
    """Compiled code cannot look at them, and clamps them."""
    counts = divisors(Call(torch.zeros(2, 3, 100), None, 2.0, 1.0, Steps(*marked((2, 3), lengths, None, None))))
    assert [int(n) for n in counts] == [300, 200]


def test_what_cancels_in_half_precision() -> None:
    """Two gradients that float16 has no numbers for."""
    x = torch.tensor([[[1.0], [1000.0]]]).half().requires_grad_()
    call = Call(x, None, 99900.0, 100.0, None, Kind(reduction="sum", ar_of_raw=True))
    (gradient,) = torch.autograd.grad(ar_tar(call).penalty, x)
    assert gradient[0, 0] == 0
    written_out, _ = ar_tar_gradients(torch.tensor(1.0), call)
    assert written_out is not None
    assert written_out[0, 0] == 0
