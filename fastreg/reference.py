"""The penalty in plain, differentiable PyTorch.

The ground truth of every test, and the path for whatever the fused ones do not run: tracing, function
transforms, double backward, devices without Triton.

Formulas: Merity, McCann and Socher, "Revisiting Activation Regularization for Language RNNs" (2017).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class ARTAR(NamedTuple):
    """What `return_terms=True` gives: three 0-dim tensors on the activations' device, without a sync.

    `penalty` is `alpha * ar + beta * tar` and differentiable; `ar` and `tar` are unscaled and detached.
    """

    penalty: Tensor
    ar: Tensor
    tar: Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that squares and sums are formed in: float64 if any tensor is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def time_dim(x: Tensor, batch_first: bool) -> int:
    """The time axis of a `(batch, time, hidden)`, `(time, batch, hidden)` or `(time, hidden)` tensor."""
    return 1 if x.dim() == 3 and batch_first else 0


def divisors(x: Tensor, batch_first: bool, reduction: str) -> tuple[int, int]:
    """What the sums of AR and of TAR are divided by; never 0, so that an empty mean is 0 and not NaN."""
    if reduction == "sum":
        return 1, 1
    steps = x.shape[time_dim(x, batch_first)]
    elements = x.numel()
    pairs = elements // max(steps, 1) * max(steps - 1, 0)
    return max(elements, 1), max(pairs, 1)


def ar_tar(
    raw: Tensor | None, dropped: Tensor | None, alpha: float, beta: float, batch_first: bool, reduction: str
) -> ARTAR:
    """The penalty of one layer. A tensor that is `None` is a term that is off; one of the two is not."""
    given = raw if raw is not None else dropped
    assert given is not None
    dtype = compute_dtype(raw, dropped)
    elements, pairs = divisors(given, batch_first, reduction)
    ar = tar = torch.zeros((), dtype=dtype, device=given.device)
    if dropped is not None:
        ar = dropped.to(dtype).square().sum() / elements
    if raw is not None:
        tar = raw.to(dtype).diff(dim=time_dim(raw, batch_first)).square().sum() / pairs
    return ARTAR(alpha * ar + beta * tar, ar, tar)


def ar_tar_gradients(
    grad: Tensor,
    raw: Tensor | None,
    dropped: Tensor | None,
    same: bool,
    alpha: float,
    beta: float,
    batch_first: bool,
    reduction: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The penalty's gradients for `raw` and `dropped`, themselves differentiable in `grad` and both tensors.

    With `same`, raw is dropped as well, and `dropped` is `None`: raw's gradient is that of both terms.
    """
    given = raw if raw is not None else dropped
    assert given is not None
    elements, pairs = divisors(given, batch_first, reduction)
    slope = grad_dropped = None
    if raw is not None:
        dim = time_dim(raw, batch_first)
        change = raw.to(grad.dtype).diff(dim=dim)
        axes_after = [0, 0] * (raw.dim() - 1 - dim)  # pad() counts axes from the last
        arriving, leaving = pad(change, [*axes_after, 1, 0]), pad(change, [*axes_after, 0, 1])
        slope = grad * (2 * beta / pairs) * (arriving - leaving)
    kept = raw if same else dropped
    if kept is not None:
        pull = grad * (2 * alpha / elements) * kept.to(grad.dtype)
        if same and slope is not None:
            slope = slope + pull
        else:
            grad_dropped = pull.to(kept.dtype)
    grad_raw = None if raw is None or slope is None else slope.to(raw.dtype)
    return grad_raw, grad_dropped
