"""The penalty in plain, differentiable PyTorch.

The ground truth of every test, and the path for whatever the fused ones do not run: tracing, function
transforms, double backward, devices without Triton.

Formulas: Merity, McCann and Socher, "Revisiting Activation Regularization for Language RNNs" (2017).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ARTAR(NamedTuple):
    """What `return_terms=True` gives: three 0-dim tensors on the activations' device, without a sync.

    `penalty` is `alpha * ar + beta * tar` and differentiable; `ar` and `tar` are unscaled and detached.
    """

    penalty: Tensor
    ar: Tensor
    tar: Tensor


class Steps(NamedTuple):
    """Where a tensor has its time steps, and which of them count.

    Padded sequences come with `lengths`, `(batch,)` integers on the tensors' device, which count as no less than 0
    and no more than all steps. Packed ones, `(rows, hidden)` as in a `PackedSequence`, come with its `batch_sizes`.
    """

    batch_first: bool = True
    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that squares and sums are formed in: float64 if any tensor is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def time_dim(x: Tensor, batch_first: bool) -> int:
    """The time axis of a `(batch, time, hidden)`, `(time, batch, hidden)` or `(time, hidden)` tensor."""
    return 1 if x.dim() == 3 and batch_first else 0


def divisors(x: Tensor, steps: Steps, reduction: str) -> tuple[int | Tensor, int | Tensor]:
    """What the sums of AR and of TAR are divided by; never 0, so that an empty mean is 0 and not NaN.

    Of padded and packed sequences they are tensors, on the device of what they are found from.
    """
    if reduction == "sum":
        return 1, 1
    elements, hidden = x.numel(), x.shape[-1]
    if steps.batch_sizes is not None:
        return _at_least_1(elements), _at_least_1(elements - steps.batch_sizes[0] * hidden)
    time = x.shape[time_dim(x, steps.batch_first)]
    if steps.lengths is not None:
        lengths = steps.lengths.long().clamp(0, time)
        return _at_least_1(lengths.sum() * hidden), _at_least_1((lengths - 1).clamp(min=0).sum() * hidden)
    time = _at_least_1(time)
    return _at_least_1(elements), _at_least_1(elements // time * (time - 1))


def _at_least_1(count: Any) -> Any:
    """Without a branch, which would stay in traced code as it went."""
    if isinstance(count, Tensor):
        return count.clamp(min=1)
    return max(count, 1) if type(count) is int else torch.sym_max(count, 1)  # which takes ten times as long


def neighbours(batch_sizes: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each packed row the same sequence's one time step before and after, and whether there is one; `(rows,)`.

    Where there is none, its index is that of some other row.
    """
    ends = batch_sizes.cumsum(0)
    row = torch.arange(rows, device=batch_sizes.device)
    step = torch.searchsorted(ends, row, right=True)
    before = row - batch_sizes[(step - 1).clamp(min=0)]
    after = row + batch_sizes[step]
    follows = after < ends[(step + 1).clamp(max=ends.shape[0] - 1)]
    return before.clamp(min=0), after.clamp(max=rows - 1), step > 0, follows


def changes(x: Tensor, steps: Steps) -> Tensor:
    """The change over time that leads to each step, 0 to the first."""
    if steps.batch_sizes is not None:
        before, _, precedes, _ = neighbours(steps.batch_sizes, x.shape[0])
        return torch.where(precedes.to(x.device).unsqueeze(-1), x - x[before.to(x.device)], 0)
    dim = time_dim(x, steps.batch_first)
    # A compiler would make a case of its own of 2 steps, as they have 1 difference.
    if torch.compiler.is_compiling() and not hasattr(type(x), "__tensor_flatten__"):
        first = torch.arange(x.shape[dim], device=x.device) == 0
        change = (x - x.roll(1, dim)).masked_fill(first.view(-1, *[1] * (x.dim() - 1 - dim)), 0)
    else:  # no tensor but x, which may be of a subclass that goes with no other, as a DTensor
        first = x[:, :1] if dim else x[:1]
        change = torch.cat([torch.zeros_like(first), x.diff(dim=dim)], dim)
    return counted(change, steps)


def bends(x: Tensor, steps: Steps) -> Tensor:
    """The change that leads to each step, less the one that leads from it; 0 where there is none."""
    change = changes(x, steps)
    if steps.batch_sizes is not None:
        _, after, _, follows = neighbours(steps.batch_sizes, x.shape[0])
        return change - torch.where(follows.to(x.device).unsqueeze(-1), change[after.to(x.device)], 0)
    return change - change.roll(-1, time_dim(x, steps.batch_first))  # the 0 of the first follows the last


def counted(x: Tensor, steps: Steps) -> Tensor:
    """`x`, with 0 in padding."""
    return x if steps.lengths is None else torch.where(_counts(x, steps), x, 0)


def _counts(x: Tensor, steps: Steps) -> Tensor:
    """Whether a step is one of the sequence, no padding: `(batch, time, 1)`, or as the axes of `x` are."""
    assert steps.lengths is not None
    dim = time_dim(x, steps.batch_first)
    within = torch.arange(x.shape[dim], device=x.device) < steps.lengths.unsqueeze(-1)
    if x.dim() == 2:
        return within.reshape(-1, 1)
    return (within if dim == 1 else within.transpose(0, 1)).unsqueeze(-1)


def ar_tar(
    raw: Tensor | None, dropped: Tensor | None, alpha: float, beta: float, steps: Steps, reduction: str
) -> ARTAR:
    """The penalty of one layer. A tensor that is `None` is a term that is off; one of the two is not."""
    given = raw if raw is not None else dropped
    assert given is not None
    dtype = compute_dtype(raw, dropped)
    elements, pairs = divisors(given, steps, reduction)
    ar = tar = torch.zeros((), dtype=dtype, device=given.device)
    wide = None if raw is None else raw.to(dtype)  # once, so that its gradients add up in that dtype
    if dropped is not None:
        kept = wide if wide is not None and dropped is raw else dropped.to(dtype)
        ar = counted(kept, steps).square().sum() / elements
    if wide is not None:
        tar = changes(wide, steps).square().sum() / pairs
    return ARTAR(alpha * ar + beta * tar, ar, tar)


def ar_tar_gradients(
    grad: Tensor,
    raw: Tensor | None,
    dropped: Tensor | None,
    same: bool,
    alpha: float,
    beta: float,
    steps: Steps,
    reduction: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The penalty's gradients for `raw` and `dropped`, themselves differentiable in `grad` and both tensors.

    With `same`, raw is dropped as well, and `dropped` is `None`: raw's gradient is that of both terms.
    """
    given = raw if raw is not None else dropped
    assert given is not None
    elements, pairs = divisors(given, steps, reduction)
    slope = grad_dropped = None
    if raw is not None:
        slope = counted(grad * (2 * beta) / pairs * bends(raw.to(grad.dtype), steps), steps)
    kept = raw if same else dropped
    if kept is not None:
        pull = counted(grad * (2 * alpha) / elements * counted(kept.to(grad.dtype), steps), steps)
        if same and slope is not None:
            slope = slope + pull
        else:
            grad_dropped = pull.to(kept.dtype)
    grad_raw = None if raw is None or slope is None else slope.to(raw.dtype)
    return grad_raw, grad_dropped
