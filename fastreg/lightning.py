"""`ActivationRegularization`: AR and TAR for PyTorch Lightning, as a callback; the module needs no change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, update_wrapper
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from fastreg.adapter import Adapter
from fastreg.attach.paths import Paths, pairs_of
from fastreg.attach.regularizer import KnownAttributes, RNNRegularizer
from fastreg.attach.source import Masks
from fastreg.call.arguments import check_flags
from fastreg.call.problem import Coefficient

try:
    pl: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning")
    Callback: Any = pl.Callback
except ImportError as error:
    raise ImportError("fastreg.lightning: Lightning is not installed; pip install lightning") from error


class ActivationRegularization(KnownAttributes, Adapter, Callback):
    """Add `alpha * AR + beta * TAR` of the named RNNs to the loss that `training_step` returns.

    Lightning scales, accumulates and clips the sum as it would the loss. The loss that the module logs does not contain
    the penalty. When an epoch of training ends, `ar` and `tar` are logged, as means over its steps, over all processes,
    and over all callbacks of this class. If the module has a `reset()` that needs no arguments, it is called when an
    epoch of training or validation starts, and when an epoch of validation ends.

    Args:
        alpha: coefficient of AR; an attribute, which a schedule may change between steps, like `beta`.
        beta: coefficient of TAR.
        rnn: the attribute path of an RNN, or of any module that `RNNRegularizer.attach` takes; or a list of paths, from
            the first layer to the last.
        dropout: the path of the dropout that gets the RNN's output: one path for all RNNs, or a list with a path or
            `None` for each RNN.
        output, batch_first, time_dim: as for `RNNRegularizer.attach`.
        valid, starts: as for `RNNRegularizer.attach`, but functions of the batch, as `training_step` gets it.
        log: whether to log `ar` and `tar`.

    Warns:
        UserWarning: a training step has no penalty, because all named modules are in evaluation. Lightning sets no
            module to training mode by itself. The warning comes once in a fit.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong value; when a fit starts, a path names no module.
        AttributeError: an attribute is set that the callback does not have; a subclass may add some.
        RuntimeError: the module optimizes by hand; in a step, as `RNNRegularizer.on_backward_begin`.

    Examples:
        >>> callback = ActivationRegularization(2.0, 1.0, rnn="lstm", dropout="dropout")
        >>> trainer = Trainer(callbacks=[callback], max_epochs=1)
        >>> trainer.fit(module, loader)
        >>> sorted(trainer.callback_metrics)
        ['ar', 'tar']
    """

    log: Any = None  # Lightning sets both
    log_dict: Any = None

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
        paths = Paths(pairs_of(rnn, dropout), Masks(valid, starts), output, batch_first, time_dim)
        self.begin(RNNRegularizer(alpha, beta), paths)
        self.logged, self.is_made = log, type(self) is ActivationRegularization

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin an epoch: reset the hidden state."""
        self.regularizer.on_epoch_begin(pl_module)

    def after_step(self, output: Any) -> Any:
        """Begin a backward: return what `training_step` returned with the penalty added to the loss."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):  # None skips the step; Lightning refuses anything else
            return output
        penalty = self.penalty_of(loss, "ActivationRegularization")
        if penalty is None:
            return output
        return {**output, "loss": loss + penalty} if isinstance(output, Mapping) else loss + penalty

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the means of the terms: once an epoch, as a call of `log` takes as long as a step of a small model."""
        means = self.means(lambda sums: trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum"))
        if self.logged:
            pl_module.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the hidden state, because the state of the validation does not belong to the next training batch."""
        self.regularizer.on_epoch_begin(pl_module)

    on_validation_epoch_end = on_validation_epoch_start

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the modules and wrap `training_step`; by now `configure_model` has made the modules."""
        # All callbacks of a fit share one wrapper.
        if not isinstance(pl_module.training_step, _RegularizedStep):
            pl_module.training_step = _RegularizedStep(pl_module, trainer)
        step = pl_module.training_step
        say = pl.utilities.rank_zero_info
        step.undo.enter_context(self.paths.attach(self.regularizer, pl_module, lambda: [step.batch], say))
        step.callbacks.append(self)
        self.begin(self.regularizer, self.paths)

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        """Take off the wrapper of `training_step`, and the hooks of all callbacks that share it."""
        step = pl_module.training_step
        # Another trainer may test or validate the module within a fit, which then goes on.
        if isinstance(step, _RegularizedStep) and (step.trainer is trainer or step.trainer.state.status != "running"):
            step.undo.close()

    on_exception = teardown  # Lightning tears nothing down after an error
    setup = teardown  # of an earlier fit: an error in another callback's on_exception leaves out ours


class _RegularizedStep:
    """Wrap `training_step` to add penalties to its loss; a copy or a pickle of the module has a plain step."""

    def __init__(self, pl_module: Any, trainer: Any) -> None:
        self.own = vars(pl_module).get("training_step")  # Lightning sets one when it compiles the module
        self.step = pl_module.training_step
        update_wrapper(self, self.step)  # Lightning reads its signature
        self.pl_module, self.trainer, self.batch = pl_module, trainer, None
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
