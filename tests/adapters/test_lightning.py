"""`ActivationRegularization` in real Lightning: the weights of a module that has the penalty written into its step."""

from __future__ import annotations

import copy
from collections import UserDict
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.conftest import more, skip_without

skip_without("lightning")

import lightning.pytorch as pl  # noqa: E402

from fastreg.lightning import ActivationRegularization  # noqa: E402
from tests import language_model as lm  # noqa: E402
from tests.adapters.contract import DATA, PATHS, Contract, Net  # noqa: E402
from tests.language_model import ALPHA, BATCH, BETA, assert_same_weights  # noqa: E402

# Lightning and its imports warn.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{x}Warning") for x in ("Deprecation", "Future", "User")]


class Module(Net, pl.LightningModule):
    """Trains itself, with a second RNN that is made when a fit begins."""

    resets = 0

    def reset(self) -> None:
        self.resets += 1

    def configure_model(self) -> None:
        self.second = lm.gru()

    def training_step(self, batch: Any) -> Any:  # pyright: ignore
        outputs = self(**batch)
        self.log("train_loss", outputs["plain"], on_step=False, on_epoch=True, batch_size=1)
        return outputs["loss"]

    def validation_step(self, batch: Any) -> None:  # pyright: ignore
        self(**batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def callback(**options: Any) -> ActivationRegularization:
    return ActivationRegularization(ALPHA, BETA, **(PATHS | options))


def loader() -> Any:
    return torch.utils.data.DataLoader(DATA, batch_size=BATCH)  # pyright: ignore[reportArgumentType]


def trainer_of(*callbacks: Any, **options: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=list(callbacks), **(quiet | defaults | options))


def fit(module: Any, *callbacks: Any, validate: bool = False, path: Any = None, **options: Any) -> Any:
    """Train for an epoch of six batches, or go on from a file, and return the logged metrics; also validate."""
    torch.manual_seed(0)
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, loader(), loader() if validate else None, ckpt_path=path)
    assert not type(vars(module).get("training_step")).__module__.startswith("fastreg")
    assert lm.hooks_of(module) == 0
    return trainer.callback_metrics


def fit_both(*callbacks: Any, kind: Any = Module, written: Any = ("rnn",), **options: Any) -> tuple[Any, Any, Any]:
    """Fit a module with callbacks, and one with the formula, to the same weights; return the terms, and both logs."""
    module, formula = lm.seeded(kind), lm.seeded(kind, *written)
    logs = fit(module, *callbacks, **options), fit(formula, **options)
    assert_same_weights(module, formula)
    return formula.terms, *logs


def assert_means(logged: Any, terms: Any) -> None:
    torch.testing.assert_close(torch.stack([logged["ar"], logged["tar"]]), torch.stack(terms).mean(0))


class TestContract(Contract):
    kind = Module

    def fit(self, model: Any, options: Any = None, accumulated: int = 1, fits: int = 1) -> dict[str, float]:
        callbacks = [] if options is None else [callback(**({"dropout": None} | options))]
        steps: dict[str, Any] = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 0.5}
        return [fit(model, *callbacks, **steps) for _ in range(fits)][-1]


def test_steps_that_return_a_mapping_and_steps_that_are_skipped() -> None:
    class EveryOther(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # pyright: ignore
            loss = super().training_step(batch)
            return None if batch_idx % 2 else UserDict(loss=loss, more=1)

        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
            seen.append(bool(outputs and outputs["more"]))

    seen: list[bool] = []
    fit_both(callback(), kind=EveryOther)
    assert seen == [True, False] * 6


def test_logs_the_means_of_the_terms_over_an_epoch() -> None:
    terms, logged, want = fit_both(callback(), max_epochs=2)
    assert_means(logged, terms[6:])
    torch.testing.assert_close(logged["train_loss"], want["train_loss"])  # without the penalty
    assert not {"ar", "tar"} & fit(lm.seeded(Module), callback(log=False)).keys()
    with pytest.raises(TypeError, match="log: expected True or False, got 1"):
        callback(log=1)


def test_a_module_may_be_fitted_again_and_is_reset() -> None:
    module, one = lm.seeded(Module), callback()
    for again in (False, True):
        fit(module, copy.deepcopy(one) if again else one, validate=True)
    assert module.resets == 2 * (1 + 1 + 1)  # epochs of training, and of validation before and after


def test_a_fit_goes_on_within_an_epoch(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "file", every_n_train_steps=4)
    fit(lm.seeded(Module), saving, enable_checkpointing=True)
    terms, logged, _ = fit_both(callback(), path=tmp_path / "file.ckpt")
    assert_means(logged, terms)


def test_a_module_that_optimizes_by_hand_is_refused() -> None:
    module = lm.seeded(Module)
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"automatic_optimization=False.*RNNRegularizer in its training_step"):
        fit(module, callback())
    assert lm.hooks_of(module) == 0


