"""fastai v2: the `RNNRegularizer` of `fastai.callback.rnn`, with AR and TAR fused and in the recorder's table.

`fuse(learn)` swaps it into a learner, and `unfuse(learn)` swaps fastai's own callback back. `rnn_cbs(alpha, beta)`
replaces fastai's function of that name. fastai's `ModelResetter` and `RNNCallback` stay. A pickle of a learner, such
as `learn.export()` writes, has fastai's own classes.

fastai's callbacks cannot regularize a model that returns only its output. Name the paths of its modules instead:
`fuse(learn, rnn="encoder.lstm", dropout="dropout")`, or pass these arguments to `RNNRegularizer`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy, deepcopy
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from fastreg.attach.paths import UNFUSED, Swap, check_options_of_fuse, coefficients_of_learner, paths_of_learner
from fastreg.attach.regularizer import RNNRegularizer as Regularizer
from fastreg.attach.source import Masks
from fastreg.call.problem import Coefficient, is_list
from fastreg.call.rnn_dropout import FusedRNNDropout

try:
    from fastai.callback import rnn as stock
    from fastai.callback.core import Callback
    from fastai.learner import Learner, ValueMetric, noop
    from fastai.text.models.awdlstm import RNNDropout
    from fastai.torch_core import find_bs, get_model
    from fastcore.foundation import L
except ImportError as error:
    raise ImportError(f"fastreg.fastai: fastai 2 cannot be imported ({error}); pip install 'fastai>=2'") from error

__all__ = ["RNNRegularizer", "fuse", "rnn_cbs", "unfuse"]


class OutputDropout(FusedRNNDropout):
    """Replace the last dropout of a language model; its copies and pickles are fastai's dropout."""

    def __reduce__(self) -> Any:
        return RNNDropout, (self.p,), {"training": self.training}


# The callback that has attached to the modules of a model last, by the id of the model
LAST: WeakValueDictionary[int, RNNRegularizer] = WeakValueDictionary()
# The arguments of `Paths` for a language model whose last dropout is fused
FUSED: dict[str, Any] = {"pairs": [("0", Swap("1.output_dp", RNNDropout, OutputDropout))], "batch_first": True}


class _Column(ValueMetric):
    """Show a term in the recorder's table."""


class _Metrics(L):
    """Hold a learner's metrics and the columns during a fit; a copy or a pickle holds only the metrics."""

    def __reduce__(self) -> Any:
        return L, (_without_columns(self),)


def _without_columns(metrics: Any) -> list[Any]:
    """Return the metrics that are not the columns `ar` and `tar`."""
    return [metric for metric in metrics if not isinstance(metric, _Column)]


