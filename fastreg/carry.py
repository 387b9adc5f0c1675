"""The penalty of captured runs: sums in the forward, gradients added in the backward to those that arrive.

A `Term` adds the gradient of the penalty at one activation, once it gets the upstream gradient of a backward. It comes
from `_Carry`, one node between the penalty and the loss, whose backward runs before the nodes of the loss's graph; or
with `in_backward` from `Always`, which sees the gradients that arrive at a run, and has no loss.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.addition import Addition
from fastreg.capture import EMPTY, Captured, Joined, Mark, Run, Search, Watch, version_of
from fastreg.dropout import kept_penalty
from fastreg.operation import compute
from fastreg.penalty import PenaltyPlan
from fastreg.problem import ARTAR, Call, Coefficient, Options, is_on, layers_of
from fastreg.torch_state import current, keeps_graph, observed, plain, untraced


class Term(NamedTuple):
    """The gradient of a penalty at an activation.

    addition  adds it to a gradient
    side      the activation, whose hooks call the addition
    call      of the activation, without it
    versions  the coefficients that are tensors, and how often they had been changed in place
    """

    addition: Addition
    side: Captured | Joined
    call: Call
    versions: Sequence[tuple[Tensor, int]]

    def begin(self, task: int, upstream: Tensor, raw: Tensor) -> None:
        """Have the hooks add the gradient in a backward.

        Raises:
            RuntimeError: a coefficient has changed.
        """
        for x, version in self.versions:
            if version_of(x) != version:
                raise RuntimeError(
                    "attach: a tensor alpha or beta was modified by an inplace operation between the forward and the "
                    "backward; change it after the backward"
                )
        self.side.begin(
            task, functools.partial(self.addition, upstream, self.call._replace(raw=raw, dropped=None)), raw
        )


class Step:
    """Collect the terms that hooks will add, until the penalty is formed and has a loss.

    Attributes:
        terms: the terms.
        saved: the activation of each term.
        counts: whether a backward of the loss plus the penalty has a gradient of the penalty.
        passed_over: the runs that the backward must not reach, as the loss was not searched for them.
        watch: sees whether a backward has the penalty, or `None`.
    """

    def __init__(self, passed_over: Sequence[Run] = (), watch: Watch | None = None) -> None:
        self.passed_over, self.watch, self.counts = passed_over, watch, False
        self.terms: list[Term] = []
        self.saved: list[Tensor] = []

    def add(self, run: Run, call: Call, plan: Any, layer: int) -> None:
        """Add the terms of a run that hooks are to add, for its call."""
        if not any([x.hooked for x in run.sides]):
            return
        additions = vars(plan).setdefault("additions", {})
        if layer not in additions:
            additions[layer] = _additions(call)
        for addition in additions[layer]:
            side = run.raw if addition.of_raw else run.squared
            if side.hooked:
                own = addition.of(call)
                versions = [(x, version_of(x)) for x in (own.alpha, own.beta) if isinstance(x, Tensor)]
                self.terms.append(Term(addition, side, own, versions))
                self.saved.append(side.tensor())
                self.counts = True

    def penalize(self, loss: Tensor, penalty: Tensor, adds: bool) -> Tensor:
        """Return the penalty, differentiable where it is added to the loss, or with `adds` their sum."""
        if not (torch.is_grad_enabled() and self.counts):
            if self.watch is not None:
                self.watch.content = True  # no backward will have the penalty
            return loss + penalty if adds else penalty
        if adds and type(loss) is not Tensor:  # a subclass would be a view, which nothing may change in place
            return loss + self.penalize(loss, penalty, False)
        return (_Carry.apply if observed() else _apply)(self, loss, penalty, adds)


class _Carry(Function):
    """Return the penalty, or with `adds` the sum of the loss and the penalty."""

    @staticmethod
    def forward(ctx: Any, step: Step, loss: Tensor, penalty: Tensor, adds: bool) -> Tensor:
        ctx.save_for_backward(*step.saved)
        ctx.terms, ctx.passed_over, ctx.watch = step.terms, step.passed_over, step.watch
        ctx.loss = None if adds else (loss.shape, loss.dtype, loss.device)
        return loss + penalty if adds else penalty.clone()  # the node of a fused dropout keeps its own

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.watch is not None:
            ctx.watch.content = True
        task, upstream = current(), grad if grad.dim() == 0 else grad.reshape(())
        for run in ctx.passed_over:
            run.refused = task
        own = upstream.clone()  # as a hook of the loss may change its own in place
        for term, raw in zip(ctx.terms, ctx.saved_tensors, strict=True):
            # Without a second derivative a graph would close a cycle, if the backward failed.
            term.begin(task, own, raw if torch.is_grad_enabled() else raw.detach())
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_end, ctx.terms, task))
        if ctx.loss is None:
            return None, grad, upstream, None
        shape, dtype, device = ctx.loss
        # Zeros let a gradient arrive at the activations even if the penalty alone is differentiated.
        return None, torch.zeros(shape, dtype=dtype, device=device), grad, None


# `Function.apply` without the part for transforms of torch.func: 3 us less.
_apply: Any = super(Function, _Carry).apply  # pyright: ignore[reportAttributeAccessIssue]


def _end(terms: Sequence[Term], task: int) -> None:
    """Free the gradients that a backward did not add."""
    for term in terms:
        term.side.end(task)


def penalty_of_runs(
    groups: Sequence[Sequence[Run]],
    found: Search,
    loss: Tensor,
    coefficients: tuple[Coefficient, Coefficient],
    watch: Watch | None = None,
) -> tuple[ARTAR, Step]:
    """Compute the penalty of runs, and plan to add its gradient in the backward of the loss.

    Args:
        groups: lists of runs; the runs of one list are joined along time into one activation.
        found: the search of the loss for the runs.
        loss: the loss.
        coefficients: alpha and beta.
        watch: sees whether a backward has the penalty.

    Returns:
        The penalty, differentiable as far as the loss does not depend on the activations, and the step that has the
            other gradients.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    step, formed = Step(found.passed_over, watch), []
    alike: dict[Any, list[Run]] = {}  # of one call, which allocates and checks once
    for i, group in enumerate(groups):
        terms = _of_dropout(group[0], coefficients)
        if terms is not None:
            formed.append(terms)
            step.counts = True
        else:
            run = _joined(group)
            alike.setdefault(_kind(run) or i, []).append(run)
    for runs in alike.values():
        formed.append(_measured(runs, coefficients, step))
        for run in runs:
            if isinstance(run.raw, Joined):
                run.drop()  # the terms of a loss that is kept would hold the joined tensors
    return total(formed, loss.device), step


