"""Training steps of recurrent models, by each way of adding AR and TAR to the loss: `pytest bench/test_step.py`.

A step is forward, loss, backward, clipping and SGD, in float32. On a CPU it runs on one thread, whose CPU time is
measured. Before a way is timed, its penalty and the gradients of all weights are compared with those by the formula.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.conftest import in_turns, name
from bench.measure import before, figures, nets, timing
from bench.measure.formulas import ALPHA, BETA, fastai
from bench.measure.nets import Activations, Batch, MakeDropout, Net, Stack
from bench.measure.timing import DEVICE
from bench.study.awd_lstm import LockedDropout
from examples.every_layer import MinGRU

pytestmark = in_turns
Measure = Callable[..., None]
Add = Callable[[Tensor, Activations], Tensor]  # (loss, raw and dropped of each layer) -> loss with the penalty
LEARNING_RATE, CLIP = 0.01, 0.25
STEP_THREADS = 1 if DEVICE == "cpu" else torch.get_num_threads()
TURN = 0.02  # seconds that a turn takes on a CPU at least
ERROR, HALF_ERROR = 5e-4, 2e-2  # of the penalty and its gradients in float32, and of the penalty in bfloat16
CPU_NOISE, NOISE = 2e-6, 2e-2  # of all gradients; a GPU's recurrent layers compute in TF32


class Way(NamedTuple):
    """A way of adding the penalty to the loss."""

    start: Callable[[Net], Add]  # returns, for a model, the function that adds the penalty to its loss
    in_hand: bool = False  # whether that function takes the activations, which the step then keeps
    dropout: MakeDropout = partial(LockedDropout, nets.P)  # makes the dropouts whose outputs are regularized
    checked: MakeDropout | None = None  # makes them for the check, where those draw other masks from a seed


def by(penalty: Callable[..., Tensor]) -> Way:
    """Add the penalty of each layer: (raw, dropped, alpha, beta) -> penalty."""
    return Way(lambda net: lambda loss, layers: loss + sum(penalty(*layer, ALPHA, BETA) for layer in layers), True)


DROPOUT = LockedDropout(nets.P)


def dropout_and_formula(raw: Tensor) -> tuple[Tensor, Tensor]:
    dropped = DROPOUT(raw)
    return dropped, fastai(raw, dropped, ALPHA, BETA)


class CompiledDropout(nn.Module):
    """Variational dropout, compiled as one function with the formula, whose penalty it keeps for the loss."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.both = torch.compile(dropout_and_formula, dynamic=False, backend=backend)  # layers share the code

    def forward(self, raw: Tensor) -> Tensor:
        dropped, self.penalty = self.both(raw)
        return dropped


def by_compiled_dropout(net: Net) -> Add:
    dropouts: list[Any] = [dropout for _, dropout in net.pairs]
    return lambda loss, _: loss + sum(dropout.penalty for dropout in dropouts)


INDUCTOR, CHECKED = (partial(CompiledDropout, backend) for backend in ("inductor", "aot_eager"))


def ours(package: Any) -> dict[str, Way]:
    """Return the ways of fastreg: a call, `attach`, and a fused dropout."""

    def by_call(net: Net) -> Add:
        def add(loss: Tensor, layers: Activations) -> Tensor:
            raw, dropped = map(list, zip(*layers, strict=True))
            return loss + package.fused_ar_tar(raw, dropped, ALPHA, BETA)

        return add

    def by_hooks(net: Net) -> Add:
        regularizer = package.RNNRegularizer(ALPHA, BETA)
        for rnn, dropout in net.pairs:
            regularizer.attach(rnn, dropout, batch_first=True)
        return lambda loss, _: regularizer.on_backward_begin(loss)

    def by_dropout(net: Net) -> Add:
        dropouts: list[Any] = [dropout for _, dropout in net.pairs]
        return lambda loss, _: loss + sum(dropout.take().penalty for dropout in dropouts)

    fused = partial(package.FusedRNNDropout, nets.P, ALPHA, BETA)
    return {
        "fused_ar_tar": Way(by_call, in_hand=True),
        "attach": Way(by_hooks),
        "FusedRNNDropout": Way(by_dropout, dropout=fused),
    }


# The ways that are compared; `by(my_penalty)` makes one of your own.
WITHOUT = "no penalty"
WAYS: dict[str, Way] = {
    WITHOUT: Way(lambda net: lambda loss, _: loss),
    "eager": by(fastai),
    "compiled": by(torch.compile(fastai, dynamic=False)),
    "compiled with dropout": Way(by_compiled_dropout, dropout=INDUCTOR, checked=CHECKED),
    **before.both(ours),
}


class Model(NamedTuple):
    """A model that is trained."""

    make: Callable[[int, MakeDropout], Net]  # of a hidden size and a function that makes its dropouts
    shapes: list[tuple[int, int, int]]  # of raw, (batch, time, hidden)
    seconds: float = 2.0  # multiplies `--benchmark-max-time`; long steps need more for equal errors


TREEBANK = (64, 70, 400) if DEVICE == "cuda" else (20, 70, 400)
MORE = [(16, 512, 512)] if DEVICE == "cuda" else []
MODELS = {
    "AWD-LSTM": Model(nets.AWDLSTMNet, [TREEBANK], seconds=6.0),
    "LSTM": Model(nets.LSTM, [(16, 35, 60), (8, 10, 16)]),
    "8 elementwise layers": Model(partial(Stack, nets.Tanh), [(4, 256, 256), (4, 512, 512), *MORE], seconds=3.0),
    "8 minGRU layers": Model(partial(Stack, MinGRU), [(4, 256, 256), *MORE], seconds=7.0),
}


