"""The penalty of captured runs: sums in the forward, gradients added in the backward to those that arrive.

One node, `_Carry`, lies between the penalty and the loss. Its backward runs before the nodes of the loss's graph, and
hands the upstream gradient to `Carried`, which the hooks of the activations call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg import prepare
from fastreg.addition import Addition
from fastreg.arguments import check_coefficient
from fastreg.capture import EMPTY, Captured, Mark, Run, Search, Watch
from fastreg.operation import pack, unpack
from fastreg.penalty import penalty_of
from fastreg.prepare import Arguments, calls_of
from fastreg.problem import ARTAR, Call, Coefficient, is_on
from fastreg.torch_state import current, keepable, keeps_graph, observed, plain, untraced

NOTHING_ADDED: tuple[Any, list[Any]] = None, []
FREED = "an earlier backward has freed the activations; pass retain_graph=True to it"


class Carried:
    """The gradient of a penalty, which hooks of its activations add to the gradients that arrive there.

    Attributes:
        sums: of each term the operation on the gradient of its activation, which is split where it was joined from
            several tensors; or `None` for a fused dropout, whose node is the hook.
        backwards: of each backward that adds the gradients, under its id in PyTorch's engine: the upstream gradient of
            the penalty, and of each term the activation and values, or the parts of a gradient; `None` once it is
            added.
    """

    __slots__ = ("backwards", "sums")

    def __init__(self) -> None:
        self.sums: list[Any] = []
        self.backwards: dict[int, tuple[Tensor, list[Any]]] = {}

    def begin(self, task: int, grad: Tensor, layers: Sequence[Call]) -> None:
        """Add the gradients in this backward, for the layers of all terms."""
        self.backwards[task] = grad, [*layers]

    def end(self, task: int) -> None:
        """Free the layers that a backward did not use."""
        self.backwards.pop(task, None)

    def add(self, i: int, gradient: Tensor | None) -> Tensor | None:
        """Add the gradient of a term."""
        grad, layer, _ = self._due(i)
        return gradient if layer is None else self.sums[i](grad, layer, _arrived(gradient))

    def add_part(self, i: int, part: int, gradient: Tensor | None) -> Tensor | None:
        """Add the gradient of a term at one of the tensors that its activation was joined from."""
        grad, layer, left = self._due(i)
        if layer is None:
            return gradient
        if isinstance(layer, Call):
            addition, split = self.sums[i]
            layer = dict(enumerate(split(addition(grad, layer, torch.zeros_like(layer.raw)))))
        arrived = _arrived(gradient) + layer.pop(part)
        left[i] = layer or None
        return arrived

    def upstream(self, i: int) -> tuple[Tensor, Call] | None:
        """Return the gradient for the node of a fused dropout to add, and the call that it is of; `None` for none."""
        grad, layer, _ = self._due(i)
        return None if layer is None else (grad, layer)

    def _due(self, i: int) -> tuple[Any, Any, list[Any]]:
        """Return the upstream gradient, and the layer or the parts of a term that this backward adds, once, or `None`.

        The third item is the list of all terms.
        """
        grad, left = self.backwards.get(current(), NOTHING_ADDED)
        if not left:  # a backward of another loss
            return grad, None, left
        layer, left[i] = left[i], None
        return grad, layer, left


def _arrived(gradient: Tensor | None) -> Tensor:
    """Return the gradient that arrives at a tensor that the loss depends on."""
    if gradient is None:
        raise RuntimeError(
            "attach: a tensor that the loss depends on got no gradient, and the penalty's cannot be added to None; let "
            "the function behind it return zeros"
        )
    return gradient


class Carrier:
    """Collect the terms that hooks will carry, until the penalty is formed and has a loss.

    Attributes:
        carried: the state that the hooks share.
        raws: of each term the activation, to be saved for the backward; `None` for that of a fused dropout.
        calls: of each term, without its activation.
        passed_over: the runs that the backward must not reach, as the loss was not searched for them.
        watch: sees whether a backward has the penalty, or `None`.
    """

    def __init__(self, passed_over: Sequence[weakref.ref[Run]] = ()) -> None:
        self.carried, self.passed_over = Carried(), passed_over
        self.watch: Watch | None = None
        self.raws: list[Tensor | None] = []
        self.calls: list[Call] = []

    def note(self, term: Any, raw: Tensor | None, call: Call) -> int:
        """Note a term, and return its number."""
        i = len(self.raws)
        self.carried.sums.append(term)
        self.raws.append(raw)
        self.calls.append(call)
        return i

    def penalize(self, loss: Tensor, penalty: Tensor, adds: bool) -> Tensor:
        """Return the penalty, differentiable where it is added to the loss, or with `adds` their sum."""
        if not (self.raws and torch.is_grad_enabled()):
            if self.watch is not None:
                self.watch.content = True  # no hook carries the penalty
            return loss + penalty if adds else penalty
        if adds and type(loss) is not Tensor:  # a subclass would be a view, which nothing may change in place
            return loss + self.penalize(loss, penalty, False)
        return (_Carry.apply if observed() else _apply)(self, loss, penalty, adds)


class _Carry(Function):
    """Return the penalty, or with `adds` the sum of the loss and the penalty."""

    @staticmethod
    def forward(ctx: Any, carrier: Carrier, loss: Tensor, penalty: Tensor, adds: bool) -> Tensor:
        ctx.carried, ctx.passed_over, ctx.watch = carrier.carried, carrier.passed_over, carrier.watch
        saved, ctx.calls = carrier.raws, []
        for call in carrier.calls:
            more, rest = pack(call.alpha, call.beta, call.steps)
            ctx.calls.append((len(more), rest, call.options()))
            saved = [*saved, *more]
        ctx.save_for_backward(*saved)
        ctx.loss = None if adds else (loss.shape, loss.dtype, loss.device)
        return loss + penalty if adds else penalty.detach()

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.watch is not None:
            ctx.watch.content = True
        for ref in ctx.passed_over:
            if (run := ref()) is not None:
                run.refused = current()
        task, saved, carried, keeps = current(), ctx.saved_tensors, ctx.carried, torch.is_grad_enabled()
        count, upstream = len(carried.sums), grad if grad.dim() == 0 else grad.reshape(())
        # A graph would close a cycle, if the backward failed.
        raws = [x if x is None or keeps or not x.requires_grad else x.detach() for x in saved[:count]]
        layers, at = [], count
        for raw, (length, rest, options) in zip(raws, ctx.calls, strict=True):
            layers.append(Call(raw, None, *unpack(saved[at : at + length], rest), *options))
            at += length
        carried.begin(task, upstream.clone(), layers)  # a copy, as a hook of the loss may change its own in place
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(carried.end, task))
        if ctx.loss is None:
            return None, grad, upstream, None
        shape, dtype, device = ctx.loss
        # Zeros let a gradient arrive at the activations even if the penalty alone is differentiated.
        return None, torch.zeros(shape, dtype=dtype, device=device), grad, None


# `Function.apply` without the part for transforms of torch.func: 3 us less.
_apply: Any = super(Function, _Carry).apply  # pyright: ignore[reportAttributeAccessIssue]


def penalty_of_runs(
    groups: Sequence[Sequence[Run]], found: Search, loss: Tensor, alpha: Coefficient, beta: Coefficient
) -> tuple[ARTAR, Carrier]:
    """Compute the penalty of runs, and plan to add its gradient in the backward of the loss.

    Args:
        groups: lists of runs; the runs of one list are joined along time into one activation.
        found: the tensors of the runs in the graph of the loss.
        loss: the loss.
        alpha: coefficient of AR.
        beta: coefficient of TAR.

    Returns:
        The penalty, differentiable as far as the loss does not depend on the activations, and the carrier of the
            other gradients.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    carrier, reached = Carrier(found.passed_over), found.reached
    formed: list[ARTAR] = []
    alike: dict[Any, list[_Part]] = {}  # of one call, which allocates and checks once
    for i, group in enumerate(groups):
        nodes = reached.get(group[0], {})
        if len(group) > 1:
            nodes = {x: node for run in group for x, node in reached.get(run, {}).items()}
        if group[0].fused is not None and group[0].fused in nodes:
            terms, call = _of_node(group[0], alpha, beta)
            i = carrier.note(None, None, call)
            nodes[group[0].fused].carried = functools.partial(carrier.carried.upstream, i)
            formed.append(terms)
        else:
            part = _part(group, nodes)
            alike.setdefault((part.kind() or i) if len(groups) > 1 else i, []).append(part)
    for parts in alike.values():
        terms, additions = _measured(parts, alpha, beta)
        formed.append(terms)
        for each in additions:
            _carry(carrier, each)
    if len(formed) > 1 or formed[0].penalty.device != loss.device:  # layers may live on several devices
        formed = [ARTAR(*(x.to(loss.device) for x in terms)) for terms in formed]
    return functools.reduce(lambda a, b: ARTAR(*map(torch.add, a, b)), formed), carrier


