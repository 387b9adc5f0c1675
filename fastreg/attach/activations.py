"""`Capture`, the activations in a model's output; checks of such an output; and what the axes of raw are taken for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.penalty import penalize
from fastreg.call.problem import (
    Options,
    Penalty,
    TimeAxis,
    axes_of,
    data_of,
    is_list,
    layers_of,
    moved,
    sizes_of,
    sum_of,
)
from fastreg.call.steps import GivenSteps

MASKED = {"valid": "only valid steps count", "starts": "changes into starts do not count"}


class Capture(NamedTuple):
    """Hold the activations in a model's output, until a loss takes their penalty.

    raw, dropped   the activations: a tensor, a `PackedSequence`, or a list with one for each layer
    time_axis      the axis of time
    steps          the steps that count, or `None` if all do
    """

    raw: Any
    dropped: Any
    time_axis: TimeAxis
    steps: GivenSteps | None

    def needs_gradient(self) -> bool:
        """Return whether any layer of raw or dropped needs a gradient."""
        return any(x.requires_grad for x in (*layers_of(self.raw), *layers_of(self.dropped)))

    def penalty(self, coefficients: Sequence[Any], device: torch.device) -> tuple[Penalty, tuple[int, int]]:
        """Return the penalty, on a device, and the numbers of time steps and of sequences.

        Raises:
            TypeError, ValueError: as `fused_ar_tar`.
        """
        layers = [*zip(self.raw, self.dropped, strict=True)] if is_list(self.raw) else [(self.raw, self.dropped)]
        if len({data_of(raw).device for raw, _ in layers}) == 1:
            layers = [(self.raw, self.dropped)]
        penalties: list[Penalty] = []
        for pair in layers:  # one, or those of a model whose layers are on several devices
            given = moved(coefficients, layers_of(pair[0])[0].device)
            penalties.append(penalize(pair, given, self.steps, Options(*self.time_axis, return_terms=True)).on(device))
        first: Any = self.raw[0] if is_list(self.raw) else self.raw
        return sum_of(penalties), lengths_of(first, self.time_axis)


def check_output(output: Any) -> Any:
    """Check that a model returned `(decoded, raw, dropped)`, and return it.

    Raises:
        TypeError: the output is something else.
    """
    if is_list(output) and len(output) == 3 and _are_activations(*output[1:]):
        return output
    came = type(output).__name__
    if is_list(output) and output:
        came += " of " + ", ".join(type(x).__name__ + (f" of {len(x)}" if is_list(x) else "") for x in output)
    raise TypeError(
        "on_loss_begin: expected (decoded, raw, dropped), where raw and dropped are tensors, or lists with a tensor "
        f"for each layer; got {came}. Let the model return (decoded, raw, dropped), or do not change it, and call "
        "attach(rnn, dropout) once instead of on_loss_begin"
    )


def _are_activations(raw: Any, dropped: Any) -> bool:
    """Return whether raw and dropped are two tensors, or two lists with the same number of layers."""
    if not (is_list(raw) and is_list(dropped)):
        raw, dropped = [raw], [dropped]
    return len(raw) == len(dropped) > 0 and all([isinstance(x, (Tensor, PackedSequence)) for x in (*raw, *dropped)])


def check_layout(raw: Any, decoded: Any, time_axis: TimeAxis, is_given: bool) -> str:
    """Guess from the shape of a model's output whether raw is a state, or may be time first.

    Args:
        raw: raw, or a list with raw of each layer.
        decoded: the output of the model.
        time_axis: the axis of time.
        is_given: whether the caller has said which axis is time.

    Returns:
        The words of a warning that raw may be a state; otherwise an empty string.

    Raises:
        ValueError: the caller has to say which axis is time.
    """
    shape: Any = tuple(getattr(decoded, "shape", ()))
    first = raw[0] if is_list(raw) else raw
    if not isinstance(first, Tensor) or first.is_nested or first.dim() != 3:
        return ""
    of_raw, (batch, time) = tuple(first.shape), first.shape[:2]
    if not is_given and batch != time:
        # Time may come first if there is one row for each sequence, as in a classifier, or if there are scores for each
        # time step: (time, batch, classes), as a CTC loss takes them, or (batch, classes, time), as cross_entropy does.
        rows = len(shape) == 2 and shape[0] == time and batch != 1
        scores = len(shape) == 3 and (time, batch) in (shape[:2], shape[::2])
        if rows or scores:
            raise ValueError(f"batch_first: expected True or False, as raw is {of_raw} and decoded {shape}, got None")
    batch, _ = sizes_of(first, time_axis.number())
    if len(shape) != 3 or not all([size != batch for size in shape]):
        return ""
    words = (
        f"raw is {of_raw}, and no axis of decoded, {shape}, has the size of its batch, {batch}. Pass the RNN's output "
        "before and after dropout, and not its states h and c"
    )
    if not is_given:
        raise ValueError(f"batch_first: expected True or False, got None: {words}")
    return words


def lengths_of(raw: Tensor | PackedSequence, time_axis: TimeAxis) -> tuple[int, int]:
    """Return the number of time steps of raw, of the longest of packed sequences, and the number of sequences."""
    if isinstance(raw, PackedSequence):
        return len(raw.batch_sizes), int(raw.batch_sizes[0])
    batch, time = sizes_of(raw, time_axis.number())
    return time, batch


def described(raw: Tensor | PackedSequence, time_axis: TimeAxis, masks: Mapping[str, Tensor]) -> str:
    """Say which axes of raw were taken for what, and which time steps count."""
    rows = data_of(raw)
    shape = (*rows.shape,)
    if isinstance(raw, PackedSequence):
        sequences = f"{raw.batch_sizes[0]} packed sequences of up to {len(raw.batch_sizes)} time steps"
        return f"raw {shape} as {sequences}, hidden {shape[-1]}; every step counts"
    time, batch = axes_of(rows, time_axis.number())
    names = {time: "time", batch: "batch"}
    axes = ", ".join([f"{names.get(i, 'hidden')} {size}" for i, size in enumerate(shape)])
    steps = "; ".join([f"{name} {(*mask.shape,)}: {MASKED[name]}" for name, mask in masks.items()])
    return f"raw {shape} as {axes}; {steps or 'no mask: every step counts'}"
