"""fastai v2: the callbacks of `fastai.callback.rnn`, with AR and TAR fused and in the recorder's table.

`fuse(learn)` swaps them into a learner, and `unfuse(learn)` swaps fastai's back; `rnn_cbs(alpha, beta)` replaces
fastai's function of that name. `ModelResetter` stays. A pickle of a learner, as `learn.export()` makes it, holds
fastai's own classes.

A model that returns its output alone, which fastai's callbacks cannot regularize, is regularized by the paths of its
modules: `fuse(learn, rnn="encoder.lstm", dropout="dropout")`, or `RNNRegularizer` with these arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

from torch import Tensor

from fastreg import output_dropout
from fastreg.arguments import check_flags
from fastreg.paths import Paths, check_marks, check_path
from fastreg.problem import Coefficient, is_on
from fastreg.regularizer import RNNRegularizer as Regularizer

try:
    from fastai.callback import rnn as stock
    from fastai.callback.core import Callback
    from fastai.imports import noop
    from fastai.learner import Learner, ValueMetric
    from fastai.text.models.awdlstm import RNNDropout
    from fastai.text.models.core import LinearDecoder, SentenceEncoder
    from fastai.torch_core import find_bs
    from fastcore.foundation import L
except ImportError as error:
    raise ImportError(f"fastreg.fastai: fastai 2 cannot be imported ({error}); pip install 'fastai>=2'") from error

__all__ = ["RNNCallback", "RNNRegularizer", "fuse", "rnn_cbs", "unfuse"]


class _Unfused:
    """Pickle an object as fastai's counterpart, so that exports load without fastreg; deep-copy it unchanged."""

    def stock(self) -> Any:
        """Return fastai's counterpart of this object."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.stock().__reduce_ex__(0)  # from protocol 2 on pickle wants an object of this very class

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = object.__new__(type(self))
        state: Any = super().__reduce_ex__(4)[2]
        vars(copied).update(deepcopy(state, memo))
        return copied


class OutputDropout(_Unfused, output_dropout.OutputDropout):
    """Replace the `output_dp` of a `LinearDecoder`."""

    def stock(self) -> Any:
        """Return the dropout that was replaced."""
        return self.original


class _Column(_Unfused, ValueMetric):
    """Show a term in the recorder's table."""

    def stock(self) -> Any:
        """Return an empty column, as no callback of fastai fills it."""
        return ValueMetric(noop, self.name)


class _Metrics(_Unfused, L):
    """Hold a learner's metrics and the columns while it is fitted; a fit that was cut off leaves them there."""

    def stock(self) -> Any:
        """Return the learner's own metrics."""
        return _others(self)


class _Step(_Unfused):
    """Replace a learner's `_step` for one step with the lr scaled; an error before that step leaves it there."""

    def __init__(self, learn: Any, regularizer: Regularizer) -> None:
        self.learn, self.regularizer = learn, regularizer

    def stock(self) -> Any:
        """Return the learner's own step."""
        return MethodType(type(self.learn)._step, self.learn)

    def __call__(self) -> None:
        del self.learn._step
        opt: Any = self.learn.opt  # fastai's, which takes new values in `hypers` alone, or a wrapper of PyTorch's
        opt = getattr(opt, "opt", None) or SimpleNamespace(param_groups=opt.hypers)
        with self.regularizer.scaled_lr(opt, self.learn.xb[0].shape[1]):
            self.learn._step()


class _Callback(_Unfused):
    """Ignore the rest of an event in which the callback was removed: fastai goes on calling it."""

    learn: Any

    def __call__(self, event_name: str) -> Any:
        return None if self.learn is None else super().__call__(event_name)  # pyright: ignore


