"""The records of a call: its arguments, its problem, its layers, its result."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastreg.installation  # noqa: F401 - refuses a package that is mixed up with another
from fastreg.kernels.view import NOTHING, Values

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


# torch 2.8 traces neither a slice, nor a property, nor `_replace` of a named tuple.


class Call(NamedTuple):
    """The arguments of a call, unchanged but for subclasses that only decorate a tensor: see `fused_ar_tar`.

    `time_at` is `batch_first`, a bool, or `time_dim`, an int. `ar_of_raw` asks for AR of raw, as fastai v1 forms it.
    """

    raw: Any
    dropped: Any
    alpha: Any
    beta: Any
    lengths: Any = None
    valid: Any = None
    starts: Any = None
    time_at: Any = True
    reduction: Any = "mean"
    measured: Any = False
    ar_of_raw: bool = False


def kept(call: Call) -> Call:
    """Return the call for a dropout that drops nothing: dropped is raw."""
    options = call.lengths, call.valid, call.starts, call.time_at, call.reduction, call.measured
    return Call(call.raw, call.raw, call.alpha, call.beta, *options)


class Problem(NamedTuple):
    """The terms of a penalty, for any activations.

    alpha, beta  coefficients of AR and TAR; `None` for one that is a tensor
    time_dim     the axis of time, negative from the end: -2 is that of `(batch, time, hidden)` and `(time, hidden)`
    reduction    `"mean"` divides the sums by the counts of their elements, `"sum"` does not divide
    measured     terms are wanted, so that one whose coefficient is 0 is formed, too; it has no gradient
    ar_of_raw    AR is the mean square of raw, as fastai v1 forms it, or because dropped is raw itself
    """

    alpha: float | None
    beta: float | None
    time_dim: int = -2
    reduction: str = "mean"
    measured: bool = False
    ar_of_raw: bool = False

    def with_ar(self) -> bool:
        """Return whether AR is formed."""
        return self.measured or is_on(self.alpha)

    def with_tar(self) -> bool:
        """Return whether TAR is formed."""
        return self.measured or is_on(self.beta)

    def penalized(self) -> Problem:
        """Return the problem of the penalty alone, which its gradient follows from."""
        return Problem(self.alpha, self.beta, self.time_dim, self.reduction, False, self.ar_of_raw)


def time_dim_of(time_at: bool | int) -> int:
    """Return the axis of time, negative from the end, of `batch_first` or of the axis itself."""
    return -2 if time_at is True else int(time_at)


def is_on(coefficient: Coefficient | None) -> bool:
    """Return whether a term is in the penalty: a coefficient that is a tensor, or not known yet, may be anything."""
    if coefficient is None or isinstance(coefficient, Tensor):
        return True
    if not torch.compiler.is_compiling():
        return coefficient != 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # which imports sympy

    return not guard_or_false(coefficient == 0)


class Layer(NamedTuple):
    """One layer's activations, and the values that all layers share.

    raw, dropped  activations with an axis of time, or packed rows, `(rows, hidden)`; `None` where no term reads it
    values        the steps that count, of packed rows where these lie, and coefficients that are tensors
    """

    raw: Tensor | None
    dropped: Tensor | None
    values: Values = NOTHING

    def given(self) -> Tensor:
        """Return raw, or dropped where raw is `None`."""
        return self.raw if self.raw is not None else self.dropped  # pyright: ignore[reportReturnType]


def compute_dtype(*tensors: Any) -> torch.dtype:
    """Return the dtype that squares and sums are formed in: float64 if any tensor is, else float32."""
    for x in tensors:  # a generator expression takes twice as long
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def time_axis(x: Any, problem: Problem) -> int:
    """Return the axis of time, from the front; that of packed rows is the axis of rows."""
    return problem.time_dim % len(x.shape)


def batch_axis(x: Any, problem: Problem) -> int | None:
    """Return the axis of sequences: the first beside time; `None` of `(time, hidden)` and `(time,)`."""
    if time_axis(x, problem) > 0:
        return 0
    return 1 if len(x.shape) > 2 else None


def steps_of(x: Any, problem: Problem) -> tuple[Any, Any]:
    """Return how many sequences and time steps activations have that are not packed."""
    batch = batch_axis(x, problem)
    return 1 if batch is None else x.shape[batch], x.shape[time_axis(x, problem)]


def divisors(layer: Layer, problem: Problem) -> tuple[Any, Any]:
    """Return the divisors of AR and TAR: numbers of elements and of pairs of neighbours in time; 1 and 1 for `"sum"`.

    Neither is ever 0, so that an empty mean is 0 and not NaN. Where not all steps count they are tensors.
    """
    if problem.reduction == "sum":
        return 1, 1
    x, (steps, counts, offsets, _, _) = layer.given(), layer.values
    elements = x.numel()
    if offsets is not None:
        return _at_least_1(elements), _at_least_1(elements - offsets[1] * x.shape[-1])
    time = x.shape[time_axis(x, problem)]
    if steps is not None and counts is not None:
        hidden = 1  # elements of one time step of a sequence
        for axis in range(len(x.shape)):
            if axis not in (time_axis(x, problem), batch_axis(x, problem)):
                hidden = hidden * x.shape[axis]
        of_steps, of_changes = _at_least_1(counts * hidden).unbind()
        return of_steps, of_changes
    time = _at_least_1(time)
    return _at_least_1(elements), _at_least_1(elements // time * (time - 1))


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


def reads_raw(call: Call, problem: Problem) -> bool:
    """Return whether a term reads raw: one whose coefficient is 0 is measured only if its activations are given."""
    return is_on(problem.beta) or (problem.measured and call.raw is not None)


def reads_dropped(call: Call, problem: Problem) -> bool:
    """Return whether a term reads dropped: one whose coefficient is 0 is measured only if its activations are given."""
    return is_on(problem.alpha) or (problem.measured and call.dropped is not None)
