"""The records of a call, and the facts that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Coefficient: TypeAlias = float | Tensor  # a number, or a 0-dim tensor without a gradient


class ARTAR(NamedTuple):
    """Hold the penalty and its terms: three 0-dim tensors on the activations' device.

    Attributes:
        penalty: `alpha * ar + beta * tar`, differentiable: add it to the loss.
        ar: AR without its coefficient. It is detached: no gradient flows through it.
        tar: TAR without its coefficient, detached, too.

    Examples:
        >>> raw = torch.tensor([[[0.0], [1.0], [3.0]]])
        >>> penalty, ar, tar = fused_ar_tar(raw, raw, alpha=2.0, beta=1.0, return_terms=True)
        >>> print(f"{penalty:.3f} = 2 * {ar:.3f} + {tar:.3f}")
        9.167 = 2 * 3.333 + 2.500
    """

    penalty: Tensor
    ar: Tensor
    tar: Tensor


class TimeAxis(NamedTuple):
    """Say which axis is time, either by `batch_first` or by `time_dim`; the other one is `None`."""

    batch_first: bool | None = True
    time_dim: int | None = None

    def number(self) -> int:
        """Return the number of the axis, from the end if it is negative, otherwise from the front."""
        return self.time_dim if self.time_dim is not None else -2 if self.batch_first else 0

    def __str__(self) -> str:
        return f"batch_first={self.batch_first}" if self.time_dim is None else f"time_dim={self.time_dim}"


class Choices(TypedDict, total=False):
    """Name the options of both operations for type checkers."""

    batch_first: bool | None
    time_dim: int | None
    lengths: Tensor | None
    valid: Tensor | None
    starts: Tensor | None
    reduction: Literal["mean", "sum"]


class NoTerms(Choices, total=False):
    """Name the options of a call that returns no terms."""

    return_terms: Literal[False]


class WithTerms(Choices):
    """Name the options of a call that returns its terms."""

    return_terms: Literal[True]


class Options(NamedTuple):
    """Hold the options of a call as the caller has given them: see `fused_ar_tar`.

    With `ar_of_raw` AR is the mean square of raw. With `predicts` the forward may write gradients, which take memory
    until the backward. If `dtype` is `None`, the dtype of the penalty follows from its tensors.
    """

    batch_first: Any = None
    time_dim: Any = None
    reduction: Any = "mean"
    measured: Any = False
    ar_of_raw: bool = False
    predicts: bool = True
    dtype: Any = None


def is_on(coefficient: Coefficient) -> bool:
    """Return whether a term is in the penalty; it is if its coefficient is a tensor, whatever its value."""
    if isinstance(coefficient, Tensor):
        return True
    if not torch.compiler.is_compiling():
        return coefficient != 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # this imports sympy

    return not guard_or_false(coefficient == 0)


def compute_dtype(tensors: Iterable[Any]) -> torch.dtype:
    """Return the dtype in which squares and sums are computed: float64 if any tensor is float64, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def axes_of(x: Any, time_dim: int) -> tuple[int, int | None]:
    """Return the axes of time and of sequences, counted from the front.

    The axis of sequences is the first one beside time, or `None` for `(time, hidden)` and `(time,)`.
    """
    time = time_dim % len(x.shape)
    return time, 0 if time > 0 else 1 if len(x.shape) > 2 else None


def sizes_of(x: Any, time_dim: int) -> tuple[Any, Any]:
    """Return the numbers of sequences and of time steps."""
    time, batch = axes_of(x, time_dim)
    return 1 if batch is None else x.shape[batch], x.shape[time]


def mask_axes_of(x: Any, time_dim: int) -> dict[str, int]:
    """Return the axes of a mask of time steps, counted in `x`, by their names: batch and time, in the order of `x`."""
    time, batch = axes_of(x, time_dim)
    if batch is None:
        return {"time": time}
    return {"time": time, "batch": batch} if time < batch else {"batch": batch, "time": time}


def is_list(value: object) -> bool:
    """Return whether a value is a list or tuple of layers; a `PackedSequence` is a tuple, too, but is one layer."""
    return isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence)


def data_of(x: Any) -> Tensor:
    """Return the tensor itself, or the rows of a `PackedSequence`."""
    return x.data if type(x) is not Tensor and isinstance(x, PackedSequence) else x  # isinstance takes longer


def layers_of(x: Any) -> Sequence[Any]:
    """Return the tensor or the packed rows of each layer of activations; for `None` there is no layer."""
    return [*map(data_of, x if is_list(x) else () if x is None else (x,))]