class RNNRegularizer(Regularizer, stock.RNNRegularizer):
    """Add `alpha * AR + beta * TAR` to `learn.loss_grad`, which is differentiated, but not to `learn.loss`.

    The recorder's table gets the columns `ar` and `tar`: the terms without their coefficients, averaged over the
    epoch's training batches, weighted by batch size. The first training step prints which axes are batch, time and
    hidden.

    fastai's `RNNCallback` captures the activations, for `fastreg.RNNRegularizer.on_loss_begin`. If a model returns
    only its output, name its modules by `rnn` and `dropout`, and leave the `RNNCallback` out.

    Args:
        alpha: coefficient of AR; an attribute, which may change between batches, like `beta` and `bptt`. With `rnn`
            one of the coefficients is required.
        beta: coefficient of TAR.
        bptt: the usual number of time steps: each optimizer step runs at `lr * seq_len / bptt`, as in AWD-LSTM, where
            `seq_len` is the second size of the batch.
        rnn: the attribute path of an RNN in the model, or of any module that `fastreg.RNNRegularizer.attach` takes; or
            a list of paths, whose penalties add up.
        dropout: the path of the dropout that gets the RNN's output: one path for all RNNs, or a list with a path or
            `None` for each RNN.
        output: as for `attach`; it needs `rnn`.
        batch_first, time_dim: as for `attach`; without `rnn`, as for `on_loss_begin`.
        valid, starts: as for `attach`, but functions of the inputs of the batch, `valid(*learn.xb)`. Without `rnn`, a
            mask with more steps than the model returns is cut to the last steps, because a text classifier returns only
            the last steps of a long text.

    Warns:
        UserWarning: a training step has no penalty, because all named modules are in evaluation, once in a fit.

    Raises:
        TypeError: an argument has the wrong type; in training without `rnn`, the model returns only its output, or no
            `RNNCallback` captures the activations.
        ValueError: an argument has the wrong value; in training, a path names no module, or the learner has another
            regularizer, or the activations may be time first.
        AttributeError: an attribute is set that the callback does not have; a subclass may add some.
        RuntimeError: in training, another learner has this callback, too, or the callback was added within a batch,
            after its modules had run.

    Examples:
        >>> plain.add_cb(RNNRegularizer(alpha=2.0, beta=1.0, rnn="lstm", dropout="dropout"))
        >>> plain.fit(1)
        >>> plain.recorder.metric_names
        ['epoch', 'train_loss', 'valid_loss', 'ar', 'tar', 'time']
    """

    order = stock.RNNCallback.order - 1  # to check the output of the model before it is unpacked
    learn: Any

    def __init__(
        self,
        alpha: Coefficient | None = None,
        beta: Coefficient | None = None,
        bptt: int | None = None,
        *,
        rnn: str | Sequence[str] | None = None,
        dropout: bool | str | Sequence[str | None] | None = None,
        output: Callable[[Any], Any] | None = None,
        batch_first: bool | None = None,
        time_dim: int | None = None,
        valid: Callable[..., Tensor | None] | None = None,
        starts: Callable[..., Tensor | None] | None = None,
    ) -> None:
        super().__init__(*coefficients_of_learner(rnn, alpha, beta), bptt=bptt)
        given: dict[str, Any] = {"output": output, "batch_first": batch_first, "time_dim": time_dim}
        self.paths = paths_of_learner(rnn, dropout, FUSED, Masks(valid, starts), **given)
        self._handle: Any = None  # the attached modules, during a fit
        self._scaled = ExitStack()  # restores the learning rate of the optimizer
        self._totals = [0.0, 0.0, 0]  # sums over the epoch: AR times size, TAR times size, and size of a batch
        self._columns = [_Column(partial(self._average, i), name) for i, name in enumerate(["ar", "tar"])]
        self._own_metrics: Any = None  # of the learner, from before_fit on until training shows that this is a fit
        self.is_made = type(self) is RNNRegularizer

    def before_fit(self) -> None:
        # fastai begins learn.validate() with this event, too, maybe within a fit: before_train tells a fit from it.
        self._own_metrics = self.learn.metrics
        self.learn.metrics = _Metrics([*_without_columns(self.learn.metrics), *self._columns])

    def before_train(self) -> None:
        if not self.learn.training:  # fastai would not call the callback in training steps
            raise RuntimeError("RNNRegularizer: another learner has this callback, too; give each learner its own")
        if self._own_metrics is not None:  # the first epoch, maybe after a fit that was cut off
            self._own_metrics, self._scaled, self.paths.is_warned = None, ExitStack(), False
            self._leave()
        self._totals = [0.0, 0.0, 0]

    def before_batch(self) -> None:
        if sum(isinstance(cb, stock.RNNRegularizer) for cb in self.learn.cbs) > 1:
            raise ValueError("RNNRegularizer: the learner has another one; keep one, and name all modules by lists")
        if self._handle is None:  # in the first batch, and after the regularizer was removed for a while
            self._attach(self.learn.model)
        self._forget()
        self.order = RNNRegularizer.order

    def after_pred(self) -> None:
        self.order = stock.RNNRegularizer.order  # to add the penalty when fastai's callback does
        pred, captures = self.learn.pred, len(self._captures())
        is_captured, is_attached = captures == 1 and is_list(pred), captures == 0 and self.paths.pairs
        if not (is_captured or is_attached):
            raise TypeError(
                "RNNRegularizer: expected (decoded, raw, dropped) from the "
                f"{type(self.learn.model).__name__}, and one RNNCallback to capture them, got a {type(pred).__name__} "
                f"and {captures} RNNCallbacks. Remove all RNNCallbacks but one. If the model returns only its output, "
                "remove all, learn.remove_cb(RNNCallback), and name its modules, fuse(learn, rnn=..., dropout=...)"
            )

    def after_loss(self) -> None:
        if not self.paths.pairs:
            (capture,) = self._captures()
            output = self.learn.pred, capture.raw_out, capture.out
            self.paths.capture(self.on_loss_begin, output, self.learn.xb, self._say())
        loss = self.on_backward_begin(self.learn.loss_grad)
        if loss is self.learn.loss_grad:
            self.paths.warn_of_evaluation("RNNRegularizer")
        else:
            self.learn.loss_grad, size = loss, find_bs(self.learn.yb)
            terms: Any = self.ar, self.tar, 1
            self._totals = [total + x * size for total, x in zip(self._totals, terms, strict=True)]

    def before_step(self) -> None:
        if self.bptt is not None:
            lrs, factor = [hyper["lr"] for hyper in self.learn.opt.hypers], self.learn.xb[0].shape[1] / self.bptt
            self._scaled.callback(self.learn.opt.set_hypers, lr=lrs)
            self.learn.opt.set_hypers(lr=[lr * factor for lr in lrs])

    def after_batch(self) -> None:
        self._scaled.close()  # fastai calls it after a cancelled step, too

    def before_validate(self) -> None:
        if self._own_metrics is not None:  # nothing was trained, so there are no terms to show
            self.learn.metrics = _without_columns(self.learn.metrics)

    def after_fit(self) -> None:
        self._forget()
        if self._own_metrics is not None:  # the end of a validation; a fit around it goes on
            self.learn.metrics, self._own_metrics = self._own_metrics, None
        else:
            self.learn.metrics = _without_columns(self.learn.metrics)
            self._leave()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn":
            self._leave()  # the callback is removed, maybe in a fit, and may be added again
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        return stock.RNNRegularizer, (self.alpha, self.beta), {"learn": self.learn, "run_train": self.run_train}

    def __deepcopy__(self, memo: dict[int, Any]) -> RNNRegularizer:
        """Return a copy that regularizes its own learner; fastai's callback could not, if `rnn` names modules."""
        made = memo[id(self)] = RNNRegularizer(*deepcopy((self.alpha, self.beta, self.bptt), memo))
        made.paths, made.run_train, made.learn = copy(self.paths), self.run_train, deepcopy(self.learn, memo)
        return made

    def _attach(self, model: Any) -> None:
        """Attach to the modules at the paths; first take off the hooks that another callback has left on the model."""
        model = get_model(model)  # without the wrapper of fastai's DistributedTrainer
        LAST.get(id(model), self)._leave()  # after a fit that was cut off, maybe of another learner of the same model
        LAST[id(model)] = self
        self._handle = self.paths.attach(self, model, lambda: self.learn.xb, self._say())

    def _say(self) -> Any:
        """Return the function that shows which axes are taken for what, or `None` in `no_logging()`."""
        is_silent = getattr(self.learn, "logger", None) is noop  # `fuse` attaches without a learner
        return None if is_silent else print

    def _leave(self) -> None:
        """Restore the learning rate, and take the hooks off."""
        self._scaled.close()
        if self._handle is not None:
            self._handle.close()
        self._handle = None

    def _captures(self) -> list[Any]:
        """Return the callbacks that capture the activations."""
        return [cb for cb in self.learn.cbs if isinstance(cb, stock.RNNCallback)]

    def _forget(self) -> None:
        """Free the activations, which fastai would hold until the next prediction."""
        for capture in self._captures():
            capture.raw_out = capture.out = None

    def _average(self, i: int) -> float:
        """Average a term over the epoch's training batches; return NaN, a number for loggers, if there is no value."""
        # With train_metrics the table has separate columns for the validation, which has no terms.
        if self.learn is None or (self.learn.recorder.train_metrics and not self.learn.training):
            return math.nan
        return self._totals[i] / (self._totals[2] or math.nan)


