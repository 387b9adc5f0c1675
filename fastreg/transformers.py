"""`RegularizedTrainer`: AR and TAR for `transformers.Trainer` and its subclasses; the model needs no change.

A `Trainer` divides the loss of a batch by the number of batches in the optimizer step, unless the loss is already
normalized by `num_items_in_batch`. The penalty, which is always divided by that number, is added after this division,
just before the backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.adapter import NAMES, NO_LAYOUT, Adapter, comes_first
from fastreg.call.arguments import ValidShapeError, time_axis_of
from fastreg.call.problem import Coefficient, is_list

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
        *args: as for `Trainer`, or the other base class.
        alpha: coefficient of AR; an attribute, which a schedule may change between steps, like `beta`.
        beta: coefficient of TAR.
        rnn: the path of an RNN, or a list of paths, as for `fastreg.adapter.Paths`. Name the last block rather than the
            model, because the model's last hidden state is the output of a norm. If PEFT wraps the model, paths start
            from the model inside.
        **kwargs: as for `Trainer`, or the other base class; and the other arguments of `Paths`. `batch_first` is `True`
            if the module does not show its layout. `valid` and `starts` get the batch, as `training_step`. The default
            of `valid` returns the attention mask of the batch, if it has one; in a list, `True` stands for this
            default. A `Trainer` removes this mask if the model's `forward` has no such
            argument, unless `remove_unused_columns=False`. With `valid=None` all steps count.

    Warns:
        UserWarning: padding counts, because the attention mask of the examples is not in the batch.

    Raises:
        TypeError: an argument, or the result of `valid` or `starts`, has the wrong type.
        ValueError: an argument, or the result of `valid` or `starts`, has the wrong value or shape.
        AttributeError: a path names no module, or another base class sets an attribute `alpha` or `beta`.
        RuntimeError: in a step, as `RNNRegularizer.on_backward_begin`.

    Examples:
        >>> options = {"alpha": 2.0, "beta": 1.0, "rnn": "backbone.layers.1"}  # the last of two blocks
        >>> trainer = RegularizedTrainer(mamba, args, train_dataset=data, **options)
        >>> result = trainer.train()
        >>> result.global_step
        2
    """

    say = staticmethod(log.warning)
    _is_masked: Any = False  # whether an example of this training has an attention mask

    def __init__(
        self, *args: Any, alpha: Coefficient, beta: Coefficient, rnn: str | Sequence[str], **kwargs: Any
    ) -> None:
        # A base class may swallow a misspelt name: one that is nearly ours, and none of its own, is an error.
        of_bases = {name for base in type(self).__mro__ for name in signature(base.__init__).parameters}
        names = [x for x in kwargs if x in NAMES or (x not in of_bases and get_close_matches(x, NAMES, 1, 0.85))]
        options: Any = {"valid": attention_mask} | {name: kwargs.pop(name) for name in names}
        if is_list(options["valid"]):
            options["valid"] = [attention_mask if x is True else x for x in options["valid"]]
        super().__init__(*args, **kwargs)
        # Now, so that it is an error if another class sets alpha or beta.
        self.prepare(alpha, beta, {**options, "rnn": rnn or []})
        self.modules(inner_of(self.model))  # shows a wrong path before any training
        # An override of `training_step` would be lost where a subclass has its own, and does not call it.
        self.training_step = partial(self._regularized_step, self.training_step)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, whose `backward` gets the penalty."""
        super().create_accelerator_and_postprocess()
        self.accelerator.backward = partial(self._regularized_backward, self.accelerator.backward)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; the first step attaches, because a trainer may make the model anew before."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.end()

    def layout_of(self, module: nn.Module) -> dict[str, Any]:
        """Return the layout that is given, or that the module shows, otherwise batch first."""
        shows = [x for x in module.modules() if hasattr(x, "batch_first")]
        return {"batch_first": True} if self.paths.layout() == NO_LAYOUT and not shows else self.paths.layout()

    def mask_of(self, module: nn.Module, mask: Any) -> Any:
        """Return the function of masks; the attention mask is `(batch, time)` also where the module is time first."""
        named = time_axis_of(**self.paths.layout())
        if mask is attention_mask and (comes_first(named) or getattr(module, "batch_first", True) is False):
            return super().mask_of(module, lambda batch: None if mask(batch) is None else mask(batch).T)
        return super().mask_of(module, mask)

    def _takes_attention_mask(self) -> bool:
        """Return whether the attention mask says for some module which time steps count."""
        return any(masks.valid is attention_mask for masks in self.paths.masks())

    def get_train_dataloader(self) -> Any:
        """Return the loader that `Trainer` returns, which warns if the attention masks of examples are lost."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # that Accelerate wraps
        if self._takes_attention_mask() and hasattr(inner, "collate_fn"):
            columns = getattr(self.train_dataset, "column_names", None) or ()
            is_masked = torch.tensor("attention_mask" in columns).share_memory_()  # with the workers
            self._is_masked = is_masked.numpy()  # asked in each step: unlike a tensor, without an operator
            inner.collate_fn = partial(collated, inner.collate_fn, is_masked)
        return loader

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as `Trainer.log` does, with `ar` and `tar` beside the training loss."""
        if "loss" in logs:
            reduce = partial(self.accelerator.reduce, reduction="sum")
            logs = logs | self.means(lambda sums: reduce(sums.to(self.args.device)).tolist())
        super().log(logs, *args, **kwargs)

    def _regularized_step(self, step: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Make a training step, which may be one of a subclass, with the masks of its batch."""
        inner = inner_of(self.model)
        if self._is_masked and attention_mask(inputs) is None:
            self._is_masked = False
            warnings.warn(
                f"RegularizedTrainer: padding counts in AR and TAR, as the batch lacks the attention_mask of its "
                f"examples. A Trainer removes it if the forward of the {type(inner).__name__} does not take it: pass "
                "another valid, or None if all time steps count, or let the forward take the mask",
                stacklevel=3,
            )
        self.begin(inner)
        self.batch = [inputs]
        try:
            return step(model, inputs, *args, **kwargs)
        except ValidShapeError as error:
            if not self._takes_attention_mask():
                raise
            raise ValueError(
                f"{error}. This is the attention_mask of the batch, by default, and it does not fit the output of a "
                "named module: pass valid=, a function of the batch that returns the mask of this output, or None if "
                "all time steps count"
            ) from error

    def _regularized_backward(self, backward: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the penalty to the loss of a backward of the accelerator."""
        parts = self.current_gradient_accumulation_steps
        return backward(self.add_penalty(loss, size=1, parts=parts), *args, **kwargs)


def collated(collate: Callable[[Any], Any], is_masked: Tensor, examples: Any) -> Any:
    """Collate examples as a function does, and note whether one of them has an attention mask."""
    if any(attention_mask(x) is not None for x in examples):
        is_masked.fill_(True)
    return collate(examples)


def inner_of(model: Any) -> Any:
    """Return the model that PEFT wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
