"""Runs of attached modules, kept by the autograd graph, and the hooks that add their penalty's gradient.

A forward hook puts a `Mark` on the autograd node of each regularized tensor, in `node.metadata`, so that the graph owns
the run. A run holds its tensors detached: a tensor itself would hold its node, a reference cycle through C++ that is
never collected. `search` searches the graph of a loss for marks. A mark is also a hook of its tensor, which adds the
gradient of a penalty to the gradient that arrives there.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.problem import Place
from fastreg.torch_state import current, level_of_caller, plain, untraced

KEY = "fastreg"  # of the marks in a node's metadata
EMPTY = torch.empty(0)
number_of = methodcaller("_sequence_nr")  # of a node, in the order in which a thread made them


class Captured:
    """Hold a tensor without its graph, and without a subclass that only decorates it.

    It does not know its run: the two would be a reference cycle.

    Attributes:
        data: the tensor, detached, with an axis of time; it shares the memory and the version.
        itself: a weak reference to the tensor.
        axis: the axis of time that a tensor of one time step lacks, or `None`.
        needs: whether it requires a gradient.
        version: its version when it was captured.
        hooked: whether its hook is to add the gradient of the penalty, as the loss depends on the tensor.
        due: functions that add that gradient to the one that arrives, by the backwards that do so.
    """

    __slots__ = ("axis", "data", "due", "hooked", "itself", "needs", "version")

    def __init__(self, x: Tensor, axis: int | None = None) -> None:
        self.itself, self.axis, self.needs, self.hooked = weakref.ref(x), axis, x.requires_grad, False
        self.data, self.version = plain(x).detach(), version_of(x)
        if axis is not None:
            self.data = self.data.unsqueeze(axis)
        self.due: dict[int, Callable[[Tensor], Tensor]] = {}

    def tensor(self) -> Tensor:
        """Return the tensor, with its graph if that is alive, else detached."""
        x = self.itself()
        if x is None:
            return self.data
        return plain(x) if self.axis is None else plain(x).unsqueeze(self.axis)

    def summed(self) -> Tensor:
        """Return the tensor that the penalty is of: detached, unless autograd has to propagate the gradient."""
        return self.data if self.hooked else self.tensor()

    def begin(self, task: int, add: Callable[[Tensor], Tensor], _: Tensor) -> None:
        """Have the hook call a function, too, with the gradient that arrives in a backward, with an axis of time."""
        axis, before = self.axis, self.due.get(task)
        own = add if axis is None else lambda x: add(x.unsqueeze(axis)).squeeze(axis)
        # Of joined runs, some may have a dropout that drops nothing, so that AR is of their raw, too.
        self.due[task] = own if before is None else lambda x: own(before(x))

    def end(self, task: int) -> None:
        """Forget a gradient that a backward did not add."""
        self.due.pop(task, None)


class Joined:
    """Join captured tensors of one layout along time, in the interface of `Captured`.

    Attributes:
        parts: the tensors.
        axis: the axis of time.
        data: the tensors, detached and joined.
    """

    def __init__(self, parts: Sequence[Captured], axis: int) -> None:
        self.parts, self.axis = parts, axis
        self.data = torch.cat([x.data for x in parts], axis)
        self.sizes = [x.data.shape[axis] for x in parts]

    @property
    def hooked(self) -> bool:
        """Return whether a hook is to add its part of the gradient."""
        return any([x.hooked for x in self.parts])

    def tensor(self) -> Tensor:
        """Return the tensors with their graphs, as second derivatives need all, or detached."""
        found = [x.tensor() for x in self.parts]
        return torch.cat(found, self.axis) if all([x.requires_grad for x in found]) else self.data

    def summed(self) -> Tensor:
        """Return the tensor that the penalty is of: detached, unless autograd has to propagate the gradient."""
        if all([x.hooked for x in self.parts]):
            return self.data
        return torch.cat([x.summed() for x in self.parts], self.axis)

    def begin(self, task: int, add: Callable[[Tensor], Tensor], like: Tensor) -> None:
        """Have each hook add its part of the gradient that a function adds to zeros."""
        parts = add(torch.zeros_like(like)).split(self.sizes, self.axis)
        for x, part in zip(self.parts, parts, strict=True):
            if x.hooked:
                x.begin(task, part.__add__, part)

    def end(self, task: int) -> None:
        """Forget gradients that a backward did not add."""
        for x in self.parts:
            x.end(task)


class Guard(Protocol):
    """See each gradient that arrives at a tensor of a run, before anything is added to it."""

    def passed(self, mark: Mark, gradient: Tensor | None) -> None:
        """Warn, raise, or have the tensor add a gradient in this backward."""
        ...


class Fused(NamedTuple):
    """The penalty that a fused dropout has formed.

    node          a weak reference to the dropout's node, which keeps the penalty
    coefficients  alpha and beta of the penalty
    terms         AR and TAR
    """

    node: Callable[[], Any]
    coefficients: tuple[Any, Any]
    terms: tuple[Tensor, ...]


@dataclass(eq=False)
class Run:
    """Hold one run of an attached module.

    Attributes:
        raw: the module's output, `Captured`, or `Joined` of several runs.
        packed: the `PackedSequence` that raw is the data of, or `None`.
        place: where time is.
        valid: the valid steps, or `None`.
        starts: the steps at which segments start, or `None`.
        names: of the types of the module and of its dropout, for messages.
        guard: sees the gradients that arrive.
        grad_enabled: whether gradients were enabled in the module and in its dropout.
        marked: whether its graph keeps it, so that a search can find it.
        dropped: the tensor that AR squares: the dropout's output, or raw; `None` before the dropout has run.
        fused: the penalty that a fused dropout has formed, or `None`.
        missed: whether a search of a whole graph has not found it.
        refused: the id of a backward that must not reach it, as its loss was not searched for it.
    """

    raw: Any
    packed: PackedSequence | None
    place: Place
    valid: Tensor | None
    starts: Tensor | None
    names: tuple[str, str]
    guard: Guard | None
    grad_enabled: bool
    marked: bool
    dropped: Any = None
    fused: Fused | None = None
    missed: bool = False
    refused: int | None = None

    def __post_init__(self) -> None:
        self.sides = [self.raw]  # and dropped, if that is another tensor

    def complete(self, dropped: Any) -> None:
        """Note the tensor that AR squares."""
        self.dropped = dropped
        self.sides = [self.raw] if dropped is self.raw else [self.raw, dropped]

    @property
    def squared(self) -> Any:
        """Return the tensor that AR squares, of a complete run."""
        return self.sides[-1]

    @property
    def carriers(self) -> list[Captured]:
        """Return the tensors to whose gradients the penalty's gradient is added."""
        return [x for x in self.sides if x.needs]

    def activations(self) -> tuple[Any, Any]:
        """Return raw and dropped as `fused_ar_tar` takes them."""
        raw = self._packed(self.raw.summed())
        return raw, raw if self.squared is self.raw else self._packed(self.squared.summed())

    def _packed(self, x: Tensor) -> Any:
        return x if self.packed is None else self.packed._replace(data=x)

    @property
    def axis(self) -> int:
        """Return the axis of time of runs that are joined along it."""
        return 1 if self.raw.data.dim() == 3 and self.place.batch_first else 0

    @property
    def steps(self) -> int:
        """Return how many time steps there are, or packed rows."""
        shape, axis = self.raw.data.shape, self.place.axis()
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    @property
    def changed(self) -> bool:
        """Return whether a tensor was changed in place since it was captured."""
        return any([version_of(x.data) != x.version for x in self.sides])

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

    def lost(self) -> Captured | None:
        """Return a tensor that needs a gradient, was freed, and is not in the graph of the loss; else `None`."""
        lost = [x for x in self.carriers if not x.summed().requires_grad and not x.hooked]
        return lost[0] if lost and torch.is_grad_enabled() else None

    def drop(self) -> None:
        """Free the tensors; their hooks still add the gradients of penalties."""
        for x in self.sides:
            x.data = EMPTY


