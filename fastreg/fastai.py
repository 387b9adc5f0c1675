"""fastai v2: the callbacks of `fastai.callback.rnn`, with AR and TAR fused and in the recorder's table.

`fuse(learn)` swaps them into a learner; `rnn_cbs(alpha, beta)` stands in for fastai's own. `ModelResetter` stays.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from fastai.callback import rnn as stock
from fastai.callback.core import Callback
from fastai.learner import Learner, ValueMetric
from fastai.torch_core import find_bs

from fastreg.regularizer import RNNRegularizer as Regularizer

__all__ = ["RNNCallback", "RNNRegularizer", "fuse", "rnn_cbs"]


class RNNCallback(stock.RNNCallback):
    """Hands on the true output; `raw_out` and `out`, `(batch, time, hidden)`, stay until the next batch.

    Raises:
        TypeError: the model cannot be reset, or returns anything else than `(decoded, raw, dropped)`.
    """

    learn: Any
    raw_out = out = None

    def before_fit(self) -> None:
        resets = any(isinstance(cb, stock.ModelResetter) for cb in self.learn.cbs)
        if resets and not hasattr(self.learn.model, "reset"):
            raise TypeError(
                f"{type(self.learn.model).__name__} has no reset(), which ModelResetter calls: give it one that zeroes "
                "the hidden state, or, if it keeps none between batches, learn.remove_cb(ModelResetter)"
            )

    def before_batch(self) -> None:
        self.raw_out = self.out = None

    after_fit = before_batch

    def after_pred(self) -> None:
        output = self.learn.pred
        if not (isinstance(output, (list, tuple)) and len(output) == 3):
            raise TypeError(
                f"expected (decoded, raw, dropped) from the model, got a {type(output).__name__} from "
                f"{type(self.learn.model).__name__}: let it return the RNN's output before and after dropout, too, as "
                "fastai's language models and text classifiers do, or remove RNNCallback and RNNRegularizer"
            )
        super().after_pred()


class RNNRegularizer(stock.RNNRegularizer):
    """Adds `alpha * AR + beta * TAR` to what is differentiated, `learn.loss_grad`; `learn.loss` stays free of it.

    The recorder's table gets the columns `ar` and `tar`: the terms without their coefficients, averaged over the
    epoch's training batches by batch size. `bptt`, if given, has the optimizer step at its lr times `seq_len / bptt`,
    as AWD-LSTM does; `seq_len` is the second size of the batch. `alpha` and `beta` may change while training.

    Raises:
        RuntimeError: no `RNNCallback`, this module's or fastai's, captures the activations.
        TypeError, ValueError: an argument is not what `fastreg.RNNRegularizer` takes.
    """

    learn: Any

    def __init__(self, alpha: float = 0.0, beta: float = 0.0, bptt: int | None = None) -> None:
        self.regularizer = Regularizer(alpha, beta, bptt=bptt)
        self.columns = [ValueMetric(partial(self._average, name), name) for name in ("ar", "tar")]
        self.totals, self.count = {}, 0  # of the terms, over the epoch's training batches

    alpha = property(lambda self: self.regularizer.alpha, lambda self, value: setattr(self.regularizer, "alpha", value))
    beta = property(lambda self: self.regularizer.beta, lambda self, value: setattr(self.regularizer, "beta", value))

    def before_fit(self) -> None:
        self._capture()
        self.totals = {}
        self.learn.metrics = [*self._other_metrics(), *self.columns]

    def before_train(self) -> None:
        self.totals, self.count = {"ar": 0.0, "tar": 0.0}, 0

    def after_loss(self) -> None:
        capture = self._capture()
        self.regularizer.on_loss_begin((self.learn.pred, capture.raw_out, capture.out))
        self.learn.loss_grad = self.regularizer.on_backward_begin(self.learn.loss_grad)
        self.count += (size := find_bs(self.learn.yb))
        for name in self.totals:
            self.totals[name] += getattr(self.regularizer, name) * size

    def after_backward(self) -> None:
        if self.regularizer.bptt is not None:
            self.learn._step = self._step  # rather than events: none comes when the step raises

    def _step(self) -> None:
        del self.learn._step
        opt: Any = self.learn.opt  # fastai's, of which only `hypers` can be changed, or a wrapper of PyTorch's
        opt = getattr(opt, "opt", None) or SimpleNamespace(param_groups=opt.hypers)
        with self.regularizer.scaled_lr(opt, self.learn.xb[0].shape[1]):
            self.learn._step()

    def after_batch(self) -> None:
        vars(self.learn).pop("_step", None)  # the step was cancelled

    def before_validate(self) -> None:
        if not self.totals:  # learn.validate() and the like: nothing was trained
            self.after_fit()

    def after_fit(self) -> None:
        self.learn.metrics = self._other_metrics()

    def _capture(self) -> Any:
        for cb in self.learn.cbs:
            if isinstance(cb, stock.RNNCallback):
                return cb
        raise RuntimeError("no RNNCallback captures the activations: add one, or all of rnn_cbs(alpha, beta) instead")

    def _other_metrics(self) -> list[Any]:
        return [metric for metric in self.learn.metrics if metric not in self.columns]

    def _average(self, name: str) -> Any:
        if self.learn is None:  # removed, after a fit that was cut off
            return None
        validation = self.learn.recorder.train_metrics and not self.learn.training  # which has columns of its own
        return None if validation or not self.count else self.totals[name] / self.count


def rnn_cbs(alpha: float = 0.0, beta: float = 0.0, bptt: int | None = None) -> list[Callback]:
    """The callbacks for RNN training, in the place of fastai's `rnn_cbs`; see `RNNRegularizer`."""
    cbs = [stock.ModelResetter(), RNNCallback()]
    return [*cbs, RNNRegularizer(alpha, beta, bptt)] if alpha or beta or bptt is not None else cbs


def fuse(learn: Learner) -> Learner:
    """Swap fastai's `RNNCallback` and `RNNRegularizer` for this module's, in place, and return the learner.

    Coefficients and order stay. Subclasses of them are left alone, and so is what is fused already.

    Raises:
        ValueError: the learner has no `RNNRegularizer`.
    """
    if not any(type(cb) in (stock.RNNRegularizer, RNNRegularizer) for cb in learn.cbs):
        raise ValueError("fuse: the learner has no RNNRegularizer; learn.add_cbs(fastreg.fastai.rnn_cbs(alpha, beta))")
    for i, cb in enumerate(learn.cbs):
        if type(cb) in (stock.RNNCallback, stock.RNNRegularizer):
            fused = RNNCallback() if type(cb) is stock.RNNCallback else RNNRegularizer(cb.alpha, cb.beta)
            learn.add_cb(fused)  # at the end, and as the learner's attribute of its name
            learn.cbs[i], cb.learn = learn.cbs.pop(), None
    return learn
