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
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from fastreg import FusedRNNDropout, RNNRegularizer
from tests import language_model as lm
from tests.conftest import more
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN

pytestmark = pytest.mark.usefixtures("dynamo")
each = pytest.mark.parametrize(
    ("kind", "drops"),
    [
        (nn.LSTM, True),
        (lm.Elementwise, False),
        pytest.param(nn.LSTM, False, marks=more),
        pytest.param(nn.GRU, True, marks=more),
        pytest.param(lm.Loop, True, marks=more),
        pytest.param(lm.Elementwise, True, marks=more),
    ],
)


def made(kind: Any, drops: bool = True) -> lm.Model:
    return lm.seeded(lambda: lm.Model(kind, p=0.3 if drops else 0.0)).double()


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


def of_hooks(model: lm.Model, run: Any, reg: RNNRegularizer | None) -> list[Any]:
    """Return the loss and the gradients of a model that `run` runs; without a regularizer those of the loss alone."""
    found = []
    for x in batches():
        loss = lm.criterion(run(x), x)
        found.append([loss, *gradients(model, loss if reg is None else reg.on_backward_begin(loss))])
    return found


def assert_same(got: Any, want: list[Any]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@each
def test_ten_models_of_a_class_that_was_compiled_before(kind: Any, drops: bool) -> None:
    compiled(made(kind, drops))(lm.tokens(BATCH, 4))
    want = of_formula(made(kind, drops))
    for _ in range(10):
        model, reg = made(kind, drops), lm.regularizer()
        reg.attach(model.rnn, model.dropout if drops else None)
        assert_same(of_hooks(model, compiled(model), reg), want)


@each
@pytest.mark.parametrize("training", [False, True], ids=["validated", "trained"])
def test_attached_to_a_model_that_was_compiled_and_run(training: bool, kind: Any, drops: bool) -> None:
    """As adapters do when a fit starts, and again in a second fit: the penalty, or an error that names the remedy."""
    model, plain = made(kind, drops), made(kind, drops)
    run, want, without = compiled(model), of_formula(plain), of_formula(plain, 0.0, 0.0)
    with torch.set_grad_enabled(training):
        run.train(training)(lm.tokens(BATCH, 4))
    run.train()
    for _ in range(2):
        reg = lm.regularizer()
        with reg.attach(model.rnn, model.dropout if drops else None):
            try:
                got = of_hooks(model, run, reg)
            except RuntimeError as error:
                got = str(error)
        if training and isinstance(got, str):
            assert re.search(r"before torch\.compile|torch\.compiler\.reset", got)
        else:
            assert_same(got, want)
        assert_same(of_hooks(model, run, None), without)


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


def test_modules_that_are_compiled_already_are_refused() -> None:
    model = lm.seeded(lm.Model)
    with pytest.raises(RuntimeError, match=r"module: .*compiled already; attach\(\) it before torch.compile"):
        lm.regularizer().attach(compiled(model.rnn))
    model.dropout.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"dropout: .*compiled already"):
        lm.regularizer().attach(model.rnn, model.dropout)
    assert not model.rnn._forward_hooks


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_autograd() -> None:  # which fails on PyTorch's own RNNs
    modules, reg = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3)), lm.regularizer()
    loss = want = torch.zeros(())
    for module, dropout in zip(modules, (None, nn.Dropout(0.3), FusedRNNDropout(0.3)), strict=True):
        reg.attach(module, dropout, batch_first=True)
        raw = module(lm.inputs())
        dropped = raw if dropout is None else dropout(raw)
        loss, want = loss + dropped.sin().mean(), want + lm.formula(raw, dropped, 1)
    gradients = torch.autograd.grad(loss + want, [*modules.parameters()], retain_graph=True)
    total = reg.on_backward_begin(loss)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        total.backward()
    torch.testing.assert_close([x.grad for x in modules.parameters()], [*gradients])
