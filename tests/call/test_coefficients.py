"""Coefficients that are tensors, read where the activations are: as right as numbers, and changed in place."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastreg import FusedRNNDropout, RNNRegularizer
from fastreg.call.backends import cpu_tensors_by
from tests import language_model as lm
from tests.calls import CALLS, MORE_CALLS, calls, everything, leaves, total
from tests.samples import BF16, DOUBLE, FLOAT, HALF

pytestmark = pytest.mark.numbers

NAMES = "pair", "same", "layers", "lengths", "packed", "mask", "mask_lengths", "evaluation"
by_call = calls(*NAMES, of=CALLS | MORE_CALLS)


def numbers(device: str, *values: float, dtype: torch.dtype = FLOAT) -> list[Tensor]:
    return [torch.tensor(x, device=device, dtype=dtype) for x in values]


def step(call: Any, xs: list[Tensor], *coefficients: Any) -> list[Tensor]:
    return everything(lambda *xs: call(*xs, *coefficients), xs)


@by_call
@pytest.mark.parametrize("by_formula", [False, True])
@pytest.mark.parametrize(
    ("dtype", "kind"), [(FLOAT, FLOAT), (FLOAT, DOUBLE), (FLOAT, HALF), (BF16, DOUBLE), (DOUBLE, FLOAT)], ids=str
)
def test_the_same_bits_as_of_items(
    call: Any, dtype: torch.dtype, kind: torch.dtype, by_formula: bool, device: str
) -> None:
    """No dtype holds 0.7 or 0.001, so each rounds them in its own way."""
    xs, (alpha, beta) = leaves(5, dtype, device), numbers(device, 0.7, 0.001, dtype=kind)
    with cpu_tensors_by(None) if by_formula else nullcontext():
        want = step(call, xs, alpha.item(), beta.item())
        for coefficients in ((alpha, beta), (alpha.item(), beta)):
            assert_close(step(call, xs, *coefficients), want, rtol=0, atol=0)


@by_call
def test_a_change_in_place_counts_in_the_next_call_and_is_an_error_before_the_backward(call: Any, device: str) -> None:
    xs = leaves(device=device)
    alpha, beta = numbers(device, 0.0, 0.0)
    for a, b in ((2.0, 1.0), (0.0, 3.0), (1.5, 0.0)):
        alpha.fill_(a)
        beta.fill_(b)
        assert_close(step(call, xs, alpha, beta), step(call, xs, a, b), rtol=0, atol=0)
    got = total(call(*xs, alpha, beta))
    beta.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got.backward()


@pytest.mark.parametrize("kind", [nn.Dropout, FusedRNNDropout])
def test_a_regularizer_and_a_dropout_keep_the_very_tensor(kind: Any, device: str) -> None:
    """It may also come from inference mode."""
    with torch.inference_mode():
        (alpha,) = numbers(device, 2.0)
    reg, module = RNNRegularizer(alpha, 1.0), FusedRNNDropout(0.5, alpha, 1.0)
    assert reg.alpha is module.alpha is alpha
    with torch.inference_mode():
        alpha.fill_(3.0)
    rnn, dropout = lm.gru().to(device), kind(0.5)
    reg.attach(rnn, dropout)
    raw, dropped = lm.run(rnn, dropout, lm.inputs().to(device))
    lm.check_gradients(rnn, lm.penalty_of(reg, dropped), lm.formula(raw, dropped, 1, alpha=3.0))
