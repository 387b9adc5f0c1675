"""Tensors with elements and strides that 32 bits cannot count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import HALF, gpu, interpreted
from tests.exact import truth

ALL = slice(None)


@gpu
@pytest.mark.parametrize(
    ("shape", "batch_first", "end"),
    [
        pytest.param((2**21 + 1, 8, 128), True, (slice(-4, None), ALL, ALL), id="batch"),
        pytest.param((8, 2**21 + 1, 128), False, (ALL, slice(-4, None), ALL), id="time_first"),
        pytest.param((1, 2**31 + 96, 1), True, (ALL, slice(-100, None), ALL), id="time"),
        pytest.param((2**20 + 1, 1, 2**11), True, (slice(-1, None), ALL, slice(-512, None)), id="one_step"),
    ],
)
def test_more_elements_than_32_bits_count_are_exact(
    shape: tuple[int, ...], batch_first: bool, end: tuple[slice, ...]
) -> None:
    """Everything but the end is 0, so the end has the gradient of a short tensor."""
    time = 1 if batch_first else 0
    raw = torch.zeros(shape, dtype=HALF, device="cuda")
    last = raw[end].normal_()
    if last.shape[time] < shape[time]:
        last.select(time, 0).zero_()  # like the row before it, so no change leads there
    alone = last.double().requires_grad_()
    options: Any = {"batch_first": batch_first, "reduction": "sum"}
    want = truth(alone, alone, 2.0, 1.0, **options).penalty
    got = fused_ar_tar(raw.requires_grad_(), raw, 2.0, 1.0, **options)
    assert_close(got.double(), want, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(got, raw)
    assert_close(gradient[end].double(), *torch.autograd.grad(want, alone), rtol=2e-3, atol=1e-3)


@pytest.mark.numbers
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("strides", [(2**31 + 5, 9), (10, 2**31 + 3), (2**31 + 8, 16), (2**30 + 5, 9), (10, 2**30 + 3)])
def test_offsets_past_31_bits_are_exact(strides: tuple[int, int], dropout: bool, device: str) -> None:
    """The rows have large strides in memory that is reserved but, on the CPU, hardly touched."""
    shape = (4, 2, 8) if strides[0] > strides[1] else (2, 4, 8)
    memory = torch.empty(3 * (2**31 + 8) + 128, dtype=HALF, device=device)
    given = [memory.as_strided(shape, (*strides, 1), offset).copy_(torch.randn(shape)) for offset in (0, 32, 64)]
    results = []
    for x, y, arriving in (given, [v.double() for v in given]):
        x, y = x.detach().requires_grad_(), y.detach()
        if dropout:  # raw, a full mask and the gradient of dropped have these offsets
            dropped, got = fused_dropout_ar_tar(x, 0.5, 2.0, 1.0, mask=y)
            gradients = torch.autograd.grad([dropped, got], x, [arriving, torch.ones_like(got)])
        else:
            y.requires_grad_()
            got = dropped = fused_ar_tar(x, y, 2.0, 1.0)
            gradients = torch.autograd.grad(got, (x, y))
        results.append([v.detach().double() for v in (dropped, got, *gradients)])
    assert_close(*results, rtol=1e-3, atol=1e-3)
    if not dropout:
        assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)
