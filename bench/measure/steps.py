"""Training steps of recurrent models: without AR and TAR, and with each way of adding them.

A step is forward, loss, backward, clipping and SGD, in float32. Each peer trains its own copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bench.measure.formulas import ALPHA, BETA, fastai
from bench.measure.nets import (
    LSTM,
    WORDS,
    Activations,
    AWDLSTMNet,
    Hooked,
    MambaNet,
    MinGRU,
    Net,
    Stack,
    Tanh,
    forget,
    sgd,
)
from bench.measure.timing import Call
from bench.study.awd_lstm import AWDLSTM, Dropouts, LockedDropout
from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar

Add = Callable[[Tensor, Activations], Tensor]  # returns the loss with the penalty
P = 0.1  # the probability of the dropout whose output is regularized
CLIP = 0.25
WITHOUT, BY_HAND = "no penalty", "hooks by hand"
STEP, COMPILED = "step", "compiled step"  # the passes of cases


class Way(NamedTuple):
    """A way of adding the penalty to the loss.

    Attributes:
        start: returns, for a model, the function that adds the penalty to its loss.
        in_hand: whether that function takes the activations, which the step then keeps.
        fused: whether the dropout is a `FusedRNNDropout`.
        hooked: whether forward hooks keep the activations, as for a model that returns only its output.
    """

    start: Callable[[Net], Add]
    in_hand: bool = False
    fused: bool = False
    hooked: bool = False


def by(penalty: Callable[..., Tensor]) -> Way:
    """Add the penalty of each layer by a formula."""
    return Way(
        lambda net: lambda loss, layers: loss + sum(penalty(*layer, ALPHA, BETA) for layer in layers), in_hand=True
    )


def by_call(net: Net) -> Add:
    """Add the penalty of all layers by one call of `fused_ar_tar`."""

    def add(loss: Tensor, layers: Activations) -> Tensor:
        raw, dropped = map(list, zip(*layers, strict=True))
        return loss + fused_ar_tar(raw, dropped, ALPHA, BETA)

    return add


def by_hooks(net: Net) -> Add:
    """Add the penalty by an attached regularizer."""
    regularizer = RNNRegularizer(ALPHA, BETA)
    for rnn, dropout in net.pairs:
        regularizer.attach(rnn, dropout, batch_first=True)
    return lambda loss, _: regularizer.on_backward_begin(loss)


def by_dropout(net: Net) -> Add:
    """Add the penalty that each fused dropout has computed."""
    dropouts: list[Any] = [dropout for _, dropout in net.pairs]
    return lambda loss, _: loss + sum(dropout.take().penalty for dropout in dropouts)


@dataclass(frozen=True)
class Step:
    """A training step of a model; `shape` is the shape of raw, (batch, time, hidden)."""

    PEERS: ClassVar[tuple[str, ...]] = (
        *(WITHOUT, "eager", "compiled", "fused_ar_tar", BY_HAND, "attach", "FusedRNNDropout"),
    )
    OURS: ClassVar[str] = "attach"  # the peer that the others are compared with
    PASS: ClassVar[str] = STEP
    MODEL: ClassVar[str]
    SECONDS: ClassVar[float] = 6  # that the rounds take on a CPU
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        return "-".join([*self.PASS.split(), *self.MODEL.split(), "x".join(map(str, self.shape))])

    @property
    def info(self) -> dict[str, Any]:
        return {"pass": self.PASS, "model": self.MODEL, "shape": self.shape}

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Return the ids of a text."""
        return (torch.randint(WORDS, (self.shape[0], self.shape[1] + 1), device=device),)

    def net(self, dropout: Callable[[], nn.Module]) -> Net:
        raise NotImplementedError

    def peers(self) -> dict[str, Any]:
        ways = {
            WITHOUT: Way(lambda net: lambda loss, _: loss),
            "eager": by(fastai),
            "compiled": by(torch.compile(fastai, dynamic=False)),
            "fused_ar_tar": Way(by_call, in_hand=True),
            BY_HAND: Way(by_call, in_hand=True, hooked=True),
            "attach": Way(by_hooks),
            "FusedRNNDropout": Way(by_dropout, fused=True),
        }
        return {name: ways[name] for name in self.PEERS}

    def prepared(self, loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the function that computes the loss; compiled steps compile it."""
        return loss_of

    def call(self, peer: Any, sets: list[tuple[Tensor, ...]]) -> Call:
        torch.manual_seed(0)
        net = self.net(lambda: FusedRNNDropout(P, ALPHA, BETA) if peer.fused else LockedDropout(P))
        net = Hooked(net) if peer.hooked else net
        net.to(sets[0][0].device)
        add = peer.start(net)
        optimizer = sgd(net)

        def loss_of(batch: tuple[Tensor, ...]) -> Tensor:
            layers: Activations = []
            keep = (lambda *layer: layers.append(layer)) if peer.in_hand else forget
            return add(net(batch, keep), layers)

        prepared, update = self.prepared(loss_of), self.updater(net, optimizer)
        return lambda i: (update(lambda: prepared(sets[i % len(sets)])).detach(),)

    def updater(self, net: Net, optimizer: torch.optim.Optimizer) -> Callable[[Callable[[], Tensor]], Tensor]:
        """Return the function that updates the weights by the loss of a forward, and returns that loss."""

        def update(forward: Callable[[], Tensor]) -> Tensor:
            optimizer.zero_grad()
            loss = forward()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            return loss

        return update


@dataclass(frozen=True)
class StackStep(Step):
    """A step of eight residual layers, with AR and TAR on each."""

    LAYER: ClassVar[Callable[[int], nn.Module]]

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        return torch.randn(self.shape, device=device), torch.randn(self.shape, device=device)

    def net(self, dropout: Callable[[], nn.Module]) -> Net:
        return Stack(self.shape[2], self.LAYER, dropout)


@dataclass(frozen=True)
class MinGRUStep(StackStep):
    MODEL: ClassVar = "8 minGRU layers"
    LAYER: ClassVar = MinGRU
    SECONDS: ClassVar = 20


@dataclass(frozen=True)
class TanhStep(StackStep):
    """A step of elementwise layers, so short that the time of the penalty stands out of the noise."""

    MODEL: ClassVar = "8 elementwise layers"
    LAYER: ClassVar = Tanh
    SECONDS: ClassVar = 20


@dataclass(frozen=True)
class CompiledStep(TanhStep):
    """A step whose model, loss and penalty are compiled as one graph."""

    OURS: ClassVar = "fused_ar_tar"
    PASS: ClassVar = COMPILED
    PEERS: ClassVar = (WITHOUT, "eager", "fused_ar_tar")

    def prepared(self, loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(loss_of, fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class LSTMStep(Step):
    MODEL: ClassVar = "LSTM"

    def net(self, dropout: Callable[[], nn.Module]) -> Net:
        return LSTM(self.shape[2], dropout)


@dataclass(frozen=True)
class AWDLSTMStep(Step):
    """A step of an AWD-LSTM with tied weights, whose last layer is as wide as the embedding."""

    MODEL: ClassVar = "AWD-LSTM"
    SECONDS: ClassVar = 15
    words: int
    hidden: int
    layers: int

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        return (torch.randint(self.words, (self.shape[0], self.shape[1] + 1), device=device),)

    def net(self, dropout: Callable[[], nn.Module]) -> Net:
        ps = Dropouts(word_p=0.1, input_p=0.3, weight_p=0.5, hidden_p=0.25, output_p=P)
        return AWDLSTMNet(AWDLSTM(self.words, self.shape[2], self.hidden, self.layers, ps), dropout)


@dataclass(frozen=True)
class AutocastStep(AWDLSTMStep):
    """A step in bfloat16 autocast, with a scaled loss."""

    MODEL: ClassVar = "AWD-LSTM in autocast"

    def updater(self, net: Net, optimizer: torch.optim.Optimizer) -> Callable[[Callable[[], Tensor]], Tensor]:
        device = next(net.parameters()).device.type
        scaler = torch.amp.GradScaler(device)

        def update(forward: Callable[[], Tensor]) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = forward()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()
            return loss

        return update


@dataclass(frozen=True)
class MambaStep(Step):
    """A step of a Mamba, which has no dropout behind its block that could be fused."""

    PEERS: ClassVar = Step.PEERS[:-1]
    MODEL: ClassVar = "Hugging Face Mamba"

    def net(self, dropout: Callable[[], nn.Module]) -> Net:
        return MambaNet(self.shape[2])


@dataclass(frozen=True)
class LightningStep(LSTMStep):
    """A step of a small LSTM in Lightning, where each way logs AR and TAR once an epoch.

    `attach` is fastreg's callback, `FusedRNNDropout` the callback with that dropout; the others are written by hand.
    """

    MODEL: ClassVar = "LSTM in Lightning"

    def peers(self) -> dict[str, Any]:
        fused = partial(fused_ar_tar, alpha=ALPHA, beta=BETA, return_terms=True)
        terms = {"eager": terms_of, "compiled": torch.compile(terms_of, dynamic=False)}
        terms |= dict.fromkeys(("fused_ar_tar", BY_HAND), fused)
        return {name: (terms.get(name), name) for name in self.PEERS}

    def call(self, peer: Any, sets: list[tuple[Tensor, ...]]) -> Call:
        from bench.measure.lightning_training import in_turns  # Lightning may be missing

        terms, name = peer
        torch.manual_seed(0)
        net = self.net(lambda: FusedRNNDropout(P) if name == "FusedRNNDropout" else LockedDropout(P))
        net = Hooked(net) if name == BY_HAND else net
        return in_turns(net, terms, sets, regularized=name in ("attach", "FusedRNNDropout"))


def terms_of(raw: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the penalty, AR and TAR by the formula."""
    ar, tar = dropped.pow(2).mean(), (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
    return ALPHA * ar + BETA * tar, ar, tar
