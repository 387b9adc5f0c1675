"""Mistakes of newcomers that passed in silence in release 0.4.0: now an error or a warning names the remedy."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar, fused_dropout_ar_tar
from tests import language_model as lm
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, TIME

Mistake = Callable[[], Any]
RAW = lm.inputs()


def own() -> Tensor:
    """Return raw as the output of a layer that is trained."""
    return nn.Linear(HIDDEN, HIDDEN)(RAW)


def bare(take: bool = False, forwards: int = 1, **options: Any) -> FusedRNNDropout:
    """Run a fused dropout without coefficients in training."""
    dropout = FusedRNNDropout(0.3, **options)
    for _ in range(forwards):
        dropout(own())
    if take:
        dropout.take()
    return dropout


def captures(*activations: Tensor, reg: Any = None, between: Callable[[RNNRegularizer], Any] = lambda _: None) -> None:
    """Capture activations one after the other, without `on_backward_begin`."""
    reg = reg or lm.regularizer()
    for x in activations:
        reg.on_loss_begin((x, x, x))
        between(reg)


def states_as_activations(**options: Any) -> None:
    """Give `(decoded, h, c)` to `on_loss_begin`, as an LSTM returns them."""
    rnn = nn.LSTM(HIDDEN, HIDDEN, num_layers=2, batch_first=True)
    raw, (h, c) = rnn(RAW)
    reg = lm.regularizer()
    reg.on_loss_begin((nn.Linear(HIDDEN, 5)(raw), h, c), **options)
    reg.on_backward_begin(raw.mean())


WRITE = r"Write, for example, RNNRegularizer\(alpha=2\.0, beta=1\.0\)"
NO_PENALTY = r"FusedRNNDropout: there is no penalty, .* FusedRNNDropout\(p, "
STEPS = rf"raw\[0\]: expected .* got \({BATCH}, {HIDDEN}\)\. .* torch\.stack\(states, 1\)"
DISCARDED = r"on_loss_begin: the last capture is discarded, .* on_backward_begin\(loss\) .* clear\(\)"
NO_LAYOUT = rf"batch_first: .* got None: raw is \(2, {BATCH}, {HIDDEN}\), .* not its states h and c"
STATES = r"on_loss_begin: raw is .* has the size of its batch, 2\. .* not its states h and c"
# The mistake, the error or warning that it causes now, and its message
MISTAKES: dict[str, tuple[Mistake, type[Exception], str]] = {
    "no coefficients": (lambda: RNNRegularizer(), TypeError, rf"RNNRegularizer: .* 'alpha'\. {WRITE}"),  # pyright: ignore
    "one coefficient": (lambda: RNNRegularizer(2.0), TypeError, rf"RNNRegularizer: .* 'beta'\. {WRITE}"),  # pyright: ignore
    "a dropout without coefficients": (lambda: bare(True), RuntimeError, rf"{NO_PENALTY}alpha=2\.0, .*attach\(rnn"),
    "its second step": (lambda: bare(forwards=2), UserWarning, rf"{NO_PENALTY}.* write FusedRNNDropout\(p, 0, 0\)"),
    "a list of time steps": (lambda: fused_ar_tar([*RAW.unbind(1)], [*RAW.unbind(1)], ALPHA, BETA), ValueError, STEPS),
    "a second capture": (lambda: captures(own(), own()), UserWarning, DISCARDED),
    "a second capture, the first with a gradient": (lambda: captures(own(), RAW), UserWarning, DISCARDED),
    "states for activations": (states_as_activations, ValueError, NO_LAYOUT),
    "states, batch first": (lambda: states_as_activations(batch_first=True), UserWarning, STATES),
    "states, with time_dim": (lambda: states_as_activations(time_dim=1), UserWarning, STATES),
}


@pytest.mark.parametrize(("mistake", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told(mistake: Mistake, kind: type[Exception], message: str) -> None:
    if not issubclass(kind, Warning):
        with pytest.raises(kind, match=message):
            mistake()
        return
    with pytest.warns(kind, match=f"^{message}") as caught:
        mistake()
    assert [warning.filename for warning in caught] == [__file__]


def attached(dropout: FusedRNNDropout) -> None:
    """Run a dropout attached, and then twice without the regularizer."""
    rnn, reg = lm.gru(), lm.regularizer()
    with reg.attach(rnn, dropout):
        lm.run(rnn, dropout)
    for _ in range(2):
        lm.run(rnn, dropout)


def in_evaluation(dropout: FusedRNNDropout) -> None:
    dropout(RAW)
    for _ in range(2):
        assert dropout.eval()(RAW) is RAW
        assert dropout.take() is None


def loss_of(reg: RNNRegularizer) -> Tensor:
    return reg.on_backward_begin(own().mean())


RIGHT: dict[str, Mistake] = {
    "coefficients of 0 that were said": lambda: captures(RAW, reg=RNNRegularizer(0, 0), between=loss_of),
    "a dropout with coefficients of 0": lambda: bare(True, 3, alpha=0, beta=0.0),
    "a dropout with an alpha of 0": lambda: bare(True, 3, alpha=0),
    "a dropout with a beta of 0": lambda: bare(True, 3, beta=0),
    "one forward without coefficients": bare,
    "a dropout that was attached once": lambda: attached(FusedRNNDropout(0.3)),
    "a dropout that has run once, and is then attached": lambda: attached(bare()),
    "a dropout without coefficients in evaluation": lambda: in_evaluation(FusedRNNDropout(0.3)),
    "samples of a dropout without coefficients": torch.no_grad()(lambda: bare(forwards=2)),
    "captures without gradients": lambda: captures(RAW, RAW, own()),
    "captures that clear() has dropped": lambda: captures(own(), own(), between=RNNRegularizer.clear),
    "captures that an epoch drops": lambda: captures(own(), own(), between=lambda x: x.on_epoch_begin(nn.Linear(1, 1))),
    "captures that losses have taken": lambda: captures(own(), own(), between=loss_of),
    "the states of an RNN with the batch second": lambda: states_as_activations(batch_first=False),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("right", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_silent(right: Mistake) -> None:
    right()


@pytest.mark.parametrize(
    ("mistake", "made", "message"),
    [
        (lambda dropout: [dropout(own()) for _ in range(2)], bare, "there is no penalty"),
        (lambda reg: captures(own(), own(), reg=reg), lm.regularizer, "the last capture is discarded"),
        (lambda reg: reg.on_loss_begin((torch.zeros(7, 8, 9), RAW, RAW), batch_first=True), lm.regularizer, "no axis"),
    ],
)
def test_a_warning_comes_once_for_each_object_and_again_for_its_copy(mistake: Any, made: Any, message: str) -> None:
    one = made()
    for duplicate in (lambda x: x, copy.deepcopy, lm.pickled):
        twin = duplicate(one)
        with pytest.warns(UserWarning, match=message):
            mistake(twin)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mistake(twin)


def test_none_beside_a_number_is_0_and_a_schedule_may_set_it() -> None:
    dropout, raw = FusedRNNDropout(0.3, beta=BETA), own()
    assert (dropout.alpha, dropout.beta) == (0.0, BETA)
    assert re.fullmatch(r"FusedRNNDropout\(p=0.3, alpha=0.0, beta=\d.*\)", str(dropout))
    assert str(FusedRNNDropout(0.3)) == "FusedRNNDropout(p=0.3)"
    dropout = FusedRNNDropout(0.3)
    dropout.alpha = ALPHA
    dropped, taken = dropout(raw), dropout.take()
    torch.testing.assert_close(taken and taken.penalty, lm.formula(raw, dropped, 1, ALPHA, 0.0))


def by_hand(x: Tensor, **options: Any) -> Tensor:
    """Return the penalty of captured activations."""
    reg = lm.regularizer()
    reg.on_loss_begin((x, x, x), **options)
    return lm.penalty_of(reg)


ONE, BATCHED = {"time_dim": 0}, {"batch_first": True}
# Each computes the penalty of one sequence, whose axis is said, or of a batch of that sequence.
SAID: dict[str, Callable[..., Any]] = {
    "a tensor": lambda x, **said: fused_ar_tar(x, x, ALPHA, BETA, **said),
    "dropped alone": lambda x, **said: fused_ar_tar(None, x, ALPHA, 0.0, **said),
    "a list": lambda x, **said: fused_ar_tar([x, 2 * x], [x, x], ALPHA, BETA, **said),
    "by hand": by_hand,
    "a dropout": lambda x, **said: fused_dropout_ar_tar(x, 0.3, ALPHA, BETA, **said)[1],
    "a FusedRNNDropout": lambda x, **said: [d := FusedRNNDropout(0.3, ALPHA, BETA, **said), d(x), d.take()][-1].penalty,
    "under vmap": lambda x, **said: torch.vmap(lambda x: fused_ar_tar(x, x, ALPHA, BETA, **said))(x[None])[0],
}
UNSAID = rf"^(raw(\[0\])?|dropped): expected \(batch, .* got \({TIME}, {HIDDEN}\)\. (Pass time_dim=0 if|.*torch\.stack)"


@pytest.mark.parametrize("call", SAID.values(), ids=SAID)
def test_one_sequence_needs_its_axis_and_counts_as_a_batch_of_one(call: Callable[..., Any]) -> None:
    for unsaid in ({}, BATCHED, {"batch_first": False}):
        with pytest.raises(ValueError, match=UNSAID):
            call(RAW[0], **unsaid)
    got, want = [lm.seeded(lambda x=x, said=said: call(x, **said)) for x, said in ((RAW[0], ONE), (RAW[:1], BATCHED))]
    torch.testing.assert_close(got, want)
