"""The penalty in plain, differentiable PyTorch.

All tests compare with it. It also runs where no kernel runs: under tracing and function transforms, in a double
backward, and on devices without kernels.

The formulas are from Merity, McCann and Socher, "Revisiting Activation Regularization for Language RNNs" (2017).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.call.problem import ARTAR, Call, axes_of, divisors
from fastreg.call.torch_state import is_exporting

STEP, CHANGE = 1, 2  # the bits of `Steps`: the step counts, the change into it counts


def ar_tar(call: Call) -> ARTAR:
    """Compute the penalty of one layer and its terms, all differentiable.

    Returns:
        `ARTAR(penalty, ar, tar)`, in the dtype of the call.
    """
    (raw, squared), (elements, pairs) = _activations(call, call.terms.dtype), divisors(call)
    # The sum of a DTensor consists of parts on all ranks. torch 2.8 multiplies these parts by the factor of an earlier
    # sum. Adding the sum to 0 adds its parts up.
    zero = penalty = torch.zeros((), dtype=call.terms.dtype, device=call.present().device)
    terms: list[Tensor] = []
    for x, is_in, coefficient, count, form in (
        (squared, call.terms.by_ar, call.alpha, elements, counted),
        (raw, call.terms.by_tar, call.beta, pairs, _counted_changes),
    ):
        term = zero
        if x is not None and (is_in or call.terms.measured):
            total = zero + form(x, call).square().sum()
            if is_in:
                penalty = penalty + _weighted(total, coefficient, count)
            term = total / count
        terms.append(term)
    return ARTAR(penalty, *terms)


def ar_tar_gradients(grad: Tensor, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of raw and dropped; they can be differentiated in `grad` and in both tensors.

    Args:
        grad: the upstream gradient, 0-dim.
        call: the call, with `None` for a tensor that needs no gradient. If AR is the mean square of raw, the gradient
            of raw has the parts of both terms.

    Returns:
        The two gradients in the dtype of `grad`; each is `None` if its tensor is `None`.
    """
    (raw, squared), (elements, pairs) = _activations(call, grad.dtype), divisors(call)
    of_ar = of_tar = None
    if raw is not None and call.terms.by_tar:
        factor = grad * (2 * _factor(call.beta, pairs, grad))
        of_tar = counted(factor * change_difference(raw, call), call)
    if squared is not None and call.terms.by_ar:
        of_ar = counted(grad * (2 * _factor(call.alpha, elements, grad)) * counted(squared, call), call)
    return (added(of_tar, of_ar), None) if call.terms.ar_of_raw else (of_tar, of_ar)


def _activations(call: Call, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return raw, and the tensor whose mean square is AR: dropped, or raw itself, whose gradients then add up."""
    raw, dropped = (None if x is None else x.to(dtype) for x in (call.raw, call.dropped))
    return raw, raw if call.terms.ar_of_raw else dropped


def added(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """Add two tensors, where `None` stands for 0."""
    return x if y is None else y if x is None else x + y


def _weighted(total: Tensor, coefficient: Any, count: int | Tensor) -> Tensor:
    """Multiply a sum by its coefficient over a count; 0 leaves the sum out, even if it is infinite or NaN."""
    weighted = total * _factor(coefficient, count, total)
    return torch.where(coefficient == 0, 0, weighted) if isinstance(coefficient, Tensor) else weighted


def _factor(coefficient: Any, count: int | Tensor, like: Tensor) -> float | Tensor:
    """Divide a coefficient by a count in the dtype of a tensor.

    Divide before an upstream gradient multiplies the coefficient, because their product may overflow.
    """
    coefficient = coefficient.to(like.dtype) if isinstance(coefficient, Tensor) else coefficient
    return coefficient / (count.to(like.device, like.dtype) if isinstance(count, Tensor) else count)


def _counted_changes(x: Tensor, call: Call) -> Tensor:
    """Compute the changes that count; the result may contain zeros for others."""
    if call.steps is None and not is_exporting():
        return x.diff(dim=call.terms.time_dim)  # the formula written by hand, to a compiler; 2 steps compile again
    return changes(x, call)


def encoded(
    shape: tuple[Any, Any], lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the bits and counts of `Steps`, as the `encoder` of a backend does."""
    device = next(x.device for x in (lengths, valid, starts) if x is not None)
    step = torch.arange(shape[1], device=device)
    counts = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    if lengths is not None:
        counts = counts & (step < lengths.unsqueeze(-1))
    into = counts & counts.roll(1, 1) & (step > 0)  # without slices: a compiler would treat a size of 1 as another case
    if starts is not None:
        into = into & ~starts
    return counts.to(torch.uint8).add(into, alpha=2), torch.stack([counts.sum(), into.sum()])


def changes(x: Tensor, call: Call) -> Tensor:
    """Compute the change into each time step; the change into the first step is 0."""
    if call.steps is not None and call.steps.offsets is not None:
        before, _, precedes, _ = neighbours(call.steps.offsets, x.shape[0])
        return torch.where(precedes.to(x.device).unsqueeze(-1), x - x[before.to(x.device)], 0)
    dim, _ = axes_of(x, call.terms.time_dim)
    # With diff a compiler would treat 2 steps as another case, as they have 1 difference. torch 2.11 cannot trace
    # hasattr.
    if torch.compiler.is_compiling() and getattr(type(x), "__tensor_flatten__", None) is None:
        first = torch.arange(x.shape[dim], device=x.device) == 0
        change = (x - x.roll(1, dim)).masked_fill(first.view(-1, *[1] * (x.dim() - 1 - dim)), 0)
    else:  # only x itself, which may be a DTensor, and these do not mix with other tensors
        first = x[(slice(None),) * dim + (slice(1),)]
        change = torch.cat([torch.zeros_like(first), x.diff(dim=dim)], dim)
    return counted(change, call, CHANGE)


def change_difference(x: Tensor, call: Call) -> Tensor:
    """Compute the change into each time step minus the change out of it; a change that does not exist is 0."""
    change = changes(x, call)
    if call.steps is not None and call.steps.offsets is not None:
        _, after, _, follows = neighbours(call.steps.offsets, x.shape[0])
        return change - torch.where(follows.to(x.device).unsqueeze(-1), change[after.to(x.device)], 0)
    return change - change.roll(-1, call.terms.time_dim)  # behind the last step comes the 0 of the first


def counted(x: Tensor, call: Call, bit: int = STEP) -> Tensor:
    """Replace the steps that do not count by 0; with `CHANGE`, the steps into which the change does not count."""
    if call.steps is None or call.steps.bits is None:
        return x
    counts, axes = (call.steps.bits & bit) != 0, axes_of(x, call.terms.time_dim)
    counts = counts if axes[0] > 0 else counts.transpose(0, 1)  # in the order of x's axes
    return torch.where(counts.reshape([n if axis in axes else 1 for axis, n in enumerate(x.shape)]), x, 0)


def neighbours(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find, for each packed row, the rows of the same sequence one time step before and after it.

    Returns:
        before, after: the indices of these rows, `(rows,)`; if there is no such row, the index of any other row.
        precedes, follows: whether there is such a row, `(rows,)`.
    """
    sizes, ends = offsets.diff(), offsets[1:]
    row = torch.arange(rows, device=offsets.device)
    step = torch.searchsorted(ends, row, right=True)
    before = row - sizes[(step - 1).clamp(min=0)]
    after = row + sizes[step]
    follows = after < ends[(step + 1).clamp(max=ends.shape[0] - 1)]
    return before.clamp(min=0), after.clamp(max=rows - 1), step > 0, follows
