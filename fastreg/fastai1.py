"""fastai v1, 1.0.36 to 1.0.61: `RNNTrainer`, with AR and TAR fused.

`fuse(learn)` swaps it into a learner, and `unfuse(learn)` fastai's back. `learn.export()` exports fastai's.

A model that returns its output alone is regularized by the paths of its modules: `fuse(learn, rnn="encoder.lstm",
dropout="dropout")`, or `RNNTrainer` with these arguments.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# fastai v1 and v2 have one name: where one is installed, the other is not.

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from fastreg.output_dropout import OutputDropout, check_fuse, check_learner, link, swappable
from fastreg.paths import Paths, check_marks, check_path
from fastreg.problem import Coefficient
from fastreg.regularizer import RNNRegularizer

try:
    from fastai import __version__
    from fastai.basic_train import Learner, LearnerCallback
    from fastai.callback import CallbackHandler
    from fastai.callbacks import rnn as stock
    from fastai.text.models import LinearDecoder, RNNDropout
except ImportError as error:
    raise ImportError(f"fastreg.fastai1: fastai 1 cannot be imported ({error}); pip install 'fastai<2'") from error

__all__ = ["RNNTrainer", "fuse", "unfuse"]

TIME_AXIS = 1 if tuple(map(int, __version__.split(".")[:3])) >= (1, 0, 38) else 0  # of batches and activations
DICTS = hasattr(CallbackHandler, "_call_and_update")  # hooks return dicts, from 1.0.47 on


class RNNTrainer(LearnerCallback):
    """Add `alpha * AR + beta * TAR` to the loss, pass on the decoded output, and reset the model at each epoch.

    The terms of the last step are `regularizer.ar` and `regularizer.tar`. In a release whose models are time first
    (to 1.0.37) the activations are `(time, batch, hidden)`, else `(batch, time, hidden)`.

    Args:
        learn: the learner, to whose `callbacks` it belongs.
        bptt: the usual number of time steps.
        alpha: coefficient of AR.
        beta: coefficient of TAR.
        adjust: step the optimizer at `lr * seq_len / bptt`; the lr is restored afterwards, also after an error.
        rnn: for a model that returns its output alone, the attribute path in it of an RNN, any module that
            `fastreg.RNNRegularizer.attach` takes.
        dropout: the path of the dropout that takes its output, or `None`.
        output: as for `attach`.
        batch_first: as for `attach`.
        valid: a function of the inputs of the batch that returns the mask of valid time steps, as `fused_ar_tar` takes
            it, or `None` where all steps count.
        starts: a function of the same inputs that returns the mask of the time steps at which segments start, or
            `None`.

    Raises:
        TypeError: an argument has the wrong type; in training without `rnn`, the model does not return
            `(decoded, raw, dropped)`, or has no `reset()`.
        ValueError: an argument has the wrong value, or there is no `bptt` to adjust to.

    Examples:
        >>> learn1.callbacks = [RNNTrainer(learn1, bptt=16, alpha=2.0, beta=1.0)]
        >>> learn1.fit(1)
        >>> bool(learn1.callbacks[0].regularizer.ar > 0)
        True
    """

    _order = -1  # after the recorder (-10), before mixed precision (0, later 999) scales the loss

    def __init__(
        self,
        learn: Learner,
        bptt: int | None,
        alpha: Coefficient = 0.0,
        beta: Coefficient = 0.0,
        adjust: bool = True,
        *,
        rnn: str | None = None,
        dropout: str | None = None,
        output: Callable[[Any], Any] | None = None,
        batch_first: bool | None = None,
        valid: Callable[..., Tensor | None] | None = None,
        starts: Callable[..., Tensor | None] | None = None,
    ) -> None:
        if not isinstance(learn, Learner):
            raise TypeError(f"learn: expected a Learner, got {type(learn).__name__}")
        super().__init__(learn)
        self.not_min = [*getattr(self, "not_min", []), "regularizer", "lrs", "attached", "batch"]
        self.bptt, self.alpha, self.beta, self.adjust = bptt, alpha, beta, adjust
        self.regularizer = RNNRegularizer(alpha, beta, bptt=bptt)
        self.lrs: list[float] | None = None  # while they are scaled
        if adjust and bptt is None:
            raise ValueError("bptt: expected the usual number of time steps to adjust the lr to, or adjust=False")
        check_marks("the batch's inputs", valid=valid, starts=starts)
        check_path(rnn, dropout, output, batch_first)
        self.rnn, self.dropout, self.output = rnn, dropout, output  # which purge() sets anew, after this
        self.batch_first, self.valid, self.starts = batch_first, valid, starts
        self.attached = ExitStack()  # to the modules, during a fit
        self.batch: Any = None
        if hasattr(Learner, "export"):  # set here, as purge() makes callbacks anew and drops all else
            learn.export = partial(_export, weakref.ref(learn))

    @property
    def paths(self) -> Paths | None:
        """Return the paths of the modules whose activations are regularized, or `None` for those in its output."""
        return check_path(self.rnn, self.dropout, self.output, self.batch_first)

    def on_train_begin(self, **_: Any) -> None:
        if any(isinstance(cb, stock.RNNTrainer) for cb in self.learn.callbacks):
            raise ValueError("RNNTrainer: the learner has fastai's own as well; fuse(learn) instead of adding another")
        if sum(isinstance(cb, RNNTrainer) for cb in self.learn.callbacks) > 1:
            raise ValueError("RNNTrainer: the learner has two of them, and the first takes the activations: keep one")
        link(self.learn.model, self.regularizer)
        self.attached.close()  # a fit that was cut off may have left it
        if self.paths is not None:
            marks = partial(self._marks, "valid"), partial(self._marks, "starts")
            self.attached = self.paths.attach(self.regularizer, self.learn.model, *marks)

    def on_epoch_begin(self, **_: Any) -> None:
        if self.paths is None and not hasattr(self.learn.model, "reset"):
            raise TypeError(
                f"{type(self.learn.model).__name__} has no reset(), which RNNTrainer calls at each epoch: give it one "
                "that zeroes the hidden state, even if there is none"
            )
        self.regularizer.on_epoch_begin(self.learn.model)

    def on_batch_begin(self, last_input: Any, **_: Any) -> None:
        self.batch = last_input
        self._set_coefficients()

    def on_loss_begin(self, last_output: Any, train: bool = True, **_: Any) -> Any:
        decoded = last_output
        if self.paths is None:
            options: Any = {name: self._marks(name) if train else None for name in ("valid", "starts")}
            options["batch_first"] = TIME_AXIS == 1
            decoded = self.regularizer.on_loss_begin(last_output, **options)
        if not train:
            self.regularizer.clear()  # no backward follows, which would use the capture
        return {"last_output": decoded} if DICTS else decoded

    def on_backward_begin(self, last_loss: Tensor, **_: Any) -> Any:
        self._set_coefficients()
        loss = self.regularizer.on_backward_begin(last_loss)
        return {"last_loss": loss} if DICTS else loss

    def on_backward_end(self, last_input: Tensor, **_: Any) -> None:
        if self.adjust and self.bptt is not None:
            opt = self.learn.opt
            factor = last_input.shape[TIME_AXIS] / self.bptt
            self.lrs, opt.lr = opt._lr, [lr * factor for lr in opt._lr]  # these lrs also scale the weight decay

    def on_step_end(self, **_: Any) -> None:
        if self.lrs is not None:
            self.learn.opt.lr, self.lrs = self.lrs, None

    def on_train_end(self, **_: Any) -> None:
        self.on_step_end()  # after an error in a step, the lr is still scaled
        self.regularizer.clear()
        self.attached.close()
        self.batch = None
        link(self.learn.model, None)

    def _set_coefficients(self) -> None:
        """Pass on the coefficients, which may have changed."""
        self.regularizer.alpha, self.regularizer.beta = self.alpha, self.beta

    def _marks(self, name: str, *_: Any, **__: Any) -> Tensor | None:
        """Return the valid steps of the batch, or its starts, whatever the arguments of an attached module."""
        inputs = self.batch if isinstance(self.batch, (list, tuple)) else (self.batch,)
        function = getattr(self, name)
        return None if function is None else function(*inputs)


def fuse(
    learn: Learner,
    dropout: bool | str = False,
    *,
    rnn: str | None = None,
    output: Callable[[Any], Any] | None = None,
    batch_first: bool | None = None,
    valid: Callable[..., Tensor | None] | None = None,
    starts: Callable[..., Tensor | None] | None = None,
) -> Learner:
    """Swap fastai's `RNNTrainer` for this module's, in place, and return the learner.

    The new `RNNTrainer` has the coefficients and the position of the old one, and its `adjust` in the releases that
    have it; the lr no longer compounds from step to step. Subclasses, and learners that are fused already, stay
    unchanged.

    Args:
        learn: the learner.
        dropout: also swap a language model's last dropout, the `RNNDropout` of its `LinearDecoder`, for a
            `fastreg.FusedRNNDropout`, which forms the penalty in its own pass. As with fastai v1, AR is of its input.
            With `rnn` the path of the dropout that takes its output.
        rnn: the path of a module, for a model that returns its output alone, as for this module's `RNNTrainer`.
        output: as for `RNNTrainer`.
        batch_first: as for `RNNTrainer`.
        valid: as for `RNNTrainer`, also for a model that returns `(decoded, raw, dropped)`.
        starts: as for `RNNTrainer`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the learner has no `RNNTrainer`, or its model lacks the dropout or the module, or an attribute of
            the dropout or trainer is out of range.

    Examples:
        >>> fuse(learn1).fit(1)
        >>> bool(learn1.callbacks[-1].regularizer.tar > 0)
        True
    """
    path = check_fuse(learn, Learner, dropout, rnn)
    paths = check_path(rnn, path, output, batch_first)
    trainers = [cb for cb in learn.callbacks if isinstance(cb, (stock.RNNTrainer, RNNTrainer))]
    cb = next((cb for cb in trainers if type(cb) in (stock.RNNTrainer, RNNTrainer)), None)
    if cb is None:
        raise ValueError(
            f"fuse: the learner's {type(trainers[0]).__name__} is a subclass of RNNTrainer, and left alone"
            if trainers
            else "fuse: the learner has no RNNTrainer; "
            "learn.callbacks.append(fastreg.fastai1.RNNTrainer(learn, bptt, ...))"
        )
    if paths is not None:
        paths.attach(RNNRegularizer(), learn.model).close()  # a wrong path raises before anything is swapped
    decoders = swappable(learn.model, _decoders(learn), RNNDropout) if dropout is True else []
    named: Any = {"rnn": rnn, "dropout": path, "output": output, "batch_first": batch_first}
    named |= {"valid": valid, "starts": starts}
    options = {"alpha": cb.alpha, "beta": cb.beta, "batch_first": TIME_AXIS == 1, "ar_of": "raw"}
    dropouts = [OutputDropout(decoder.output_dp, **options) for decoder in decoders]
    given = paths is not None or valid is not None or starts is not None
    for i, cb in enumerate(learn.callbacks):
        if type(cb) is stock.RNNTrainer or (given and type(cb) is RNNTrainer):
            bptt, adjust = vars(cb).get("bptt"), vars(cb).get("adjust", False)
            learn.callbacks[i] = RNNTrainer(learn, bptt, cb.alpha, cb.beta, adjust, **named)
    for decoder, new in zip(decoders, dropouts, strict=True):
        decoder.output_dp = new
    return learn


def unfuse(learn: Learner) -> Learner:
    """Undo `fuse`, in place, and return the learner with fastai's callback and dropout.

    The callback keeps the present coefficients and its position; `bptt` and `adjust` are lost in a release whose
    `RNNTrainer` has none. A learner that is not fused stays unchanged.

    Raises:
        TypeError: `learn` is not a learner.

    Examples:
        >>> type(unfuse(fuse(learn1)).callbacks[-1]).__module__
        'fastai.callbacks.rnn'
    """
    check_learner(learn, Learner)
    known = {"bptt", "alpha", "beta", "adjust"} & inspect.signature(stock.RNNTrainer).parameters.keys()
    for i, cb in enumerate(learn.callbacks):
        if type(cb) is RNNTrainer:
            vars(learn).pop(cb.cb_name, None)  # its attribute, which 1.0.36 gives to LearnerCallbacks alone
            learn.callbacks[i] = stock.RNNTrainer(learn, **{name: getattr(cb, name) for name in known})
    for decoder in _decoders(learn):
        if type(decoder.output_dp) is OutputDropout:
            decoder.output_dp = decoder.output_dp.original
    vars(learn).pop("export", None)
    return learn


def _decoders(learn: Learner) -> list[Any]:
    """Return the modules that hold a language model's last dropout."""
    return [module for module in learn.model.modules() if isinstance(module, LinearDecoder)]


def _export(learn: Any, *args: Any, **kwargs: Any) -> Any:
    """Export the learner as `unfuse` leaves it, so that it loads where fastreg is not installed, and fuse it again."""
    learn = learn()
    kind, attributes, callbacks = type(learn), dict(vars(learn)), list(learn.callbacks)
    dropouts = [(decoder, decoder.output_dp) for decoder in _decoders(learn)]
    unfuse(learn)
    try:
        return learn.export(*args, **kwargs)
    finally:
        for decoder, dropout in dropouts:
            decoder.output_dp = dropout
        if type(learn) is kind:  # export(destroy=True) changes the type
            vars(learn).update(attributes, callbacks=callbacks)
