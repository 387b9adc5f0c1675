"""`RegularizedTrainer`: AR and TAR for `transformers.Trainer` and its subclasses; the model needs no change.

A `Trainer` divides the loss of a batch by the number of batches in the optimizer step, unless the loss is already
normalized by `num_items_in_batch`. The penalty, which is always divided by that number, is added after this division,
just before the backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from fastreg.attach.paths import Paths, pairs_of
from fastreg.attach.regularizer import RNNRegularizer
from fastreg.attach.source import Masks
from fastreg.call.arguments import shown
from fastreg.call.problem import Coefficient

try:
    Trainer: Any = import_module("transformers").Trainer
    log: Any = import_module("accelerate.logging").get_logger("transformers.trainer")  # of the first process
except ImportError as error:
    message = "fastreg.transformers: transformers does not work here; pip install transformers accelerate"
    raise ImportError(message) from error


def attention_mask(batch: Any) -> Tensor | None:
    """Return a batch's `"attention_mask"`, if it has one."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


class RegularizedTrainer(Trainer):
    """Train as `Trainer` does, with `alpha * AR + beta * TAR` of the named modules in the backward of each step.

    Combine it with a subclass of `Trainer` by inheriting from both, this class first:
    `class RegularizedSFTTrainer(RegularizedTrainer, SFTTrainer): ...`.

    The penalty of an optimizer step is the mean of the penalties of its batches, over all processes. The reported loss
    does not contain it; `ar` and `tar` are logged beside the loss, as means over the batches since the last log.
    Evaluation and prediction are unchanged.

    Args:
        *args: as for `Trainer`, or the other base class.
        **kwargs: as for `Trainer`, or the other base class.
        alpha: coefficient of AR; a schedule may change `trainer.regularizer.alpha` between steps.
        beta: coefficient of TAR; a schedule may change `trainer.regularizer.beta` between steps.
        rnn: the attribute path of a module in the model, or in the model that PEFT wraps, which may be any module that
            `RNNRegularizer.attach` takes; or a list of paths, from the first layer to the last. Name the last block
            rather than the model, because the model's last hidden state is the output of a norm.
        dropout: the path of the dropout that gets the module's output: one path for all modules, or a list with a path
            or `None` for each module.
        output: as for `RNNRegularizer.attach`.
        batch_first: as for `RNNRegularizer.attach`, but `True` if the layout cannot be read from the module.
        time_dim: the axis of time, instead of batch_first, as for `RNNRegularizer.attach`.
        valid: a function of the batch, as `training_step` gets it, that returns the mask of valid time steps, `(batch,
            time)`, as `fused_ar_tar` takes it, or `None` if all steps count. The default returns the attention mask of
            the batch, if it has one. A `Trainer` removes this mask if the model's `forward` has no such argument,
            unless `remove_unused_columns=False`. If `valid` itself is `None`, all steps count.
        starts: a function of the batch that returns the mask of the time steps at which a segment starts, such as a
            document of a packed row, `(batch, time)`, as `fused_ar_tar` takes it, or `None`.

    Warns:
        UserWarning: padding counts, because the `Trainer` removes the attention mask of the examples; or a training
            step has no penalty, because all named modules are in evaluation. Each warning comes once in a training.

    Raises:
        TypeError: an argument, or the result of `valid` or `starts`, has the wrong type.
        ValueError: an argument, or the result of `valid` or `starts`, has the wrong value or shape, or a path names no
            module.
        RuntimeError: in a step, as `RNNRegularizer.on_backward_begin`; or the loss does not pass through
            `accelerator.backward`.

    Examples:
        >>> options = {"alpha": 2.0, "beta": 1.0, "rnn": "backbone.layers.1"}  # the last of two blocks
        >>> trainer = RegularizedTrainer(mamba, args, train_dataset=data, **options)
        >>> result = trainer.train()
        >>> result.global_step
        2
    """

    @shown('RegularizedTrainer(model, args, alpha=2.0, beta=1.0, rnn="backbone.layers.1")')
    def __init__(
        self,
        *args: Any,
        alpha: Coefficient,
        beta: Coefficient,
        rnn: str | Sequence[str],
        dropout: str | Sequence[str | None] | None = None,
        output: Callable[[Any], Any] | None = None,
        batch_first: bool | None = None,
        time_dim: int | None = None,
        valid: Callable[[Any], Tensor | None] | None = attention_mask,
        starts: Callable[[Any], Tensor | None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.regularizer = RNNRegularizer(alpha, beta)
        self.paths = Paths(pairs_of(rnn, dropout), Masks(valid, starts), output, batch_first, time_dim)
        self._terms = torch.zeros(3)  # the sums of AR and TAR over the batches since the last log, and their number
        super().__init__(*args, **kwargs)
        self._attached().close()  # shows a wrong path before any training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does."""
        self._terms, self.paths.is_warned = torch.zeros(3), False
        self._warn_of_lost_masks()
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Make a training step as `Trainer.training_step` does, with the penalty in its backward."""
        with self._attached(inputs), self._regularized():
            return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as `Trainer.log` does, with `ar` and `tar` beside the training loss."""
        if "loss" in logs:
            # Each process takes part, even if it has added no penalty, because the others wait for it.
            ar, tar, batches = self.accelerator.reduce(self._terms.to(self.args.device), reduction="sum").tolist()
            if batches:
                logs = logs | {"ar": ar / batches, "tar": tar / batches}
            self._terms = torch.zeros(3)
        super().log(logs, *args, **kwargs)

    def _attached(self, batch: Any = None) -> ExitStack:
        """Attach to the modules until the returned stack is closed, with the masks of a batch."""
        return self.paths.attach(self.regularizer, _inner(self.model), lambda: [batch], log.warning, layout=True)

    def _warn_of_lost_masks(self) -> None:
        """Warn if the default `valid` will find no mask, because the `Trainer` removes it from the batches."""
        taken, valid = signature(_inner(self.model).forward).parameters, self.paths.masks.valid
        if valid is not attention_mask or not self.args.remove_unused_columns or "attention_mask" in taken:
            return
        data: Any = self.train_dataset
        example = dict.fromkeys(getattr(data, "column_names", None) or (), True)
        if hasattr(data, "__len__") and not isinstance(data, IterableDataset):  # a stream must not be read
            with torch.random.fork_rng(devices=()):  # because an example may draw random numbers
                example = next(iter(data), None)
        if attention_mask(example) is not None:
            warnings.warn(
                f"RegularizedTrainer: padding counts in AR and TAR, as the forward of {type(self.model).__name__} "
                "takes no attention_mask, and the Trainer removes it from the batches: pass another valid, or None if "
                "all time steps count, or let the forward take the mask",
                stacklevel=3,
            )

    @contextmanager
    def _regularized(self) -> Iterator[None]:
        """Add the penalty to the loss of `accelerator.backward`; sum up the terms."""
        accelerator, backward, passed = self.accelerator, self.accelerator.backward, False

        def regularized_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal passed
            terms, passed = self.regularizer.take(loss), True
            if terms is None:
                self.paths.warn_of_evaluation("RegularizedTrainer")
            else:
                loss = loss + terms.penalty / self.current_gradient_accumulation_steps
                summed = torch.stack([terms.ar, terms.tar, torch.ones_like(terms.ar)])
                self._terms = self._terms.to(summed) + summed
            return backward(loss, *args, **kwargs)

        accelerator.backward = regularized_backward
        try:
            yield
        finally:
            accelerator.backward = backward
        if not passed:
            raise RuntimeError(
                "RegularizedTrainer: the loss did not go through accelerator.backward, where the penalty is added; "
                "use fastreg.RNNRegularizer in compute_loss"
            )


def _inner(model: Any) -> Any:
    """Return the model that PEFT wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