class RNNCallback(_Callback, stock.RNNCallback):
    """Capture raw and dropped, and pass on the decoded output.

    `raw_out` and `out`, `(batch, time, hidden)`, stay until the next batch.

    Raises:
        TypeError: the model has no `reset()`, or does not return `(decoded, raw, dropped)`.
        RuntimeError: the learner has another `RNNCallback`, this module's or fastai's.

    Examples:
        >>> learn.remove_cb(fastai.callback.rnn.RNNCallback).add_cb(RNNCallback())
        >>> learn.fit(1)
    """

    raw_out = out = None

    def before_fit(self) -> None:
        if sum(isinstance(cb, stock.RNNCallback) for cb in self.learn.cbs) > 1:
            raise RuntimeError(
                "the learner has more than one RNNCallback, and the first leaves the others no activations: keep one, "
                "learn.remove_cb(learn.rnn)"
            )
        resets = any(isinstance(cb, stock.ModelResetter) for cb in self.learn.cbs)
        if resets and not hasattr(self.learn.model, "reset"):
            raise TypeError(
                f"{type(self.learn.model).__name__} has no reset(), which ModelResetter calls: give it one that zeroes "
                "the hidden state, or, if it keeps none between batches, learn.remove_cb(ModelResetter)"
            )

    def before_batch(self) -> None:
        self.raw_out = self.out = None

    after_fit = before_batch

    def stock(self) -> Any:
        """Return fastai's `RNNCallback`."""
        return _alike(stock.RNNCallback(), self)

    def after_pred(self) -> None:
        output = self.learn.pred
        if isinstance(output, (list, tuple)) and len(output) == 3:
            super().after_pred()
        elif not any(isinstance(cb, RNNRegularizer) and cb.paths is not None for cb in self.learn.cbs):
            raise TypeError(
                f"expected (decoded, raw, dropped) from the model, got a {type(output).__name__} from "
                f"{type(self.learn.model).__name__}: let it return the RNN's output before and after dropout, too, as "
                "fastai's language models and text classifiers do; or leave it as it is, and name its modules: "
                "fuse(learn, rnn=..., dropout=...); or remove RNNCallback and RNNRegularizer"
            )


