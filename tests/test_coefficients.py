"""Coefficients that are tensors, read where the activations are: as right as numbers, and changed in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar
from tests.calls import CALLS, MORE_CALLS, calls, everything, leaves, total
from tests.samples import BF16, DOUBLE, FLOAT, HALF, Decorated

NAMES = "pair", "same", "layers", "lengths", "packed", "mask", "mask_lengths", "evaluation"
by_call = calls(*NAMES, of=CALLS | MORE_CALLS)


def numbers(device: str, *values: float, dtype: torch.dtype = FLOAT) -> list[Tensor]:
    return [torch.tensor(x, device=device, dtype=dtype) for x in values]


def step(call: Any, xs: list[Tensor], *coefficients: Any) -> list[Tensor]:
    return everything(lambda *xs: call(*xs, *coefficients), xs)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@by_call
@pytest.mark.parametrize(("dtype", "kind"), [(FLOAT, FLOAT), (FLOAT, HALF), (BF16, DOUBLE), (DOUBLE, FLOAT)], ids=str)
def test_as_numbers(call: Any, dtype: torch.dtype, kind: torch.dtype, device: str) -> None:
    """Bit for bit; one of both may be a number."""
    xs = leaves(5, dtype, device)
    want = step(call, xs, 2.0, 0.75)
    alpha, beta = numbers(device, 2.0, 0.75, dtype=kind)
    for coefficients in ((alpha, beta), (2.0, beta)):
        assert_same(step(call, xs, *coefficients), want)


@by_call
def test_changed_in_place_between_steps(call: Any, device: str) -> None:
    xs = leaves(device=device)
    alpha, beta = numbers(device, 0.0, 0.0)
    for a, b in ((2.0, 1.0), (0.0, 3.0), (1.5, 0.0)):
        alpha.fill_(a)
        beta.fill_(b)
        assert_same(step(call, xs, alpha, beta), step(call, xs, a, b))


@by_call
def test_a_change_before_the_backward_is_an_error(call: Any, device: str) -> None:
    xs = leaves(device=device)
    alpha, beta = numbers(device, 2.0, 1.0)
    got = total(call(*xs, alpha, beta))
    beta.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got.backward()


def test_an_infinite_term_of_no_weight(device: str) -> None:
    raw = torch.tensor([[1.0], [torch.inf], [2.0]], device=device)
    for coefficients in (numbers(device, 0.0, 0.0), (0.0, 0.0)):
        for call in (fused_ar_tar, torch.compile(fused_ar_tar, backend="aot_eager")):
            got = call(raw, raw, *coefficients, return_terms=True)
            assert got.penalty == 0
            assert got.ar == got.tar == torch.inf


def test_tensors_of_inference_mode_and_subclasses(device: str) -> None:
    xs = leaves(device=device)
    with torch.inference_mode():
        alpha = torch.tensor(2.0, device=device)
    beta = torch.tensor(1.0, device=device).as_subclass(Decorated)
    for name in ("pair", "mask"):
        assert_same(step(CALLS[name], xs, alpha, beta), step(CALLS[name], xs, 2.0, 1.0))


def test_a_regularizer_keeps_the_very_tensor(device: str) -> None:
    with torch.inference_mode():
        alpha = torch.tensor(2.0, device=device)
    reg, module = RNNRegularizer(alpha, 1.0), FusedRNNDropout(0.5, alpha, 1.0)
    assert reg.alpha is module.alpha is alpha
    raw = torch.randn(2, 5, 4, device=device, requires_grad=True)
    with torch.inference_mode():
        alpha.fill_(3.0)
    reg.on_loss_begin((raw, raw, 2 * raw))
    assert reg.on_backward_begin(torch.zeros((), device=device)) == fused_ar_tar(raw, 2 * raw, 3.0, 1.0)


@pytest.mark.parametrize("kind", [nn.Dropout, FusedRNNDropout])
def test_attach_takes_a_tensor_of_inference_mode(kind: Any, device: str) -> None:
    rnn, gradients = nn.LSTM(4, 6, batch_first=True).to(device), []
    with torch.inference_mode():
        alpha = torch.tensor(2.0, device=device)
    for coefficient in (alpha, 2.0):
        torch.manual_seed(1)
        reg, module = RNNRegularizer(coefficient, 1.0), kind(0.5)
        with reg.attach(rnn, module):
            loss = reg.on_backward_begin(module(rnn(torch.ones(2, 5, 4, device=device))[0]).sum())
            gradients.append(torch.autograd.grad(loss, [*rnn.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", [nn.Dropout, FusedRNNDropout])
def test_a_coefficient_that_is_changed_in_place_after_the_forward_is_an_error(kind: Any, device: str) -> None:
    (alpha,) = numbers(device, 2.0)
    reg, rnn, module = RNNRegularizer(alpha, 1.0), nn.LSTM(4, 6, batch_first=True).to(device), kind(0.5)
    reg.attach(rnn, module)
    for changes in (True, False):
        raw, _ = rnn(torch.ones(2, 5, 4, device=device))
        dropped = module(raw)
        if changes:
            alpha.add_(1)
            with pytest.raises(RuntimeError, match="alpha or beta has changed since the forward of the attached LSTM"):
                reg.on_backward_begin(0 * dropped.sum())
    loss = reg.on_backward_begin(0 * dropped.sum())
    want = fused_ar_tar(raw, dropped, 3.0, 1.0)
    torch.testing.assert_close(loss, want)
    gradients = [torch.autograd.grad(x, [*rnn.parameters()], retain_graph=True) for x in (loss, want)]
    torch.testing.assert_close(*gradients)
    alpha.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
