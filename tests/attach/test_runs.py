"""The life of a run: the outcomes of a loss, what the regularizer remembers, and what stays in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fastreg import FusedRNNDropout, RNNRegularizer
from tests import language_model as lm
from tests.language_model import HIDDEN, PLAIN, STARTS, VALID, Attached, Run, each_dropout

# A frozen module beside the model


@pytest.fixture
def frozen() -> nn.GRU:
    return lm.gru().requires_grad_(False)


def constant(frozen: nn.Module, x: Tensor) -> Run:
    """Run a frozen module."""
    raw = frozen(x)[0]
    return Run(raw, raw, None, raw.sum())


@each_dropout
@pytest.mark.parametrize("checkpoints", [False, True])
def test_two_tasks_in_turns_one_of_them_frozen(checkpoints: bool, dropout: Any, frozen: nn.GRU) -> None:
    model = Attached(nn.LSTM, dropout)
    model.reg.attach(frozen)
    for step in range(3):
        run: Any = checkpoint(model, lm.inputs(), use_reentrant=False) if checkpoints else model(lm.inputs())
        with pytest.warns(UserWarning, match="GRU was never called") if step == 0 else nullcontext():
            model.check(run)
        beside = constant(frozen, lm.inputs())
        model.check(beside, loss=model.head(beside.raw).sum())


def test_a_later_loss_of_a_trained_module_is_refused_beside_a_frozen_one(frozen: nn.GRU) -> None:
    model = Attached(nn.GRU)
    model.reg.attach(frozen)
    frozen(lm.inputs())
    run = model(lm.inputs())
    model.reg.on_backward_begin(run.loss)
    with pytest.raises(RuntimeError, match="the loss depends on no run of the attached GRU"):
        model.reg.on_backward_begin(run.loss.sin())


@pytest.mark.parametrize("enabled", [False, True])
def test_a_penalty_without_a_gradient_is_added_and_never_warned_of(enabled: bool, frozen: nn.GRU) -> None:
    reg, dropout = RNNRegularizer(0.0, lm.BETA), nn.Linear(HIDDEN, HIDDEN)
    reg.attach(frozen if enabled else frozen.requires_grad_(), dropout)
    for _ in range(3):
        raws = [frozen(lm.inputs())[0] for _ in range(2)]
        loss = torch.stack([dropout(raw).sum() for raw in raws]).sum()
        with torch.set_grad_enabled(enabled):
            total = reg.on_backward_begin(loss)
        want = loss + torch.stack([lm.formula(raw, raw, 1, alpha=0.0) for raw in raws]).sum()
        torch.testing.assert_close(total, want)
        if enabled:
            total.backward()


# Runs over one time step


@each_dropout
@pytest.mark.parametrize(("count", "beta"), [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (7, 1.0), (5, 0.0)])
def test_runs_over_one_step_are_warned_of_once_and_with_tar_from_four_on_refused(
    count: int, beta: float, dropout: Any
) -> None:
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
def test_a_batch_of_one_along_a_stated_axis_is_no_time_step_without_tar(
    shape: Any, axis: int, beta: float, count: int
) -> None:
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


# What is taken for what


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


# Memory


@pytest.mark.parametrize("dropout", [None, PLAIN])
def test_a_loop_without_a_loss_or_its_dropout_does_not_fill_the_memory(dropout: Any) -> None:
    model, x = Attached(nn.Identity(), dropout, batch_first=True), torch.ones(1, 2, 2, requires_grad=True)
    for _ in range(2500):
        model.rnn(2 * x)
    assert len(model.reg._step.runs) < 1000  # pyright: ignore


def test_recomputations_do_not_fill_the_memory() -> None:
    model = Attached(nn.GRU, PLAIN)
    for _ in range(3):
        with set_checkpoint_early_stop(False):  # the recomputation runs the hook on the RNN, too
            raw, _ = checkpoint(model.rnn, lm.inputs(), use_reentrant=False)  # pyright: ignore
        model.reg.on_backward_begin(model.dropout(raw).sum()).backward()
    assert len(model.reg._step.runs) <= 1  # pyright: ignore


# What is dropped, and said


@each_dropout
def test_runs_of_others_stay_when_a_handle_is_removed(dropout: Any) -> None:
    model, other = Attached(nn.LSTM, dropout), lm.gru()
    with model.reg.attach(other):
        run = model(lm.inputs())
        other(lm.inputs())
    model.check(run)


@pytest.mark.filterwarnings("ignore:attach. the attached LSTM was never called")
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
    counted = 0

    def count(frame: Any, event: str, _: Any) -> Any:
        nonlocal counted
        if "fastreg" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, counted = True, counted + (event == "opcode")
        return count

    sys.settrace(count)
    function()
    sys.settrace(None)
    return counted


@each_dropout
def test_a_run_costs_no_more_among_1000_in_a_step_than_among_100(dropout: Any) -> None:
    model, x = Attached(nn.Identity(), dropout, batch_first=True), torch.ones(1, 2, 2, requires_grad=True)

    def cost(count: int) -> float:
        kept = list[Tensor]()
        spent = instructions(lambda: kept.extend(model.dropout(model.rnn(2 * x)) for _ in range(count)))
        model.reg.on_backward_begin(torch.stack(kept).sum())
        return spent / count

    assert 0 < cost(1000) < 1.1 * cost(100)


def test_a_loss_costs_no_more_after_500_whose_graphs_are_kept() -> None:
    model, kept = Attached(nn.Identity(), batch_first=True), list[Tensor]()

    def step() -> int:
        loss = model.rnn(2 * torch.ones(1, 2, 2, requires_grad=True)).sum()
        return instructions(lambda: kept.append(model.reg.on_backward_begin(loss)))

    costs = [step() for _ in range(500)]
    assert 0 < costs[499] < 1.1 * costs[20]
