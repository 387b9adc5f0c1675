"""The life of a run: the outcomes of a loss, what the regularizer remembers, and what stays in memory."""

from __future__ import annotations

import re
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from copy import copy, deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import set_checkpoint_early_stop

from fastreg import FusedRNNDropout, RNNRegularizer
from fastreg.attach.runs import OUTCOMES
from tests import language_model as lm
from tests.attach import cp, frozen, no_grad, reentrant
from tests.language_model import HIDDEN, PLAIN, STARTS, VALID, Attached, each_dropout


class Model(Attached):
    """A model, and steps that return a loss."""

    def trained(self) -> Model:
        self.reg.on_backward_begin(self(lm.inputs()).loss).backward()
        return self

    def beside_a_frozen_run(self) -> Model:
        self.other = lm.gru().requires_grad_(False)
        self.reg.attach(self.other)
        self.kept = self.other(lm.inputs())[0]
        return self

    def after_a_run(self) -> Model:
        self.kept = self(lm.inputs())
        return self

    def before_a_validation(self, x: Tensor) -> Tensor:
        loss = self(x).loss
        no_grad(self)(x)
        return loss

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

    def without_gradients(self, x: Tensor) -> Tensor:
        raw, _ = no_grad(self.rnn)(x)
        return self.head(self.dropout(raw)).sum()

    def transformed(self, x: Tensor) -> Tensor:
        torch.func.grad(lambda y: self(y).loss)(x)
        return self(x).loss


# A case of the table of outcomes, and functions of a model and inputs that return a loss
CASES: dict[str, list[Callable[[Model, Tensor], Tensor]]] = {
    "all modules are in evaluation": [
        lambda m, x: m.eval()(x).loss,
        lambda m, x: m.after_a_run().eval()(x).loss,
        lambda m, x: m.eval().transformed(x),  # an error in training
    ],
    "only frozen modules ran": [
        lambda m, x: frozen(m)(x).loss,
        lambda m, x: frozen(m.trained())(x).loss,
        lambda m, x: m.head(m.trained().beside_a_frozen_run().kept).sum(),
        lambda m, x: frozen(m).second_loss(x),
        lambda m, x: frozen(m).before_a_validation(x),
    ],
    "nothing needs a gradient": [
        lambda m, x: no_grad(m)(x).loss,
        lambda m, x: torch.inference_mode()(m)(x).loss,
        lambda m, x: no_grad(m.trained())(x).loss,
        lambda m, x: no_grad(m.beside_a_frozen_run())(x).loss,
    ],
    "the loss depends on no run": [
        lambda m, x: m.after_a_run().head(x).sum(),
        lambda m, x: m.head(m(x).dropped.detach()).sum(),
        lambda m, x: no_grad(m.after_a_run())(x).loss,
        lambda m, x: frozen(m.after_a_run())(x).loss,
    ],
    "a module ran without gradients": [
        Model.without_gradients,
        lambda m, x: m.trained().without_gradients(x),
        lambda m, x: m.beside_a_frozen_run().without_gradients(x),
        reentrant,
    ],
    "a run is taken": [
        Model.second_loss,
        lambda m, x: m.beside_a_frozen_run().second_loss(x),
        Model.cleared,
        lambda m, x: m.trained().cleared_before_its_dropout(x),
        lambda m, x: m.trained().head(x).sum(),
    ],
    "no module was called": [
        lambda m, x: m.head(x).sum(),
        lambda m, x: m.head(x).sum().detach(),
        lambda m, x: m.head(m.rnn.forward(x)[0]).sum(),
        lambda m, x: deepcopy(m)(x).loss,
    ],
}


@each_dropout
@pytest.mark.parametrize(("case", "step"), [(case, step) for case, steps in CASES.items() for step in steps])
def test_a_loss_that_depends_on_no_run(case: str, step: Any, dropout: Any) -> None:
    """It is returned itself, or it is the error that names the cause and the module; the next step is right."""
    m, x = Model(nn.LSTM, dropout), lm.inputs()
    loss = step(m, x)
    if OUTCOMES[case]:
        cause = re.escape(OUTCOMES[case]).replace(r"\{modules\}", "LSTM(, GRU)?")
        with pytest.raises(RuntimeError, match=f"^{cause}$"):
            m.reg.on_backward_begin(loss)
    else:
        assert m.reg.on_backward_begin(loss) is loss
        assert m.reg.take(loss) is None
    m.rnn.requires_grad_(True)
    m.check(m.train()(x))


@pytest.mark.parametrize("step", [step for case, steps in CASES.items() if OUTCOMES[case] for step in steps])
def test_a_run_of_another_module_is_enough(step: Any) -> None:
    """A module may be left out of a step, beside another whose run the loss depends on."""
    m, other, x = Model(nn.LSTM, PLAIN), lm.gru(), lm.inputs()
    m.reg.attach(other)
    loss, (raw, _) = step(m, x), other(x)
    torch.testing.assert_close(m.reg.on_backward_begin(loss + raw.sum()), loss + raw.sum() + lm.formula(raw, raw, 1))


