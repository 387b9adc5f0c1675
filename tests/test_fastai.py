"""`fastreg.fastai` in real fastai v2 learners, against its stock callbacks."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("fastai.text.all", reason="fastai v2 is not installed: run tests/frameworks.sh")
    from fastai.callback import fp16
    from fastai.callback import rnn as stock
    from fastai.callback.core import Callback, CancelFitException, CancelStepException
    from fastai.callback.progress import CSVLogger
    from fastai.callback.schedule import lr_find  # noqa: F401
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner, Recorder, load_learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper
    from fastai.text.data import LMDataLoader, TensorText, pad_chunk
    from fastai.text.learner import TextLearner, get_text_classifier, language_model_learner
    from fastai.text.models.awdlstm import AWD_LSTM, RNNDropout, awd_lstm_clas_config, awd_lstm_lm_config
    from fastai.torch_core import set_seed

    from bench.timing import threads
    from fastreg import FusedRNNDropout, fused_ar_tar
    from fastreg.fastai import OutputDropout, RNNCallback, RNNRegularizer, fuse, rnn_cbs, unfuse
    from tests.conftest import without
    from tests.language_model import VOCABULARY as WORDS
    from tests.language_model import Model as Plain

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick_collections")]  # fastai's warnings

ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
SMALL = {"emb_sz": 24, "n_hid": 32, "n_layers": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Learner]:
    """Language model learners with equal weights."""

    def learner(alpha: float = ALPHA, beta: float = BETA, size: int = 650, bs: int = 8, **options: Any) -> Learner:
        set_seed(0)
        ids = Ids(torch.randint(0, WORDS, (n,)) for n in (size // 2, size - size // 2))
        dls = DataLoaders(LMDataLoader(ids, bs=bs, seq_len=16), LMDataLoader(ids.new_empty(), bs=bs, seq_len=16))
        dls.vocab = [str(i) for i in range(WORDS)]
        options = {"config": awd_lstm_lm_config | SMALL, "pretrained": False, "path": tmp_path} | options
        return language_model_learner(dls, AWD_LSTM, alpha=alpha, beta=beta, **options)

    return learner


def by_hand(learn: Learner, *cbs: Callback) -> Learner:
    """Return the learner with these callbacks instead of the stock ones."""
    return learn.remove_cbs([stock.RNNRegularizer, stock.RNNCallback, stock.ModelResetter]).add_cbs(list(cbs))


def with_bptt(learn: Learner) -> Learner:
    return by_hand(learn, *rnn_cbs(ALPHA, BETA, bptt=20))


def trained(learn: Learner, epochs: int = 1, **options: Any) -> Tensor:
    set_seed(1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 5e-3, **options)
    return weights(learn)


def weights(learn: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


class Ids(list):
    """A dataset that learners can be exported with."""

    def new_empty(self) -> Ids:
        return Ids(self[:1])


class Spy(Callback):
    """Record every training step as a callback that runs last sees it."""

    order = 100

    def before_fit(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def after_loss(self) -> None:
        if self.training:
            raw, out = self.learn.rnn.raw_out.detach(), self.learn.rnn.out.detach()
            changes = raw[:, 1:] - raw[:, :-1]
            tar = changes.pow(2).mean().item() if changes.numel() else 0.0
            terms = {"ar": out.pow(2).mean().item(), "tar": tar, "size": len(raw), "steps": raw.shape[1]}
            clean = self.learn.loss_func(self.learn.pred, *self.learn.yb)
            losses = {"clean": clean.item(), "loss": self.learn.loss.item(), "grad": self.learn.loss_grad.item()}
            self.seen.append(terms | losses | {"lr": []})

    def after_batch(self) -> None:
        assert self.learn.rnn.raw_out is not None
        if self.training:
            self.seen[-1]["lr"] = [hyper["lr"] for hyper in self.learn.opt.hypers]


# -- the same weights -------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "accumulation and clip": lambda: [GradientClip(0.1), GradientAccumulation(16)],
    "bf16": lambda: [fp16.MixedPrecision("bf16")],
    "fp16": lambda: [fp16.MixedPrecision("fp16", init_scale=256.0)],
}


@pytest.fixture
def cpu_amp(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU fastai's mixed precision does nothing: it names CUDA. No CPU has LSTMs in float16."""
    monkeypatch.setattr(fp16, "autocast", lambda _, dtype: torch.autocast("cpu", dtype, dtype == torch.bfloat16))
    monkeypatch.setattr(fp16, "GradScaler", lambda _, **options: torch.amp.GradScaler("cpu", **options))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.usefixtures("cpu_amp")
