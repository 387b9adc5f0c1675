"""`fastreg.fastai` in real fastai v2 learners, against fastai's own callbacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.measure.timing import threads
from fastreg import FusedRNNDropout
from tests.adapters.contract import BATCH, BATCHES, COEFFICIENTS, PATHS, loss_of
from tests.adapters.learners import ALPHA, BETA, ROWS, LearnerContract, subclass
from tests.conftest import skip_without, without
from tests.language_model import VOCABULARY, Model, Triple, formula, gap, hooks_of

skip_without("fastai")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fastai.text import all as fa

    from fastreg.fastai import RNNRegularizer, fuse, rnn_cbs

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick_collections")]  # fastai's warnings


@pytest.fixture(autouse=True)
def one_thread_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # where learners write
    with threads(1):
        yield


class Ids(list):
    """A dataset that learners can be exported with."""

    def new_empty(self) -> Ids:
        return Ids(self[:1])


def learner(alpha: float = ALPHA, beta: float = BETA) -> Any:
    """Make a language model learner, always with the same weights."""
    fa.set_seed(0)
    ids = Ids(torch.randint(0, VOCABULARY, (325,)) for _ in range(2))
    dls = fa.DataLoaders(*(fa.LMDataLoader(x, bs=8, seq_len=16) for x in (ids, ids.new_empty())))
    dls.vocab = [str(i) for i in range(VOCABULARY)]
    small = {"emb_sz": 24, "n_hid": 32, "n_layers": 2}
    options = {"config": fa.awd_lstm_lm_config | small, "pretrained": False, "alpha": alpha, "beta": beta}
    return fa.language_model_learner(dls, fa.AWD_LSTM, **options)


def of(kind: Callable[[], nn.Module], *cbs: Any) -> Any:
    """Make a learner of a custom model, always with the same weights."""
    dls = learner().dls
    fa.set_seed(5)
    return fa.Learner(dls, kind(), fa.CrossEntropyLossFlat(), cbs=list(cbs))


def with_paths() -> Any:
    return of(Model, RNNRegularizer(ALPHA, BETA, **PATHS))


def with_captures() -> Any:
    return of(Triple, *rnn_cbs(ALPHA, BETA))


def with_all_layers() -> Any:
    return of(Triple, *rnn_cbs(ALPHA, BETA, layers="all"))


either_regularized = pytest.mark.parametrize("make", [with_paths, with_captures])


def trained(learn: Any, *cbs: Any, epochs: int = 1, lr: float = 5e-3) -> Tensor:
    fa.set_seed(1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr, cbs=cbs)
    assert hooks_of(learn.model) == 0
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def on(event: str, do: Callable[[Any], object], order: int = 100) -> Any:
    """Return a callback that does something with the learner at an event of the training, after most callbacks."""
    made = fa.Callback(**{event: lambda self: do(self.learn)})
    made.order, made.run_valid = order, False
    return made


def interrupt(_learn: Any) -> None:
    raise KeyboardInterrupt


class TestContract(LearnerContract):
    """fastai's loop calls no `after_fit` after an error, so that hooks stay after a fit that was cut off."""

    adapter = "RNNRegularizer"
    fuse = staticmethod(fuse)
    learner, trained, on = staticmethod(learner), staticmethod(trained), staticmethod(on)
    callbacks = staticmethod(attrgetter("cbs"))
    cleans_up = False

    @pytest.fixture(params=[{}, {"dropout": True}, {"layers": "all"}])
    def options(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return request.param

    def train(self, model: Any, options: Any, accumulated: int, fits: int, rounded: bool, cbs: Any) -> dict[str, Any]:
        more = self.rounded("before_batch", "after_loss", fa.MixedPrecision.order) if rounded else []
        return super().train(model, options, accumulated, fits, rounded, [*cbs, *more])

    def learner_of(self, model: Any, regularized: bool = True, accumulated: int = 1, rows: Any = ROWS) -> Any:
        flat, size = [(*inputs, target) for inputs, target in rows], len(rows) // BATCHES
        dls = fa.DataLoaders(fa.DataLoader(flat, bs=size), fa.DataLoader(flat[:size], bs=size))
        dls.n_inp = len(rows[0][0])
        cbs = [fa.GradientAccumulation(accumulated * BATCH), fa.GradientClip(0.1)]
        cbs += [fa.RNNRegularizer(**COEFFICIENTS)] * regularized
        cbs += [fa.RNNCallback()] * getattr(model, "captured", False)
        return fa.Learner(dls, model, loss_of, opt_func=fa.SGD, cbs=cbs)

    def lrs_of_steps(self, learn: Any, lr: float) -> list[float]:
        def look(learn: Any) -> None:
            seen.append(learn.opt.hypers[-1]["lr"])
            raise fa.CancelStepException  # after which the rate has to be restored, too

        seen = []
        trained(learn, on("before_step", look), lr=lr)
        return [*seen, learn.opt.hypers[-1]["lr"]]

    def at_batches(self, do: Callable[[], object]) -> Any:
        return on("before_batch", lambda _: do())

    def rolled(self) -> Any:
        return on("before_batch", lambda learn: vars(learn).update(xb=(learn.x.roll(1, 0),), yb=(learn.y.roll(1, 0),)))

    def cut_off(self, learn: Any) -> None:
        with pytest.raises(KeyboardInterrupt):
            trained(learn, on("before_step", interrupt), lr=0.5)

    def exported(self, learn: Any) -> Any:
        learn.export("learner.pkl")
        with without("fastreg"):
            return fa.load_learner("learner.pkl")


@pytest.mark.parametrize("both", [False, True])
def test_terms_are_columns_of_every_log(both: bool) -> None:
    """They are averages over the epoch's batches, weighted by their sizes; the validation has none."""
    rows = [(torch.full((6,), i % VOCABULARY), torch.full((6,), i % VOCABULARY)) for i in range(10)]
    dls, seen = fa.DataLoaders(fa.DataLoader(rows, bs=8), fa.DataLoader(rows, bs=8)), []
    cbs = [*rnn_cbs(ALPHA, BETA), fa.CSVLogger()]
    learn = fa.Learner(dls, Triple(), fa.CrossEntropyLossFlat(), cbs=cbs, metrics=fa.accuracy)

    def look(learn: Any) -> None:
        raw, dropped = learn.rnn.raw_out.detach(), learn.rnn.out.detach()
        assert learn.loss == learn.loss_func(learn.pred, *learn.yb)
        torch.testing.assert_close(learn.loss_grad - learn.loss, formula(raw, dropped, 1, ALPHA, BETA))
        seen.append([dropped.pow(2).mean(), raw.diff(dim=1).pow(2).mean()])

    learn.recorder.train_metrics = both  # columns of the training and of the validation
    trained(learn, on("after_loss", look), epochs=2)
    head, *log = [line.split(",") for line in Path("history.csv").read_text().split()]
    assert learn.recorder.metric_names == head
    assert both or head == ["epoch", "train_loss", "valid_loss", "accuracy", "ar", "tar", "time"]
    for line, values, first, last in zip(log, learn.recorder.values, seen[::2], seen[1::2], strict=True):
        assert line[1:-1] == [str(x) for x in values]
        row = dict(zip(head, line, strict=True))
        for term, of_8, of_2 in zip(("ar", "tar"), first, last, strict=True):
            assert float(row["train_" * both + term]) == pytest.approx(0.8 * of_8.item() + 0.2 * of_2.item(), rel=1e-5)
            assert row.get(f"valid_{term}") == ("nan" if both else None)
    assert len(learn.validate()) == 2  # the loss and the accuracy
    assert learn.metrics.attrgot("name") == ["accuracy"]


def test_a_fit_may_lack_logging_a_penalty_or_a_recorder(capsys: pytest.CaptureFixture[str]) -> None:
    learn = with_paths()
    trained(learn)
    assert not capsys.readouterr().out
    trained(learn, on("before_batch", lambda learn: learn.model.rnn.eval()))
    assert str(learn.recorder.values[0][2]) == "nan"
    learn.remove_cbs([fa.Recorder, fa.ProgressCallback])
    trained(learn)


def validate(learn: Any) -> None:
    """Validate within an epoch, which fastai begins and ends as it does a fit."""
    kept = {name: vars(learn)[name] for name in ("dl", "n_iter", "epoch", "train_iter", "pct_train", "training")}
    assert len(learn.validate()) == 1  # without the columns
    vars(learn).update(kept)
    learn.model.train()


@pytest.mark.parametrize("between", ["after_batch", "after_train", "predictions"])
@either_regularized
def test_what_comes_between_batches_or_epochs_changes_no_weight(make: Any, between: str) -> None:
    """For predictions after each epoch, fastai takes the regularizer out for a while."""
    weights = []
    for learn in (of(Triple, *fa.rnn_cbs(ALPHA, BETA)), make()):
        learn.loss_func.activation = fa.noop  # predictions of several lengths are a list
        predict = fa.FetchPredsCallback(cbs=learn.rnn_regularizer, reorder=False)
        weights.append(trained(learn, predict if between == "predictions" else on(between, validate), epochs=2))
    assert gap(*weights) < 1e-5
    assert learn.recorder.metric_names[-3:] == ["ar", "tar", "time"]
    assert all(term > 0 for values in learn.recorder.values for term in values[-2:])
    assert learn.metrics == []


def test_paths_start_from_the_model_that_ddp_wraps(request: pytest.FixtureRequest) -> None:
    parallel = with_paths()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    parallel.model = nn.parallel.DistributedDataParallel(parallel.model)
    assert gap(trained(parallel), trained(with_paths())) < 1e-5


def test_fuse_keeps_where_the_callback_runs() -> None:
    learn = learner()
    learn.rnn_regularizer.run_train = False
    assert gap(trained(fuse(learn)), TestContract.stock_weights(0.0, 0.0)) < 1e-5


CANCELS = [fa.CancelStepException, fa.CancelBatchException, fa.CancelTrainException, fa.CancelEpochException]


@pytest.mark.parametrize("cancels", CANCELS)
def test_each_step_has_its_own_lr_whatever_is_cancelled_and_nothing_else_sees_it(cancels: Any) -> None:
    def look(learn: Any) -> None:
        seen.append(learn.opt.hypers[0]["lr"])
        if len(seen) == 2:
            raise cancels

    def check(learn: Any) -> None:
        others.append(learn.opt.hypers[0]["lr"])
        learn.opt.set_hypers(lr=0.5)  # as a scheduler does

    seen, others, learn = list[float](), list[float](), with_paths()
    learn.rnn_regularizer.bptt = 32
    looks = [on(event, check, order=2) for event in ("before_batch", "after_epoch")]
    trained(learn, on("before_step", look), fa.ShortEpochCallback(0.3), *looks, epochs=3, lr=0.5)
    assert len(seen) >= 3
    assert {*seen} == {0.25}
    assert {*others} == {0.5}


def test_fuse_swaps_the_dropout_once_for_all_fits() -> None:
    learn = learner()
    learn.model.eval()
    own = learn.model[1].output_dp
    fused = fuse(learn, dropout=True).model[1].output_dp
    assert (type(own), own.p, False) == (fa.RNNDropout, fused.p, fused.training)
    assert (type(fused).__base__, fused.alpha, fused.beta) == (FusedRNNDropout, 0, 0)
    trained(fuse(learn, dropout=True))
    assert learn.model[1].output_dp is fused


def test_fuse_swaps_nothing_if_the_model_lacks_the_dropout() -> None:
    rejects, options = TestContract().test_fuse_rejects_and_swaps_nothing, {"dropout": True}
    rejects(lambda _, head: subclass(head.output_dp), options, ValueError, "the RNNDropout of a .* with Mine$")


def test_learners_that_cannot_be_trained_say_why() -> None:
    with pytest.raises(ValueError, match="RNNRegularizer: the learner has another"):
        trained(of(Model, RNNRegularizer(1.0, **PATHS), fa.RNNRegularizer()))
    learn = with_paths()
    of(Model, learn.rnn_regularizer)
    with pytest.raises(RuntimeError, match="another learner has this callback, too"):
        trained(learn)


@pytest.mark.parametrize("make", [with_paths, with_captures, with_all_layers])
def test_a_learner_that_is_exported_after_an_interrupt_loads_with_its_own_metrics(make: Any) -> None:
    learn = make()
    with pytest.raises(KeyboardInterrupt):
        trained(learn, on("after_batch", interrupt))
    assert learn.metrics.attrgot("name") == ["ar", "tar"]
    learn.export("learner.pkl")
    with without("fastreg"):
        loaded = fa.load_learner("learner.pkl")
        assert loaded.metrics == []
        loaded.model(torch.zeros(2, 3, dtype=torch.long))
    assert len(learn.validate()) == 1


def test_the_penalty_is_added_in_the_order_of_fastai() -> None:
    """The loss is halved before fastai's callback adds its penalty."""
    halve = on("after_loss", lambda learn: setattr(learn, "loss_grad", learn.loss_grad / 2), order=0)
    stock, fused = trained(learner(), halve), trained(fuse(learner()), halve)
    assert gap(fused, stock) < 1e-5
    assert gap(stock, TestContract.stock_weights()) > 1e-3


def test_a_prediction_within_a_fit_changes_no_weight() -> None:
    """`tta` begins and ends with the events of a fit, and a fit around it goes on."""
    predict = on("after_batch", lambda learn: learn(["before_fit", "after_fit"]))
    assert gap(trained(with_paths(), predict), trained(with_paths())) == 0
