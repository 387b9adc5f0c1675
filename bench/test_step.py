"""Training steps of recurrent models, by each way of adding AR and TAR to the loss: `pytest bench/test_step.py`.

The base of a case is the same step without a penalty and with the user's own dropout. A step is forward, loss,
backward, clipping and SGD, in float32. On a CPU it runs on one thread, whose CPU time is measured. Before a way is
timed, its penalty and the gradients of all weights are compared with those by the formula.
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
from bench.measure.before import ELEMENTWISE, VARIATIONAL
from bench.measure.formulas import ALPHA, BETA, fastai, tight, two_line_dropout
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
OWN: dict[str, MakeDropout] = {
    VARIATIONAL: partial(LockedDropout, nets.P),
    ELEMENTWISE: partial(nn.Dropout, nets.P),
}


class Way(NamedTuple):
    """A way of adding the penalty to the loss."""

    start: Callable[[Net], Add]  # returns, for a model, the function that adds the penalty to its loss
    in_hand: bool = False  # whether that function takes the activations, which the step then keeps
    dropout: MakeDropout | None = (
        None  # makes the dropouts whose outputs are regularized, unless they are the user's own
    )
    checked: MakeDropout | None = None  # makes them for the check, where those draw other masks from a seed
    alone: MakeDropout | None = None  # makes dropouts without a penalty that draw the masks of these
    whole: bool = False  # whether one compiler gets the forward, the loss and the penalty


def by(penalty: Callable[..., Tensor]) -> Way:
    """Add the penalty of each layer: (raw, dropped, alpha, beta) -> penalty."""
    return Way(lambda net: lambda loss, layers: loss + sum(penalty(*layer, ALPHA, BETA) for layer in layers), True)


class TwoLineDropout(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return two_line_dropout(raw, nets.P)


class CompiledDropout(nn.Module):
    """A dropout that is compiled as one function with the formula, whose penalty it keeps for the loss."""

    def __init__(self, dropout: nn.Module, backend: str) -> None:
        super().__init__()
        self.both = compiled_with_formula(dropout, backend)

    def forward(self, raw: Tensor) -> Tensor:
        dropped, self.penalty = self.both(raw)
        return dropped


@functools.cache
def compiled_with_formula(dropout: nn.Module, backend: str) -> Any:
    """Compile a dropout and the formula; layers with the same dropout share the code."""

    def both(raw: Tensor) -> tuple[Tensor, Tensor]:
        dropped = dropout(raw)
        return dropped, fastai(raw, dropped, ALPHA, BETA)

    return torch.compile(both, dynamic=False, backend=backend)


def by_compiled_dropout(net: Net) -> Add:
    dropouts: list[Any] = [dropout for _, dropout in net.pairs]
    return lambda loss, _: loss + sum(dropout.penalty for dropout in dropouts)


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

    def by_dropout(net: Net) -> Add:
        dropouts: list[Any] = [dropout for _, dropout in net.pairs]
        return lambda loss, _: loss + sum(dropout.take().penalty for dropout in dropouts)

    found = {"fused_ar_tar": Way(by_call, in_hand=True), "attach": Way(by_hooks)}
    fused = before.fused_dropout(package, kind)
    if fused is None:
        return found
    alone = partial(fused, nets.P, 0, 0)
    own = {"fused dropout": Way(by_dropout, dropout=partial(fused, nets.P, ALPHA, BETA), alone=alone)}
    return found | own | {"fused dropout alone": Way(by_nothing, dropout=alone, alone=alone)}


def by_nothing(net: Net) -> Add:
    return lambda loss, _: loss


def ways(kind: str) -> dict[str, Way]:
    """Return the ways that are compared where the user's own dropout is of a kind."""
    own = OWN[kind]()
    inductor, checked = (partial(CompiledDropout, own, backend) for backend in ("inductor", "aot_eager"))
    two_lines = {"two-line dropout": Way(by_nothing, dropout=TwoLineDropout, alone=TwoLineDropout)}
    return {
        WITHOUT: Way(by_nothing),
        **(two_lines if kind == ELEMENTWISE else {}),
        "eager": by(fastai),
        "tight": by(tight),
        "compiled": by(torch.compile(fastai, dynamic=False)),
        "compiled with dropout": Way(by_compiled_dropout, dropout=inductor, checked=checked),
        "compiled step": by(fastai)._replace(whole=True),
        **before.both(partial(ours, kind)),
    }


WITHOUT = "no penalty"
WAYS = {kind: ways(kind) for kind in OWN}  # `by(my_penalty)` makes one of your own


