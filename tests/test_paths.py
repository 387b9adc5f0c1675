"""`Paths`: the modules of a model that an adapter attaches to, by their attribute paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastreg.paths import check_marks, check_path, check_paths
from tests.language_model import HIDDEN, Model, formula, inputs, penalty_of, regularizer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_paths(3, None), TypeError, "rnn: expected an attribute path, or a list of them, got int"),  # pyright: ignore
        (lambda: check_paths("rnn", 3), TypeError, "dropout: expected an attribute path, .*, got int"),  # pyright: ignore
        (lambda: check_paths([], None), ValueError, "got 0 RNNs"),
        (lambda: check_paths("rnn", ["a", "b"]), ValueError, "got 1 RNNs and 2 dropouts"),
        (lambda: check_path(["rnn"], None), TypeError, "rnn: expected an attribute path or None, got list"),  # pyright: ignore
        (lambda: check_path(None, "drop"), ValueError, "dropout: expected None without rnn, the path of a module"),
        (lambda: check_path(None, None, None, True), ValueError, "batch_first: expected None without rnn"),
        (lambda: check_marks("the batch", valid=3), TypeError, "valid: expected a function of the batch, or None, got"),
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
        check_paths(rnn, dropout).attach(reg, model)
    assert not any(module._forward_hooks for module in model.modules())
    paths = check_paths(["encoder.rnn", "scan"], ["encoder.dropout", None])._replace(default_layout=True)
    with paths.attach(reg, model):
        raw, _ = model["encoder"].rnn(inputs())
        last = model["scan"](dropped := model["encoder"].dropout(raw))
        torch.testing.assert_close(penalty_of(reg, last), formula(raw, dropped, 1) + formula(last, last, 1))
    assert not any(module._forward_hooks for module in model.modules())
