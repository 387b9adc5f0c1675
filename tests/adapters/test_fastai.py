"""`fastreg.fastai` in real fastai v2 learners, against fastai's own callbacks."""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.measure.timing import threads
from fastreg import FusedRNNDropout, fused_ar_tar
from tests.conftest import skip_without, without
from tests.language_model import VOCABULARY, Model, Triple, gap, hooks_of

skip_without("fastai")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fastai.text import all as fa

    from fastreg.fastai import RNNRegularizer, fuse, rnn_cbs, unfuse

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick_collections")]  # fastai's warnings

ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
SMALL = {"emb_sz": 24, "n_hid": 32, "n_layers": 2}
PATHS: dict[str, Any] = {"rnn": "rnn", "dropout": "dropout"}
MASKS: dict[str, Any] = {"valid": lambda x: x % 3 != 0, "starts": lambda x: x % 4 == 1}


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


def stop(learn: Any) -> None:
    if learn.train_iter == 2:
        raise KeyboardInterrupt


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


SETTINGS: dict[str, Callable[[], list[Any]]] = {
    "plain": list,
    "accumulation and clip": lambda: [fa.GradientClip(0.1), fa.GradientAccumulation(16)],
    "bf16": lambda: [fa.MixedPrecision("bf16")],
    "fp16": lambda: [fa.MixedPrecision("fp16", init_scale=256.0)],
}


@pytest.fixture
def cpu_amp(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU fastai's mixed precision does nothing: it names CUDA. No CPU has LSTMs in float16."""
    amp = "fastai.callback.fp16"
    monkeypatch.setattr(f"{amp}.autocast", lambda _, dtype: torch.autocast("cpu", dtype, dtype == torch.bfloat16))
    monkeypatch.setattr(f"{amp}.GradScaler", lambda _, **options: torch.amp.GradScaler("cpu", **options))


@pytest.mark.parametrize("setting", [pytest.param(x, marks=[pytest.mark.processor] * (x == "bf16")) for x in SETTINGS])
@pytest.mark.usefixtures("cpu_amp")
def test_trains_the_stock_weights(setting: str) -> None:
    cbs, want = SETTINGS[setting], make(metrics=fa.accuracy)
    expected = trained(want, cbs=cbs())
    close = 1e-3 if setting == "bf16" else 1e-5  # fastai rounds the differences to bfloat16
    fused, plain, other = (make(metrics=fa.accuracy) for _ in range(3))
    for got in (fuse(fused, dropout=True), fuse(plain), by_hand(other, *rnn_cbs(ALPHA, BETA))):
        assert gap(trained(got, cbs=cbs()), expected) < close
        assert [*got.validate()] == pytest.approx([*want.validate()], abs=close)
        assert hooks_of(got.model) == 0
    for other in (make(ALPHA, 0.0), make(0.0, BETA), by_hand(make(), *rnn_cbs())):
        assert gap(trained(other, cbs=cbs()), expected) > 5 * close


def classifier(rows: list[Any], **options: Any) -> Any:
    dls = fa.DataLoaders(fa.DataLoader(rows, bs=8), fa.DataLoader(rows[:8], bs=8))
    config = fa.awd_lstm_clas_config | SMALL
    model = fa.get_text_classifier(fa.AWD_LSTM, VOCABULARY, 2, seq_len=8, config=config, **options)
    return fa.TextLearner(dls, model, ALPHA, BETA, loss_func=fa.CrossEntropyLossFlat())


@pytest.mark.parametrize("max_len", [None, 16])
def test_text_classifiers_with_padding_and_without(max_len: int | None) -> None:
    """Fastai pads by whole chunks before a text, and by the rest behind it; half of the batch is padding here."""
    texts = [torch.randint(2, VOCABULARY, (n,)) for n in (30, 29, 21, 17, 16, 9, 3, 1)]
    padded = [fa.pad_chunk(fa.TensorText(x), pad_idx=1, seq_len=8, pad_len=30).as_subclass(Tensor) for x in texts]
    rows = [(fa.TensorText(x), torch.tensor(i % 2)) for i, x in enumerate(padded)]

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


@pytest.mark.parametrize("masks", [{}, MASKS], ids=["plain", "masks"])
def test_modules_by_their_paths_and_masks_of_the_batch(masks: dict[str, Any]) -> None:
    def write_out(learn: Any) -> None:
        options: Any = {name: mask(*learn.xb) for name, mask in masks.items()}
        learn.loss_grad = learn.loss_grad + fused_ar_tar(learn.rnn.raw_out, learn.rnn.out, ALPHA, BETA, **options)

    want = trained(of(Triple, fa.RNNCallback(), on("after_loss", write_out, 1)))
    learners = [
        of(Model, RNNRegularizer(ALPHA, BETA, **masks, rnn=["rnn"], dropout=["dropout"])),
        fuse(of(Model, fa.RNNRegularizer(ALPHA, BETA)), **masks, **PATHS),
        fuse(of(Triple, *fa.rnn_cbs(ALPHA, BETA)), **masks, **({} if masks else PATHS)),
    ]
    for learn in learners:
        assert gap(trained(learn), want) < 1e-5
        assert hooks_of(learn.model) == 0
    assert gap(trained(of(Model)), want) > 1e-4


def test_a_fit_prints_once_what_is_taken_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    learn = of(Model, RNNRegularizer(ALPHA, BETA, **MASKS, **PATHS))
    trained(learn)  # without logging
    assert not capsys.readouterr().out
    with learn.no_bar():
        learn.fit(2)
    (shown,) = [line for line in capsys.readouterr().out.splitlines() if "raw" in line]
    assert re.fullmatch(r"rnn \(LSTM\) -> dropout \(Dropout\): raw \(.*\) as batch .*; valid .*; starts .*", shown)


def test_modules_in_evaluation_add_nothing() -> None:
    learn = of(Model, RNNRegularizer(ALPHA, BETA, **PATHS))
    frozen = on("before_batch", lambda learn: learn.model.rnn.eval())
    assert gap(trained(learn, cbs=frozen), trained(of(Model), cbs=frozen)) == 0
    assert str(learn.recorder.values[0][2]) == "nan"


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


@pytest.mark.parametrize("dropout", [False, True])
def test_coefficients_may_change_while_training(dropout: bool) -> None:
    """A schedule sets numbers, or changes tensors in place; only the second epoch is regularized."""
    coefficients = torch.zeros(2)

    def change(learn: Any) -> None:
        coefficients.copy_(torch.tensor([ALPHA, BETA]) * (learn.epoch > 0))
        if learn is not by_tensors:
            learn.rnn_regularizer.alpha, learn.rnn_regularizer.beta = coefficients.tolist()

    by_tensors = fuse(by_hand(make(), *rnn_cbs(*coefficients.unbind())), dropout)
    want = trained(make(), 2, cbs=on("before_train", change))
    for learn in (fuse(make(), dropout), by_tensors):
        assert gap(trained(learn, 2, cbs=on("before_train", change)), want) < 1e-5
        assert all(ar > 0 < tar for *_, ar, tar, _ in learn.recorder.values)


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


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("run", ["fit", "get_preds"])
def test_no_activations_are_held(dropout: bool, run: str) -> None:
    learn, alive = fuse(make(), dropout), []
    learn.model[1].register_forward_hook(lambda _m, _i, out: alive.extend(map(weakref.ref, out[1:])))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1) if run == "fit" else learn.get_preds(reorder=False)
    gc.collect()
    assert alive
    assert not [ref for ref in alive if ref() is not None]