def rnn_cbs(
    alpha: Coefficient = 0.0, beta: Coefficient = 0.0, bptt: int | None = None, **options: Any
) -> list[Callback]:
    """Return the callbacks for RNN training, as fastai's `rnn_cbs` does; see `RNNRegularizer` for the arguments.

    The regularizer is among them even if both coefficients are 0, because a schedule may raise them. The options are
    its `batch_first`, `time_dim`, `valid` and `starts`.

    Examples:
        >>> [type(cb).__name__ for cb in rnn_cbs(alpha=2.0, beta=1.0)]
        ['ModelResetter', 'RNNCallback', 'RNNRegularizer']
    """
    return [stock.ModelResetter(), stock.RNNCallback(), RNNRegularizer(alpha, beta, bptt, **options)]


def fuse(learn: Learner, dropout: bool | str | Sequence[str | None] = False, **options: Any) -> Learner:
    """Swap fastai's `RNNRegularizer` for this module's, in place, and return the learner.

    The new callback has the coefficients and `run_train` of the old one. A learner that is fused already is fused
    again, with the arguments of this call. If a fit was interrupted, its hooks are taken off first. Subclasses of
    fastai's callback stay unchanged. After an error nothing is swapped.

    Args:
        learn: the learner.
        dropout: `True` to swap also a language model's last dropout, an `RNNDropout`, for a `fastreg.FusedRNNDropout`,
            which computes the penalty in the pass of the dropout. With `rnn` it is as for `RNNRegularizer`.
        **options: `rnn`, `output`, `batch_first`, `time_dim`, `valid` and `starts`, as for `RNNRegularizer`. `rnn` is
            for a model that returns only its output; without it there is no `output`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the learner has no `RNNRegularizer`, its model lacks the dropout or the module, or an attribute of
            the dropout or the regularizer is out of range.

    Examples:
        >>> fuse(learn).fit(1)
        >>> learn.recorder.metric_names
        ['epoch', 'train_loss', 'valid_loss', 'ar', 'tar', 'time']
    """
    check_options_of_fuse(options)
    old = next(iter(_regularizers(learn, stock.RNNRegularizer, RNNRegularizer)), None)
    if old is None:
        raise ValueError(
            "fuse: the learner has no RNNRegularizer of fastai's own class. Add one of fastreg.fastai in its place: "
            "RNNRegularizer(alpha, beta), or all of rnn_cbs(alpha, beta) if the learner has no RNNCallback, or "
            "RNNRegularizer(alpha, beta, rnn=..., dropout=...) if the model returns only its output"
        )
    new = RNNRegularizer(old.alpha, old.beta, vars(old).get("bptt"), dropout=dropout, **options)
    new._attach(learn.model)  # wrong arguments raise an error before anything is swapped
    new._leave()
    new.run_train = old.run_train
    return learn.remove_cb(old).add_cb(new)