def total(formed: Sequence[ARTAR], device: torch.device) -> ARTAR:
    """Add up penalties of layers, which may live on several devices."""
    formed = [terms if terms.penalty.device == device else ARTAR(*(x.to(device) for x in terms)) for terms in formed]
    return functools.reduce(lambda a, b: ARTAR(*map(torch.add, a, b)), formed)


def _of_dropout(run: Run, coefficients: tuple[Coefficient, Coefficient]) -> ARTAR | None:
    """Return the penalty that a fused dropout has formed, with its graph; `None` for other coefficients or none."""
    if run.fused is None or any([isinstance(x, Tensor) for x in coefficients]):
        return None  # to compare tensors would wait for a device
    node = run.fused.node() if run.fused.coefficients == coefficients else None
    return None if node is None else ARTAR(kept_penalty(node), *run.fused.terms)


class Always:
    """Add the gradient of a run's penalty in every backward through the run, as `in_backward` asks for.

    The checks are those of `on_backward_begin`, as far as a backward without a loss can make them.

    Attributes:
        single: the latest run of one time step, and the backward through it; shared by the runs of a module.
        grad: the upstream gradient.
        terms: by the tensor at which the gradient is added.
        tasks: by tensors of the run, the ids of the latest backwards through them.
    """

    def __init__(self, single: list[Any]) -> None:
        self.single, self.grad = single, EMPTY
        self.terms: dict[Any, Term] = {}
        self.tasks: dict[Captured, int] = {}

    def form(self, run: Run, coefficients: tuple[Coefficient, Coefficient], scale: Coefficient) -> ARTAR:
        """Compute the terms of a complete run, and plan to add their gradient with an upstream gradient `scale`."""
        if (fault := run.fault) is not None:
            raise RuntimeError(f"attach: {fault}")
        for x in run.carriers:
            x.hooked = True
        step = Step()
        terms = _measured([_joined([run])], coefficients, step)
        self.terms = {term.side: term for term in step.terms}
        like: Any = {"dtype": terms.penalty.dtype, "device": terms.penalty.device}
        self.grad = scale if isinstance(scale, Tensor) else torch.full((), scale, **like)
        return terms

    def passed(self, mark: Mark, gradient: Tensor | None) -> None:
        """Have the tensor add the gradient of the penalty.

        Raises:
            RuntimeError: the penalty is wrong or lost in part; the message names the remedy.
        """
        task, run, captured = current(), mark.run, mark.captured
        if captured is None:
            self._wait_for_raw(mark)
        if captured is None or gradient is None:  # a loss that does not depend on the tensor, as with DDP's sink
            return
        if (fault := self._fault(run, captured, task)) is not None:
            raise RuntimeError(f"attach: {fault}")
        self.tasks[captured] = task
        if captured in self.terms:
            self.terms[captured].begin(task, self.grad, captured.data)
        if not keeps_graph() and (captured is run.raw or not run.raw.needs):
            run.drop()

    def _fault(self, run: Run, captured: Captured, task: int) -> str | None:
        """Say why the penalty is wrong where the gradient of a tensor arrives; that of dropped comes before raw's."""
        (module, dropout), squared = run.names, run.squared
        if run.raw.data is EMPTY:
            return "an earlier backward has freed the activations; pass retain_graph=True to it"
        if (fault := run.fault) is not None:
            return fault
        if torch.is_grad_enabled():  # each backward of a gradient would add the penalty, too
            return "in_backward does not go with second derivatives (create_graph=True); use on_backward_begin"
        if captured is not run.raw:
            return None
        if squared is not run.raw and squared in self.terms and self.tasks.get(squared) != task:
            return (
                f"the loss depends on the output of the {module}, and not on that of the attached {dropout}, so that "
                "the penalty's gradient would be lost; let the loss depend on it, or attach no dropout"
            )
        if run.steps == 1:
            before, self.single[:] = tuple(self.single), (task, weakref.ref(run))
            if before[:1] == (task,) and before[1]() is not run:
                return (
                    f"the {module} ran several times, over one time step each, which leaves no changes for TAR; use "
                    "on_backward_begin with attach(..., stepwise=True), which joins the runs of a step along time"
                )
        return None

    def _wait_for_raw(self, mark: Mark) -> None:
        """Check at the end of a backward that goes through another output of the module that one went through raw."""
        name, node = mark.run.names[0], getattr(mark.itself(), "grad_fn", None)
        following = [x for x, _ in getattr(node, "next_functions", ()) if x is not None and x.next_functions]
        if following and not any(map(torch._C._will_engine_execute_node, following)):  # pyright: ignore
            return  # the gradient of the state itself is asked for, and no other
        raw = mark.run.raw

        def check() -> None:
            if raw not in self.tasks:
                raise RuntimeError(
                    f"attach: the loss depends on the {name} by its state alone, not by its output, so that the "
                    "penalty's gradient would be lost; let it depend on the output, detach the state, or use "
                    "on_backward_begin"
                )

        torch.autograd.Variable._execution_engine.queue_callback(check)


