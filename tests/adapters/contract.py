"""The contract of the adapters; the test files of all four run it in the real trainers and learners."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastreg import RNNRegularizer, fused_ar_tar
from tests import language_model as lm
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, TIME, criterion, tokens

BATCHES = 6
IDS = [*tokens(BATCHES * BATCH, TIME)]
DATA = [{"input_ids": row} for row in IDS]


class Net(lm.Model):
    """Returns its loss in a dictionary; this contains the formula for the layers that are written out."""

    def __init__(self, *written: str, masks: Any = None, checkpointed: bool = False) -> None:
        super().__init__()
        self.second = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.channels, self.turned = nn.Identity(), nn.Identity()
        self.written, self.masks, self.checkpointed = written, masks or {}, checkpointed
        self.terms: list[Tensor] = []

    def run(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the decoded output, and raw, dropped and the axis of time of each layer."""
        _, raw, dropped = self.activations(ids)
        channels = self.channels(dropped.transpose(1, 2))  # (batch, hidden, time)
        last, _ = self.second(channels.transpose(1, 2))
        turned = self.turned(last.transpose(0, 1))  # (time, batch, hidden)
        decoded = self.decoder(turned.transpose(0, 1))
        layers = {"rnn": (raw, dropped, 1), "second": (last, last, 1), "channels": (channels, channels, 2)}
        return decoded, layers | {"turned": (turned, turned, 0), "decoder": (decoded, decoded, 1)}

    def forward(self, input_ids: Tensor) -> Any:  # pyright: ignore
        run = partial(checkpoint, self.run, use_reentrant=False) if self.checkpointed else self.run
        decoded, layers = run(input_ids)  # pyright: ignore[reportGeneralTypeIssues]
        loss = plain = criterion(decoded, input_ids)
        for layer in self.written:
            raw, dropped, time_dim = layers[layer]
            masks = {name: mask(input_ids) for name, mask in self.masks.get(layer, self.masks).items()}
            options: Any = {"time_dim": time_dim, "return_terms": True}
            penalty, *terms = fused_ar_tar(raw, dropped, ALPHA, BETA, **masks, **options)
            self.terms += [torch.stack(terms)] * self.training
            loss = loss + penalty
        return {"loss": loss, "plain": plain.detach()}


def ids_of(batch: Any) -> Tensor:
    """Return the token ids of a batch, which fastai passes on without their name."""
    return batch if isinstance(batch, Tensor) else batch["input_ids"]


def loss_of(outputs: Any, targets: Tensor) -> Tensor:
    """Return the loss of a model that returns it, or of decoded ids; targets are negative, to tell them from inputs."""
    return outputs["loss"] if isinstance(outputs, dict) else criterion(outputs, -targets)


def valid(batch: Any) -> Tensor:
    return ids_of(batch) != 3


def starts(batch: Any) -> Tensor:
    return ids_of(batch) == 2


def turned(mask: Any) -> Any:
    """Return a function of masks for a tensor that is time first."""
    return lambda batch: mask(batch).T


def keep_in_evaluation(net: Any) -> Any:
    net.rnn.eval().train = lambda mode=True: net.rnn  # as modules with a frozen backbone do
    return net


def freeze(net: Any) -> Any:
    net.embedding.requires_grad_(False)  # in training mode, as `freeze_feature_encoder()` and gradual unfreezing do
    net.rnn.requires_grad_(False)
    return net


COEFFICIENTS: dict[str, Any] = {"alpha": ALPHA, "beta": BETA}
PATHS: dict[str, Any] = {"rnn": "rnn", "dropout": "dropout"}
MASKS: dict[str, Any] = {"valid": valid, "starts": starts}
TURNED: dict[str, Any] = {name: turned(mask) for name, mask in MASKS.items()}
# the layers that are written out, the options of the model, of the adapter, and the number of accumulated batches
CASES: dict[str, tuple[list[str], dict[str, Any], dict[str, Any], int]] = {
    "one batch a step": (["rnn"], {}, PATHS, 1),
    "the mean of accumulated batches": (["rnn"], {"masks": MASKS}, PATHS | MASKS, 4),
    "checkpoints that ask for masks again": (["rnn"], {"masks": MASKS, "checkpointed": True}, PATHS | MASKS, 1),
    "layers": (["rnn", "second"], {}, {"rnn": ["rnn", "second"], "dropout": ["dropout", None]}, 1),
    "masks of each layer": (
        ["rnn", "second"],
        {"masks": {"rnn": {"valid": valid}, "second": {"starts": starts}}},
        {"rnn": ["rnn", "second"], "dropout": ["dropout", None], "valid": [valid, None], "starts": [None, starts]},
        1,
    ),
    "time first": (["turned"], {"masks": TURNED}, {"rnn": "turned", "batch_first": False} | TURNED, 1),
    "an axis of time": (["channels"], {}, {"rnn": "channels", "time_dim": 2}, 1),
    "an output that is picked": (["second"], {}, {"rnn": "second", "output": itemgetter(0)}, 1),
}
PATH = "rnn and dropout: expected the attribute path of a module, such as 'encoder.lstm', or a list of paths, got "
ONCE = "rnn and dropout: expected each path of an RNN once, with a path or None for its dropout, got "
# Errors when the adapter is made, when a fit starts, and in a step
REJECTED: list[tuple[dict[str, Any], Any, str]] = [
    ({"rnn": nn.LSTM(2, 2)}, TypeError, PATH + r"\[LSTM\(2, 2\), 'dropout'\]$"),
    ({"rnn": "rnn", "dropout": ""}, TypeError, PATH + r"\['rnn', ''\]$"),
    ({"rnn": ["rnn", "rnn"], "dropout": None}, ValueError, ONCE + r"\['rnn', 'rnn'\] and \[None, None\]$"),
    ({"dropout": ["dropout", None]}, ValueError, ONCE + r"\['rnn'\] and \['dropout', None\]$"),
    ({"time_dim": 1, "batch_first": True}, ValueError, r"batch_first and time_dim"),
    ({"output": 1}, TypeError, "output: expected a callable or None, got int"),
    ({"starts": 1}, TypeError, "starts: expected a callable or None, got int"),
    ({"starts": [1]}, TypeError, "starts: expected a callable or None, got int"),
    ({"valid": [valid, None]}, ValueError, r"valid and starts: .* each path of rnn, 1 in all, got 2 and 1$"),
    ({"drop_out": "dropout"}, TypeError, "got an unexpected keyword argument 'drop_out'$"),
    ({"rnn": "lstm"}, AttributeError, r"(Net|Module) has no attribute `lstm`"),
    ({"valid": lambda _: [1]}, TypeError, "^valid: expected a bool or integer tensor, got list"),
    ({"starts": lambda _: torch.tensor(True)}, ValueError, r"^starts: expected shape .*, got \(\)"),
    # Without paths, fastai's adapters expect a model that returns its activations.
    ({"rnn": None, "dropout": None}, (TypeError, ValueError), r"got (\[\] and \[\]|neither|dict\. Let .*)$"),
]