def test_trains_the_stock_weights(make: Callable[..., Learner], setting: str, formed: list[Any]) -> None:
    cbs = SETTINGS[setting]
    expected = trained(make(), cbs=cbs())
    close = 1e-3 if setting == "bf16" else 1e-5  # stock differences are rounded to bfloat16
    assert gap(trained(fuse(make(), dropout=True), cbs=cbs()), expected) < close
    assert formed == []  # all were the dropout's
    assert gap(trained(fuse(make()), cbs=cbs()), expected) < close
    assert gap(trained(by_hand(make(), *rnn_cbs(ALPHA, BETA)), cbs=cbs()), expected) < close
    for alpha, beta in ((ALPHA, 0.0), (0.0, BETA)):
        assert gap(trained(make(alpha, beta), cbs=cbs()), expected) > 5 * close


@pytest.mark.parametrize("dropout", [False, True])
def test_lr_find_and_validation_are_the_stock_ones(make: Callable[..., Learner], dropout: bool) -> None:
    learners, losses = [make(metrics=accuracy), fuse(make(metrics=accuracy), dropout)], []
    for learn in learners:
        before = weights(learn)
        set_seed(2)
        with learn.no_bar(), learn.no_logging():
            learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
        losses.append(torch.stack(learn.recorder.losses))
        assert gap(before, weights(learn)) == 0
    assert gap(*losses) < 1e-5
    assert gap(trained(learners[0]), trained(learners[1])) < 1e-5
    with learners[0].no_bar(), learners[1].no_bar():
        stocks, ours = (list(learn.validate()) for learn in learners)
        assert ours == pytest.approx(stocks, abs=1e-5)
        assert len(learners[1].get_preds(reorder=False)) == 2


def classifier(tmp_path: Path, rows: list[Any], alpha: float = ALPHA, **options: Any) -> Learner:
    set_seed(0)
    dls = DataLoaders(DataLoader(rows, bs=8), DataLoader(rows[:8], bs=8))
    model = get_text_classifier(AWD_LSTM, WORDS, 2, seq_len=8, config=awd_lstm_clas_config | SMALL, **options)
    loss = CrossEntropyLossFlat()
    return TextLearner(dls, model, alpha, BETA if alpha else 0, loss_func=loss, path=tmp_path, metrics=accuracy)


def test_text_classifiers(tmp_path: Path) -> None:
    """Their outputs before and after dropout are one tensor."""
    rows = [(torch.randint(2, WORDS, (20,)), torch.tensor(i % 2)) for i in range(24)]
    expected, learn = trained(classifier(tmp_path, rows)), fuse(classifier(tmp_path, rows))
    learn.add_cb(Spy())
    assert gap(trained(learn), expected) < 1e-5
    assert gap(trained(classifier(tmp_path, rows, 0)), expected) > 1e-3
    assert learn.rnn_regularizer.regularizer.ar.item() == pytest.approx(learn.spy.seen[-1]["ar"], rel=1e-5)
    assert learn.recorder.metric_names[-4:] == ["accuracy", "ar", "tar", "time"]


@pytest.mark.parametrize("max_len", [None, 16])
def test_padding_of_text_classifiers(tmp_path: Path, max_len: int | None) -> None:
    """Fastai pads by whole chunks before a text, and by the rest behind it; half of the batch is padding here."""
    texts = [torch.randint(2, WORDS, (n,)) for n in (30, 29, 21, 17, 16, 9, 3, 1)]
    padded = torch.stack([pad_chunk(TensorText(x), pad_idx=1, seq_len=8, pad_len=30) for x in texts]).as_subclass(
        Tensor
    )
    whole = padded != 1
    padded[0, 20], padded[1, 22] = 1, 1  # a pad id amid a text is a step of the text
    rows = [(TensorText(x), torch.tensor(i % 2)) for i, x in enumerate(padded)]

    class Truth(Callback):
        order = 100

        def after_loss(self) -> None:
            if self.training:
                raw = self.learn.rnn.raw_out
                self.there = whole[:, -raw.shape[1] :]
                texts = [x[t] for x, t in zip(raw.detach().double(), self.there, strict=True)]
                self.ar = torch.cat(texts).square().mean().item()
                self.tar = torch.cat([x.diff(dim=0) for x in texts]).square().mean().item()
                (self.grad,) = torch.autograd.grad(self.learn.loss_grad - self.learn.loss, raw, retain_graph=True)

    learn = fuse(classifier(tmp_path, rows, max_len=max_len), mask_padding=True)
    trained(learn, cbs=(truth := Truth()))
    assert learn.rnn_regularizer.regularizer.ar.item() == pytest.approx(truth.ar, rel=1e-5)
    assert learn.rnn_regularizer.regularizer.tar.item() == pytest.approx(truth.tar, rel=1e-5)
    assert (truth.grad[~truth.there] == 0).all()
    assert truth.grad[truth.there].abs().sum() > 0


# -- by the paths of modules, for models that return their output alone ------------------------------------------------


class Resettable(Plain):
    def reset(self) -> None: ...


class Triple(Resettable):
    """The same model as fastai's callbacks want it."""

    def forward(self, x: Tensor) -> Any:
        return self.activations(x)


PATHS: dict[str, Any] = {"rnn": "rnn", "dropout": "dropout"}


