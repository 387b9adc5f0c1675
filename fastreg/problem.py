"""What is asked for: activations, coefficients, and how the sums are divided."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastreg.kernels.view import Values

Coefficient: TypeAlias = float | Tensor  # of a term: a number, or a 0-dim tensor without a gradient


class ARTAR(NamedTuple):
    """The penalty and its terms: three 0-dim tensors on the activations' device, without a sync.

    `penalty` is `alpha * ar + beta * tar` and differentiable; `ar` and `tar` are unscaled and detached.
    """

    penalty: Tensor
    ar: Tensor
    tar: Tensor


Record = TypeVar("Record", "Problem", "Layer")


def replaced(record: Record, **fields: Any) -> Record:
    """Return a named tuple with other fields, as its `_replace` does.

    torch 2.8 cannot trace `_replace`, nor a slice or a property of a named tuple.
    """
    if not torch.compiler.is_compiling():
        return record._replace(**fields)
    kind = type(record)
    return kind(**{**dict(zip(kind._fields, record, strict=True)), **fields})


class Problem(NamedTuple):
    """What to compute, whatever the activations are.

    alpha, beta  coefficients of AR and TAR; `None` for one that a layer has as a tensor
    batch_first  3-dim activations are `(batch, time, hidden)`, else `(time, batch, hidden)`
    reduction    `"mean"` divides the sums by the counts of their elements, `"sum"` does not divide
    measured     terms are wanted, so that one whose coefficient is 0 is formed, too; it has no gradient
    ar_of_raw    AR is the mean square of raw, as fastai v1 forms it, or because dropped is raw itself
    """

    alpha: float | None
    beta: float | None
    batch_first: bool = True
    reduction: str = "mean"
    measured: bool = False
    ar_of_raw: bool = False

    def of_raw(self) -> Problem:
        """Return the same problem with AR of raw."""
        return replaced(self, ar_of_raw=True)

    def penalized(self) -> Problem:
        """Return the problem of the penalty alone: what its gradient follows from."""
        return replaced(self, measured=False)

    def with_ar(self) -> bool:
        """Tell whether AR is formed."""
        return self.measured or is_on(self.alpha)

    def with_tar(self) -> bool:
        """Tell whether TAR is formed."""
        return self.measured or is_on(self.beta)


def is_on(coefficient: Coefficient | None) -> bool:
    """Tell whether a term is in the penalty: a coefficient that is a tensor, or not known yet, may be anything."""
    if coefficient is None or isinstance(coefficient, Tensor):
        return True
    if not torch.compiler.is_compiling():
        return coefficient != 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # which imports sympy

    return not guard_or_false(coefficient == 0)


class Layer(NamedTuple):
    """One layer's activations, which of their time steps count, and coefficients that are tensors.

    raw, dropped  `(batch, time, hidden)`, `(time, batch, hidden)` or `(time, hidden)`, or packed rows, `(rows,
                  hidden)`; `None` where no term reads it
    lengths       `(batch,)` integers, which count as no less than 0 and no more than all time steps; `None` unless the
                  first steps of each sequence count
    batch_sizes   `(time,)` integers on the CPU, those of a `PackedSequence`; `None` unless packed
    valid         `(batch, time)` bool, which time steps count; `None` unless any may
    marks         what a backend has made of `valid` for its launches, or `None`
    alpha, beta   `()` coefficients in a floating-point dtype; `None` where the problem has the number
    """

    raw: Tensor | None
    dropped: Tensor | None
    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None
    valid: Tensor | None = None
    marks: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None

    def given(self) -> Tensor:
        """Return raw, or dropped where raw is `None`."""
        return self.raw if self.raw is not None else self.dropped  # pyright: ignore[reportReturnType]

    def is_whole(self) -> bool:
        """Tell whether all time steps of all sequences count."""
        return self.lengths is None and self.batch_sizes is None and self.valid is None

    def values(self) -> Values:
        """Return what kernels read beside the activations."""
        return Values(self.lengths, self.batch_sizes, self.valid, self.marks, self.alpha, self.beta)


def compute_dtype(*tensors: Any) -> torch.dtype:
    """Return the dtype that squares and sums are formed in: float64 if any tensor is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def time_dim(x: Any, batch_first: bool) -> int:
    """Return the time axis of a `(batch, time, hidden)`, `(time, batch, hidden)` or `(time, hidden)` tensor."""
    return 1 if len(x.shape) == 3 and batch_first else 0


def divisors(layer: Layer, problem: Problem) -> tuple[Any, Any]:
    """Count what AR and TAR are means over: elements, and pairs of neighbours in time; 1 and 1 for `"sum"`.

    Neither is ever 0, so that an empty mean is 0 and not NaN. For padded and packed sequences they are tensors, on the
    device of what they follow from.
    """
    if problem.reduction == "sum":
        return 1, 1
    shape = layer.given().shape
    elements, hidden = layer.given().numel(), shape[-1]
    if layer.batch_sizes is not None:
        return _at_least_1(elements), _at_least_1(elements - layer.batch_sizes[0] * hidden)
    if layer.valid is not None:
        later = torch.arange(layer.valid.shape[1], device=layer.valid.device) > 0
        pairs = layer.valid & layer.valid.roll(1, 1) & later  # a compiler makes a case of its own of a size of 1
        return _at_least_1(layer.valid.sum() * hidden), _at_least_1(pairs.sum() * hidden)
    time = shape[time_dim(layer.given(), problem.batch_first)]
    if layer.lengths is not None:
        lengths = layer.lengths.long().clamp(0, time)
        return _at_least_1(lengths.sum() * hidden), _at_least_1((lengths - 1).clamp(min=0).sum() * hidden)
    time = _at_least_1(time)
    return _at_least_1(elements), _at_least_1(elements // time * (time - 1))


def _at_least_1(count: Any) -> Any:
    """Take the maximum with 1, without a branch, which traced code would keep as it went."""
    if isinstance(count, Tensor):
        return count.clamp(min=1)
    return max(count, 1) if type(count) is int else torch.sym_max(count, 1)  # which takes ten times as long
