"""`fastreg.fastai` in real fastai v2 learners, against its stock callbacks."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import skip_without, without

skip_without("fastai")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fastai.callback import fp16
    from fastai.callback import rnn as stock
    from fastai.callback.core import Callback, CancelFitException, CancelStepException
    from fastai.callback.progress import CSVLogger
    from fastai.callback.schedule import lr_find  # noqa: F401
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.imports import noop
    from fastai.learner import Learner, Recorder, load_learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    from fastai.optimizer import Adam, OptimWrapper
    from fastai.text.data import LMDataLoader, TensorText, pad_chunk
    from fastai.text.learner import TextLearner, get_text_classifier, language_model_learner
    from fastai.text.models.awdlstm import AWD_LSTM, RNNDropout, awd_lstm_clas_config, awd_lstm_lm_config
    from fastai.torch_core import set_seed

    from bench.timing import threads
    from fastreg import FusedRNNDropout, fused_ar_tar
    from fastreg.fastai import RNNRegularizer, fuse, rnn_cbs, unfuse
    from tests.language_model import VOCABULARY as WORDS
    from tests.language_model import Model as Plain
    from tests.language_model import gap, hooks_of

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick_collections")]  # fastai's warnings

ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
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


def make(alpha: float = ALPHA, beta: float = BETA, size: int = 650, bs: int = 8, **options: Any) -> Learner:
    """Make a language model learner, always with the same weights."""
    set_seed(0)
    ids = Ids(torch.randint(0, WORDS, (n,)) for n in (size // 2, size - size // 2))
    dls = DataLoaders(LMDataLoader(ids, bs=bs, seq_len=16), LMDataLoader(ids.new_empty(), bs=bs, seq_len=16))
    dls.vocab = [str(i) for i in range(WORDS)]
    options = {"config": awd_lstm_lm_config | SMALL, "pretrained": False} | options
    return language_model_learner(dls, AWD_LSTM, alpha=alpha, beta=beta, **options)


class Triple(Plain):
    """The same model as fastai's callbacks want it."""

    forward = Plain.activations  # pyright: ignore[reportAssignmentType]

    def reset(self) -> None: ...


def of(kind: Callable[[], nn.Module], *cbs: Callback) -> Learner:
    """Make a learner of a custom model, always with the same weights."""
    dls = make().dls
    set_seed(5)
    return Learner(dls, kind(), CrossEntropyLossFlat(), cbs=list(cbs))


def by_hand(learn: Learner, *cbs: Callback) -> Learner:
    """Return the learner with these callbacks instead of the stock ones."""
    return learn.remove_cbs([stock.RNNRegularizer, stock.RNNCallback, stock.ModelResetter]).add_cbs(list(cbs))


def trained(learn: Learner, epochs: int = 1, **options: Any) -> Tensor:
    set_seed(1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 5e-3, **options)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def on(event: str, do: Callable[[Any], object], order: int = 100) -> Callback:
    """Return a callback that does something with the learner at an event, in training and after other callbacks."""
    made = Callback(**{event: lambda self: do(self.learn)})
    made.order, made.run_valid = order, False
    return made


def stop(event: str = "before_backward", error: type[BaseException] = KeyboardInterrupt) -> Callback:
    """Return a callback that stops a fit in the middle of training: as a user does, or by another error."""

    def stop_it(learn: Any) -> None:
        if learn.train_iter == 2:
            raise error

    return on(event, stop_it)


def remove(learn: Any) -> None:
    learn.remove_cb(learn.rnn_regularizer)


def spy(seen: list[dict[str, Any]]) -> Callback:
    """Return a callback that records every training step as a callback that runs last sees it."""

    def look(learn: Any) -> None:
        raw, out = learn.rnn.raw_out.detach(), learn.rnn.out.detach()
        tar = raw.diff(dim=1).pow(2).mean().item() if raw.shape[1] > 1 else 0.0
        terms = {"ar": out.pow(2).mean().item(), "tar": tar, "size": len(raw), "steps": raw.shape[1]}
        clean = learn.loss_func(learn.pred, *learn.yb).item()
        seen.append(terms | {"clean": clean, "loss": learn.loss.item(), "grad": learn.loss_grad.item()})

    return on("after_loss", look)


