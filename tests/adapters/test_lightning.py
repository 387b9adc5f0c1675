"""`ActivationRegularization` in real Lightning: the weights of a module that has the penalty written into its step."""

from __future__ import annotations

import copy
from collections import UserDict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import more, skip_without

skip_without("lightning")

import lightning.pytorch as pl  # noqa: E402

from fastreg.lightning import ActivationRegularization  # noqa: E402
from tests import language_model as lm  # noqa: E402
from tests.adapters.trainers import DATA, Contract, Net  # noqa: E402
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, TIME, assert_same_weights, criterion, tokens  # noqa: E402

# Lightning and its imports warn.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{x}Warning") for x in ("Deprecation", "Future", "User")]
BOTH = (ALPHA, BETA)


class Module(pl.LightningModule):
    """A language model that knows nothing of fastreg, unless it has the formula, with coefficients for each layer."""

    def __init__(self, *coefficients: tuple[float, float]) -> None:
        super().__init__()
        self.net, self.coefficients = lm.Model(), coefficients
        self.resets, self.terms = 0, []

    def reset(self) -> None:
        self.resets += 1

    def result(self, loss: Tensor) -> Any:
        return loss

    def run(self, batch: Tensor) -> Any:
        """Return the loss, and raw and dropped of each layer."""
        decoded, raw, dropped = self.net.activations(batch)
        return criterion(decoded, batch), [(raw, dropped)]

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss, layers = self.run(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=1)
        pairs = [(raw.float(), dropped.float()) for raw, dropped in layers]
        terms = [torch.stack([dropped.pow(2).mean(), raw.diff(dim=1).pow(2).mean()]) for raw, dropped in pairs]
        self.terms += [x.detach() for x in terms]
        for term, coefficients in zip(terms, self.coefficients, strict=False):
            loss = loss + (term * torch.tensor(coefficients)).sum()
        return self.result(loss)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.run(batch[:1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def callback(alpha: float = ALPHA, beta: float = BETA, **options: Any) -> ActivationRegularization:
    named: dict[str, Any] = {"rnn": "net.rnn", "dropout": "net.dropout"}
    return ActivationRegularization(alpha, beta, **(named | options))


def fit(module: Any, *callbacks: Any, validate: bool = False, data: Any = None, **options: Any) -> Any:
    """Train for an epoch of six batches, and return the logged metrics; also validate in the fit."""
    torch.manual_seed(0)
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(callbacks=list(callbacks), **(defaults | quiet | options))
    data = data or torch.utils.data.DataLoader(tokens(6 * BATCH, TIME), batch_size=BATCH)  # pyright: ignore
    trainer.fit(module, data, data if validate else None)
    return trainer.callback_metrics


def made(kind: Any = Module, *coefficients: tuple[float, float]) -> Any:
    return lm.seeded(lambda: kind(*coefficients))


def check_weights(kind: Any, *callbacks: Any, coefficients: Any = (BOTH,), **options: Any) -> Any:
    """Check that a module is trained as the same module with the formula written out, and return the metrics."""
    module, written_out = made(kind), made(kind, *coefficients)
    logged = fit(module, *callbacks, **options)
    fit(written_out, **options)
    assert_same_weights(module, written_out)
    assert_left_alone(module)
    return logged


def assert_left_alone(module: Any) -> None:
    assert "training_step" not in vars(module)
    assert not any(x._forward_hooks for x in module.modules())


class TestContract(Contract):
    """The module has the layers of the model as its own, so that the paths are the same."""

    logger = "lightning.pytorch"

    def fit(self, model: Net, options: Any = None, accumulated: int = 1) -> dict[str, float]:
        class Step(pl.LightningModule):
            def training_step(self, batch: Any) -> Tensor:
                return model(**batch)["loss"]

            configure_optimizers = Module.configure_optimizers

        module, callbacks = Step(), [] if options is None else [ActivationRegularization(*BOTH, **options)]
        for name, child in model.named_children():
            module.add_module(name, child)
        loader = torch.utils.data.DataLoader(DATA, batch_size=BATCH)  # pyright: ignore[reportArgumentType]
        return fit(module, *callbacks, data=loader, accumulate_grad_batches=accumulated)


@pytest.mark.processor
@lm.either
def test_bfloat16_with_accumulation_and_clipping() -> None:
    options: Any = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    module, written_out = made(), made(Module, BOTH)
    fit(module, callback(), **options)
    fit(written_out, **options)
    assert_same_weights(module, written_out, **lm.tolerance_of_bfloat16(written_out, made()))


def test_steps_that_return_a_dict_and_steps_that_are_skipped() -> None:
    class EveryOther(Module):
        def result(self, loss: Tensor) -> Any:
            return UserDict(loss=loss, more=1) if len(self.terms) % 2 else None

    def look(_trainer: Any, _module: Any, outputs: Any, *_: Any) -> None:
        seen.append(outputs and outputs.get("more"))

    seen: list[Any] = []
    check_weights(EveryOther, callback(), pl.callbacks.LambdaCallback(on_train_batch_end=look))
    assert [bool(x) for x in seen] == [True, False] * 3


def test_logs_the_means_of_the_terms_over_an_epoch() -> None:
    module = made()
    logged, want = fit(module, callback(), max_epochs=2), fit(made(Module, BOTH), max_epochs=2)
    torch.testing.assert_close(torch.stack([logged["ar"], logged["tar"]]), torch.stack(module.terms[6:]).mean(0))
    torch.testing.assert_close(logged["train_loss"], want["train_loss"])  # logged before the formula is added
    assert not {"ar", "tar"} & fit(made(), callback(log=False)).keys()


def test_the_module_is_left_as_it_was_and_may_be_fitted_again() -> None:
    module, one = made(), callback()
    for _ in range(2):
        fit(module, one, validate=True)
        assert_left_alone(module)
    copy.deepcopy(one)
    assert module.resets == 2 * (1 + 1 + 1)  # epochs of training, and of validation before and after


class Manual(Module):
    def on_train_start(self) -> None:
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (Manual, {}, RuntimeError, r"automatic_optimization=False.*RNNRegularizer in its training_step"),
        (Module, {"log": 1}, TypeError, "log: expected True or False, got 1"),
    ],
)
def test_errors_leave_the_module_as_it_was(kind: Any, options: Any, error: type[Exception], message: str) -> None:
    module = made(kind)
    with pytest.raises(error, match=message):
        fit(module, callback(**options))
    assert_left_alone(module)