@pytest.fixture
def of(make: Callable[..., Learner], tmp_path: Path) -> Callable[..., Learner]:
    """Learners of custom models with equal weights."""

    def learner(kind: type[nn.Module], *cbs: Callback, **options: Any) -> Learner:
        dls = make().dls
        set_seed(5)
        return Learner(dls, kind(), CrossEntropyLossFlat(), cbs=list(cbs), path=tmp_path, **options)

    return learner


@pytest.mark.parametrize("setting", ["plain", "bf16"])
@pytest.mark.usefixtures("cpu_amp")
def test_modules_by_their_paths_train_the_stock_weights(of: Callable[..., Learner], setting: str) -> None:
    cbs = SETTINGS[setting]
    expected, close = trained(of(Triple, *stock.rnn_cbs(ALPHA, BETA)), cbs=cbs()), 1e-5
    if setting == "bf16":  # autograd rounds wherever it adds gradients, hooks once: neither is further from float32
        exact = trained(of(Triple, *stock.rnn_cbs(ALPHA, BETA)))
        expected, close = exact, 1.2 * gap(expected, exact)
    learners = [
        of(Plain, RNNRegularizer(ALPHA, BETA, **PATHS)),
        fuse(of(Plain, stock.RNNRegularizer(ALPHA, BETA)), **PATHS),
        fuse(of(Triple, *stock.rnn_cbs(ALPHA, BETA)), **PATHS),
        fuse(of(Plain, stock.RNNCallback(), stock.RNNRegularizer(ALPHA, BETA)), **PATHS),
    ]
    for learn in learners:
        assert gap(trained(learn, cbs=cbs()), expected) < close
        assert not any(module._forward_hooks for module in learn.model.modules())
    assert gap(trained(of(Plain), cbs=cbs()), expected) > 5 * close


def test_modules_by_their_paths_after_a_fit_that_was_cut_off(of: Callable[..., Learner]) -> None:
    learn = of(Plain, RNNRegularizer(ALPHA, BETA, **PATHS))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(learn, cbs=Stop("after_loss"))
    assert len(learn.model.rnn._forward_hooks) == 1
    exported = pickle.loads(pickle.dumps(learn.model))
    learn.remove_cb(RNNRegularizer)
    for model in (exported, learn.model):
        assert not any(module._forward_hooks for module in model.modules())


def test_valid_steps_of_the_batch(of: Callable[..., Learner]) -> None:
    def marks(x: Tensor) -> Tensor:
        return x % 3 != 0

    def starts(x: Tensor) -> Tensor:
        return x % 4 == 1

    class Written(Callback):
        """The formula, and fastai's callbacks without coefficients."""

        def after_loss(self) -> None:
            if self.training:
                raw, out, valid = self.learn.rnn.raw_out, self.learn.rnn.out, marks(self.xb[0])
                options: Any = {"valid": valid, "starts": starts(self.xb[0])}
                self.learn.loss_grad = self.learn.loss_grad + fused_ar_tar(raw, out, ALPHA, BETA, **options)

    expected = trained(of(Triple, stock.RNNCallback(), Written()))
    both: Any = {"valid": marks, "starts": starts}
    assert gap(trained(of(Plain, RNNRegularizer(ALPHA, BETA, **both, **PATHS))), expected) < 1e-5
    assert gap(trained(fuse(of(Plain, stock.RNNRegularizer(ALPHA, BETA)), **both, **PATHS)), expected) < 1e-5
    assert gap(trained(fuse(of(Triple, *stock.rnn_cbs(ALPHA, BETA)), **both)), expected) < 1e-5


def test_modules_in_evaluation_add_nothing(of: Callable[..., Learner]) -> None:
    class Frozen(Callback):
        def before_batch(self) -> None:
            self.learn.model.rnn.eval()

    expected = trained(of(Plain), cbs=Frozen())
    learn = of(Plain, RNNRegularizer(ALPHA, BETA, **PATHS))
    assert gap(trained(learn, cbs=Frozen()), expected) == 0
    assert math.isnan(learn.recorder.values[0][2])


# -- the penalty and the columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "bs"), [(650, 8), (8 * 33 + 1, 8), (40, 1), (34, 1)], ids=["many", "one step", "one row", "both"]
)
@pytest.mark.parametrize("dropout", [False, True])
def test_the_loss_stays_clean_and_the_penalty_is_differentiated(
    make: Callable[..., Learner], dropout: bool, size: int, bs: int
) -> None:
    """Where fastai's TAR is NaN for one step, and left out for one row, too."""
    learn = fuse(make(size=size, bs=bs), dropout)
    learn.add_cb(Spy())
    assert torch.isfinite(trained(learn)).all()
    assert learn.dls.train.last_len == 1 or bs == 1
    for step in learn.spy.seen:
        assert step["loss"] == step["clean"]
        assert step["grad"] - step["loss"] == pytest.approx(ALPHA * step["ar"] + BETA * step["tar"], rel=1e-3)
        assert step["ar"] > 0
        assert (step["tar"] > 0) == (step["steps"] > 1)