def lose(learn: Any) -> None:
    """Compute the loss anew."""
    learn.loss_grad = learn.loss_func(learn.pred, *learn.yb) / 2


SETTINGS: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "a loss of a callback": lambda: [on("after_loss", lose, Callback.order)],
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
def test_trains_the_stock_weights(setting: str) -> None:
    cbs, want = SETTINGS[setting], make(metrics=accuracy)
    expected = trained(want, cbs=cbs())
    close = 1e-3 if setting == "bf16" else 1e-5  # stock differences are rounded to bfloat16
    fused, plain, other = (make(metrics=accuracy) for _ in range(3))
    for got in (fuse(fused, dropout=True), fuse(plain), by_hand(other, *rnn_cbs(ALPHA, BETA))):
        assert gap(trained(got, cbs=cbs()), expected) < close
        assert [*got.validate()] == pytest.approx([*want.validate()], abs=close)
        assert hooks_of(got.model) == 0
    for other in (make(ALPHA, 0.0), make(0.0, BETA), by_hand(make(), *rnn_cbs())):
        assert gap(trained(other, cbs=cbs()), expected) > 5 * close


def classifier(rows: list[Any], alpha: float = ALPHA, **options: Any) -> Learner:
    set_seed(0)
    dls = DataLoaders(DataLoader(rows, bs=8), DataLoader(rows[:8], bs=8))
    model = get_text_classifier(AWD_LSTM, WORDS, 2, seq_len=8, config=awd_lstm_clas_config | SMALL, **options)
    return TextLearner(dls, model, alpha, BETA if alpha else 0, loss_func=CrossEntropyLossFlat())


@pytest.mark.parametrize("max_len", [None, 16])
def test_text_classifiers_with_padding_and_without(max_len: int | None) -> None:
    """Fastai pads by whole chunks before a text, and by the rest behind it; half of the batch is padding here."""
    texts = [torch.randint(2, WORDS, (n,)) for n in (30, 29, 21, 17, 16, 9, 3, 1)]
    padded = [pad_chunk(TensorText(x), pad_idx=1, seq_len=8, pad_len=30).as_subclass(Tensor) for x in texts]
    rows = [(TensorText(x), torch.tensor(i % 2)) for i, x in enumerate(padded)]

    def check(learn: Any) -> None:
        raw = learn.rnn.raw_out
        want = fused_ar_tar(raw, learn.rnn.out, ALPHA, BETA, valid=(torch.stack(padded) != 1)[:, -raw.shape[1] :])
        got = learn.loss_grad - learn.loss
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, raw, retain_graph=True) for x in (got, want)))
        checked.append(raw)

    checked: list[Tensor] = []
    trained(fuse(classifier(rows, max_len=max_len), valid=lambda x: x != 1), cbs=on("after_loss", check))
    assert checked
    expected = trained(classifier(rows, max_len=max_len))
    assert gap(trained(fuse(classifier(rows, max_len=max_len))), expected) < 1e-5  # where padding counts
    assert gap(trained(classifier(rows, 0, max_len=max_len)), expected) > 1e-3


PATHS: dict[str, Any] = {"rnn": "rnn", "dropout": "dropout"}


MASKS: dict[str, Any] = {"valid": lambda x: x % 3 != 0, "starts": lambda x: x % 4 == 1}


