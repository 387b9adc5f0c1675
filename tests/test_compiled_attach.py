"""`RNNRegularizer.attach` and `torch.compile`: the numbers of the formula written out, or an error.

`test_sequences.py` plays compiled models of every kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from fastreg import FusedRNNDropout
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


def played(model: lm.Model, step: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Any]:
    """Return loss and gradients for two batches with seeds; the first compiles. A step returns loss and total loss."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        loss, total = step(lm.tokens(BATCH, 4))
        found.append([loss, *torch.autograd.grad(total, [*model.parameters()])])
    return found


def of_formula(model: lm.Model, alpha: float = ALPHA, beta: float = BETA) -> list[Any]:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        decoded, raw, dropped = model.activations(x)
        return (loss := lm.criterion(decoded, x)), loss + lm.formula(raw, dropped, 1, alpha, beta)

    return played(model, step)


def of_hooks(model: lm.Model, run: Any, add: Callable[[Tensor], Tensor] = Tensor.clone) -> list[Any]:
    return played(model, lambda x: ((loss := lm.criterion(run(x), x)), add(loss)))


def assert_same(got: Any, want: list[Any]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@each
def test_ten_models_of_a_class_that_was_compiled_before(kind: Any, drops: bool) -> None:
    compiled(made(kind, drops))(lm.tokens(BATCH, 4))
    want = of_formula(made(kind, drops))
    for _ in range(10):
        model, reg = made(kind, drops), lm.regularizer()
        reg.attach(model.rnn, model.dropout if drops else None)
        assert_same(of_hooks(model, compiled(model), reg.on_backward_begin), want)


@each
@pytest.mark.parametrize("training", [False, True], ids=["validated", "trained"])
def test_attached_to_a_model_that_was_compiled_and_run(training: bool, kind: Any, drops: bool) -> None:
    """Adapters do this when a fit starts: the penalty is right, or an error names the remedy."""
    model, plain = made(kind, drops), made(kind, drops)
    run, want, without = compiled(model), of_formula(plain), of_formula(plain, 0.0, 0.0)
    with torch.set_grad_enabled(training):
        run.train(training)(lm.tokens(BATCH, 4))
    run.train()
    for _ in range(2):
        reg = lm.regularizer()
        with reg.attach(model.rnn, model.dropout if drops else None):
            try:
                got = of_hooks(model, run, reg.on_backward_begin)
            except RuntimeError as error:
                got = str(error)
        if training and isinstance(got, str):
            assert re.search(r"before torch\.compile|torch\.compiler\.reset", got)
        else:
            assert_same(got, want)
        assert_same(of_hooks(model, run), without)


def test_a_coefficient_that_changes_compiles_no_code_anew() -> None:
    model, counter = made(lm.Elementwise), CompileCounterWithBackend("aot_eager")
    reg, run, compilations = lm.attached(model), torch.compile(model, backend=counter), list[int]()
    for step in range(6):
        reg.alpha = ALPHA + step
        of_hooks(model, run, reg.on_backward_begin)
        compilations.append(counter.frame_count)
    assert compilations[1:] == compilations[1:2] * 5


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
