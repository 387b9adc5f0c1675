"""Captures of attached modules, kept by the autograd graph, and the hooks that carry their penalty.

A forward hook puts a `Mark` on the autograd node of each regularized tensor, in `node.metadata`, so that the graph owns
the capture. A mark holds the tensor detached: the tensor itself would hold its node, a reference cycle through C++ that
is never collected. `reach` searches the graph of a loss for marks. A mark is also a hook of its tensor: after
`fastreg.carry` has armed it, it adds the penalty's gradient to the gradient that arrives there.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.problem import time_dim_of

KEY = "fastreg"  # of the marks in a node's metadata
EMPTY = torch.empty(0)
number_of = methodcaller("_sequence_nr")  # of a node, in the order in which a thread made them
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph  # pyright: ignore


class Captured:
    """Hold a tensor without its graph.

    Attributes:
        data: the tensor, detached; it shares the memory and the version.
        itself: a weak reference to the tensor.
        needs: whether it requires a gradient.
        version: its version when it was captured.
        armed: the id of the backward that adds the penalty's gradient, `None` for every backward, and the function
            that adds it; `None` while no backward does.
    """

    __slots__ = ("armed", "data", "itself", "needs", "version")

    def __init__(self, x: Tensor) -> None:
        self.data, self.itself = x.detach(), weakref.ref(x)
        self.needs, self.version = x.requires_grad, _version(x)
        self.armed: tuple[int | None, Callable[[Tensor], Tensor]] | None = None

    def arm(self, task: int | None, add: Callable[[Tensor], Tensor]) -> None:
        """Add a gradient in a backward, besides a gradient that it already adds."""
        before = self.armed
        if before is not None and before[0] == task:
            self.armed = task, lambda gradient: add(before[1](gradient))
        else:
            self.armed = task, add


@dataclass(eq=False)
class Run:
    """Hold the tensors of one run of an attached module.

    Attributes:
        raw: the module's output.
        dropped: the tensor that AR squares: the dropout's output, or raw; `None` before the dropout has run.
        packed: the `PackedSequence` that raw is the data of, or `None`.
        time_at: `batch_first`, a bool, or `time_dim`, an int.
        valid: the valid steps, or `None`.
        starts: the steps at which segments start, or `None`.
        grad_enabled: whether gradients were enabled in the module and in its dropout.
        is_step: whether raw is one time step, without an axis of time.
        fused: the output of a fused dropout, whose node carries the whole penalty, or `None`.
        terms: AR and TAR as that dropout computed them.
        marks: weak references to the marks.
    """

    raw: Captured
    dropped: Captured | None
    packed: PackedSequence | None
    time_at: bool | int
    valid: Tensor | None
    starts: Tensor | None
    grad_enabled: bool
    is_step: bool = False
    fused: Captured | None = None
    terms: tuple[Tensor, ...] = ()
    marks: list[weakref.ref[Mark]] = field(default_factory=list)

    @property
    def squared(self) -> Captured:
        """Return the tensor that AR squares, of a complete run."""
        return self.raw if self.dropped is None else self.dropped

    @property
    def carriers(self) -> list[Captured]:
        """Return the tensors to whose gradients the penalty's gradient is added."""
        if self.fused is not None:
            return [self.fused]
        return [x for x in dict.fromkeys((self.raw, self.dropped)) if x is not None and x.needs]

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Return how many sequences of how many time steps there are; `None` where the shape does not tell."""
        return sizes_of(self.raw.data, self.time_at)

    @property
    def steps(self) -> int:
        """Return how many time steps there are, or packed rows."""
        shape, axis = self.raw.data.shape, time_dim_of(self.time_at)
        return 1 if self.is_step else shape[axis] if -len(shape) <= axis < len(shape) else 0

    @property
    def changed(self) -> bool:
        """Return whether a tensor was changed in place since it was captured."""
        return any(x is not None and _version(x.data) != x.version for x in (self.raw, self.dropped, self.fused))

    def lost(self, reached: Collection[Captured | None]) -> Captured | None:
        """Return a tensor that needs a gradient, was freed, and is not in the graph of the loss; else `None`."""
        if not torch.is_grad_enabled() or (self.fused is not None and self.fused in reached):
            return None
        parts = [x for x in (self.raw, self.dropped) if x is not None and x.needs and x not in reached]
        return next((x for x in parts if not self.tensor_of(x).requires_grad), None)

    def tensor_of(self, captured: Captured) -> Tensor:
        """Return a tensor of this run, with its graph if that is alive, else detached."""
        if (x := captured.itself()) is None and captured is self.raw:
            x = next((mark.kept for mark in [mark() for mark in self.marks] if mark and mark.kept is not None), None)
        return captured.data if x is None else x

    def of(self, rows: Tensor) -> Any:
        """Return rows in the form of raw: packed, or as a tensor."""
        return rows if self.packed is None else self.packed._replace(data=rows)

    def drop(self) -> None:
        """Free the tensors, but keep armed gradients."""
        for x in (self.raw, self.dropped, self.fused):
            if x is not None:
                x.data = EMPTY
        for mark in [mark() for mark in self.marks]:
            if mark is not None:
                mark.kept = None


def sizes_of(x: Tensor, time_at: bool | int) -> tuple[int, int] | None:
    """Return how many sequences of how many time steps an activation has; `None` where its shape does not tell."""
    if x.dim() != 3:
        return None
    time_dim = time_dim_of(time_at)
    return x.shape[0 if time_dim % 3 else 1], x.shape[time_dim]


class Mark:
    """Mark an output of an autograd node as a tensor of a run, and as a hook of that tensor add a gradient to its own.

    Attributes:
        run: the run.
        captured: the tensor of the run; `None` for another tensor that the module returned.
        number: which output of its node the tensor is.
        kept: raw itself, for a loss that reaches the run only by another tensor.
    """

    __slots__ = ("__weakref__", "captured", "kept", "number", "run")
    __torch_unserializable__ = True  # so that saving the tensor does not warn of the hook

    def __init__(self, run: Run, captured: Captured | None, x: Tensor, kept: Tensor | None = None) -> None:
        self.run, self.captured, self.number, self.kept = run, captured, x.output_nr, kept
        run.marks.append(weakref.ref(self))
        node: Any = x.grad_fn
        if node is not None:  # a leaf has no lasting node: `reach` looks at its hooks
            node.metadata.setdefault(KEY, []).append(self)

    def hook(self, x: Tensor) -> None:
        """Add the gradient before other hooks of the tensor see it, as if autograd had added it."""
        handle = x.register_hook(self)
        hooks = handle.hooks_dict_ref()
        if hooks is not None and len(hooks) > 1:
            others = dict(hooks)
            own = {handle.id: others.pop(handle.id)}
            hooks.clear()  # PyTorch calls them in the order of insertion
            hooks.update(own | others)

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        captured = self.captured
        if captured is None or captured.armed is None:
            return None
        task, add = captured.armed
        if task is not None or not keeps_graph():
            captured.armed = None
        if task not in (None, torch._C._current_graph_task_id()):  # armed by a backward that failed
            return None
        if gradient is None:
            raise RuntimeError(
                "attach: a tensor that the loss depends on got no gradient, and the penalty's cannot be added to "
                "None; let the function behind it return zeros"
            )
        return add(gradient)


def _version(x: Tensor) -> int:
    """Return how often a tensor was changed in place; PyTorch does not count that of inference tensors."""
    return 0 if x.is_inference() else x._version


Reached: TypeAlias = dict[Run, list[tuple[Mark, Any]]]  # the marks of each run, with their nodes


def reach(loss: Tensor, runs: Sequence[Run]) -> Reached:
    """Return the marks of runs in the graph of a loss, and their nodes, the nearest first.

    The search is breadth first, and stops when every tensor is found.
    """
    left = {x for run in runs for x in run.carriers}
    wanted, found = set(runs), {}
    marked: dict[Any, list[Mark]] = {}
    seen: set[Any] = {None}
    queue: deque[tuple[Any, int]] = deque([(loss.grad_fn, loss.output_nr)])
    while queue and left:
        node, number = queue.popleft()
        if node not in seen:
            seen.add(node)
            following = node.next_functions
            marks = node.metadata.get(KEY) if following else _marks_of_leaf(node)
            if marks:
                marked[node] = marks
            queue.extend(following)
        for mark in marked.get(node, ()):
            if mark.number == number and mark.run in wanted:
                others = found.setdefault(mark.run, [])
                if (mark, node) not in others:
                    others.append((mark, node))
                    left.discard(mark.captured)
    return found


def _marks_of_leaf(node: Any) -> list[Mark]:
    """Return the marks among the hooks of the tensor that a node accumulates the gradient of."""
    hooks = getattr(getattr(node, "variable", None), "_backward_hooks", None)
    return [hook for hook in hooks.values() if isinstance(hook, Mark)] if hooks else []


def are_before(node: Any, others: Sequence[Any]) -> set[Any]:
    """Return which of the other nodes a node equals or was computed from."""
    wanted, found = set(others), set()
    if node is None:
        return found
    first = min(map(number_of, wanted))  # a node has a higher number than those it was computed from
    queue, seen = [node], {node}
    while queue:
        node = queue.pop()
        if node in wanted:
            found.add(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen and number_of(following) >= first:
                seen.add(following)
                queue.append(following)
    return found