class Always:
    """Add the gradient of a run's penalty in every backward through the run, as `in_backward` asks for.

    The checks are those of `on_backward_begin`, as far as a backward without a loss can make them.

    Attributes:
        single: the latest run of one time step, and the backward through it; shared by the runs of a module.
        grad: the upstream gradient.
        additions: by whether it is that of raw: the operation on the gradient of an activation, and its call.
        versions: the tensors among the values, and how often they had been changed in place.
        waits: whether raw's gradient has to come after that of dropped.
        of_raw, of_dropped: the ids of the latest backwards through raw and through dropped.
    """

    def __init__(self, single: list[Any]) -> None:
        self.single, self.grad, self.waits = single, EMPTY, False
        self.additions: dict[bool, tuple[Addition, Call]] = {}
        self.versions: list[tuple[Tensor, int]] = []
        self.of_raw: int | None = None
        self.of_dropped: int | None = None

    def form(self, run: Run, node: Any, alpha: Coefficient, beta: Coefficient, scale: Coefficient) -> ARTAR:
        """Compute the terms of a complete run, and plan to add their gradient.

        Args:
            run: the run.
            node: the node of the fused dropout that computed the terms, or `None`.
            alpha: coefficient of AR.
            beta: coefficient of TAR.
            scale: the upstream gradient.
        """
        if (fault := run.fault) is not None:
            raise RuntimeError(f"attach: {fault}")
        if run.fused is not None:
            terms, call = _of_node(run, alpha, beta)
            node.carried, calls = functools.partial(self.upstream, call), [call]
            self.waits = True
        else:
            terms, additions = _measured([_part([run], dict.fromkeys(run.carriers))], alpha, beta)
            self.additions = {each.of_raw: (each.addition, each.call) for each in additions}
            self.waits = False in self.additions and run.squared.needs
            calls = [each.call for each in additions]
        read = [x for call in calls for x in pack(call.alpha, call.beta, call.steps)[0] if x is not None]
        self.versions = [(x, x._version) for x in read if not x.is_inference()]
        like: Any = {"dtype": terms.penalty.dtype, "device": terms.penalty.device}
        self.grad = scale if isinstance(scale, Tensor) else torch.full((), scale, **like)
        return terms

    def passed(self, mark: Mark, gradient: Tensor | None) -> Tensor | None:
        """Add the gradient of the penalty to the one that arrives.

        Raises:
            RuntimeError: the penalty is wrong or lost in part; the message names the remedy.
        """
        task, run, captured = current(), mark.run, mark.captured
        if captured is None:
            self._wait_for_raw(mark)
        if captured is None or gradient is None:  # a loss that does not depend on the tensor, as with DDP's sink
            return gradient
        of_raw = captured is run.raw
        self._check(run.fault if run.raw.data is not EMPTY else FREED)
        if of_raw:
            self._check(self._fault_of_raw(run, task))
            self.of_raw = task
        else:
            self.of_dropped = task
        if of_raw in self.additions:
            addition, call = self.additions[of_raw]
            gradient = addition(self.grad, _with_raw(call, captured.data), gradient)
        if not keeps_graph() and (of_raw or not run.raw.needs):
            run.drop()
        return gradient

    def upstream(self, call: Call) -> tuple[Tensor, Call]:
        """Return the gradient for the node of a fused dropout to add, and the call that it is of."""
        self.of_dropped = current()
        self._check(None)
        return self.grad, call

    def _check(self, fault: str | None) -> None:
        """Raise an error for the fault of a run, for changed coefficients and masks, or for second derivatives."""
        if any(x._version != version for x, version in self.versions):
            fault = (
                "a tensor alpha or beta was changed in place between the forward and the backward; change it after the "
                "backward"
            )
        elif torch.is_grad_enabled():  # each backward of a gradient would add the penalty, too
            fault = "in_backward does not go with second derivatives (create_graph=True); use on_backward_begin"
        if fault is not None:
            raise RuntimeError(f"attach: {fault}")

    def _fault_of_raw(self, run: Run, task: int) -> str | None:
        """Say why the penalty is wrong, where the gradient of raw arrives; that of dropped came before."""
        module, dropout = run.names
        if self.waits and self.of_dropped != task:
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
        x, name = mark.itself(), mark.run.names[0]
        node = None if x is None else x.grad_fn
        following = [] if node is None else [x for x, _ in node.next_functions if x is not None and x.next_functions]
        if following and not any(map(torch._C._will_engine_execute_node, following)):  # pyright: ignore
            return  # the gradient of the state itself is asked for, and no other

        def check() -> None:
            if self.of_raw is None:
                raise RuntimeError(
                    f"attach: the loss depends on the {name} by its state alone, not by its output, so that the "
                    "penalty's gradient would be lost; let it depend on the output, detach the state, or use "
                    "on_backward_begin"
                )

        torch.autograd.Variable._execution_engine.queue_callback(check)


