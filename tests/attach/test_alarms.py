"""Penalties that are lost without an error: steps that have to be warned of, and steps that must not be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastreg import FusedRNNDropout, RNNRegularizer
from tests import language_model as lm
from tests.attach import frozen, no_grad, steps
from tests.language_model import PLAIN, Attached, each_dropout, inputs, warned


def alarms(step: Callable[[], Any], count: int) -> dict[int, str]:
    """Return the warnings of many steps, by the number of the step, which counts from 1."""
    return {i: message for i in range(1, count + 1) for message in warned(step)[1]}


class Model(Attached):
    """A module that is trained, with a GRU beside it that is attached at the first use."""

    def loss(self) -> Tensor:
        return self(inputs()).loss

    def right(self) -> None:
        self.reg.on_backward_begin(self.loss()).backward()

    def beside(self) -> Tensor:
        if not hasattr(self, "other"):
            self.other = lm.gru()
            self.reg.attach(self.other)
        return self.other(inputs())[0].sum()


class Losing(Model):
    """Steps that lose the penalty: the alarm has to come, and once."""

    def forgotten(self) -> None:
        self.loss().backward()

    def forgotten_with_a_loss_of_the_state(self) -> None:
        self(inputs()).hidden.sum().backward()

    def forgotten_without_the_dropout(self) -> None:
        self.rnn(inputs())[0].sum().backward()

    def forgotten_and_attached_anew(self) -> None:  # in each step, as `RegularizedTrainer` does
        self.loss().backward()
        self.attach_anew()

    def forgotten_and_the_losses_kept(self) -> None:  # for a mean over the epoch, which keeps every graph
        self.losses = [*getattr(self, "losses", []), self.loss()]
        self.losses[-1].backward()

    def result_not_used(self) -> None:
        self.reg.on_backward_begin(loss := self.loss())
        loss.backward()

    def after_the_backward(self) -> None:
        (loss := self.loss()).backward()
        self.reg.on_backward_begin(loss)


@each_dropout
@pytest.mark.parametrize(
    ("rights", "alpha", "first", "last"), [(0, 2, 1, 24), (1, 2, 40, 60), (25, 2, 40, 60), (60, 0, 1, 24)]
)
@steps(Losing)
def test_a_lost_penalty_is_warned_of_once(
    step: str, rights: int, alpha: float, first: int, last: int, dropout: Any
) -> None:
    """A warm-up from 0 decides nothing."""
    m = Losing(nn.LSTM, dropout)
    m.reg.alpha, m.reg.beta = alpha, alpha / 2
    for _ in range(rights):
        m.right()
    m.reg.alpha = 2
    ((at, message),) = alarms(getattr(m, step), 100).items()
    assert first <= at <= last
    assert "runs of the attached LSTM in a row got no gradient" in message
    assert "loss = regularizer.on_backward_begin(loss)" in message


def test_a_loss_of_raw_beside_another_module_is_warned_of() -> None:
    """Raw is not marked where there is a dropout."""
    m = Model(nn.LSTM, PLAIN)

    def step() -> None:
        m.reg.on_backward_begin(m(inputs()).raw.sum() + m.beside()).backward()

    ((at, message),) = alarms(step, 100).items()
    assert at <= 24
    assert "runs of the attached LSTM in a row" in message


@each_dropout
@pytest.mark.parametrize("encoder", [copy.deepcopy, attrgetter("forward")])
def test_training_of_what_is_not_attached_after_a_frozen_stage_is_warned_of(encoder: Any, dropout: Any) -> None:
    m = Model(nn.LSTM, dropout)
    frozen(m)
    m.right()
    m.rnn.requires_grad_(True)
    trained = encoder(m.rnn)

    def step() -> None:
        raw, _ = trained(inputs())
        m.reg.on_backward_begin(m.end(raw, m.dropout(raw)).loss).backward()

    ((at, message),) = alarms(step, 120).items()
    assert at <= 51
    assert "losses came without a call of the attached LSTM, which was frozen or never called before" in message


def test_a_module_that_the_model_never_calls_is_warned_of() -> None:
    m = Model(nn.LSTM)
    m.reg.attach(lm.gru())
    ((at, message),) = alarms(m.right, 120).items()
    assert at <= 51
    assert "without a call of the attached GRU" in message


class Right(Model):
    """Steps that are right, or lose the penalties of few runs in a row: no alarm."""

    def adversarial(self) -> None:
        """Train a critic on the output of the module for 15 batches, and then the module for 3, as a GAN does."""
        for _ in range(15):
            self.head(self(inputs()).dropped.detach()).sum().backward()
        for _ in range(3):
            self.right()

    def windows_in_one_backward(self) -> None:
        state, losses = None, list[Tensor]()
        for _ in range(60):
            run = self(inputs()[:, :2], state)
            state = tuple(x.detach() for x in run.state)
            losses.append(self.reg.on_backward_begin(run.loss))
        torch.stack(losses).sum().backward()

    def many_runs_in_one_loss(self) -> None:
        losses = torch.stack([self.loss() for _ in range(60)])
        self.reg.on_backward_begin(losses.sum()).backward()

    def losses_kept(self) -> None:
        self.losses = [*getattr(self, "losses", []), self.reg.on_backward_begin(self.loss())]
        self.losses[-1].backward()

    def evaluations_in_training_mode(self) -> None:
        self.reg.attach(lm.gru())  # is never called
        for _ in range(30):
            loss = no_grad(self)(inputs()).loss
            assert self.reg.on_backward_begin(loss) is loss
        self.right()

    def gradual_unfreezing(self) -> None:
        for trains in (False, True):
            self.rnn.requires_grad_(trains)
            for _ in range(30):
                self.right()

    def losses_on_a_frozen_forward(self) -> None:
        run = frozen(self)(inputs())
        for _ in range(4):
            loss = self.head(run.dropped).sin().sum()
            assert self.reg.on_backward_begin(loss) is loss

    def encoders_in_turn(self) -> None:
        self.reg.on_backward_begin(self.loss() + self.beside()).backward()
        for _ in range(55):
            self.right()
        for _ in range(55):
            self.reg.on_backward_begin(self.beside()).backward()

    def cleared(self) -> None:
        loss = self.loss()
        self.reg.clear()
        loss.backward()

    def forgotten_and_frozen(self) -> None:
        frozen(self)
        self.loss().backward()

    def forgotten_with_coefficients_of_0(self) -> None:
        self.reg.alpha = self.reg.beta = 0.0
        self.loss().backward()


LONG = {"windows_in_one_backward": 2, "encoders_in_turn": 2, "gradual_unfreezing": 2}  # steps, and how often
LONG |= {"evaluations_in_training_mode": 5, "adversarial": 10, "many_runs_in_one_loss": 2}


@each_dropout
@steps(Right)
def test_a_right_step_is_not_warned_of(step: str, dropout: Any) -> None:
    assert alarms(getattr(Right(nn.LSTM, dropout), step), LONG.get(step, 55)) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_compiled_models_are_warned_of_like_others() -> None:
    right, losing = Right(lm.Elementwise, FusedRNNDropout), Losing(lm.Elementwise, FusedRNNDropout)
    right.compile(backend="eager")
    losing.compile(backend="eager")
    assert alarms(right.adversarial, 4) == {}
    assert len(alarms(losing.forgotten, 30)) == 1


def test_a_regularizer_that_no_variable_holds_is_warned_of_when_its_module_trains() -> None:
    def attach(rnn: nn.Module) -> Any:
        reg = RNNRegularizer(2.0, 1.0)
        return reg.attach(rnn)

    rnn = lm.gru()
    handle = attach(rnn)
    rnn.eval()(inputs())
    ((_, (message,)), (_, later)) = [warned(lambda: rnn.train()(inputs())) for _ in range(2)]
    assert "the regularizer of the attached GRU was deleted before the module ran in training" in message
    assert later == []
    assert lm.hooks_of(rnn) == 0
    assert repr(handle) == "GRU: removed"


def test_a_cell_of_a_notebook_that_runs_again_leaves_one_penalty() -> None:
    rnn = lm.gru()
    for _ in range(3):
        reg = lm.regularizer()
        lm.regularizer().attach(rnn)  # a mistake, which the next line of the cell mends
        reg.attach(rnn)
        for _ in range(60):
            raw, _ = rnn(inputs())
            total = reg.on_backward_begin(raw.sum())
            torch.testing.assert_close(total, raw.sum() + lm.formula(raw, raw, 1))
            total.backward()
        del reg
        assert lm.hooks_of(rnn) == 0