def test_coefficients_are_required() -> None:
    written = r'Write, for example, ActivationRegularization\(2\.0, 1\.0, rnn="lstm"\)'
    for given in ({}, {"alpha": 2.0}):
        with pytest.raises(TypeError, match=written):
            ActivationRegularization(rnn="net.rnn", **given)  # pyright: ignore[reportCallIssue]


class Broken(pl.Callback):
    """Fails when it is told of an error, so that Lightning does not tell the callbacks behind it."""

    def on_exception(self, *_: Any) -> None:
        raise ArithmeticError("told of an error")


@pytest.mark.parametrize("anew", [False, True])
def test_a_fit_after_one_that_was_cut_off(anew: bool) -> None:
    """The next fit has the same callback or a new one, and finds no trace of the wrapper that was left."""

    class Once(Module):
        def result(self, loss: Tensor) -> Any:
            if len(self.terms) == 2:
                raise KeyError("in a step")
            return loss

    module, written_out, one = made(Once), made(Module, BOTH), callback()
    with pytest.raises(ArithmeticError):
        fit(module, Broken(), one)
    assert lm.hooks_of(module) > 0
    module.load_state_dict(written_out.state_dict())
    module.zero_grad()
    logged = fit(module, callback() if anew else one)
    fit(written_out)
    assert_same_weights(module, written_out)
    assert_left_alone(module)
    torch.testing.assert_close(logged["ar"], torch.stack(written_out.terms).mean(0)[0])


class Uneven(Module):
    """Has its RNN in evaluation in the second process in the second epoch; writes the terms of each epoch to a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_fit_start(self) -> None:
        torch.set_num_threads(1)  # after a fork, OpenMP hangs with more

    def on_train_epoch_start(self) -> None:
        self.net.rnn.train(self.global_rank + self.current_epoch < 2)

    def on_train_epoch_end(self) -> None:
        logged = [self.trainer.callback_metrics[term] for term in ("ar", "tar")]
        torch.save((torch.stack(self.terms), logged), self.folder / f"{self.current_epoch}{self.global_rank}")
        self.terms.clear()


@more
def test_processes_log_the_mean_of_all(tmp_path: Path) -> None:
    """One of them adds no penalty in the second epoch; the others must not wait for it."""
    # A fork spares imports of half a minute; with a GPU, torch refuses a backward in a forked process.
    method = "spawn" if torch.cuda.is_available() else "fork"
    options: Any = {"process_group_backend": "gloo", "start_method": method, "timeout": timedelta(seconds=60)}
    fit(Uneven(tmp_path), callback(), max_epochs=2, strategy=pl.strategies.DDPStrategy(**options), devices=2)
    for epoch, regularized in enumerate(([0, 1], [0])):
        saved = [torch.load(tmp_path / f"{epoch}{rank}") for rank in range(2)]
        want = torch.cat([saved[rank][0] for rank in regularized]).mean(0)
        for _, logged in saved:
            torch.testing.assert_close(torch.stack(logged), want)


class Two(Module):
    """Has two RNNs, and a dropout between them."""

    def __init__(self, *coefficients: tuple[float, float]) -> None:
        super().__init__(*coefficients)
        self.second = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def run(self, batch: Tensor) -> Any:
        _, raw, dropped = self.net.activations(batch)
        last, _ = self.second(dropped)
        return criterion(self.net.decoder(last), batch), [(raw, dropped), (last, last)]


def test_two_rnns_of_one_callback_or_of_two() -> None:
    check_weights(Two, callback(rnn=["net.rnn", "second"], dropout=["net.dropout", None]), coefficients=(BOTH, BOTH))
    module, written_out = made(Two), made(Two, (0.0, 3.0), (0.0, 5.0))
    logged = fit(module, callback(0.0, 3.0), callback(0.0, 5.0, rnn="second", dropout=None))
    torch.testing.assert_close(logged["tar"], torch.stack(module.terms).mean(0)[1])
    fit(written_out)
    assert_same_weights(module, written_out)


def test_a_copy_made_while_training_has_its_own_step() -> None:
    """An average of weights makes such a copy."""

    def copy_it(_trainer: Any, module: Any, *_: Any) -> None:
        trainer, module._trainer = module._trainer, None
        copies.append(copy.deepcopy(module))
        module._trainer = trainer

    copies: list[Any] = []
    fit(made(), callback(), pl.callbacks.LambdaCallback(on_train_batch_end=copy_it))
    one, same = copies[-1], copy.deepcopy(copies[-1])
    fit(one)  # without the penalty
    lm.assert_other_weights(one, same)


class Late(Module):
    """Makes its RNN when the fit begins; its step has no index."""

    def configure_model(self) -> None:
        self.net.late = lm.gru()
        self.net.rnn = self.net.late

    def training_step(self, batch: Tensor) -> Any:  # pyright: ignore
        return super().training_step(batch, 0)


def test_a_module_that_is_made_late() -> None:
    check_weights(Late, callback(rnn="net.late"))
