"""`ActivationRegularization`: AR and TAR for PyTorch Lightning, as a callback; the module needs no change.

The callback wraps functions of a trainer, and none of the module: the loop of its fits, in which the modules are
attached, and, within this loop, three functions of its strategy: the training step, for its batch; the backward, which
gets the penalty; and the step of the optimizer, whose closure returns the loss with the penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from fastreg.adapter import NO_SUMS, Adapter
from fastreg.call.arguments import check_flag
from fastreg.call.problem import Coefficient

try:
    pl: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning")
    Callback: Any = pl.Callback
    Metric: Any = import_module("torchmetrics.metric").CompositionalMetric
except ImportError as error:
    raise ImportError("fastreg.lightning: Lightning is not installed; pip install lightning") from error


class ActivationRegularization(Adapter, Callback):
    """Add `alpha * AR + beta * TAR` of the named RNNs to the loss that Lightning differentiates.

    Lightning scales, accumulates and clips the sum as it would the loss. What the module logs, and what callbacks get
    from its step, such as a learning rate finder, is the loss without the penalty. When an epoch of training ends, `ar`
    and `tar` are logged, as means over its steps, over all processes, and over all callbacks of this class that log.

    Args:
        alpha: coefficient of AR; an attribute, which a schedule may change between steps, like `beta`.
        beta: coefficient of TAR.
        rnn: the path of an RNN, or a list of paths, as for `fastreg.adapter.Paths`.
        log: whether to log `ar` and `tar`.
        **options: the other arguments of `Paths`; `valid` and `starts` get the batch, as `training_step`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong value.
        AttributeError: when a fit starts, a path names no module.
        RuntimeError: when a fit starts, the module optimizes by hand; in a step, as `RNNRegularizer.on_backward_begin`.

    Examples:
        >>> callback = ActivationRegularization(2.0, 1.0, rnn="lstm", dropout="dropout")
        >>> trainer = Trainer(callbacks=[callback], max_epochs=1)
        >>> trainer.fit(module, loader)
        >>> sorted(trainer.callback_metrics)
        ['ar', 'tar']
    """

    say = staticmethod(pl.utilities.rank_zero_info)

    def __init__(
        self, alpha: Coefficient, beta: Coefficient, *, rnn: str | Sequence[str], log: bool = True, **options: Any
    ) -> None:
        check_flag("log", log)
        self.prepare(alpha, beta, {**options, "rnn": rnn or []})
        self.logged = log

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap the loop of the fit, once for all callbacks of a trainer; `lr_find` hides them while the loop runs."""
        self.teardown(trainer, pl_module, stage)  # of a fit that was cut off
        callbacks = [x for x in trainer.callbacks if isinstance(x, ActivationRegularization)]
        trainer.fit_loop.run = partial(regularized_fit, trainer, callbacks, trainer.fit_loop.run)

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        """Take the wrapper off the loop."""
        trainer.fit_loop.run = without(regularized_fit, trainer.fit_loop.run)

    on_exception = teardown  # an exception in a fit, which no teardown follows

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the means of the terms once for all callbacks: a call of `log` takes as long as a small step."""
        for x in trainer.callbacks:
            if isinstance(x, ActivationRegularization) and x is not self:
                self.sums, x.sums = (self.sums[0] + x.sums[0], self.sums[1] + x.sums[1]), NO_SUMS
        means = self.means(lambda sums: trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum"))
        for name, mean in means.items():  # as metrics: of a tensor Lightning makes one by forty operators
            pl_module.log(name, Metric(Tensor.detach, mean, None), metric_attribute=name)


def regularized_fit(trainer: Any, callbacks: Sequence[Any], run: Callable[[], Any]) -> Any:
    """Run the loop of a fit with the penalties of all callbacks; however it ends, leave nothing behind."""
    if not trainer.lightning_module.automatic_optimization:
        raise RuntimeError(
            "ActivationRegularization: the loss of a module with automatic_optimization=False never passes a callback; "
            "use fastreg.RNNRegularizer in its training_step"
        )
    with ExitStack() as undo:
        for callback in callbacks:
            callback.start(trainer.lightning_module)
            undo.callback(callback.end)
        if not isinstance(getattr(trainer.strategy.backward, "__self__", None), Steps):
            Steps(trainer, callbacks).wrap(undo)  # once, as a search for a learning rate runs this loop within itself
        return run()


class Steps:
    """Add the penalties of all callbacks to the losses of a fit, in functions that replace those of the strategy.

    Attributes:
        trainer: the trainer.
        callbacks: the callbacks of this module.
        training_step, backward, optimizer_step: the functions of the strategy, which another callback may have wrapped.
        total: the loss of the last backward with the penalties; `None` if the last step had no backward.
    """

    def __init__(self, trainer: Any, callbacks: Sequence[Any]) -> None:
        self.trainer, self.callbacks, strategy = trainer, callbacks, trainer.strategy
        self.training_step, self.backward = strategy.training_step, strategy.backward
        self.optimizer_step, self.total = strategy.optimizer_step, None

    def wrap(self, undo: ExitStack) -> None:
        """Replace the functions of the strategy."""
        for name in ("training_step", "backward", "optimizer_step"):
            undo.callback(setattr, self.trainer.strategy, name, getattr(self, name))
            setattr(self.trainer.strategy, name, getattr(self, f"regularized_{name}"))

    def regularized_training_step(self, batch: Any, *args: Any) -> Any:
        """Make a training step, for whose batch all callbacks are attached."""
        for callback in self.callbacks:
            callback.begin(self.trainer.lightning_module)
            callback.batch = [batch]
        return self.training_step(batch, *args)

    def regularized_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Differentiate a loss, which Lightning has divided by the number of batches to accumulate, with penalties."""
        for callback in self.callbacks:
            loss = callback.add_penalty(loss, int(callback.logged), self.trainer.accumulate_grad_batches)
        self.total = loss.detach()
        return self.backward(loss, *args, **kwargs)

    def regularized_optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Make a step of an optimizer, whose closure returns what was differentiated, as a line search needs it."""

        def total() -> Any:
            self.total = None
            loss = closure()
            return loss if self.total is None else self.total

        return self.optimizer_step(optimizer, total, *args, **kwargs)


def without(wrapper: Callable[..., Any], function: Any) -> Any:
    """Return the function in a wrapper of this module, or a function that is not wrapped."""
    return function.args[-1] if getattr(function, "func", None) is wrapper else function