@pytest.mark.parametrize("masks", [{}, MASKS], ids=["plain", "masks"])
def test_modules_by_their_paths_and_masks_of_the_batch(masks: dict[str, Any]) -> None:
    def write_out(learn: Any) -> None:
        options: Any = {name: mask(*learn.xb) for name, mask in masks.items()}
        learn.loss_grad = learn.loss_grad + fused_ar_tar(learn.rnn.raw_out, learn.rnn.out, ALPHA, BETA, **options)

    want = trained(of(Triple, stock.RNNCallback(), on("after_loss", write_out, 1)))
    learners = [
        of(Plain, RNNRegularizer(ALPHA, BETA, **masks, rnn=["rnn"], dropout=["dropout"])),
        fuse(of(Plain, stock.RNNRegularizer(ALPHA, BETA)), **masks, **PATHS),
        fuse(of(Triple, *stock.rnn_cbs(ALPHA, BETA)), **masks, **({} if masks else PATHS)),
    ]
    for learn in learners:
        assert gap(trained(learn), want) < 1e-5
        assert hooks_of(learn.model) == 0
    assert gap(trained(of(Plain)), want) > 1e-4


def test_modules_in_evaluation_add_nothing() -> None:
    learn = of(Plain, RNNRegularizer(ALPHA, BETA, **PATHS))
    frozen = on("before_batch", lambda learn: learn.model.rnn.eval())
    assert gap(trained(learn, cbs=frozen), trained(of(Plain), cbs=frozen)) == 0
    assert str(learn.recorder.values[0][2]) == "nan"


@pytest.mark.parametrize(("size", "bs"), [(650, 8), (8 * 33 + 1, 8), (34, 1)])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_loss_stays_clean_and_the_penalty_is_differentiated(dropout: bool, size: int, bs: int) -> None:
    """Where fastai's TAR is NaN for one step, and left out for one row, too."""
    learn, seen = fuse(make(size=size, bs=bs), dropout), []
    assert torch.isfinite(trained(learn, cbs=spy(seen))).all()
    assert learn.dls.train.last_len == 1 or bs == 1
    for step in seen:
        assert step["loss"] == step["clean"]
        assert step["grad"] - step["loss"] == pytest.approx(ALPHA * step["ar"] + BETA * step["tar"], rel=1e-3)
        assert step["ar"] > 0
        assert (step["tar"] > 0) == (step["steps"] > 1)


def read_log() -> list[list[str]]:
    return [line.split(",") for line in Path("history.csv").read_text().split()]


def test_terms_are_columns_of_every_log() -> None:
    """As averages over the epoch's batches, weighted by their sizes; numbers alone, as a `SummaryWriter` wants them."""
    rows = [(torch.full((6,), i % WORDS), torch.full((6,), i % WORDS)) for i in range(10)]
    dls, seen = DataLoaders(DataLoader(rows, bs=8), DataLoader(rows, bs=8)), []
    cbs = [*rnn_cbs(ALPHA, BETA), spy(seen), CSVLogger()]
    learn = Learner(dls, Triple(), CrossEntropyLossFlat(), cbs=cbs, metrics=accuracy)
    trained(learn, 2)
    head, *log = read_log()
    assert learn.recorder.metric_names == head
    assert head == ["epoch", "train_loss", "valid_loss", "accuracy", "ar", "tar", "time"]
    assert [step["size"] for step in seen] == [8, 2, 8, 2]
    for row, values, a, b in zip(log, learn.recorder.values, seen[::2], seen[1::2], strict=True):
        means = [(8 * a[term] + 2 * b[term]) / 10 for term in ("ar", "tar")]
        assert [float(x) for x in row[4:6]] == [*values[3:]] == pytest.approx(means, rel=1e-5)
    assert learn.metrics.attrgot("name") == ["accuracy"]
    trained(learn.remove_cb(Recorder).add_cb(Recorder(train_metrics=True)))
    table = dict(zip(*read_log(), strict=True))
    assert float(table["train_ar"]) > 0 < float(table["train_tar"])
    assert table["valid_ar"] == table["valid_tar"] == "nan"


