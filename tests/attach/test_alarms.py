"""Penalties that are lost without an error: loops that have to be warned of, and loops that must not be.

A loop is a generator that yields after each of its steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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

Loop = Callable[[Attached], Iterator[None]]
no_grad: Any = torch.no_grad()


def alarms(loop: Iterator[None], steps: int) -> dict[int, str]:
    """Return the warnings of the first steps of a loop, by the number of the step, which counts from 1."""
    found = {step: warned(partial(next, loop))[1] for step in range(1, steps + 1)}
    return {step: message for step, messages in found.items() for message in messages}


def right(m: Attached) -> None:
    """Make a step as documented."""
    m.reg.on_backward_begin(m(inputs()).loss).backward()


# Loops that lose the penalty: the alarm has to come, and once


def forgotten(m: Attached) -> Iterator[None]:
    while True:
        m(inputs()).loss.backward()
        yield


def forgotten_with_a_loss_of_the_state(m: Attached) -> Iterator[None]:
    while True:
        m(inputs()).hidden.sum().backward()
        yield


def result_not_used(m: Attached) -> Iterator[None]:
    while True:
        loss = m(inputs()).loss
        m.reg.on_backward_begin(loss)
        loss.backward()
        yield


def after_the_backward(m: Attached) -> Iterator[None]:
    while True:
        loss = m(inputs()).loss
        loss.backward()
        m.reg.on_backward_begin(loss)
        yield


def attached_anew_in_each_step(m: Attached) -> Iterator[None]:
    """Attach as `RegularizedTrainer` does."""
    while True:
        m(inputs()).loss.backward()
        m.attach_anew()
        yield


def without_its_dropout(m: Attached) -> Iterator[None]:
    while True:
        m.rnn(inputs())[0].sum().backward()
        yield


LOSING: list[Loop] = [forgotten, forgotten_with_a_loss_of_the_state, result_not_used, after_the_backward]
LOSING += [attached_anew_in_each_step, without_its_dropout]


@each_dropout
@pytest.mark.parametrize("rights", [0, 1, 25])
@pytest.mark.parametrize("loop", LOSING)
def test_a_lost_penalty_is_warned_of_once(loop: Loop, rights: int, dropout: Any) -> None:
    m = Attached(nn.LSTM, dropout)
    for _ in range(rights):
        right(m)
    ((step, message),) = alarms(loop(m), 100).items()
    assert (step <= 24) if rights == 0 else (40 <= step <= 60)
    assert "runs of the attached LSTM in a row got no gradient" in message
    assert "loss = regularizer.on_backward_begin(loss)" in message


def raw_in_the_loss(m: Attached) -> Iterator[None]:
    """Use raw instead of dropped beside another module, whose run the loss depends on."""
    m.reg.attach(other := lm.gru())
    while True:
        loss = m(inputs()).raw.sum() + other(inputs())[0].sum()
        m.reg.on_backward_begin(loss).backward()
        yield


def a_state_in_an_object(m: Attached) -> Iterator[None]:
    """Reach a module by a state that cannot be marked, beside another module."""
    opaque = lm.Returning(lambda raw: SimpleNamespace(raw=raw, state=raw.sum(1)))
    m.reg.attach(opaque, m.dropout, output=lambda result: result.raw)
    while True:
        result = opaque(inputs())
        m.dropout(result.raw)
        m.reg.on_backward_begin(m(inputs()).loss + result.state.sum()).backward()
        yield


@pytest.mark.parametrize(("loop", "name"), [(raw_in_the_loss, "LSTM"), (a_state_in_an_object, "Returning")])
def test_a_penalty_that_no_loss_reaches_beside_another_is_warned_of(loop: Loop, name: str) -> None:
    ((step, message),) = alarms(loop(Attached(nn.LSTM, PLAIN)), 100).items()
    assert step <= 24
    assert f"runs of the attached {name} in a row" in message


def tuned(m: Attached, encoder: Callable[[Tensor], Any]) -> Iterator[None]:
    """Freeze the module for one step, and then train another encoder in its place."""
    m.rnn.requires_grad_(False)
    right(m)
    m.rnn.requires_grad_(True)
    while True:
        raw, state = encoder(inputs())
        loss = m.end(raw, m.dropout(raw), state).loss
        m.reg.on_backward_begin(loss).backward()
        yield


def a_deep_copy(m: Attached) -> Iterator[None]:
    return tuned(m, copy.deepcopy(m.rnn))


def a_new_model_with_its_weights(m: Attached) -> Iterator[None]:
    twin = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
    twin.load_state_dict(m.rnn.state_dict())
    return tuned(m, twin)


def the_forward_itself(m: Attached) -> Iterator[None]:
    return tuned(m, m.rnn.forward)


@each_dropout
@pytest.mark.parametrize("loop", [a_deep_copy, a_new_model_with_its_weights, the_forward_itself])
def test_training_of_what_is_not_attached_after_a_frozen_stage_is_warned_of(loop: Loop, dropout: Any) -> None:
    ((step, message),) = alarms(loop(Attached(nn.LSTM, dropout)), 120).items()
    assert step <= 51
    assert "losses came without a call of the attached LSTM, which was frozen or never called before" in message


def test_a_module_that_the_model_never_calls_is_warned_of() -> None:
    m = Attached(nn.LSTM)
    m.reg.attach(lm.gru())

    def loop() -> Iterator[None]:
        while True:
            right(m)
            yield

    ((step, message),) = alarms(loop(), 120).items()
    assert step <= 51
    assert "without a call of the attached GRU" in message


# Loops that are right, or that lose the penalty of few runs in a row: no alarm


def adversarial(m: Attached, critics: int, micro_batches: int) -> Iterator[None]:
    """Train a critic several times on what the module generates, and then the generator, as a GAN does."""
    critic = nn.Linear(HIDDEN, 1)
    while True:
        for _ in range(critics):
            for _ in range(micro_batches):
                critic(m(inputs()).dropped.detach()).sum().backward()
        for _ in range(micro_batches):
            m.reg.on_backward_begin(critic(m(inputs()).dropped).sum() / micro_batches).backward()
        yield


def five_critic_steps(m: Attached) -> Iterator[None]:
    return adversarial(m, critics=5, micro_batches=1)


def five_critic_steps_with_three_micro_batches(m: Attached) -> Iterator[None]:
    return adversarial(m, critics=5, micro_batches=3)


def windows_in_one_backward(m: Attached) -> Iterator[None]:
    while True:
        state, losses = None, list[Tensor]()
        for _ in range(200):
            run = m(inputs()[:, :2], state)
            state = tuple(x.detach() for x in run.state)
            losses.append(m.reg.on_backward_begin(run.loss))
        torch.stack(losses).sum().backward()
        yield


def accumulated_backwards(m: Attached) -> Iterator[None]:
    while True:
        for _ in range(64):
            (m.reg.on_backward_begin(m(inputs()).loss) / 64).backward()
        yield


def attacks(m: Attached) -> Iterator[None]:
    while True:
        for _ in range(7):
            x = inputs().requires_grad_()
            torch.autograd.grad(m(x).loss, x)
        right(m)
        yield


def lbfgs(m: Attached) -> Iterator[None]:
    optimizer, x = LBFGS(m.parameters(), 0.01), inputs()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = m.reg.on_backward_begin(m(x).loss)
        loss.backward()
        return loss

    while True:
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        yield


def sharpness_aware(m: Attached) -> Iterator[None]:
    """Perturb the weights by the gradient of the plain loss, and make the step from there."""
    optimizer = SGD(m.parameters(), 0.01)
    while True:
        m(inputs()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right(m)
        yield


def meta_learning(m: Attached) -> Iterator[None]:
    """Adapt the weights in five differentiable steps without the penalty, and differentiate through them."""
    module = lm.Elementwise(HIDDEN, HIDDEN, True)
    m.reg.attach(module)
    while True:
        weights = dict(module.named_parameters())
        for _ in range(5):
            raw, _ = functional_call(module, weights, (inputs(),))
            gradients = torch.autograd.grad(raw.square().mean(), [*weights.values()], create_graph=True)
            weights = {name: x - 0.1 * y for (name, x), y in zip(weights.items(), gradients, strict=True)}
        raw, _ = functional_call(module, weights, (inputs(),))
        m.reg.on_backward_begin(raw.square().mean() + m(inputs()).loss).backward()
        yield


def evaluations_in_training_mode(m: Attached) -> Iterator[None]:
    while True:
        for _ in range(30):
            loss = no_grad(m)(inputs()).loss
            assert m.reg.on_backward_begin(loss) is loss
        right(m)
        yield


def gradual_unfreezing(m: Attached) -> Iterator[None]:
    m.rnn.requires_grad_(False)
    while True:
        for _ in range(30):
            right(m)
        m.rnn.requires_grad_(True)
        yield


def losses_on_a_frozen_forward(m: Attached) -> Iterator[None]:
    m.rnn.requires_grad_(False)
    while True:
        run = m(inputs())
        for _ in range(4):
            loss = m.head(run.dropped).sin().sum()
            assert m.reg.on_backward_begin(loss) is loss
            loss.backward()
        yield


def encoders_in_turn(m: Attached) -> Iterator[None]:
    m.reg.attach(other := lm.gru())
    for _ in range(3):
        m.reg.on_backward_begin(m(inputs()).loss + other(inputs())[0].sum()).backward()
    while True:
        for _ in range(60):
            right(m)
        for _ in range(60):
            m.reg.on_backward_begin(other(inputs())[0].sum()).backward()
        yield


def a_model_in_evaluation(m: Attached) -> Iterator[None]:
    m.eval()
    return forgotten(m)


def a_frozen_module(m: Attached) -> Iterator[None]:
    m.rnn.requires_grad_(False)
    return forgotten(m)


def coefficients_of_0(m: Attached) -> Iterator[None]:
    m.reg.alpha = m.reg.beta = 0.0
    return forgotten(m)


def cleared(m: Attached) -> Iterator[None]:
    while True:
        run = m(inputs())
        m.reg.clear()
        run.loss.backward()
        yield


RIGHT: dict[Loop, int] = {  # a loop, and how many of its steps are made
    **dict.fromkeys([five_critic_steps, five_critic_steps_with_three_micro_batches, attacks, sharpness_aware], 12),
    **dict.fromkeys([windows_in_one_backward, accumulated_backwards, encoders_in_turn, gradual_unfreezing], 2),
    **dict.fromkeys([lbfgs, meta_learning, evaluations_in_training_mode], 5),
    **dict.fromkeys([losses_on_a_frozen_forward, cleared], 55),
    **dict.fromkeys([a_model_in_evaluation, a_frozen_module, coefficients_of_0], 55),
}


@each_dropout
@pytest.mark.parametrize("loop", RIGHT)
def test_a_right_loop_is_not_warned_of(loop: Loop, dropout: Any) -> None:
    assert alarms(loop(Attached(nn.LSTM, dropout)), RIGHT[loop]) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@each_dropout
@pytest.mark.parametrize(("loop", "steps"), [(forgotten, 24), (five_critic_steps_with_three_micro_batches, 0)])
def test_compiled_models_are_warned_of_like_others(loop: Loop, steps: int, dropout: Any) -> None:
    m = Attached(lm.Elementwise, dropout)
    m.compile(backend="eager")
    assert len(alarms(loop(m), steps or 8)) == (steps > 0)


@each_dropout
def test_a_warm_up_from_0_decides_nothing(dropout: Any) -> None:
    m = Attached(nn.LSTM, dropout)
    m.reg.alpha = m.reg.beta = 0.0
    for _ in range(60):
        right(m)
    m.reg.alpha = 2.0
    ((step, _),) = alarms(forgotten(m), 100).items()
    assert step <= 24


# A regularizer that nothing keeps


def test_a_regularizer_that_no_variable_holds_is_warned_of_when_its_module_trains() -> None:
    rnn = lm.gru()

    def attach() -> Any:
        reg = RNNRegularizer(2.0, 1.0)
        return reg.attach(rnn)

    handle = attach()
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
        assert lm.hooks_of(rnn) == 1
        for _ in range(60):
            raw, _ = rnn(inputs())
            total = reg.on_backward_begin(raw.sum())
            torch.testing.assert_close(total, raw.sum() + lm.formula(raw, raw, 1))
            total.backward()
        del reg
        assert lm.hooks_of(rnn) == 0
