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


def test_a_default_layout_is_not_for_an_rnn_inside() -> None:
    with pytest.raises(ValueError, match=r"may return \(time, batch, hidden\) like the LSTM inside it"):
        attach_at(regularizer(), nn.Sequential(nn.LSTM(HIDDEN, HIDDEN)), Source(""), layout=True)


def test_a_language_model_has_a_fused_dropout_while_attached() -> None:
    model = nn.Sequential(gru(), nn.Module())
    model[1].output_dp = own = nn.Dropout(0.1)
    source = of_language_model(Source(dropout=True), Swap("1.output_dp", nn.Dropout, FusedRNNDropout))
    with attach_at(regularizer(), model, source):
        assert type(model[1].output_dp) is FusedRNNDropout
        model.eval()
    assert model[1].output_dp is own
    assert not own.training


def fail(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("mask")


def batch() -> list[Any]:
    return [torch.ones(2, 5), {"mask": 1}]


ARGUMENTS = rf"Tensor\[{BATCH}, {TIME}, {HIDDEN}\], NoneType"
OF_MODULE = Source(gru(), valid=fail)


@pytest.mark.parametrize(
    ("source", "got"),
    [
        (OF_MODULE, ARGUMENTS),
        (of_batch(OF_MODULE, batch), r"Tensor\[2, 5\], dict"),
        (of_batch(OF_MODULE, batch, lambda _: True), rf"Tensor\[2, 5\], dict, {ARGUMENTS}"),
    ],
    ids=["module", "batch", "both"],
)
def test_an_error_in_a_function_of_masks_names_it_and_its_arguments(source: Source, got: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^valid: fail\({got}\) raised KeyError: 'mask'$"):
        source.masks(inputs(), hx=None)
