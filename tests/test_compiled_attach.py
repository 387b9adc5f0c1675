"""`RNNRegularizer.attach` before `torch.compile`: the numbers of the formula written out, or the error without it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastreg import FusedRNNDropout, RNNRegularizer
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, Elementwise, Locked, Loop, Wrapper, seeded

pytestmark = pytest.mark.usefixtures("dynamo")

STEPS, P = 4, 0.4
KINDS = ("LSTM", "GRU", "RNN", "cell", "wrapper", "elementwise")
USES = ("one run", "two runs", "first of two", "stepwise", "in_backward")
DROPOUTS = ("none", "plain", "fused")


class Net(nn.Module):
    """Runs a module and its dropout in one of several ways; each item of its output depends on one run."""

    def __init__(self, kind: str, use: str, dropout: str, written_out: bool = False) -> None:
        super().__init__()
        made: dict[str, Any] = {"cell": Loop, "wrapper": Wrapper, "elementwise": Elementwise}
        self.rnn: Any = (made.get(kind) or getattr(nn, kind))(HIDDEN, HIDDEN, batch_first=True)
        self.use, self.by_cell = use, kind == "cell" and use == "stepwise"
        self.used = 1 if use == "first of two" else None  # of the runs, by the loss
        fused: Any = Locked(P) if written_out else FusedRNNDropout(P)
        self.dropout = {"none": None, "plain": nn.Dropout(P), "fused": fused}[dropout]
        self.decoder = nn.Linear(HIDDEN, 2)

    def attach(self, reg: RNNRegularizer) -> Any:
        module = self.rnn.cell if self.by_cell else self.rnn
        return reg.attach(module, self.dropout, stepwise=self.use == "stepwise", in_backward=self.use == "in_backward")

    def activations(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return raw and dropped of each run."""
        if self.use == "stepwise":
            runs, given = x.unbind(1) if self.by_cell else x.split(2, 1), None
        else:
            runs, given = [x, x.flip(1)][: 1 + ("two" in self.use)], None
        raws, kept = [], []
        for run in runs:
            if self.by_cell:
                raw = given = self.rnn.cell(run, given)
            else:
                raw, state = self.rnn(run) if given is None else self.rnn(run, given)
                given = state if self.use == "stepwise" else None
            raws.append(raw)
            kept.append(raw if self.dropout is None else self.dropout(raw))
        return raws, kept

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.decoder(dropped).sin() for dropped in self.activations(x)[1]]

    def formula(self, x: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Return the output, and AR and TAR of each run, or of the runs joined along time."""
        raws, kept = self.activations(x)
        output = [self.decoder(dropped).sin() for dropped in kept]
        if self.use == "stepwise":
            raws, kept = ([(torch.stack if self.by_cell else torch.cat)(x, 1)] for x in (raws, kept))  # pyright: ignore
        return output, [(d.pow(2).mean(), r.diff(dim=1).pow(2).mean()) for r, d in zip(raws, kept, strict=True)]


Numbers = list[Any]  # the loss, AR, TAR and the gradients of the parameters


def batches() -> Iterator[Tensor]:
    """Yield inputs; the first compiles, and a dropout draws the same masks for each on every side."""
    for seed in range(2):
        torch.manual_seed(seed)
        yield torch.randn(BATCH, STEPS, HIDDEN, dtype=torch.float64)


def loss_of(net: Any, output: list[Tensor]) -> Tensor:
    return torch.stack([x.mean() for x in output[: net.used]]).sum()


def of_formula(net: Any, alpha: float = ALPHA, beta: float = BETA) -> list[Numbers]:
    """Return the numbers of plain PyTorch."""
    numbers = []
    for x in batches():
        output, terms = net.formula(x)
        ar, tar = (torch.stack(x).sum() for x in zip(*terms[: net.used], strict=True))
        loss = loss_of(net, output)
        numbers.append([loss, ar, tar, *torch.autograd.grad(loss + alpha * ar + beta * tar, [*net.parameters()])])
    return numbers


def of_hooks(net: Any, model: Any, reg: RNNRegularizer) -> list[Numbers]:
    """Return the numbers of an attached net, and of the model that runs it."""
    numbers = []
    for x in batches():
        output = model(x)
        loss = loss_of(net, output)
        total = loss if net.use == "in_backward" else reg.on_backward_begin(loss)
        numbers.append([loss, reg.ar, reg.tar, *torch.autograd.grad(total, [*net.parameters()])])
    return numbers


def made(*case: Any) -> Any:
    return seeded(lambda: Net(*case)).double()


def compiled(net: nn.Module) -> Any:
    return torch.compile(net, backend="eager")


def attached(net: Any) -> tuple[RNNRegularizer, Any]:
    reg = RNNRegularizer(ALPHA, BETA)
    return reg, net.attach(reg)


def assert_same(got: Any, want: list[Numbers]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# A few cells of each column also run with the oldest and the newest PyTorch.
CELLS = [
    pytest.param(*case, id="-".join(case), marks=() if sum(at) % 5 == 0 else pytest.mark.main)
    for at, case in zip(product(range(6), range(5), range(3)), product(KINDS, USES, DROPOUTS), strict=True)
]


@pytest.mark.parametrize(("kind", "use", "dropout"), CELLS)
def test_a_compiled_model_gets_the_penalty_of_the_formula(kind: str, use: str, dropout: str) -> None:
    for compile_it in (lambda net: net, compiled):
        net = made(kind, use, dropout)
        reg, _ = attached(net)
        if (kind, use, dropout) == ("cell", "stepwise", "fused"):
            with pytest.raises(TypeError, match="use another dropout with stepwise=True"):
                of_hooks(net, compile_it(net), reg)
        else:
            assert_same(of_hooks(net, compile_it(net), reg), of_formula(made(kind, use, dropout, True)))


@pytest.mark.parametrize("use", ["one run", "in_backward"])
@pytest.mark.parametrize("kind", ["GRU", "cell", "elementwise"])
def test_ten_models_of_a_class_that_was_compiled_before(kind: str, use: str) -> None:
    case = kind, use, "plain"
    compiled(made(*case))(next(batches()))
    want = of_formula(made(*case))
    for _ in range(10):
        net = made(*case)
        reg, _handle = attached(net)
        assert_same(of_hooks(net, compiled(net), reg), want)


@pytest.mark.parametrize("use", ["one run", "in_backward"])
@pytest.mark.parametrize("kind", ["GRU", "cell", "elementwise"])
@pytest.mark.parametrize("training", [False, True], ids=["validated", "trained"])
def test_attached_to_a_model_that_was_compiled_and_run(training: bool, kind: str, use: str) -> None:
    """As adapters do when a fit starts, and again in a second fit: the penalty, or an error that names the remedy."""
    net, plain = made(kind, use, "plain"), made(kind, use, "plain")
    model, want, without = compiled(net), of_formula(plain), of_formula(plain, 0.0, 0.0)
    with torch.set_grad_enabled(training):
        model.train(training)(next(batches()))
    model.train()
    for _ in range(2):
        reg, handle = attached(net)
        try:
            got = of_hooks(net, model, reg)
        except RuntimeError as error:
            got = str(error)
        if training and isinstance(got, str):
            assert re.search(r"before torch\.compile|torch\.compiler\.reset", got)
        else:
            assert_same(got, want)
        handle.remove()
        for x, numbers in zip(batches(), without, strict=True):
            gradients = torch.autograd.grad(loss_of(net, model(x)), [*net.parameters()])
            assert_same([[*gradients]], [numbers[3:]])


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_a_coefficient_that_changes_compiles_no_code_anew(dropout: str) -> None:
    net, counter = made("elementwise", "one run", dropout), CompileCounterWithBackend("aot_eager")
    reg, _ = attached(net)
    model = torch.compile(net, backend=counter)
    compilations = []
    for step in range(6):
        reg.alpha = ALPHA + step
        of_hooks(net, model, reg)
        compilations.append(counter.frame_count)
    assert compilations[1:] == compilations[1:2] * 5
