"""`fastreg.fastai` in real fastai v2 learners, against fastai's own callbacks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.measure.timing import threads
from fastreg import fused_ar_tar
from tests.adapters.contract import BATCH, COEFFICIENTS, IDS, PATHS, loss_of
from tests.adapters.learners import ALPHA, BETA, LearnerContract
from tests.conftest import skip_without, without
from tests.language_model import VOCABULARY, Model, Triple, gap, hooks_of

skip_without("fastai")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fastai.text import all as fa

    from fastreg.fastai import RNNRegularizer, fuse, rnn_cbs, unfuse

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick_collections")]  # fastai's warnings

SMALL = {"emb_sz": 24, "n_hid": 32, "n_layers": 2}


@pytest.fixture(autouse=True)
def one_thread_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # where learners write
    with threads(1):
        yield


class Ids(list):
    """A dataset that learners can be exported with."""

    def new_empty(self) -> Ids:
        return Ids(self[:1])


def make(alpha: float = ALPHA, beta: float = BETA, size: int = 650, bs: int = 8, **options: Any) -> Any:
    """Make a language model learner, always with the same weights."""
    fa.set_seed(0)
    ids = Ids(torch.randint(0, VOCABULARY, (n,)) for n in (size // 2, size - size // 2))
    dls = fa.DataLoaders(*(fa.LMDataLoader(x, bs=bs, seq_len=16) for x in (ids, ids.new_empty())))
    dls.vocab = [str(i) for i in range(VOCABULARY)]
    options = {"config": fa.awd_lstm_lm_config | SMALL, "pretrained": False} | options
    return fa.language_model_learner(dls, fa.AWD_LSTM, alpha=alpha, beta=beta, **options)


def of(kind: Callable[[], nn.Module], *cbs: Any) -> Any:
    """Make a learner of a custom model, always with the same weights."""
    dls = make().dls
    fa.set_seed(5)
    return fa.Learner(dls, kind(), fa.CrossEntropyLossFlat(), cbs=list(cbs))


def by_hand(learn: Any, *cbs: Any) -> Any:
    """Return the learner with these callbacks instead of the stock ones."""
    return learn.remove_cbs([fa.RNNRegularizer, fa.RNNCallback, fa.ModelResetter]).add_cbs(list(cbs))


def trained(learn: Any, epochs: int = 1, **options: Any) -> Tensor:
    fa.set_seed(1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 5e-3, **options)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def on(event: str, do: Callable[[Any], object], order: int = 100) -> Any:
    """Return a callback that does something with the learner at an event, in training and after other callbacks."""
    made = fa.Callback(**{event: lambda self: do(self.learn)})
    made.order, made.run_valid = order, False
    return made


@cache
def stock_weights(alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """Return the weights that fastai's own callbacks train."""
    learn = make(alpha, beta)
    return trained(learn if alpha or beta else by_hand(learn, fa.ModelResetter(), fa.RNNCallback()))


def spy(seen: list[dict[str, Any]]) -> Any:
    """Return a callback that checks the losses of every training step, and records its terms."""

    def look(learn: Any) -> None:
        raw, out = learn.rnn.raw_out.detach(), learn.rnn.out.detach()
        tar = raw.diff(dim=1).pow(2).mean().item() if raw.shape[1] > 1 else 0.0
        ar = out.pow(2).mean().item()
        assert learn.loss == learn.loss_func(learn.pred, *learn.yb)
        assert (learn.loss_grad - learn.loss).item() == pytest.approx(ALPHA * ar + BETA * tar, rel=1e-3)
        assert ar > 0
        seen.append({"ar": ar, "tar": tar, "size": len(raw), "steps": raw.shape[1]})

    return on("after_loss", look)


