"""`with_penalty`, an identity whose backward also differentiates a penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.call.arguments import check_coefficient, check_tensor
from fastreg.call.problem import Coefficient


class _WithPenalty(Function):
    """Pass a tensor and its gradient on, and give the penalty its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, penalty: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, *ctx.saved_tensors, None


def with_penalty(x: Tensor, penalty: Tensor, scale: Coefficient = 1.0) -> Tensor:
    """Return a view of x whose backward also differentiates a penalty, for trainers that hide their loss.

    Use the result instead of x. Each backward that reaches the result gives the penalty the gradient `scale`. Two
    losses, or two backwards with `retain_graph=True`, give it this gradient twice. If a loss does not depend on the
    result, the penalty is lost. With `create_graph=True` the first gradient contains the penalty's gradient.

    Args:
        x: a tensor of any shape that the loss depends on, such as dropped.
        penalty: a 0-dim tensor, such as `fused_ar_tar` returns.
        scale: the gradient of the penalty, finite and not negative: a number or a 0-dim tensor, such as a loss scale,
            or 1 over the number of accumulated batches. If it is a tensor, the call copies it.

    Returns:
        A new view of x, which must not be changed in place; or x itself, under `torch.no_grad()` or if the penalty
            needs no gradient.

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: an argument has the wrong shape or value; the message names it.

    Examples:
        >>> raw, _ = torch.nn.GRU(8, 16, batch_first=True)(torch.randn(4, 10, 8))
        >>> dropped = torch.nn.functional.dropout(raw, 0.4)
        >>> dropped = with_penalty(dropped, fused_ar_tar(raw, dropped, alpha=2.0, beta=1.0))
        >>> dropped.square().mean().backward()
    """
    if not check_tensor("x", x).is_floating_point():  # only floating-point tensors have gradients
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if check_tensor("penalty", penalty).dim() != 0:
        raise ValueError(f"penalty: expected a 0-dim tensor, got shape {tuple(penalty.shape)}")
    check_coefficient("scale", scale)
    if not (torch.is_grad_enabled() and penalty.requires_grad):
        return x
    # A copy of the scale that is of the penalty's kind, such as a DTensor
    gradient = torch.ones_like(penalty.detach()).mul_(scale.to(penalty.device) if isinstance(scale, Tensor) else scale)
    return _WithPenalty.apply(x, penalty, gradient)  # pyright: ignore[reportReturnType]
