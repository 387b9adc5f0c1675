"""Files that earlier releases saved: see `tests/data/README.md`."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, skip_without
from tests.language_model import check_gradients, formula, pickled

DATA = ROOT / "tests" / "data"
penalty_of = partial(formula, time=-2)


@pytest.fixture(params=["0.3.0", "0.4.0", "0.5.0"])
def saved(request: pytest.FixtureRequest) -> Path:
    """Return the folder with the files of a release."""
    return DATA / request.param


def load(file: Path) -> Any:
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ["model.pt", "model_of_raw.pt"])
def test_a_model_with_a_fused_dropout_trains(name: str, saved: Path) -> None:
    model = load(saved / name)
    if name == "model.pt":
        model.load_state_dict(torch.load(saved / "state.pt"))
    dropout = model["dropout"]
    assert dropout.take() is None  # the file holds no penalty
    raw, _ = model["rnn"](torch.randn(2, 5, 4))
    dropped = dropout(raw)
    # The other model is time first, alpha is a tensor, and there is no beta.
    expected = penalty_of(raw, dropped) if name == "model.pt" else 2 * raw.square().mean()
    check_gradients(model["rnn"], dropout.take().penalty, expected)
    assert torch.equal(dropout.eval()(raw), raw)
    assert str(pickled(dropout)) == str(dropout)


@pytest.mark.parametrize("own", [True, False])
def test_a_model_that_was_attached_and_its_regularizer_attach_again(own: bool, saved: Path) -> None:
    """The regularizer is an attribute of the model, or in another file, beside the terms of a step."""
    model = load(saved / "attached.pt")
    regularizer, terms = pickle.loads((saved / "regularizer.pkl").read_bytes())
    assert (terms.ar, terms.tar) == (regularizer.ar, regularizer.tar)
    torch.testing.assert_close(terms.penalty, 2 * terms.ar + terms.tar)
    regularizer = model.regularizer if own else regularizer
    layers = "'all'" if saved.name == "0.3.0" else "None"  # which attach does not refuse if it comes from a file
    assert str(regularizer) == f"RNNRegularizer(alpha=2.0, beta=1.0, layers={layers}, bptt=5)"
    regularizer = pickled(regularizer)  # a file of this release
    with pytest.raises(RuntimeError, match="nothing was captured"):  # the file holds no run
        regularizer.take(torch.zeros(()))
    for _ in range(2):  # the handle in the file has nothing to remove
        handle = regularizer.attach(model["rnn"], model["dropout"])
        model.handle.remove()
        raw, _ = model["rnn"](torch.randn(2, 5, 4))
        dropped = model["dropout"](raw)
        loss = dropped.sum()
        check_gradients(model["rnn"], regularizer.on_backward_begin(loss), loss + penalty_of(raw, dropped))
        handle.remove()
    assert "forward" not in vars(model["rnn"])


@pytest.mark.filterwarnings("ignore")  # fastai's own
def test_an_exported_learner_predicts_and_trains(saved: Path) -> None:
    skip_without("fastai")
    from fastai.learner import load_learner
    from fastai.losses import CrossEntropyLossFlat

    from fastreg.fastai import fuse

    learn = load_learner(saved / "learner.pkl")
    decoded, *_ = learn.model.eval()(torch.arange(10).reshape(2, 5) % 7)
    assert decoded.shape == (2, 5, 7)
    learn.loss_func = CrossEntropyLossFlat()
    with learn.no_bar(), learn.no_logging():
        fuse(learn, dropout=True).fit(1)
    assert {"ar", "tar"} < {*learn.recorder.metric_names}
    assert torch.tensor(learn.recorder.values[-1]).gt(0).all()
