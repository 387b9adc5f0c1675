"""The life of a run: the outcomes of a loss, the memory of the regularizer, and the activations that stay alive."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from tests import language_model as lm
from tests.attach import cp, frozen, no_grad, reentrant
from tests.language_model import FUSED, PLAIN, VALID, Attached, each_dropout


class Model(Attached):
    """A model, and steps that return a loss."""

    def after_a_run(self) -> Model:
        self.kept = self(lm.inputs())
        return self

    def after_a_validation(self) -> Model:
        no_grad(self.eval())(lm.inputs())
        return self.train()

    def second_loss(self, x: Tensor) -> Tensor:
        run = self(x)
        self.reg.on_backward_begin(run.loss)
        return self.head(run.dropped).square().sum()

    def cleared(self, x: Tensor) -> Tensor:
        loss = self(x).loss
        self.reg.clear()
        return loss

    def cleared_before_its_dropout(self, x: Tensor) -> Tensor:
        raw, state = self.rnn(x)
        self.reg.clear()
        return self.end(raw, self.dropout(raw), state).loss

    def frozen_in_evaluation_beside_another(self, x: Tensor) -> Tensor:
        loss = frozen(self).eval()(x).loss
        self.reg.attach(lm.gru())  # in training, and not called
        return loss

    def frozen_before_a_trained_layer(self, x: Tensor) -> Tensor:
        self.dropout.forward = lambda raw, **_: self.head(raw)
        loss = frozen(self)(x).loss
        del self.dropout.forward
        return loss

    def frozen_after_an_evaluation(self, x: Tensor) -> Tensor:
        self.eval()(x)
        return frozen(self)(x).loss

    def in_evaluation_beside_another(self, x: Tensor) -> Tensor:
        loss = self.eval()(x).loss
        self.reg.attach(lm.gru())
        return loss

    def frozen_beside_a_run(self, x: Tensor) -> Tensor:
        self.reg.attach(other := lm.gru())
        self.kept = other(x)
        return frozen(self)(x).loss

    def copied_after_steps_beside_a_frozen_one(self, x: Tensor) -> Tensor:
        self.reg.attach(other := lm.gru().requires_grad_(False))
        for _ in range(3):
            other(x)
            self.reg.on_backward_begin(self(x).loss).backward()
        return deepcopy(self)(x).loss

    def trained_before_frozen(self, x: Tensor) -> Tensor:
        self.reg.attach(other := lm.gru().requires_grad_(False))
        kept, _ = other(x)
        self.reg.on_backward_begin(self(x).loss).backward()
        return self.head(kept).sum()

    def recomputed_beside_a_frozen_one(self, x: Tensor) -> Tensor:
        self.reg.attach(other := lm.gru().requires_grad_(False))
        kept, _ = other(x)
        self.reg.on_backward_begin(cp(lambda y: self(other(y)[0]).loss, x)).backward()
        return self.head(kept).sum()


STEPS: dict[str, dict[str, Callable[[Model, Tensor], Tensor]]] = {  # functions that return a loss without a penalty
    "right": {
        "evaluation under no_grad": lambda m, x: no_grad(m.eval())(x).loss,
        "evaluation and a loss of something else": lambda m, x: m.eval().head(x).sum(),
        "evaluation of a frozen module": lambda m, x: frozen(m).eval()(x).loss,
        "evaluation of a frozen module after that of a trained one": Model.frozen_after_an_evaluation,
        "frozen": lambda m, x: frozen(m)(x).loss,
        "frozen, before a trained layer": Model.frozen_before_a_trained_layer,
        "frozen, in evaluation beside another": Model.frozen_in_evaluation_beside_another,
        "frozen, the second loss": lambda m, x: frozen(m).second_loss(x),
        "no gradients": lambda m, x: no_grad(m)(x).loss,
        "no gradients beside a run": lambda m, x: no_grad(m.after_a_run())(x).loss,
        "a loss that needs no gradient": lambda m, x: m.head(x).sum().detach(),
    },
    "ran, but this loss does not depend on its output": {
        "dropped is detached": lambda m, x: m.head(m(x).dropped.detach()).sum(),
        "a loss of a frozen module, and a run is left": lambda m, x: frozen(m.after_a_run())(x).loss,
    },
    "gave its penalty to a loss, or it was cleared": {
        "cleared": Model.cleared,
        "cleared before its dropout": Model.cleared_before_its_dropout,
        "the second loss": Model.second_loss,
        "the loss of a frozen encoder after that of a trained one": Model.trained_before_frozen,
        "the loss of a frozen encoder after its recomputation": Model.recomputed_beside_a_frozen_one,
        "a copy is called after steps beside a frozen module": Model.copied_after_steps_beside_a_frozen_one,
    },
    "ran without gradients": {
        "raw has no gradient": lambda m, x: m.head(m.dropout(no_grad(m.rnn)(x)[0])).sum(),
        "a reentrant checkpoint": reentrant,
        "a transform of torch.func": lambda m, x: m.head(x).sum() * torch.func.grad(lambda y: m(y).loss)(x).sum(),
    },
    "returned an output that needs no gradient; the GRU ran, but this loss does not": {
        "frozen beside a run that is left": Model.frozen_beside_a_run,
    },
    "ran in evaluation mode; the GRU was not called": {
        "in evaluation beside another": Model.in_evaluation_beside_another,
    },
    "was not called": {
        "nothing is called": lambda m, x: m.head(x).sum(),
        "forward is called": lambda m, x: m.head(m.rnn.forward(x)[0]).sum(),
        "a copy is called after a validation": lambda m, x: deepcopy(m.after_a_validation())(x).loss,
    },
}
REMEDIES = ("wrapper", "copy", "LayerDrop", "add up all losses", "use_reentrant=False", "torch.compiler.reset()")


def of_all(outcome: bool) -> Any:
    """Run a test with each step that is right, or that is an error."""
    rows = [(case, name) for case, steps in STEPS.items() for name in steps if (case == "right") == outcome]
    return pytest.mark.parametrize(("case", "name"), rows, ids=[name for _, name in rows])


@each_dropout
@of_all(True)
def test_a_loss_without_a_penalty_is_returned_itself(case: str, name: str, dropout: Any) -> None:
    m, x = Model(nn.LSTM, dropout), lm.inputs()
    loss, before = STEPS[case][name](m, x), m.reg.ar
    assert m.reg.on_backward_begin(loss) is loss
    assert m.reg.take(loss) is None
    assert m.reg.ar == before  # an evaluation changes no term
    m.rnn.requires_grad_(True)
    m.check(m.train()(x))


@each_dropout
@of_all(False)
def test_a_loss_that_misses_its_runs_is_the_one_error(case: str, name: str, dropout: Any) -> None:
    m, x = Model(nn.LSTM, dropout), lm.inputs()
    loss = STEPS[case][name](m, x)
    with pytest.raises(
        RuntimeError, match=f"nothing was captured: .* Since the last penalty the LSTM {case}"
    ) as caught:
        m.reg.on_backward_begin(loss)
    assert [remedy for remedy in REMEDIES if remedy not in str(caught.value)] == []
    m.rnn.requires_grad_(True)
    m.check(m.train()(x))  # the next step is right


@each_dropout
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_frozen_step_excuses_no_later_one(kind: Any, dropout: Any) -> None:
    m, x = frozen(Model(kind, dropout)), lm.inputs()
    for _ in range(2):
        run = m(x)
        for _ in range(3):  # losses on one forward
            loss = m.head(run.dropped).sum()
            assert m.reg.on_backward_begin(loss) is loss
    m.rnn.requires_grad_(True)
    loss = m.head(m.dropout(no_grad(m.rnn)(x)[0])).sum()
    with pytest.raises(RuntimeError, match=f"the {kind.__name__} ran without gradients. Attach"):
        m.reg.on_backward_begin(loss)
    m.check(m(x))


@pytest.mark.parametrize("dropout", [None, PLAIN])
def test_the_error_lists_all_that_a_module_has_done_in_a_step(dropout: Any) -> None:
    m, x = Model(nn.GRU, dropout), lm.inputs()
    m.reg.on_backward_begin(m(x).loss)
    no_grad(m)(x)
    m.kept = m(x)
    m.eval()(x)
    did = "ran without gradients, then ran, but .* its output, then ran in evaluation mode. Attach"
    with pytest.raises(RuntimeError, match=f"the GRU {did}"):
        m.train().reg.on_backward_begin(m.head(x).sum())


@each_dropout
def test_training_in_evaluation_mode_is_warned_of_once(dropout: Any) -> None:
    m, x = Model(nn.LSTM, dropout), lm.inputs()
    losses = [m.eval()(x).loss for _ in range(3)]
    results, messages = zip(*[lm.warned(partial(m.reg.on_backward_begin, loss)) for loss in losses], strict=True)
    assert all(result is loss for result, loss in zip(results, losses, strict=True))
    assert [len(x) for x in messages] == [1, 0, 0]
    assert "all attached modules, LSTM, are in evaluation mode. Call train() on them" in messages[0][0]
    m.check(m.train()(x))


@pytest.mark.parametrize("dropout", [PLAIN, FUSED])
def test_a_step_that_dies_before_its_dropout_leaves_the_next_one_right(dropout: Any) -> None:
    m = Model(nn.LSTM, dropout)
    for hooked in (m.dropout, m.head):
        with hooked.register_forward_pre_hook(lambda *_: 1 / 0), contextlib.suppress(ZeroDivisionError):
            m(lm.inputs())
    m.check(m(lm.inputs()))


@pytest.mark.parametrize("dropout", [None, PLAIN])
def test_an_error_within_a_hook_leaves_the_next_step_right(dropout: Any) -> None:
    """A notebook keeps the frames of an error, and with them the run."""
    m, valid = Model(nn.LSTM, dropout), [VALID[:, :3]]
    m.reg.attach(m.rnn, dropout and m.dropout, valid=lambda *_: valid[0])
    with pytest.raises(ValueError, match="valid: expected") as kept:
        m(lm.inputs())
    valid[0] = torch.ones_like(VALID)
    m.check(m(lm.inputs()))
    assert kept.traceback


@each_dropout
@pytest.mark.parametrize(("count", "beta"), [(1, 1.0), (3, 1.0), (3, 0.0), (4, 1.0), (7, 1.0), (4, 0.0)])
def test_four_runs_over_one_step_are_an_error(count: int, beta: float, dropout: Any) -> None:
    model = Attached(nn.LSTM, dropout)
    model.reg.beta = beta
    model(lm.inputs())  # a prefill changes nothing
    runs, longer = [model(lm.inputs()[:, :1]) for _ in range(count)], model(lm.inputs())
    model.reg.alpha, model.reg.beta = 5.0, 1.0 - beta  # the forward has had the coefficients
    loss = torch.stack([run.loss for run in (*runs, longer)]).sum()
    if count > 3:
        with pytest.raises(RuntimeError, match=rf"the LSTM ran {count} times over one .*stack its outputs"):
            model.reg.on_backward_begin(loss)
    else:
        want = loss + lm.formula(longer.raw, longer.dropped, 1, beta=beta)
        want = want + sum(lm.ALPHA * run.dropped.square().mean() for run in runs)
        lm.check_gradients(model, model.reg.on_backward_begin(loss), want)


def test_runs_of_two_modules_over_one_step_are_counted_by_module() -> None:
    model, other, x = Attached(), lm.gru(), lm.inputs()[:, :1]
    model.reg.attach(other)
    losses = [model(x).loss for _ in range(3)] + [other(x)[0].sum() for _ in range(3)]
    model.reg.on_backward_begin(torch.stack(losses).sum()).backward()
    with pytest.raises(RuntimeError, match="the GRU ran 4 times over one time step"):
        model.reg.on_backward_begin(torch.stack([model(x).loss, *[other(x)[0].sum() for _ in range(4)]]).sum())


@pytest.mark.filterwarnings("ignore:attach. no penalty got a gradient")
@pytest.mark.parametrize("dropout", [None, PLAIN])
def test_a_loop_without_a_loss_or_its_dropout_does_not_fill_the_memory(dropout: Any) -> None:
    model, x = Attached(nn.Identity(), dropout, batch_first=True), torch.ones(1, 2, 2, requires_grad=True)
    tracemalloc.start()
    sizes = []
    for step in range(3000):
        model.rnn(2 * x)
        sizes += [tracemalloc.get_traced_memory()[0]] if step in (999, 2999) else []
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 80_000  # a reference takes 80 bytes


def test_a_recomputation_is_no_run_that_waits_for_its_dropout() -> None:
    model = Attached(nn.GRU, PLAIN)
    for _ in range(3):
        with set_checkpoint_early_stop(False):  # the recomputation runs the hook on the RNN, too
            raw, _ = cp(model.rnn, lm.inputs())
        model.reg.on_backward_begin(model.dropout(raw).sum()).backward()
