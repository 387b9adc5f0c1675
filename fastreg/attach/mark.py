"""Marks: identities in the autograd graph, by which a loss finds the runs on which it depends.

The node of a mark holds a run, and the run holds its penalty. The graph of the penalty begins at raw and at dropped,
before the mark, so there is no reference cycle: the autograd graph owns the run, and freeing it frees the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function

from fastreg.call.private import apply_of, class_of


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
        ctx.run.attachment.alarm.pass_through()
        return None, None, gradient


MARK = class_of(FastregAttach)
# `mark(run, as_view, x)` returns a tensor that needs a gradient behind a node that holds a run.
mark: Any = apply_of(FastregAttach)


def runs_of(loss: Tensor) -> Iterator[Any]:
    """Search the graph of a loss, breadth first, for the runs on which it depends; a run may come several times."""
    queue, seen = list[Any]([loss.grad_fn]), set[Any]([None])
    for node in queue:  # which grows
        if node in seen:
            continue
        seen.add(node)
        if type(node) is MARK:
            yield node.run
        for following, _ in node.next_functions:  # a comprehension takes longer
            queue.append(following)


def mapped(function: Callable[[Tensor], Tensor], result: Any) -> Any:
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
            made[name] = mapped(function, x)
        return made
    kind = type(result)
    make = kind if kind in (tuple, list) else getattr(kind, "_make", None)  # of a named tuple or a packed sequence
    return result if make is None else make([*map(partial(mapped, function), result)])


def tensors_in(result: Any) -> Iterator[Tensor]:
    """Return the tensors that `mapped` would replace."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list, dict)):
        for x in dict.values(result) if isinstance(result, dict) else result:
            yield from tensors_in(x)