def _of_node(run: Run, alpha: Coefficient, beta: Coefficient) -> tuple[ARTAR, Call]:
    """Weight the terms that a fused dropout computed, and return the call that its node has the gradient of."""
    alpha, beta = (_moved(x, run.terms[0].device) for x in (alpha, beta))
    check_coefficient("alpha", alpha)
    check_coefficient("beta", beta)
    a, b = (keepable(x) if isinstance(x, Tensor) else prepare.coefficient(x) for x in (alpha, beta))
    return _weighted(run.terms, alpha, beta), Call(None, None, a, b, ar_of_raw=run.dropped is run.raw)


class _Part(NamedTuple):
    """An activation of the penalty.

    raw, dropped  as `fused_ar_tar` takes them
    group         the runs that are joined in the activation
    nodes         the tensors to whose gradients the penalty's gradient is added, and their nodes
    """

    raw: Any
    dropped: Any
    group: Sequence[Run]
    nodes: Mapping[Captured | None, Any]

    def kind(self) -> Any:
        """Return the shape, device and dtypes that activations of one call share; `None` with valid steps."""
        first, raw = self.group[0], self.raw
        if first.packed is not None or any(x.valid is not None or x.starts is not None for x in self.group):
            return None
        shape = raw.shape[:-1] if isinstance(first.time_at, bool) else raw.shape
        return shape, raw.device, raw.dtype, self.dropped.dtype, first.time_at, type(first.time_at)