@pytest.fixture
def cpu_amp(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU fastai's mixed precision does nothing: it names CUDA. No CPU has LSTMs in float16."""
    amp = "fastai.callback.fp16"
    monkeypatch.setattr(f"{amp}.autocast", lambda _, dtype: torch.autocast("cpu", dtype, dtype == torch.bfloat16))
    monkeypatch.setattr(f"{amp}.GradScaler", lambda _, **options: torch.amp.GradScaler("cpu", **options))


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.processor), "fp16"])
@pytest.mark.usefixtures("cpu_amp")
def test_trains_the_stock_weights_in_mixed_precision(dtype: str) -> None:
    cbs, want = partial(fa.MixedPrecision, dtype, init_scale=256.0), make(metrics=fa.accuracy)
    expected = trained(want, cbs=cbs())
    close = 1e-3 if dtype == "bf16" else 1e-5  # fastai rounds the differences to bfloat16
    fused, plain, other = (make(metrics=fa.accuracy) for _ in range(3))
    for got in (fuse(fused, dropout=True), fuse(plain), by_hand(other, *rnn_cbs(ALPHA, BETA))):
        assert gap(trained(got, cbs=cbs()), expected) < close
        assert [*got.validate()] == pytest.approx([*want.validate()], abs=close)
        assert hooks_of(got.model) == 0
    for other in (make(ALPHA, 0.0), make(0.0, BETA), by_hand(make(), *rnn_cbs())):
        assert gap(trained(other, cbs=cbs()), expected) > 5 * close


@pytest.mark.parametrize("max_len", [None, 16])
def test_text_classifiers_with_padding_and_without(max_len: int | None) -> None:
    """Fastai pads by whole chunks before a text, and by the rest behind it; half of the batch is padding here."""
    texts = [torch.randint(2, VOCABULARY, (n,)) for n in (30, 29, 21, 17, 16, 9, 3, 1)]
    padded = [fa.pad_chunk(fa.TensorText(x), pad_idx=1, seq_len=8, pad_len=30).as_subclass(Tensor) for x in texts]
    rows = [(fa.TensorText(x), torch.tensor(i % 2)) for i, x in enumerate(padded)]
    dls, config = fa.DataLoaders(*[fa.DataLoader(rows, bs=8)] * 2), fa.awd_lstm_clas_config | SMALL
    model = fa.get_text_classifier(fa.AWD_LSTM, VOCABULARY, 2, seq_len=8, config=config, max_len=max_len)
    learn = fa.TextLearner(dls, model, ALPHA, BETA, loss_func=fa.CrossEntropyLossFlat())

    def check(learn: Any) -> None:
        raw = learn.rnn.raw_out
        want = fused_ar_tar(raw, learn.rnn.out, ALPHA, BETA, valid=(torch.stack(padded) != 1)[:, -raw.shape[1] :])
        got = learn.loss_grad - learn.loss
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, raw, retain_graph=True) for x in (got, want)))
        checked.append(raw)

    checked: list[Tensor] = []
    trained(fuse(learn, valid=lambda x: x != 1), cbs=on("after_loss", check))
    assert checked


@pytest.mark.parametrize(("size", "bs"), [(650, 8), (34, 1)])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_penalty_is_finite_where_that_of_fastai_is_not(dropout: bool, size: int, bs: int) -> None:
    """Fastai's TAR is NaN for one step, and it leaves TAR out for one row."""
    learn, seen = fuse(make(size=size, bs=bs), dropout), []
    assert torch.isfinite(trained(learn, cbs=spy(seen))).all()
    assert {step["steps"] for step in seen} >= ({1, 16} if bs > 1 else {16})
    assert all((step["tar"] > 0) == (step["steps"] > 1) for step in seen)


def test_terms_are_columns_of_every_log() -> None:
    """They are averages over the epoch's batches, weighted by their sizes."""
    rows = [(torch.full((6,), i % VOCABULARY), torch.full((6,), i % VOCABULARY)) for i in range(10)]
    dls, seen = fa.DataLoaders(fa.DataLoader(rows, bs=8), fa.DataLoader(rows, bs=8)), []
    cbs = [*rnn_cbs(ALPHA, BETA), spy(seen), fa.CSVLogger()]
    learn = fa.Learner(dls, Triple(), fa.CrossEntropyLossFlat(), cbs=cbs, metrics=fa.accuracy)
    trained(learn, 2)
    head, *log = [line.split(",") for line in Path("history.csv").read_text().split()]
    assert learn.recorder.metric_names == head
    assert head == ["epoch", "train_loss", "valid_loss", "accuracy", "ar", "tar", "time"]
    assert [step["size"] for step in seen] == [8, 2, 8, 2]
    for row, values, a, b in zip(log, learn.recorder.values, seen[::2], seen[1::2], strict=True):
        means = [(8 * a[term] + 2 * b[term]) / 10 for term in ("ar", "tar")]
        assert [float(x) for x in row[4:6]] == [*values[3:]] == pytest.approx(means, rel=1e-5)
    assert learn.metrics.attrgot("name") == ["accuracy"]


