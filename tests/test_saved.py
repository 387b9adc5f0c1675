"""Files that release 0.3.0 saved: see `tests/data/README.md`."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from fastreg import FusedRNNDropout
from tests.conftest import skip_without
from tests.language_model import check_gradients

DATA = Path(__file__).parent / "data"


def load(name: str) -> Any:
    return torch.load(DATA / name, weights_only=False)


@pytest.mark.parametrize("name", ["model.pt", "model_of_raw.pt"])
def test_a_model_with_a_fused_dropout_trains(name: str) -> None:
    model = load(name)
    dropout = model["dropout"]
    assert dropout.take() is None  # the file holds no penalty
    raw, _ = model["rnn"](torch.randn(2, 5, 4))
    dropped = dropout(raw)
    if name == "model.pt":
        expected = 2 * dropped.square().mean() + raw.diff(dim=1).square().mean()
    else:  # time first, alpha a tensor, and no beta
        expected = 2 * raw.square().mean()
    check_gradients(model["rnn"], dropout.take().penalty, expected)
    assert dropout.take() is None
    assert torch.equal(dropout.eval()(raw), raw)
    again = pickle.loads(pickle.dumps(dropout))
    assert str(again) == str(dropout)


def test_a_state_dict_loads() -> None:
    model, other = load("model.pt"), load("model.pt")
    for x in model.parameters():
        x.data.zero_()
    model["dropout"] = FusedRNNDropout(0.5, alpha=2.0, beta=1.0)
    model.load_state_dict(torch.load(DATA / "state.pt"))
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("own", [True, False])
def test_a_model_that_was_attached_and_its_regularizer_attach_again(own: bool) -> None:
    """The regularizer is an attribute of the model, or in a file of its own beside the terms of a step.

    The release attached a regularizer with `layers`, too, so that a value in its files is no argument that was given.
    """
    model = load("attached.pt")
    regularizer, terms = pickle.loads((DATA / "regularizer.pkl").read_bytes())
    assert (terms.ar, terms.tar) == (regularizer.ar, regularizer.tar)
    torch.testing.assert_close(terms.penalty, 2 * terms.ar + terms.tar)
    regularizer = model.regularizer if own else regularizer
    assert (regularizer.alpha, regularizer.beta, regularizer.layers, regularizer.bptt) == (2.0, 1.0, "all", 5)
    regularizer = pickle.loads(pickle.dumps(regularizer))  # a file of this release
    with pytest.raises(RuntimeError, match="nothing was captured"):  # the file holds no run
        regularizer.take(torch.zeros(()))
    for _ in range(2):  # the handle in the file has nothing to remove
        handle = regularizer.attach(model["rnn"], model["dropout"])
        model.handle.remove()
        raw, _ = model["rnn"](torch.randn(2, 5, 4))
        dropped = model["dropout"](raw)
        loss = dropped.sum()
        expected = loss + 2 * dropped.square().mean() + raw.diff(dim=1).square().mean()
        check_gradients(model["rnn"], regularizer.on_backward_begin(loss), expected)
        handle.remove()
    assert "forward" not in vars(model["rnn"])


def test_a_saved_regularizer_still_regularizes_all_layers_by_hand() -> None:
    regularizer, _ = pickle.loads((DATA / "regularizer.pkl").read_bytes())
    raw, dropped = torch.randn(2, 2, 2, 5, 4)
    regularizer.on_loss_begin((0, [*raw], [*dropped]))
    expected = 2 * sum(x.square().mean() for x in dropped) + sum(x.diff(dim=1).square().mean() for x in raw)
    torch.testing.assert_close(regularizer.on_backward_begin(torch.zeros(())), expected)


@pytest.mark.filterwarnings("ignore")  # fastai's own
def test_an_exported_learner_predicts_and_trains() -> None:
    skip_without("fastai")
    from fastai.learner import load_learner
    from fastai.losses import CrossEntropyLossFlat

    from fastreg.fastai import fuse

    learn = load_learner(DATA / "learner.pkl")
    decoded, *_ = learn.model.eval()(torch.arange(10).reshape(2, 5) % 7)
    assert decoded.shape == (2, 5, 7)
    learn.loss_func = CrossEntropyLossFlat()
    with learn.no_bar(), learn.no_logging():
        fuse(learn, dropout=True).fit(1)
    names, values = learn.recorder.metric_names, learn.recorder.values[-1]
    assert {"ar", "tar"} < {*names}
    assert torch.tensor(values).gt(0).all()