def test_exports_and_copies_hold_only_classes_of_fastai() -> None:
    learn = fuse(make(), dropout=True)
    trained(learn)
    learn.export("learner.pkl")
    assert type(learn.rnn_regularizer) is RNNRegularizer
    with without("fastreg"):
        loaded = fa.load_learner("learner.pkl")
    for rnn in learn.model[0].rnns:  # fastai's own, which no copy can be made of
        rnn.module.weight_hh_l0 = rnn.module.weight_hh_l0.detach()
    copied = copy.deepcopy(learn)
    expected = trained(learn, reset_opt=True)
    for again in (loaded, copied):
        assert type(again.model[1].output_dp) is fa.RNNDropout
        assert type(again.rnn_regularizer) is fa.RNNRegularizer
        assert again.rnn_regularizer.learn is again
        assert hooks_of(again.model) == len(again.metrics) == 0
        again.dls = learn.dls
        assert gap(trained(again, reset_opt=True), expected) < 1e-5


CLEAN_UPS: dict[str, Callable[[Any], Any]] = {
    "fuse": lambda learn: fuse(learn, dropout=True),
    "unfuse": unfuse,
    "remove_cb": lambda learn: learn.remove_cb(learn.rnn_regularizer),
    "the next fit": lambda learn: learn,
}


