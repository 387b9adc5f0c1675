"""The records of a call, and the facts that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias, TypedDict, TypeGuard

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.kernels.view import Coefficient as Coefficient
from fastreg.kernels.view import Layout

One: TypeAlias = Tensor | PackedSequence  # the activations of a layer


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

    def __radd__(self, other: object) -> NoReturn:
        """Refuse `loss + terms`."""
        raise TypeError("ARTAR: expected its .penalty in a sum, loss + terms.penalty, got the three terms")


class Penalty(NamedTuple):
    """Hold the penalty of a call, and its terms as they were computed, because splitting a tensor takes long.

    Attributes:
        value: the penalty, differentiable, ().
        terms: AR and TAR without their coefficients, detached: by kernels in one tensor, (2,), and by the formula two,
            as PyTorch 2.8 cannot stack DTensors; `None` if the caller does not want them.
    """

    value: Tensor
    terms: Tensor | list[Tensor] | None

    def split(self) -> ARTAR:
        """Return the penalty and its terms as three tensors; the caller must have wanted the terms."""
        terms: Any = self.terms
        return ARTAR(self.value, *terms)

    def stacked(self) -> Tensor:
        """Return the terms in one tensor, (2,); the caller must have wanted them."""
        terms: Any = self.terms
        return terms if isinstance(terms, Tensor) else torch.stack(terms)

    def on(self, device: torch.device) -> Penalty:
        """Return the penalty on a device."""
        if self.value.device == device:
            return self
        terms = None if self.terms is None else _combined(lambda x: x.to(device), self.terms)
        return Penalty(self.value.to(device), terms)


def sum_of(penalties: Sequence[Penalty]) -> Penalty:
    """Add up penalties, which are on one device, and either all have terms or none has."""
    values, terms = zip(*penalties, strict=True)
    return Penalty(reduce(add, values), None if terms[0] is None else reduce(partial(_combined, add), terms))


def _combined(function: Callable[..., Tensor], *terms: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Apply a function to the terms of penalties: at once if each has one tensor, otherwise to AR and to TAR."""
    if all([isinstance(x, Tensor) for x in terms]):
        return function(*terms)
    return [function(*each) for each in zip(*terms, strict=True)]


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
    """Name the options that do not change what a call returns, for the overloads of both operations."""

    batch_first: bool | None
    time_dim: int | None
    lengths: Tensor | None
    valid: Tensor | None
    starts: Tensor | None
    reduction: Literal["mean", "sum"]


class Options(NamedTuple):
    """Hold the options of a call as the caller has given them: see `fused_ar_tar`.

    If `dtype` is `None`, the dtype of the penalty follows from its tensors.
    """

    batch_first: bool | None = None
    time_dim: int | None = None
    reduction: str = "mean"
    return_terms: bool = False
    dtype: torch.dtype | None = None


def names_of(layer: int | None) -> tuple[str, str]:
    """Return the names of raw and dropped in messages, with the number of their layer if they are in a list."""
    at = "" if layer is None else f"[{layer}]"
    return f"raw{at}", f"dropped{at}"


def is_on(coefficient: Coefficient) -> bool:
    """Return whether a term is in the penalty; it is if its coefficient is a tensor, whatever its value."""
    if isinstance(coefficient, Tensor):
        return True
    if not torch.compiler.is_compiling():
        return coefficient != 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # this imports sympy

    return not guard_or_false(coefficient == 0)


def moved(coefficients: Sequence[Coefficient], device: torch.device) -> list[Coefficient]:
    """Return coefficients with those that are tensors on a device."""
    return [x.to(device) if isinstance(x, Tensor) else x for x in coefficients]


def compute_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype in which squares and sums are computed: float64 if any tensor is float64, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def axes_of(x: Tensor | Layout, time_dim: int) -> tuple[int, int | None]:
    """Return the axes of time and of sequences, counted from the front.

    The axis of sequences is the first one beside time, or `None` for `(time, hidden)` and `(time,)`.
    """
    time = time_dim % len(x.shape)
    return time, 0 if time > 0 else 1 if len(x.shape) > 2 else None


def sizes_of(x: Tensor, time_dim: int) -> tuple[int, int]:
    """Return the numbers of sequences and of time steps."""
    time, batch = axes_of(x, time_dim)
    return 1 if batch is None else x.shape[batch], x.shape[time]


def is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Return whether a value is a list or tuple of layers; a `PackedSequence` is a tuple, too, but is one layer."""
    return isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence)


def data_of(x: One) -> Tensor:
    """Return the tensor itself, or the rows of a `PackedSequence`."""
    return x.data if type(x) is not Tensor and isinstance(x, PackedSequence) else x  # pyright: ignore[reportReturnType]


def layers_of(x: object) -> list[Tensor]:
    """Return the tensor or the packed rows of each layer of activations; for `None` there is no layer."""
    layers: Sequence[Any] = x if is_list(x) else () if x is None else (x,)
    return [*map(data_of, layers)]
