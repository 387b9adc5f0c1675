"""`Source`: the modules of a model that an adapter attaches to, by their attribute paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastreg import FusedRNNDropout
from fastreg.source import Source
from tests.language_model import HIDDEN, Model, formula, inputs, penalty_of, regularizer


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
    reg = regularizer(layers="all")
    with pytest.raises(ValueError, match=message):
        Source(rnn, dropout).attach(reg, model)
    assert not any(module._forward_hooks for module in model.modules())
    with Source(["encoder.rnn", "scan"], ["encoder.dropout", None]).attach(reg, model, layout=True):
        raw, _ = model["encoder"].rnn(inputs())
        last = model["scan"](dropped := model["encoder"].dropout(raw))
        torch.testing.assert_close(penalty_of(reg, last), formula(raw, dropped, 1) + formula(last, last, 1))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_default_layout_is_not_that_of_an_rnn_inside() -> None:
    with pytest.raises(ValueError, match=r"may return \(time, batch, hidden\) like the LSTM inside it"):
        Source("").attach(regularizer(), nn.Sequential(nn.LSTM(HIDDEN, HIDDEN)), layout=True)


def test_a_language_model_has_a_fused_dropout_while_attached() -> None:
    model = nn.Sequential(nn.LSTM(HIDDEN, HIDDEN, batch_first=True), nn.Module())
    model[1].output_dp = own = nn.Dropout(0.1)
    source = Source(dropout=True).of_language_model(fused=FusedRNNDropout, plain=nn.Dropout)
    with source.attach(regularizer(), model):
        assert type(model[1].output_dp) is FusedRNNDropout
        model.eval()
    assert model[1].output_dp is own
    assert not own.training
