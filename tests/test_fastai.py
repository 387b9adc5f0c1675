"""`fastreg.fastai` in real fastai v2 learners, against its stock callbacks."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
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
    from fastai.text.data import LMDataLoader
    from fastai.text.learner import TextLearner, get_text_classifier, language_model_learner
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
    from fastai.torch_core import set_seed

    from fastreg.fastai import RNNCallback, RNNRegularizer, fuse, rnn_cbs

pytestmark = pytest.mark.filterwarnings("ignore")  # fastai's own

ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
SMALL = {"emb_sz": 24, "n_hid": 32, "n_layers": 2}
WORDS = 40


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Learner]:
    """Language model learners that are alike."""

    def learner(alpha: float = ALPHA, beta: float = BETA, size: int = 650, bs: int = 8, **options: Any) -> Learner:
        set_seed(0)
        ids = Ids(torch.randint(0, WORDS, (n,)) for n in (size // 2, size - size // 2))
        dls = DataLoaders(LMDataLoader(ids, bs=bs, seq_len=16), LMDataLoader(ids.new_empty(), bs=bs, seq_len=16))
        dls.vocab = [str(i) for i in range(WORDS)]
        options = {"config": awd_lstm_lm_config | SMALL, "pretrained": False, "path": tmp_path} | options
        return language_model_learner(dls, AWD_LSTM, alpha=alpha, beta=beta, **options)

    return learner


def by_hand(learn: Learner, *cbs: Callback) -> Learner:
    """The learner with these callbacks in the place of the stock ones."""
    return learn.remove_cbs([stock.RNNRegularizer, stock.RNNCallback, stock.ModelResetter]).add_cbs(list(cbs))


def trained(learn: Learner, epochs: int = 2, **options: Any) -> Tensor:
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
    """What every training step looks like to a callback that runs last."""

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
            self.seen.append(terms | losses | {"lr": [], "stepped": None})

    def after_batch(self) -> None:
        assert self.learn.rnn.raw_out is not None
        if self.training:
            self.seen[-1]["lr"] = [hyper["lr"] for hyper in self.learn.opt.hypers]


# -- the same weights -------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "accumulation": lambda: [GradientAccumulation(24)],
    "clip": lambda: [GradientClip(0.1)],
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
def test_the_weights_are_the_stock_ones(make: Callable[..., Learner], setting: str) -> None:
    cbs = SETTINGS[setting]
    expected = trained(make(), cbs=cbs())
    close = 1e-3 if setting == "bf16" else 1e-5  # stock differences are rounded to bfloat16
    assert gap(trained(fuse(make()), cbs=cbs()), expected) < close
    assert gap(trained(by_hand(make(), *rnn_cbs(ALPHA, BETA)), cbs=cbs()), expected) < close
    for alpha, beta in ((0.0, 0.0), (ALPHA, 0.0), (0.0, BETA)):
        assert gap(trained(make(alpha, beta), cbs=cbs()), expected) > 5 * close


def test_lr_find_is_the_stock_one(make: Callable[..., Learner]) -> None:
    learners, losses = [make(), fuse(make())], []
    for learn in learners:
        before = weights(learn)
        set_seed(2)
        with learn.no_bar(), learn.no_logging():
            learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
        losses.append(torch.stack(learn.recorder.losses))
        assert gap(before, weights(learn)) == 0
    assert gap(*losses) < 1e-5
    assert gap(trained(learners[0]), trained(learners[1])) < 1e-5


def test_text_classifiers(tmp_path: Path) -> None:
    """Their outputs before and after dropout are one tensor."""

    def learner(alpha: float = ALPHA, beta: float = BETA) -> Learner:
        set_seed(0)
        rows = [(torch.randint(2, WORDS, (20,)), torch.tensor(i % 2)) for i in range(24)]
        dls = DataLoaders(DataLoader(rows, bs=8), DataLoader(rows[:8], bs=8))
        model = get_text_classifier(AWD_LSTM, WORDS, 2, seq_len=8, config=awd_lstm_clas_config | SMALL)
        return TextLearner(dls, model, alpha, beta, loss_func=CrossEntropyLossFlat(), path=tmp_path, metrics=accuracy)

    expected = trained(learner())
    assert gap(trained(fuse(learner())), expected) < 1e-5
    assert gap(trained(learner(0, 0)), expected) > 1e-3
    learn = fuse(learner())
    learn.add_cb(Spy())
    trained(learn)
    assert learn.rnn_regularizer.regularizer.ar.item() == pytest.approx(learn.spy.seen[-1]["ar"], rel=1e-5)
    assert learn.recorder.metric_names[-4:] == ["accuracy", "ar", "tar", "time"]


@pytest.mark.parametrize(("size", "bs"), [(8 * 33 + 1, 8), (40, 1), (34, 1)], ids=["one step", "one row", "both"])
def test_one_step_and_one_row(make: Callable[..., Learner], size: int, bs: int) -> None:
    """Where fastai's TAR is NaN for one step, and left out for one row."""
    learn = fuse(make(size=size, bs=bs))
    assert learn.dls.train.last_len == 1 or bs == 1
    trained(learn, cbs=Spy())
    assert torch.isfinite(weights(learn)).all()


