"""fastai v2: the `RNNRegularizer` of `fastai.callback.rnn`, with AR and TAR fused and in the recorder's table.

`fuse(learn)` swaps it into a learner. `rnn_cbs(alpha, beta)` replaces fastai's function of that name. fastai's
`ModelResetter` and `RNNCallback` stay. A copy or a pickle of a learner, such as `learn.export()` writes, has fastai's
own classes.

fastai's callbacks cannot regularize a model that returns only its output. Name the paths of its modules instead:
`fuse(learn, rnn="encoder.lstm", dropout="dropout")`, or pass these arguments to `RNNRegularizer`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

from torch import nn

from fastreg.adapter import NO_SUMS, Adapter
from fastreg.call.problem import Coefficient
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

__all__ = ["RNNRegularizer", "fuse", "rnn_cbs"]


class OutputDropout(FusedRNNDropout):
    """Replace the last dropout of a language model; its copies and pickles are fastai's dropout."""

    def __init__(self, p: float) -> None:
        super().__init__(p, 0.0, 0.0)  # no penalty, unless it is attached

    def __reduce__(self) -> Any:
        return RNNDropout, (self.p,), {"training": self.training}


class LayersHook:
    """Capture all layers in the output of a model, as fastai's `RNNCallback` captures the last one, until `remove()`.

    A copy or a pickle is a hook that does nothing, and loads without fastreg.
    """

    def __init__(self, model: nn.Module) -> None:
        self.raw_out: Any = None
        self.out: Any = None
        self.remove = model.register_forward_hook(self).remove

    def __call__(self, model: nn.Module, inputs: Any, output: Any) -> None:
        _, self.raw_out, self.out = output

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")


class Column(ValueMetric):
    """Show a term in the recorder's table."""


class Metrics(L):
    """Hold the metrics of a learner and the columns during a fit; a copy or a pickle holds only the metrics."""

    def __reduce__(self) -> Any:
        return L, (without_columns(self),)


def without_columns(metrics: Any) -> list[Any]:
    """Return the metrics that are not the columns `ar` and `tar`."""
    return [metric for metric in metrics if not isinstance(metric, Column)]