@pytest.mark.parametrize("loss", [torch.zeros(1), torch.zeros(1, 1)])
def test_a_loss_of_one_element_keeps_its_shape(loss: Tensor) -> None:
    model = Attached(nn.LSTM)
    run = model(lm.inputs())
    model.check(run, loss=loss + run.loss)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_penalty_without_a_gradient_is_added_and_never_warned_of(enabled: bool) -> None:
    reg, dropout, rnn = RNNRegularizer(0.0, lm.BETA), nn.Linear(HIDDEN, HIDDEN), lm.gru().requires_grad_(not enabled)
    reg.attach(rnn, dropout)
    for _ in range(30 if enabled else 3):
        raws = [rnn(lm.inputs())[0] for _ in range(2)]
        loss = torch.stack([dropout(raw).sum() for raw in raws]).sum()
        with torch.set_grad_enabled(enabled):
            total = reg.on_backward_begin(loss)
        want = loss + torch.stack([lm.formula(raw, raw, 1, alpha=0.0) for raw in raws]).sum()
        torch.testing.assert_close(total, want)
        if enabled:
            total.backward()


def test_ar_alone_of_a_dropout_that_passes_no_gradient_is_never_warned_of() -> None:
    m = Attached(nn.LSTM, PLAIN)
    m.reg.beta = 0.0  # or the penalty of raw would be lost, which is an error
    m.dropout.register_forward_hook(lambda *given: given[-1].detach())
    for _ in range(30):
        loss = m.head(m(lm.inputs()).dropped).sum()
        assert m.reg.on_backward_begin(loss) is loss
        loss.backward()


@each_dropout
@pytest.mark.parametrize(("count", "beta"), [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (7, 1.0), (5, 0.0)])
def test_runs_over_one_step_are_warned_of_or_refused(count: int, beta: float, dropout: Any) -> None:
    model, found = Attached(nn.LSTM, dropout), []
    model.reg.beta = beta
    model(lm.inputs())  # a prefill changes nothing
    for _ in range(2):
        runs, longer = [model(lm.inputs()[:, :1]) for _ in range(count)], model(lm.inputs())
        loss = torch.stack([run.loss for run in (*runs, longer)]).sum()
        if count > 3 and beta:
            with pytest.raises(RuntimeError, match=rf"the LSTM ran {count} times over one .*stack its outputs"):
                model.reg.on_backward_begin(loss)
        else:
            total, messages = lm.warned(partial(model.reg.on_backward_begin, loss))
            want = loss + lm.formula(longer.raw, longer.dropped, 1, beta=beta)
            want = want + sum(lm.ALPHA * run.dropped.square().mean() for run in runs)
            lm.check_gradients(model, total, want)
            found += messages
    expected = f"on_backward_begin: the LSTM ran {count} times over one time step, where AR adds up"
    assert [message.partition(" and TAR")[0] for message in found] == [expected] * (count in (2, 3, 5))


@pytest.mark.parametrize(
    ("shape", "axis", "beta", "count"),
    [((1, 4), 0, 0.0, 0), ((1, 2, 3, 4), 0, 0.0, 0), ((1, 3, 4), 0, 0.0, 1), ((1, 4), 0, 1.0, 1), ((2, 1), 1, 0.0, 1)],
)
def test_a_batch_of_one_is_no_time_step_without_tar(shape: Any, axis: int, beta: float, count: int) -> None:
    module, reg = nn.Identity(), RNNRegularizer(lm.ALPHA, beta)
    reg.attach(module, time_dim=axis)
    xs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    loss = torch.stack([module(x).sum() for x in xs]).sum()
    total, messages = lm.warned(partial(reg.on_backward_begin, loss))
    torch.testing.assert_close(total, loss + sum(lm.ALPHA * x.square().mean() for x in xs))
    assert len(messages) == count


@pytest.mark.parametrize("counts", [(2, 4), (4, 2)])
def test_an_error_comes_before_the_warning_of_another_module(counts: Any) -> None:
    model, other, x = Attached(), lm.gru(), lm.inputs()[:, :1]
    model.reg.attach(other)
    losses = [model(x).loss for _ in range(counts[0])] + [other(x)[0].sum() for _ in range(counts[1])]
    with pytest.raises(RuntimeError, match="ran 4 times over one time step"):  # a warning is an error, too
        model.reg.on_backward_begin(torch.stack(losses).sum())