def test_terms_are_columns_of_every_log(tmp_path: Path) -> None:
    """As averages over the epoch's batches, weighted by their sizes."""
    rows = [(torch.full((6,), i % WORDS), torch.full((6,), i % WORDS)) for i in range(10)]
    dls = DataLoaders(DataLoader(rows, bs=8), DataLoader(rows, bs=8))
    cbs = [*rnn_cbs(ALPHA, BETA), Spy(), CSVLogger()]
    learn = Learner(dls, Triple(), CrossEntropyLossFlat(), cbs=cbs, path=tmp_path, metrics=accuracy)
    trained(learn, 2)
    names = ["epoch", "train_loss", "valid_loss", "accuracy", "ar", "tar", "time"]
    head, *log = [line.split(",") for line in (tmp_path / "history.csv").read_text().split()]
    assert learn.recorder.metric_names == head == names
    assert [step["size"] for step in learn.spy.seen] == [8, 2, 8, 2]
    for epoch, row in enumerate(log):
        a, b = learn.spy.seen[2 * epoch :][:2]
        for i, term in enumerate(("ar", "tar"), names.index("ar")):
            assert float(row[i]) == pytest.approx((8 * a[term] + 2 * b[term]) / 10, rel=1e-5)
            assert learn.recorder.values[epoch][i - 1] == float(row[i])
        assert len(row) == len(names)
    assert learn.metrics.attrgot("name") == ["accuracy"]


def test_loggers_get_numbers_alone(make: Callable[..., Learner]) -> None:
    """A `SummaryWriter` takes nothing else, as `TensorBoardCallback` gives it each column."""

    class Numbers(Callback):
        order = Recorder.order + 1

        def after_epoch(self) -> None:
            self.written = [float(x) for x in self.learn.recorder.log[2:-1]]

    for validation in (True, False):
        learn = fuse(make(metrics=accuracy))
        learn.remove_cb(Recorder)
        learn.add_cbs([Recorder(train_metrics=True, valid_metrics=validation), Numbers(), CSVLogger()])
        trained(learn)
        rows = [line.split(",") for line in (learn.path / "history.csv").read_text().split()]
        assert len(rows[0]) == len(rows[1]) == len(learn.numbers.written) + 3
        assert "None" not in rows[1]
        table = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0], strict=False))
        if validation:
            assert table["train_ar"] > 0 < table["train_tar"]
            assert math.isnan(table["valid_ar"])
            assert math.isnan(table["valid_tar"])


def test_coefficients_may_change_while_training(make: Callable[..., Learner]) -> None:
    """As numbers, or as tensors that a schedule changes in place, from 0 on."""
    coefficients = torch.zeros(2)

    class Later(Callback):
        """Regularize from the second epoch on."""

        def __init__(self, change: Callable[[Any, bool], object]) -> None:
            self.change = change

        def before_train(self) -> None:
            self.change(self.learn.rnn_regularizer, self.learn.epoch > 0)

    def numbers(regularizer: Any, on: bool) -> None:
        regularizer.alpha, regularizer.beta = ALPHA * on, BETA * on

    def tensors(_: Any, on: bool) -> None:
        coefficients.copy_(torch.tensor([ALPHA, BETA]) * on)

    want = trained(make(), 2, cbs=Later(numbers))
    for dropout in (False, True):
        assert gap(trained(fuse(make(), dropout), 2, cbs=Later(numbers)), want) < 1e-5
        learn = fuse(by_hand(make(), *rnn_cbs(*coefficients.unbind())), dropout)
        assert gap(trained(learn, 2, cbs=Later(tensors)), want) < 1e-5
        for *_, ar, tar, _ in learn.recorder.values:
            assert ar > 0 < tar


# -- the lr -----------------------------------------------------------------------------------------------------------


class Steps(Callback):
    """The lr that the optimizer steps with, and a step that may end badly."""

    order = 100
    error: type[Exception] | None = None

    def before_fit(self) -> None:
        self.lrs: list[float] = []
        inner = getattr(self.learn.opt, "opt", self.learn.opt)
        self.inner, self.step = inner, inner.step
        inner.step = self._step

    def _step(self, *args: Any) -> None:
        self.lrs.append(self.learn.opt.hypers[-1]["lr"])
        if self.error:
            raise self.error("the step failed")
        self.step(*args)

    def after_fit(self) -> None:
        self.inner.step = self.step


def torch_sgd(params: Any, **options: Any) -> OptimWrapper:
    return OptimWrapper(params, torch.optim.SGD, **options)


@pytest.mark.parametrize(
    ("options", "coefficients", "bptt"),
    [({}, (ALPHA, BETA), 8), ({"opt_func": torch_sgd}, (ALPHA, BETA), 20), ({}, (), 20)],
    ids=["fastai, changed", "torch", "no penalties"],
)
def test_bptt_scales_the_lr_for_the_step_alone(
    make: Callable[..., Learner], options: dict[str, Any], coefficients: tuple[float, ...], bptt: int
) -> None:
    learn = by_hand(make(**options), *rnn_cbs(*coefficients, bptt=20))
    learn.rnn_regularizer.bptt = bptt
    learn.add_cbs([Spy(), Steps()])
    trained(learn)
    lengths = [step["steps"] for step in learn.spy.seen]
    assert set(lengths) == {16, 1}
    assert learn.steps.lrs == pytest.approx([5e-3 * n / bptt for n in lengths])
    assert all(lr == pytest.approx(5e-3) for step in learn.spy.seen for lr in step["lr"])


