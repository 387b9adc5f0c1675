"""`ActivationRegularization`: AR and TAR for PyTorch Lightning, as a callback; the module needs no change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, update_wrapper
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastreg.attach.paths import Paths, pairs_of
from fastreg.attach.regularizer import RNNRegularizer
from fastreg.attach.source import Masks
from fastreg.call.arguments import check_flags, shown
from fastreg.call.problem import Coefficient

try:
    pl: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning")
    Callback: Any = pl.Callback
except ImportError as error:
    raise ImportError("fastreg.lightning: Lightning is not installed; pip install lightning") from error


class ActivationRegularization(Callback):
    """Add `alpha * AR + beta * TAR` of the named RNNs to the loss that `training_step` returns.

    Lightning scales, accumulates and clips the sum as it would the loss. The loss that the module logs does not contain
    the penalty. When an epoch of training ends, `ar` and `tar` are logged, as means over its steps, over all processes,
    and over all callbacks of this class. If the module has a `reset()`, it is called when an epoch of training or
    validation starts, and when an epoch of validation ends.

    Args:
        alpha: coefficient of AR; a schedule may change `callback.regularizer.alpha` between steps.
        beta: coefficient of TAR; a schedule may change `callback.regularizer.beta` between steps.
        rnn: the attribute path of an RNN, or of any module that `RNNRegularizer.attach` takes; or a list of paths, from
            the first layer to the last.
        dropout: the path of the dropout that gets the RNN's output: one path for all RNNs, or a list with a path or
            `None` for each RNN.
        output: as for `RNNRegularizer.attach`.
        batch_first: as for `RNNRegularizer.attach`.
        time_dim: the axis of time, instead of batch_first, as for `RNNRegularizer.attach`.
        valid: a function of the batch, as `training_step` gets it, that returns the mask of valid time steps, `(batch,
            time)`, as `fused_ar_tar` takes it, or `None` if all steps count.
        starts: a function of the batch that returns the mask of the time steps at which segments start, or `None`.
        log: whether to log `ar` and `tar`.

    Warns:
        UserWarning: a training step has no penalty, because all named modules are in evaluation. Lightning sets no
            module to training mode by itself. The warning comes once in a fit.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong value; when a fit starts, a path names no module.
        RuntimeError: the module optimizes by hand; in a step, as `RNNRegularizer.on_backward_begin`.

    Examples:
        >>> callback = ActivationRegularization(2.0, 1.0, rnn="lstm", dropout="dropout")
        >>> trainer = Trainer(callbacks=[callback], max_epochs=1)
        >>> trainer.fit(module, loader)
        >>> sorted(trainer.callback_metrics)
        ['ar', 'tar']
    """

    @shown('ActivationRegularization(2.0, 1.0, rnn="lstm")')
    def __init__(
        self,
        alpha: Coefficient,
        beta: Coefficient,
        *,
        rnn: str | Sequence[str],
        dropout: str | Sequence[str | None] | None = None,
        output: Callable[[Any], Any] | None = None,
        batch_first: bool | None = None,
        time_dim: int | None = None,
        valid: Callable[..., Tensor | None] | None = None,
        starts: Callable[..., Tensor | None] | None = None,
        log: bool = True,
    ) -> None:
        check_flags(log=log)
        self.regularizer = RNNRegularizer(alpha, beta)
        self.paths = Paths(pairs_of(rnn, dropout), Masks(valid, starts), output, batch_first, time_dim)
        self.logged = log  # Lightning sets `log` itself

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the modules and wrap `training_step`; by now `configure_model` has made the modules."""
        # All callbacks of a fit share one wrapper.
        if not isinstance(pl_module.training_step, _RegularizedStep):
            pl_module.training_step = _RegularizedStep(pl_module)
        step = pl_module.training_step
        say = pl.utilities.rank_zero_info
        step.undo.enter_context(self.paths.attach(self.regularizer, pl_module, lambda: [step.batch], say))
        step.callbacks.append(self)
        self.paths.is_warned = False

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        """Take off the wrapper of `training_step`, and the hooks of all callbacks that share it."""
        if isinstance(pl_module.training_step, _RegularizedStep):
            pl_module.training_step.undo.close()

    on_exception = teardown  # Lightning tears nothing down after an error
    setup = teardown  # of an earlier fit: an error in another callback's on_exception leaves out ours

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the sums of AR and TAR over the steps of an epoch, and of the steps; a fit may resume in an epoch."""
        self._terms = torch.zeros(3, device=pl_module.device)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the hidden state."""
        self.regularizer.on_epoch_begin(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the means of the terms: once an epoch, as a call of `log` takes as long as a step of a small model."""
        # Each process takes part, also one that has added no penalty, as the others wait for it.
        ar, tar, steps = trainer.strategy.reduce(self._terms, reduce_op="sum")
        self._terms = torch.zeros_like(self._terms)
        if self.logged and steps:
            means = {"ar": ar / steps, "tar": tar / steps}
            pl_module.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the hidden state, because the state of the validation does not belong to the next training batch."""
        self.regularizer.on_epoch_begin(pl_module)

    on_validation_epoch_end = on_validation_epoch_start

    def after_step(self, output: Any) -> Any:
        """Return what `training_step` returned with the penalty added to the loss, and sum up the terms."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):  # None skips the step; Lightning refuses anything else
            return output
        terms = self.regularizer.take(loss)
        if terms is None:
            self.paths.warn_of_evaluation("ActivationRegularization")
            return output
        self._terms = self._terms + torch.stack([terms.ar, terms.tar, torch.ones_like(terms.ar)]).to(self._terms)
        total = loss + terms.penalty
        return {**output, "loss": total} if isinstance(output, Mapping) else total


class _RegularizedStep:
    """Wrap `training_step` to add penalties to its loss; a copy or a pickle of the module has a plain step."""

    def __init__(self, pl_module: Any) -> None:
        self.own = vars(pl_module).get("training_step")  # Lightning sets one when it compiles the module
        self.step = pl_module.training_step
        update_wrapper(self, self.step)  # Lightning reads its signature
        self.pl_module, self.batch = pl_module, None
        self.callbacks: list[ActivationRegularization] = []
        self.undo = ExitStack()  # takes off the hooks, and then this wrapper
        self.undo.callback(self._remove)

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.pl_module.automatic_optimization:
            raise RuntimeError(
                "ActivationRegularization: the module has automatic_optimization=False, so its loss never passes a "
                "callback; use fastreg.RNNRegularizer in its training_step"
            )
        self.batch = batch  # also for the backward: checkpointing runs the forward, and so `valid`, again
        output = self.step(batch, *args, **kwargs)
        for callback in self.callbacks:
            output = callback.after_step(output)
        return output

    def _remove(self) -> None:
        """Give the module its own step back."""
        vars(self.pl_module).pop("training_step", None)
        if self.own is not None:
            self.pl_module.training_step = self.own

    def __reduce__(self) -> Any:
        return partial, (self.step,)
