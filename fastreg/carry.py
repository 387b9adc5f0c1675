"""The penalty of captured runs: sums in the forward, gradients added in the backward to those that arrive.

A `Term` adds the gradient of the penalty at one activation, once it gets the upstream gradient of a backward. It comes
from `_Carry`, one node between the penalty and the loss, whose backward runs before the nodes of the loss's graph; or
with `in_backward` from `Always`, which sees the gradients that arrive at a run, and has no loss.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.addition import Addition
from fastreg.capture import EMPTY, Captured, Mark, Run, Search, Watch, version_of
from fastreg.dropout import kept_penalty
from fastreg.operation import pack, unpack
from fastreg.penalty import penalty_of
from fastreg.prepare import Options, calls_of
from fastreg.problem import ARTAR, Call, Coefficient, Kind, is_on, rows_of
from fastreg.torch_state import current, keeps_graph, observed, plain, untraced

FREED = "an earlier backward has freed the activations; pass retain_graph=True to it"


class Term(NamedTuple):
    """The gradient of a penalty at an activation, and the tensors that the activation was joined from.

    addition  adds it to a gradient
    tensors   the tensors whose hooks add their parts, by the numbers of the parts
    split     splits the gradient as the tensors were joined; `None` for one tensor
    """

    addition: Addition
    tensors: Sequence[tuple[int, Captured]]
    split: Callable[[Tensor], Sequence[Tensor]] | None

    def begin(self, task: int, upstream: Tensor, call: Call) -> None:
        """Have the hooks add the gradient in a backward, for the call of the activation."""
        if self.split is None:
            self.tensors[0][1].due[task] = functools.partial(self.addition, upstream, call)
            return
        parts = self.split(self.addition(upstream, call, torch.zeros_like(call.raw)))
        for i, x in self.tensors:
            x.due[task] = functools.partial(_add_part, parts[i])


def _add_part(part: Tensor, gradient: Tensor) -> Tensor:
    """Add a part of the gradient of joined tensors, which may have an axis of time that the tensor lacks."""
    return gradient + part.reshape(gradient.shape)


class Step:
    """Collect the terms that hooks will add, until the penalty is formed and has a loss.

    Attributes:
        terms: the terms.
        saved: of each term the activation, and the other tensors of its call, if any.
        rests: of each term how many tensors these are, and the rest of its call.
        counts: whether a backward of the loss plus the penalty has a gradient of the penalty.
        passed_over: the runs that the backward must not reach, as the loss was not searched for them.
        watch: sees whether a backward has the penalty, or `None`.
    """

    def __init__(self, passed_over: Sequence[Run] = (), watch: Watch | None = None) -> None:
        self.passed_over, self.watch, self.counts = passed_over, watch, False
        self.terms: list[Term] = []
        self.saved: list[Tensor | None] = []
        self.rests: list[tuple[int, Any]] = []

    def add(self, term: Term, call: Call) -> None:
        """Add a term, and the call of its activation."""
        tensors, rest = pack(call.alpha, call.beta, call.steps)
        self.terms.append(term)
        self.saved += call.raw, *tensors
        self.rests.append((len(tensors), rest))
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
        ctx.terms, ctx.rests, ctx.passed_over, ctx.watch = step.terms, step.rests, step.passed_over, step.watch
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
        for term, call in zip(ctx.terms, _calls(ctx.terms, ctx.saved_tensors, ctx.rests), strict=True):
            term.begin(task, own, call)
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_end, ctx.terms, task))
        if ctx.loss is None:
            return None, grad, upstream, None
        shape, dtype, device = ctx.loss
        # Zeros let a gradient arrive at the activations even if the penalty alone is differentiated.
        return None, torch.zeros(shape, dtype=dtype, device=device), grad, None


# `Function.apply` without the part for transforms of torch.func: 3 us less.
_apply: Any = super(Function, _Carry).apply  # pyright: ignore[reportAttributeAccessIssue]


def _calls(terms: Sequence[Term], saved: Sequence[Any], rests: Sequence[tuple[int, Any]]) -> list[Call]:
    """Return the calls of terms from the tensors that a step saves, and the rest of each."""
    calls, at = [], 0
    for term, (count, rest) in zip(terms, rests, strict=True):
        raw, *tensors = saved[at : at + 1 + count]
        if raw.requires_grad and not torch.is_grad_enabled():
            raw = raw.detach()  # a graph would close a cycle, if the backward failed
        calls.append(Call(raw, None, *unpack(tensors, rest), term.addition.kind))
        at += 1 + count
    return calls


def _end(terms: Sequence[Term], task: int) -> None:
    """Free the gradients that a backward did not add."""
    for term in terms:
        for _, x in term.tensors:
            x.due.pop(task, None)


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
    alike: dict[Any, list[_Part]] = {}  # of one call, which allocates and checks once
    for i, group in enumerate(groups):
        terms = _of_dropout(group[0], coefficients)
        if terms is not None:
            formed.append(terms)
            step.counts = True
        else:
            part = _part(group)
            alike.setdefault(part.kind() or i, []).append(part)
    for parts in alike.values():
        formed.append(_measured(parts, coefficients, step))
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
        terms: by the tensor at which the gradient is added: the term, and the call of its activation.
        versions: the coefficients that are tensors, and how often they had been changed in place.
        tasks: by tensors of the run, the ids of the latest backwards through them.
    """

    def __init__(self, single: list[Any]) -> None:
        self.single, self.grad = single, EMPTY
        self.terms: dict[Captured, tuple[Term, Call]] = {}
        self.versions: list[tuple[Tensor, int]] = []
        self.tasks: dict[Captured, int] = {}

    def form(self, run: Run, coefficients: tuple[Coefficient, Coefficient], scale: Coefficient) -> ARTAR:
        """Compute the terms of a complete run, and plan to add their gradient with an upstream gradient `scale`."""
        if (fault := run.fault) is not None:
            raise RuntimeError(f"attach: {fault}")
        for x in run.carriers:
            x.hooked = True
        step = Step()
        terms = _measured([_part([run])], coefficients, step)
        for term, call in zip(step.terms, _calls(step.terms, step.saved, step.rests), strict=True):
            self.terms[term.tensors[0][1]] = term, call.of(EMPTY)
            self.versions += [(x, version_of(x)) for x in (call.alpha, call.beta) if isinstance(x, Tensor)]
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
            term, call = self.terms[captured]
            term.begin(task, self.grad, call.of(captured.data))
        if not keeps_graph() and (captured is run.raw or not run.raw.needs):
            run.drop()

    def _fault(self, run: Run, captured: Captured, task: int) -> str | None:
        """Say why the penalty is wrong where the gradient of a tensor arrives; that of dropped comes before raw's."""
        (module, dropout), squared = run.names, run.squared
        if run.raw.data is EMPTY:
            return FREED
        if (fault := run.fault) is not None:
            return fault
        if any(version_of(x) != version for x, version in self.versions):
            return (
                "a tensor alpha or beta was changed in place between the forward and the backward; change it after the "
                "backward"
            )
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


