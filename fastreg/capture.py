"""Captures of attached modules, kept by the autograd graph, and the hooks that carry their penalty.

A forward hook puts a `Mark` on the autograd node of each regularized tensor, in `node.metadata`, so that the graph owns
the capture. A mark holds the tensor detached: the tensor itself would hold its node, a reference cycle through C++ that
is never collected. `search` searches the graph of a loss for marks. A mark is also a hook of its tensor, which adds the
gradients of the penalties in `fastreg.carry` to the gradient that arrives there.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.problem import time_dim_of
from fastreg.torch_state import current, plain, untraced

KEY = "fastreg"  # of the marks in a node's metadata
EMPTY = torch.empty(0)
number_of = methodcaller("_sequence_nr")  # of a node, in the order in which a thread made them
Add: TypeAlias = Callable[[Tensor | None], Tensor | None]


class Captured:
    """Hold a tensor without its graph, and without a subclass that only decorates it.

    Attributes:
        data: the tensor, detached; it shares the memory and the version.
        itself: a weak reference to the tensor.
        needs: whether it requires a gradient.
        version: its version when it was captured.
        adds: functions that add the gradients of penalties, in the backwards of their losses, to one that arrives.
    """

    __slots__ = ("adds", "data", "itself", "needs", "version")

    def __init__(self, x: Tensor) -> None:
        self.data, self.itself, self.needs = plain(x).detach(), weakref.ref(x), x.requires_grad
        self.version = _version(x)
        self.adds: list[Add] = []


class Guard(Protocol):
    """See each gradient that passes a tensor of a run."""

    def passed(self, mark: Mark, gradient: Tensor | None) -> Tensor | None:
        """Return the gradient to go on with."""
        ...


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
        names: of the types of the module and of its dropout, for messages.
        guard: sees the gradients that pass.
        marked: whether its graph keeps it, so that a search can find it.
        keepers: weak references to the marks that keep raw.
        missed: whether a search of a whole graph has not found it.
        refused: the id of a backward that must not reach it, as its loss was not searched for it.
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
    names: tuple[str, str] = ("", "")
    guard: Guard | None = None
    marked: bool = True
    keepers: list[weakref.ref[Mark]] = field(default_factory=list)
    missed: bool = False
    refused: int | None = None

    @property
    def squared(self) -> Captured:
        """Return the tensor that AR squares, of a complete run."""
        return self.raw if self.dropped is None else self.dropped

    @property
    def carriers(self) -> list[Captured]:
        """Return the tensors to whose gradients the penalty's gradient is added."""
        if self.fused is not None:
            return [self.fused]
        carriers = [self.raw] if self.raw.needs else []
        if self.dropped is not None and self.dropped is not self.raw and self.dropped.needs:
            carriers.append(self.dropped)
        return carriers

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
        for x in (self.raw, self.dropped, self.fused):  # noqa: SIM110 - a generator expression takes twice as long
            if x is not None and _version(x.data) != x.version:
                return True
        return False

    @property
    def fault(self) -> str | None:
        """Say why the penalty of this run would be wrong, and the remedy; `None` if it would be right."""
        module, dropout = self.names
        if self.dropped is None:
            return (
                f"the attached {dropout} did not get the output of the {module}: something lies between them (packing, "
                "padding, a slice, another module). Attach the module that takes that very tensor, or none, or use "
                "on_loss_begin"
            )
        if self.changed:
            return (
                f"the output of the {module} or of its dropout was changed in place after it was captured; use "
                "Dropout(inplace=False), and no operation like relu_() on it"
            )
        return None

    def lost(self, reached: Collection[Captured | None]) -> Captured | None:
        """Return a tensor that needs a gradient, was freed, and is not in the graph of the loss; else `None`."""
        if not torch.is_grad_enabled() or (self.fused is not None and self.fused in reached):
            return None
        for x in (self.raw, self.dropped):
            if x is not None and x.needs and x not in reached and not self.tensor_of(x).requires_grad:
                return x
        return None

    def tensor_of(self, captured: Captured) -> Tensor:
        """Return a tensor of this run, with its graph if that is alive, else detached."""
        x = captured.itself()
        if x is None and captured is self.raw:
            for keeper in self.keepers:
                if (mark := keeper()) is not None and mark.kept is not None:
                    x = mark.kept
        return captured.data if x is None else plain(x)

    def drop(self) -> None:
        """Free the tensors; their hooks still add the gradients of penalties."""
        for x in (self.raw, self.dropped, self.fused):
            if x is not None:
                x.data = EMPTY
        for keeper in self.keepers:
            if (mark := keeper()) is not None:
                mark.kept = None


def sizes_of(x: Tensor, time_at: bool | int) -> tuple[int, int] | None:
    """Return how many sequences of how many time steps an activation has; `None` where its shape does not tell."""
    if x.dim() != 3:
        return None
    time_dim = time_dim_of(time_at)
    return x.shape[0 if time_dim % 3 else 1], x.shape[time_dim]