class Mark:
    """Mark an output of an autograd node as a tensor of a run, and as a hook of that tensor add gradients to its own.

    Attributes:
        run: the run.
        captured: the tensor of the run; `None` for another tensor that the module returned.
        itself: a weak reference to the tensor.
        number: which output of its node the tensor is.
        kept: raw itself, for a loss that reaches the run only by another tensor.
    """

    __slots__ = ("captured", "itself", "kept", "number", "run")
    __torch_unserializable__ = True  # so that saving the tensor does not warn of the hook

    def __init__(self, run: Run, captured: Captured | None, x: Tensor, kept: Tensor | None = None) -> None:
        self.run, self.captured, self.number, self.kept = run, captured, x.output_nr, kept
        self.itself = weakref.ref(x)
        node: Any = x.grad_fn
        if node is not None:  # a leaf has no lasting node: `search` looks at its hooks
            node.metadata.setdefault(KEY, []).append(self)
        handle = x.register_hook(self)
        hooks = handle.hooks_dict_ref()
        if hooks is not None and len(hooks) > 1:  # ours sees the gradient first, as if autograd had added the penalty's
            others = dict(hooks)
            own = {handle.id: others.pop(handle.id)}
            hooks.clear()  # PyTorch calls them in the order of insertion
            hooks.update(own | others)

    @untraced
    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if self.run.guard is not None:
            self.run.guard.passed(self, gradient)
        add = None if self.captured is None else self.captured.due.pop(current(), None)
        if add is None:
            return gradient
        if gradient is None:
            raise RuntimeError(
                "attach: a tensor that the loss depends on got no gradient, and the penalty's cannot be added to None; "
                "let the function behind it return zeros"
            )
        return add(gradient)


