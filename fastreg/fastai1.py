"""fastai v1, 1.0.36 to 1.0.61: `RNNTrainer`, with AR and TAR fused.

`fuse(learn)` swaps it into a learner, and `unfuse(learn)` swaps fastai's own callback back. `learn.export()` exports
the learner with fastai's own callback.

If a model returns only its output, name the paths of its modules: `fuse(learn, rnn="encoder.lstm", dropout="dropout")`,
or pass these arguments to `RNNTrainer`.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
# fastai v1 and v2 have the same name, so only one of them is installed.

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from fastreg.attach.paths import UNFUSED, Swap, check_options_of_fuse, coefficients_of_learner, paths_of_learner
from fastreg.attach.regularizer import RNNRegularizer
from fastreg.attach.source import Masks
from fastreg.call.problem import Coefficient, is_list
from fastreg.call.rnn_dropout import FusedRNNDropout

try:
    from fastai import __version__
    from fastai.basic_train import Learner, LearnerCallback
    from fastai.callback import CallbackHandler
    from fastai.callbacks import rnn as stock
    from fastai.callbacks.fp16 import MixedPrecision
    from fastai.text.models import RNNDropout
except ImportError as error:
    raise ImportError(f"fastreg.fastai1: fastai 1 cannot be imported ({error}); pip install 'fastai<2'") from error

__all__ = ["RNNTrainer", "fuse", "unfuse"]

BATCH_FIRST = tuple(map(int, __version__.split(".")[:3])) >= (1, 0, 38)  # batches and activations
DICTS = hasattr(CallbackHandler, "_call_and_update")  # from 1.0.47 on events take dicts, before that the value itself


def answer(name: str, value: Any) -> Any:
    """Return a new value of an argument in the form in which an event of fastai takes it."""
    return {name: value} if DICTS else value


def last_raw(result: Any) -> Tensor:
    """Return the last layer's raw from the output of a language model's encoder."""
    return result[0][-1]


# The arguments of `Paths` for a language model whose last dropout is fused
SWAP = Swap("1.output_dp", RNNDropout, partial(FusedRNNDropout, batch_first=BATCH_FIRST, ar_of="raw"))
FUSED: dict[str, Any] = {"pairs": [("0", SWAP)], "output": last_raw, "batch_first": BATCH_FIRST}


class RNNTrainer(RNNRegularizer, LearnerCallback):
    """Add `alpha * AR + beta * TAR` to the loss, pass on the decoded output, and reset the model at each epoch.

    `ar` and `tar` are the terms of the last step. Activations are `(batch, time, hidden)`, but `(time, batch, hidden)`
    in releases up to 1.0.37, whose models are time first.

    Args:
        learn: the learner whose `callbacks` will contain this callback.
        bptt: the usual number of time steps.
        alpha: coefficient of AR; an attribute, which may change between batches, like `beta` and `bptt`. With `rnn`
            one of the coefficients is required.
        beta: coefficient of TAR.
        adjust: whether the optimizer steps at `lr * seq_len / bptt`; lr is restored afterwards, also after an error.
        rnn: for a model that returns only its output, the attribute path of an RNN in it, or of any module that
            `fastreg.RNNRegularizer.attach` takes; or a list of paths, whose penalties add up.
        dropout: the path of the dropout that gets the RNN's output: one path for all RNNs, or a list with a path or
            `None` for each RNN. Without `rnn` it may be `True`, as for `fuse`.
        output: as for `attach`; it needs `rnn`.
        batch_first, time_dim: as for `attach`; without `rnn`, as for `on_loss_begin`.
        valid, starts: as for `attach`, but functions of the inputs of the batch. Without `rnn`, a mask with more steps
            than the model returns is cut to the last steps.

    Warns:
        UserWarning: a training step has no penalty, because all named modules are in evaluation, once in a fit.

    Raises:
        TypeError: an argument has the wrong type; in training without `rnn`, the model does not return
            `(decoded, raw, dropped)`.
        ValueError: an argument has the wrong value, or there is no `bptt` to adjust to; in training, the activations
            may be time first.
        AttributeError: an attribute is set that the callback does not have; a subclass may add some.

    Examples:
        >>> learn1.callbacks = [RNNTrainer(learn1, bptt=16, alpha=2.0, beta=1.0)]
        >>> learn1.fit(1)
        >>> bool(learn1.callbacks[0].ar > 0)
        True
    """

    bptt: Any
    # This is fastai's order, but the mixed precision of early releases has it, too, and has to scale the loss later.
    _order = 0 if MixedPrecision._order > 0 else -1

    def __init__(
        self,
        learn: Learner,
        bptt: int | None,
        alpha: Coefficient | None = None,
        beta: Coefficient | None = None,
        adjust: bool = True,
        *,
        rnn: str | Sequence[str] | None = None,
        dropout: bool | str | Sequence[str | None] | None = None,
        output: Callable[[Any], Any] | None = None,
        batch_first: bool | None = None,
        time_dim: int | None = None,
        valid: Callable[..., Tensor | None] | None = None,
        starts: Callable[..., Tensor | None] | None = None,
    ) -> None:
        _freed(learn)
        if adjust and bptt is None:
            raise ValueError("bptt: expected the usual number of time steps to adjust the lr to, or adjust=False")
        given: dict[str, Any] = {"output": output, "batch_first": batch_first, "time_dim": time_dim}
        self.paths = paths_of_learner(rnn, dropout, FUSED, Masks(valid, starts), **given)
        if not (self.paths.pairs or BATCH_FIRST or given["time_dim"] is not None or batch_first):
            self.paths = replace(self.paths, batch_first=False)  # as the models of the release are time first
        super().__init__(*coefficients_of_learner(rnn, alpha, beta), bptt=bptt)
        # A wrong path raises an error before any training.
        self.attached = self.paths.attach(self, learn.model, lambda: self.batch)
        LearnerCallback.__init__(self, learn)
        self.adjust = adjust
        self.scaled = ExitStack()  # restores the learning rate of the optimizer
        self.on_train_end()
        learn.export, self.is_made = self.export, type(self) is RNNTrainer

    def on_epoch_begin(self, **_: Any) -> None:
        super().on_epoch_begin(self.learn.model)

    def on_batch_begin(self, last_input: Any, train: bool = True, **_: Any) -> None:
        self.batch = last_input if is_list(last_input) else [last_input]
        if train and not self.is_attached:  # after only a validation nothing would detach
            self.attached = self.paths.attach(self, self.learn.model, lambda: self.batch, print)
            self.is_attached = True

    def on_loss_begin(self, last_output: Any, train: bool = True, **_: Any) -> Any:
        if train and not self.paths.pairs:
            self.paths.capture(super().on_loss_begin, last_output, self.batch, print)
        return answer("last_output", last_output if self.returns_decoded() else last_output[0])

    def on_backward_begin(self, last_loss: Tensor, **_: Any) -> Any:
        loss = super().on_backward_begin(last_loss)
        if loss is last_loss:
            self.paths.warn_of_evaluation("RNNTrainer")
        return answer("last_loss", loss)

    def get_state(self, minimal: bool = True) -> dict[str, Any]:
        """Return the attributes from which `Learner.purge` makes the callback again."""
        return {name: getattr(self, name) for name in ("bptt", "alpha", "beta", "adjust", "paths")}

    def on_train_begin(self, **_: Any) -> None:
        self.on_train_end()  # a fit that was cut off may not have called this
        self.paths.is_warned = False
        if sum(isinstance(cb, (stock.RNNTrainer, RNNTrainer)) for cb in self.learn.callbacks) > 1:
            raise ValueError("RNNTrainer: the learner has more than one, fastai's or this module's; keep one")

    def on_backward_end(self, last_input: Tensor, **_: Any) -> None:
        if self.adjust:
            opt, factor = self.learn.opt, last_input.shape[int(BATCH_FIRST)] / self.bptt
            self.scaled.callback(setattr, opt, "lr", opt._lr)
            opt.lr = [lr * factor for lr in opt._lr]  # they also scale the weight decay

    def on_step_end(self, **_: Any) -> None:
        self.scaled.close()

    def on_train_end(self, **_: Any) -> None:  # fastai calls it after an error, too
        self.on_step_end()
        self.clear()
        self.attached.close()
        self.is_attached, self.batch = False, ()

    def returns_decoded(self) -> bool:
        """Return whether the model returns only its output, and not the tuple that fastai's callback needs."""
        return bool(self.paths.pairs) and self.paths.output is not last_raw

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Export the learner with fastai's callback, or without one, so that it can be loaded without fastreg."""
        learn = self.learn
        before = {"callbacks": learn.callbacks, "rnn_trainer": learn.rnn_trainer}
        learn.callbacks = [x for x in map(_stock, learn.callbacks) if x is not None]
        try:
            return type(learn).export(learn, *args, **kwargs)
        finally:
            vars(learn).update(before)


