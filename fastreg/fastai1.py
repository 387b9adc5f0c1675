"""fastai v1, 1.0.38 to 1.0.61: `RNNTrainer`, with AR and TAR fused; `fuse(learn)` swaps it into a learner.

If a model returns only its output, name the paths of its modules: `fuse(learn, rnn="encoder.lstm", dropout="dropout")`,
or pass these arguments to `RNNTrainer`.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
# fastai v1 and v2 have the same name, so only one of them is installed.

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor

from fastreg.adapter import Adapter
from fastreg.attach.regularizer import reset_of
from fastreg.call.problem import Coefficient, is_list

try:
    from fastai import __version__
    from fastai.basic_train import Learner, LearnerCallback
    from fastai.callback import CallbackHandler
    from fastai.callbacks import rnn as stock
    from fastai.callbacks.fp16 import MixedPrecision
except ImportError as error:
    raise ImportError(f"fastreg.fastai1: fastai 1 cannot be imported ({error}); pip install 'fastai<2'") from error

if tuple(map(int, __version__.split(".")[:3])) < (1, 0, 38):
    raise ImportError(
        f"fastreg.fastai1: expected fastai 1.0.38 or newer, whose models are batch first, got {__version__}"
    )

__all__ = ["RNNTrainer", "fuse"]

DICTS = hasattr(CallbackHandler, "_call_and_update")  # from 1.0.47 on events take dicts, before that the value itself


def answer(name: str, value: Any) -> Any:
    """Return a new value of an argument in the form in which an event of fastai takes it."""
    return {name: value} if DICTS else value


def is_of_awd_lstm(output: Any) -> bool:
    """Return whether a model returned `(decoded, raw, dropped)`, with lists of as many tensors."""
    if not (is_list(output) and len(output) == 3 and is_list(output[1]) and is_list(output[2])):
        return False
    return len(output[1]) == len(output[2]) and all(isinstance(x, Tensor) for x in (*output[1], *output[2]))


class RNNTrainer(Adapter, LearnerCallback):
    """Add `alpha * AR + beta * TAR` to the loss, pass on the decoded output, and reset the model at each epoch.

    `ar` and `tar` are the terms of the last step.

    Args:
        learn: the learner whose `callbacks` will contain this callback.
        bptt: the usual number of time steps.
        alpha: coefficient of AR; an attribute, which may change between batches, like `beta` and `bptt`. With `rnn`
            one of the coefficients is required.
        beta: coefficient of TAR.
        adjust: whether the optimizer steps at `lr * time / bptt`, where `time` is the length of the batch's first input
            if that is two-dimensional and of indices, and otherwise the number of time steps of raw; lr is restored
            afterwards, also after an error. Of indices, time is the axis that is not raw's batch, or else the second
            one. If the first input has other integers, such as categories, pass False, and use
            `RNNRegularizer.scaled_lr`.
        layers: which layers count if the model returns lists with a tensor for each layer, as AWD-LSTM does: `"last"`,
            like `None`, or `"all"`, whose penalties add up. It cannot be given together with `rnn`.
        **options: as for `fastreg.adapter.Paths`; `valid` and `starts` get the inputs of the batch.

    Raises:
        TypeError: an argument has the wrong type; in training without `rnn`, the model does not return
            `(decoded, raw, dropped)`.
        ValueError: an argument has the wrong value, or there is no `bptt` to adjust to; when a fit begins, the learner
            has another regularizer; in training, the activations may be time first.
        AttributeError: when a fit begins, a path names no module.

    Examples:
        >>> learn1.callbacks = [RNNTrainer(learn1, bptt=16, alpha=2.0, beta=1.0)]
        >>> learn1.fit(1)
        >>> bool(learn1.callbacks[0].ar > 0)
        True
    """

    # This is fastai's order, but the mixed precision of early releases has it, too, and has to scale the loss later.
    _order = 0 if MixedPrecision._order > 0 else -1

    def __init__(
        self,
        learn: Learner,
        bptt: int | None,
        alpha: Coefficient | None = None,
        beta: Coefficient | None = None,
        adjust: bool = True,
        layers: Literal["last", "all"] | None = None,
        **options: Any,
    ) -> None:
        if adjust and bptt is None:
            raise ValueError("bptt: expected the usual number of time steps to adjust the lr to, or adjust=False")
        self.prepare(alpha, beta, options, bptt, layers)
        LearnerCallback.__init__(self, learn)
        self.adjust = adjust

    def on_train_begin(self, pbar: Any = None, **_: Any) -> None:
        if pbar is None:  # learn.validate(), within a fit or not, begins with this event, too, and never ends
            return
        if sum(isinstance(cb, (stock.RNNTrainer, RNNTrainer)) for cb in self.learn.callbacks) > 1:
            raise ValueError("RNNTrainer: the learner has more than one, fastai's or this module's; keep one")
        self.start(self.learn.model)

    def on_epoch_begin(self, **_: Any) -> None:
        if reset_of(self.learn.model):
            self.regularizer.on_epoch_begin(self.learn.model)

    def on_batch_begin(self, last_input: Any, train: bool = True, **_: Any) -> None:
        if train:
            self.begin(self.learn.model)
            self.batch = last_input

    def on_loss_begin(self, last_output: Any, last_input: Any, train: bool = True, **_: Any) -> Any:
        if self.paths.rnn is not None:
            return answer("last_output", last_output[0]) if is_of_awd_lstm(last_output) else None
        if train:
            self.batch = last_input  # which a later callback may have changed since on_batch_begin
            self.capture(last_output)
        return answer("last_output", last_output[0])

    def on_backward_begin(self, last_loss: Tensor, **_: Any) -> Any:
        return answer("last_loss", self.add_penalty(last_loss))

    def on_backward_end(self, **_: Any) -> None:
        if self.adjust:
            opt = self.learn.opt
            self.scale(lambda: opt._lr, partial(setattr, opt, "lr"))  # which also scales the weight decay

    def on_step_end(self, **_: Any) -> None:
        self.scaled.close()

    def on_train_end(self, **_: Any) -> None:  # fastai calls it after an error, too
        self.end()

    def get_state(self, minimal: bool = True) -> dict[str, Any]:
        """Return the attributes from which `Learner.purge` and `load_learner` make the callback again."""
        kept = {name: getattr(self, name) for name in ("bptt", "alpha", "beta", "adjust", "paths")}
        return kept | {"layers": self.regularizer.layers}


def fuse(learn: Learner, **options: Any) -> Learner:
    """Swap fastai's `RNNTrainer` for this module's, in place, and return the learner.

    The new `RNNTrainer` has the coefficients and the position of the old one, and its `adjust` if the release has it. A
    learner that is fused already is fused again, with the arguments of this call. Subclasses stay unchanged. After an
    error nothing is swapped.

    Args:
        learn: the learner.
        **options: as for `fastreg.adapter.Paths`; and `layers`, as for `RNNTrainer`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the learner has no `RNNTrainer`, or a value is wrong.
        AttributeError: a path names no module.

    Examples:
        >>> fuse(learn1).fit(1)
        >>> bool(learn1.callbacks[-1].tar > 0)
        True
    """
    if not isinstance(learn, Learner):
        raise TypeError(f"learn: expected a Learner, got {type(learn).__name__}")
    old = next((cb for cb in learn.callbacks if type(cb) in (stock.RNNTrainer, RNNTrainer)), None)
    if old is None:
        raise ValueError(
            "fuse: the learner has no RNNTrainer of fastai's own class; add one by "
            "learn.callbacks.append(fastreg.fastai1.RNNTrainer(learn, bptt, ...))"
        )
    kept = getattr(old, "bptt", None), old.alpha, old.beta, getattr(old, "adjust", False)
    new = RNNTrainer(learn, *kept, **options)
    new.modules(learn.model)
    if isinstance(old, RNNTrainer):
        old.end()  # of a fit that was cut off
    learn.callbacks[learn.callbacks.index(old)] = new
    return learn
