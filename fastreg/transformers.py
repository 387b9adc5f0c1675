"""`RegularizedTrainer`: AR and TAR for `transformers.Trainer` and its subclasses; the model needs no change.

A `Trainer` divides the loss of a batch by the number of batches in the optimizer step, unless the loss is already
normalized by `num_items_in_batch`. The penalty is added after this division, just before the backward. Its weight is
the batch's share of the valid time steps of the optimizer step.
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

from fastreg.attach.paths import Paths, pairs_of
from fastreg.attach.regularizer import RNNRegularizer
from fastreg.attach.source import Masks
from fastreg.call.arguments import shown
from fastreg.call.problem import Coefficient, is_on
from fastreg.call.reference import encoded

try:
    Trainer: Any = import_module("transformers").Trainer
    find_batch_size: Any = import_module("transformers.trainer_pt_utils").find_batch_size
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

    AR and TAR of an optimizer step are means over all valid time steps of its batches, for any number of accumulated
    batches, and with `average_tokens_across_devices` for any number of processes. Batches without masks are weighted by
    their numbers of examples, whatever their lengths. The reported loss does not contain the penalty; `ar` and `tar`
    are logged beside it, as means over the optimizer steps since the last log. Evaluation and prediction are unchanged.

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
        valid: a function of the batch, as `training_step` gets it, that returns the mask of valid time steps, `(batch,
            time)`, as `fused_ar_tar` takes it, or `None` if all steps count. The default returns the attention mask of
            the batch, if it has one. A `Trainer` removes this mask if the model's `forward` has no such argument,
            unless `remove_unused_columns=False`. If `valid` itself is `None`, all steps count.
        starts: a function of the batch that returns the mask of the time steps at which a segment starts, such as a
            document of a packed row, `(batch, time)`, as `fused_ar_tar` takes it, or `None`.

    Warns:
        UserWarning: padding counts, because the `Trainer` removes the attention mask of the examples.

    Raises:
        TypeError: an argument, or the result of `valid`, has the wrong type.
        ValueError: an argument, or the result of `valid`, has the wrong value or shape, or a path names no module.
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
        valid: Callable[[Any], Tensor | None] | None = attention_mask,
        starts: Callable[[Any], Tensor | None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.regularizer = RNNRegularizer(alpha, beta)
        self.paths = Paths(pairs_of(rnn, dropout), Masks(valid, starts), output, batch_first)
        self._total: Tensor | None = None  # the size of the optimizer step, unless it has one batch
        self._sums: list[Any] = [0] * 4  # sums since the last log: AR and TAR by their shares, and the shares
        super().__init__(*args, **kwargs)
        self._attached().close()  # shows a wrong path before any training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does."""
        self._sums = [0] * 4
        self._warn_of_lost_masks()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._total = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Fetch the batches of an optimizer step as `Trainer.get_batch_samples` does, and count their valid steps."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        over_processes = self.args.average_tokens_across_devices and self.args.world_size > 1
        self._total = self._size_of(batches) if over_processes or len(batches) > 1 else None
        if over_processes:  # the mean, as gradients are averaged over the processes
            self._total = self.accelerator.reduce(self._total, reduction="mean")
        return batches, items

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Make a training step as `Trainer.training_step` does, with the penalty in its backward."""
        with self._attached(inputs), self._regularized(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as `Trainer.log` does, with `ar` and `tar` beside the training loss."""
        if "loss" in logs:
            own = [torch.as_tensor(x, dtype=torch.float32, device=self.args.device) for x in self._sums]
            # Each process takes part, even if it has added no penalty, because the others wait for it.
            sums = self.accelerator.reduce(torch.stack(own), reduction="sum")
            if sums.any():
                ar, tar = (sums[:2] / sums[2:].clamp(min=1e-30)).tolist()  # 0 if there are no pairs of steps
                logs = logs | {"ar": ar, "tar": tar}
            self._sums = [0] * 4
        super().log(logs, *args, **kwargs)

    def _attached(self, batch: Any = None) -> ExitStack:
        """Attach to the modules until the returned stack is closed, with the masks of a batch."""
        paths = self.paths.with_batch(lambda: [batch])
        return paths.attach(self.regularizer, _inner(self.model), log.warning, layout=True)

    def _warn_of_lost_masks(self) -> None:
        """Warn if the default `valid` will find no mask, because the `Trainer` removes it from the batches."""
        taken, valid = signature(_inner(self.model).forward).parameters, self.paths.masks.valid
        if valid is not attention_mask or not self.args.remove_unused_columns or "attention_mask" in taken:
            return
        data: Any = self.train_dataset
        columns = dict.fromkeys(getattr(data, "column_names", None) or (), True)  # of a stream, which must not be read
        if attention_mask(next(iter(data), None) if hasattr(data, "__len__") else columns) is not None:
            warnings.warn(
                f"RegularizedTrainer: padding counts in AR and TAR, as the forward of {type(self.model).__name__} "
                "takes no attention_mask, and the Trainer removes it from the batches: pass another valid, or None if "
                "all time steps count, or let the forward take the mask",
                stacklevel=3,
            )

    @contextmanager
    def _regularized(self, batch: Any) -> Iterator[None]:
        """Add the penalty, weighted by the batch's shares, to the loss of `accelerator.backward`; sum up the terms."""
        regularizer: Any = self.regularizer
        accelerator, shares = self.accelerator, self._shares_of(batch)
        own = vars(accelerator).get("backward")  # another wrapper may have made it an attribute
        coefficients, backward, passed = (regularizer.alpha, regularizer.beta), accelerator.backward, False

        def regularized_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal passed
            total, passed = regularizer.on_backward_begin(loss), True
            if total is not loss:  # else the modules are in evaluation
                # The terms are on the device of the loss.
                ar, tar = regularizer.ar.to(self.args.device), regularizer.tar.to(self.args.device)
                weighed = [ar * shares[0], tar * shares[1], *shares]
                self._sums = [x + y for x, y in zip(self._sums, weighed, strict=True)]
            return backward(total, *args, **kwargs)

        weighed = (x * share if is_on(x) else x for x, share in zip(coefficients, shares, strict=True))
        regularizer.alpha, regularizer.beta = weighed
        accelerator.backward = regularized_backward
        try:
            yield
        finally:
            if own is None:
                del accelerator.backward
            else:
                accelerator.backward = own
            regularizer.alpha, regularizer.beta = coefficients
        if not passed:
            raise RuntimeError(
                "RegularizedTrainer: the loss did not go through accelerator.backward, where the penalty is added; "
                "use fastreg.RNNRegularizer in compute_loss"
            )

    def _shares_of(self, batch: Any) -> Any:
        """Return the shares of a batch in AR and in TAR of the optimizer step."""
        if self._total is None:
            return (1 / getattr(self, "current_gradient_accumulation_steps", 1),) * 2
        return self._size_of([batch]) / self._total.clamp(min=1)

    def _size_of(self, batches: list[Any]) -> Tensor:
        """Count valid steps and pairs of valid neighbours in batches, or examples for both: `(2,)`."""
        masks = [self.paths.masks.of(batch) for batch in batches]
        for name in ("valid", "starts"):
            count = sum(found[name] is not None for found in masks)
            if 0 < count < len(batches):
                raise ValueError(
                    f"{name}: expected a mask for each batch of an optimizer step, or for none, "
                    f"got {count} for {len(batches)} batches"
                )
        device = self.args.device
        sizes = [_count(batch, found, device) for batch, found in zip(batches, masks, strict=True)]
        return sum(sizes, torch.zeros(2, device=device))


def _count(batch: Any, masks: dict[str, Any], device: torch.device) -> Tensor:
    """Count the valid steps of a batch and its pairs of valid neighbours, or its examples for both: `(2,)`."""
    for name, x in masks.items():
        if x is not None and x.dim() == 0:
            raise ValueError(f"{name}: expected a mask of (batch, time), got a tensor without axes")
    given = {name: x.to(device).bool().reshape(-1, x.shape[-1]) for name, x in masks.items() if x is not None}
    if not given:
        return torch.tensor([find_batch_size(batch) or 1] * 2, device=device)
    _, counts = encoded(next(iter(given.values())).shape, None, given.get("valid"), given.get("starts"))
    return counts


def _inner(model: Any) -> Any:
    """Return the model that PEFT wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
