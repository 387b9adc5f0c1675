"""Checks of the model's output that `RNNRegularizer.on_loss_begin` gets."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.problem import TimeAxis, is_list, sizes_of


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
    if is_list(raw) and is_list(dropped) and len(raw) == len(dropped) > 0:
        return all(isinstance(x, (Tensor, PackedSequence)) for x in (*raw, *dropped))
    return all(isinstance(x, (Tensor, PackedSequence)) for x in (raw, dropped))


def check_layout(raw: Any, decoded: Any, time_axis: TimeAxis, is_said: bool) -> str:
    """Guess from the shape of a model's output whether raw is a state, or may be time first.

    Args:
        raw: raw, or a list with raw of each layer.
        decoded: the output of the model.
        time_axis: the axis of time.
        is_said: whether the caller has said which axis is time.

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
    if not is_said and batch != time:
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
    if not is_said:
        raise ValueError(f"batch_first: expected True or False, got None: {words}")
    return words