class _Part(NamedTuple):
    """An activation of the penalty, as `fused_ar_tar` takes it, and the runs that are joined in it."""

    raw: Any
    dropped: Any
    valid: Tensor | None
    starts: Tensor | None
    group: Sequence[Run]

    def kind(self) -> Any:
        """Return the shape, device and dtypes that activations of one call share; `None` with valid steps."""
        first, raw = self.group[0], self.raw
        if first.packed is not None or self.valid is not None or self.starts is not None:
            return None
        shape = raw.shape[:-1] if isinstance(first.time_at, bool) else raw.shape
        return shape, raw.device, raw.dtype, self.dropped.dtype, first.time_at, type(first.time_at)


def _part(group: Sequence[Run]) -> _Part:
    """Join runs along time.

    Second derivatives mix those of several tensors. So autograd propagates all gradients if it does for one.
    """
    first, carriers = group[0], [x for run in group for x in run.carriers]
    if not all([x.hooked for x in carriers]):
        for x in carriers:
            x.hooked = x.hooked and not x.tensor().requires_grad

    def whole(tensors: Sequence[Tensor]) -> Any:
        x = _joined(first, tensors)
        return x if first.packed is None else first.packed._replace(data=x)

    raw = whole([run.raw.summed() for run in group])
    of_raw = all([run.squared is run.raw for run in group])
    dropped = raw if of_raw else whole([run.squared.summed() for run in group])
    valid, starts = [run.valid for run in group], [run.starts for run in group]
    return _Part(raw, dropped, _joined_marks(group, valid, 1), _joined_marks(group, starts, 0), group)