def _joined(group: Sequence[Run]) -> Run:
    """Join runs along time.

    Second derivatives mix those of several tensors. So autograd propagates all gradients if it does for one.
    """
    first, carriers = group[0], [x for run in group for x in run.carriers]
    if not all([x.hooked for x in carriers]):
        for x in carriers:
            x.hooked = x.hooked and not x.tensor().requires_grad
    if len(group) == 1:
        return first
    raw = Joined([run.raw for run in group], axis := first.axis)
    valid, starts = _joined_marks(group, "valid", 1), _joined_marks(group, "starts", 0)
    whole = Run(raw, None, first.place, valid, starts, first.names, None, first.grad_enabled, first.marked)
    of_raw = all([run.squared is run.raw for run in group])
    whole.complete(raw if of_raw else Joined([run.squared for run in group], axis))
    return whole


def _kind(run: Run) -> Any:
    """Return the shape, device and dtypes that runs of one call share; `None` with steps that do not count."""
    if run.packed is not None or run.valid is not None or run.starts is not None:
        return None
    raw = run.raw.data
    shape = raw.shape[:-1] if run.place.time_dim is None else raw.shape
    return shape, raw.device, raw.dtype, run.squared.data.dtype, run.place


def _measured(runs: Sequence[Run], coefficients: tuple[Coefficient, Coefficient], step: Step) -> ARTAR:
    """Compute the penalty of runs of one kind, and plan the terms of its gradient."""
    first, activations = runs[0], [run.activations() for run in runs]
    device = first.raw.data.device
    if any([isinstance(x, Tensor) for x in coefficients]):
        coefficients = tuple([plain(x).to(device) if isinstance(x, Tensor) else x for x in coefficients])  # pyright: ignore
    steps, options = (None, first.valid, first.starts), Options(*first.place, "mean", True)
    raw_and_dropped = activations[0] if len(runs) == 1 else tuple(zip(*activations, strict=True))
    terms, calls, plan = compute(_RunsPlan, raw_and_dropped, coefficients, steps, options)  # pyright: ignore
    for i, (run, call) in enumerate(zip(runs, calls, strict=True)):
        step.add(run, call, plan, i)
    return terms


