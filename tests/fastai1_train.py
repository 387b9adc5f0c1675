"""Tests of `fastreg.fastai1` with the fastai v1 on the path; `test_fastai1.py` runs them in a process a release.

fastai v1 dates from 2018 to 2020; the parts of Python, NumPy and other packages that it expects are put in
place first.
"""

from __future__ import annotations

import collections
import collections.abc
import functools
import gc
import os
import sys
import tempfile
import types
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

warnings.simplefilter("ignore")
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # load_learner unpickles a whole model


def stub(name: str, **attributes: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)


stub("pkg_resources", require=lambda *_: None)
stub("pynvml")
stub("spacy", load=None, blank=None)
stub("spacy.symbols", ORTH=65)
for kind in (int, float, object):
    setattr(np, kind.__name__, kind)
for kind in ("Iterable", "Iterator", "Sequence", "Mapping", "MutableMapping", "Collection", "Sized", "Callable"):
    setattr(collections, kind, getattr(collections.abc, kind))
array = np.array


def ragged(x: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return array(x, *args, **kwargs)
    except ValueError:
        result = np.empty(len(x), dtype=object)
        result[:] = x
        return result


np.array = ragged

import torch  # noqa: E402
from fastai import __version__ as release  # noqa: E402
from fastai.basic_train import Learner  # noqa: E402
from fastai.callback import Callback, CallbackHandler  # noqa: E402
from fastai.callbacks.fp16 import MixedPrecision  # noqa: E402
from fastai.callbacks.rnn import RNNTrainer as Stock  # noqa: E402
from fastai.text import TextLMDataBunch, Vocab, language_model_learner  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fastreg import FusedRNNDropout  # noqa: E402
from fastreg.fastai1 import RNNTrainer, fuse, unfuse  # noqa: E402
from tests.conftest import without  # noqa: E402
from tests.language_model import VOCABULARY, Model  # noqa: E402

torch.set_num_threads(1)
OLD = release in ("1.0.36", "1.0.42")
TIME = 0 if release == "1.0.36" else 1
ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
pytestmark = pytest.mark.usefixtures("quick_collections")


class Written(RNNTrainer):
    """The formula written out, where the stock callback does not compute it."""

    _order = -5

    def on_loss_begin(self, last_output: Any, **_: Any) -> Any:
        self.captured = last_output[1][-1], last_output[2][-1]
        return last_output[0] if OLD else {"last_output": last_output[0]}

    def on_backward_begin(self, last_loss: Tensor, **_: Any) -> Any:
        raw, dropped = self.captured
        steps = raw.unbind(TIME)
        changes = torch.stack([b - a for a, b in pairwise(steps)])
        loss = last_loss + self.alpha * dropped.pow(2).mean() + self.beta * changes.pow(2).mean()
        return loss if OLD else {"last_loss": loss}


def learner(alpha: float = ALPHA, beta: float = BETA) -> Any:
    random = np.random.RandomState(0)
    ids = [random.randint(2, VOCABULARY, size) for size in random.randint(30, 60, 40)]
    words = Vocab(["xxunk", "xxpad", *map(str, range(2, VOCABULARY))])
    torch.manual_seed(0)
    np.random.seed(0)
    data = TextLMDataBunch.from_ids(
        tempfile.mkdtemp(), vocab=words, train_ids=ids[:30], valid_ids=ids[30:], bs=8, bptt=16
    )
    if OLD:
        return language_model_learner(data, bptt=16, emb_sz=32, nh=48, nl=2, alpha=alpha, beta=beta)
    from fastai.text import AWD_LSTM, awd_lstm_lm_config

    config = {**awd_lstm_lm_config, "emb_sz": 32, "n_hid": 48, "n_layers": 2}
    return language_model_learner(data, AWD_LSTM, config=config, pretrained=False, alpha=alpha, beta=beta)


def with_trainer(trainer: type[RNNTrainer], bptt: int, adjust: bool) -> Any:
    learn = learner()
    learn.callbacks = [cb for cb in learn.callbacks if not isinstance(cb, Stock)]
    learn.callbacks.append(trainer(learn, bptt, ALPHA, BETA, adjust))
    return learn


def trained(learn: Any, *callbacks: Callback) -> Tensor:
    torch.manual_seed(1)
    np.random.seed(1)
    learn.fit(1, 5e-3, callbacks=[*callbacks])
    return torch.cat([p.detach().float().flatten() for p in learn.model.parameters()])


@functools.cache
def stock(alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """Return the weights that fastai's own callback trains."""
    return trained(learner(alpha, beta))


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# The same weights


def test_trains_the_weights_of_fastai_and_of_the_formula() -> None:
    fused = fuse(learner())
    weights, last = trained(fused), fused.callbacks[-1]
    assert gap(weights, stock()) < 1e-5
    assert gap(weights, trained(with_trainer(Written, 16, adjust=False))) < 1e-5
    for alpha, beta in ((0.0, 0.0), (ALPHA, 0.0), (0.0, BETA)):
        assert gap(weights, stock(alpha, beta)) > 1e-3
    assert last.regularizer.ar > 0 < last.regularizer.tar


@pytest.mark.skipif(release == "1.0.36", reason="its mixed precision halves the token ids, too")
def test_the_loss_scale_scales_the_penalty_too() -> None:
    weights = []
    for learn in (with_trainer(Written, 16, adjust=False), fuse(learner())):  # of float32, to compare closely
        learn.callbacks.insert(0, MixedPrecision(learn, 64.0, **({} if OLD else {"dynamic": False})))
        weights.append(trained(learn))
    assert gap(*weights) < 1e-5


def test_a_fused_dropout_trains_the_stock_weights(formed: list[Any]) -> None:
    fused = fuse(fuse(learner()), dropout=True)
    module, last = fused.model[1].output_dp, fused.callbacks[-1]
    assert fuse(fused, dropout=True).model[1].output_dp is module
    assert (isinstance(module, FusedRNNDropout), module.ar_of, module.batch_first) == (True, "raw", TIME == 1)
    assert gap(trained(fused), stock()) < 1e-5
    assert formed == []  # all were the dropout's
    assert last.regularizer.ar > 0 < last.regularizer.tar
    x = torch.ones(2, 3, 32)
    assert module.eval()(x) is x


def test_a_schedule_reaches_the_fused_dropout() -> None:
    class Off(Callback):
        def on_batch_begin(self, **_: Any) -> None:
            trainer.alpha = trainer.beta = 0.0

    learn = fuse(learner(), dropout=True)
    trainer = learn.callbacks[-1]
    assert gap(trained(learn, Off()), stock(0.0, 0.0)) < 1e-5


# The callback


class Spy(Callback):
    """Record the lr of each optimizer step, and the arguments of the callbacks."""

    def __init__(self, learn: Any, fails: bool = False) -> None:
        self.learn, self.lengths, self.stepped, self.decays, self.between, self.outputs = learn, [], [], [], [], []
        self.fails = fails

    def on_batch_begin(self, train: bool, last_input: Any, **_: Any) -> None:
        if train:
            self.lengths.append(last_input.shape[TIME])
            self.between.append(self.lrs())

    def on_loss_begin(self, last_output: Any, **_: Any) -> None:
        self.outputs.append(isinstance(last_output, Tensor))

    def on_backward_begin(self, last_loss: Tensor, **_: Any) -> None:
        if not self.stepped:
            step = self.learn.opt.opt.step
            self.learn.opt.opt.step = lambda *args: self.step(step, *args)

    def lrs(self) -> list[float]:
        return [group["lr"] for group in self.learn.opt.opt.param_groups]

    def step(self, step: Any, *args: Any) -> None:
        self.stepped.append(self.lrs())
        self.decays.append(list(self.learn.opt._lr))
        if self.fails:
            raise ArithmeticError("the step failed")
        step(*args)


def test_fuse_keeps_place_and_coefficients() -> None:
    learn, fused = learner(), fuse(learner())
    last, callbacks = fused.callbacks[-1], fused.callbacks[:]
    assert [type(cb).__name__ for cb in learn.callbacks] == [type(cb).__name__ for cb in callbacks] == ["RNNTrainer"]
    assert (last.bptt, last.alpha, last.beta, last.adjust) == (16 if OLD else None, ALPHA, BETA, False)
    assert getattr(fused, "rnn_trainer", last) is last
    assert all(a is b for a, b in zip(callbacks, fuse(fused).callbacks, strict=True))


def test_hooks_return_what_the_release_expects() -> None:
    assert hasattr(CallbackHandler, "_call_and_update") == (release == "1.0.61")
    learn = fuse(learner())
    spy = Spy(learn)
    learn.fit(1, callbacks=[spy])
    assert spy.outputs
    assert all(spy.outputs)  # the callbacks after it see the true output alone, in validation, too
    assert all(lrs == spy.between[0] for lrs in spy.stepped)  # not adjusted


@pytest.mark.parametrize("fails", [False, True])
def test_adjust_scales_the_lr_for_the_step_alone(fails: bool) -> None:
    learn = with_trainer(RNNTrainer, 20, adjust=True)
    spy = Spy(learn, fails)
    with pytest.raises(ArithmeticError, match="the step failed") if fails else nullcontext():
        learn.fit(1, slice(1e-4, 1e-2), callbacks=[spy])
    base = [lr for lr in (1e-4, 1e-3, 1e-2) for _ in range(2)]  # two groups a layer group, with decay and without
    assert all(lrs == pytest.approx(base) for lrs in [*spy.between, spy.lrs()])
    assert len(spy.lengths) == len(spy.stepped) > 0
    for length, lrs, decay in zip(spy.lengths, spy.stepped, spy.decays, strict=True):
        assert lrs == pytest.approx([lr * length / 20 for lr in base])
        assert decay == pytest.approx(lrs[::2])
    assert any(length != 20 for length in spy.lengths)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("what", ["fit", "loss", "step", "validate"])
def test_nothing_is_held(what: str, dropout: bool) -> None:
    """After a fit, after one that failed in the loss or the step, and after a validation."""
    learn, alive = fuse(learner(), dropout), []
    learn.model[0].register_forward_hook(lambda _m, _i, out: alive.extend(map(weakref.ref, out[0])))
    criterion = learn.loss_func
    if what == "loss":
        learn.loss_func = lambda *args: [][0]
    with suppress(IndexError, ArithmeticError):
        learn.validate() if what == "validate" else learn.fit(1, callbacks=[Spy(learn, what == "step")])
    learn.loss_func = criterion
    gc.collect()
    assert alive
    assert not any(ref() is not None for ref in alive)


def test_unfuse_puts_the_parts_of_fastai_back() -> None:
    learn, expected = learner(), learner()
    callback, dropout = learn.callbacks[0], learn.model[1].output_dp
    kind, kept = type(callback), {name: vars(callback).get(name) for name in ("alpha", "beta", "bptt", "adjust")}
    fuse(learn, dropout=True)
    assert unfuse(learn) is learn
    assert unfuse(learn) is learn
    now = learn.callbacks[0]
    assert type(now) is kind
    assert learn.model[1].output_dp is dropout
    assert {name: vars(now).get(name) for name in kept} == kept
    assert "export" not in vars(learn)
    assert getattr(learn, "rnn_trainer", None) in (now, getattr(expected, "rnn_trainer", None))
    assert gap(trained(learn), stock()) == 0


# Exports


def named(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


@pytest.mark.skipif(release == "1.0.36", reason="it has no exports yet")
@pytest.mark.parametrize("purged", [False] if OLD else [False, True])
def test_exports_load_without_fastreg(purged: bool) -> None:
    learn = fuse(learner(), dropout=True)
    trainer = learn.callbacks[-1]
    trainer.on_loss_begin((torch.ones(2, 2, 2),) * 3)
    given = {"bptt": 16 if OLD else None, "alpha": ALPHA, "beta": BETA, "adjust": False}
    by_path = dict.fromkeys(("rnn", "dropout", "output", "batch_first", "valid", "starts"))
    assert trainer.get_state() == given | by_path
    learn.fit(1)
    if purged:
        learn.purge()
    fused = learn.callbacks[0], learn.model[1].output_dp, learn.rnn_trainer
    learn.export("learner")
    assert (learn.callbacks[0], learn.model[1].output_dp, learn.rnn_trainer) == fused
    assert named(learn.callbacks[0]) == "fastreg.fastai1.RNNTrainer"
    assert isinstance(learn.model[1].output_dp, FusedRNNDropout)
    with without("fastreg"):
        if OLD:  # whose load_learner knows no language models
            state = torch.load(learn.path / "learner")
            model, (kind, kept) = state["model"], next(iter(state["cb_state"].items()))
        else:
            from fastai.basic_train import load_learner

            again = load_learner(learn.path, "learner")
            model, kind, kept = again.model, type(again.rnn_trainer), vars(again.rnn_trainer)
    assert f"{kind.__module__}.{kind.__qualname__}" == "fastai.callbacks.rnn.RNNTrainer"
    assert named(model[1].output_dp) == "fastai.text.models.awd_lstm.RNNDropout"
    assert (kept["alpha"], kept["beta"]) == (ALPHA, BETA)
    tokens = torch.randint(2, VOCABULARY, (4, 6))
    model.reset()
    learn.model.reset()
    assert torch.equal(model.eval()(tokens)[0], learn.model.eval()(tokens)[0])
    if purged:
        learn.export("gone", destroy=True)
        assert type(learn).__name__ == "ZombieLearner"


# By the paths of modules


class Alone(Model):
    """A language model that returns its output alone, and has no `reset()`."""

    def __init__(self) -> None:
        super().__init__(batch_first=TIME == 1)

    def activations(self, x: Tensor) -> Any:
        decoded, raw, dropped = super().activations(x)
        return decoded.flatten(0, 1), [raw], [dropped]


class Together(Alone):
    """The same model as fastai's callback wants it."""

    def reset(self) -> None: ...

    def forward(self, x: Tensor) -> Any:
        return self.activations(x)


def own(kind: Any, trainer: Any, *args: Any, **options: Any) -> Any:
    of = learner()  # whose batches are always the same
    torch.manual_seed(4)
    made = Learner(of.data, kind(), loss_func=of.loss_func)
    made.callbacks.append(trainer(made, *args, **options))
    return made


def marks(x: Tensor) -> Tensor:
    return (x % 3 != 0).transpose(0, TIME - 1)  # (batch, time)


PATHS: dict[str, Any] = {"rnn": "rnn", "dropout": "dropout"}
OURS: Any = (RNNTrainer, 16, ALPHA, BETA, False)


def test_modules_by_their_paths_train_the_weights_of_the_formula() -> None:
    written = trained(own(Together, Written, 16, ALPHA, BETA, False))
    learn = own(Alone, *OURS, **PATHS)
    assert gap(trained(learn), written) < 1e-5
    assert sum(len(module._forward_hooks) for module in learn.model.modules()) == 0
    assert learn.callbacks[-1].batch is None
    adjust = {"adjust": False} if release == "1.0.36" else {}
    stock = own(Alone, Stock, *([16] if OLD else []), alpha=ALPHA, beta=BETA, **adjust)
    assert gap(trained(fuse(stock, "dropout", rnn="rnn")), written) < 1e-5
    assert gap(trained(own(Alone, RNNTrainer, 16, adjust=False, **PATHS)), written) > 1e-3
    if hasattr(learn, "purge"):
        learn.purge()
        assert trained(learn).isfinite().all()
        assert learn.callbacks[-1].paths.rnns == ("rnn",)


@pytest.mark.parametrize("name", ["valid", "starts"])
def test_masks_of_the_batch(name: str) -> None:
    options: Any = {name: marks}
    by_path = trained(own(Alone, *OURS, **options, **PATHS))
    assert gap(by_path, trained(own(Together, *OURS, **options))) < 1e-5
    assert gap(by_path, trained(own(Together, *OURS))) > 1e-4


# Misuse


def sequential(learn: Any) -> None:
    learn.model = nn.Sequential(learn.model[0].encoder, learn.model[1].decoder)


def subclassed(learn: Any) -> None:
    learn.callbacks[-1].__class__ = type("Mine", (Stock,), {})


# The checks of a dropout are those of fastai v2, whose tests are in test_fastai.py.
REJECTED: dict[str, tuple[Callable[[Any], Any], dict[str, Any], type[Exception], str]] = {
    "no trainer": (lambda x: x.callbacks.clear(), {}, ValueError, "has no RNNTrainer; learn.callbacks.append"),
    "no dropout": (sequential, {"dropout": True}, ValueError, "of a LinearDecoder, .*Sequential has none"),
    "subclass": (subclassed, {}, ValueError, "Mine is a subclass of RNNTrainer, and left alone"),
    "dropout": (vars, {"dropout": 0.5}, TypeError, "dropout: expected True or False, got 0.5"),
    "rnn": (vars, {"rnn": "lstm"}, ValueError, "rnn: SequentialRNN has no such module at 'lstm'; candidates: "),
}


@pytest.mark.parametrize("what", REJECTED)
def test_fuse_rejects_and_swaps_nothing(what: str) -> None:
    prepare, options, error, message = REJECTED[what]
    learn = learner()
    prepare(learn)
    callbacks, modules = list(learn.callbacks), list(learn.model.modules())
    with pytest.raises(error, match=message):
        fuse(learn, **options)
    assert all(a is b for a, b in zip(learn.callbacks, callbacks, strict=True))
    assert all(a is b for a, b in zip(learn.model.modules(), modules, strict=True))


def test_rejects_arguments() -> None:
    for call in (fuse, unfuse, lambda learn: RNNTrainer(learn, 16)):
        with pytest.raises(TypeError, match="learn: expected a Learner, got NoneType"):
            call(None)
    with pytest.raises(ValueError, match="bptt: expected the usual number of time steps"):
        RNNTrainer(learner(), None)


def resettable(learn: Any) -> None:
    sequential(learn)
    learn.model.reset = lambda: None


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (sequential, TypeError, r"^Sequential has no reset\(\), which RNNTrainer calls"),
        (resettable, TypeError, r"^on_loss_begin: expected \(decoded, raw, dropped\).* got (a )?Tensor"),
        (lambda x: x.callbacks.append(RNNTrainer(x, 16)), ValueError, "^RNNTrainer: the learner has two of them"),
        (lambda x: x.callbacks.append(Stock(x, 16)), ValueError, "^RNNTrainer: the learner has fastai's own as well"),
    ],
    ids=["no reset", "plain output", "two trainers", "fastai's own"],
)
def test_a_fit_rejects(prepare: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    learn = fuse(learner())
    prepare(learn)
    with pytest.raises(error, match=message):
        learn.fit(1)