class Model(NamedTuple):
    """A model that is trained."""

    make: Callable[[int, MakeDropout], Net]  # of a hidden size and a function that makes its dropouts
    seconds: float = 2.0  # multiplies `--benchmark-max-time`; long steps need more for equal errors


MODELS = {
    "LSTM": Model(nets.LSTM, seconds=4.0),
    "AWD-LSTM": Model(nets.AWDLSTMNet, seconds=6.0),
    "8 elementwise layers": Model(partial(Stack, nets.Tanh), seconds=3.0),
    "8 minGRU layers": Model(partial(Stack, MinGRU), seconds=4.0),
}


class Case(NamedTuple):
    """What all ways train: a model, the shape of raw, `(batch, time, hidden)`, and the kind of its dropout."""

    model: str
    shape: tuple[int, int, int]
    kind: str
    half: bool = False  # autocast to bfloat16, with a scaled loss


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
if DEVICE == "cuda":
    OTHERS += [Case(model, (16, 512, 512), ELEMENTWISE) for model in ("8 elementwise layers", "8 minGRU layers")]


class Training:
    """A model in training with a way of adding the penalty; a way that is compiled as a whole needs a compiler."""

    def __init__(self, case: Case, way: Way, compiler: str = "inductor") -> None:
        torch.manual_seed(0)
        self.half = case.half
        self.net = net = MODELS[case.model].make(case.shape[2], way.dropout or OWN[case.kind]).to(DEVICE)
        add = way.start(net)

        def loss_of(batch: Batch) -> Tensor:
            layers: Activations = []
            return add(net(batch, lambda *layer: layers.append(layer) if way.in_hand else None), layers)

        recurrent = any(isinstance(module, nn.LSTM) for module in net.modules())  # which no compiler takes
        compiled = partial(torch.compile, fullgraph=not recurrent, dynamic=False, backend=compiler)
        self.loss_of = compiled(loss_of) if way.whole else loss_of
        torch.manual_seed(0)
        self.batch = net.batch(case.shape)  # of each step

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
    checked = Training(case, way._replace(dropout=way.checked or way.dropout), "aot_eager")
    got = checked.loss_and_gradients() - without
    compare(got[:1], want[:1], HALF_ERROR if case.half else ERROR)
    noise = NOISE if case.half or DEVICE == "cuda" else CPU_NOISE
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


def run(measure: Measure, case: Case, found: dict[str, Way], kind: str = "step") -> None:
    """Check each way, and measure steps by it."""

    def prepare(way: str) -> Any:
        if found[way].start is not by_nothing:
            check(case, found[way])
        step = Training(case, found[way]).step()
        peak = figures.peak_bytes(lambda _: (step(),), DEVICE)
        return step, {"peak_bytes": peak} if peak else {}

    about = {"pass": kind, "model": case.model + " in autocast" * case.half, "shape": case.shape, "dropout": case.kind}
    with timing.threads(STEP_THREADS):
        measure(prepare, about, calls=calls_of(case), seconds=MODELS[case.model].seconds, own=DEVICE == "cpu")


@pytest.mark.first
@pytest.mark.skipif(DEVICE == "cpu", reason="measured on a GPU")
@pytest.mark.parametrize("way", WAYS[VARIATIONAL], ids=name)
def test_step_in_autocast(measure: Measure) -> None:
    run(measure, Case("AWD-LSTM", TREEBANK, VARIATIONAL, half=True), WAYS[VARIATIONAL])


def params(cases: list[Case], **options: Any) -> list[Any]:
    return [pytest.param(*case[:3], way, **options) for case in cases for way in WAYS[case.kind]]


CASES = params(HEADLINES, marks=pytest.mark.headline) + params(OTHERS)


@pytest.mark.parametrize(("model", "shape", "kind", "way"), CASES, ids=name)
def test_step(measure: Measure, model: str, shape: Any, kind: str) -> None:
    run(measure, Case(model, shape, kind), WAYS[kind])


WHOLE = {
    way: found._replace(whole=True)
    for way, found in WAYS[VARIATIONAL].items()
    if way.removesuffix(before.BEFORE) in (WITHOUT, "eager", "fused_ar_tar")
}


@pytest.mark.parametrize("way", WHOLE, ids=name)
@pytest.mark.parametrize("shape", [(16, 35, 60)], ids=name)
def test_compiled_step(measure: Measure, shape: Any) -> None:
    """A step whose model, loss and penalty are compiled as one graph."""
    run(measure, Case("8 elementwise layers", shape, VARIATIONAL), WHOLE, "compiled step")
