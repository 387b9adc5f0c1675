"""The formula itself, against loops written out, and its gradient against autograd's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck

from fastreg.reference import Steps, ar_tar, ar_tar_gradients, divisors
from tests.samples import DOUBLE, SAMPLES, SMALL, Sample


@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_formula_written_out(sample: Sample) -> None:
    raw, dropped = (x.detach().movedim(sample.time_dim, 0).tolist() for x in sample.leaves("cpu", DOUBLE))

    def flat(x: object) -> list[float]:
        return [v for y in x for v in flat(y)] if isinstance(x, list) else [x]  # pyright: ignore[reportReturnType]

    squares = [v * v for v in flat(dropped)]
    changes = [(b - a) ** 2 for now, after in pairwise(raw) for a, b in zip(flat(now), flat(after), strict=True)]
    mean = sample.reduction == "mean"
    ar = sum(squares) / (len(squares) if mean else 1)
    tar = sum(changes) / (max(len(changes), 1) if mean else 1)
    got = ar_tar(*sample.leaves("cpu", DOUBLE), sample.alpha, sample.beta, Steps(sample.batch_first), sample.reduction)
    want = torch.tensor([sample.alpha * ar + sample.beta * tar, ar, tar], dtype=DOUBLE)
    torch.testing.assert_close(torch.stack(got), want)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_gradients_are_those_of_autograd(sample: Sample) -> None:
    leaves = sample.leaves("cpu", DOUBLE)
    options = (sample.alpha, sample.beta, Steps(sample.batch_first), sample.reduction)
    grad = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)
    raw, dropped = leaves[0], None if sample.same else leaves[1]
    got = [g for g in ar_tar_gradients(grad, raw, dropped, sample.same, *options) if g is not None]
    inputs = leaves[: len(got)]
    torch.testing.assert_close(got, list(torch.autograd.grad(ar_tar(*leaves, *options).penalty, inputs, grad)))
    if sample in SMALL:
        assert gradcheck(
            lambda g, *xs: ar_tar_gradients(g, xs[0], None if sample.same else xs[1], sample.same, *options)[0],
            (grad, *inputs),
            fast_mode=True,
        )


def test_gradients_of_half_precision_are_formed_in_float32() -> None:
    raw = torch.tensor([4e4, -4e4]).repeat(4).reshape(1, 8, 1)
    got, want = (
        ar_tar_gradients(torch.tensor(1.0), x, None, False, 0.0, 1.0, Steps(), "mean")[0] for x in (raw.half(), raw)
    )
    assert torch.equal(got, want.half())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8])
def test_lengths_of_few_bits(kind: torch.dtype) -> None:
    counts = divisors(torch.zeros(2, 3, 100), Steps(lengths=torch.tensor([0, 3], dtype=kind)), "mean")
    assert [int(n) for n in counts] == [300, 200]


def test_what_cancels_in_half_precision() -> None:
    """Two gradients that float16 has no numbers for."""
    x = torch.tensor([[[1.0], [1000.0]]]).half().requires_grad_()
    options = 99900.0, 100.0, Steps(), "sum"
    (gradient,) = torch.autograd.grad(ar_tar(x, x, *options).penalty, x)
    assert gradient[0, 0] == 0
    written_out, _ = ar_tar_gradients(torch.tensor(1.0), x, None, True, *options)
    assert written_out is not None
    assert written_out[0, 0] == 0
