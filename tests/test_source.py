"""`Source`: the modules of a model that an adapter attaches to, by their attribute paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastreg.source import attach_all, source_at, sources_at
from tests.language_model import HIDDEN, Model, formula, inputs, penalty_of, regularizer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sources_at(3, None), TypeError, "rnn: expected an attribute path, or a list of them, got int"),  # pyright: ignore
        (lambda: sources_at("rnn", 3), TypeError, "dropout: expected an attribute path, .*, got int"),  # pyright: ignore
        (lambda: sources_at([], None), ValueError, "got 0 RNNs"),
        (lambda: sources_at("rnn", ["a", "b"]), ValueError, "got 1 RNNs and 2 dropouts"),
        (lambda: source_at(["rnn"], None), TypeError, "rnn: expected an attribute path or None, got list"),  # pyright: ignore
        (lambda: source_at(None, "drop"), ValueError, "dropout: expected None without rnn, the path of a module"),
        (lambda: source_at(None, None, batch_first=True), ValueError, "batch_first: expected None without rnn"),
        (lambda: source_at("rnn", None, valid=3), TypeError, "valid: expected a callable or None, got int"),
    ],
)
def test_rejects_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("rnn", "dropout", "message"),
    [
        ("rnn", None, r"rnn: ModuleDict has no such module at 'rnn'; candidates: 'encoder\.rnn'$"),
        ("encoder.rnn", "drop", r"dropout: .* no such module at 'drop'; candidates: 'encoder\.dropout'$"),
        (["encoder.rnn", "scan"], None, "batch_first: expected True for .* as the Linear does not have it"),
    ],
)
def test_attaches_to_all_modules_until_the_stack_is_closed_or_to_none(rnn: Any, dropout: Any, message: str) -> None:
    model: Any = nn.ModuleDict({"encoder": Model(), "scan": nn.Linear(HIDDEN, HIDDEN)})
    reg = regularizer(layers="all")
    with pytest.raises(ValueError, match=message):
        attach_all(sources_at(rnn, dropout), reg, model)
    assert not any(module._forward_hooks for module in model.modules())
    sources = sources_at(["encoder.rnn", "scan"], ["encoder.dropout", None])
    with attach_all(sources, reg, model, batch_first=True):
        raw, _ = model["encoder"].rnn(inputs())
        last = model["scan"](dropped := model["encoder"].dropout(raw))
        torch.testing.assert_close(penalty_of(reg, last), formula(raw, dropped, 1) + formula(last, last, 1))
    assert not any(module._forward_hooks for module in model.modules())
