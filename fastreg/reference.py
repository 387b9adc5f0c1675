"""The penalty in plain, differentiable PyTorch.

The ground truth of every test, and the path where no kernel runs: tracing, function transforms, double backward,
devices without kernels.

Formulas: Merity, McCann and Socher, "Revisiting Activation Regularization for Language RNNs" (2017).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.problem import ARTAR, Layer, Problem, batch_axis, compute_dtype, divisors, is_on, time_axis
from fastreg.torch_state import is_exporting

STEP, CHANGE = 1, 2  # the bits of steps: whether a step counts, and whether the change into it does


def ar_tar(layer: Layer, problem: Problem) -> ARTAR:
    """Compute the penalty of one layer and its terms, all differentiable.

    Returns:
        `ARTAR(penalty, ar, tar)`, float32, or float64 where an input is float64.
    """
    raw, dropped = layer.raw, layer.dropped
    dtype = compute_dtype(raw, dropped)
    elements, pairs = divisors(layer, problem)
    # A sum of a DTensor is the parts of all ranks, which torch 2.8 multiplies by the number that an earlier sum was
    # multiplied by; added to 0 it is whole.
    zero = ar = tar = penalty = torch.zeros((), dtype=dtype, device=layer.given().device)
    wide = None if raw is None else raw.to(dtype)  # once, so that its gradients add up in that dtype
    of_raw = problem.ar_of_raw or dropped is raw
    squared = wide if of_raw else None if dropped is None else dropped.to(dtype)
    if squared is not None and problem.with_ar():
        total = zero + counted(squared, layer, problem).square().sum()
        if is_on(problem.alpha):
            penalty = penalty + _weighted(total, _coefficient(problem.alpha, layer.values.alpha, total), elements)
        ar = total / elements
    if wide is not None and problem.with_tar():
        total = zero + _counted_changes(wide, layer, problem).square().sum()
        if is_on(problem.beta):
            penalty = penalty + _weighted(total, _coefficient(problem.beta, layer.values.beta, total), pairs)
        tar = total / pairs
    return ARTAR(penalty, ar, tar)


def ar_tar_gradients(grad: Tensor, layer: Layer, problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of raw and of dropped, themselves differentiable in `grad` and both tensors.

    Args:
        grad: the upstream gradient, 0-dim.
        layer: with `None` for a tensor that needs no gradient.
        problem: with `ar_of_raw` raw's gradient is that of both terms.

    Returns:
        Two tensors in the dtype of `grad`, `None` where the tensor is.
    """
    raw, dropped = (None if x is None else x.to(grad.dtype) for x in (layer.raw, layer.dropped))
    elements, pairs = divisors(layer, problem)
    grad_raw = grad_dropped = None
    if raw is not None and problem.with_tar():
        difference = change_difference(raw, layer, problem)
        factor = _over(2 * _coefficient(problem.beta, layer.values.beta, grad), pairs, grad)
        grad_raw = counted(grad * factor * difference, layer, problem)
    squared = raw if problem.ar_of_raw else dropped
    if squared is not None and problem.with_ar():
        kept = counted(squared, layer, problem)
        factor = _over(2 * _coefficient(problem.alpha, layer.values.alpha, grad), elements, grad)
        gradient = counted(grad * factor * kept, layer, problem)
        if not problem.ar_of_raw:
            grad_dropped = gradient
        else:
            grad_raw = gradient if grad_raw is None else grad_raw + gradient
    return grad_raw, grad_dropped


def _weighted(total: Tensor, coefficient: Any, count: int | Tensor) -> Tensor:
    """Multiply a sum by its coefficient, over a count; one that is 0 leaves it out, even if it is infinite or NaN."""
    weighted = total * _over(coefficient, count, total)
    return torch.where(coefficient == 0, 0, weighted) if isinstance(coefficient, Tensor) else weighted


def _coefficient(number: float | None, tensor: Tensor | None, like: Tensor) -> Any:
    """Return a coefficient: the number, or the tensor in the dtype of another."""
    return number if tensor is None else tensor.to(like.dtype)


def _over(factor: Any, count: int | Tensor, like: Tensor) -> float | Tensor:
    """Divide by a count in the dtype of a tensor.

    It comes before an upstream gradient multiplies the factor: together they may overflow.
    """
    return factor / (count.to(like.device, like.dtype) if isinstance(count, Tensor) else count)


def _counted_changes(x: Tensor, layer: Layer, problem: Problem) -> Tensor:
    """Compute the changes that count; there may be zeros beside them."""
    if layer.values.steps is layer.values.offsets is None and not is_exporting():
        return x.diff(dim=time_axis(x, problem))  # compiled, this is the formula written by hand; 2 steps compile anew
    return changes(x, layer, problem)


def marked(
    shape: tuple[Any, Any], lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the steps and counts of `Values`, as the `steps` of a backend does."""
    device = next(x.device for x in (lengths, valid, starts) if x is not None)
    step = torch.arange(shape[1], device=device)
    counts = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    if lengths is not None:
        counts = counts & (step < lengths.unsqueeze(-1))
    into = counts & counts.roll(1, 1) & (step > 0)  # a compiler makes a case of its own of a size of 1
    if starts is not None:
        into = into & ~starts
    return counts.to(torch.uint8).add(into, alpha=2), torch.stack([counts.sum(), into.sum()])


def changes(x: Tensor, layer: Layer, problem: Problem) -> Tensor:
    """Compute the change over time that leads to each step, 0 to the first."""
    offsets, dim = layer.values.offsets, time_axis(x, problem)
    if offsets is not None:
        before, _, precedes, _ = neighbours(offsets, x.shape[0])
        return torch.where(precedes.to(x.device).unsqueeze(-1), x - x[before.to(x.device)], 0)
    # A compiler would make a case of its own of 2 steps, as they have 1 difference. (torch 2.11 cannot trace hasattr.)
    if torch.compiler.is_compiling() and getattr(type(x), "__tensor_flatten__", None) is None:
        first = torch.arange(x.shape[dim], device=x.device) == 0
        change = (x - x.roll(1, dim)).masked_fill(first.view(-1, *[1] * (x.dim() - 1 - dim)), 0)
    else:  # no tensor but x, which may be of a subclass that goes with no other, as a DTensor
        first = x[(slice(None),) * dim + (slice(1),)]
        change = torch.cat([torch.zeros_like(first), x.diff(dim=dim)], dim)
    return counted(change, layer, problem, CHANGE)


def change_difference(x: Tensor, layer: Layer, problem: Problem) -> Tensor:
    """Subtract from the change that leads to each step the one that leads from it; 0 where there is none."""
    change, offsets = changes(x, layer, problem), layer.values.offsets
    if offsets is not None:
        _, after, _, follows = neighbours(offsets, x.shape[0])
        return change - torch.where(follows.to(x.device).unsqueeze(-1), change[after.to(x.device)], 0)
    return change - change.roll(-1, time_axis(x, problem))  # the 0 of the first follows the last


def counted(x: Tensor, layer: Layer, problem: Problem, bit: int = STEP) -> Tensor:
    """Replace steps that do not count by 0, or changes into steps."""
    time, batch, steps = time_axis(x, problem), batch_axis(x, problem), layer.values.steps
    if steps is None:
        return x
    counts = (steps & bit) != 0
    if batch is None:
        counts = counts.reshape(-1)
    elif batch > time:
        counts = counts.transpose(0, 1)
    for axis in range(x.dim()):
        if axis not in (time, batch):
            counts = counts.unsqueeze(axis)
    return torch.where(counts, x, 0)


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