class RNNRegularizer(_Callback, stock.RNNRegularizer):
    """Add `alpha * AR + beta * TAR` to `learn.loss_grad`, which is differentiated, but not to `learn.loss`.

    The recorder's table gets the columns `ar` and `tar`: the terms without their coefficients, averaged over the
    epoch's training batches by batch size. The first four arguments are attributes that may change during training.

    The activations are those that `RNNCallback` captures. For a model that returns its output alone, name its modules
    by `rnn` and `dropout`, and leave the `RNNCallback` out.

    Args:
        alpha: coefficient of AR.
        beta: coefficient of TAR.
        bptt: the usual number of time steps: each optimizer step runs at `lr * seq_len / bptt`, as in AWD-LSTM, where
            `seq_len` is the second size of the batch.
        mask_padding: leave the padding of a text classifier's batches out of sums and divisors; fastai counts it. A
            pad id between other ids of a text counts as a step.
        rnn: the attribute path of an RNN in the model, any module that `fastreg.RNNRegularizer.attach` takes.
        dropout: the path of the dropout that takes its output, or `None`.
        output: as for `attach`.
        batch_first: as for `attach`.
        valid: a function of the inputs of the batch, `valid(*learn.xb)`, that returns the mask of valid time steps, as
            `fused_ar_tar` takes it, or `None` where all steps count.
        starts: a function of the same inputs that returns the mask of the time steps at which segments start, or
            `None`.

    Raises:
        RuntimeError: no `RNNCallback`, this module's or fastai's, captures the activations, and no path is given.
        ValueError: `mask_padding` without a `SentenceEncoder` in the model, or with `valid` or a path; or
            `fastreg.RNNRegularizer` refuses the value of an argument.
        TypeError: `fastreg.RNNRegularizer` refuses the type of an argument.

    Examples:
        >>> plain.add_cb(RNNRegularizer(alpha=2.0, beta=1.0, rnn="lstm", dropout="dropout"))
        >>> plain.fit(1)
        >>> plain.recorder.metric_names
        ['epoch', 'train_loss', 'valid_loss', 'ar', 'tar', 'time']
    """

    def __init__(
        self,
        alpha: Coefficient = 0.0,
        beta: Coefficient = 0.0,
        bptt: int | None = None,
        mask_padding: bool = False,
        *,
        rnn: str | None = None,
        dropout: str | None = None,
        output: Callable[[Any], Any] | None = None,
        batch_first: bool | None = None,
        valid: Callable[..., Tensor | None] | None = None,
        starts: Callable[..., Tensor | None] | None = None,
    ) -> None:
        check_flags(mask_padding=mask_padding)
        self.regularizer = Regularizer(alpha, beta, bptt=bptt)
        self.hook(check_path(rnn, dropout, output, batch_first), valid, starts, mask_padding)
        self.attached = ExitStack()  # to the modules, during a fit
        self.columns = [_Column(partial(self._average, name), name) for name in ("ar", "tar")]
        self.totals, self.count = {}, 0  # of the terms, over the epoch's training batches

    alpha = property(lambda self: self.regularizer.alpha, lambda self, value: setattr(self.regularizer, "alpha", value))
    beta = property(lambda self: self.regularizer.beta, lambda self, value: setattr(self.regularizer, "beta", value))
    bptt = property(lambda self: self.regularizer.bptt, lambda self, value: setattr(self.regularizer, "bptt", value))

    def hook(
        self,
        paths: Paths | None,
        valid: Callable[..., Tensor | None] | None = None,
        starts: Callable[..., Tensor | None] | None = None,
        mask_padding: bool = False,
    ) -> None:
        """Take the activations of the modules at paths, or with `None` those of `RNNCallback`, and masks of steps.

        Raises:
            TypeError, ValueError: as the arguments of this class.
        """
        check_marks("the batch's inputs", valid=valid, starts=starts)
        if mask_padding and not (paths is None and valid is None):
            raise ValueError("mask_padding: expected False with rnn or valid, which tells the padding, got True")
        self.paths, self.valid, self.starts, self.mask_padding = paths, valid, starts, mask_padding

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn" and value is None and self.learn is not None:
            # The callback is removed, and an interrupted fit has not cleaned up.
            output_dropout.link(self.learn.model, None)
            self.attached.close()
            self.after_batch()
        super().__setattr__(name, value)

    def stock(self) -> Any:
        """Return fastai's `RNNRegularizer`, which has neither `bptt` nor a mask."""
        return _alike(stock.RNNRegularizer(self.alpha, self.beta), self)

    def before_fit(self) -> None:
        self.after_batch()  # a fit that was cut off may have left its step
        self.attached.close()
        if self.paths is None:
            self._capture()
        else:
            marks = partial(self._marks, self.valid), partial(self._marks, self.starts)
            self.attached = self.paths.attach(self.regularizer, self.learn.model, *marks)
        if self.mask_padding:
            _encoder(self.learn.model)
        output_dropout.link(self.learn.model, self.regularizer)
        self.totals = {}
        self.learn.metrics = _Metrics([*_others(self.learn.metrics), *self.columns])

    def before_train(self) -> None:
        self.totals, self.count = {"ar": 0.0, "tar": 0.0}, 0

    def after_loss(self) -> None:
        if not self.learn.training:  # a callback with run_valid is called in validation, too
            return
        if self.paths is None:
            raw, out = self._capture().raw_out, self._capture().out
            valid = self.text(raw.shape[1]) if self.mask_padding else self._marks(self.valid)
            options: Any = {"valid": valid, "starts": self._marks(self.starts), "batch_first": True}
            self.regularizer.on_loss_begin((self.learn.pred, raw, out), **options)
        loss = self.regularizer.on_backward_begin(self.learn.loss_grad)
        if loss is self.learn.loss_grad:  # the modules are in evaluation
            return
        self.learn.loss_grad = loss
        self.count += (size := find_bs(self.learn.yb))
        for name in self.totals:
            self.totals[name] += getattr(self.regularizer, name) * size

    def after_backward(self) -> None:
        if self.bptt is not None:  # an event after the step would not do: none comes when the step raises
            self.learn._step = _Step(self.learn, self.regularizer)

    def after_batch(self) -> None:
        vars(self.learn).pop("_step", None)  # it is still there if the step was cancelled

    def before_validate(self) -> None:
        if not self.totals:  # learn.validate() and the like train nothing, so that there are no terms to show
            self.after_fit()

    def after_fit(self) -> None:
        self.learn.metrics = _others(self.learn.metrics)
        self.regularizer.clear()
        self.attached.close()
        output_dropout.link(self.learn.model, None)

    def _marks(self, function: Callable[..., Tensor | None] | None, *_: Any, **__: Any) -> Tensor | None:
        """Return the valid steps of the batch, or its starts, whatever the arguments of an attached module."""
        return None if function is None else function(*self.learn.xb)

    def text(self, steps: int) -> Tensor:
        """Return the mask of a batch's texts: each reaches from its first step that is not padding to its last."""
        ids = self.learn.xb[0][:, -steps:]  # the encoder keeps the last `max_len` steps of a long text
        there = (ids != _encoder(self.learn.model).pad_idx).as_subclass(Tensor)
        return (there.cumsum(1) > 0) & (there.flip(1).cumsum(1).flip(1) > 0)

    def _capture(self) -> Any:
        """Return the callback that captures the activations."""
        for cb in self.learn.cbs:
            if isinstance(cb, stock.RNNCallback):
                return cb
        raise RuntimeError("no RNNCallback captures the activations: add one, or all of rnn_cbs(alpha, beta) instead")

    def _average(self, name: str) -> Any:
        """Average a term over the epoch's training batches; NaN, a number for loggers, where there is no value."""
        if self.learn is None:  # the callback was removed after a fit that was cut off
            return math.nan
        # With train_metrics the table has columns of its own for the validation, which has no terms.
        validation = self.learn.recorder.train_metrics and not self.learn.training
        return math.nan if validation or not self.count else self.totals[name] / self.count


