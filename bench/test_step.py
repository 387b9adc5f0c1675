"""Training steps of recurrent models, by each way of adding AR and TAR to the loss: `pytest bench/test_step.py`.

The base of a case is the same step without a penalty and with the user's own dropout. A step is forward, loss,
backward, clipping and SGD, in float32.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.conftest import in_turns, name
from bench.measure import before, figures, nets, timing
from bench.measure.before import ELEMENTWISE, VARIATIONAL
from bench.measure.formulas import ALPHA, BETA, fastai, tight, two_line_dropout
from bench.measure.nets import Activations, Batch, MakeDropout, Net, Stack
from bench.measure.results import CALL_COMPILED, STEP, WITHOUT
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
OWN: dict[str, MakeDropout] = {
    VARIATIONAL: partial(LockedDropout, nets.P),
    ELEMENTWISE: partial(nn.Dropout, nets.P),
}


class Way(NamedTuple):
    """A way of adding the penalty to the loss."""

    start: Callable[[Net], Add]  # returns, for a model, the function that adds the penalty to its loss
    in_hand: bool = False  # whether that function takes the activations, which the step then keeps
    dropout: MakeDropout | None = None  # makes the dropouts that are regularized, unless they are the user's own
    alone: MakeDropout | None = None  # makes dropouts without a penalty that draw the masks of these
    compiles: Literal["", "dropout", "step"] = ""  # what one compiler gets together with the formula


def by(penalty: Callable[..., Tensor]) -> Way:
    """Add the penalty of each layer: (raw, dropped, alpha, beta) -> penalty."""
    return Way(lambda net: lambda loss, layers: loss + sum(penalty(*layer, ALPHA, BETA) for layer in layers), True)


class TwoLineDropout(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return two_line_dropout(raw, nets.P)


class CompiledDropout(nn.Module):
    """A dropout that is compiled as one function with the formula, whose penalty it keeps for the loss."""

    def __init__(self, both: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.both = both

    def forward(self, raw: Tensor) -> Tensor:
        dropped, self.penalty = self.both(raw)
        return dropped


def compiled_with_formula(dropout: nn.Module, compiler: str) -> MakeDropout:
    """Compile a dropout and the formula as one function, whose code all layers share."""

    def both(raw: Tensor) -> tuple[Tensor, Tensor]:
        dropped = dropout(raw)
        return dropped, fastai(raw, dropped, ALPHA, BETA)

    return partial(CompiledDropout, torch.compile(both, dynamic=False, backend=compiler))


def by_dropouts(penalty_of: Callable[[Any], Tensor]) -> Callable[[Net], Add]:
    """Add the penalties that the dropouts have computed."""
    return lambda net: lambda loss, _: loss + sum(penalty_of(dropout) for _, dropout in net.pairs)


def by_nothing(net: Net) -> Add:
    return lambda loss, _: loss


def ours(kind: str, package: Any) -> dict[str, Way]:
    """Return the ways of fastreg: a call, `attach`, and a fused dropout, also one without a penalty."""

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

    fused = partial(before.fused_dropout, package, kind, nets.P)
    alone = partial(fused, 0, 0)
    taken = by_dropouts(lambda dropout: dropout.take().penalty)
    return {
        "fused_ar_tar": Way(by_call, in_hand=True),
        CALL_COMPILED: Way(by_call, in_hand=True, compiles="step"),
        "attach": Way(by_hooks),
        "fused dropout": Way(taken, dropout=partial(fused, ALPHA, BETA), alone=alone),
        "fused dropout alone": Way(by_nothing, dropout=alone),
    }


def ways(kind: str) -> dict[str, Way]:
    """Return the ways that are compared where the user's own dropout is of a kind."""
    two_lines = {"two-line dropout": Way(by_nothing, dropout=TwoLineDropout)}
    return {
        WITHOUT: Way(by_nothing),
        **(two_lines if kind == ELEMENTWISE else {}),
        "eager": by(fastai),
        "tight": by(tight),
        "compiled": by(torch.compile(fastai, dynamic=False)),
        "compiled with dropout": Way(by_dropouts(lambda dropout: dropout.penalty), compiles="dropout"),
        "compiled step": by(fastai)._replace(compiles="step"),
        **before.both(partial(ours, kind)),
    }


WAYS = {kind: ways(kind) for kind in OWN}  # `by(my_penalty)` makes one of your own


class Model(NamedTuple):
    """A model that is trained."""

    make: Callable[[int, MakeDropout], Net]  # of a hidden size and a function that makes its dropouts
    seconds: float = 2.0  # multiplies `--benchmark-max-time`; long steps need more for equal errors
    half: bool = False  # autocast to bfloat16


MODELS = {
    "LSTM": Model(nets.LSTM, seconds=4.0),
    "AWD-LSTM": Model(nets.AWDLSTMNet, seconds=6.0),
    "AWD-LSTM in autocast": Model(nets.AWDLSTMNet, seconds=6.0, half=True),
    "8 elementwise layers": Model(partial(Stack, nets.Tanh), seconds=3.0),
    "8 minGRU layers": Model(partial(Stack, MinGRU), seconds=4.0),
}


class Case(NamedTuple):
    """What all ways train: a model, the shape of raw, `(batch, time, hidden)`, and the kind of its dropout."""

    model: str
    shape: tuple[int, int, int]
    kind: str


