"""Any axis of time; random calls: `python -m tests.random_calls` makes more of them."""

from __future__ import annotations

import pytest
import torch

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import INTERPRETED, skip_on_formula
from tests.random_calls import Kind

KINDS = 5  # a test
FIRST = range(0, 25 if INTERPRETED else 200, KINDS)


@pytest.mark.parametrize("first", FIRST)
def test_random_calls_give_the_results_of_the_formulas(first: int, device: str, poison: None) -> None:
    for seed in range(first, first + KINDS):
        kind = Kind(seed, device)
        try:
            kind.play()
        finally:
            print(f"seed {seed}: {kind}")  # where the test fails
        assert kind.counts["calls"] > 0


def test_gradients_are_in_the_order_of_their_tensors(device: str) -> None:
    skip_on_formula(device)
    x = torch.randn(4, 7, 3, 2, 5, device=device).movedim(2, 1).requires_grad_()  # (batch, channels, time, ...)
    leaf = x.detach().requires_grad_()
    fused_ar_tar(leaf, leaf, 2.0, 1.0, time_dim=2).backward()
    assert leaf.grad is not None
    assert leaf.grad.stride() == leaf.stride()
    dropped, penalty = fused_dropout_ar_tar(x, 0.5, 2.0, 1.0, time_dim=2)
    assert dropped.stride() == x.stride()
    (gradient,) = torch.autograd.grad(dropped.sum() + penalty, x)
    assert gradient.stride() == x.stride()
