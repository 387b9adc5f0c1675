"""Tests of `fastreg.fastai1` with the fastai v1 on the path; `test_fastai1.py` runs them in one process per release."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from importlib import reload
from operator import attrgetter
from typing import Any
from unittest import mock

import numpy as np
import pytest

from examples.fastai1 import stand_in

warnings.simplefilter("ignore")
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # load_learner unpickles a whole model
stand_in()
import fastai  # noqa: E402
import torch  # noqa: E402
from fastai.basic_data import DataBunch, DataLoader  # noqa: E402
from fastai.basic_train import Learner  # noqa: E402
from fastai.callback import Callback  # noqa: E402
from fastai.callbacks.fp16 import MixedPrecision  # noqa: E402
from fastai.callbacks.rnn import RNNTrainer as Stock  # noqa: E402
from fastai.text import TextLMDataBunch, Vocab, language_model_learner  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.optim import SGD  # noqa: E402

from fastreg import fastai1  # noqa: E402
from fastreg.fastai1 import RNNTrainer, fuse  # noqa: E402
from tests.adapters.contract import BATCHES, COEFFICIENTS, MASKS, PATHS, Net, loss_of, valid  # noqa: E402
from tests.adapters.learners import (  # noqa: E402
    ALPHA,
    BETA,
    ROWS,
    SUMS,
    Captures,
    LearnerContract,
    assert_holds_no_activations_after,
)
from tests.language_model import BATCH, TIME, VOCABULARY, assert_same_weights, formula, gap, hooks_of, seeded  # noqa: E402

torch.set_num_threads(1)
OLD = fastai.__version__ == "1.0.42"
STOCK: Any = {"bptt": 16} if OLD else {}
pytestmark = pytest.mark.usefixtures("quick_collections")


def learner(alpha: float = ALPHA, beta: float = BETA) -> Any:
    ids = np.random.RandomState(0).randint(2, VOCABULARY, (20, 45))  # of one length, as early releases need them
    words = Vocab(["xxunk", "xxpad", *map(str, range(2, VOCABULARY))])
    sets: dict[str, Any] = {"vocab": words, "train_ids": ids[:15], "valid_ids": ids[15:]}
    torch.manual_seed(0)
    np.random.seed(0)
    data = TextLMDataBunch.from_ids(tempfile.mkdtemp(), **sets, bs=8, bptt=16)
    if OLD:
        return language_model_learner(data, bptt=16, emb_sz=32, nh=48, nl=2, alpha=alpha, beta=beta)
    from fastai.text import AWD_LSTM, awd_lstm_lm_config

    config = {**awd_lstm_lm_config, "emb_sz": 32, "n_hid": 48, "n_layers": 2}
    return language_model_learner(data, AWD_LSTM, config=config, pretrained=False, alpha=alpha, beta=beta)


def trained(learn: Any, *callbacks: Callback, lr: float = 5e-3) -> Tensor:
    torch.manual_seed(1)
    np.random.seed(1)
    learn.fit(1, lr, callbacks=[*callbacks])
    assert hooks_of(learn.model) == 0
    return torch.cat([p.detach().float().flatten() for p in learn.model.parameters()])


def at(event: str, do: Callable[..., Any], order: int = -1000) -> Callback:
    """Return a callback that calls a function at an event, by default before other callbacks get it."""
    made = Callback()
    made._order = order
    setattr(made, event, do)
    return made


def lrs_of(learn: Any) -> list[float]:
    return [group["lr"] for group in learn.opt.opt.param_groups]


def fail(*_: Any, **__: Any) -> None:
    raise ArithmeticError


class TestContract(LearnerContract):
    """One process runs it for one release."""

    adapter = "RNNTrainer"
    fuse = staticmethod(fuse)
    learner, trained, on = staticmethod(learner), staticmethod(trained), staticmethod(at)
    callbacks = staticmethod(attrgetter("callbacks"))

    def learner_of(self, model: Any, regularized: bool = True, accumulated: int = 1, rows: Any = ROWS) -> Any:
        loader = DataLoader([(x[0] if len(x) == 1 else x, target) for x, target in rows], len(rows) // BATCHES)
        learn = Learner(DataBunch(loader, loader, path=tempfile.mkdtemp()), model, SGD, loss_func=loss_of)
        learn.callbacks += [Stock(learn, **COEFFICIENTS, **STOCK)] * regularized
        return learn

    def train(self, model: Any, options: Any, accumulated: int, fits: int, rounded: bool, cbs: Any) -> dict[str, Any]:
        if accumulated > 1 and OLD:
            pytest.skip("its optimizer steps after each batch")

        def skip(num_batch: int, **_: Any) -> Any:
            return {"skip_step": True, "skip_zero": True} if (num_batch + 1) % accumulated else None

        more = [at("on_backward_end", skip)] * (accumulated > 1)
        more += self.rounded("on_batch_begin", "on_loss_begin", 1000) if rounded else []
        return super().train(model, options, 1, fits, rounded, [*cbs, *more])

    def lrs_of_steps(self, learn: Any, lr: float) -> list[float]:
        seen = []
        skip = None if OLD else {"skip_step": True}  # after which no event follows that could restore the rate
        trained(learn, at("on_backward_end", lambda **_: seen.append(lrs_of(learn)[-1]) or skip, 1000), lr=lr)
        return [*seen, lrs_of(learn)[-1]]

    def at_batches(self, do: Callable[[], None]) -> Any:
        return at("on_batch_begin", lambda train, **_: do() if train else None, 1000)

    def rolled(self) -> Any:
        def roll(last_input: Any, last_target: Any, **_: Any) -> Any:
            last_input, last_target = last_input.roll(1, 0), last_target.roll(1, 0)
            return (last_input, last_target) if OLD else {"last_input": last_input, "last_target": last_target}

        return at("on_batch_begin", roll, 0)

    def cut_off(self, learn: Any) -> None:
        with pytest.raises(ArithmeticError):
            trained(learn, at("on_backward_end", fail, 1000), at("on_train_end", fail), lr=0.5)

    def exported(self, learn: Any) -> Any:
        if OLD:
            pytest.skip("its load_learner knows no language models, or it has no exports")
        from fastai.basic_train import load_learner

        learn.purge()  # which makes the callbacks again
        learn.export("learner")
        assert learn.callbacks[0] is learn.rnn_trainer
        return load_learner(learn.path, "learner")


def test_the_loss_scale_scales_the_penalty_too() -> None:
    weights = []
    for learn, position in ((learner(), 1), (fuse(learner()), 0)):  # of float32, to compare closely
        learn.callbacks.insert(position, MixedPrecision(learn, 64.0, **({} if OLD else {"dynamic": False})))
        weights.append(trained(learn))
    assert gap(*weights) < 1e-5


def test_named_modules_of_the_language_model_train_the_stock_weights() -> None:
    learn = fuse(learner(), rnn="0.rnns.1")  # fastai 1 takes AR of the last layer before its dropout
    assert gap(trained(learn), TestContract.stock_weights()) < 1e-5


def test_all_layers_of_the_language_model_train_the_weights_of_the_formula() -> None:
    def add(last_output: Any, **_: Any) -> None:
        layers = zip(last_output[1], last_output[2], strict=True)
        penalties.append(sum(formula(raw, dropped, 1, ALPHA, BETA) for raw, dropped in layers))

    def take(last_loss: Tensor, **_: Any) -> Any:
        last_loss = last_loss + penalties.pop()
        return last_loss if OLD else {"last_loss": last_loss}

    penalties = list[Any]()
    by_hand = trained(learner(0.0, 0.0), at("on_loss_begin", add), at("on_backward_begin", take))
    assert gap(trained(fuse(learner(), layers="all")), by_hand) < 1e-5
    assert gap(by_hand, TestContract.stock_weights()) > 1e-3


def test_beside_named_modules_an_output_of_three_that_is_not_of_awd_lstm_passes() -> None:
    now, x = RNNTrainer(learner(), 16, ALPHA, BETA, rnn="0.rnns.1"), torch.zeros(2)
    for output in ((x, x, x), (x, [x], [x, x]), (x, [x], [1]), (x, [x])):
        assert now.on_loss_begin(output, x) is None
    assert now.on_loss_begin((x, [x], [x]), x, train=False) is not None


def test_models_are_reset_once_an_epoch() -> None:
    learn = fuse(TestContract().learner_of(Net()), **PATHS)
    learn.model.reset = mock.Mock(spec=[])
    learn.fit(2)
    assert learn.model.reset.call_count == 2


@pytest.mark.parametrize("adjust", [False, True])
def test_adjust_scales_the_lrs_of_all_groups_for_a_step_that_fails_and_fuse_keeps_it(adjust: bool) -> None:
    def look(last_input: Any, **_: Any) -> None:
        factor = last_input.shape[1] / 99 if adjust else 1
        assert lrs_of(learn) == pytest.approx([factor * lr for lr in base])
        fail()

    base = [lr for lr in (1e-4, 1e-3, 1e-2) for _ in range(2)]  # two groups a layer group, with decay and without
    learn = learner()
    learn.callbacks = [RNNTrainer(learn, 99, ALPHA, BETA, adjust)]
    with pytest.raises(ArithmeticError):
        learn.fit(1, slice(1e-4, 1e-2), callbacks=[at("on_backward_end", look, 1000)])
    assert lrs_of(learn) == pytest.approx(base)
    (now,) = fuse(learn).callbacks
    assert (now.bptt, now.alpha, now.beta, now.adjust) == (99, ALPHA, BETA, adjust)


def test_a_validation_leaves_no_hooks_and_a_fit_around_it_its_weights_and_rates() -> None:
    def validate(**_: Any) -> None:
        before = lrs_of(learn)
        learn.validate()
        learn.model.train()
        assert before == lrs_of(learn)

    weights = []
    for one, own in ((learner(), {}), (fuse(learner()), {}), (fuse(learner()), {"bptt": 99, "adjust": True})):
        learn = one
        for name, value in own.items():
            setattr(learn.rnn_trainer, name, value)
        learn.validate()
        assert hooks_of(learn.model) == 0
        weights.append(trained(learn, at("on_backward_end", validate, 1000)))
    assert gap(*weights[:2]) < 1e-5 < gap(*weights[1:])


def test_no_activations_are_held_after_a_step_that_failed() -> None:
    learn = fuse(learner())

    def train() -> None:
        with pytest.raises(ArithmeticError):
            trained(learn, at("on_backward_begin", fail))

    assert_holds_no_activations_after(train, learn)


@pytest.mark.skipif(OLD, reason="it has no purge")
def test_a_learner_that_was_purged_has_the_layers_the_layout_and_the_lr_of_its_time_first_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    learn = TestContract().learner_of(Captures(), regularized=False, rows=SUMS)
    learn.callbacks.append(RNNTrainer(learn, 2 * TIME, ALPHA, BETA, layers="all", batch_first=False))
    learn.purge()
    assert learn.callbacks[0].regularizer.layers == "all"
    assert TestContract().lrs_of_steps(learn, 0.5) == [0.25] * BATCHES + [0.5]
    assert f"raw ({TIME}, {BATCH}, 6) as time {TIME}, batch {BATCH}" in capsys.readouterr().out


def turned_valid(ids: Tensor) -> Tensor:
    """Return the mask of a time-first module by a function that can be pickled."""
    return valid(ids).T


NAMED: dict[str, Any] = {"rnn": "turned", "batch_first": False, "valid": turned_valid}
PURGED: list[tuple[Any, str, dict[str, Any]]] = [(Net, "turned", NAMED), (Captures, "rnn", MASKS)]


@pytest.mark.skipif(OLD, reason="it has no purge")
@pytest.mark.parametrize(("kind", "layer", "options"), PURGED)
def test_a_learner_that_was_purged_trains_the_weights_of_the_formula(kind: Any, layer: str, options: Any) -> None:
    formula = seeded(Net, layer, masks={x: options[x] for x in MASKS if x in options})
    learn, other = (TestContract().learner_of(x, regularized=False) for x in (seeded(kind), formula))
    learn.callbacks.append(RNNTrainer(learn, None, **COEFFICIENTS, adjust=False, **options))
    learn.purge()  # which makes the model again, too
    for one in (learn, other):
        torch.manual_seed(0)
        one.fit(1, 0.5)
    assert_same_weights(learn.model, formula)


def test_the_callback_names_what_is_wrong() -> None:
    learn = learner()
    with pytest.raises(ValueError, match="bptt: expected the usual number of time steps"):
        RNNTrainer(learn, None)
    fuse(learn).callbacks.append(Stock(learn, **STOCK))
    with pytest.raises(ValueError, match=r"^RNNTrainer: .* more than one"):
        learn.fit(1)


def test_releases_with_time_first_models_are_refused() -> None:
    refused = pytest.raises(ImportError, match=r"expected fastai 1\.0\.38 or newer, .* got 1\.0\.37$")
    with mock.patch.object(fastai, "__version__", "1.0.37"), refused:
        reload(fastai1)