class Training:
    """A model in training, with raw of a shape and with a way of adding the penalty.

    A compiler makes one graph of the model's forward, the loss and the penalty. Half precision is autocast to bfloat16,
    with a scaled loss.
    """

    def __init__(
        self, model: str, shape: tuple[int, ...], way: Way, compiler: str | None = None, half: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.half = half
        self.net = net = MODELS[model].make(shape[2], way.dropout).to(DEVICE)
        add = way.start(net)

        def loss_of(batch: Batch) -> Tensor:
            layers: Activations = []
            return add(net(batch, lambda *layer: layers.append(layer) if way.in_hand else None), layers)

        self.loss_of = torch.compile(loss_of, fullgraph=True, dynamic=False, backend=compiler) if compiler else loss_of
        torch.manual_seed(0)
        self.batch = net.batch(shape)  # of each step

    def loss(self) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.half):
            return self.loss_of(self.batch)

    def loss_and_gradients(self) -> Tensor:
        """Return the loss, and the gradients of all weights, from one seed, as one vector."""
        torch.manual_seed(1)
        loss = self.loss()
        gradients = torch.autograd.grad(loss, [x for x in self.net.parameters() if x.requires_grad], allow_unused=True)
        return torch.cat([loss.detach().view(1), *(x.flatten() for x in gradients if x is not None)]).double()

    def step(self) -> Callable[[], Tensor]:
        """Return a function that makes a training step."""
        optimizer, scaler = sgd(self.net), torch.amp.GradScaler(DEVICE, enabled=self.half)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()
            return loss.detach()

        return step


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), LEARNING_RATE)


@functools.lru_cache(maxsize=1)
def expected(model: str, shape: tuple[int, ...], half: bool) -> tuple[Tensor, Tensor]:
    """Return the loss and gradients without the penalty, and the differences that the eager formula makes."""
    torch.compiler.reset()  # a new case
    ways = WAYS[WITHOUT], WAYS["eager"]
    without, formula = (Training(model, shape, way, half=half).loss_and_gradients() for way in ways)
    return without, formula - without


def check(got: Tensor, want: Tensor, error: float, noise: float = 0.0) -> None:
    """Compare the values that a way and the formula add, relative to the greatest, and beyond the noise."""
    off = (((got - want).abs().max() - noise) / want.abs().max()).item()
    assert off < error, f"adds something else than the formula: off by {off:.1e}"


@functools.lru_cache(maxsize=1)
def calls_of(model: str, shape: tuple[int, ...]) -> int:
    """Return how many steps make a turn of at least 20 ms."""
    step = Training(model, shape, WAYS[WITHOUT]).step()
    step()
    began = time.perf_counter()
    step()
    return 10 if DEVICE == "cuda" else math.ceil(TURN / (time.perf_counter() - began))


def run(measure: Measure, model: str, shape: tuple[int, ...], whole: bool = False, half: bool = False) -> None:
    """Check each way, and measure steps by it."""

    def prepare(way: str) -> Any:
        chosen = WAYS[way]
        if way != WITHOUT:
            without, want = expected(model, shape, half)
            # Inductor's code draws other dropout masks from a seed; the graph before it draws PyTorch's masks.
            checked = chosen._replace(dropout=chosen.checked or chosen.dropout)
            got = Training(model, shape, checked, "aot_eager" if whole else None, half).loss_and_gradients() - without
            check(got[:1], want[:1], HALF_ERROR if half else ERROR)
            noise = NOISE if half or DEVICE == "cuda" else CPU_NOISE
            check(got[1:], want[1:], ERROR, noise * without[1:].abs().max().item())
        step = Training(model, shape, chosen, "inductor" if whole else None, half).step()
        peak = figures.peak_bytes(lambda _: (step(),), DEVICE)
        return step, {"peak_bytes": peak} if peak else {}

    about = {"pass": "compiled step" if whole else "step", "model": model + " in autocast" * half, "shape": shape}
    about |= {"dropout": "variational"}
    with timing.threads(STEP_THREADS):
        measure(prepare, about, calls=calls_of(model, shape), seconds=MODELS[model].seconds, own=DEVICE == "cpu")


@pytest.mark.first
@pytest.mark.skipif(DEVICE == "cpu", reason="measured on a GPU")
@pytest.mark.parametrize("way", WAYS, ids=name)
def test_step_in_autocast(measure: Measure) -> None:
    run(measure, "AWD-LSTM", TREEBANK, half=True)


@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize(("model", "shape"), [(model, x) for model in MODELS for x in MODELS[model].shapes], ids=name)
def test_step(measure: Measure, model: str, shape: Any) -> None:
    run(measure, model, shape)


WHOLE = [way for way in WAYS if way.removesuffix(before.BEFORE) in (WITHOUT, "eager", "fused_ar_tar")]


@pytest.mark.parametrize("way", WHOLE, ids=name)
@pytest.mark.parametrize("shape", [(16, 35, 60)], ids=name)
def test_compiled_step(measure: Measure, shape: Any) -> None:
    """A step whose model, loss and penalty are compiled as one graph."""
    run(measure, "8 elementwise layers", shape, whole=True)
