"""Penalties that are lost without an error: steps that have to be warned of, and steps that must not be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import LBFGS, SGD

from fastreg import RNNRegularizer
from tests import language_model as lm
from tests.language_model import HIDDEN, PLAIN, Attached, each_dropout, inputs, warned

Step = Callable[[Any], Any]
no_grad: Any = torch.no_grad()


def alarms(step: Step, m: Attached, count: int) -> dict[int, str]:
    """Return the warnings of many steps, by the number of the step, which counts from 1."""
    found = {i: warned(partial(step, m))[1] for i in range(1, count + 1)}
    return {i: message for i, messages in found.items() for message in messages}


def beside(m: Attached) -> nn.GRU:
    """Attach a GRU beside the module, once."""
    if not hasattr(m, "other"):
        m.other = lm.gru()
        m.reg.attach(m.other)
    return m.other


def right(m: Attached) -> None:
    m.reg.on_backward_begin(m(inputs()).loss).backward()


# Steps that lose the penalty: the alarm has to come, and once


def result_not_used(m: Attached) -> None:
    loss = m(inputs()).loss
    m.reg.on_backward_begin(loss)
    loss.backward()


def after_the_backward(m: Attached) -> None:
    loss = m(inputs()).loss
    loss.backward()
    m.reg.on_backward_begin(loss)


def losses_kept(m: Attached) -> None:  # for a mean over the epoch, which keeps every graph
    m.losses = [*getattr(m, "losses", []), m(inputs()).loss]
    m.losses[-1].backward()


def losses_kept_right(m: Attached) -> None:
    m.losses = [*getattr(m, "losses", []), m.reg.on_backward_begin(m(inputs()).loss)]
    m.losses[-1].backward()


def forgotten_and_attached_anew(m: Attached) -> None:  # in each step, as `RegularizedTrainer` does
    m(inputs()).loss.backward()
    m.attach_anew()


LOSING: dict[str, Step] = {
    "forgotten": lambda m: m(inputs()).loss.backward(),
    "forgotten, a loss of the state": lambda m: m(inputs()).hidden.sum().backward(),
    "forgotten, and no dropout": lambda m: m.rnn(inputs())[0].sum().backward(),
    "its result not used": result_not_used,
    "after the backward": after_the_backward,
    "forgotten, and the losses kept": losses_kept,
    "forgotten and attached anew": forgotten_and_attached_anew,
}


@each_dropout
@pytest.mark.parametrize("rights", [0, 1, 25])
@pytest.mark.parametrize("step", LOSING)
def test_a_lost_penalty_is_warned_of_once(step: str, rights: int, dropout: Any) -> None:
    m = Attached(nn.LSTM, dropout)
    for _ in range(rights):
        right(m)
    ((at, message),) = alarms(LOSING[step], m, 100).items()
    assert (at <= 24) if rights == 0 else (40 <= at <= 60)
    assert "runs of the attached LSTM in a row got no gradient" in message
    assert "loss = regularizer.on_backward_begin(loss)" in message


def raw_in_the_loss(m: Attached) -> None:
    loss = m(inputs()).raw.sum() + beside(m)(inputs())[0].sum()
    m.reg.on_backward_begin(loss).backward()


def a_state_in_an_object(m: Attached) -> None:
    result = m.rnn(inputs())
    m.dropout(result.raw)
    loss = result.state.sum() + beside(m)(inputs())[0].sum()
    m.reg.on_backward_begin(loss).backward()


@pytest.mark.parametrize("step", [raw_in_the_loss, a_state_in_an_object])
def test_a_penalty_that_no_loss_reaches_beside_another_is_warned_of(step: Step) -> None:
    opaque = lm.Returning(lambda raw: SimpleNamespace(raw=raw, state=raw.sum(1)))
    options: Any = {"output": lambda result: result.raw}
    m = Attached(nn.LSTM, PLAIN) if step is raw_in_the_loss else Attached(opaque, PLAIN, **options)
    ((at, message),) = alarms(step, m, 100).items()
    assert at <= 24
    assert f"runs of the attached {type(m.rnn).__name__} in a row" in message


ENCODERS: dict[str, Callable[[nn.Module], Any]] = {
    "a deep copy": copy.deepcopy,
    "another module": lambda _: nn.LSTM(HIDDEN, HIDDEN, batch_first=True),
    "the forward itself": lambda module: module.forward,
}


@each_dropout
@pytest.mark.parametrize("encoder", ENCODERS)
def test_training_of_what_is_not_attached_after_a_frozen_stage_is_warned_of(encoder: str, dropout: Any) -> None:
    m = Attached(nn.LSTM, dropout)
    m.rnn.requires_grad_(False)
    right(m)
    m.rnn.requires_grad_(True)
    trained = ENCODERS[encoder](m.rnn)

    def step(m: Attached) -> None:
        raw, _ = trained(inputs())
        m.reg.on_backward_begin(m.end(raw, m.dropout(raw)).loss).backward()

    ((at, message),) = alarms(step, m, 120).items()
    assert at <= 51
    assert "losses came without a call of the attached LSTM, which was frozen or never called before" in message


def test_a_module_that_the_model_never_calls_is_warned_of() -> None:
    m = Attached(nn.LSTM)
    beside(m)
    ((at, message),) = alarms(right, m, 120).items()
    assert at <= 51
    assert "without a call of the attached GRU" in message


# Steps that are right, or lose the penalties of few runs in a row: no alarm


def adversarial(m: Attached, micro_batches: int) -> None:
    """Train a critic five times on the output of the module, and then the module, as a GAN does."""
    for _ in range(5 * micro_batches):
        m.head(m(inputs()).dropped.detach()).sum().backward()
    for _ in range(micro_batches):
        m.reg.on_backward_begin(m(inputs()).loss / micro_batches).backward()


def windows_in_one_backward(m: Attached) -> None:
    state, losses = None, list[Tensor]()
    for _ in range(200):
        run = m(inputs()[:, :2], state)
        state = tuple(x.detach() for x in run.state)
        losses.append(m.reg.on_backward_begin(run.loss))
    torch.stack(losses).sum().backward()


def accumulated_backwards(m: Attached) -> None:
    for _ in range(64):
        (m.reg.on_backward_begin(m(inputs()).loss) / 64).backward()


def attacks(m: Attached) -> None:
    for _ in range(7):
        x = inputs().requires_grad_()
        torch.autograd.grad(m(x).loss, x)
    right(m)


def lbfgs(m: Attached) -> None:
    optimizer, x = LBFGS(m.parameters(), 0.01, max_iter=12), inputs()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = m.reg.on_backward_begin(m(x).loss)
        loss.backward()
        return loss.detach()  # PyTorch 2.8 warns of a loss that needs a gradient

    optimizer.step(closure)


def sharpness_aware(m: Attached) -> None:
    """Perturb the weights by the gradient of the plain loss, and make the step from there."""
    m(inputs()).loss.backward()
    SGD(m.parameters(), 0.01).step()
    right(m)


def meta_learning(m: Attached) -> None:
    """Adapt weights in five differentiable steps without the penalty, and differentiate through them."""
    module = beside(m)
    weights = {"head." + name: x for name, x in m.head.named_parameters()}
    for _ in range(5):
        loss = functional_call(m, weights, (inputs(),)).loss
        gradients = torch.autograd.grad(loss, [*weights.values()], create_graph=True)
        weights = {name: x - 0.1 * y for (name, x), y in zip(weights.items(), gradients, strict=True)}
    loss = functional_call(m, weights, (inputs(),)).loss + module(inputs())[0].sum()
    m.reg.on_backward_begin(loss).backward()


def evaluations_in_training_mode(m: Attached) -> None:
    for _ in range(30):
        loss = no_grad(m)(inputs()).loss
        assert m.reg.on_backward_begin(loss) is loss
    right(m)


def gradual_unfreezing(m: Attached) -> None:
    for frozen in (True, False):
        m.rnn.requires_grad_(not frozen)
        for _ in range(30):
            right(m)


def losses_on_a_frozen_forward(m: Attached) -> None:
    m.rnn.requires_grad_(False)
    run = m(inputs())
    for _ in range(4):
        loss = m.head(run.dropped).sin().sum()
        assert m.reg.on_backward_begin(loss) is loss


def encoders_in_turn(m: Attached) -> None:
    other = beside(m)
    m.reg.on_backward_begin(m(inputs()).loss + other(inputs())[0].sum()).backward()
    for _ in range(60):
        right(m)
    for _ in range(60):
        m.reg.on_backward_begin(other(inputs())[0].sum()).backward()


def cleared(m: Attached) -> None:
    run = m(inputs())
    m.reg.clear()
    run.loss.backward()


def forgotten_in_evaluation(m: Attached) -> None:
    m.eval()(inputs()).loss.backward()


def forgotten_and_frozen(m: Attached) -> None:
    m.rnn.requires_grad_(False)
    m(inputs()).loss.backward()


def forgotten_with_coefficients_of_0(m: Attached) -> None:
    m.reg.alpha = m.reg.beta = 0.0
    m(inputs()).loss.backward()


RIGHT: dict[Step, int] = {  # how often each step is made
    **dict.fromkeys([partial(adversarial, micro_batches=1), partial(adversarial, micro_batches=3)], 12),
    **dict.fromkeys([attacks, sharpness_aware], 12),
    **dict.fromkeys([windows_in_one_backward, accumulated_backwards, encoders_in_turn, gradual_unfreezing], 2),
    **dict.fromkeys([lbfgs, meta_learning, evaluations_in_training_mode], 5),
    **dict.fromkeys([losses_on_a_frozen_forward, cleared, forgotten_in_evaluation, forgotten_and_frozen], 55),
    **dict.fromkeys([forgotten_with_coefficients_of_0, losses_kept_right], 55),
}


@each_dropout
@pytest.mark.parametrize("step", RIGHT)
def test_a_right_step_is_not_warned_of(step: Step, dropout: Any) -> None:
    assert alarms(step, Attached(nn.LSTM, dropout), RIGHT[step]) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@each_dropout
def test_compiled_models_are_warned_of_like_others(dropout: Any) -> None:
    m = Attached(lm.Elementwise, dropout)
    m.compile(backend="eager")
    assert alarms(partial(adversarial, micro_batches=3), m, 8) == {}
    assert len(alarms(LOSING["forgotten"], m, 60)) == 1


@each_dropout
def test_a_warm_up_from_0_decides_nothing(dropout: Any) -> None:
    m = Attached(nn.LSTM, dropout)
    m.reg.alpha = m.reg.beta = 0.0
    for _ in range(60):
        right(m)
    m.reg.alpha = 2.0
    ((at, _),) = alarms(LOSING["forgotten"], m, 100).items()
    assert at <= 24


# A regularizer that nothing keeps


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