class Watch:
    """See the backwards through a regularizer's runs, to miss the penalty.

    Attributes:
        content: whether a backward ever had a penalty, or its absence was warned of.
        task: the id of the first backward without it.
    """

    def __init__(self) -> None:
        self.content = False
        self.task: int | None = None

    def passed(self, mark: Mark, gradient: Tensor | None) -> None:
        """Warn of a second backward without a penalty.

        Raises:
            RuntimeError: the loss of this backward has a penalty, in which the run is not.
        """
        run = mark.run
        if self.content and run.refused is None:
            return
        task = current()
        if run.refused == task:
            raise RuntimeError(
                f"on_backward_begin: the loss depends on a run of the {run.names[0]} that an earlier loss did not "
                "depend on, beside later runs, so that its penalty was not found. Take the penalty of the runs of one "
                "loss before the next run of the module, or give each loss a regularizer of its own"
            )
        if self.content or self.task == task:
            return
        if self.task is not None:
            self.content = True
            warnings.warn(
                f"attach: a second backward goes through the output of the attached {run.names[0]}, and neither had a "
                "penalty: call loss = regularizer.on_backward_begin(loss), and then loss.backward(); or attach(..., "
                "in_backward=True)",
                stacklevel=level_of_caller(),
            )
        self.task = task


def version_of(x: Tensor) -> int:
    """Return how often a tensor was changed in place; PyTorch does not count that of inference tensors."""
    return 0 if x.is_inference() else x._version


class Search(NamedTuple):
    """The runs that a loss depends on, and the runs that the search did not wait for."""

    found: set[Run]
    passed_over: list[Run]


def search(loss: Tensor, runs: Sequence[Run]) -> Search:
    """Find the runs that a loss depends on, and have the hooks of their tensors in its graph add gradients.

    The search is breadth first, and stops when every tensor is found. It does not wait for a run that an earlier search
    of a whole graph has missed, unless there are no others: one run that is kept would cost a whole search a step.
    """
    wanted, found = set(runs), set()
    left = {x for run in [run for run in runs if not run.missed] or runs for x in run.carriers}
    marked: dict[Any, Sequence[Mark]] = {None: ()}
    queue: deque[tuple[Any, int]] = deque([(loss.grad_fn, loss.output_nr)])
    while queue and left:
        node, number = queue.popleft()
        marks = marked.get(node)
        if marks is None:
            following = node.next_functions
            queue.extend(following)
            marks = marked[node] = node.metadata.get(KEY, ()) if following else _marks_of_leaf(node)
        for mark in marks:
            if mark.number == number and mark.run in wanted:
                found.add(mark.run)
                if mark.captured is not None:
                    mark.captured.hooked = True
                    left.discard(mark.captured)
    others = [run for run in runs if run not in found]
    if left:  # the loss does not depend on them
        for run in others:
            run.missed = True
        others = []
    return Search(found, [run for run in others if run.missed])


def _marks_of_leaf(node: Any) -> list[Mark]:
    """Return the marks among the hooks of the tensor that a node accumulates the gradient of."""
    hooks = getattr(getattr(node, "variable", None), "_backward_hooks", None) or {}
    return [hook for hook in hooks.values() if isinstance(hook, Mark)]


def nodes_before(node: Any, others: Sequence[Any]) -> set[Any]:
    """Return the nodes that a node was computed from, as far back as the first of some others."""
    first = min(map(number_of, others))  # a node has a higher number than those it was computed from
    found, queue = set(), [node]
    while queue:
        node = queue.pop()
        if node is not None and node not in found and number_of(node) >= first:
            found.add(node)
            queue += [following for following, _ in node.next_functions]
    return found
