"""Penalties that are lost without an error: training that has to be warned of, and training that must not be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastreg import FusedRNNDropout
from tests import language_model as lm
from tests.attach import cp, frozen, no_grad, reentrant, steps
from tests.language_model import PLAIN, Attached, each_dropout, inputs, warned

LIMIT = 100


def alarms(step: Callable[[], Any], count: int = 130) -> dict[int, str]:
    """Return the warnings of many steps, by the number of the step, which counts from 1."""
    return {i: message for i in range(1, count + 1) for message in warned(step)[1]}


class Model(Attached):
    """A module that is trained, with a GRU beside it that is attached at the first use."""

    def loss(self) -> Tensor:
        return self(inputs()).loss

    def regularized(self, loss: Tensor) -> None:
        self.reg.on_backward_begin(loss).backward()

    def right(self) -> None:
        self.regularized(self.loss())

    def beside(self) -> Tensor:
        if not hasattr(self, "other"):
            self.other = lm.gru()
            self.reg.attach(self.other)
        return self.other(inputs())[0].sum()

    def of_a_copy_after_a_frozen_stage(self) -> Tensor:
        if not hasattr(self, "twin"):
            frozen(self).right()
            self.twin = copy.deepcopy(self.rnn).requires_grad_(True)
        raw, _ = self.twin(inputs())
        return self.end(raw, self.dropout(raw)).loss

    def forgotten(self) -> None:
        self.loss().backward()

    def forgotten_and_attached_anew(self) -> None:
        self.forgotten()
        self.handle.remove()
        self.handle = self.attach()

    def forgotten_and_the_losses_kept(self) -> None:  # for a mean over the epoch, which keeps every graph
        self.losses = [*getattr(self, "losses", []), self.loss()]
        self.losses[-1].backward()

    def forgotten_in_a_gan_that_freezes_its_generator(self) -> None:
        self.rnn.requires_grad_(False)
        loss = self.loss()  # of the critic
        assert self.reg.on_backward_begin(loss) is loss
        self.rnn.requires_grad_(True)
        self.forgotten()

    def result_not_used(self) -> None:
        self.reg.on_backward_begin(loss := self.loss())
        loss.backward()

    def in_evaluation_beside_another(self) -> None:
        self.rnn.eval()
        self.dropout.eval()
        self.regularized(self.loss() + self.beside())


# Steps that lose each penalty of the LSTM
LOSING: dict[str, Callable[[Model], None]] = {
    "forgotten": Model.forgotten,
    "forgotten and attached anew": Model.forgotten_and_attached_anew,
    "forgotten, and the losses kept": Model.forgotten_and_the_losses_kept,
    "forgotten in a GAN that freezes its generator": Model.forgotten_in_a_gan_that_freezes_its_generator,
    "the result is not used": Model.result_not_used,
    "copied after a frozen stage": lambda m: m.regularized(m.of_a_copy_after_a_frozen_stage()),
}
# ... although the GRU beside it is trained
BESIDE: dict[str, Callable[[Model], None]] = {
    "raw for dropped": lambda m: m.regularized(m(inputs()).raw.sum() + m.beside()),
    "never called": lambda m: m.regularized(m.beside()),
    "in evaluation": Model.in_evaluation_beside_another,
    "copied after a frozen stage": lambda m: m.regularized(m.of_a_copy_after_a_frozen_stage() + m.beside()),
    "in a reentrant checkpoint": lambda m: m.regularized(reentrant(m, inputs()) + m.beside()),
}


@each_dropout
@pytest.mark.parametrize(("rights", "alpha"), [(0, 2), (25, 2), (60, 0)], ids=["first", "trained", "warmed up"])
@pytest.mark.parametrize("step", LOSING)
def test_a_lost_penalty_is_warned_of_once(step: str, rights: int, alpha: float, dropout: Any) -> None:
    """A warm-up from 0 decides nothing."""
    m = Model(nn.LSTM, dropout)
    m.reg.alpha, m.reg.beta = alpha, alpha / 2
    for _ in range(rights):
        m.right()
    m.reg.alpha = 2
    found = alarms(lambda: LOSING[step](m)).items()  # a FusedRNNDropout behind a copy warns, too
    ((at, message),) = [(at, x) for at, x in found if x.startswith("attach: no penalty got a gradient in 1")]
    assert LIMIT - 10 <= at <= LIMIT + 12
    assert "backwards through the attached LSTM" in message
    assert "loss = regularizer.on_backward_begin(loss)" in message


@pytest.mark.filterwarnings("ignore:on_backward_begin. the loss gets no penalty")
def test_each_silence_is_warned_of() -> None:
    m = Model(nn.LSTM, PLAIN)

    def in_evaluation() -> None:
        m.eval()
        m.reg.on_backward_begin(m.loss()).backward()
        m.train()

    for silence in (m.forgotten, in_evaluation, m.forgotten):
        messages = alarms(silence).values()
        assert sum("no penalty got a gradient" in x for x in messages) == 1
        for _ in range(2):
            m.right()


@pytest.mark.parametrize("step", BESIDE)
def test_a_penalty_that_is_lost_beside_another_module_is_warned_of_once(step: str) -> None:
    m = Model(nn.LSTM, PLAIN)
    ((at, message),) = alarms(lambda: BESIDE[step](m)).items()
    assert LIMIT - 10 <= at <= LIMIT + 12
    assert "through the attached LSTM, or losses without it" in message
    assert "train() on it, or remove() the handle" in message


@pytest.mark.parametrize("step", BESIDE)
def test_a_validation_excuses_no_lost_penalty(step: str) -> None:
    m = Model(nn.LSTM, PLAIN)

    def with_validation() -> None:
        BESIDE[step](m)
        no_grad(m.eval())(inputs())
        m.train()

    ((at, message),) = alarms(with_validation).items()
    assert LIMIT - 10 <= at <= LIMIT + 12
    assert "through the attached LSTM, or losses without it" in message


class Right(Model):
    """Steps that are right, or lose the penalties of few runs in a row."""

    def a_critic_five_times(self) -> None:
        for _ in range(5):
            self.head(self(inputs()).dropped.detach()).sum().backward()
        self.right()

    def attacks(self) -> None:
        for _ in range(7):
            x = inputs().requires_grad_()
            torch.autograd.grad(self(x).loss, x)
        self.right()

    def accumulated(self) -> None:
        for _ in range(64):
            self.right()

    def checkpointed_windows_in_one_backward(self) -> None:
        losses = [cp(lambda x: self(x).loss, inputs()) for _ in range(130)]
        self.regularized(torch.stack(losses).sum())

    def acting_forwards(self) -> None:
        for _ in range(130):
            self.loss()
        self.right()

    def derivatives_of_each_output(self) -> None:
        out = self(inputs()).dropped.flatten()
        for x in (out * out.detach()).tile(2)[:130]:
            torch.autograd.grad(x, [*self.rnn.parameters()], retain_graph=True)
        self.right()

    def losses_without_a_gradient(self) -> None:
        assert self.reg.on_backward_begin(torch.zeros(())) == 0

    def penalties_in_one_backward(self) -> None:
        torch.stack([self.reg.on_backward_begin(self.loss()) for _ in range(130)]).sum().backward()

    def three_losses_on_each_frozen_forward(self) -> None:
        run = frozen(self)(inputs())
        for _ in range(3):
            loss = self.head(run.dropped).sin().sum()
            assert self.reg.on_backward_begin(loss) is loss

    def a_frozen_module_in_evaluation_beside_another(self) -> None:
        frozen(self).rnn.eval()
        self.regularized(self.loss() + self.beside())

    def called_without_gradients_beside_another(self) -> None:
        no_grad(self)(inputs())
        self.regularized(self.beside())

    def forgotten_with_coefficients_of_0(self) -> None:
        self.reg.alpha = self.reg.beta = 0.0
        self.loss().backward()


LONG = ["checkpointed_windows_in_one_backward", "penalties_in_one_backward", "acting_forwards"]
OFTEN = dict.fromkeys([*LONG, "derivatives_of_each_output"], 2) | {"accumulated": 4, "attacks": 20}


@each_dropout
@steps(Right)
def test_a_right_step_is_not_warned_of(step: str, dropout: Any) -> None:
    assert alarms(getattr(Right(nn.LSTM, dropout), step), OFTEN.get(step, 120)) == {}


def test_a_module_above_a_frozen_encoder_in_evaluation_is_not_warned_of() -> None:
    m, encoder = Model(nn.Identity(), batch_first=True).eval(), lm.gru().requires_grad_(False)

    def step() -> None:
        loss = m.head(m.rnn(encoder(inputs())[0])).sum()
        assert m.reg.on_backward_begin(loss) is loss

    assert alarms(step) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_compiled_models_are_warned_of_like_others() -> None:
    right, losing = Right(lm.Elementwise, FusedRNNDropout), Model(lm.Elementwise, FusedRNNDropout)
    right.compile(backend="eager")
    losing.compile(backend="eager")
    assert alarms(right.a_critic_five_times, 30) == {}
    assert len(alarms(losing.forgotten)) == 1
