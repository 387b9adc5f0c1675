"""The penalty in plain, differentiable PyTorch.

The ground truth of every test, and the path where no kernel runs: tracing, function transforms, double backward,
devices without kernels.

Formulas: Merity, McCann and Socher, "Revisiting Activation Regularization for Language RNNs" (2017).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.problem import ARTAR, Call, axes_of, divisors, is_on
from fastreg.torch_state import is_exporting

STEP, CHANGE = 1, 2  # the bits of a mark: whether a step counts, and whether the change into it does


def ar_tar(call: Call) -> ARTAR:
    """Compute the penalty of one layer and its terms, all differentiable.

    Returns:
        `ARTAR(penalty, ar, tar)`, in the dtype of the call.
    """
    (raw, squared), (elements, pairs) = _inputs(call, call.kind.dtype), divisors(call)
    # A sum of a DTensor is the parts of all ranks, which torch 2.8 multiplies by the number that an earlier sum was
    # multiplied by; added to 0 it is whole.
    zero = penalty = torch.zeros((), dtype=call.kind.dtype, device=call.given().device)
    terms: list[Tensor] = []
    for x, coefficient, count, form in (
        (squared, call.alpha, elements, counted),
        (raw, call.beta, pairs, _counted_changes),
    ):
        term = zero
        if x is not None and (call.kind.measured or is_on(coefficient)):
            total = zero + form(x, call).square().sum()
            if is_on(coefficient):
                penalty = penalty + _weighted(total, coefficient, count)
            term = total / count
        terms.append(term)
    return ARTAR(penalty, *terms)


def ar_tar_gradients(grad: Tensor, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of raw and of dropped, themselves differentiable in `grad` and both tensors.

    Args:
        grad: the upstream gradient, 0-dim.
        call: with `None` for a tensor that needs no gradient; where AR is of raw, raw's gradient is that of both terms.

    Returns:
        Two tensors in the dtype of `grad`, `None` where the tensor is.
    """
    (raw, squared), (elements, pairs) = _inputs(call, grad.dtype), divisors(call)
    of_ar = of_tar = None
    if raw is not None and is_on(call.beta):
        factor = grad * (2 * _factor(call.beta, pairs, grad))
        of_tar = counted(factor * change_difference(raw, call), call)
    if squared is not None and is_on(call.alpha):
        of_ar = counted(grad * (2 * _factor(call.alpha, elements, grad)) * counted(squared, call), call)
    return (added(of_tar, of_ar), None) if call.kind.ar_of_raw else (of_tar, of_ar)


def _inputs(call: Call, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return raw, and the tensor that AR is of: raw itself, so that its gradients add up in that dtype, or dropped."""
    raw, dropped = (None if x is None else x.to(dtype) for x in (call.raw, call.dropped))
    return raw, raw if call.kind.ar_of_raw else dropped


def added(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """Add two tensors; `None` is 0."""
    return x if y is None else y if x is None else x + y


def _weighted(total: Tensor, coefficient: Any, count: int | Tensor) -> Tensor:
    """Multiply a sum by its coefficient, over a count; one that is 0 leaves it out, even if it is infinite or NaN."""
    weighted = total * _factor(coefficient, count, total)
    return torch.where(coefficient == 0, 0, weighted) if isinstance(coefficient, Tensor) else weighted


def _factor(coefficient: Any, count: int | Tensor, like: Tensor) -> float | Tensor:
    """Divide a coefficient by a count in the dtype of a tensor.

    It comes before an upstream gradient multiplies the factor: together they may overflow.
    """
    coefficient = coefficient.to(like.dtype) if isinstance(coefficient, Tensor) else coefficient
    return coefficient / (count.to(like.device, like.dtype) if isinstance(count, Tensor) else count)


def _counted_changes(x: Tensor, call: Call) -> Tensor:
    """Compute the changes that count; there may be zeros beside them."""
    if call.steps is None and not is_exporting():
        return x.diff(dim=call.kind.time_dim)  # compiled, this is the formula written by hand; 2 steps compile anew
    return changes(x, call)


def marked(
    shape: tuple[Any, Any], lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the marks and counts of `Steps`, as the `marker` of a backend does."""
    device = next(x.device for x in (lengths, valid, starts) if x is not None)
    step = torch.arange(shape[1], device=device)
    counts = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    if lengths is not None:
        counts = counts & (step < lengths.unsqueeze(-1))
    into = counts & counts.roll(1, 1) & (step > 0)  # a compiler makes a case of its own of a size of 1
    if starts is not None:
        into = into & ~starts
    return counts.to(torch.uint8).add(into, alpha=2), torch.stack([counts.sum(), into.sum()])


def changes(x: Tensor, call: Call) -> Tensor:
    """Compute the change over time that leads to each step, 0 to the first."""
    if call.steps is not None and call.steps.offsets is not None:
        before, _, precedes, _ = neighbours(call.steps.offsets, x.shape[0])
        return torch.where(precedes.to(x.device).unsqueeze(-1), x - x[before.to(x.device)], 0)
    dim, _ = axes_of(x, call.kind.time_dim)
    # A compiler would make a case of its own of 2 steps, as they have 1 difference. (torch 2.11 cannot trace hasattr.)
    if torch.compiler.is_compiling() and getattr(type(x), "__tensor_flatten__", None) is None:
        first = torch.arange(x.shape[dim], device=x.device) == 0
        change = (x - x.roll(1, dim)).masked_fill(first.view(-1, *[1] * (x.dim() - 1 - dim)), 0)
    else:  # no tensor but x, which may be of a subclass that goes with no other, as a DTensor
        first = x[(slice(None),) * dim + (slice(1),)]
        change = torch.cat([torch.zeros_like(first), x.diff(dim=dim)], dim)
    return counted(change, call, CHANGE)


def change_difference(x: Tensor, call: Call) -> Tensor:
    """Subtract from the change that leads to each step the one that leads from it; 0 where there is none."""
    change = changes(x, call)
    if call.steps is not None and call.steps.offsets is not None:
        _, after, _, follows = neighbours(call.steps.offsets, x.shape[0])
        return change - torch.where(follows.to(x.device).unsqueeze(-1), change[after.to(x.device)], 0)
    return change - change.roll(-1, call.kind.time_dim)  # the 0 of the first follows the last


def counted(x: Tensor, call: Call, bit: int = STEP) -> Tensor:
    """Replace steps that do not count by 0, or changes into steps."""
    if call.steps is None or call.steps.marks is None:
        return x
    counts, axes = (call.steps.marks & bit) != 0, axes_of(x, call.kind.time_dim)
    counts = counts if axes[0] > 0 else counts.transpose(0, 1)  # in the order of the axes
    return torch.where(counts.reshape([n if axis in axes else 1 for axis, n in enumerate(x.shape)]), x, 0)


def neighbours(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find, for each packed row, the same sequence's row one time step before and after.

    Returns:
        Both indices, and whether there is such a row, all `(rows,)`: before, after, precedes, follows. Where there is
        none, the index is that of some other row.
    """
    sizes, ends = offsets.diff(), offsets[1:]
    row = torch.arange(rows, device=offsets.device)
    step = torch.searchsorted(ends, row, right=True)
    before = row - sizes[(step - 1).clamp(min=0)]
    after = row + sizes[step]
    follows = after < ends[(step + 1).clamp(max=ends.shape[0] - 1)]
    return before.clamp(min=0), after.clamp(max=rows - 1), step > 0, follows