class _RunsPlan(PenaltyPlan):
    """How to compute the penalty of runs, with the code of each layer that adds its gradients."""

    def __call__(self, given: Sequence[Any], values: Any) -> Any:
        """Return the penalty with its terms, the calls of the layers, and the plan."""
        layers = zip_longest(self.kinds, *map(layers_of, given))
        calls = [Call(plain(x), None if kind.ar_of_raw else plain(y), *values, kind) for kind, x, y in layers]  # pyright: ignore
        return super().__call__(given, values), calls, self


def _additions(call: Call) -> Sequence[Addition]:
    """Return the code that adds the gradients of a call.

    The gradient of TAR is added to that of raw, and the gradient of AR to that of dropped, or of raw if it is of raw.
    """
    ar, tar = is_on(call.alpha), is_on(call.beta)
    terms = [(True, ar, tar)] if call.dropped is None else [(True, False, tar), (False, ar, False)]
    return [Addition(call, *term) for term in terms if True in term[1:]]


def _joined_marks(group: Sequence[Run], name: str, default: int) -> Tensor | None:
    """Join the valid steps of runs, or their starts; those of a run without any are the default.

    Raises:
        ValueError: the marks of a run have another shape than the others, or not its steps.
    """
    marks = [getattr(run, name) for run in group]
    known = next((x for x in marks if x is not None), None)
    if known is None:
        return None
    shapes = [(*known.shape[:-1], run.steps) for run in group]
    each = [known.new_full(shape, default) if x is None else x for x, shape in zip(marks, shapes, strict=True)]
    for x, shape in zip(each, shapes, strict=True):  # of all runs together, the numbers of steps may be right
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, batch and time steps of the run, got {tuple(x.shape)}")
    return torch.cat(each, -1)