TREEBANK = (64, 70, 400) if DEVICE == "cuda" else (20, 70, 400)
HEADLINES = [
    *(Case("LSTM", shape, ELEMENTWISE) for shape in ((8, 40, 64), (16, 70, 200), (20, 70, 400))),
    Case("8 elementwise layers", (4, 256, 256), VARIATIONAL),
    Case("8 elementwise layers", (4, 512, 512), VARIATIONAL),
    Case("8 elementwise layers", (4, 512, 512), ELEMENTWISE),
    Case("8 minGRU layers", (4, 128, 128), ELEMENTWISE),
]
OTHERS = [
    Case("AWD-LSTM", TREEBANK, VARIATIONAL),
    *(Case("LSTM", shape, VARIATIONAL) for shape in ((8, 10, 16), (16, 35, 60), (16, 70, 200))),
    Case("8 elementwise layers", (4, 256, 256), ELEMENTWISE),
]
FIRST = []
if DEVICE == "cuda":
    OTHERS += [Case(model, (16, 512, 512), ELEMENTWISE) for model in ("8 elementwise layers", "8 minGRU layers")]
    FIRST = [Case("AWD-LSTM in autocast", TREEBANK, VARIATIONAL)]


class Training:
    """A model in training with a way of adding the penalty, and a compiler for what the way compiles with it."""

    def __init__(self, case: Case, way: Way, compiler: str = "inductor") -> None:
        torch.manual_seed(0)
        self.model, dropout = MODELS[case.model], way.dropout or OWN[case.kind]
        dropout = compiled_with_formula(dropout(), compiler) if way.compiles == "dropout" else dropout
        self.net = net = self.model.make(case.shape[2], dropout).to(DEVICE)
        add = way.start(net)

        def loss_of(batch: Batch) -> Tensor:
            layers: Activations = []
            return add(net(batch, lambda *layer: layers.append(layer) if way.in_hand else None), layers)

        recurrent = any(isinstance(module, nn.LSTM) for module in net.modules())  # which no compiler takes
        compiled = partial(torch.compile, fullgraph=not recurrent, dynamic=False, backend=compiler)
        self.loss_of = compiled(loss_of) if way.compiles == "step" else loss_of
        torch.manual_seed(0)
        self.batch = net.batch(case.shape)  # of each step

    def loss(self) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.model.half):
            return self.loss_of(self.batch)

    def loss_and_gradients(self) -> Tensor:
        """Return the loss, and the gradients of all weights, from one seed, as one vector."""
        torch.manual_seed(1)
        loss = self.loss()
        gradients = torch.autograd.grad(loss, [x for x in self.net.parameters() if x.requires_grad], allow_unused=True)
        return torch.cat([loss.detach().view(1), *(x.flatten() for x in gradients if x is not None)]).double()

    def step(self) -> Callable[[], Tensor]:
        """Return a function that makes a training step."""
        optimizer = torch.optim.SGD(self.net.parameters(), LEARNING_RATE)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
            optimizer.step()
            return loss.detach()

        return step


@functools.lru_cache(maxsize=2)
def expected(case: Case, dropout: MakeDropout | None) -> tuple[Tensor, Tensor]:
    """Return the loss and gradients without the penalty, and the differences that the eager formula makes."""
    plain, formula = (Training(case, way._replace(dropout=dropout)) for way in (Way(by_nothing), by(fastai)))
    without = plain.loss_and_gradients()
    return without, formula.loss_and_gradients() - without


def compare(got: Tensor, want: Tensor, error: float, noise: float = 0.0) -> None:
    """Compare the values that a way and the formula add, relative to the greatest, and beyond the noise."""
    off = (((got - want).abs().max() - noise) / want.abs().max()).item()
    assert off < error, f"adds something else than the formula: off by {off:.1e}"


def check(case: Case, way: Way) -> None:
    """Compare what a way adds to the loss and the gradients with what the formula adds by the same dropout masks."""
    without, want = expected(case, way.alone)
    # Inductor's code draws other dropout masks from a seed; the graph before it draws PyTorch's masks.
    got = Training(case, way, "aot_eager").loss_and_gradients() - without
    half = MODELS[case.model].half
    compare(got[:1], want[:1], HALF_ERROR if half else ERROR)
    noise = NOISE if half or DEVICE == "cuda" else CPU_NOISE
    compare(got[1:], want[1:], ERROR, noise * without[1:].abs().max().item())


@functools.lru_cache(maxsize=1)
def calls_of(case: Case) -> int:
    """Return how many steps make a turn of at least 20 ms."""
    torch.compiler.reset()  # a new case
    step = Training(case, Way(by_nothing)).step()
    step()
    began = time.perf_counter()
    step()
    return 10 if DEVICE == "cuda" else math.ceil(TURN / (time.perf_counter() - began))


def params(cases: list[Case], *marks: pytest.MarkDecorator) -> list[Any]:
    """Mark the ways of cases, except one, which by construction takes as long as the compiled step."""
    return [pytest.param(*case, way, marks=marks * (way != CALL_COMPILED)) for case in cases for way in WAYS[case.kind]]


CASES = params(FIRST, pytest.mark.first) + params(HEADLINES, pytest.mark.headline) + params(OTHERS)


@pytest.mark.parametrize(("model", "shape", "kind", "way"), CASES, ids=name)
def test_step(measure: Measure, model: str, shape: Any, kind: str) -> None:
    case, ways = Case(model, shape, kind), WAYS[kind]

    def prepare(way: str) -> Any:
        if ways[way].start is not by_nothing:
            check(case, ways[way])
        step = Training(case, ways[way]).step()
        peak = figures.peak_bytes(lambda _: (step(),), DEVICE)
        return step, {"peak_bytes": peak} if peak else {}

    about = {"pass": STEP, "model": model, "shape": shape, "dropout": kind}
    with timing.threads(STEP_THREADS):
        measure(prepare, about, calls=calls_of(case), seconds=MODELS[model].seconds, own=DEVICE == "cpu")
