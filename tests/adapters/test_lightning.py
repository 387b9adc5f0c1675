"""`ActivationRegularization` in real Lightning: the weights of a module that has the penalty written into its step."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import UserDict
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

    def reset(self) -> None:
        raise AssertionError("a reset() may initialize the weights anew")

    def configure_model(self) -> None:
        self.second = lm.gru()

    def training_step(self, batch: Any) -> Any:  # pyright: ignore
        outputs = self(**batch)
        self.log("train_loss", outputs["plain"], on_step=False, on_epoch=True, batch_size=1)
        return outputs["loss"]

    def validation_step(self, batch: Any) -> None:  # pyright: ignore
        self.training_step(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def callback(**options: Any) -> ActivationRegularization:
    return ActivationRegularization(**({"alpha": ALPHA, "beta": BETA} | PATHS | options))


def loader() -> Any:
    return torch.utils.data.DataLoader(DATA, batch_size=BATCH)  # pyright: ignore[reportArgumentType]


def trainer_of(*callbacks: Any, **options: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=list(callbacks), **(quiet | defaults | options))


def fit(module: Any, *callbacks: Any, validate: bool = False, fits: int = 1, **options: Any) -> Any:
    """Train in each fit for an epoch of six batches by one trainer, and return the logged metrics; also validate."""
    torch.manual_seed(0)
    trainer = trainer_of(*callbacks, **options)
    for _ in range(fits):
        trainer.fit(module, loader(), loader() if validate else None)
        trainer.fit_loop.max_epochs += 1
    assert_clean(module, trainer)
    return trainer.callback_metrics


def assert_clean(module: Any, trainer: Any) -> None:
    """Check that a fit has left nothing behind."""
    for name in ("training_step", "backward", "optimizer_step"):
        assert getattr(trainer.strategy, name) == getattr(type(trainer.strategy), name).__get__(trainer.strategy)
    assert lm.hooks_of(module) == 0


def fit_both(
    *own: Any, kind: Any = Module, written: Any = ("rnn",), others: Any = (), **options: Any
) -> tuple[Any, Any, Any]:
    """Fit a module with callbacks of its own, and one with the formula, to the same weights.

    Both have other callbacks, too. Return the terms, and both logs.
    """
    module, formula = lm.seeded(kind), lm.seeded(kind, *written)
    logs = fit(module, *own, *others, **options), fit(formula, *others, **options)
    assert_same_weights(module, formula)
    return formula.terms, *logs


def assert_means(logged: Any, terms: Any) -> None:
    torch.testing.assert_close(torch.stack([logged["ar"], logged["tar"]]), torch.stack(terms).mean(0))


class TestContract(Contract):
    kind = Module

    def train(self, model: Any, options: Any, accumulated: int, fits: int, rounded: bool, cbs: Any) -> dict[str, Any]:
        callbacks = cbs if options is None else [callback(**({"dropout": None} | options))]
        steps: dict[str, Any] = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 0.5}
        steps |= {"precision": "bf16-mixed"} if rounded else {}
        return fit(model, *callbacks, fits=fits, **steps)


def test_steps_may_return_a_mapping_or_be_skipped() -> None:
    class EveryOther(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # pyright: ignore
            loss = super().training_step(batch)
            returned.append(UserDict(loss=loss, more=loss))
            return None if batch_idx % 2 else returned[-1]

        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
            seen.append(bool(outputs and outputs["more"]))

    seen, returned = list[bool](), list[Any]()
    fit_both(callback(), kind=EveryOther)
    assert seen == [True, False] * 6
    assert all(x["loss"] is x["more"] for x in returned), "a mapping of the module is not changed"


def test_logs_the_means_of_an_epoch_over_all_callbacks_that_log() -> None:
    both, second = ["rnn", "second"], {"rnn": "second", "dropout": None}
    terms, logged, want = fit_both(callback(), callback(**second), written=both, max_epochs=2)
    assert_means(logged, terms[12:])
    torch.testing.assert_close(logged["train_loss"], want["train_loss"])  # without the penalty
    terms, logged, _ = fit_both(callback(log=False), callback(**second), written=both)
    assert_means(logged, terms[1::2])
    assert not {"ar", "tar"} & fit(lm.seeded(Module), callback(log=False)).keys()
    with pytest.raises(TypeError, match="log: expected True or False, got 1"):
        callback(log=1)


@pytest.mark.parametrize("accumulated", [1, 4])  # of six batches, so that the last window is not full
def test_callbacks_and_searches_get_the_loss_of_the_module_without_the_penalty(accumulated: int) -> None:
    class Own(Module):
        def training_step(self, batch: Any) -> Any:  # pyright: ignore
            returned.append(super().training_step(batch))
            return {"loss": returned[-1]}

    def look(_trainer: Any, _module: Any, outputs: Any, *_: Any) -> None:
        seen.append(outputs["loss"] * accumulated)

    returned, seen, module, formula = list[Any](), list[Any](), lm.seeded(Own), lm.seeded(Module, "rnn")
    fit(module, callback(), pl.callbacks.LambdaCallback(on_train_batch_end=look), accumulate_grad_batches=accumulated)
    torch.testing.assert_close(seen, [x.detach() for x in returned])
    fit(formula, accumulate_grad_batches=accumulated)
    assert_same_weights(module, formula)


def test_a_line_search_gets_the_loss_with_the_penalty() -> None:
    class Searched(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=8, line_search_fn="strong_wolfe")

    module, formula = lm.seeded(Searched), lm.seeded(Searched, "rnn")
    fit(module, callback())
    fit(formula)
    assert_same_weights(module, formula, rtol=0, atol=0)


def test_the_path_of_an_rnn_is_required() -> None:
    with pytest.raises(TypeError, match=r"missing 1 required keyword-only argument: 'rnn'$"):
        ActivationRegularization(ALPHA, BETA)  # pyright: ignore[reportCallIssue]


def test_a_module_that_optimizes_by_hand_is_refused() -> None:
    module = lm.seeded(Module)
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"automatic_optimization=False.*RNNRegularizer in its training_step"):
        fit(module, callback())
    assert lm.hooks_of(module) == 0


@pytest.mark.parametrize("nested", ["validate", "fit"])
def test_a_trainer_within_a_fit_may_have_the_same_callback(nested: str) -> None:
    """It validates the module, which stays attached, or fits another one; the module is attached again after that."""

    def start(trainer: Any, module: Any, *_: Any) -> None:
        another.append(module if nested == "validate" else lm.seeded(Module, *module.written))
        getattr(trainer_of(*[] if module.written else [one]), nested)(another[-1], loader())
        torch.manual_seed(1)
        module.train().trainer = trainer  # which Lightning leaves to the callback

    one, another = callback(), list[Any]()
    fit_both(one, others=[pl.callbacks.LambdaCallback(on_train_batch_end=start)], limit_train_batches=2)
    assert_same_weights(another[0], another[-1])


class FineTune(pl.callbacks.LearningRateFinder):
    """Searches before a fit, as a `Tuner` does, and within its second epoch, as Lightning's documentation shows.

    A search hides all callbacks while it trains, and puts the weights back.
    """

    def __init__(self) -> None:
        # Without a threshold: the loss of the formula, which contains the penalty, would stop a search elsewhere.
        super().__init__(num_training_steps=3, update_attr=False, early_stop_threshold=None)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, module)


def test_searches_for_a_learning_rate_have_the_penalty_and_no_part_in_the_means(tmp_path: Path) -> None:
    class Recorded(Module):
        def forward(self, input_ids: Any) -> Any:  # pyright: ignore
            outputs = super().forward(input_ids)
            plain.append(outputs["plain"])
            return outputs

    plain = list[Any]()
    options: dict[str, Any] = {"kind": Recorded, "others": [FineTune()], "default_root_dir": tmp_path}
    terms, logged, _ = fit_both(callback(), max_epochs=3, **options)
    torch.testing.assert_close(*torch.stack(plain).chunk(2))
    assert len(plain) > 2 * 3 * len(loader())  # the steps of searches, too
    assert_means(logged, terms[-6:])


@pytest.mark.parametrize("fails", [(torch.optim, "SGD"), (Module, "on_train_batch_end")])  # before the loop, and in it
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("again", [None, copy.copy, copy.deepcopy])
def test_after_a_fit_that_raises_a_trainer_has_the_penalty_of_its_callbacks(fails: Any, error: Any, again: Any) -> None:
    """Where the trainer keeps its callback, another one raises an error, so that ours is not told of the first one."""
    module, formula, one = lm.seeded(Module), lm.seeded(Module, *["rnn"] * bool(again)), callback()
    failing = pl.callbacks.LambdaCallback(on_exception=mock.Mock(side_effect=ArithmeticError))
    trainer = trainer_of(*[failing] * bool(again), one)
    with mock.patch.object(*fails, side_effect=error), pytest.raises((error, ArithmeticError, SystemExit)):
        trainer.fit(module, loader())
    assert_clean(module, trainer)
    trainer.callbacks = [again(one)] if again else [x for x in trainer.callbacks if x is not one]
    module.load_state_dict(formula.state_dict())
    torch.manual_seed(0)
    trainer.fit(module, loader())
    fit(formula)
    assert_same_weights(module, formula)
    if again:
        assert_means(trainer.callback_metrics, formula.terms)


def test_the_wrapper_of_another_callback_is_wrapped_and_put_back() -> None:
    module, formula, own = lm.seeded(Module), lm.seeded(Module, "rnn"), callback(alpha=2 * ALPHA, beta=2 * BETA)
    for one, callbacks in ((module, [own]), (formula, [])):
        torch.manual_seed(0)
        trainer = trainer_of(*callbacks)
        step = trainer.strategy.training_step
        trainer.strategy.training_step = doubled = lambda *args, step=step: 2 * step(*args)
        trainer.fit(one, loader())
        assert trainer.strategy.training_step is doubled
    assert_same_weights(module, formula)


class Wrapped(Module):
    """Has a wrapped step of one argument, which logs nothing, because `torch.compile` fails in `log`."""

    @functools.wraps(Module.training_step)
    def training_step(self, batch: Any) -> Any:  # pyright: ignore
        return self(**batch)["loss"]


def test_wrapped_steps_that_a_validation_also_calls_and_compiled_ones_train_the_weights_of_the_formula() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*penalty")
        fit_both(callback(), kind=Wrapped, validate=True)
    fit_both(callback(), kind=lambda *args: torch.compile(Wrapped(*args), backend="eager"))


class Uneven(Module):
    """Has its RNN in evaluation in the second process in the second epoch; checks the means at the end of each."""

    def on_train_epoch_start(self) -> None:
        torch.set_num_threads(1)  # after a fork, OpenMP hangs with more
        self.rnn.train(self.global_rank + self.current_epoch < 2)

    def on_train_epoch_end(self) -> None:
        terms: Any = self.all_gather(torch.stack(self.terms))
        regularized = terms[: 2 - self.current_epoch]  # the processes that add a penalty
        assert_means(self.trainer.callback_metrics, [*regularized.flatten(0, 1)])
        self.terms.clear()


@more
def test_processes_log_the_mean_of_all() -> None:
    """One of them adds no penalty in the second epoch; the other must not wait for it."""
    # A fork spares imports of half a minute; with a GPU, torch refuses a backward in a forked process.
    method = "spawn" if torch.cuda.is_available() else "fork"
    options: Any = {"process_group_backend": "gloo", "start_method": method, "timeout": timedelta(seconds=60)}
    module = lm.seeded(Uneven, "rnn")  # which keeps the terms
    fit(module, callback(), max_epochs=2, strategy=pl.strategies.DDPStrategy(**options), devices=2)
