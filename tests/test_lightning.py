"""`ActivationRegularization` in real Lightning: the weights of a module that has the penalty written into its step."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

# Lightning's own, and those of its imports
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

VOCABULARY, HIDDEN, BATCH, TIME = 11, 6, 3, 7
ALPHA, BETA = 2.0, 1.0


class Module(pl.LightningModule):
    """A language model that knows nothing of fastreg."""

    result: Callable[[Tensor], Any] = staticmethod(lambda loss: loss)
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

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        raw, _ = self.encoder["lstm"](self.drop(self.encoder["embedding"](batch)))
        dropped = self.drop(raw)
        loss = F.cross_entropy(self.decoder(dropped).flatten(0, 1), batch.flatten())
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


class Formula(Module):
    regularized = True


def batches(count: int = 6) -> torch.utils.data.DataLoader[Any]:
    ids = torch.randint(VOCABULARY, (count * BATCH, TIME), generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(ids, batch_size=BATCH)  # pyright: ignore[reportArgumentType]


def callback(alpha: float = ALPHA, beta: float = BETA, **options: Any) -> ActivationRegularization:
    named: dict[str, Any] = {"rnn": "encoder.lstm", "dropout": "drop"}
    return ActivationRegularization(alpha, beta, **(named | options))


def fit(module: Any, *callbacks: Any, validate: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(callbacks=list(callbacks), **(defaults | quiet | options))
    trainer.fit(module, batches(), batches(1) if validate else None)
    return trainer


def made(kind: type[Module] = Module) -> Module:
    torch.manual_seed(3)
    return kind()


def assert_same(module: nn.Module, other: nn.Module, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ],
    ids=["plain", "accumulation", "accumulation+clipping", "clipping", "bf16+accumulation+clipping"],
)
def test_weights(options: dict[str, Any]) -> None:
    module, written_out, without = made(), made(Formula), made()
    fit(module, callback(), **options)
    fit(written_out, **options)
    fit(without, **options)
    # Autograd rounds to bfloat16 wherever it adds gradients; hooks add in float32 and round once.
    largest = max(
        (x - y).abs().max().item() for x, y in zip(written_out.parameters(), made().parameters(), strict=True)
    )
    half = "precision" in options
    assert_same(module, written_out, **({"rtol": 0, "atol": torch.finfo(torch.bfloat16).eps * largest} if half else {}))
    with pytest.raises(AssertionError):
        assert_same(module, without, rtol=1e-3, atol=1e-4)


def test_a_dropout_that_takes_the_penalty_along(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused(Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = FusedRNNDropout(0.3)

    class FusedFormula(Fused):
        regularized = True

    module, written_out = made(Fused), made(FusedFormula)
    monkeypatch.setattr(carry, "penalty_of", None)  # the dropout alone forms terms
    logged = fit(module, callback(), validate=True).callback_metrics
    want = fit(written_out, validate=True).callback_metrics
    assert_same(module, written_out)
    torch.testing.assert_close(logged["train_loss"], want["train_loss"])
    torch.testing.assert_close(torch.stack([logged["ar"], logged["tar"]]), torch.stack(module.penalties[6:]).mean(0))
    assert (module.drop.alpha, module.drop.beta) == (0, 0)  # its own, again


def test_dict_and_skipped_steps() -> None:
    def every_other(module: Module) -> Callable[[Tensor], Any]:
        return lambda loss: {"loss": loss, "more": 1} if len(module.penalties) % 2 else None

    module, written_out = made(), made(Formula)
    module.result, written_out.result = every_other(module), every_other(written_out)
    one, seen = callback(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs and outputs.get("more"))
            with pytest.raises(RuntimeError, match="nothing was captured, the attached LSTM did not run"):
                one.regularizer.on_backward_begin(torch.zeros(()))

    fit(module, one, Watch())
    fit(written_out)
    assert_same(module, written_out)
    assert [bool(x) for x in seen] == [True, False] * 6


def test_logs() -> None:
    module, written_out = made(), made(Formula)
    logged = fit(module, callback()).callback_metrics
    want = fit(written_out).callback_metrics
    epoch = torch.stack(module.penalties[6:]).mean(0)
    torch.testing.assert_close(torch.stack([logged["ar"], logged["tar"]]), epoch)
    torch.testing.assert_close(logged["train_loss"], want["train_loss"])  # logged before the formula is added


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
    assert module.resets == 2 * (2 + 2 + 2)  # epochs of training, and of validation before and after


def test_a_step_of_the_instance_is_left_to_it() -> None:
    module, written_out = made(), made(Formula)
    module.training_step = own = partial(module.training_step, batch_idx=0)
    fit(module, callback())
    fit(written_out)
    assert vars(module)["training_step"] is own
    assert_same(module, written_out)


def test_a_step_without_an_index() -> None:
    class Short(Module):
        def training_step(self, batch: Tensor) -> Any:  # pyright: ignore
            return super().training_step(batch, 0)

    module, written_out = made(Short), made(Formula)
    fit(module, callback())
    fit(written_out)
    assert_same(module, written_out)


def test_compiled_module() -> None:
    class Quiet(Module):  # a step that logs compiles neither with the callback nor without
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raw, _ = self.encoder["lstm"](self.encoder["embedding"](batch))
            loss = F.cross_entropy(self.decoder(self.drop(raw)).flatten(0, 1), batch.flatten())
            return loss + BETA * raw.diff(dim=1).pow(2).mean() if self.regularized else loss

    class QuietFormula(Quiet):
        regularized = True

    module, written_out = made(Quiet), made(QuietFormula)
    module.drop.p = written_out.drop.p = 0.0
    torch._dynamo.reset()
    fit(torch.compile(module, backend="eager"), callback(alpha=0.0))
    torch._dynamo.reset()
    fit(written_out)
    assert_same(module, written_out)


def test_the_module_is_left_as_it_was_after_an_error() -> None:
    def fail(loss: Tensor) -> Any:
        raise KeyError("in a step")

    module = made()
    module.result = fail
    with pytest.raises(KeyError, match="in a step"):
        fit(module, callback())
    assert "training_step" not in vars(module)
    assert not module.encoder["lstm"]._forward_hooks


def test_rnns_in_evaluation_add_nothing() -> None:
    class Frozen(Module):
        def on_train_epoch_start(self) -> None:
            self.encoder["lstm"].eval()

    module, without = made(Frozen), made(Frozen)
    logged = fit(module, callback()).callback_metrics
    fit(without)
    assert_same(module, without)
    assert "ar" not in logged


def test_several_rnns() -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raw, _ = self.encoder["lstm"](self.encoder["embedding"](batch))
            last, _ = self.second(self.drop(raw))
            loss = F.cross_entropy(self.decoder(last).flatten(0, 1), batch.flatten())
            if self.regularized:
                loss = loss + BETA * (raw.diff(dim=1).pow(2).mean() + last.diff(dim=1).pow(2).mean())
            return loss

    class TwoFormula(Two):
        regularized = True

    module, written_out = made(Two), made(TwoFormula)
    fit(module, callback(0.0, rnn=["encoder.lstm", "second"], dropout=["drop", None]))
    fit(written_out)
    assert_same(module, written_out)
    last = made(Two)
    fit(last, callback(0.0, rnn=["encoder.lstm", "second"], dropout=["drop", None], layers="last"))
    with pytest.raises(AssertionError):
        assert_same(last, written_out)


class Pair(Module):
    """Two RNNs, whose outputs are regularized with different betas."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        raw, _ = self.encoder["lstm"](self.encoder["embedding"](batch))
        last, _ = self.second(raw)
        loss = F.cross_entropy(self.decoder(last).flatten(0, 1), batch.flatten())
        tars = [x.diff(dim=1).pow(2).mean() for x in (raw, last)]
        self.penalties.append(torch.stack(tars).detach())
        return loss + 3 * tars[0] + 5 * tars[1] if self.regularized else loss