@pytest.mark.parametrize("dropout", [False, True])
def test_coefficients_may_change_while_training(dropout: bool) -> None:
    """As numbers, or as tensors that a schedule changes in place, from 0 on; the second epoch is regularized."""
    coefficients = torch.zeros(2)

    def change(learn: Any) -> None:
        coefficients.copy_(torch.tensor([ALPHA, BETA]) * (learn.epoch > 0))
        if learn is not by_tensors:
            learn.rnn_regularizer.alpha, learn.rnn_regularizer.beta = coefficients.tolist()

    by_tensors = fuse(by_hand(make(), *rnn_cbs(*coefficients.unbind())), dropout)
    subclassed(by_tensors.rnn)  # as the capture may be
    want = trained(make(), 2, cbs=on("before_train", change))
    for learn in (fuse(make(), dropout), by_tensors):
        assert gap(trained(learn, 2, cbs=on("before_train", change)), want) < 1e-5
        assert all(ar > 0 < tar for *_, ar, tar, _ in learn.recorder.values)


def torch_sgd(params: Any, **options: Any) -> OptimWrapper:
    return OptimWrapper(params, torch.optim.SGD, **options)


@pytest.mark.parametrize(
    ("opt_func", "coefficients", "error"),
    [(torch_sgd, (ALPHA, BETA), None), (Adam, (), None), (Adam, (ALPHA, BETA), CancelStepException)],
)
def test_bptt_scales_the_lr_for_the_step_alone(opt_func: Any, coefficients: Any, error: Any) -> None:
    """Also where there is no penalty, or the step is cancelled."""
    learn: Any = by_hand(make(opt_func=opt_func), *rnn_cbs(*coefficients, bptt=20))
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


