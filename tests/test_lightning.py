"""`ActivationRegularization` in real Lightning: the weights of a module that has the penalty written into its step."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    pl: Any = ...  # Lightning is not needed to check types
else:
    try:
        import lightning.pytorch as pl
    except ImportError:
        missing = "Lightning is not installed: fastreg.lightning did not run"
        pl = pytest.importorskip("pytorch_lightning", reason=missing)

from fastreg import FusedRNNDropout, carry, fused_ar_tar
from fastreg.lightning import ActivationRegularization
from tests.language_model import (
    ALPHA,
    BATCH,
    BETA,
    HIDDEN,
    TIME,
    VOCABULARY,
    assert_other_weights,
    assert_same_weights,
    criterion,
    tolerance_of_bfloat16,
)

# Lightning's own, and those of its imports
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Module(pl.LightningModule):
    """A language model that knows nothing of fastreg."""

    regularized = False  # by the formula written out

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embedding": nn.Embedding(VOCABULARY, HIDDEN)})
        self.encoder["lstm"] = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.decoder = nn.Linear(HIDDEN, VOCABULARY)
        self.resets = 0
        self.penalties: list[Tensor] = []

    def reset(self) -> None:
        self.resets += 1

    def result(self, loss: Tensor) -> Any:
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        raw, _ = self.encoder["lstm"](self.drop(self.encoder["embedding"](batch)))
        dropped = self.drop(raw)
        loss = criterion(self.decoder(dropped), batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=1)
        raw, dropped = raw.float(), dropped.float()
        ar, tar = dropped.pow(2).mean(), raw.diff(dim=1).pow(2).mean()
        self.penalties.append(torch.stack([ar, tar]).detach())
        if self.regularized:
            loss = loss + ALPHA * ar + BETA * tar
        return self.result(loss)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.encoder["lstm"](self.encoder["embedding"](batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def batches(count: int = 6) -> torch.utils.data.DataLoader[Any]:
    ids = torch.randint(VOCABULARY, (count * BATCH, TIME), generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(ids, batch_size=BATCH)  # pyright: ignore[reportArgumentType]


def callback(alpha: float = ALPHA, beta: float = BETA, **options: Any) -> ActivationRegularization:
    named: dict[str, Any] = {"rnn": "encoder.lstm", "dropout": "drop"}
    return ActivationRegularization(alpha, beta, **(named | options))


def fit(module: Any, *callbacks: Any, validate: bool = False, **options: Any) -> Any:
    """Train for an epoch, and return the logged metrics."""
    torch.manual_seed(0)
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(callbacks=list(callbacks), **(defaults | quiet | options))
    trainer.fit(module, batches(), batches(1) if validate else None)
    return trainer.callback_metrics


def made(kind: Any = Module, regularized: bool = False) -> Any:
    torch.manual_seed(3)
    module = kind()
    module.regularized = regularized
    return module


def check_weights(kind: Any, *callbacks: Any, **options: Any) -> Any:
    """Check that a module is trained as the same module with the formula written out, and return it."""
    module, written_out = made(kind), made(kind, regularized=True)
    fit(module, *callbacks, **options)
    fit(written_out, **options)
    assert_same_weights(module, written_out)
    return module


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ],
    ids=["plain", "accumulation+clipping", "bf16+accumulation+clipping"],
)
def test_trains_the_weights_of_the_formula(options: dict[str, Any]) -> None:
    module, written_out, without = made(), made(regularized=True), made()
    fit(module, callback(), **options)
    fit(written_out, **options)
    fit(without, **options)
    tolerance = tolerance_of_bfloat16(written_out, made()) if "precision" in options else {}
    assert_same_weights(module, written_out, **tolerance)
    assert_other_weights(module, without)


def test_a_fused_dropout_forms_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused(Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = FusedRNNDropout(0.3)

    monkeypatch.setattr(carry, "penalty_of", None)  # the dropout alone forms terms
    module = check_weights(Fused, callback())
    assert (module.drop.alpha, module.drop.beta) == (0, 0)  # its own, again


def test_steps_that_return_a_dict_and_steps_that_are_skipped() -> None:
    one, seen = callback(), []

    class EveryOther(Module):
        def result(self, loss: Tensor) -> Any:
            return {"loss": loss, "more": 1} if len(self.penalties) % 2 else None

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs and outputs.get("more"))
            with pytest.raises(RuntimeError, match="nothing was captured, the attached LSTM did not run"):
                one.regularizer.on_backward_begin(torch.zeros(()))

    check_weights(EveryOther, one, Watch())
    assert [bool(x) for x in seen] == [True, False] * 3


def test_logs_the_terms_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, log_dict = [], pl.LightningModule.log_dict

    def counted(self: Any, *args: Any, **options: Any) -> None:
        calls.append(args)
        log_dict(self, *args, **options)

    monkeypatch.setattr(pl.LightningModule, "log_dict", counted)
    module = made()
    logged, want = fit(module, callback(), max_epochs=2), fit(made(regularized=True), max_epochs=2)
    last = torch.stack(module.penalties[6:]).mean(0)
    torch.testing.assert_close(torch.stack([logged["ar"], logged["tar"]]), last)
    torch.testing.assert_close(logged["train_loss"], want["train_loss"])  # logged before the formula is added
    assert len(calls) == 2
    assert not {"ar", "tar"} & fit(made(), callback(log=False)).keys()
    assert len(calls) == 2


def test_the_module_is_left_as_it_was() -> None:
    module = made()
    one = callback()
    for _ in range(2):  # and may be fitted again
        fit(module, one, validate=True)
        assert "training_step" not in vars(module)
        assert not module.encoder["lstm"]._forward_hooks
        assert not module.drop._forward_hooks
        with pytest.raises(RuntimeError, match=r"nothing was captured; call on_loss_begin"):  # nothing is attached
            one.regularizer.on_backward_begin(torch.zeros(()))
    copy.deepcopy(one)
    assert module.resets == 2 * (1 + 1 + 1)  # epochs of training, and of validation before and after


def test_a_compiled_module() -> None:
    class Quiet(Module):  # a step that logs compiles neither with the callback nor without
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raw, _ = self.encoder["lstm"](self.encoder["embedding"](batch))
            loss = criterion(self.decoder(self.drop(raw)), batch)
            return loss + BETA * raw.diff(dim=1).pow(2).mean() if self.regularized else loss

    module, written_out = made(Quiet), made(Quiet, regularized=True)
    module.drop.p = written_out.drop.p = 0.0
    torch._dynamo.reset()
    fit(torch.compile(module, backend="eager"), callback(0.0))
    torch._dynamo.reset()
    fit(written_out)
    assert_same_weights(module, written_out)


class Failing(Module):
    def result(self, loss: Tensor) -> Any:
        raise KeyError("in a step")


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (Failing, {}, KeyError, "in a step"),
        (Manual, {}, RuntimeError, r"automatic_optimization=False.*RNNRegularizer in its training_step"),
        (Module, {"rnn": "lstm"}, ValueError, r"rnn: Module has no such module at 'lstm'; .* 'encoder\.lstm'$"),
    ],
    ids=["step", "manual optimization", "path"],
)
def test_the_module_is_left_as_it_was_after_an_error(
    kind: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    module = made(kind)
    with pytest.raises(error, match=message):
        fit(module, callback(**options))
    assert "training_step" not in vars(module)
    assert not module.encoder["lstm"]._forward_hooks


def test_rnns_in_evaluation_add_nothing() -> None:
    class Frozen(Module):
        def on_train_epoch_start(self) -> None:
            self.encoder["lstm"].eval()

    module, without = made(Frozen), made(Frozen)
    assert "ar" not in fit(module, callback())
    fit(without)
    assert_same_weights(module, without)


class Two(Module):
    """Two RNNs; the formula regularizes the output of each with a beta of its own."""

    betas = BETA, BETA

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        raw, _ = self.encoder["lstm"](self.encoder["embedding"](batch))
        last, _ = self.second(self.drop(raw))
        loss = criterion(self.decoder(last), batch)
        tars = torch.stack([x.diff(dim=1).pow(2).mean() for x in (raw, last)])
        self.penalties.append(tars.detach())
        return loss + (tars * torch.tensor(self.betas)).sum() if self.regularized else loss


class Last(Two):
    betas = 0.0, BETA


class Unlike(Two):
    betas = 3.0, 5.0


@pytest.mark.parametrize(("kind", "layers"), [(Two, "all"), (Last, "last")], ids=["all", "last"])
def test_several_rnns(kind: Any, layers: Any) -> None:
    check_weights(kind, callback(0.0, rnn=["encoder.lstm", "second"], dropout=["drop", None], layers=layers))


@pytest.mark.parametrize("own", [False, True])
def test_two_callbacks(own: bool) -> None:
    module, written_out = made(Unlike), made(Unlike, regularized=True)
    if own:  # of the instance, to which it is left
        module.training_step = partial(module.training_step, batch_idx=0)
    step = module.training_step
    callbacks = [callback(0.0, 3.0), callback(0.0, 5.0, rnn="second", dropout=None)]
    for _ in range(2):
        logged = fit(module, *callbacks)
        assert module.training_step == step
        assert ("training_step" in vars(module)) == own
        assert not module.encoder["lstm"]._forward_hooks
        torch.testing.assert_close(logged["tar"], torch.stack(module.penalties[-6:]).mean())
        fit(written_out)
    assert_same_weights(module, written_out)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_callbacks_end_in_any_order(order: tuple[int, int]) -> None:
    module = made(Two)
    callbacks = [callback(dropout=None), callback(rnn="second", dropout=None)]
    for one in callbacks:
        one.on_fit_start(None, module)
    first, last = (callbacks[i] for i in order)
    first.teardown(None, module, "fit")
    first.teardown(None, module, "fit")  # twice is once
    assert "training_step" in vars(module)
    last.teardown(None, module, "fit")
    assert "training_step" not in vars(module)
    assert not module.second._forward_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rnn": 3}, TypeError, "rnn: expected an attribute path, or a list of them, got int"),
        ({"valid": 3}, TypeError, "valid: expected a function of the batch, or None, got int"),
        ({"starts": 3}, TypeError, "starts: expected a function of the batch, or None, got int"),
        ({"log": 1}, TypeError, "log: expected True or False, got 1"),
    ],
)
def test_rejects_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        callback(**options)


class Snapshots(pl.Callback):
    """Copies and pickles the module in the middle of a fit, as an average of weights does."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.penalties.clear()
        stored = io.BytesIO()
        trainer_of, pl_module._trainer = pl_module._trainer, None
        torch.save(pl_module, stored)
        self.made = [copy.deepcopy(pl_module), torch.load(io.BytesIO(stored.getvalue()), weights_only=False)]
        pl_module._trainer = trainer_of