@pytest.mark.parametrize("error", [None, fa.CancelStepException])
def test_bptt_scales_the_lr_only_for_the_step(error: Any) -> None:
    learn: Any = by_hand(make(), *rnn_cbs(ALPHA, BETA, bptt=20))
    learn.create_opt()
    own_step, seen = learn.opt.step, []

    def step() -> None:
        seen.append((learn.rnn.raw_out.shape[1], learn.opt.hypers[-1]["lr"]))
        if error:
            raise error("the step was cancelled")
        own_step()

    def restored(learn: Any) -> None:
        assert all(hyper["lr"] == pytest.approx(5e-3) for hyper in learn.opt.hypers)

    learn.opt.step = step
    trained(learn, cbs=on("after_batch", restored))
    assert {n for n, _ in seen} == {16, 1}
    assert all(lr == pytest.approx(5e-3 * n / 20) for n, lr in seen)


class TestContract(LearnerContract):
    """fastai's loop calls no `after_fit` after an error, so that hooks stay after a fit that was cut off."""

    stock, fused = fa.RNNRegularizer, RNNRegularizer
    fuse, unfuse, stock_weights = staticmethod(fuse), staticmethod(unfuse), staticmethod(stock_weights)
    learner, callbacks = staticmethod(make), staticmethod(attrgetter("cbs"))
    cleans_up = False

    def learner_of(self, model: Any, regularized: bool = True, accumulated: int = 1) -> Any:
        rows = [(ids, ids) for ids in IDS]
        dls = fa.DataLoaders(fa.DataLoader(rows, bs=BATCH), fa.DataLoader(rows[:BATCH], bs=BATCH))
        cbs = [fa.GradientAccumulation(accumulated * BATCH), fa.GradientClip(0.1)]
        cbs += [fa.RNNRegularizer(**COEFFICIENTS)] * regularized + [fa.RNNCallback()] * isinstance(model, Triple)
        return fa.Learner(dls, model, loss_of, opt_func=fa.SGD, cbs=cbs)

    def trained(self, learn: Any, *callbacks: Any) -> Tensor:
        return trained(learn, cbs=callbacks)

    def at_batches(self, do: Callable[[], object]) -> Any:
        return on("before_batch", lambda _: do())

    def cut_off(self, learn: Any) -> None:
        def stop(learn: Any) -> None:
            if learn.train_iter == 2:
                raise KeyboardInterrupt

        learn.rnn_regularizer.bptt = 20
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                trained(learn, cbs=on("before_step", stop))

    def begin_anew(self, learn: Any) -> None:
        if hooks_of(learn.model) == 0:  # else the next fit restores it
            assert learn.opt is None or learn.opt.hypers[-1]["lr"] == 5e-3
        learn.opt, learn.rnn_regularizer.bptt = None, None
        learn.model.zero_grad()

    def exported(self, learn: Any) -> Any:
        learn.export("learner.pkl")
        with without("fastreg"):
            return fa.load_learner("learner.pkl")


@pytest.mark.parametrize("paths", [{}, PATHS])
def test_a_copy_of_a_learner_regularizes_alike(paths: dict[str, Any]) -> None:
    learn = fuse(of(Model if paths else Triple, *fa.rnn_cbs(ALPHA, BETA)[2 * bool(paths) :]), **paths)
    learn.rnn_regularizer.bptt = 20
    copied = copy.deepcopy(learn)
    now = copied.rnn_regularizer
    assert (type(now), now.learn, now.bptt) == (RNNRegularizer, copied, 20)
    assert now is not learn.rnn_regularizer
    weights = trained(learn)
    assert gap(trained(copied), weights) < 1e-5
    assert copied.recorder.metric_names[-3:] == learn.recorder.metric_names[-3:] == ["ar", "tar", "time"]
    assert gap(trained(of(Model)), weights) > 1e-4
    assert hooks_of(learn.model) == hooks_of(copied.model) == 0