def test_callbacks_without_arguments_are_the_stock_ones(make: Callable[..., Learner]) -> None:
    assert gap(trained(by_hand(make(), *rnn_cbs())), trained(make(0, 0))) == 0


@pytest.mark.parametrize("error", [ArithmeticError, CancelStepException, CancelFitException])
def test_the_lr_is_restored_when_the_step_ends_badly(make: Callable[..., Learner], error: type[Exception]) -> None:
    learn = with_bptt(make())
    learn.add_cb(Steps())
    learn.steps.error = error
    with pytest.raises(error) if error is ArithmeticError else nullcontext():
        trained(learn)
    assert learn.steps.lrs[0] == pytest.approx(5e-3 * 16 / 20)
    assert all(hyper["lr"] == pytest.approx(5e-3) for hyper in learn.opt.hypers)
    assert "_step" not in vars(learn)


def test_a_cancelled_step_leaves_the_learner_as_it_was(make: Callable[..., Learner]) -> None:
    class Cancel(Callback):
        order = 90

        def before_step(self) -> None:
            raise CancelStepException

    learn = with_bptt(make())
    before = weights(learn)
    assert gap(trained(learn, cbs=Cancel()), before) == 0
    assert "_step" not in vars(learn)
    whole = {"size": 8 * 64 + 1}  # batches of 16 steps alone
    accumulated = trained(by_hand(make(**whole), *rnn_cbs(ALPHA, BETA, bptt=16)), cbs=GradientAccumulation(16))
    assert gap(accumulated, trained(make(**whole), cbs=GradientAccumulation(16))) < 1e-5


# -- lifetimes --------------------------------------------------------------------------------------------------------


class Stop(Callback):
    """Stops a fit in the middle of training: as a user does, or by another error."""

    order = 100

    def __init__(self, event: str = "before_backward", error: type[BaseException] = KeyboardInterrupt) -> None:
        self.error = error
        setattr(self, event, self._stop)

    def _stop(self) -> None:
        if self.training and self.train_iter == 2:
            raise self.error


class Remove(Callback):
    """Does away with the regularizer once, in the middle of a fit."""

    def __init__(self, event: str, remove: Callable[[Any], object]) -> None:
        self.remove, self.regularizer = remove, None
        setattr(self, event, self._remove)

    def _remove(self) -> None:
        if self.regularizer is None:
            self.regularizer = self.learn.rnn_regularizer
            self.remove(self.learn)


CUTS = {"interrupted": "after_loss", "before the loss": "after_pred"}


@pytest.mark.parametrize("what", ["fit", *CUTS, "validate", "get_preds", "lr_find"])
@pytest.mark.parametrize("dropout", [False, True])
def test_nothing_is_held(make: Callable[..., Learner], dropout: bool, what: str) -> None:
    learn, alive = fuse(make(), dropout), []
    learn.model[1].register_forward_hook(lambda _m, _i, out: alive.extend(map(weakref.ref, out[1:])))
    with learn.no_bar(), learn.no_logging():
        if what in ("fit", *CUTS):
            learn.fit(1, cbs=[Stop(CUTS[what], CancelFitException)] if what in CUTS else [])
        elif what == "lr_find":
            learn.lr_find(num_it=8, show_plot=False, suggest_funcs=())
        else:
            getattr(learn, what)(**({"reorder": False} if what == "get_preds" else {}))
    if what == "interrupted":
        learn.loss_grad = None  # the learner's own: a graph that no backward freed
    if dropout:
        assert learn.model[1].output_dp.linked() is None
    gc.collect()
    assert alive
    assert not [ref for ref in alive if ref() is not None]


@pytest.mark.parametrize("dropout", [False, True])
def test_saved_weights(make: Callable[..., Learner], dropout: bool) -> None:
    learn, frozen = fuse(make(), dropout), make()
    for one in (learn, frozen):
        one.freeze()
    assert gap(trained(learn), trained(frozen)) < 1e-5
    assert gap(weights(learn), trained(make())) > 1e-4
    learn.save("half way")
    assert learn.model.state_dict().keys() == frozen.model.state_dict().keys()
    assert gap(weights(make().load("half way")), weights(learn)) == 0
    before = weights(learn)
    trained(learn)
    assert gap(weights(learn.load("half way")), before) == 0
    assert isinstance(learn.model[1].output_dp, FusedRNNDropout) == dropout


