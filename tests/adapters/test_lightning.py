"""`ActivationRegularization` in real Lightning: the weights of a module that has the penalty written into its step."""

from __future__ import annotations

import copy
from collections import UserDict
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
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
from tests.adapters.contract import DATA, PATHS, Net, TrainerContract  # noqa: E402
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
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=list(callbacks), **(defaults | quiet | options))


def fit(module: Any, *callbacks: Any, validate: bool = False, path: Any = None, **options: Any) -> Any:
    """Train for an epoch of six batches, or go on from a file, and return the logged metrics; also validate."""
    torch.manual_seed(0)
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, loader(), loader() if validate else None, ckpt_path=path)
    assert_left_alone(module)
    return trainer.callback_metrics


def made(*written: str, kind: Any = Module) -> Any:
    return lm.seeded(partial(kind, *written))


def fit_both(*callbacks: Any, kind: Any = Module, written: Any = ("rnn",), **options: Any) -> tuple[Any, Any, Any, Any]:
    """Fit a module with callbacks, and the same module with the formula; return both, and what each has logged."""
    module, formula = made(kind=kind), made(*written, kind=kind)
    return module, formula, fit(module, *callbacks, **options), fit(formula, **options)


def assert_left_alone(module: Any) -> None:
    assert not type(vars(module).get("training_step")).__module__.startswith("fastreg")
    assert lm.hooks_of(module) == 0


class TestContract(TrainerContract):
    kind, adapter = Module, ActivationRegularization

    def fit(self, model: Any, options: Any = None, accumulated: int = 1, fits: int = 1) -> dict[str, float]:
        callbacks = [] if options is None else [callback(**({"dropout": None} | options))]
        return [fit(model, *callbacks, accumulate_grad_batches=accumulated) for _ in range(fits)][-1]


@pytest.mark.processor
@lm.either
def test_bfloat16_with_accumulation_and_clipping() -> None:
    options: Any = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    module, formula, *_ = fit_both(callback(), **options)
    largest = max(map(lm.gap, formula.parameters(), made().parameters()))
    # autograd rounds wherever it adds gradients, hooks add in float32
    assert_same_weights(module, formula, rtol=0.0, atol=torch.finfo(torch.bfloat16).eps * largest)


def test_steps_that_return_a_mapping_and_steps_that_are_skipped() -> None:
    class EveryOther(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # pyright: ignore
            loss = super().training_step(batch)
            return None if batch_idx % 2 else UserDict(loss=loss, more=1)

    def look(_trainer: Any, _module: Any, outputs: Any, *_: Any) -> None:
        seen.append(bool(outputs and outputs.get("more")))

    seen: list[bool] = []
    assert_same_weights(
        *fit_both(callback(), pl.callbacks.LambdaCallback(on_train_batch_end=look), kind=EveryOther)[:2]
    )
    assert seen == [True, False] * 3


def test_logs_the_means_of_the_terms_over_an_epoch() -> None:
    _, formula, logged, want = fit_both(callback(), max_epochs=2)
    torch.testing.assert_close(torch.stack([logged["ar"], logged["tar"]]), torch.stack(formula.terms[6:]).mean(0))
    torch.testing.assert_close(logged["train_loss"], want["train_loss"])  # without the penalty
    assert not {"ar", "tar"} & fit(made(), callback(log=False)).keys()
    with pytest.raises(TypeError, match="log: expected True or False, got 1"):
        callback(log=1)


def test_a_module_may_be_fitted_again_and_is_reset() -> None:
    module, one = made(), callback()
    for again in (False, True):
        fit(module, copy.deepcopy(one) if again else one, validate=True)
    assert module.resets == 2 * (1 + 1 + 1)  # epochs of training, and of validation before and after


def test_a_fit_goes_on_within_an_epoch(tmp_path: Path) -> None:
    fit(made(), pl.callbacks.ModelCheckpoint(tmp_path, "file", every_n_train_steps=4), enable_checkpointing=True)
    module, formula, logged, _ = fit_both(callback(), path=tmp_path / "file.ckpt")
    assert_same_weights(module, formula)
    torch.testing.assert_close(logged["ar"], torch.stack(formula.terms).mean(0)[0])


def test_a_module_that_optimizes_by_hand_is_refused() -> None:
    module = made()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"automatic_optimization=False.*RNNRegularizer in its training_step"):
        fit(module, callback())
    assert_left_alone(module)


@pytest.mark.parametrize("anew", [False, True])
def test_a_fit_after_one_that_was_cut_off(anew: bool) -> None:
    """The next fit has the same callback or a new one, and finds no trace of the wrapper that was left."""
    module, formula, one = made(), made("rnn"), callback()
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
    torch.testing.assert_close(logged["ar"], torch.stack(formula.terms).mean(0)[0])


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
    module, formula = made(), made("rnn")
    fit(module, one, validating, max_epochs=2)
    fit(formula, validating, max_epochs=2)
    assert_same_weights(module, formula)


def test_attributes() -> None:
    class Own(ActivationRegularization):
        """Adds an attribute."""

    one, own = callback(), Own(ALPHA, BETA, **PATHS)
    one.alpha, one.beta = own.more, own.log_dict = 3.0, 0.5
    assert (one.alpha, one.beta) == (one.regularizer.alpha, one.regularizer.beta) == (own.more, 0.5)
    with pytest.raises(AttributeError, match="expected one of its attributes, such as alpha or beta, got 'aplha'"):
        one.aplha = 3.0


class Uneven(Module):
    """Has its RNN in evaluation in the second process in the second epoch; writes the terms of each epoch to a file."""

    folder: Path

    def on_fit_start(self) -> None:
        torch.set_num_threads(1)  # after a fork, OpenMP hangs with more

    def on_train_epoch_start(self) -> None:
        self.rnn.train(self.global_rank + self.current_epoch < 2)

    def on_train_batch_end(self, *_: Any) -> None:
        now = self.trainer.callbacks[0].regularizer  # pyright: ignore[reportAttributeAccessIssue]
        self.terms.append(torch.stack([now.ar, now.tar]))

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
    module = made(kind=Uneven)
    module.folder = tmp_path
    fit(module, callback(), max_epochs=2, strategy=pl.strategies.DDPStrategy(**options), devices=2)
    for epoch, regularized in enumerate(([0, 1], [0])):
        saved = [torch.load(tmp_path / f"{epoch}{rank}") for rank in range(2)]
        want = torch.cat([saved[rank][0] for rank in regularized]).mean(0)
        for _, logged in saved:
            torch.testing.assert_close(torch.stack(logged), want)


def test_two_callbacks_add_their_penalties_and_log_the_mean() -> None:
    module, formula, logged, _ = fit_both(callback(), callback(rnn="second", dropout=None), written=("rnn", "second"))
    assert_same_weights(module, formula)
    torch.testing.assert_close(torch.stack([logged["ar"], logged["tar"]]), torch.stack(formula.terms).mean(0))


def test_a_copy_made_while_training_has_its_own_step() -> None:
    """An average of weights makes such a copy."""
    copies: list[Any] = []
    copy_it = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda _t, module, *_: copies.append(copy.deepcopy(module))
    )
    fit(made(), callback(), copy_it)
    plain = made()
    plain.load_state_dict(copies[-1].state_dict())
    fit(copies[-1])
    fit(plain)
    assert_same_weights(copies[-1], plain)