def _encoder(model: Any) -> Any:
    """Return the encoder of a text classifier, which knows the pad id."""
    for module in model.modules():
        if isinstance(module, SentenceEncoder):
            return module
    raise ValueError(
        "mask_padding: expected a model with a SentenceEncoder, as fastai's text classifiers have, got "
        f"{type(model).__name__}"
    )


def _others(metrics: Any) -> Any:
    """Return the metrics without the columns `ar` and `tar`."""
    return L(metric for metric in metrics if not isinstance(metric, _Column))


def rnn_cbs(
    alpha: Coefficient = 0.0, beta: Coefficient = 0.0, bptt: int | None = None, mask_padding: bool = False
) -> list[Callback]:
    """Return the callbacks for RNN training, as fastai's `rnn_cbs` does; see `RNNRegularizer` for the arguments.

    Examples:
        >>> [type(cb).__name__ for cb in rnn_cbs(alpha=2.0, beta=1.0)]
        ['ModelResetter', 'RNNCallback', 'RNNRegularizer']
    """
    cbs = [stock.ModelResetter(), RNNCallback()]
    regularizer = RNNRegularizer(alpha, beta, bptt, mask_padding)  # checks the arguments
    return [*cbs, regularizer] if is_on(alpha) or is_on(beta) or bptt is not None else cbs