# -- what is added, and what is shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "bs"), [(650, 8), (8 * 33 + 1, 8), (40, 1)], ids=["many", "one step", "one row"])
def test_the_loss_stays_clean_and_the_penalty_is_differentiated(
    make: Callable[..., Learner], size: int, bs: int
) -> None:
    learn = fuse(make(size=size, bs=bs))
    learn.add_cb(Spy())
    trained(learn)
    for step in learn.spy.seen:
        assert step["loss"] == step["clean"]
        assert step["grad"] - step["loss"] == pytest.approx(ALPHA * step["ar"] + BETA * step["tar"], rel=1e-3)
        assert step["ar"] > 0
        assert (step["tar"] > 0) == (step["steps"] > 1)


def test_terms_are_columns_of_every_log(make: Callable[..., Learner]) -> None:
    learn = fuse(make(metrics=accuracy))
    learn.add_cb(Spy())
    trained(learn, cbs=CSVLogger())
    names = ["epoch", "train_loss", "valid_loss", "accuracy", "ar", "tar", "time"]
    log = (learn.path / "history.csv").read_text().split("\n")
    assert learn.recorder.metric_names == log[0].split(",") == names
    steps = len(learn.spy.seen) // 2
    for epoch in range(2):
        seen = learn.spy.seen[epoch * steps :][:steps]
        row = log[1 + epoch].split(",")
        assert len(row) == len(names)
        for term in ("ar", "tar"):
            average = sum(step[term] * step["size"] for step in seen) / sum(step["size"] for step in seen)
            assert float(row[names.index(term)]) == pytest.approx(average, rel=1e-5)
            assert learn.recorder.values[epoch][names.index(term) - 1] == float(row[names.index(term)])
    assert learn.metrics.attrgot("name") == ["accuracy"]


def test_averages_weigh_batches_by_size(tmp_path: Path) -> None:
    rows = [(torch.full((6,), i % WORDS), torch.full((6,), i % WORDS)) for i in range(10)]
    dls = DataLoaders(DataLoader(rows, bs=8), DataLoader(rows, bs=8))
    model = Model(reset=True)
    learn = Learner(dls, model, CrossEntropyLossFlat(), cbs=[*rnn_cbs(ALPHA, BETA), Spy()], path=tmp_path)
    trained(learn, 1)
    a, b = learn.spy.seen
    assert (a["size"], b["size"]) == (8, 2)
    assert learn.recorder.values[0][2] == pytest.approx((8 * a["ar"] + 2 * b["ar"]) / 10, rel=1e-5)
    assert learn.recorder.values[0][2] != pytest.approx((a["ar"] + b["ar"]) / 2, rel=1e-4)


def test_training_metrics(make: Callable[..., Learner]) -> None:
    learn = fuse(make())
    learn.remove_cb(Recorder)
    learn.add_cb(Recorder(train_metrics=True))
    trained(learn, 1)
    table = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0], strict=False))
    assert table["train_ar"] > 0 < table["train_tar"]
    assert table["valid_ar"] is table["valid_tar"] is None


def test_validation_gives_what_it_gave(make: Callable[..., Learner]) -> None:
    a, b = make(metrics=accuracy), fuse(make(metrics=accuracy))
    trained(a, 1)
    trained(b, 1)
    with a.no_bar(), b.no_bar():
        assert list(b.validate()) == pytest.approx(list(a.validate()), abs=1e-5)
        assert len(b.get_preds(reorder=False)) == 2