@pytest.mark.parametrize("anew", [False, True])
def test_a_fit_after_one_that_was_cut_off(anew: bool) -> None:
    """The next fit has the same callback or a new one, and finds no trace of the wrapper that was left."""
    module, formula, one = lm.seeded(Module), lm.seeded(Module, "rnn"), callback()
    in_a_step = module.decoder.register_forward_hook(mock.Mock(side_effect=[None, None, KeyError]))
    failing = pl.callbacks.LambdaCallback(on_exception=mock.Mock(side_effect=ArithmeticError))
    with pytest.raises(ArithmeticError):
        fit(module, failing, one)  # Lightning does not tell the second of the error
    assert lm.hooks_of(module) > 0
    module.load_state_dict(formula.state_dict())
    module.zero_grad()
    in_a_step.remove()
    logged = fit(module, callback() if anew else one)
    fit(formula)
    assert_same_weights(module, formula)
    assert_means(logged, formula.terms)


@pytest.mark.parametrize(("same", "error"), [(True, None), (False, None), (False, ArithmeticError)])
def test_a_trainer_within_a_fit_leaves_the_hooks_on(same: bool, error: Any) -> None:
    """A callback validates by another trainer, which has the same callback of fastreg or another one."""

    def validate(trainer: Any, own: Any) -> None:
        others = [one if same else callback()] * (own is module)
        others.append(pl.callbacks.LambdaCallback(on_validation_start=mock.Mock(side_effect=error)))
        with pytest.raises(error) if error else nullcontext():
            trainer_of(*others).validate(own, loader(), verbose=False)
        own.train().trainer = trainer  # which Lightning leaves to the callback, at least after an error

    one, validating = callback(), pl.callbacks.LambdaCallback(on_train_epoch_end=validate)
    module, formula = lm.seeded(Module), lm.seeded(Module, "rnn")
    fit(module, one, validating, max_epochs=2)
    fit(formula, validating, max_epochs=2)
    assert_same_weights(module, formula)


def test_attributes() -> None:
    with pytest.raises(AttributeError, match="'aplha'"):
        callback().aplha = 3.0
    own = type("Own", (ActivationRegularization,), {})(ALPHA, BETA, **PATHS)
    own.more = 1  # a subclass may add attributes


class Uneven(Module):
    """Has its RNN in evaluation in the second process in the second epoch; writes the terms of each epoch to a file."""

    folder: Path

    def on_train_epoch_start(self) -> None:
        torch.set_num_threads(1)  # after a fork, OpenMP hangs with more
        self.rnn.train(self.global_rank + self.current_epoch < 2)

    def on_train_epoch_end(self) -> None:
        logged = torch.stack([self.trainer.callback_metrics[term] for term in ("ar", "tar")])
        torch.save((torch.stack(self.terms), logged), self.folder / f"{self.current_epoch}{self.global_rank}")
        self.terms.clear()


@more
def test_processes_log_the_mean_of_all(tmp_path: Path) -> None:
    """One of them adds no penalty in the second epoch; the other must not wait for it."""
    # A fork spares imports of half a minute; with a GPU, torch refuses a backward in a forked process.
    method = "spawn" if torch.cuda.is_available() else "fork"
    options: Any = {"process_group_backend": "gloo", "start_method": method, "timeout": timedelta(seconds=60)}
    module = lm.seeded(Uneven, "rnn")  # which keeps the terms
    module.folder = tmp_path
    fit(module, callback(), max_epochs=2, strategy=pl.strategies.DDPStrategy(**options), devices=2)
    for epoch, regularized in enumerate(([0, 1], [0])):
        saved = [torch.load(tmp_path / f"{epoch}{rank}") for rank in range(2)]
        want = torch.cat([saved[rank][0] for rank in regularized]).mean(0)
        for _, logged in saved:
            torch.testing.assert_close(logged, want)


def test_two_callbacks_add_their_penalties_and_log_the_mean() -> None:
    terms, logged, _ = fit_both(callback(), callback(rnn="second", dropout=None), written=("rnn", "second"))
    assert_means(logged, terms)


def test_a_copy_made_while_training_has_its_own_step() -> None:
    """An average of weights makes such a copy."""

    def copy_it(_trainer: Any, module: Any, *_: Any) -> None:
        copies.append(copy.deepcopy(module))

    copies: list[Any] = []
    fit(lm.seeded(Module), callback(), pl.callbacks.LambdaCallback(on_train_batch_end=copy_it))
    copied, plain = copies[-1], lm.seeded(Module)
    plain.load_state_dict(copied.state_dict())
    fit(copied)
    fit(plain)
    assert_same_weights(copied, plain)
