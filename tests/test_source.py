"""`Source`: the modules of a model that an adapter attaches to, by their attribute paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastreg import FusedRNNDropout
from fastreg.source import Source, Swap, attach_at, of_batch, of_language_model
from tests.language_model import BATCH, HIDDEN, TIME, Model, formula, gru, inputs, penalty_of, regularizer


@pytest.mark.parametrize(
    ("rnn", "dropout", "message"),
    [
        ("rnn", None, r"rnn: ModuleDict has no such module at 'rnn'; candidates: .*'encoder\.rnn'"),
        ("encoder.rnn", "drop", r"dropout: .* no such module at 'drop'; candidates: 'encoder\.dropout'"),
        (["encoder.rnn", "scan"], None, "batch_first: expected True for .* as the Linear does not have it"),
        (3, None, r"rnn: .* no such module at 3; candidates: .*'encoder\.rnn'"),
        (None, "encoder.dropout", "rnn: .* no such module at None"),
        ("encoder.rnn", ["a", "b"], "rnn and dropout: .* got 1 RNNs and 2 dropouts"),
    ],
)
def test_attaches_to_all_modules_until_the_stack_is_closed_or_to_none(rnn: Any, dropout: Any, message: str) -> None:
    model: Any = nn.ModuleDict({"encoder": Model(), "scan": nn.Linear(HIDDEN, HIDDEN)})
    reg = regularizer()
    with pytest.raises(ValueError, match=message):
        attach_at(reg, model, Source(rnn, dropout))
    assert not any(module._forward_hooks for module in model.modules())
    with attach_at(reg, model, Source(["encoder.rnn", "scan"], ["encoder.dropout", None]), layout=True):
        raw, _ = model["encoder"].rnn(inputs())
        last = model["scan"](dropped := model["encoder"].dropout(raw))
        torch.testing.assert_close(penalty_of(reg, last), formula(raw, dropped, 1) + formula(last, last, 1))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_default_layout_is_not_that_of_an_rnn_inside() -> None:
    with pytest.raises(ValueError, match=r"may return \(time, batch, hidden\) like the LSTM inside it"):
        attach_at(regularizer(), nn.Sequential(nn.LSTM(HIDDEN, HIDDEN)), Source(""), layout=True)


def test_a_language_model_has_a_fused_dropout_while_attached() -> None:
    model = nn.Sequential(nn.LSTM(HIDDEN, HIDDEN, batch_first=True), nn.Module())
    model[1].output_dp = own = nn.Dropout(0.1)
    source = of_language_model(Source(dropout=True), Swap("1.output_dp", nn.Dropout, FusedRNNDropout))
    with attach_at(regularizer(), model, source):
        assert type(model[1].output_dp) is FusedRNNDropout
        model.eval()
    assert model[1].output_dp is own
    assert not own.training


def fail(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("mask")


BATCH_OF_IDS = [torch.ones(2, 5), {"mask": 1}]


@pytest.mark.parametrize("name", ["valid", "starts"])
@pytest.mark.parametrize(
    ("prepare", "got"),
    [
        (lambda source: source, rf"Tensor\[{BATCH}, {TIME}, {HIDDEN}\], NoneType"),
        (lambda source: of_batch(source, lambda: BATCH_OF_IDS), r"Tensor\[2, 5\], dict"),
        (
            lambda source: of_batch(source, lambda: BATCH_OF_IDS, lambda _: True),
            rf"Tensor\[2, 5\], dict, Tensor\[{BATCH}, {TIME}, {HIDDEN}\], NoneType",
        ),
    ],
    ids=["module", "batch", "both"],
)
def test_an_error_in_a_function_of_marks_names_it_and_what_it_got(name: str, prepare: Any, got: str) -> None:
    options: Any = {name: fail}
    source = prepare(Source(gru(), **options))
    with pytest.raises(RuntimeError, match=rf"^{name}: fail\({got}\) raised KeyError: 'mask'$") as caught:
        source.masks(inputs(), hx=None)
    assert isinstance(caught.value.__cause__, KeyError)