@pytest.mark.parametrize(
    ("dropout", "interrupted"),
    [(False, None), (True, "before_backward"), (True, "before_step")],
    ids=["callbacks", "dropout", "cut off before the step"],
)
def test_exports_load_without_fastreg(make: Callable[..., Learner], dropout: bool, interrupted: str | None) -> None:
    learn = fuse(make(), dropout)
    expected = trained(learn)
    if interrupted:
        learn.rnn_regularizer.bptt = 16
        with pytest.raises(KeyboardInterrupt):
            trained(learn, cbs=Stop(interrupted))
        assert ("_step" in vars(learn)) == (interrupted == "before_step")
        expected = weights(learn)
        learn.loss_grad = learn.pred = None  # the learner's own
    cbs, module = list(learn.cbs), learn.model[1].output_dp
    learn.export("learner.pkl")
    assert all(a is b for a, b in zip(learn.cbs, cbs, strict=True))
    assert learn.model[1].output_dp is module

    with without("fastreg"):
        again = load_learner(learn.path / "learner.pkl")
    assert [type(cb).__name__ for cb in again.cbs] == [type(cb).__name__ for cb in cbs]
    assert all(type(cb).__module__.startswith("fastai.") for cb in again.cbs)
    assert type(again.model[1].output_dp) is RNNDropout
    assert again.model[1].output_dp.p == make().model[1].output_dp.p
    assert (again.rnn_regularizer.alpha, again.rnn_regularizer.beta) == (ALPHA, BETA)
    assert again.rnn in list(again.cbs)
    assert len(again.metrics) == 0  # no columns
    assert gap(weights(again), expected) == 0
    again.dls = learn.dls
    learn.save("now")
    learn.rnn_regularizer.bptt = None  # as in the export
    learn.model.zero_grad()
    assert gap(trained(fuse(again, dropout)), trained(learn.load("now"), reset_opt=True)) < 1e-5
    assert again.recorder.metric_names == ["epoch", "train_loss", "valid_loss", "ar", "tar", "time"]


def test_deep_copies_stay_fused(make: Callable[..., Learner], formed: list[Any]) -> None:
    learn = fuse(make(), dropout=True)
    for rnn in learn.model[0].rnns:  # fastai's own, which no copy can be made of
        rnn.module.weight_hh_l0 = rnn.module.weight_hh_l0.detach()
    expected = trained(copy.deepcopy(learn))
    assert gap(weights(learn), expected) > 0
    for again in (copy.deepcopy(learn), learn):
        assert type(again.model[1].output_dp) is OutputDropout
        assert [type(cb) for cb in again.cbs] == [type(cb) for cb in learn.cbs]
        assert again.rnn_regularizer in list(again.cbs)
        assert again.rnn_regularizer.learn is again
        assert gap(trained(again), expected) == 0
        assert again.recorder.metric_names[-3:] == ["ar", "tar", "time"]
    assert formed == []


# -- fuse, and misuse -------------------------------------------------------------------------------------------------


def test_fuse_and_unfuse_swap_in_place(make: Callable[..., Learner]) -> None:
    learn = make().add_cb(Stop())
    original, kinds, old = learn.model[1].output_dp, [type(cb) for cb in learn.cbs], learn.rnn_regularizer
    assert fuse(learn) is learn
    assert [type(cb).__name__ for cb in learn.cbs] == [kind.__name__ for kind in kinds]
    assert (type(learn.rnn), type(learn.rnn_regularizer)) == (RNNCallback, RNNRegularizer)
    assert (learn.rnn_regularizer.alpha, learn.rnn_regularizer.beta) == (ALPHA, BETA)
    assert {learn.rnn_regularizer, learn.rnn} <= {*learn.cbs}
    assert all(cb.learn is learn for cb in learn.cbs)
    assert old.learn is None
    before = list(learn.cbs)
    assert all(a is b for a, b in zip(fuse(learn).cbs, before, strict=True))
    fused = fuse(learn, dropout=True).model[1].output_dp
    assert isinstance(fused, FusedRNNDropout)
    assert (fused.p, fused.alpha, fused.beta, fused.ar_of) == (original.p, ALPHA, BETA, "dropped")
    assert fuse(fuse(learn, dropout=True)).model[1].output_dp is fused
    assert [type(x).__name__ for x in learn.model.modules()].count("RNNDropout") == 3  # the others, and no original
    fused.eval()
    learn.rnn_regularizer.alpha, fused.p = 3.0, 0.75
    assert unfuse(learn) is learn
    assert [type(cb) for cb in learn.cbs] == kinds
    assert (learn.rnn_regularizer.alpha, learn.rnn_regularizer.beta) == (3.0, BETA)
    assert learn.rnn_regularizer in list(learn.cbs)
    assert learn.model[1].output_dp is original
    assert (original.p, original.training) == (0.75, False)
    before = list(learn.cbs)
    assert all(a is b for a, b in zip(unfuse(learn).cbs, before, strict=True))
    assert gap(trained(unfuse(fuse(make(), dropout=True))), trained(make())) == 0