def test_coefficients_may_change_while_training(make: Callable[..., Learner]) -> None:
    class Off(Callback):
        def before_train(self) -> None:
            self.learn.rnn_regularizer.alpha = self.learn.rnn_regularizer.beta = 0.0

    assert gap(trained(fuse(make()), cbs=Off()), trained(make(0, 0))) < 1e-5


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


@pytest.mark.parametrize("wrapped", [False, True], ids=["fastai", "torch"])
def test_bptt_scales_the_lr_for_the_step_alone(make: Callable[..., Learner], wrapped: bool) -> None:
    options = {"opt_func": lambda params, **kw: OptimWrapper(params, torch.optim.SGD, **kw)} if wrapped else {}
    learn = by_hand(make(**options), *rnn_cbs(ALPHA, BETA, bptt=20))
    learn.add_cbs([Spy(), Steps()])
    trained(learn)
    lengths = [step["steps"] for step in learn.spy.seen]
    assert set(lengths) == {16, 1}
    assert learn.steps.lrs == pytest.approx([5e-3 * n / 20 for n in lengths])
    assert all(lr == pytest.approx(5e-3) for step in learn.spy.seen for lr in step["lr"])


def test_the_lr_scales_without_penalties(make: Callable[..., Learner]) -> None:
    learn = by_hand(make(), *rnn_cbs(bptt=20))
    learn.add_cbs([Spy(), Steps()])
    trained(learn)
    assert learn.steps.lrs[0] == pytest.approx(5e-3 * 16 / 20)
    assert gap(trained(by_hand(make(), *rnn_cbs())), trained(make(0, 0))) == 0


@pytest.mark.parametrize("error", [ArithmeticError, CancelStepException, CancelFitException])
def test_the_lr_is_restored_when_the_step_ends_badly(make: Callable[..., Learner], error: type[Exception]) -> None:
    learn = by_hand(make(), *rnn_cbs(ALPHA, BETA, bptt=20))
    learn.add_cb(Steps())
    learn.steps.error = error
    try:
        trained(learn, 1)
    except ArithmeticError:
        assert error is ArithmeticError
    assert learn.steps.lrs[0] == pytest.approx(5e-3 * 16 / 20)
    assert all(hyper["lr"] == pytest.approx(5e-3) for hyper in learn.opt.hypers)
    assert "_step" not in vars(learn)


def test_a_cancelled_step_leaves_the_learner_as_it_was(make: Callable[..., Learner]) -> None:
    class Cancel(Callback):
        order = 90

        def before_step(self) -> None:
            raise CancelStepException

    learn = by_hand(make(), *rnn_cbs(ALPHA, BETA, bptt=20))
    before = weights(learn)
    assert gap(trained(learn, cbs=Cancel()), before) == 0
    assert "_step" not in vars(learn)
    whole = {"size": 8 * 64 + 1}  # batches of 16 steps alone
    accumulated = trained(by_hand(make(**whole), *rnn_cbs(ALPHA, BETA, bptt=16)), cbs=GradientAccumulation(16))
    assert gap(accumulated, trained(make(**whole), cbs=GradientAccumulation(16))) < 1e-5


# -- what is held -----------------------------------------------------------------------------------------------------


class Interrupt(Callback):
    order = 100

    def after_loss(self) -> None:
        if self.training and self.train_iter == 2:
            raise CancelFitException


@pytest.mark.parametrize("what", ["fit", "interrupted", "validate", "get_preds", "lr_find"])
def test_nothing_is_held(make: Callable[..., Learner], what: str) -> None:
    learn, alive = fuse(make()), []
    learn.model[1].register_forward_hook(lambda _m, _i, out: alive.extend(map(weakref.ref, out[1:])))
    with learn.no_bar(), learn.no_logging():
        if what in ("fit", "interrupted"):
            learn.fit(1, cbs=[Interrupt()] if what == "interrupted" else [])
        elif what == "lr_find":
            learn.lr_find(num_it=8, show_plot=False, suggest_funcs=())
        else:
            getattr(learn, what)(**({"reorder": False} if what == "get_preds" else {}))
    if what == "interrupted":
        learn.loss_grad = None  # the learner's own: a graph that no backward freed
    gc.collect()
    assert alive
    assert not [ref for ref in alive if ref() is not None]