@pytest.mark.parametrize("clean_up", CLEAN_UPS)
def test_a_fit_after_one_that_was_cut_off_trains_as_if_nothing_had_been(clean_up: str) -> None:
    learn, other = fuse(make(), dropout=True), make()
    learn.rnn_regularizer.bptt = 20
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(learn, cbs=on("before_step", stop))
    assert hooks_of(learn.model) > 0
    CLEAN_UPS[clean_up](learn)
    if clean_up != "the next fit":
        assert hooks_of(learn.model) == 0
        assert learn.opt.hypers[-1]["lr"] == 5e-3
    if clean_up in ("unfuse", "remove_cb"):
        assert len(unfuse(learn).metrics) == 0
        by_hand(learn, *rnn_cbs(ALPHA, BETA))
    learn.rnn_regularizer.bptt = None
    learn.model.load_state_dict(other.model.state_dict())
    learn.model.zero_grad()
    assert gap(trained(learn, reset_opt=True), trained(other)) < 1e-5
    assert learn.recorder.metric_names[-3:] == ["ar", "tar", "time"]
    assert hooks_of(learn.model) == 0


def test_fuse_and_unfuse_swap_in_place() -> None:
    learn, kinds = make(), set()
    own, dropout = learn.rnn_regularizer, learn.model[1].output_dp
    own.run_train, own.alpha = False, 3.0
    assert fuse(learn) is learn
    fuse(fuse(learn, valid=lambda x: x < 0), dropout=True)  # with the arguments of the last call
    assert (learn.rnn_regularizer.run_train, learn.rnn_regularizer.alpha) == (False, 3.0)
    learn.rnn_regularizer.run_train, learn.rnn_regularizer.alpha = True, ALPHA
    look = on("after_pred", lambda x: kinds.add(type(x.model[1].output_dp)))
    assert gap(trained(learn, cbs=look), trained(make())) < 1e-5
    assert [kind.__base__ for kind in kinds] == [FusedRNNDropout]
    assert learn.model[1].output_dp is dropout
    assert not any(module.training for module in learn.model.modules())
    learn.rnn_regularizer.alpha = 3.0
    assert unfuse(unfuse(learn)) is learn
    (regularizer,) = (cb for cb in learn.cbs if isinstance(cb, fa.RNNRegularizer))
    assert regularizer is learn.rnn_regularizer
    assert (type(regularizer), regularizer.alpha, regularizer.beta) == (fa.RNNRegularizer, 3.0, BETA)
    assert gap(trained(unfuse(fuse(make(), dropout=True))), trained(make())) == 0


def test_a_regularizer_may_be_away_for_a_while() -> None:
    """As fastai's FetchPredsCallback takes one out, for the predictions after each epoch."""

    def fetch(learn: Any) -> None:
        found = [cb for cb in learn.cbs if isinstance(cb, (fa.RNNRegularizer, fa.Recorder))]
        if found:  # else this is for a prediction
            with learn.removed_cbs(found):
                learn.get_preds(inner=True, reorder=False, act=fa.noop)

    learn, other = of(Model, RNNRegularizer(ALPHA, BETA, **PATHS)), of(Triple, *fa.rnn_cbs(ALPHA, BETA))
    assert gap(*(trained(one, 2, cbs=on("after_validate", fetch)) for one in (learn, other))) < 1e-5
    assert all(ar > 0 < tar for *_, ar, tar, _ in learn.recorder.values)


def subclassed(instance: Any) -> None:
    instance.__class__ = type("Mine", (type(instance),), {})


def run(*cbs: Any) -> Callable[[Any], object]:
    return lambda _: trained(of(Model, *cbs))


def of_two_learners(_: Any) -> None:
    learn, _other = [of(Model, shared) for shared in [RNNRegularizer(ALPHA, BETA, **PATHS)] * 2]
    trained(learn)


OWN_CLASS = r"no RNNRegularizer of fastai's own class; .* rnn_cbs\(alpha, beta\)"
ALONE = r"\(decoded, raw, dropped\) from the Model, and one RNNCallback to capture them, got a Tensor and 1"
REJECTED: list[tuple[Callable[[Any], Any], Callable[[Any], Any], type[Exception], str]] = [
    (lambda x: subclassed(x.model[1].output_dp), lambda x: fuse(x, True), ValueError, "to swap, got Mine"),
    (lambda x: subclassed(x.rnn_regularizer), fuse, ValueError, OWN_CLASS),
    (vars, lambda _: fuse(None), TypeError, "learn: expected a Learner, got NoneType"),  # pyright: ignore
    (vars, lambda x: fuse(x, beta=3.0), TypeError, "beta: expected no coefficient, as fuse keeps those of the learner"),
    (vars, lambda x: fuse(x, True, batch_first=False), TypeError, "rnn: expected the path .* batch_first describe"),
    (vars, run(*rnn_cbs(1.0)[1:]), TypeError, ALONE),
    (lambda x: x.add_cb(RNNRegularizer()), lambda x: x.fit(1), ValueError, "RNNRegularizer: the learner has another"),
    (vars, run(RNNRegularizer(**PATHS), on("after_pred", lambda x: fuse(x, **PATHS))), RuntimeError, "within a batch"),
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