@pytest.mark.parametrize("removed", [False, True])
def test_unfuse_after_a_fit_that_was_cut_off(make: Callable[..., Learner], removed: bool) -> None:
    learn = fuse(make(metrics=accuracy), dropout=True)
    orphan, dropout = learn.rnn_regularizer, learn.model[1].output_dp
    with pytest.raises(KeyboardInterrupt):
        trained(learn, cbs=Stop())
    assert dropout.linked() is orphan.regularizer
    if removed:
        learn.remove_cb(orphan)
        assert dropout.linked() is None
        assert copy.deepcopy(learn.metrics).attrgot("name") == ["accuracy", "ar", "tar"]
        assert pickle.loads(pickle.dumps(learn.metrics)).attrgot("name") == ["accuracy"]
    assert unfuse(learn).metrics.attrgot("name") == ["accuracy"]
    assert learn.model[1].output_dp.training


def remove(learn: Any) -> None:
    learn.remove_cb(learn.rnn_regularizer)


EVENTS = ["before_fit", "before_batch", "before_step", "after_batch", "after_epoch", "after_fit"]


@pytest.mark.parametrize(("undo", "event"), [*product([remove, unfuse], EVENTS), (remove, "after_pred")])
def test_a_regularizer_that_goes_in_the_middle_of_an_event(
    make: Callable[..., Learner], undo: Callable[[Any], object], event: str
) -> None:
    learn, other = fuse(make(), dropout=True), make()
    trained(other, cbs=Remove(event, undo) if undo is remove else [])
    gone = Remove(event, undo)
    assert gap(trained(learn, cbs=gone), weights(other)) < 1e-5
    assert type(gone.regularizer) is RNNRegularizer
    assert gone.regularizer.learn is None
    assert gone.regularizer not in list(learn.cbs)


@pytest.mark.parametrize("undo", [unfuse, remove])
def test_a_fit_cut_off_before_its_step(make: Callable[..., Learner], undo: Callable[[Any], object]) -> None:
    learn = with_bptt(make())
    with pytest.raises(KeyboardInterrupt):
        trained(learn, cbs=Stop("before_step"))
    assert "_step" in vars(learn)
    learn.rnn_regularizer.bptt = None
    trained(learn)
    learn.rnn_regularizer.bptt = 20
    with pytest.raises(KeyboardInterrupt):
        trained(learn, cbs=Stop("before_step"))
    undo(learn)
    assert "_step" not in vars(learn)
    before = weights(learn).clone()
    assert gap(trained(learn), before) > 0


class Again(Callback):
    """Runs the model once more, between its run and the loss."""

    order = 0

    def after_pred(self) -> None:
        if self.training:
            state, hidden = torch.get_rng_state(), self.learn.model[0].hidden
            self.learn.model(*self.xb)
            torch.set_rng_state(state)
            self.learn.model[0].hidden = hidden


def test_a_run_before_the_loss_does_not_pass_for_the_step(make: Callable[..., Learner], formed: list[Any]) -> None:
    assert gap(trained(fuse(make(), dropout=True), cbs=Again()), trained(make(), cbs=Again())) < 1e-5
    assert len(formed) > 0


def test_subclasses_of_the_capture_stay(make: Callable[..., Learner]) -> None:
    class Mine(stock.RNNCallback):
        pass

    learn = fuse(by_hand(make(), stock.ModelResetter(), Mine(), RNNRegularizer(ALPHA, BETA)))
    assert type(learn.mine) is Mine
    assert gap(trained(learn), trained(make())) < 1e-5


def plain(learn: Any) -> None:
    learn.model = Plain()


def subclassed(instance: Any) -> None:
    instance.__class__ = type("Mine", (type(instance),), {})


LEFT_ALONE = "fuse: the learner's Mine is a subclass of RNNRegularizer, and left alone"
ADVICE = r"fuse: the learner has no RNNRegularizer; learn\."
REJECTED: dict[str, tuple[Callable[[Any], Any], dict[str, Any], type[Exception], str]] = {
    "rnn": (plain, {"rnn": "lstm"}, ValueError, r"rnn: .* no such module at 'lstm'; candidates: 'rnn'"),
    "dropout with rnn": (plain, {"rnn": "rnn", "dropout": True}, TypeError, "dropout: expected with rnn the path"),
    "path without rnn": (plain, {"dropout": "dropout"}, TypeError, "dropout: expected True or False, got 'dropout'"),
    "valid": (plain, {"valid": 3}, TypeError, "valid: expected a function of the batch's inputs, or None"),
    "mask_padding": (plain, {"mask_padding": "no"}, TypeError, "mask_padding: expected True or False, got 'no'"),
    "no padding": (plain, {"mask_padding": True}, ValueError, "mask_padding: .* a model with a SentenceEncoder"),
    "no such dropout": (plain, {"dropout": True}, ValueError, "RNNDropout of a LinearDecoder, .*; Model has none"),
    "p": (lambda x: setattr(x.model[1].output_dp, "p", 1.0), {"dropout": True}, ValueError, "p: expected"),
    "alpha": (lambda x: setattr(x.rnn_regularizer, "alpha", -1.0), {}, ValueError, "alpha: expected"),
    "subclass": (lambda x: subclassed(x.rnn_regularizer), {}, ValueError, LEFT_ALONE),
    "fused subclass": (lambda x: subclassed(fuse(x).rnn_regularizer), {}, ValueError, LEFT_ALONE),
    "dropout of a subclass": (
        *(lambda x: subclassed(x.model[1].output_dp), {"dropout": True}),
        *(ValueError, "Mine is a subclass, left alone"),
    ),
    "no regularizer": (remove, {}, ValueError, ADVICE + r"add_cb\(.*RNNRegularizer\(alpha, beta\)\)$"),
    "no regularizer for a path": (remove, PATHS, ValueError, r"add_cb\(.*\(alpha, beta, rnn=\.\.\., dropout="),
    "no callbacks": (by_hand, {}, ValueError, ADVICE + r"add_cbs\(fastreg\.fastai\.rnn_cbs\(alpha, beta\)\)$"),
}