class _Added(NamedTuple):
    """The gradient of a term, to be added to that of raw, or to that of dropped: of_raw tells."""

    part: _Part
    of_raw: bool
    addition: Addition
    call: Call


def _moved(coefficient: Coefficient, device: torch.device) -> Coefficient:
    """Move a coefficient to the device of a layer, as layers may live on several."""
    return plain(coefficient).to(device) if isinstance(coefficient, Tensor) else coefficient


def _part(group: Sequence[Run], nodes: Mapping[Captured | None, Any]) -> _Part:
    """Join the tensors of runs, detached unless autograd has to propagate the gradient.

    Second derivatives of joined runs mix those of several. So autograd propagates all gradients if it does for one.
    """
    if len(group) > 1 and not all(x in nodes for run in group for x in run.carriers):
        alive = {x for run in group for x in run.carriers if run.tensor_of(x).requires_grad}
        nodes = {x: node for x, node in nodes.items() if x not in alive}

    def summed(run: Run, x: Captured) -> Tensor:
        return x.data if x in nodes else run.tensor_of(x)

    first, raws, kept = group[0], [], []
    for run in group:
        raws.append(summed(run, run.raw))
        kept.append(raws[-1] if run.squared is run.raw else summed(run, run.squared))
    raw, dropped = raws[0], kept[0]
    if len(group) > 1 or first.is_step:
        is_raw = all(x is y for x, y in zip(raws, kept, strict=True))
        raw = _joined(first, raws)
        dropped = raw if is_raw else _joined(first, kept)
    if first.packed is not None:
        is_raw, raw = raw is dropped, first.packed._replace(data=raw)
        dropped = raw if is_raw else first.packed._replace(data=dropped)
    return _Part(raw, dropped, group, nodes)


def _measured(parts: Sequence[_Part], alpha: Coefficient, beta: Coefficient) -> tuple[ARTAR, list[_Added]]:
    """Compute the penalty of parts of one kind, and plan the additions of its gradient."""
    part, first = parts[0], parts[0].group[0]
    raw, dropped, valid, starts = part.raw, part.dropped, first.valid, first.starts
    if len(parts) > 1:
        raw, dropped = [x.raw for x in parts], [x.dropped for x in parts]
    if len(part.group) > 1 or first.is_step:
        valid = _joined_marks(part.group, [x.valid for x in part.group], 1)
        starts = _joined_marks(part.group, [x.starts for x in part.group], 0)
    alpha, beta = (_moved(x, first.raw.data.device) for x in (alpha, beta))
    place = (first.time_at, None) if isinstance(first.time_at, bool) else (None, first.time_at)
    calls = calls_of(Arguments(raw, dropped, alpha, beta, None, valid, starts, *place, "mean", True))
    penalty, terms, additions = penalty_of(calls)
    added = []
    for part, call, kept in zip(parts, calls, additions, strict=True):
        if part.nodes:
            for of_raw, of in _calls_of_gradients(call):
                addition = kept.get(of_raw)
                if addition is None:
                    addition = kept[of_raw] = Addition(of)
                added.append(_Added(part, of_raw, addition, _with_raw(of, None)))
    return ARTAR(penalty, *(terms or ())), added