def unfuse(learn: Learner) -> Learner:
    """Undo `fuse`, in place, and return the learner with fastai's callback and dropout.

    The callback keeps the present coefficients. `bptt`, `valid` and `starts` are lost, because fastai lacks them. If no
    `RNNCallback` captures the activations, as where `rnn` names the modules, fastai's callback could not regularize the
    model, and the learner is left without one.

    Warns:
        UserWarning: the learner is left without a regularizer.

    Raises:
        TypeError: `learn` is not a learner.

    Examples:
        >>> unfuse(fuse(learn)).fit(1)
        >>> learn.recorder.metric_names
        ['epoch', 'train_loss', 'valid_loss', 'time']
    """
    for cb in _regularizers(learn, RNNRegularizer):
        captures = cb._captures()
        learn.remove_cb(cb)
        if captures:
            learn.add_cb(copy(cb))
        else:
            warnings.warn(UNFUSED, stacklevel=2)
    learn.metrics = _without_columns(learn.metrics)
    return learn


def _regularizers(learn: Any, *kinds: type) -> list[Any]:
    """Return the callbacks of a learner whose class is one of `kinds`, but not a subclass."""
    if not isinstance(learn, Learner):
        raise TypeError(f"learn: expected a Learner, got {type(learn).__name__}")
    return [cb for cb in learn.cbs if type(cb) in kinds]
