"""Coefficients that are tensors, read where the activations are: as right as numbers, and changed in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar, fused_dropout_ar_tar
from tests.calls import leaves
from tests.samples import BF16, DOUBLE, FLOAT, HALF, Decorated

Ways = dict[str, Callable[..., Any]]


def penalty(raw: Tensor, dropped: Tensor, *coefficients: Any, **options: Any) -> tuple[Tensor, ...]:
    return fused_ar_tar(raw, dropped, *coefficients, return_terms=True, **options)


def packed(raw: Tensor, dropped: Tensor, *coefficients: Any) -> tuple[Tensor, ...]:
    both = [pack_padded_sequence(x, [5, 3, 1], batch_first=True) for x in (raw, dropped)]
    return fused_ar_tar(*both, *coefficients, return_terms=True)


def dropout(raw: Tensor, dropped: Tensor, *coefficients: Any, **options: Any) -> tuple[Tensor, ...]:
    mask = (dropped.detach()[:, :1] > 0).to(raw.dtype) * 2
    return fused_dropout_ar_tar(raw, 0.5, *coefficients, mask=mask, return_terms=True, **options)[1]


WAYS: Ways = {
    "two": penalty,
    "same": lambda raw, _, *coefficients: penalty(raw, raw, *coefficients),
    "lengths": lambda *xs: penalty(*xs, lengths=torch.tensor([5, 0, 3])),
    "packed": packed,
    "layers": lambda raw, dropped, *coefficients: penalty([raw, dropped], [dropped, dropped], *coefficients),  # pyright: ignore[reportArgumentType]
    "dropout": dropout,
    "dropout, lengths": lambda *xs: dropout(*xs, lengths=torch.tensor([5, 0, 3])),
    "nothing dropped": lambda raw, _, *coefficients: fused_dropout_ar_tar(raw, 0.0, *coefficients, return_terms=True)[
        1
    ],
}
ways = pytest.mark.parametrize("way", WAYS)


def numbers(device: str, *values: float, dtype: torch.dtype = FLOAT) -> list[Tensor]:
    return [torch.tensor(x, device=device, dtype=dtype) for x in values]


def step(way: str, xs: list[Tensor], *coefficients: Any) -> list[Tensor | None]:
    """Penalty, terms and gradients."""
    results = WAYS[way](*xs, *coefficients)
    return [*results, *torch.autograd.grad(results[0], xs, allow_unused=True)]


def assert_same(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for x, y in zip(got, want, strict=True):
        assert (x is y is None) or torch.equal(x, y)  # pyright: ignore[reportArgumentType]


@ways
@pytest.mark.parametrize(("dtype", "kind"), [(FLOAT, FLOAT), (FLOAT, HALF), (BF16, DOUBLE), (DOUBLE, FLOAT)], ids=str)
def test_as_numbers(way: str, dtype: torch.dtype, kind: torch.dtype, device: str) -> None:
    """Bit for bit; one of both may be a number."""
    xs = leaves(5, dtype, device)
    want = step(way, xs, 2.0, 0.75)
    alpha, beta = numbers(device, 2.0, 0.75, dtype=kind)
    for coefficients in ((alpha, beta), (2.0, beta)):
        assert_same(step(way, xs, *coefficients), want)


@ways
def test_changed_in_place_between_steps(way: str, device: str) -> None:
    xs = leaves(device=device)
    alpha, beta = numbers(device, 0.0, 0.0)
    for a, b in ((2.0, 1.0), (0.0, 3.0), (1.5, 0.0)):
        alpha.fill_(a)
        beta.fill_(b)
        got, want = step(way, xs, alpha, beta), step(way, xs, a, b)
        assert_same(got[:3], want[:3])
        for x, y in zip(got[3:], want[3:], strict=True):
            if x is not None:  # a number that is 0 leaves the gradient out
                assert torch.equal(x, torch.zeros_like(x) if y is None else y)


@ways
def test_a_change_before_the_backward_is_an_error(way: str, device: str) -> None:
    xs = leaves(device=device)
    alpha, beta = numbers(device, 2.0, 1.0)
    got = WAYS[way](*xs, alpha, beta)[0]
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
    for way in ("two", "dropout"):
        assert_same(step(way, xs, alpha, beta), step(way, xs, 2.0, 1.0))


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
def test_the_coefficients_of_a_step_are_those_of_its_loss(kind: Any, device: str) -> None:
    (alpha,) = numbers(device, 2.0)
    reg, rnn, module = RNNRegularizer(alpha, 1.0), nn.LSTM(4, 6, batch_first=True).to(device), kind(0.5)
    reg.attach(rnn, module)
    raw, _ = rnn(torch.ones(2, 5, 4, device=device))
    dropped = module(raw)
    alpha.add_(1)
    loss = reg.on_backward_begin(0 * dropped.sum())
    want = fused_ar_tar(raw, dropped, 3.0, 1.0)
    torch.testing.assert_close(loss, want)
    gradients = [torch.autograd.grad(x, [*rnn.parameters()], retain_graph=True) for x in (loss, want)]
    torch.testing.assert_close(*gradients)
    alpha.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