def _calls_of_gradients(call: Call) -> list[tuple[bool, Call]]:
    """Split a call in two, of which gradients are added to those of raw and dropped: TAR is of raw, AR of dropped.

    Returns:
        Whether it is raw, and the call of that tensor as raw.
    """
    ar, tar, options = is_on(call.alpha), is_on(call.beta), (call.steps, call.time_dim, call.reduction, False)
    if call.dropped is None:
        return [(True, Call(call.raw, None, call.alpha, call.beta, *options, True, call.dtype))] if ar or tar else []
    calls = [(True, Call(call.raw, None, 0.0, call.beta, *options, False, call.dtype))] if tar else []
    return calls + ([(False, Call(call.dropped, None, call.alpha, 0.0, *options, True, call.dtype))] if ar else [])


def _with_raw(call: Call, raw: Tensor | None) -> Call:
    """Return a call of raw alone for another tensor, or for none."""
    return Call(raw, None, call.alpha, call.beta, call.steps, *call.options())


def _carry(carrier: Carrier, added: _Added) -> None:
    """Let hooks add the gradient of a term, if the backward reaches any of its tensors."""
    (part, of_raw, addition, call) = added
    group, nodes = part.group, part.nodes
    tensors, found, has_graphs = [], [], True
    for run in group:
        tensors.append(run.raw if of_raw else run.squared)
        found.append(run.tensor_of(tensors[-1]))
        has_graphs = has_graphs and found[-1].requires_grad
    if not has_graphs:  # second derivatives need the graphs of all
        found = [x.data for x in tensors]
    if len(group) == 1 and not group[0].is_step:
        if tensors[0] in nodes:
            i = carrier.note(addition, found[0], call)
            tensors[0].adds.append(functools.partial(carrier.carried.add, i))
    elif hooked := [(j, x) for j, x in enumerate(tensors) if x in nodes]:
        split = functools.partial(_split, group[0], [x.shape for x in found])
        i = carrier.note((addition, split), _joined(group[0], found), call)
        for j, x in hooked:
            x.adds.append(functools.partial(carrier.carried.add_part, i, j))


def _axis(run: Run, dims: int) -> int:
    """Return the time axis of runs joined along time."""
    return 1 if dims + run.is_step == 3 and run.time_at else 0


def _joined(run: Run, tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors of one layout along time."""
    if run.is_step:
        return torch.stack(tensors, _axis(run, tensors[0].dim()))  # pyright: ignore[reportArgumentType]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, _axis(run, tensors[0].dim()))  # pyright: ignore


def _split(run: Run, shapes: Sequence[torch.Size], x: Tensor) -> Sequence[Tensor]:
    """Split a tensor as `_joined` has joined it."""
    axis = _axis(run, len(shapes[0]))
    return x.unbind(axis) if run.is_step else x.split([shape[axis] for shape in shapes], axis)


def _joined_marks(group: Sequence[Run], marks: Sequence[Tensor | None], default: int) -> Tensor | None:
    """Join the valid steps of runs, or their starts; those of a run without any are the default."""
    known = next((x for x in marks if x is not None), None)
    if known is None:
        return None
    shapes = [known.shape if run.is_step else (*known.shape[:-1], run.steps) for run in group]
    each = [known.new_full(shape, default) if x is None else x for x, shape in zip(marks, shapes, strict=True)]
    return torch.stack(each, -1) if group[0].is_step and known.dim() < 2 else torch.cat(each, -1)


def _weighted(terms: tuple[Tensor, ...], alpha: Coefficient, beta: Coefficient) -> ARTAR:
    """Weight AR and TAR; a coefficient of 0 leaves its term out, even an infinite term or NaN."""
    parts: list[Tensor] = []
    for coefficient, term in zip((alpha, beta), terms, strict=True):
        if isinstance(coefficient, Tensor):
            factor = plain(coefficient).to(term.device, term.dtype)
            parts.append(torch.where(factor == 0, 0, factor * term))
        elif coefficient != 0:
            parts.append(coefficient * term)
    penalty = functools.reduce(torch.add, parts) if parts else torch.zeros_like(terms[0])
    return ARTAR(penalty, *terms)