def _measured(parts: Sequence[_Part], coefficients: tuple[Coefficient, Coefficient], step: Step) -> ARTAR:
    """Compute the penalty of parts of one kind, and plan the terms of its gradient."""
    first, raw, dropped = parts[0], parts[0].raw, parts[0].dropped
    if len(parts) > 1:
        raw, dropped = [x.raw for x in parts], [x.dropped for x in parts]
    device, time_at = rows_of(first.raw).device, first.group[0].time_at
    alpha, beta = [plain(x).to(device) if isinstance(x, Tensor) else x for x in coefficients]
    place = (time_at, None) if isinstance(time_at, bool) else (None, time_at)
    steps, options = (None, first.valid, first.starts), Options(*place, "mean", True)
    calls = calls_of((raw, dropped), (alpha, beta), steps, options)
    penalty, terms = penalty_of(calls)
    for part, call in zip(parts, calls, strict=True):
        if any([x.hooked for run in part.group for x in run.sides]):
            for of_raw, of in _calls_of_gradients(call):
                _plan(part.group, of_raw, of, step)
    return ARTAR(penalty, *(terms or ()))


def _calls_of_gradients(call: Call) -> list[tuple[bool, Call]]:
    """Split a call in one of TAR, whose gradient is added to that of raw, and one of AR, which is added to dropped's.

    Returns:
        Whether it is raw, and the call of that tensor as raw.
    """
    raw, dropped, alpha, beta, steps, kind = call
    ar, tar = is_on(alpha), is_on(beta)
    if dropped is None:
        return [(True, Call(raw, None, alpha, beta, steps, kind))] if ar or tar else []
    calls = [(True, Call(raw, None, 0.0, beta, steps, kind))] if tar else []
    return calls + ([(False, Call(dropped, None, alpha, 0.0, steps, kind))] if ar else [])


def _plan(group: Sequence[Run], of_raw: bool, call: Call, step: Step) -> None:
    """Plan the term of raw, or of dropped, if a hook is to add any of its parts."""
    tensors = [run.raw if of_raw else run.squared for run in group]
    hooked = [(i, x) for i, x in enumerate(tensors) if x.hooked]
    if hooked:
        found, split = [x.tensor() for x in tensors], None
        if not all([x.requires_grad for x in found]):  # second derivatives need the graphs of all
            found = [x.data for x in tensors]
        if len(group) > 1 or tensors[0].axis is not None:
            axis = _axis(group[0])
            split = functools.partial(torch.split, split_size_or_sections=[x.shape[axis] for x in found], dim=axis)
        step.add(Term(_addition(of_raw, call), hooked, split), call.of(_joined(group[0], found)))


def _addition(of_raw: bool, call: Call) -> Addition:
    """Return the code that adds the gradient of raw, or of dropped, which is kept with the plans of the whole call."""
    kind, plans, key = call.kind, call.kind.plans, (Addition, of_raw)
    found = None if plans is None else plans.get(key)
    if found is None:
        own = Kind(kind.time_dim, kind.reduction, measured=False, ar_of_raw=True, dtype=kind.dtype)
        found = Addition(Call(call.raw, None, call.alpha, call.beta, call.steps, own))
        if plans is not None:
            plans[key] = found
    return found


def _axis(run: Run) -> int:
    """Return the time axis of runs joined along time."""
    return 1 if run.raw.data.dim() == 3 and run.time_at else 0


def _joined(run: Run, tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors of one layout along time."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, _axis(run))  # pyright: ignore[reportArgumentType]


def _joined_marks(group: Sequence[Run], marks: Sequence[Tensor | None], default: int) -> Tensor | None:
    """Join the valid steps of runs, or their starts; those of a run without any are the default."""
    if len(group) == 1:
        return marks[0]
    known = next((x for x in marks if x is not None), None)
    if known is None:
        return None
    shapes = [(*known.shape[:-1], run.steps) for run in group]
    each = [known.new_full(shape, default) if x is None else x for x, shape in zip(marks, shapes, strict=True)]
    return torch.cat(each, -1)
