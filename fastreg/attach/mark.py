"""Marks, by which a loss finds the runs on which it depends, and `with_penalty`, by which a backward finds a penalty.

Both are identities with an autograd node. The node of a mark holds a run, and the run holds its penalty. The graph of
the penalty begins at raw and at dropped, before the mark, so there is no reference cycle: the autograd graph owns the
run, and freeing it frees the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.call.arguments import check_coefficient, check_tensor
from fastreg.call.problem import Coefficient


class FastregAttach(Function):  # PyTorch's error for a change in place shows this name
    """Pass a tensor and its gradient on, and hold a run.

    PyTorch refuses to change an output in place if it is a view. An output by `detach()` may be changed in place, but
    then autograd does not see that other views of its memory change, too.
    """

    @staticmethod
    def forward(ctx: Any, run: Any, as_view: bool, x: Tensor) -> Tensor:
        ctx.run = run
        return x.view_as(x) if as_view else x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.run.is_passed = True
        return None, None, gradient


# `mark(run, as_view, x)` returns a tensor that needs a gradient behind a node that holds a run. It is `Function.apply`
# without its part for transforms of torch.func, under which nothing is marked; this saves 3 us.
mark: Any = super(Function, FastregAttach).apply  # pyright: ignore[reportAttributeAccessIssue]


def runs_of(loss: Tensor) -> Iterator[Any]:
    """Search the graph of a loss, breadth first, for the runs on which it depends; a run may come several times."""
    kind = FastregAttach._backward_cls  # pyright: ignore[reportAttributeAccessIssue]
    queue, seen = list[Any]([loss.grad_fn]), set[Any]([None])
    for node in queue:  # which grows
        if node in seen:
            continue
        seen.add(node)
        if type(node) is kind:
            yield node.run
        for following, _ in node.next_functions:  # a comprehension takes longer
            queue.append(following)


def mapped(result: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the output of a module in which a function has replaced each tensor.

    Tuples, named tuples, lists, dictionaries, packed sequences and model outputs are copied. Any other object is
    returned unchanged.
    """
    if isinstance(result, Tensor):
        return function(result)
    if isinstance(result, dict):
        made = copy(result)
        if getattr(result, "__dict__", None) is result:  # the items are the attributes, as in many an `AttrDict`
            made.__dict__ = made
        for name, x in dict.items(result):
            made[name] = mapped(x, function)
        return made
    if isinstance(result, (tuple, list)):
        make = getattr(type(result), "_make", type(result))  # of a named tuple, such as a packed sequence
        return make([mapped(x, function) for x in result])
    return result


def tensors_in(result: Any) -> Iterator[Tensor]:
    """Return the tensors that `mapped` would replace."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list, dict)):
        for x in dict.values(result) if isinstance(result, dict) else result:
            yield from tensors_in(x)


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