class Mark:
    """Mark an output of an autograd node as a tensor of a run, and as a hook of that tensor add gradients to its own.

    Attributes:
        run: the run.
        itself: a weak reference to the tensor.
        captured: the tensor of the run; `None` for another tensor that the module returned.
        number: which output of its node the tensor is.
        kept: raw itself, for a loss that reaches the run only by another tensor.
    """

    __slots__ = ("__weakref__", "captured", "itself", "kept", "number", "run")
    __torch_unserializable__ = True  # so that saving the tensor does not warn of the hook

    def __init__(self, run: Run, captured: Captured | None, x: Tensor, kept: Tensor | None = None) -> None:
        self.run, self.captured, self.number, self.kept = run, captured, x.output_nr, kept
        self.itself = weakref.ref(x) if captured is None else captured.itself
        if kept is not None:
            run.keepers.append(weakref.ref(self))
        node: Any = x.grad_fn
        if node is not None:  # a leaf has no lasting node: `search` looks at its hooks
            node.metadata.setdefault(KEY, []).append(self)

    def hook(self, x: Tensor) -> None:
        """Add gradients before other hooks of the tensor see the sum, as if autograd had added them."""
        handle = x.register_hook(self)
        hooks = handle.hooks_dict_ref()
        if hooks is not None and len(hooks) > 1:
            others = dict(hooks)
            own = {handle.id: others.pop(handle.id)}
            hooks.clear()  # PyTorch calls them in the order of insertion
            hooks.update(own | others)

    @untraced
    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if self.run.guard is not None:
            gradient = self.run.guard.passed(self, gradient)
        if self.captured is not None:
            for add in self.captured.adds:
                gradient = add(gradient)
        return gradient


class Watch:
    """See the backwards through a regularizer's runs, to miss the penalty.

    Attributes:
        content: whether a backward ever had a penalty, or its absence was warned of.
        task: the id of the first backward without it.
    """

    def __init__(self) -> None:
        self.content = False
        self.task: int | None = None

    def passed(self, mark: Mark, gradient: Tensor | None) -> Tensor | None:
        """Let a gradient pass.

        Raises:
            RuntimeError: the loss of this backward has a penalty, in which the run is not.
        """
        run = mark.run
        if self.content and run.refused is None:
            return gradient
        task = current()
        if run.refused == task:
            raise RuntimeError(
                f"on_backward_begin: the loss depends on a run of the {run.names[0]} that an earlier loss did not "
                "depend on, beside later runs, so that its penalty was not found. Take the penalty of the runs of one "
                "loss before the next run of the module, or give each loss a regularizer of its own"
            )
        if not self.content and self.task != task:
            if self.task is not None:
                self.content = True
                warnings.warn(
                    f"attach: a second backward goes through the output of the attached {run.names[0]}, and neither "
                    "had a penalty: call loss = regularizer.on_backward_begin(loss), and then loss.backward(); or "
                    "attach(..., in_backward=True)",
                    stacklevel=_level_of_caller(),
                )
            self.task = task
        return gradient


def _level_of_caller() -> int:
    """Return how many frames above the caller's the code lies that is neither fastreg's nor PyTorch's."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastreg", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _version(x: Tensor) -> int:
    """Return how often a tensor was changed in place; PyTorch does not count that of inference tensors."""
    return 0 if x.is_inference() else x._version


Reached: TypeAlias = Mapping[Run, Mapping[Captured | None, Any]]  # tensors that a loss depends on, and their nodes


class Search(NamedTuple):
    """The tensors of runs in the graph of a loss, and the runs that the search did not wait for."""

    reached: Reached
    passed_over: list[weakref.ref[Run]]


def search(loss: Tensor, runs: Sequence[Run]) -> Search:
    """Find the tensors of runs in the graph of a loss, and their nodes; `None` stands for other outputs of a run.

    The search is breadth first, and stops when every tensor is found. It does not wait for a run that an earlier search
    of a whole graph has missed, unless there are no others: one run that is kept would cost a whole search a step.
    """
    wanted = set(runs)
    left = {x for run in runs if not run.missed for x in run.carriers} or {x for run in runs for x in run.carriers}
    found: dict[Run, dict[Captured | None, Any]] = {}
    marked: dict[Any, list[Mark]] = {}
    seen: set[Any] = {None}
    queue: deque[tuple[Any, int]] = deque([(loss.grad_fn, loss.output_nr)])
    while queue and left:
        node, number = queue.popleft()
        if node in seen:
            marks = marked.get(node)
        else:
            seen.add(node)
            following = node.next_functions
            queue.extend(following)
            marks = node.metadata.get(KEY) if following else _marks_of_leaf(node)
            if marks:
                marked[node] = marks
        for mark in marks or ():
            if mark.number == number and mark.run in wanted:
                found.setdefault(mark.run, {}).setdefault(mark.captured, node)
                left.discard(mark.captured)
    for run in runs if left else ():
        run.missed = run not in found
    return Search(found, [] if left else [weakref.ref(run) for run in runs if run.missed and run not in found])


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
