"""fastai v1, 1.0.36 to 1.0.61: `RNNTrainer`, with AR and TAR fused; `fuse(learn)` swaps it into a learner."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# fastai v1 and v2 have one name: where one is installed, the other is not.

from __future__ import annotations

from typing import Any

from fastai import __version__
from fastai.basic_train import Learner, LearnerCallback
from fastai.callback import CallbackHandler
from fastai.callbacks import rnn as stock
from torch import Tensor

from fastreg.regularizer import RNNRegularizer

__all__ = ["RNNTrainer", "fuse"]

TIME_AXIS = 1 if tuple(map(int, __version__.split(".")[:3])) >= (1, 0, 38) else 0  # of batches and activations
DICTS = hasattr(CallbackHandler, "_call_and_update")  # hooks return dicts, from 1.0.47 on


class RNNTrainer(LearnerCallback):
    """Resets the model at each epoch, hands on its true output, and adds `alpha * AR + beta * TAR` to the loss.

    The terms of the last step are `regularizer.ar` and `regularizer.tar`. In a release whose models are time first
    (to 1.0.37) the activations are `(time, batch, hidden)`, else `(batch, time, hidden)`.

    Args:
        learn: the learner, to whose `callbacks` it belongs.
        bptt: the usual number of time steps.
        alpha: coefficient of AR.
        beta: coefficient of TAR.
        adjust: step the optimizer with its lr times `seq_len / bptt`; the lr is back as it was after the step, come
            what may.

    Raises:
        TypeError, ValueError: an argument is not as described, or there is no `bptt` to adjust to; while training,
            `TypeError` for a model that returns anything else than `(decoded, raw, dropped)`, or has no `reset()`.
    """

    _order = -1  # after the recorder (-10), before mixed precision (0, later 999) scales the loss

    def __init__(
        self, learn: Learner, bptt: int | None, alpha: float = 0.0, beta: float = 0.0, adjust: bool = True
    ) -> None:
        super().__init__(learn)
        self.not_min = [*getattr(self, "not_min", []), "regularizer", "lrs"]
        self.bptt, self.alpha, self.beta, self.adjust = bptt, alpha, beta, adjust
        self.regularizer = RNNRegularizer(alpha, beta, bptt=bptt)
        self.lrs: list[float] | None = None  # while they are scaled
        if adjust and bptt is None:
            raise ValueError("bptt: expected the usual number of time steps to adjust the lr to, or adjust=False")

    def on_train_begin(self, **_: Any) -> None:
        if any(isinstance(cb, stock.RNNTrainer) for cb in self.learn.callbacks):
            raise ValueError("RNNTrainer: the learner has fastai's own as well; fuse(learn) instead of adding another")

    def on_epoch_begin(self, **_: Any) -> None:
        if not hasattr(self.learn.model, "reset"):
            raise TypeError(
                f"{type(self.learn.model).__name__} has no reset(), which RNNTrainer calls at each epoch: give it one "
                "that zeroes the hidden state, even if there is none"
            )
        self.regularizer.on_epoch_begin(self.learn.model)

    def on_loss_begin(self, last_output: Any, train: bool = True, **_: Any) -> Any:
        regularizer = self.regularizer if train else RNNRegularizer()  # validation captures nothing
        decoded = regularizer.on_loss_begin(last_output)
        if TIME_AXIS == 0:
            regularizer.on_loss_begin(_batch_first(*last_output))
        return {"last_output": decoded} if DICTS else decoded

    def on_backward_begin(self, last_loss: Tensor, **_: Any) -> Any:
        self.regularizer.alpha, self.regularizer.beta = self.alpha, self.beta
        loss = self.regularizer.on_backward_begin(last_loss)
        return {"last_loss": loss} if DICTS else loss

    def on_backward_end(self, last_input: Tensor, **_: Any) -> None:
        if self.adjust and self.bptt is not None:
            opt = self.learn.opt
            factor = last_input.shape[TIME_AXIS] / self.bptt
            self.lrs, opt.lr = opt._lr, [lr * factor for lr in opt._lr]  # fastai's own, which also scale the decay

    def on_step_end(self, **_: Any) -> None:
        if self.lrs is not None:
            self.learn.opt.lr, self.lrs = self.lrs, None

    def on_train_end(self, **_: Any) -> None:
        """However training ended."""
        self.on_step_end()
        self.regularizer.clear()


def _batch_first(decoded: Any, raw: Any, dropped: Any) -> tuple[Any, Any, Any]:
    """The same with the last layers alone, as `(batch, time, hidden)` views; one tensor given twice stays one."""
    last = [x[-1] if isinstance(x, (list, tuple)) else x for x in (raw, dropped)]
    views = {id(x): x.transpose(0, 1) for x in last}
    return decoded, *(views[id(x)] for x in last)


def fuse(learn: Learner) -> Learner:
    """Swap fastai's `RNNTrainer` for this module's, in place, and return the learner.

    Its coefficients and its place stay, and so does `adjust` in the releases that had it, without the lr compounding
    from step to step. Subclasses are left alone, and so is a learner that is fused already.

    Raises:
        ValueError: the learner has no `RNNTrainer`.
    """
    if not any(type(cb) in (stock.RNNTrainer, RNNTrainer) for cb in learn.callbacks):
        raise ValueError(
            "fuse: the learner has no RNNTrainer; learn.callbacks.append(fastreg.fastai1.RNNTrainer(learn, bptt, ...))"
        )
    for i, cb in enumerate(learn.callbacks):
        if type(cb) is stock.RNNTrainer:
            bptt, adjust = vars(cb).get("bptt"), vars(cb).get("adjust", False)
            learn.callbacks[i] = RNNTrainer(learn, bptt, cb.alpha, cb.beta, adjust)
    return learn