def test_exported_learners(make: Callable[..., Learner]) -> None:
    learn = fuse(make())
    expected = trained(learn, 1)
    learn.save("half way")
    learn.export("learner.pkl")
    again = load_learner(learn.path / "learner.pkl")
    assert gap(weights(again), expected) == 0
    assert (again.rnn_regularizer.alpha, again.rnn_regularizer.beta) == (ALPHA, BETA)
    assert again.rnn.raw_out is again.rnn.out is None
    again.dls = learn.dls
    assert gap(trained(again, 1), trained(learn.load("half way"), 1, reset_opt=True)) < 1e-5


# -- fuse, and misuse -------------------------------------------------------------------------------------------------


def test_fuse_swaps_in_place(make: Callable[..., Learner]) -> None:
    class Other(Callback):
        pass

    learn = make()
    learn.add_cb(Other())
    names = [type(cb).__name__ for cb in learn.cbs]
    old = learn.rnn_regularizer
    assert fuse(learn) is learn
    assert [type(cb).__name__ for cb in learn.cbs] == names
    assert [type(cb) for cb in learn.cbs if isinstance(cb, (stock.RNNCallback, stock.RNNRegularizer))] == [
        RNNCallback,
        RNNRegularizer,
    ]
    assert (learn.rnn_regularizer.alpha, learn.rnn_regularizer.beta) == (ALPHA, BETA)
    assert learn.rnn_regularizer in learn.cbs
    assert learn.rnn in learn.cbs
    assert all(cb.learn is learn for cb in learn.cbs)
    assert old.learn is None
    before = list(learn.cbs)
    assert all(a is b for a, b in zip(fuse(learn).cbs, before, strict=True))


def test_subclasses_and_stock_captures_stay(make: Callable[..., Learner]) -> None:
    class Mine(stock.RNNCallback):
        pass

    learn = by_hand(make(), stock.ModelResetter(), Mine(), RNNRegularizer(ALPHA, BETA))
    assert any(type(cb) is Mine for cb in fuse(learn).cbs)
    assert gap(trained(learn), trained(make())) < 1e-5


def test_fuse_refuses_a_learner_without_a_regularizer(make: Callable[..., Learner]) -> None:
    with pytest.raises(ValueError, match=r"fuse: the learner has no RNNRegularizer; learn\.add_cbs\(.*rnn_cbs"):
        fuse(make(0, 0))


class Model(nn.Module):
    """A small RNN of one's own."""

    def __init__(self, reset: bool, plain: bool = False) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(WORDS, 8), nn.GRU(8, 8, batch_first=True)
        self.decoder, self.plain = nn.Linear(8, WORDS), plain
        if reset:
            self.reset = lambda: None

    def forward(self, x: Tensor) -> Any:
        raw, _ = self.rnn(self.embedding(x))
        decoded = self.decoder(raw)
        return decoded if self.plain else (decoded, raw, raw)


@pytest.mark.parametrize(
    ("model", "cbs", "error", "match"),
    [
        (
            Model(True, plain=True),
            rnn_cbs(2, 1),
            TypeError,
            r"expected \(decoded, raw, dropped\) .* got a Tensor from Mod",
        ),
        (Model(False), rnn_cbs(2, 1), TypeError, r"Model has no reset\(\), which ModelResetter calls: give it one"),
        (Model(True), [RNNRegularizer(2, 1)], RuntimeError, r"no RNNCallback captures the activations: add one"),
    ],
    ids=["plain output", "no reset", "no capture"],
)
def test_errors_say_what_to_do(
    make: Callable[..., Learner], model: nn.Module, cbs: list[Callback], error: type[Exception], match: str
) -> None:
    learn = Learner(make().dls, model, CrossEntropyLossFlat(), cbs=cbs)
    with pytest.raises(error, match=match), learn.no_bar(), learn.no_logging():
        learn.fit(1)


def test_models_without_state_need_no_resetter(make: Callable[..., Learner]) -> None:
    learn = Learner(make().dls, Model(False), CrossEntropyLossFlat(), cbs=rnn_cbs(2, 1)[1:])
    before = weights(learn).clone()
    assert gap(trained(learn), before) > 0


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"beta": float("nan")}, {"bptt": 0}])
def test_arguments_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        rnn_cbs(**({"alpha": 1.0} | options))