def fuse(learn: Learner, dropout: bool | str | Sequence[str | None] = False, **options: Any) -> Learner:
    """Swap fastai's `RNNTrainer` for this module's, in place, and return the learner.

    The new `RNNTrainer` has the coefficients and the position of the old one, and its `adjust` if the release has it.
    The learning rate no longer compounds from step to step. A learner that is fused already is fused again, with the
    arguments of this call. Hooks that a fit has left are taken off first. Subclasses stay unchanged. After an error
    nothing is swapped.

    Args:
        learn: the learner.
        dropout: `True` to swap also a language model's last dropout, an `RNNDropout`, for a `fastreg.FusedRNNDropout`
            during a fit, which computes the penalty in the pass of the dropout. As in fastai v1, AR is the mean square
            of the dropout's input. With `rnn` it is the path of the dropout that gets the RNN's output.
        **options: `rnn`, `output`, `batch_first`, `time_dim`, `valid` and `starts`, as for `RNNTrainer`. `rnn` is for a
            model that returns only its output; without it there is no `output`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the learner has no `RNNTrainer`, its model lacks the dropout or the module, or an attribute of the
            dropout or the trainer is out of range.

    Examples:
        >>> fuse(learn1).fit(1)
        >>> bool(learn1.callbacks[-1].tar > 0)
        True
    """
    check_options_of_fuse(options)
    old = next((cb for cb in _freed(learn) if type(cb) in (stock.RNNTrainer, RNNTrainer)), None)
    if old is None:
        raise ValueError(
            "fuse: the learner has no RNNTrainer of fastai's own class; add one by "
            "learn.callbacks.append(fastreg.fastai1.RNNTrainer(learn, bptt, ...))"
        )
    kept = vars(old).get("bptt"), old.alpha, old.beta, vars(old).get("adjust", False)
    learn.callbacks[learn.callbacks.index(old)] = RNNTrainer(learn, *kept, dropout=dropout, **options)
    return learn