def test_a_copy_made_while_training_has_a_step_of_its_own() -> None:
    snapshots = Snapshots()
    fit(made(), callback(), snapshots)
    for module in snapshots.made:
        assert module.training_step.__self__ is module
        before = [p.detach().clone() for p in module.parameters()]
        fit(module)  # without the penalty
        assert not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


class Stateful(Module):
    """Goes on from the hidden state of the last batch, as language models do."""

    state: Any = None

    def reset(self) -> None:
        super().reset()
        self.state = None

    def run(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        raw, state = self.encoder["lstm"](self.encoder["embedding"](batch), self.state)
        self.state = tuple(x.detach() for x in state)
        return criterion(self.decoder(self.drop(raw)), batch), raw

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 3:
            assert self.state is None  # as validation has run
        loss, raw = self.run(batch)
        return loss + BETA * raw.diff(dim=1).pow(2).mean() if self.regularized else loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.run(batch[:1])

    def on_validation_epoch_start(self) -> None:
        if self.regularized:  # with the penalty by a callback, which resets
            self.reset()

    on_validation_epoch_end = on_train_epoch_start = on_validation_epoch_start


def test_validation_within_an_epoch_leaves_no_hidden_state() -> None:
    check_weights(Stateful, callback(0.0), validate=True, val_check_interval=0.5)


class Own(nn.Module):
    """A recurrent layer of one's own, time first; its output is one of several."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raw, state = self.rnn.forward(x.transpose(0, 1))
        return {"state": state, "raw": raw}


class Masked(Module):
    """Makes its layer when the fit begins, and has a step without an index."""

    def configure_model(self) -> None:
        if not hasattr(self, "own"):
            self.own = Own()

    def training_step(self, batch: Tensor) -> Any:  # pyright: ignore
        raw = self.own(self.encoder["embedding"](batch))["raw"]
        dropped = self.drop(raw)
        masks: Any = {"valid": batch != 3, "starts": batch == 2, "batch_first": False}
        penalty = fused_ar_tar(raw, dropped, ALPHA, BETA, **masks) if self.regularized else 0
        return criterion(self.decoder(dropped), batch.T) + penalty


def test_any_module_made_late_with_masks_of_the_batch() -> None:
    options: dict[str, Any] = {"rnn": "own", "output": lambda result: result["raw"], "batch_first": False}
    check_weights(Masked, callback(**options, valid=lambda batch: batch != 3, starts=lambda batch: batch == 2))


class TwoRuns(Module):
    """Runs the RNN on two parts of different lengths, as an encoder and a decoder are."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        embedded, losses = self.encoder["embedding"](batch), []
        for part, ids in zip(embedded.split([4, TIME - 4], 1), batch.split([4, TIME - 4], 1), strict=True):
            raw, _ = self.encoder["lstm"](part)
            losses.append(criterion(self.decoder(raw), ids))
            if self.regularized:
                losses.append(fused_ar_tar(raw, raw, ALPHA, BETA, valid=ids != 3))
        return torch.stack(losses).sum()


def test_valid_steps_of_each_run() -> None:
    def valid(batch: Tensor, x: Tensor) -> Tensor:
        start = 0 if x.shape[1] == 4 else 4
        return batch[:, start : start + x.shape[1]] != 3

    check_weights(TwoRuns, callback(dropout=None, valid=valid))
