"""Tests of `fastreg.fastai1` with the fastai v1 on the path; `test_fastai1.py` runs them in one process per release.

fastai v1 dates from 2018 to 2020. The parts of other packages that it expects are put in place first.
"""

from __future__ import annotations

import collections
import collections.abc
import functools
import gc
import os
import re
import sys
import tempfile
import types
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
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
vars(np).update(int=int, float=float, object=object)
vars(collections).update({name: getattr(collections.abc, name) for name in collections.abc.__all__})
import torch  # noqa: E402
from fastai import __version__ as release  # noqa: E402
from fastai.basic_train import Learner  # noqa: E402
from fastai.callback import Callback  # noqa: E402
from fastai.callbacks.fp16 import MixedPrecision  # noqa: E402
from fastai.callbacks.rnn import RNNTrainer as Stock  # noqa: E402
from fastai.text import TextLMDataBunch, Vocab, language_model_learner  # noqa: E402
from torch import Tensor  # noqa: E402

from fastreg import FusedRNNDropout  # noqa: E402
from fastreg.fastai1 import RNNTrainer, fuse, unfuse  # noqa: E402
from tests.conftest import without  # noqa: E402
from tests.language_model import VOCABULARY, Model, gap, hooks_of  # noqa: E402

torch.set_num_threads(1)
OLD = release in ("1.0.36", "1.0.42")
TIME = 0 if release == "1.0.36" else 1
ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
pytestmark = pytest.mark.usefixtures("quick_collections")


def learner(alpha: float = ALPHA, beta: float = BETA) -> Any:
    random = np.random.RandomState(0)
    ids = random.randint(2, VOCABULARY, (40, 45))  # of one length, as early releases make an array of them
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


def trained(learn: Any, *callbacks: Callback) -> Tensor:
    torch.manual_seed(1)
    np.random.seed(1)
    learn.fit(1, 5e-3, callbacks=[*callbacks])
    return torch.cat([p.detach().float().flatten() for p in learn.model.parameters()])


