"""The mark by which a loss finds the penalty of a run, and `with_penalty`, by which a backward finds one.

Both are identities with an autograd node. The node of a mark holds a `Run`, whose penalty has a graph that begins at
raw and at dropped, before the mark. So there is no reference cycle: the autograd graph owns the run, and a loss that
depends on the marked tensor has the node in its graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import check_coefficient, check_tensor
from fastreg.problem import ARTAR, Coefficient
from fastreg.torch_state import untraced, version_of


@dataclass(eq=False)
class Run:
    """Describe one run of an attached module.

    Attributes:
        raw: a weak reference to the module's output, or to the rows of a `PackedSequence`.
        version: the version of raw when the module returned it.
        shape: of raw.
        packed: the `PackedSequence` that raw is the data of, without the data; `None` if raw is not packed.
        masks: of the valid steps and of the starts, each `None` if there is none, by their names.
        attachment: of the module; each backward through a marked tensor calls its `passed(run)`.
        again: activation checkpointing runs the forward again, in a backward.
        given: alpha and beta of the regularizer.
        stamps: of these, when the module ran.
        terms: the penalty and its terms, until a loss takes them; `None` before the dropout has run.
        marked: a loss can find the run.
    """

    raw: Callable[[], Any]
    version: int
    shape: torch.Size
    packed: PackedSequence | None
    masks: dict[str, Any]
    attachment: Any
    again: bool
    given: tuple[Coefficient, Coefficient]
    terms: ARTAR | None = None
    marked: bool = False

    def __post_init__(self) -> None:
        self.stamps = stamps_of(self.given)

    def coefficients(self) -> Any:
        """Return alpha and beta on the device of raw, which has to be alive."""
        return [x.to(self.raw().device) if isinstance(x, Tensor) else x for x in self.given]

    def take(self) -> Any:
        """Return the penalty and its terms, once."""
        terms, self.terms = self.terms, None
        return terms


def stamps_of(coefficients: Iterable[Coefficient]) -> list[Any]:
    """Return values that differ as soon as a coefficient is another, or is a tensor that was changed in place."""
    return [(id(x), version_of(x)) if isinstance(x, Tensor) else x for x in coefficients]


class FastregAttach(Function):  # PyTorch shows the name in an error at a change in place
    """Pass tensors and their gradients on, and hold a run.

    An output is a view, which PyTorch refuses to change in place. An output by `detach()` may be changed, but autograd
    would not see that another view of its memory changes with it.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, as_views: Sequence[bool], *tensors: Tensor) -> Any:
        ctx.run = run
        return tuple([x.view_as(x) if as_view else x.detach() for x, as_view in zip(tensors, as_views, strict=True)])

    @staticmethod
    @untraced
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.run.attachment.passed(ctx.run)
        return None, None, *gradients


# `Function.apply` without the part for transforms of torch.func, under which nothing is marked: 3 us less.
_apply: Any = super(Function, FastregAttach).apply  # pyright: ignore[reportAttributeAccessIssue]
_Node: Any = type(_apply(None, [True], torch.zeros((), requires_grad=True))[0].grad_fn)


def mark(run: Run, tensors: Sequence[Tensor], as_views: Sequence[bool]) -> Sequence[Tensor]:
    """Return tensors as the outputs of a node that holds the run.

    Args:
        run: the run that the tensors belong to.
        tensors: all need gradients.
        as_views: of each tensor, whether its result is a view; otherwise it may be changed in place.
    """
    run.marked = True
    return _apply(run, as_views, *tensors)


def is_marked(x: Tensor) -> bool:
    """Return whether a tensor is the output of a mark."""
    return type(x.grad_fn) is _Node


def reached(loss: Tensor, runs: Iterable[Run]) -> list[Run]:
    """Return those of the runs that a loss depends on.

    The search of the graph is breadth first, and ends when all runs are found.
    """
    left, found, seen = {*runs}, [], {None}
    queue: deque[Any] = deque([loss.grad_fn])
    while queue and left:
        node = queue.popleft()
        if node not in seen:
            seen.add(node)
            if type(node) is _Node and node.run in left:
                left.remove(node.run)
                found.append(node.run)
            queue.extend([following for following, _ in node.next_functions])
    return found


def total(formed: Iterable[ARTAR], device: torch.device) -> ARTAR:
    """Add up the penalties and terms of runs, which may live on several devices."""
    return ARTAR(*[reduce(torch.add, [x.to(device) for x in xs]) for xs in zip(*formed, strict=True)])


class _WithPenalty(Function):
    """Pass a tensor and its gradient on, and give a penalty a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, penalty: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, *ctx.saved_tensors, None


def with_penalty(x: Tensor, penalty: Tensor, scale: Coefficient = 1.0) -> Tensor:
    """Return a view of x whose backward also differentiates a penalty, for trainers that hide their loss.

    Use the result in place of x. Each backward that reaches it gives the penalty the gradient `scale`: two losses, or
    two backwards with `retain_graph=True`, give it twice. A loss that does not depend on the result adds nothing. With
    `create_graph=True` the first gradient contains the penalty's.

    Args:
        x: a tensor of any shape that the loss depends on, such as dropped.
        penalty: a 0-dim tensor, such as `fused_ar_tar` returns.
        scale: the gradient of the penalty, finite and not negative: a number or a 0-dim tensor, such as a loss scale,
            or 1 over the number of accumulated batches. A tensor is copied.

    Returns:
        A new view of x, which may not be changed in place; x itself under `torch.no_grad()`, or if the penalty needs no
            gradient.

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: an argument has the wrong shape or value; the message names it.

    Examples:
        >>> raw, _ = torch.nn.GRU(8, 16, batch_first=True)(torch.randn(4, 10, 8))
        >>> dropped = torch.nn.functional.dropout(raw, 0.4)
        >>> dropped = with_penalty(dropped, fused_ar_tar(raw, dropped, alpha=2.0, beta=1.0))
        >>> dropped.square().mean().backward()
    """
    if not check_tensor("x", x).is_floating_point():  # it could not have a gradient
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if check_tensor("penalty", penalty).dim() != 0:
        raise ValueError(f"penalty: expected a 0-dim tensor, got shape {tuple(penalty.shape)}")
    check_coefficient("scale", scale)
    if not (torch.is_grad_enabled() and penalty.requires_grad):
        return x
    gradient = torch.as_tensor(scale, dtype=penalty.dtype, device=penalty.device).detach().clone()
    return _WithPenalty.apply(x, penalty, gradient)  # pyright: ignore[reportReturnType]