class RNNRegularizer(Adapter, stock.RNNRegularizer):
    """Add `alpha * AR + beta * TAR` to `learn.loss_grad`, which is differentiated, but not to `learn.loss`.

    The recorder's table gets the columns `ar` and `tar`: the terms without their coefficients, averaged over the
    epoch's training batches, weighted by batch size. The first training step prints which axes are batch, time and
    hidden.

    A model for fastai's `RNNCallback`, which returns `(decoded, raw, dropped)`, needs no more. If a model returns only
    its output, name its modules by `rnn` and `dropout`, and leave the `RNNCallback` out.

    Args:
        alpha: coefficient of AR; an attribute, which may change between batches, like `beta` and `bptt`. With `rnn`
            one of the coefficients is required.
        beta: coefficient of TAR.
        bptt: the usual number of time steps: each optimizer step runs at `lr * time / bptt`, as in AWD-LSTM, where
            `time` is the length of the batch's first input if that is two-dimensional and of indices, and otherwise the
            number of time steps of raw. Of indices, time is the axis that is not raw's batch, or else the second one.
        layers: which layers count if the model returns lists with a tensor for each layer: `"last"`, like `None`, as in
            fastai, or `"all"`, whose penalties add up. It cannot be given together with `rnn`.
        **options: as for `fastreg.adapter.Paths`; `valid` and `starts` get the inputs of the batch, `valid(*learn.xb)`.

    Raises:
        TypeError: an argument has the wrong type; when a fit begins, there is neither `rnn` nor an `RNNCallback`.
        ValueError: an argument has the wrong value; when a fit begins, the learner has another regularizer; in
            training, the activations may be time first.
        AttributeError: when a fit begins, a path names no module.
        RuntimeError: in training, another learner has this callback, too.

    Examples:
        >>> plain.add_cb(RNNRegularizer(alpha=2.0, beta=1.0, rnn="lstm", dropout="dropout"))
        >>> plain.fit(1)
        >>> plain.recorder.metric_names
        ['epoch', 'train_loss', 'valid_loss', 'ar', 'tar', 'time']
    """

    learn: Any

    def __init__(
        self,
        alpha: Coefficient | None = None,
        beta: Coefficient | None = None,
        bptt: int | None = None,
        layers: Literal["last", "all"] | None = None,
        **options: Any,
    ) -> None:
        self.prepare(alpha, beta, options, bptt, layers)
        self.columns = [Column(partial(self.mean, i), name) for i, name in enumerate(["ar", "tar"])]

    def before_fit(self) -> None:
        if self.learn.lock.locked():  # learn.validate(), within a fit or not, begins with this event, too
            return
        if sum(isinstance(cb, stock.RNNRegularizer) for cb in self.learn.cbs) > 1:
            raise ValueError("RNNRegularizer: the learner has another one; keep one, and name all modules by lists")
        if self.paths.rnn is None and not self.captures():
            raise TypeError(
                "RNNRegularizer: expected an RNNCallback, for a model that returns (decoded, raw, dropped), or rnn= "
                "and dropout=, for one that returns only its output, got neither"
            )
        self.start(get_model(self.learn.model))
        if self.paths.rnn is None and self.regularizer.layers == "all":
            self.handles.append(LayersHook(self.learn.model))
        self.learn.metrics = Metrics([*without_columns(self.learn.metrics), *self.columns])

    def before_train(self) -> None:
        if not self.learn.training:  # fastai would not call the callback in training steps
            raise RuntimeError("RNNRegularizer: another learner has this callback, too; give each learner its own")
        self.sums = NO_SUMS

    def before_batch(self) -> None:
        self.begin(get_model(self.learn.model))  # without the wrapper of fastai's DistributedTrainer
        self.forget()

    def inputs(self) -> Any:
        return self.learn.xb  # a callback may have changed them since before_batch

    def after_loss(self) -> None:
        if self.paths.rnn is None:
            rnn = self.captures()[0]
            self.capture((self.learn.pred, rnn.raw_out, rnn.out))
        self.learn.loss_grad = self.add_penalty(self.learn.loss_grad, size=find_bs(self.learn.yb))

    def before_step(self) -> None:
        opt = self.learn.opt
        self.scale(lambda: [hyper["lr"] for hyper in opt.hypers], lambda lrs: opt.set_hypers(lr=lrs))

    def after_step(self) -> None:
        self.scaled.close()

    # Where a callback cancels more than the step before it, no after_step follows.
    after_cancel_batch = after_cancel_train = after_cancel_epoch = after_step

    def after_fit(self) -> None:
        self.forget()
        if not self.learn.lock.locked():
            self.end()
            self.learn.metrics = without_columns(self.learn.metrics)
        elif len(self.learn.metrics) > len(without_columns(self.learn.metrics)):  # learn.validate() within a fit
            self.learn.final_record = self.learn.final_record[: -len(self.columns)]

    def say(self, words: str) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Print words, but not in `learn.no_logging()`."""
        if self.learn.logger is not noop:
            print(words)

    def captures(self) -> list[Any]:
        """Return what captures the activations: a hook for all layers, if there is one, and fastai's callbacks."""
        return [x for x in (*self.handles, *self.learn.cbs) if isinstance(x, (LayersHook, stock.RNNCallback))]

    def forget(self) -> None:
        """Free the activations, which fastai would hold until the next prediction."""
        for rnn in self.captures():
            rnn.raw_out = rnn.out = None

    def mean(self, i: int) -> Any:
        """Return the mean of a term over the epoch's training batches; it is NaN, a number for loggers, without one.

        If training and validation have columns of their own, those of the validation are NaN, too.
        """
        of_validation = self.learn.recorder.train_metrics and not self.learn.training
        terms, size = NO_SUMS if of_validation else self.sums
        return terms.expand(2)[i] / size

    def __reduce__(self) -> Any:
        return stock.RNNRegularizer, (self.alpha, self.beta), {"learn": self.learn, "run_train": self.run_train}