@functools.cache
def stock(alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """Return the weights that fastai's own callback trains."""
    return trained(learner(alpha, beta))


COEFFICIENTS = [(ALPHA, BETA), (ALPHA, 0.0), (0.0, BETA), (0.0, 0.0)]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_trains_the_stock_weights(coefficients: tuple[float, float], dropout: bool) -> None:
    """A schedule sets the coefficients."""

    class Schedule(Callback):
        def on_batch_begin(self, **_: Any) -> None:
            kinds.add(type(learn.model[1].output_dp))
            now.alpha, now.beta = coefficients

    learn, kinds = fuse(learner(), dropout), set()
    (now,) = learn.callbacks
    assert gap(trained(learn, Schedule()), stock(*coefficients)) < 1e-5
    assert all(gap(stock(*coefficients), stock(*x)) > 1e-3 for x in COEFFICIENTS if x != coefficients)
    assert now.ar > 0 < now.tar
    assert (kinds == {FusedRNNDropout}) == dropout


def test_a_fit_prints_once_what_is_taken_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    learn = fuse(learner(), dropout=True)
    for _ in range(2):
        trained(learn)
    (shown,) = [line for line in capsys.readouterr().out.splitlines() if "raw" in line]
    axes = "batch .*, time" if TIME else "time .*, batch"
    assert re.fullmatch(rf"0 \(\w+\) -> 1\.output_dp \(FusedRNNDropout\): raw \(.*\) as {axes} .*; no mask.*", shown)


@pytest.mark.skipif(release == "1.0.36", reason="its mixed precision halves the token ids, too")
def test_the_loss_scale_scales_the_penalty_too() -> None:
    weights = []
    for learn, at in ((learner(), 1), (fuse(learner()), 0)):  # of float32, to compare closely
        learn.callbacks.insert(at, MixedPrecision(learn, 64.0, **({} if OLD else {"dynamic": False})))
        weights.append(trained(learn))
    assert gap(*weights) < 1e-5


class Spy(Callback):
    """Record the length of each training step, and the learning rates before it and in it."""

    _order = 1000

    def __init__(self, learn: Any, fails: bool = False) -> None:
        self.learn, self.fails, self.steps = learn, fails, []

    def present(self) -> list[float]:
        return [group["lr"] for group in self.learn.opt.opt.param_groups]

    def on_backward_begin(self, **_: Any) -> None:
        self.before = self.present()

    def on_backward_end(self, last_input: Any, **_: Any) -> None:
        self.steps.append((last_input.shape[TIME], self.before, self.present()))
        if self.fails:
            raise ArithmeticError("the step failed")


@pytest.mark.parametrize(("adjust", "fails"), [(False, False), (True, False), (True, True)])
def test_adjust_scales_the_lr_only_for_the_step(adjust: bool, fails: bool) -> None:
    learn = learner()
    learn.callbacks, spy = [RNNTrainer(learn, 20, ALPHA, BETA, adjust)], Spy(learn, fails)
    with pytest.raises(ArithmeticError, match="the step failed") if fails else nullcontext():
        learn.fit(1, slice(1e-4, 1e-2), callbacks=[spy])
    base = [lr for lr in (1e-4, 1e-3, 1e-2) for _ in range(2)]  # two groups a layer group, with decay and without
    assert spy.present() == pytest.approx(base)
    for length, before, lrs in spy.steps:
        assert before == pytest.approx(base)
        assert lrs == pytest.approx([lr * (length / 20 if adjust else 1) for lr in base])
    assert any(length != 20 for length, *_ in spy.steps)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("what", ["fit", "step", "validate"])
def test_no_activations_are_held(what: str, dropout: bool) -> None:
    """Neither after a fit, nor after one that failed in a step, nor after a validation."""
    learn, alive = fuse(learner(), dropout), []
    own = learn.model[1].output_dp
    learn.model[0].register_forward_hook(lambda _m, _i, out: alive.extend(map(weakref.ref, out[0])))
    with suppress(ArithmeticError):
        learn.validate() if what == "validate" else learn.fit(1, callbacks=[Spy(learn, what == "step")])
    gc.collect()
    assert alive
    assert not any(ref() is not None for ref in alive)
    assert learn.model[1].output_dp is own
    assert hooks_of(learn.model) == 0


class Late(Callback):
    """Fail when training ends, before other callbacks may."""

    _order = -1000

    def on_train_end(self, **_: Any) -> None:
        raise ArithmeticError("the end failed")


@pytest.mark.parametrize("then", [None, lambda x: fuse(x, dropout=True), unfuse, lambda x: RNNTrainer(x, 16)])
def test_a_fit_that_was_cut_off(then: Any) -> None:
    """The next fit takes off the hooks that it has left, and so do `fuse`, `unfuse` and a new `RNNTrainer`."""
    learn, other = fuse(learner(), dropout=True), learner()
    own = learn.model[1].output_dp
    for one in (learn, other):
        with pytest.raises(ArithmeticError, match="the end failed"):
            trained(one, Late())
    assert hooks_of(learn.model) > 0
    if then is not None:
        then(learn)
        assert hooks_of(learn.model) == 0
        assert learn.model[1].output_dp is own
    learn.model.load_state_dict(other.model.state_dict())
    for one in (learn, other):
        one.create_opt(1e-3)
    assert gap(trained(learn), trained(other)) < 1e-5
    assert hooks_of(learn.model) == 0


def test_fuse_and_unfuse_swap_in_place() -> None:
    learn, names = learner(), ("bptt", "alpha", "beta", "adjust")
    assert fuse(fuse(learn, valid=lambda x: x < 0), dropout=True) is learn  # with the arguments of the last call
    (now,) = learn.callbacks
    assert type(now) is RNNTrainer
    assert [vars(now)[name] for name in names] == [16 if OLD else None, ALPHA, BETA, False]
    assert gap(trained(learn), stock()) < 1e-5
    now.alpha = 3.0
    assert unfuse(unfuse(learn)) is learn
    (now,) = learn.callbacks
    assert (type(now), now.alpha, now.beta) == (Stock, 3.0, BETA)
    assert "export" not in vars(learn)
    assert gap(trained(unfuse(fuse(learner()))), stock()) == 0


@pytest.mark.skipif(OLD, reason="its load_learner knows no language models, or it has no exports")
def test_exports_load_without_fastreg() -> None:
    from fastai.basic_train import load_learner

    learn = fuse(learner(), dropout=True)
    learn.fit(1)
    learn.purge()  # which makes the callbacks again
    fused = learn.callbacks[0]
    learn.export("learner")
    assert type(fused) is RNNTrainer
    assert learn.callbacks[0] is learn.rnn_trainer is fused
    with without("fastreg"):
        again = load_learner(learn.path, "learner")
    assert (type(again.rnn_trainer), type(again.model[1].output_dp).__name__) == (Stock, "RNNDropout")
    assert (again.rnn_trainer.alpha, again.rnn_trainer.beta) == (ALPHA, BETA)
    tokens = torch.randint(2, VOCABULARY, (4, 6))
    for one in (again.model, learn.model):
        one.eval().reset()
    assert torch.equal(again.model(tokens)[0], learn.model(tokens)[0])
    assert trained(learn).isfinite().all()


class Alone(Model):
    """A language model that returns only its output, and has no `reset()`."""

    def activations(self, x: Tensor) -> Any:
        decoded, raw, dropped = super().activations(x)
        return decoded.flatten(0, 1), [raw], [dropped]


class Together(Alone):
    """The same model as fastai's callback wants it."""

    forward = Alone.activations  # pyright: ignore[reportAssignmentType]

    def reset(self) -> None: ...


def own(kind: Any, trainer: Any, *args: Any, **options: Any) -> Any:
    of = learner()  # whose batches are always the same
    torch.manual_seed(4)
    made = Learner(of.data, kind(batch_first=TIME == 1), loss_func=of.loss_func)
    made.callbacks.append(trainer(made, *args, **options))
    return made


PATHS: dict[str, Any] = {"rnn": "rnn", "dropout": "dropout"}
OURS: Any = (RNNTrainer, 16, ALPHA, BETA, False)
STOCK: Any = (Stock, *([16] if OLD else []), ALPHA, BETA, *([False] if release == "1.0.36" else []))


def test_modules_by_their_paths_train_the_stock_weights() -> None:
    expected, learn = trained(own(Together, *STOCK)), own(Alone, *OURS, **PATHS)
    assert gap(trained(learn), expected) < 1e-5
    assert hooks_of(learn.model) == 0
    assert gap(trained(fuse(own(Alone, *STOCK), "dropout", rnn="rnn")), expected) < 1e-5
    assert gap(trained(own(Alone, RNNTrainer, 16, adjust=False, **PATHS)), expected) > 1e-3


@pytest.mark.parametrize("name", ["valid", "starts"])
def test_masks_of_the_batch(name: str) -> None:
    options: Any = {name: lambda x: (x % 3 != 0).transpose(0, TIME - 1)}  # (batch, time)
    weights = trained(own(Alone, *OURS, **options, **PATHS))
    assert gap(weights, trained(own(Together, *OURS, **options))) < 1e-5
    assert gap(weights, trained(own(Together, *STOCK))) > 1e-4


def subclassed(learn: Any) -> None:
    learn.callbacks[-1].__class__ = type("Mine", (Stock,), {})


REJECTED: list[tuple[Callable[[Any], Any], Callable[[Any], Any], type[Exception], str]] = [
    (subclassed, fuse, ValueError, "has no RNNTrainer of fastai's own class"),
    (vars, lambda x: fuse(x, rnn="lstm"), ValueError, "rnn: SequentialRNN has no such module at 'lstm'"),
    (vars, lambda _: fuse(None), TypeError, "learn: expected a Learner, got NoneType"),
    (vars, lambda x: fuse(x, True, output=len), TypeError, "rnn: expected the path of the RNN that output"),
    (
        vars,
        lambda x: fuse(x, alpha=3.0),
        TypeError,
        "alpha: expected no coefficient, as fuse keeps those of the learner",
    ),
    (vars, lambda x: RNNTrainer(x, None), ValueError, "bptt: expected the usual number of time steps"),
    (lambda x: fuse(x).callbacks.append(Stock(x, 16)), lambda x: x.fit(1), ValueError, "^RNNTrainer: .* more than one"),
]


@pytest.mark.parametrize(("prepare", "call", "error", "message"), REJECTED)
def test_rejects_and_swaps_nothing(prepare: Any, call: Any, error: type[Exception], message: str) -> None:
    learn = learner()
    prepare(learn)
    parts = [*learn.callbacks, *learn.model.modules()]
    with pytest.raises(error, match=message):
        call(learn)
    assert all(a is b for a, b in zip([*learn.callbacks, *learn.model.modules()], parts, strict=True))
