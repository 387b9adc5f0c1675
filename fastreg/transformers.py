"""`RegularizedTrainer`: AR and TAR for `transformers.Trainer` and its subclasses; the model needs no change.

A `Trainer` divides the loss of a batch by the number of batches in the optimizer step, unless the loss is already
normalized by `num_items_in_batch`. The penalty, which is always divided by that number, is added after this division,
just before the backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastreg.adapter import Adapter
from fastreg.attach.paths import Paths, pairs_of
from fastreg.attach.regularizer import RNNRegularizer
from fastreg.attach.source import Masks
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


class RegularizedTrainer(Adapter, Trainer):
    """Train as `Trainer` does, with `alpha * AR + beta * TAR` of the named modules in the backward of each step.

    Combine it with a subclass of `Trainer` by inheriting from both, this class first:
    `class RegularizedSFTTrainer(RegularizedTrainer, SFTTrainer): ...`. A subclass may have its own
    `training_step`, which has to call `self.accelerator.backward`.

    The penalty of an optimizer step is the mean of the penalties of its batches, over all processes. The reported loss
    does not contain it; `ar` and `tar` are logged beside the loss, as means over the batches since the last log.
    Evaluation and prediction are unchanged.

    Args:
        *args, **kwargs: as for `Trainer`, or the other base class.
        alpha: coefficient of AR; an attribute, which a schedule may change between steps, like `beta`.
        beta: coefficient of TAR.
        rnn: the attribute path of a module in the model, or in the model that PEFT wraps, which may be any module that
            `RNNRegularizer.attach` takes; or a list of paths, from the first layer to the last. Name the last block
            rather than the model, because the model's last hidden state is the output of a norm.
        dropout: the path of the dropout that gets the module's output: one path for all modules, or a list with a path
            or `None` for each module.
        output, time_dim: as for `RNNRegularizer.attach`.
        batch_first: as for `RNNRegularizer.attach`, but `True` if the layout cannot be read from the module.
        valid: a function of the batch, as `training_step` gets it, that returns the mask of valid time steps, `(batch,
            time)`, or `None` if all steps count. The default returns the attention mask of the batch, if it has one. A
            `Trainer` removes this mask if the model's `forward` has no such argument, unless
            `remove_unused_columns=False`. If `valid` itself is `None`, all steps count.
        starts: as for `RNNRegularizer.attach`, but a function of the batch.

    Warns:
        UserWarning: padding counts, because the attention mask of the examples is not in the batch; or a training step
            has no penalty, because all named modules are in evaluation. Each warning comes once in a training.

    Raises:
        TypeError: an argument, or the result of `valid` or `starts`, has the wrong type.
        ValueError: an argument, or the result of `valid` or `starts`, has the wrong value or shape, or a path names no
            module.
        AttributeError: another base class has an attribute `alpha` or `beta`.
        RuntimeError: in a step, as `RNNRegularizer.on_backward_begin`; or the loss does not pass through
            `accelerator.backward`.

    Examples:
        >>> options = {"alpha": 2.0, "beta": 1.0, "rnn": "backbone.layers.1"}  # the last of two blocks
        >>> trainer = RegularizedTrainer(mamba, args, train_dataset=data, **options)
        >>> result = trainer.train()
        >>> result.global_step
        2
    """

    _is_masked: Any = False  # whether an example of this training has an attention mask

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
        self.paths = Paths(pairs_of(rnn, dropout), Masks(valid, starts), output, batch_first, time_dim)
        regularizer = RNNRegularizer(alpha, beta)
        super().__init__(*args, **kwargs)
        self.begin(regularizer, self.paths)  # now, so that it is an error if another class sets alpha or beta
        self._attached().close()  # shows a wrong path before any training
        # An override of `training_step` would be lost where a subclass has its own, and does not call it.
        self.training_step = partial(self._regularized_step, self.training_step)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does."""
        self.begin(self.regularizer, self.paths)
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the loader that `Trainer` returns, which warns if the attention masks of examples are lost."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # that Accelerate wraps
        if self.paths.masks.valid is attention_mask and hasattr(inner, "collate_fn"):
            columns = getattr(self.train_dataset, "column_names", None) or ()
            self._is_masked = torch.tensor("attention_mask" in columns).share_memory_()  # with the workers
            inner.collate_fn = partial(_collated, inner.collate_fn, self._is_masked)
        return loader

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as `Trainer.log` does, with `ar` and `tar` beside the training loss."""
        if "loss" in logs:
            reduce = partial(self.accelerator.reduce, reduction="sum")
            logs = logs | self.means(lambda sums: reduce(sums.to(self.args.device)).tolist())
        super().log(logs, *args, **kwargs)

    def _attached(self, batch: Any = None) -> ExitStack:
        """Attach to the modules until the returned stack is closed, with the masks of a batch."""
        return self.paths.attach(self.regularizer, _inner(self.model), lambda: [batch], log.warning, layout=True)

    def _regularized_step(self, step: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Make a training step, which may be one of a subclass, with the penalty in its backward."""
        if self._is_masked and attention_mask(inputs) is None:
            self._is_masked = False
            warnings.warn(
                f"RegularizedTrainer: padding counts in AR and TAR, as the batch lacks the attention_mask of its "
                f"examples. A Trainer removes it if the forward of the {type(_inner(self.model)).__name__} does not "
                "take it: pass another valid, or None if all time steps count, or let the forward take the mask",
                stacklevel=3,
            )
        with self._attached(inputs), self._regularized():
            return step(model, inputs, *args, **kwargs)

    @contextmanager
    def _regularized(self) -> Iterator[None]:
        """Add the penalty to the loss of `accelerator.backward`; sum up the terms."""
        accelerator, backward, passed = self.accelerator, self.accelerator.backward, False

        def regularized_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal passed
            penalty, passed = self.penalty_of(loss, "RegularizedTrainer"), True
            if penalty is not None:
                loss = loss + penalty / self.current_gradient_accumulation_steps
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


def _collated(collate: Callable[[Any], Any], is_masked: Tensor, examples: Any) -> Any:
    """Collate examples as a function does, and note whether one of them has an attention mask."""
    if any(attention_mask(x) is not None for x in examples):
        is_masked.fill_(True)
    return collate(examples)


def _inner(model: Any) -> Any:
    """Return the model that PEFT wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