TIME_FIRST, X, EACH = partial(nn.GRU, HIDDEN, HIDDEN), lm.inputs(), "no mask: every step counts"
AS_BATCH, BOTH = "raw (3, 7, 6) as batch 3, time 7, hidden 6", {"valid": lambda x: VALID, "starts": lambda x: STARTS}
PACKED, X4 = pack_sequence([torch.randn(n, HIDDEN) for n in (4, 2)]), torch.randn(3, 2, 7, HIDDEN)
MASKS = "valid (3, 7): only valid steps count; starts (3, 7): changes into starts do not count"
SHOWN: dict[str, tuple[Any, dict[str, Any], Any]] = {
    f"GRU: {AS_BATCH}; {EACH}": (lm.gru, {}, X),
    f"GRU -> Dropout: raw (3, 7, 6) as time 3, batch 7, hidden 6; {EACH}": (TIME_FIRST, {"dropout": PLAIN(0.1)}, X),
    f"GRU -> FusedRNNDropout: {AS_BATCH}; {MASKS}": (lm.gru, {"dropout": FusedRNNDropout(0.1), **BOTH}, X),
    "GRU: raw (6, 6) as 2 packed sequences of up to 4 time steps, hidden 6; every step counts": (lm.gru, {}, PACKED),
    f"GRU: raw (7, 6) as time 7, hidden 6; {EACH}": (lm.gru, {}, X[0]),
    f"Identity: raw (3, 2, 7, 6) as batch 3, hidden 2, time 7, hidden 6; {EACH}": (nn.Identity, {"time_dim": 2}, X4),
}


@pytest.mark.parametrize("text", SHOWN)
def test_reprs_say_what_is_taken_for_what(text: str) -> None:
    make, options, x = SHOWN[text]
    module, reg = make(), lm.regularizer()
    handle = reg.attach(module, **options)
    label = text.partition(":")[0]
    assert repr(handle) == f"{label}: no run yet"
    module.eval()(x)
    assert repr(handle) == f"{label}: no run yet"
    result = module.train()(x)
    raw = result[0] if isinstance(result, tuple) and not hasattr(result, "data") else result
    if "dropout" in options:
        options["dropout"](raw)
    reg.clear()
    assert repr(handle) == text
    assert repr(reg) == f"RNNRegularizer(alpha=2.0, beta=1.0, layers=None)\n  {text}"
    assert repr(copy(handle)) == "Attachment: removed"
    handle.remove()
    assert repr(handle) == f"{label}: removed"
    assert repr(reg) == "RNNRegularizer(alpha=2.0, beta=1.0, layers=None)"


@pytest.mark.filterwarnings("ignore:attach. the penalties of .* in a row")
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


def test_a_run_that_waits_for_its_dropout_is_no_error_of_an_evaluation() -> None:
    m = Attached(nn.LSTM, PLAIN)
    m.rnn(lm.inputs())
    loss = m.eval()(lm.inputs()).loss
    assert m.reg.on_backward_begin(loss) is loss


def test_a_recomputation_is_no_run_that_waits_for_its_dropout() -> None:
    model = Attached(nn.GRU, PLAIN)
    for _ in range(3):
        with set_checkpoint_early_stop(False):  # the recomputation runs the hook on the RNN, too
            raw, _ = cp(model.rnn, lm.inputs())
        model.reg.on_backward_begin(model.dropout(raw).sum()).backward()


def test_a_handle_says_once_what_was_taken_for_what() -> None:
    rnn, reg, said = lm.gru(), lm.regularizer(), []
    reg.attach(nn.LSTM(HIDDEN, HIDDEN)).say = said.append  # has nothing to say, as it never runs
    for step in range(3):
        with reg.attach(rnn) as handle:
            handle.paths, handle.say = ("encoder.gru", None), said.append
            raw, _ = rnn(lm.inputs())
            assert len(said) == (step > 0)
            lm.penalty_of(reg, raw)
    assert said == ["encoder.gru (GRU): raw (3, 7, 6) as batch 3, time 7, hidden 6; no mask: every step counts"]


def instructions(function: Callable[[], Any]) -> int:
    """Count the instructions of Python that a call takes in this package, which are the same on each machine."""
    counted = Counter[str]()

    def count(frame: Any, event: str, _: Any) -> Any:
        frame.f_trace_opcodes = True
        counted[event] += 1
        return count

    sys.settrace(lambda frame, *_: count(frame, *_) if "fastreg" in frame.f_code.co_filename else None)
    function()
    sys.settrace(None)
    return counted["opcode"]


def test_a_run_costs_no_more_among_1000_and_a_loss_no_more_after_1000_runs_whose_graphs_are_kept() -> None:
    model, x, kept = Attached(nn.Identity(), PLAIN, batch_first=True), torch.ones(1, 2, 2).requires_grad_(), list[Any]()

    def step(count: int) -> None:
        raws = [model.dropout(model.rnn(2 * x)) for _ in range(count)]
        kept.append(model.reg.on_backward_begin(torch.stack(raws).sum()))

    step(1)
    before, few, many, _, after = (instructions(partial(step, count)) / count for count in (1, 100, 1000, 1, 1))
    assert 0 < many < 1.1 * few
    assert 0 < after < 1.1 * before