def fuse_output_dropout(model: nn.Module) -> None:
    """Swap the last dropout of a language model for a fused one, unless this has been done.

    Raises:
        ValueError: the model has no such dropout; a subclass of fastai's `RNNDropout` is none.
    """
    own: Any = getattr(getattr(model, "1", None), "output_dp", None)
    if type(own) is RNNDropout:
        model.set_submodule("1.output_dp", OutputDropout(own.p).train(own.training))
    elif not isinstance(own, FusedRNNDropout):
        words = "the RNNDropout of a language model of fastai, or the path of a dropout beside rnn="
        raise ValueError(f"dropout: expected {words}, got True for a {type(model).__name__} with {type(own).__name__}")


def rnn_cbs(
    alpha: Coefficient = 0.0, beta: Coefficient = 0.0, bptt: int | None = None, **options: Any
) -> list[Callback]:
    """Return the callbacks for RNN training, as fastai's `rnn_cbs` does; see `RNNRegularizer` for the arguments.

    The regularizer is among them even if both coefficients are 0, because a schedule may raise them.

    Examples:
        >>> [type(cb).__name__ for cb in rnn_cbs(alpha=2.0, beta=1.0)]
        ['ModelResetter', 'RNNCallback', 'RNNRegularizer']
    """
    return [stock.ModelResetter(), stock.RNNCallback(), RNNRegularizer(alpha, beta, bptt, **options)]


def fuse(learn: Learner, **options: Any) -> Learner:
    """Swap fastai's `RNNRegularizer` for this module's, in place, and return the learner.

    The new callback has the coefficients and `run_train` of the old one. A learner that is fused already is fused
    again, with the arguments of this call. Subclasses of fastai's callback stay unchanged. After an error nothing is
    swapped.

    Args:
        learn: the learner.
        **options: as for `fastreg.adapter.Paths`; and `layers`, as for `RNNRegularizer`. `dropout=True` swaps the last
            dropout of a language model, an `RNNDropout`, for a `fastreg.FusedRNNDropout`, which computes the penalty in
            the pass of the dropout.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the learner has no `RNNRegularizer`, its model lacks the dropout, or a value is wrong.
        AttributeError: a path names no module.

    Examples:
        >>> fuse(learn).fit(1)
        >>> learn.recorder.metric_names
        ['epoch', 'train_loss', 'valid_loss', 'ar', 'tar', 'time']
    """
    if not isinstance(learn, Learner):
        raise TypeError(f"learn: expected a Learner, got {type(learn).__name__}")
    old = next((cb for cb in learn.cbs if type(cb) in (stock.RNNRegularizer, RNNRegularizer)), None)
    if old is None:
        raise ValueError(
            "fuse: the learner has no RNNRegularizer of fastai's own class. Add one of fastreg.fastai in its place, "
            "with rnn= and dropout= if the model returns only its output, or all of rnn_cbs(alpha, beta)"
        )
    model, swaps = get_model(learn.model), options.get("dropout") is True and options.get("rnn") is None
    given: Any = {"batch_first": True, **options, "rnn": "0", "dropout": "1.output_dp"} if swaps else options
    new = RNNRegularizer(old.alpha, old.beta, getattr(old, "bptt", None), **given)
    if swaps:
        fuse_output_dropout(model)  # pyright: ignore[reportArgumentType]
    new.modules(model)  # pyright: ignore[reportArgumentType]
    new.run_train = old.run_train
    if isinstance(old, RNNRegularizer):
        old.end()  # of a fit that was cut off
    return learn.remove_cb(old).add_cb(new)
