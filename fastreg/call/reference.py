"""The penalty in plain, differentiable PyTorch.

All tests compare with it. It also runs where no kernel runs: under tracing and function transforms, in a double
backward, and on devices without kernels.

The formulas are from Merity, McCann and Socher, "Revisiting Activation Regularization for Language RNNs" (2017).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.call.private import is_exporting
from fastreg.call.problem import Penalty, axes_of
from fastreg.call.torch_state import has_float64
from fastreg.kernels.view import Coefficient, EncodedSteps, Spec, Values

STEP, CHANGE = 1, 2  # the bits of `EncodedSteps`: the step counts, the change into it counts


def ar_tar(raw: Tensor | None, dropped: Tensor | None, values: Values, spec: Spec, time_dim: int = -2) -> Penalty:
    """Compute the penalty of one layer, differentiable, and its terms, detached, if the caller wants them.

    Args:
        raw: activations; `None` if no term reads it.
        dropped: activations of the same shape; `None` if no term reads it, or if it is raw itself.
        values: coefficients, and the steps that count.
        spec: what is computed.
        time_dim: the axis of time, negative from the end.

    Returns:
        The penalty and its terms, in one dtype.
    """
    raw, dropped = (None if x is None else x.to(spec.dtype) for x in (raw, dropped))
    given: Any = dropped if raw is None else raw
    elements, changes = _divisors(given, values, spec, time_dim)
    # The sum of a DTensor consists of parts on all ranks. torch 2.8 multiplies these parts by the factor of an earlier
    # sum. Adding the sum to 0 adds its parts up.
    penalty = ar = tar = zero = torch.zeros((), dtype=spec.dtype, device=given.device)
    regularized = raw if spec.ar_of_raw else dropped
    if regularized is not None and (spec.by_ar or spec.return_terms):
        ar = zero + _counted(regularized, values.bits, time_dim).square().sum()
    if raw is not None and (spec.by_tar or spec.return_terms):
        tar = zero + _counted_changes(raw, values.bits, time_dim).square().sum()
    if spec.by_ar:
        penalty = penalty + _weighted(ar, values.alpha, elements)
    if spec.by_tar:
        penalty = penalty + _weighted(tar, values.beta, changes)
    terms = [(ar / elements).detach(), (tar / changes).detach()] if spec.return_terms else None
    return Penalty(penalty, terms)


def _divisors(x: Tensor, values: Values, spec: Spec, time_dim: int) -> tuple[int | Tensor, int | Tensor]:
    """Return the divisors of AR and TAR: the numbers of elements and of changes, or 1 and 1 for `"sum"`.

    A divisor is never 0, so that the mean of no elements is 0 and not NaN. If not all steps count, both are tensors.
    """
    if spec.reduction == "sum":
        return 1, 1
    elements, bits, counts = x.numel(), values.bits, values.counts
    if bits is None or counts is None:
        time = _at_least_1(x.shape[time_dim])
        return _at_least_1(elements), _at_least_1(elements // time * (time - 1))
    of_steps, of_changes = _at_least_1(counts * (elements // _at_least_1(bits.numel()))).unbind()
    return of_steps, of_changes


def _at_least_1(count: Any) -> Any:
    """Return the maximum of a count and 1, without a branch, which tracing would fix."""
    if isinstance(count, Tensor):
        return count.clamp(min=1)
    return max(count, 1) if type(count) is int else torch.sym_max(count, 1)  # this takes ten times as long


def _weighted(total: Tensor, coefficient: Coefficient, count: int | Tensor) -> Tensor:
    """Multiply a sum by its coefficient over a count; 0 leaves the sum out, even if it is infinite or NaN.

    The factor is computed in float64, as for numbers, and rounded once. So a coefficient in a tensor gives the same
    result as its `item()`. The factor comes first, because a coefficient times an upstream gradient may overflow.
    """
    if not isinstance(coefficient, Tensor) and not isinstance(count, Tensor):
        return total * (coefficient * (1 / count))
    wide = torch.float64 if has_float64(total.device) else total.dtype
    weight, of = (x.to(total.device, wide) if isinstance(x, Tensor) else x for x in (coefficient, count))
    factor = weight * (1 / of)  # a number over a tensor would be rounded in another way than a tensor over it
    weighted = total * (factor.to(total.dtype) if isinstance(factor, Tensor) else factor)
    return torch.where(coefficient == 0, 0, weighted) if isinstance(coefficient, Tensor) else weighted


def encoded(
    shape: tuple[int, int], lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None
) -> EncodedSteps:
    """Return the steps that count, as the `encoder` of a backend does."""
    device = next(x.device for x in (lengths, valid, starts) if x is not None)
    step = torch.arange(shape[1], device=device)
    inside = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    if lengths is not None:
        inside = inside & (step < lengths.unsqueeze(-1))
    into = inside & inside.roll(1, 1) & (step > 0)  # without slices: a compiler would treat a size of 1 as another case
    if starts is not None:
        into = into & ~starts
    return EncodedSteps(inside.to(torch.uint8).add(into, alpha=2), torch.stack([inside.sum(), into.sum()]))


def _counted_changes(x: Tensor, bits: Tensor | None, time_dim: int) -> Tensor:
    """Compute the changes that count; the result may contain zeros for others."""
    if bits is None and not is_exporting():
        return x.diff(dim=time_dim)  # the formula written by hand, to a compiler; 2 steps compile again
    dim, _ = axes_of(x, time_dim)
    # With diff a compiler would treat 2 steps as another case, as they have 1 difference. torch 2.11 cannot trace
    # hasattr.
    if torch.compiler.is_compiling() and getattr(type(x), "__tensor_flatten__", None) is None:
        first = torch.arange(x.shape[dim], device=x.device) == 0
        change = (x - x.roll(1, dim)).masked_fill(first.view(-1, *[1] * (x.dim() - 1 - dim)), 0)
    else:  # only x itself, which may be a DTensor, and these do not mix with other tensors
        first = x[(slice(None),) * dim + (slice(1),)]
        change = torch.cat([torch.zeros_like(first), x.diff(dim=dim)], dim)
    return _counted(change, bits, time_dim, CHANGE)


def _counted(x: Tensor, bits: Tensor | None, time_dim: int, bit: int = STEP) -> Tensor:
    """Replace the steps, or the changes, that do not count by 0; if `bits` is `None`, all count."""
    if bits is None:
        return x
    inside, axes = (bits & bit) != 0, axes_of(x, time_dim)
    inside = inside if axes[0] > 0 else inside.transpose(0, 1)  # in the order of x's axes
    return torch.where(inside.reshape([n if axis in axes else 1 for axis, n in enumerate(x.shape)]), x, 0)
