"""`RNNRegularizer.attach` and `torch.compile`: the numbers of the formula written out, or an error.

`test_sequences.py` plays compiled models of every kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastreg import RNNRegularizer
from tests import language_model as lm
from tests.language_model import ALPHA, BATCH, BETA

pytestmark = pytest.mark.usefixtures("dynamo")
each_use = pytest.mark.parametrize("in_backward", [False, True])
each_kind = pytest.mark.parametrize("kind", [nn.GRU, lm.Loop, lm.Elementwise])


def made(kind: Any) -> lm.Model:
    return lm.seeded(lambda: lm.Model(kind)).double()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def batches() -> Iterator[Tensor]:
    """Yield inputs; the first compiles, and a dropout draws the same masks for each on every side."""
    for seed in range(2):
        torch.manual_seed(seed)
        yield lm.tokens(BATCH, 4)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [*model.parameters()])]


def of_formula(model: lm.Model, alpha: float = ALPHA, beta: float = BETA) -> list[Any]:
    """Return the loss and the gradients of plain PyTorch."""
    found = []
    for x in batches():
        decoded, raw, dropped = model.activations(x)
        loss = lm.criterion(decoded, x)
        found.append([loss, *gradients(model, loss + lm.formula(raw, dropped, 1, alpha, beta))])
    return found


def of_hooks(model: lm.Model, run: Any, reg: RNNRegularizer | None = None) -> list[Any]:
    """Return the loss and the gradients of a model that `run` runs; without a regularizer hooks add the penalty."""
    found = []
    for x in batches():
        loss = lm.criterion(run(x), x)
        found.append([loss, *gradients(model, loss if reg is None else reg.on_backward_begin(loss))])
    return found


def assert_same(got: Any, want: list[Any]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@each_use
@each_kind
def test_ten_models_of_a_class_that_was_compiled_before(kind: Any, in_backward: bool) -> None:
    compiled(made(kind))(lm.tokens(BATCH, 4))
    want = of_formula(made(kind))
    for _ in range(10):
        model = made(kind)
        reg = lm.attached(model, in_backward=in_backward)
        assert_same(of_hooks(model, compiled(model), None if in_backward else reg), want)


@each_use
@each_kind
@pytest.mark.parametrize("training", [False, True], ids=["validated", "trained"])
def test_attached_to_a_model_that_was_compiled_and_run(training: bool, kind: Any, in_backward: bool) -> None:
    """As adapters do when a fit starts, and again in a second fit: the penalty, or an error that names the remedy."""
    model, plain = made(kind), made(kind)
    run, want, without = compiled(model), of_formula(plain), of_formula(plain, 0.0, 0.0)
    with torch.set_grad_enabled(training):
        run.train(training)(lm.tokens(BATCH, 4))
    run.train()
    for _ in range(2):
        reg = lm.regularizer()
        with reg.attach(model.rnn, model.dropout, in_backward=in_backward):
            try:
                got = of_hooks(model, run, None if in_backward else reg)
            except RuntimeError as error:
                got = str(error)
        if training and isinstance(got, str):
            assert re.search(r"before torch\.compile|torch\.compiler\.reset", got)
        else:
            assert_same(got, want)
        assert_same(of_hooks(model, run), without)


@pytest.mark.parametrize("kind", [lm.Model, lm.Fused])
def test_a_coefficient_that_changes_compiles_no_code_anew(kind: Any) -> None:
    model, counter = lm.seeded(lambda: kind(lm.Elementwise)), CompileCounterWithBackend("aot_eager")
    reg, run = lm.attached(model), torch.compile(model, backend=counter)
    compilations = []
    for step in range(6):
        reg.alpha = ALPHA + step
        of_hooks(model, run, reg)
        compilations.append(counter.frame_count)
    assert compilations[1:] == compilations[1:2] * 5