class PairFormula(Pair):
    regularized = True


@pytest.mark.parametrize("own", [False, True])
def test_two_callbacks(own: bool) -> None:
    module, written_out = made(Pair), made(PairFormula)
    if own:
        module.training_step = partial(module.training_step, batch_idx=0)
    step = module.training_step
    callbacks = [callback(0.0, 3.0, dropout=None), callback(0.0, 5.0, rnn="second", dropout=None)]
    for _ in range(2):
        logged = fit(module, *callbacks).callback_metrics
        assert module.training_step == step
        assert ("training_step" in vars(module)) == own
        assert not module.encoder["lstm"]._forward_hooks
        torch.testing.assert_close(logged["tar"], torch.stack(module.penalties[-6:]).mean())
        fit(written_out)
    assert_same(module, written_out)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_callbacks_end_in_any_order(order: tuple[int, int]) -> None:
    module = made(Pair)
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


def test_modules_made_late() -> None:
    class Late(Formula):
        regularized = False

        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = self.encoder["lstm"]

    module, written_out = made(Late), made(Formula)
    fit(module, callback(rnn="late"))
    fit(written_out)
    assert_same(module, written_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnn": "lstm"}, r"rnn: Module has no such module at 'lstm'; candidates: 'encoder\.lstm'$"),
        ({"dropout": "dropout"}, r"dropout: Module has no such module at 'dropout'; candidates: 'drop'$"),
        ({"dropout": ["drop", "drop"]}, "got 1 RNNs and 2 dropouts"),
        ({"rnn": []}, "got 0 RNNs"),
        ({"layers": "first"}, "layers: expected 'last' or 'all'"),
        ({"alpha": -1.0}, "alpha"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    module = made()
    with pytest.raises(ValueError, match=message):
        fit(module, callback(**options))
    assert not module.encoder["lstm"]._forward_hooks


def test_wrong_dropout() -> None:
    class Wrong(Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Dropout(0.1)

    with pytest.raises(RuntimeError, match="attached Dropout did not get the output of the LSTM"):
        fit(made(Wrong), callback(dropout="other"))


def test_manual_optimization() -> None:
    module = made()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"automatic_optimization=False.*RNNRegularizer in its training_step"):
        fit(module, callback())


def test_without_lightning() -> None:
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "try: import fastreg.lightning\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fastreg.lightning: Lightning is not installed; pip install lightning"


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
    fit(made(), callback(), snapshots, max_epochs=1)
    for module in snapshots.made:
        assert module.training_step.__self__ is module
        before = [p.detach().clone() for p in module.parameters()]
        fit(module, max_epochs=1)  # without the penalty
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
        dropped = self.drop(raw)
        return F.cross_entropy(self.decoder(dropped).flatten(0, 1), batch.flatten()), raw

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 3:
            assert self.state is None  # as validation has run
        loss, raw = self.run(batch)
        return loss + BETA * raw.diff(dim=1).pow(2).mean() if self.regularized else loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.run(batch[:1])


def test_validation_within_an_epoch_leaves_no_hidden_state() -> None:
    class StatefulFormula(Stateful):
        regularized = True

        def on_validation_epoch_start(self) -> None:
            self.reset()

        on_validation_epoch_end = on_train_epoch_start = on_validation_epoch_start

    module, written_out = made(Stateful), made(StatefulFormula)
    fit(module, callback(0.0), validate=True, val_check_interval=0.5)
    fit(written_out, validate=True, val_check_interval=0.5)
    assert_same(module, written_out)


class Own(nn.Module):
    """A recurrent layer of one's own, time first; its output is one of several."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raw, state = self.rnn.forward(x.transpose(0, 1))
        return {"state": state, "raw": raw}


def test_any_module_with_valid_steps_of_the_batch() -> None:
    class Masked(Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raw = self.own(self.encoder["embedding"](batch))["raw"]
            dropped = self.drop(raw)
            loss = F.cross_entropy(self.decoder(dropped).flatten(0, 1), batch.T.flatten())
            if self.regularized:
                loss = loss + fused_ar_tar(
                    raw, dropped, ALPHA, BETA, valid=batch != 3, starts=batch == 2, batch_first=False
                )
            return loss

    class MaskedFormula(Masked):
        regularized = True

    module, written_out, unmasked = made(Masked), made(MaskedFormula), made(Masked)
    options: dict[str, Any] = {"rnn": "own", "output": lambda result: result["raw"], "batch_first": False}
    one = callback(**options, valid=lambda batch: batch != 3, starts=lambda batch: batch == 2)
    fit(module, one)
    fit(written_out)
    fit(unmasked, callback(**options, valid=lambda batch: batch != 3))
    assert_same(module, written_out)
    with pytest.raises(AssertionError):
        assert_same(module, unmasked)
    with pytest.raises(ValueError, match=r"batch_first: expected True for .* as the Own does not have it"):
        fit(made(Masked), callback(rnn="own", output=options["output"]))
    with pytest.raises(TypeError, match="valid: expected the callable to return a tensor or None, got int"):
        fit(made(Masked), callback(**options, valid=lambda batch: 3))
    for name in ("valid", "starts"):
        with pytest.raises(TypeError, match=f"{name}: expected a function of the batch, or None, got int"):
            callback(**{name: 3})


def test_valid_steps_of_what_the_rnn_is_called_with() -> None:
    """Run by run: an encoder's and a decoder's are of different lengths."""

    class TwoRuns(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            embedded, losses = self.encoder["embedding"](batch), []
            for part, ids in zip(embedded.split([4, TIME - 4], 1), batch.split([4, TIME - 4], 1), strict=True):
                raw, _ = self.encoder["lstm"](part)
                losses.append(F.cross_entropy(self.decoder(raw).flatten(0, 1), ids.flatten()))
                if self.regularized:
                    losses.append(fused_ar_tar(raw, raw, ALPHA, BETA, valid=(ids != 3) & (part[..., 0] > -9)))
            return torch.stack(losses).sum()

    class TwoRunsFormula(TwoRuns):
        regularized = True

    def valid(batch: Tensor, x: Tensor) -> Tensor:
        start = 0 if x.shape[1] == 4 else 4
        return batch[:, start : start + x.shape[1]] != 3

    module, written_out = made(TwoRuns), made(TwoRunsFormula)
    fit(module, callback(dropout=None, valid=valid))
    fit(written_out)
    assert_same(module, written_out)


def test_terms_are_logged_once_an_epoch_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, log_dict = [], pl.LightningModule.log_dict

    def counted(self: Any, *args: Any, **options: Any) -> None:
        calls.append(args)
        log_dict(self, *args, **options)

    monkeypatch.setattr(pl.LightningModule, "log_dict", counted)
    assert {"ar", "tar"} <= fit(made(), callback()).callback_metrics.keys()
    assert len(calls) == 2  # epochs
    assert not {"ar", "tar"} & fit(made(), callback(log=False)).callback_metrics.keys()
    assert len(calls) == 2
    with pytest.raises(TypeError, match="log: expected True or False, got 1"):
        callback(log=1)


@pytest.mark.parametrize("options", [{"rnn": 3}, {"rnn": None}, {"rnn": nn.LSTM(2, 2)}, {"dropout": 3}])
def test_paths_are_strings(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))}: expected an attribute path, or a list of them, got"):
        callback(**options)