def fuse(
    learn: Learner,
    dropout: bool | str = False,
    mask_padding: bool = False,
    *,
    rnn: str | None = None,
    output: Callable[[Any], Any] | None = None,
    batch_first: bool | None = None,
    valid: Callable[..., Tensor | None] | None = None,
    starts: Callable[..., Tensor | None] | None = None,
) -> Learner:
    """Swap fastai's `RNNCallback` and `RNNRegularizer` for this module's, in place, and return the learner.

    The new callbacks have the coefficients, `order`, `run_train` and `run_valid` of the old ones. Subclasses of
    fastai's callbacks, and learners that are fused already, stay unchanged. After an error nothing is swapped.

    Args:
        learn: the learner.
        dropout: also swap a language model's last dropout, the `RNNDropout` of its `LinearDecoder`, for a
            `fastreg.FusedRNNDropout`, which forms the penalty in its own pass. With `rnn` the path of the dropout that
            takes its output.
        mask_padding: leave the padding of a text classifier's batches out, which fastai counts in.
        rnn: the path of a module, for a model that returns its output alone, as for this module's `RNNRegularizer`.
        output: as for `RNNRegularizer`.
        batch_first: as for `RNNRegularizer`.
        valid: as for `RNNRegularizer`, also for a model that returns `(decoded, raw, dropped)`.
        starts: as for `RNNRegularizer`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the learner has no `RNNRegularizer`, or its model lacks the dropout, the mask or the module, or an
            attribute of the dropout or regularizer is out of range.

    Examples:
        >>> fuse(learn).fit(1)
        >>> learn.recorder.metric_names
        ['epoch', 'train_loss', 'valid_loss', 'ar', 'tar', 'time']
    """
    path = output_dropout.check_fuse(learn, Learner, dropout, rnn)
    check_flags(mask_padding=mask_padding)
    paths = check_path(rnn, path, output, batch_first)
    regularizers = [cb for cb in learn.cbs if isinstance(cb, stock.RNNRegularizer)]
    if not any(type(cb) in (stock.RNNRegularizer, RNNRegularizer) for cb in regularizers):
        captured = paths is not None or any(isinstance(cb, stock.RNNCallback) for cb in learn.cbs)
        advice = "add_cb(fastreg.fastai.RNNRegularizer" if captured else "add_cbs(fastreg.fastai.rnn_cbs"
        arguments = "alpha, beta" if paths is None else "alpha, beta, rnn=..., dropout=..."
        raise ValueError(
            f"fuse: the learner's {type(regularizers[0]).__name__} is a subclass of RNNRegularizer, and left alone"
            if regularizers
            else f"fuse: the learner has no RNNRegularizer; learn.{advice}({arguments}))"
        )
    if mask_padding:
        _encoder(learn.model)
    if paths is not None:
        model: Any = learn.model
        paths.attach(Regularizer(), model).close()  # a wrong path raises before anything is swapped
    decoders = output_dropout.swappable(learn.model, _decoders(learn), RNNDropout) if dropout is True else []
    callbacks: list[tuple[Any, Any]] = []
    for cb in learn.cbs:
        if type(cb) is stock.RNNCallback:
            callbacks.append((cb, _alike(RNNCallback(), cb)))
        elif type(cb) is stock.RNNRegularizer:
            callbacks.append((cb, _alike(RNNRegularizer(cb.alpha, cb.beta), cb)))
    fused = [*learn.cbs, *(new for _, new in callbacks)]
    regularizer = next(cb for cb in fused if type(cb) is RNNRegularizer)
    options = {"alpha": regularizer.alpha, "beta": regularizer.beta}
    dropouts = [OutputDropout(decoder.output_dp, **options) for decoder in decoders]
    if mask_padding or paths is not None or valid is not None or starts is not None:
        regularizer.hook(paths, valid, starts, mask_padding)
    for old, new in callbacks:
        _swap(learn, old, new)
    for decoder, new in zip(decoders, dropouts, strict=True):
        decoder.output_dp = new
    return learn


def unfuse(learn: Learner) -> Learner:
    """Undo `fuse`, in place, and return the learner with fastai's callbacks and dropout.

    They keep the present coefficients and order; `bptt` and `mask_padding` are lost, as fastai has neither. A learner
    that is not fused stays unchanged. In a callback of a running fit, do not call this between a batch's prediction
    and its loss.

    Raises:
        TypeError: `learn` is not a learner.

    Examples:
        >>> unfuse(fuse(learn)).fit(1)
        >>> learn.recorder.metric_names
        ['epoch', 'train_loss', 'valid_loss', 'time']
    """
    output_dropout.check_learner(learn, Learner)
    for cb in list(learn.cbs):
        if type(cb) is RNNRegularizer:
            cb.after_fit()  # a fit that was cut off has not called it
        if type(cb) in (RNNCallback, RNNRegularizer):
            _swap(learn, cb, cb.stock())
    learn.metrics = _others(learn.metrics)  # where the callback was removed after a fit that was cut off
    for decoder in _decoders(learn):
        if type(decoder.output_dp) is OutputDropout:
            decoder.output_dp = decoder.output_dp.original
    return learn


def _decoders(learn: Any) -> list[Any]:
    """Return the modules that hold a language model's last dropout."""
    return [module for module in learn.model.modules() if isinstance(module, LinearDecoder)]


def _swap(learn: Any, old: Any, new: Callback) -> None:
    """Replace the old callback by the new one."""
    learn.add_cb(new)  # fastai adds it at the end, and makes it the learner's attribute of its name
    i = [cb is old for cb in learn.cbs].index(True)
    learn.cbs[i], old.learn = learn.cbs.pop(), None


def _alike(new: Callback, old: Callback) -> Callback:
    """Give a new callback the old one's learner and the attributes that were set on the old instance."""
    names = {"learn", "order", "run_train", "run_valid"} & vars(old).keys()
    vars(new).update({name: vars(old)[name] for name in names})
    return new