class Contract:
    """The tests that all adapters have to pass."""

    kind: Any = Net
    train: Callable[..., dict[str, Any]]  # `fit` with all arguments
    logs_means = True  # of the terms of all batches, or the terms of the last batch
    cleans_up = True  # after an error in a step

    def net(self, *written: str, **options: Any) -> Any:
        return lm.seeded(partial(self.kind, *written, **options))

    def fit(
        self, model: Any, options: Any = None, accumulated: int = 1, fits: int = 1, rounded: bool = False, cbs: Any = ()
    ) -> dict[str, Any]:
        """Train for an epoch in each fit, with an adapter if there are options for it, and return the last logs."""
        return self.train(model, options, accumulated, fits, rounded, cbs)

    @pytest.mark.parametrize("case", CASES)
    @lm.either
    def test_trains_the_weights_of_the_formula(self, case: str) -> None:
        written, of_model, options, accumulated = CASES[case]
        model, formula, without = self.net(**of_model), self.net(*written, **of_model), self.net(**of_model)
        logged = self.fit(model, options, accumulated)
        self.fit(formula, None, accumulated)
        self.fit(without, None, accumulated)
        lm.assert_same_weights(model, formula)
        lm.assert_other_weights(without, formula)
        terms = torch.stack(formula.terms).view(BATCHES, len(written), 2).sum(1)
        got = torch.tensor([logged["ar"], logged["tar"]])
        torch.testing.assert_close(got, terms.mean(0) if self.logs_means else terms[-1])
        assert lm.hooks_of(model) == 0

    @pytest.mark.parametrize("compiled", [False, True])  # the RNN, before
    def test_each_of_two_fits_attaches_once_and_trains_the_weights_of_the_formula(self, compiled: bool) -> None:
        own, model, formula = RNNRegularizer.attach, self.net(), self.net("rnn")
        model.rnn = torch.compile(model.rnn, backend="eager") if compiled else model.rnn
        with mock.patch.object(RNNRegularizer, "attach", autospec=True, side_effect=own) as attach:
            self.fit(model, PATHS, fits=2)
        assert attach.call_count == 2
        self.fit(formula, fits=2)
        lm.assert_same_weights(model, formula)

    def test_mixed_precision_trains_the_weights_of_the_formula(self) -> None:
        model, formula, exact = self.net(), self.net("rnn"), self.net("rnn")
        self.fit(exact)  # first, as the state of Accelerate keeps mixed precision beside Transformers 4
        self.fit(model, PATHS, rounded=True)
        self.fit(formula, rounded=True)
        lm.assert_same_weights(model, formula)
        assert any(not torch.equal(x, y) for x, y in zip(formula.parameters(), exact.parameters(), strict=True))

    @pytest.mark.parametrize("leave_out", [keep_in_evaluation, freeze])
    def test_modules_that_are_left_out_add_nothing_and_those_in_evaluation_are_warned_of_once(
        self, leave_out: Any
    ) -> None:
        model, without = leave_out(self.net()), leave_out(self.net())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert self.fit(model, PATHS, fits=2).get("ar") is None
        messages = [str(x.message) for x in seen if "penalty" in str(x.message)]
        assert ["in evaluation" in message for message in messages] == [True] * (leave_out is keep_in_evaluation)
        self.fit(without, fits=2)
        lm.assert_same_weights(model, without, rtol=0, atol=0)

    def test_what_is_taken_for_what_is_said_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        with mock.patch.object(logging.Logger, "handle") as handled:  # of the messages that a level lets pass
            self.fit(self.net(), PATHS, fits=2)
        said = [call.args[0].getMessage() for call in handled.mock_calls] + [capsys.readouterr().out]
        (shown,) = re.findall(r"rnn: LSTM -> .*", "\n".join(said))
        assert "Dropout: raw (3, 7, 6) as batch 3, time 7, hidden 6; no mask" in shown

    @pytest.mark.parametrize(("options", "error", "message"), REJECTED)
    def test_errors_leave_the_model_as_it_was(self, options: Any, error: Any, message: str) -> None:
        model = self.net()
        with pytest.raises(error, match=message):
            self.fit(model, PATHS | options)
        assert lm.hooks_of(model) == 0 or not self.cleans_up

    def test_the_core_regularizer_among_the_callbacks_is_an_error_at_once(self) -> None:
        with pytest.raises(AttributeError, match=r"RNNRegularizer. object has no attribute"):
            self.fit(self.net(), cbs=[lm.regularizer()])