@pytest.mark.parametrize("what", REJECTED)
def test_fuse_rejects_and_swaps_nothing(make: Callable[..., Learner], what: str) -> None:
    prepare, options, error, message = REJECTED[what]
    learn = make()
    prepare(learn)
    cbs, modules = list(learn.cbs), list(learn.model.modules())
    with pytest.raises(error, match=message):
        fuse(learn, **options)
    assert all(a is b for a, b in zip(learn.cbs, cbs, strict=True))
    assert all(cb.learn is learn for cb in cbs)
    assert all(a is b for a, b in zip(learn.model.modules(), modules, strict=True))
    assert not any(module._forward_hooks for module in modules)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fuse(None), TypeError, "learn: expected a Learner, got NoneType"),
        (lambda: unfuse(nn.Linear(1, 1)), TypeError, "learn: expected a Learner, got Linear"),
        (lambda: RNNRegularizer(dropout="dropout"), ValueError, "dropout: expected None without rnn, the path"),
        (lambda: RNNRegularizer(rnn="rnn", mask_padding=True), ValueError, "mask_padding: expected False with"),
        (lambda: rnn_cbs(mask_padding="no"), TypeError, "mask_padding: expected True or False, got 'no'"),
        (lambda: rnn_cbs(-1.0), ValueError, "alpha"),
        (lambda: rnn_cbs(1.0, bptt=0), ValueError, "bptt"),
    ],
)
def test_rejects_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_what_is_set_on_a_callback_stays(make: Callable[..., Learner]) -> None:
    learn = make()
    learn.rnn.order = 7
    learn.rnn_regularizer.run_train, learn.rnn_regularizer.run_valid = False, True
    for swap in (fuse, unfuse):
        swap(learn)
        assert (learn.rnn.order, learn.rnn_regularizer.order) == (7, stock.RNNRegularizer.order)
        assert (learn.rnn_regularizer.run_train, learn.rnn_regularizer.run_valid) == (False, True)
    learn.rnn.order = 0
    assert gap(trained(fuse(learn)), trained(make(0, 0))) < 1e-5
    learn, usual = make(), fuse(make())
    learn.rnn_regularizer.run_valid = True  # and adds nothing to validation
    assert gap(trained(fuse(learn)), trained(usual)) < 1e-5
    assert [*learn.recorder.values[0]] == pytest.approx([*usual.recorder.values[0]])


class Stateless(Plain):
    """Returns one tensor as raw and dropped, and may keep no state."""

    def forward(self, x: Tensor) -> Any:
        decoded, raw, _ = self.activations(x)
        return decoded, raw, raw


@pytest.mark.parametrize(
    ("model", "cbs", "error", "match"),
    [
        (Resettable(), rnn_cbs(2, 1), TypeError, r"expected \(decoded, raw, dropped\) .* got a Tensor from Resettable"),
        (Stateless(), rnn_cbs(2, 1), TypeError, r"Stateless has no reset\(\), which ModelResetter calls: give it one"),
        (Triple(), [RNNRegularizer(2, 1)], RuntimeError, r"no RNNCallback captures the activations: add one"),
        (Triple(), [*stock.rnn_cbs(), *rnn_cbs(2, 1)], RuntimeError, r"more than one RNNCallback, .*learn\.remove_cb"),
        (Triple(), rnn_cbs(2, 1, mask_padding=True), ValueError, r"a model with a SentenceEncoder, .* got Triple"),
    ],
    ids=["plain output", "no reset", "no capture", "two captures", "no padding"],
)
def test_a_fit_rejects(
    make: Callable[..., Learner], model: nn.Module, cbs: list[Callback], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        trained(Learner(make().dls, model, CrossEntropyLossFlat(), cbs=cbs))


def test_models_without_state_need_no_resetter(make: Callable[..., Learner]) -> None:
    learn = Learner(make().dls, Stateless(), CrossEntropyLossFlat(), cbs=rnn_cbs(2, 1)[1:])
    before = weights(learn).clone()
    assert gap(trained(learn), before) > 0