RUNS: dict[str, Callable[[Any], object]] = {
    "fit": lambda learn: learn.fit(1),
    "before the loss": lambda learn: learn.fit(1, cbs=stop("after_pred", CancelFitException)),
    "get_preds": lambda learn: learn.get_preds(reorder=False),
    "lr_find": lambda learn: learn.lr_find(num_it=8, show_plot=False, suggest_funcs=()),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dropout", [False, True])
def test_nothing_is_held(dropout: bool, run: str) -> None:
    learn, alive = fuse(make(), dropout), []
    learn.model[1].register_forward_hook(lambda _m, _i, out: alive.extend(map(weakref.ref, out[1:])))
    with learn.no_bar(), learn.no_logging():
        RUNS[run](learn)
    gc.collect()
    assert alive
    assert not [ref for ref in alive if ref() is not None]


@pytest.mark.parametrize("interrupted", [None, "before_backward", "before_step"])
def test_exports_and_copies_hold_fastai_alone(interrupted: str | None) -> None:
    learn = fuse(make(), dropout=True)
    if interrupted:
        learn.rnn_regularizer.bptt = 16
        with pytest.raises(KeyboardInterrupt):
            trained(learn, cbs=stop(interrupted))
        learn.loss_grad = learn.pred = None  # the learner's own
    else:
        trained(learn)
    learn.export("learner.pkl")
    assert type(learn.rnn_regularizer) is RNNRegularizer
    with without("fastreg"):
        found = [load_learner("learner.pkl")]
    learn.model.zero_grad()
    if not interrupted:
        for rnn in learn.model[0].rnns:  # fastai's own, which no copy can be made of
            rnn.module.weight_hh_l0 = rnn.module.weight_hh_l0.detach()
        found.append(copy.deepcopy(learn))
    learn.rnn_regularizer.bptt = None  # as fastai has none
    expected = trained(learn, reset_opt=True)
    for again in found:
        assert type(again.model[1].output_dp) is RNNDropout
        assert type(again.rnn_regularizer) is stock.RNNRegularizer
        assert again.rnn_regularizer.learn is again
        assert hooks_of(again.model) == len(again.metrics) == 0
        again.dls = learn.dls
        assert gap(trained(again, reset_opt=True), expected) < 1e-5


def fuse_again(learn: Any, paths: bool) -> Any:
    """Replace the callback; an error replaces nothing."""
    old = learn.rnn_regularizer
    with pytest.raises(ValueError, match="no such module at 'lstm'"):
        fuse(learn, rnn="lstm")
    assert learn.rnn_regularizer is old
    fuse(learn, **(PATHS if paths else {"dropout": True}))
    assert learn.rnn_regularizer is not old
    assert hooks_of(learn.model) == 0
    return learn


def undo(learn: Any, paths: bool) -> Any:
    """Take off hooks, columns and the scaled lr."""
    (remove if paths else unfuse)(learn)
    assert hooks_of(learn.model) == 0
    assert learn.opt.hypers[-1]["lr"] == 5e-3
    assert len(unfuse(learn).metrics) == 0
    return learn.add_cb(RNNRegularizer(ALPHA, BETA, **PATHS)) if paths else fuse(learn)


def another_learner(learn: Any, paths: bool) -> Any:
    """Leave the old learner, as a notebook does."""
    cbs = [RNNRegularizer(ALPHA, BETA, **PATHS)] if paths else rnn_cbs(ALPHA, BETA)
    return Learner(learn.dls, learn.model, CrossEntropyLossFlat(), cbs=cbs)


@pytest.mark.parametrize("then", [lambda learn, _: learn, undo, fuse_again, another_learner])
@pytest.mark.parametrize("paths", [False, True])
def test_a_fit_after_one_that_was_cut_off(then: Any, paths: bool) -> None:
    """It trains as if nothing had been."""
    learn = of(Plain, RNNRegularizer(ALPHA, BETA, **PATHS)) if paths else fuse(make(), dropout=True)
    other = of(Triple, *stock.rnn_cbs(ALPHA, BETA)) if paths else make()
    learn.rnn_regularizer.bptt = 20
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(learn, cbs=stop("before_step"))
    assert hooks_of(learn.model) > 0
    new = then(learn, paths)
    new.rnn_regularizer.bptt = None
    new.model.load_state_dict(other.model.state_dict())
    new.model.zero_grad()
    assert gap(trained(new, reset_opt=True), trained(other)) < 1e-5
    assert new.recorder.metric_names[-3:] == ["ar", "tar", "time"]
    assert hooks_of(new.model) == 0


def test_fuse_and_unfuse_swap_in_place() -> None:
    learn, kinds = make(), set()
    own, dropout = learn.rnn_regularizer, learn.model[1].output_dp
    own.run_train, own.alpha = False, 3.0
    assert fuse(learn) is learn
    fuse(fuse(learn, valid=lambda x: x < 0), dropout=True)  # with the arguments of the last call
    assert (learn.rnn_regularizer.run_train, learn.rnn_regularizer.alpha) == (False, 3.0)
    learn.rnn_regularizer.run_train, learn.rnn_regularizer.alpha = True, ALPHA
    assert (
        gap(trained(learn, cbs=on("after_pred", lambda x: kinds.add(type(x.model[1].output_dp)))), trained(make()))
        < 1e-5
    )
    assert [kind.__base__ for kind in kinds] == [FusedRNNDropout]
    assert learn.model[1].output_dp is dropout
    assert not any(module.training for module in learn.model.modules())
    learn.rnn_regularizer.alpha = 3.0
    assert unfuse(unfuse(learn)) is learn
    (regularizer,) = (cb for cb in learn.cbs if isinstance(cb, stock.RNNRegularizer))
    assert regularizer is learn.rnn_regularizer
    assert (type(regularizer), regularizer.alpha, regularizer.beta) == (stock.RNNRegularizer, 3.0, BETA)
    assert gap(trained(unfuse(fuse(make(), dropout=True))), trained(make())) == 0


@pytest.mark.parametrize("event", ["before_batch", "after_loss", "after_batch"])
def test_a_learner_may_be_fused_within_an_epoch(event: str) -> None:
    learn = make()
    assert gap(trained(learn, cbs=on(event, lambda x: x.train_iter == 2 and fuse(x))), trained(make())) < 1e-5
    assert type(learn.rnn_regularizer) is RNNRegularizer


def test_a_regularizer_may_be_away_for_a_while() -> None:
    """As fastai's FetchPredsCallback takes one out, for the predictions after each epoch."""

    def fetch(learn: Any) -> None:
        found = [cb for cb in learn.cbs if isinstance(cb, (stock.RNNRegularizer, Recorder))]
        if found:  # else this is for a prediction
            with learn.removed_cbs(found):
                learn.get_preds(inner=True, reorder=False, act=noop)

    learn, other = of(Plain, RNNRegularizer(ALPHA, BETA, **PATHS)), of(Triple, *stock.rnn_cbs(ALPHA, BETA))
    assert gap(*(trained(one, 2, cbs=on("after_validate", fetch)) for one in (learn, other))) < 1e-5
    assert all(ar > 0 < tar for *_, ar, tar, _ in learn.recorder.values)


def custom(learn: Any) -> None:
    learn.model = Plain()


def subclassed(instance: Any) -> None:
    instance.__class__ = type("Mine", (type(instance),), {})


def run(*cbs: Callback) -> Callable[[Any], object]:
    return lambda _: trained(of(Plain, *cbs))


def within_a_batch(learn: Any) -> None:
    fuse(learn, **PATHS)


def of_two_learners(_: Any) -> None:
    learn, _other = [of(Plain, shared) for shared in [RNNRegularizer(ALPHA, BETA, **PATHS)] * 2]
    trained(learn)


LEARNER = "learn: expected a Learner, got NoneType"
OWN_CLASS = r"no RNNRegularizer of fastai's own class; .* rnn_cbs\(alpha, beta\)"
ALONE = r"\(decoded, raw, dropped\) from the Model, and one RNNCallback to capture them, got a Tensor and "
REJECTED: list[tuple[Callable[[Any], Any], Callable[[Any], Any], type[Exception], str]] = [
    (custom, lambda x: fuse(x, rnn="lstm"), ValueError, "rnn: .* no such module at 'lstm'; candidates: .*'rnn'"),
    (custom, lambda x: fuse(x, True), ValueError, "dropout: Model has no such module at '1.output_dp'"),
    (custom, lambda x: fuse(x, [], rnn="rnn"), ValueError, "got 1 RNNs and 0 dropouts"),
    (vars, lambda x: fuse(x, valid=3), TypeError, "valid: expected a callable or None, got int"),
    (lambda x: subclassed(x.model[1].output_dp), lambda x: fuse(x, True), ValueError, "to swap, got Mine"),
    (lambda x: setattr(x.model[1].output_dp, "p", 1.0), lambda x: fuse(x, True), ValueError, "p: expected"),
    (lambda x: setattr(x.rnn_regularizer, "alpha", -1.0), fuse, ValueError, "alpha: expected"),
    (lambda x: subclassed(x.rnn_regularizer), fuse, ValueError, OWN_CLASS),
    (remove, fuse, ValueError, OWN_CLASS),
    (vars, lambda _: fuse(None), TypeError, LEARNER),  # pyright: ignore
    (vars, lambda _: unfuse(None), TypeError, LEARNER),  # pyright: ignore
    (vars, run(*rnn_cbs(1.0)[1:]), TypeError, ALONE + "1"),
    (vars, run(stock.RNNCallback(), *rnn_cbs(1.0)[1:]), TypeError, ALONE + "2"),
    (lambda x: x.add_cb(RNNRegularizer()), lambda x: x.fit(1), ValueError, "RNNRegularizer: the learner has another"),
    (lambda x: fuse(x).add_cb(RNNRegularizer()), lambda x: x.fit(1), ValueError, "the learner has another"),
    (vars, run(*[RNNRegularizer(rnn=rnn) for rnn in ("rnn", ["dropout", "rnn"])]), ValueError, "has another"),
    (vars, run(RNNRegularizer(**PATHS), on("before_batch", within_a_batch)), RuntimeError, "within a batch"),
    (vars, of_two_learners, RuntimeError, "another learner has this callback, too"),
]


@pytest.mark.parametrize(("prepare", "call", "error", "message"), REJECTED)
def test_rejects_and_swaps_nothing(prepare: Any, call: Any, error: type[Exception], message: str) -> None:
    learn = make()
    prepare(learn)
    parts = [*learn.cbs, *learn.model.modules()]
    with pytest.raises(error, match=message):
        call(learn)
    assert all(a is b for a, b in zip([*learn.cbs, *learn.model.modules()], parts, strict=True))
    assert hooks_of(learn.model) == 0
