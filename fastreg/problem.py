"""The records of a call, and the facts that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastreg.installation  # noqa: F401 - refuses a package that is mixed up with another
from fastreg.kernels.view import Steps, Terms

Coefficient: TypeAlias = float | Tensor  # of a term: a number, or a 0-dim tensor without a gradient


class ARTAR(NamedTuple):
    """Hold the penalty and its terms: three 0-dim tensors on the activations' device.

    Attributes:
        penalty: `alpha * ar + beta * tar`, differentiable.
        ar: AR without its coefficient, detached.
        tar: TAR without its coefficient, detached.

    Examples:
        >>> raw = torch.tensor([[[0.0], [1.0], [3.0]]])
        >>> penalty, ar, tar = fused_ar_tar(raw, raw, alpha=2.0, beta=1.0, return_terms=True)
        >>> print(f"{penalty:.3f} = 2 * {ar:.3f} + {tar:.3f}")
        9.167 = 2 * 3.333 + 2.500
    """

    penalty: Tensor
    ar: Tensor
    tar: Tensor


class Place(NamedTuple):
    """Where time is: `batch_first`, or the axis of time itself. One of them is `None`."""

    batch_first: bool | None = True
    time_dim: int | None = None

    def axis(self) -> int:
        """Return the axis of time: negative from the end, or from the front if it was given so."""
        return self.time_dim if self.time_dim is not None else -2 if self.batch_first else 0

    def __str__(self) -> str:
        return f"batch_first={self.batch_first}" if self.time_dim is None else f"time_dim={self.time_dim}"


class Options(NamedTuple):
    """The options of a call as they were given: see `fused_ar_tar`.

    `ar_of_raw` asks for AR of raw. With `fills` the forward may fill gradients for the backward; without it no gradient
    is held in between.
    """

    batch_first: Any = None
    time_dim: Any = None
    reduction: Any = "mean"
    measured: Any = False
    ar_of_raw: bool = False
    fills: bool = True


class Kind(NamedTuple):
    """The facts about a layer that its formula depends on beside tensors and coefficients.

    time_dim   the axis of time, negative from the end: -2 is that of `(batch, time, hidden)` and `(time, hidden)`
    reduction  `"mean"` divides the sums by the counts of their elements, `"sum"` does not divide
    measured   terms are wanted, so that one whose coefficient is 0 is computed, too; it has no gradient
    ar_of_raw  AR is the mean square of raw, as fastai v1 computes it, or because dropped is raw itself
    dtype      of differences, squares and sums, and of the penalty
    """

    time_dim: int = -2
    reduction: str = "mean"
    measured: bool = False
    ar_of_raw: bool = False
    dtype: torch.dtype = torch.float32


class Call(NamedTuple):
    """A call of one layer, as the formula and the making of a plan read it.

    raw, dropped  activations of one shape, or packed rows, `(rows, hidden)`; `None` where no term reads it, and dropped
                  is `None` where AR is of raw
    alpha, beta   coefficients of AR and TAR, checked: floats, or 0-dim tensors
    steps         the time steps that count, on the device of the activations, or the place of packed rows; `None`
                  where all steps count
    kind          the other facts
    """

    raw: Any
    dropped: Any
    alpha: Any
    beta: Any
    steps: Steps | None = None
    kind: Kind = Kind()

    def given(self) -> Any:
        """Return raw, or dropped where raw is `None`."""
        return self.dropped if self.raw is None else self.raw


def is_on(coefficient: Coefficient) -> bool:
    """Return whether a term is in the penalty: a coefficient that is a tensor may be anything."""
    if isinstance(coefficient, Tensor):
        return True
    if not torch.compiler.is_compiling():
        return coefficient != 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # which imports sympy

    return not guard_or_false(coefficient == 0)


def compute_dtype(tensors: Iterable[Any]) -> torch.dtype:
    """Return the dtype that squares and sums are formed in: float64 if any tensor is, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def axes_of(x: Any, time_dim: int) -> tuple[int, int | None]:
    """Return the axes of time and of sequences, from the front; that of time of packed rows is the axis of rows.

    The axis of sequences is the first beside time; `None` of `(time, hidden)` and `(time,)`.
    """
    time = time_dim % len(x.shape)
    return time, 0 if time > 0 else 1 if len(x.shape) > 2 else None


def sizes_of(x: Any, time_dim: int) -> tuple[Any, Any]:
    """Return how many sequences and time steps activations have that are not packed."""
    time, batch = axes_of(x, time_dim)
    return 1 if batch is None else x.shape[batch], x.shape[time]


def terms_of(call: Call) -> Terms:
    """Describe the terms of a call to a backend; no extent of its tensors is 0."""
    kind, by_ar, by_tar, counts = call.kind, is_on(call.alpha), is_on(call.beta), call.steps and call.steps.counts
    elements, pairs = divisors(call) if counts is None else (1, 1)
    formed = kind.measured or by_ar, kind.measured or by_tar
    return Terms(kind.dtype, *formed, by_ar, by_tar, kind.ar_of_raw, (int(elements), int(pairs)), kind.measured)


def divisors(call: Call) -> tuple[Any, Any]:
    """Return the divisors of AR and TAR: numbers of elements and of pairs of neighbours in time; 1 and 1 for `"sum"`.

    Neither is ever 0, so that an empty mean is 0 and not NaN. Where not all steps count they are tensors.
    """
    if call.kind.reduction == "sum":
        return 1, 1
    x, steps = call.given(), call.steps
    elements = x.numel()
    if steps is None:
        time = _at_least_1(x.shape[call.kind.time_dim])
        return _at_least_1(elements), _at_least_1(elements // time * (time - 1))
    if steps.offsets is not None:
        return _at_least_1(elements), _at_least_1(elements - steps.offsets[1] * x.shape[-1])
    marks: Any = steps.marks
    of_steps, of_changes = _at_least_1(steps.counts * (elements // _at_least_1(marks.numel()))).unbind()
    return of_steps, of_changes


def _at_least_1(count: Any) -> Any:
    """Take the maximum with 1, without a branch, which traced code would keep as it went."""
    if isinstance(count, Tensor):
        return count.clamp(min=1)
    return max(count, 1) if type(count) is int else torch.sym_max(count, 1)  # which takes ten times as long


def is_list(value: object) -> bool:
    """Return whether `value` is a list or tuple of layers; a `PackedSequence` is a tuple, too, but one tensor."""
    return isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence)


def rows_of(x: Any) -> Tensor:
    """Return the tensor itself, or the rows of a `PackedSequence`."""
    return x.data if isinstance(x, PackedSequence) else x


def layers_of(x: Any) -> Sequence[Any]:
    """Return the tensors of activations, one a layer, or their packed rows; none of `None`."""
    layers = x if is_list(x) else () if x is None else (x,)
    return [layer.data if isinstance(layer, PackedSequence) else layer for layer in layers]  # in one frame


def are_same(raw: Any, dropped: Any) -> tuple[bool, ...]:
    """Return of each layer whether dropped is raw itself."""
    return tuple(map(is_, layers_of(raw), layers_of(dropped)))
