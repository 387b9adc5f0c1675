"""`ActivationRegularization`: AR and TAR for PyTorch Lightning, as a callback; the module needs no change.

The callback wraps two functions of a trainer, and none of the module: the loop of its fits, in which the modules are
attached, and, within this loop, the training step of its strategy, to whose loss the penalty is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fastreg.adapter import NO_SUMS, Adapter, PathOptions
from fastreg.call.arguments import check_flag
from fastreg.call.problem import Coefficient

try:
    pl: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning")
    Callback: Any = pl.Callback
    Metric: Any = import_module("torchmetrics.metric").CompositionalMetric
except ImportError as error:
    raise ImportError("fastreg.lightning: Lightning is not installed; pip install lightning") from error


class ActivationRegularization(Adapter, Callback):
    """Add `alpha * AR + beta * TAR` of the named RNNs to the loss that `training_step` returns.

    Lightning scales, accumulates and clips the sum as it would the loss. The loss that the module logs does not contain
    the penalty. When an epoch of training ends, `ar` and `tar` are logged, as means over its steps, over all processes,
    and over all callbacks of this class that log.

    Args:
        alpha: coefficient of AR; an attribute, which a schedule may change between steps, like `beta`.
        beta: coefficient of TAR.
        log: whether to log `ar` and `tar`.
        **options: as for `fastreg.adapter.Paths`, with `rnn`; `valid` and `starts` get the batch, as `training_step`.

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
        self, alpha: Coefficient, beta: Coefficient, *, log: bool = True, **options: Unpack[PathOptions]
    ) -> None:
        check_flag("log", log)
        self.prepare(alpha, beta, {**options, "rnn": options.get("rnn") or []})
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
    strategy, step = trainer.strategy, trainer.strategy.training_step  # which another callback may have wrapped
    with ExitStack() as undo:
        for callback in callbacks:
            callback.start(trainer.lightning_module)
            undo.callback(callback.end)
        undo.callback(setattr, strategy, "training_step", step)
        # A search for a learning rate runs this loop within itself.
        strategy.training_step = partial(regularized_step, trainer, callbacks, without(regularized_step, step))
        return run()


def regularized_step(trainer: Any, callbacks: Sequence[Any], step: Callable[..., Any], batch: Any, *args: Any) -> Any:
    """Make a training step, and return its output with the penalties of all callbacks added to the loss."""
    for callback in callbacks:
        callback.begin(trainer.lightning_module)
        callback.batch = [batch]
    output = step(batch, *args)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):  # None skips the step; Lightning refuses anything else
        return output
    for callback in callbacks:
        loss = callback.add_penalty(loss, size=int(callback.logged))
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def without(wrapper: Callable[..., Any], function: Any) -> Any:
    """Return the function in a wrapper of this module, or a function that is not wrapped."""
    return function.args[-1] if getattr(function, "func", None) is wrapper else function
