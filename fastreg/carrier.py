"""The mark by which a loss finds the penalty of a run, and `with_penalty`, by which a backward finds a penalty.

Both are identities with an autograd node. The node of a mark holds a `Run`. The graph of the run's penalty begins at
raw and at dropped, before the mark, so there is no reference cycle, and the autograd graph owns the run. A loss that
depends on a marked tensor has the node in its graph.
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
        shape: the shape of raw.
        packed: the `PackedSequence` whose data is raw, without the data; `None` if raw is not packed.
        masks: the masks of valid steps and of starts, by their names; each may be `None`.
        attachment: the attachment of the module; each backward through a marked tensor calls its `passed(run)`.
        again: whether activation checkpointing runs the forward again, in a backward.
        given: alpha and beta of the regularizer.
        stamps: the stamps of alpha and beta at the time when the module ran.
        terms: the penalty and its terms, until a loss takes them; `None` before the dropout has run.
        marked: whether a loss can find the run.
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
    """Return values that change when a coefficient is replaced, or is a tensor and changed in place."""
    return [(id(x), version_of(x)) if isinstance(x, Tensor) else x for x in coefficients]


class FastregAttach(Function):  # PyTorch's error for a change in place shows this name
    """Pass tensors and their gradients on, and hold a run.

    PyTorch refuses to change an output in place if it is a view. An output by `detach()` may be changed in place, but
    then autograd does not see that other views of its memory change, too.
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


# `Function.apply` without its part for transforms of torch.func, under which nothing is marked. This saves 3 us.
_apply: Any = super(Function, FastregAttach).apply  # pyright: ignore[reportAttributeAccessIssue]
_Node: Any = type(_apply(None, [True], torch.zeros((), requires_grad=True))[0].grad_fn)


def mark(run: Run, tensors: Sequence[Tensor], as_views: Sequence[bool]) -> Sequence[Tensor]:
    """Return tensors as outputs of a node that holds a run.

    Args:
        run: the run to which the tensors belong.
        tensors: tensors that need gradients.
        as_views: for each tensor, whether its result is a view; otherwise the result may be changed in place.
    """
    run.marked = True
    return _apply(run, as_views, *tensors)


def is_marked(x: Tensor) -> bool:
    """Return whether a tensor is the output of a mark."""
    return type(x.grad_fn) is _Node


def reached(loss: Tensor, runs: Iterable[Run]) -> list[Run]:
    """Return the runs on which a loss depends, among the given runs.

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
    """Add up the penalties and terms of runs, which may be on several devices."""
    return ARTAR(*[reduce(torch.add, [x.to(device) for x in xs]) for xs in zip(*formed, strict=True)])


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
    gradient = torch.as_tensor(scale, dtype=penalty.dtype, device=penalty.device).detach().clone()
    return _WithPenalty.apply(x, penalty, gradient)  # pyright: ignore[reportReturnType]