def test_no_logging_and_no_terms_without_a_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    learn = of(Model, RNNRegularizer(ALPHA, BETA, **PATHS))
    trained(learn)
    assert not capsys.readouterr().out
    trained(learn, cbs=on("before_batch", lambda learn: learn.model.rnn.eval()))
    assert str(learn.recorder.values[0][2]) == "nan"


@pytest.mark.parametrize("event", ["after_batch", "after_train"])
@pytest.mark.parametrize("paths", [{}, PATHS])
def test_a_validation_within_an_epoch(paths: dict[str, Any], event: str) -> None:
    """Fastai begins and ends it as it does a fit."""

    def validate(learn: Any) -> None:
        kept = {name: vars(learn)[name] for name in ("dl", "n_iter", "epoch", "train_iter", "pct_train", "training")}
        learn.validate()
        vars(learn).update(kept)
        learn.model.train()

    learn = fuse(of(Model if paths else Triple, *fa.rnn_cbs(ALPHA, BETA)[2 * bool(paths) :]), **paths)
    stock = of(Triple, *fa.rnn_cbs(ALPHA, BETA))
    weights = [trained(x, 2, cbs=on(event, validate)) for x in (learn, stock)]
    assert gap(*weights) < 1e-5
    assert learn.recorder.metric_names[-3:] == ["ar", "tar", "time"]
    assert all(x > 0 for x in learn.recorder.values[-1][-2:])
    assert learn.metrics == []
    assert hooks_of(learn.model) == 0


def test_terms_in_the_columns_of_training() -> None:
    learn = of(Triple, *rnn_cbs(ALPHA, BETA))
    learn.recorder.train_metrics = True
    trained(learn)
    row = zip(learn.recorder.metric_names[1:-1], learn.recorder.values[0], strict=True)
    assert [name for name, x in row if str(x) == "nan"] == ["valid_ar", "valid_tar"]


def test_paths_start_from_the_model_that_ddp_wraps(request: pytest.FixtureRequest) -> None:
    learn, parallel = (of(Model, RNNRegularizer(ALPHA, BETA, **PATHS)) for _ in range(2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    parallel.model = nn.parallel.DistributedDataParallel(parallel.model)
    assert gap(trained(parallel), trained(learn)) < 1e-5


def test_fuse_keeps_where_the_callback_runs() -> None:
    learn = make()
    learn.rnn_regularizer.run_train = False
    assert gap(trained(fuse(learn)), stock_weights(0.0, 0.0)) < 1e-5


def test_a_regularizer_may_be_away_for_a_while() -> None:
    """As fastai's FetchPredsCallback takes one out, for the predictions after each epoch."""
    learn, other = of(Model, RNNRegularizer(ALPHA, BETA, **PATHS)), of(Triple, *fa.rnn_cbs(ALPHA, BETA))
    learn.loss_func.activation = other.loss_func.activation = fa.noop  # predictions of several lengths are a list
    weights = [trained(x, 2, cbs=fa.FetchPredsCallback(cbs=x.rnn_regularizer, reorder=False)) for x in (learn, other)]
    assert gap(*weights) < 1e-5
    assert all(ar > 0 < tar for *_, ar, tar, _ in learn.recorder.values)


ALONE = r"\(decoded, raw, dropped\) from the Model, and one RNNCallback to capture them, got a Tensor and 1"
# the callbacks of two learners; the first one is trained
REJECTED: list[tuple[list[Any], list[Any], type[Exception], str]] = [
    (rnn_cbs(1.0)[1:], [], TypeError, ALONE),
    ([fa.RNNCallback(), RNNRegularizer(1.0, **PATHS)], [], TypeError, ALONE),
    ([RNNRegularizer(1.0, **PATHS), fa.RNNRegularizer()], [], ValueError, "RNNRegularizer: the learner has another"),
    (shared := [RNNRegularizer(1.0, **PATHS)], shared, RuntimeError, "another learner has this callback, too"),
]


@pytest.mark.parametrize(("own", "of_other", "error", "message"), REJECTED)
def test_learners_that_cannot_be_trained(own: Any, of_other: Any, error: type[Exception], message: str) -> None:
    learn, _other = of(Model, *own), of(Model, *of_other)
    with pytest.raises(error, match=message):
        trained(learn)


def test_a_path_needs_a_coefficient() -> None:
    with pytest.raises(TypeError, match="alpha and beta: expected coefficients beside rnn"):
        RNNRegularizer(rnn="rnn")