def unfuse(learn: Learner) -> Learner:
    """Undo `fuse`, in place, and return the learner with fastai's callback.

    The callback keeps its position and the present coefficients. Arguments that fastai's callback lacks are lost; in
    most releases it lacks `bptt` and `adjust`. A learner that is not fused stays unchanged. If `rnn` names the modules
    of a model that returns only its output, fastai's callback cannot regularize this model, and the learner has none
    afterwards.

    Warns:
        UserWarning: the learner is left without a regularizer.

    Raises:
        TypeError: `learn` is not a learner.

    Examples:
        >>> type(unfuse(fuse(learn1)).callbacks[-1]).__module__
        'fastai.callbacks.rnn'
    """
    kept = [_stock(cb) for cb in _freed(learn)]
    learn.callbacks[:] = [cb for cb in kept if cb is not None]
    if None in kept:
        warnings.warn(UNFUSED, stacklevel=2)
    vars(learn).pop("export", None)
    return learn


def _freed(learn: Any) -> list[Any]:
    """Return the callbacks of a learner, without the hooks of a fit that was cut off."""
    if not isinstance(learn, Learner):
        raise TypeError(f"learn: expected a Learner, got {type(learn).__name__}")
    callbacks = getattr(learn, "callbacks", [])  # a learner that is being purged has none
    for cb in callbacks:
        if type(cb) is RNNTrainer:
            cb.on_train_end()
    return callbacks


def _stock(cb: Any) -> Any:
    """Return fastai's `RNNTrainer` for this module's, `None` if fastai's could not use the output of the model."""
    if type(cb) is not RNNTrainer:
        return cb
    known = inspect.signature(stock.RNNTrainer).parameters.keys() & {"bptt", "alpha", "beta", "adjust"}
    values = {name: getattr(cb, name) for name in known}
    return None if cb.returns_decoded() else stock.RNNTrainer(cb.learn, **values)
