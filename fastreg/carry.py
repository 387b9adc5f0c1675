"""The penalty of captured runs: sums in the forward, gradients added in the backward to those that arrive.

`penalty_of_runs` puts one node, `_Carry`, between the penalty and the loss. Its backward runs before the nodes of the
loss's graph, and hands the upstream gradient to the runs for this backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.addition import Addition, addition_for
from fastreg.arguments import check_options
from fastreg.capture import Captured, Reached, Run
from fastreg.dropout import Upstream
from fastreg.kernels.view import NOTHING, Values, layout_of
from fastreg.penalty import penalty_of
from fastreg.prepare import plain, plain_pair, problem_of
from fastreg.problem import ARTAR, Call, Coefficient, Layer, Problem, is_on


class Carrier(NamedTuple):
    """The place where a backward adds the gradient of a penalty: tensors, or the node of a fused dropout.

    problem   the terms
    addition  the operation on the gradient of a tensor
    at        the tensors, `None` for a tensor that is left out
    split     splits the gradient of several tensors, which joined along time are one activation; `None` for one tensor
    node      the node; `None` if there are tensors
    """

    problem: Problem
    addition: Addition | None = None
    at: Sequence[Captured | None] = ()
    split: Callable[[Tensor], Sequence[Tensor]] | None = None
    node: Any = None

    def arm(self, task: int | None, grad: Tensor, layer: Layer) -> None:
        """Add the gradient of a layer's penalty in this backward, or for `None` in every one."""
        raw, values, addition = layer.raw, layer.values, self.addition
        if raw is None or addition is None:
            self.node.carried = Upstream(task, grad, self.problem, values.alpha, values.beta)
            return
        if layout_of(raw) != addition.layout:  # a hook on saved tensors has changed it
            addition = addition_for(layer, self.problem)
        if not torch.is_grad_enabled() or task is None:  # its graph would close a cycle, if the backward failed
            layer = Layer(raw.detach(), None, values)
        if self.split is None:
            adds = [functools.partial(addition, grad, layer)]
        else:
            whole = addition(grad, layer, torch.zeros_like(raw))
            adds = [functools.partial(torch.add, piece) for piece in self.split(whole)]
        for captured, add in zip(self.at, adds, strict=True):
            if captured is not None:
                captured.arm(task, add)

    def disarm(self) -> None:
        """Drop a gradient that was armed and not used, as a later backward would add it."""
        for captured in self.at:
            if captured is not None:
                captured.armed = None
        if self.node is not None:
            self.node.carried = None


Carried: TypeAlias = list[tuple[Carrier, Layer]]  # the layer of a node has coefficients alone


class _Carry(Function):
    """Return the penalty; in the backward, arm its carriers."""

    @staticmethod
    def forward(ctx: Any, carried: Carried, loss: Tensor, penalty: Tensor) -> Tensor:
        ctx.carriers = [carrier for carrier, _ in carried]
        # Most layers have no values to save.
        ctx.values = [i for i, (_, layer) in enumerate(carried) if layer.values is not NOTHING]
        ctx.save_for_backward(
            *[layer.raw for _, layer in carried], *[x for i in ctx.values for x in carried[i][1].values]
        )
        ctx.loss = loss.shape, loss.dtype, loss.device
        return penalty.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        task, saved, carriers = torch._C._current_graph_task_id(), ctx.saved_tensors, ctx.carriers
        layers = [Layer(raw, None) for raw in saved[: len(carriers)]]
        for i, at in enumerate(ctx.values):
            start, width = len(carriers) + i * len(NOTHING), len(NOTHING)
            layers[at] = Layer(layers[at].raw, None, Values(*saved[start : start + width]))
        if torch.compiler.is_compiling():  # compiled autograd traces neither changing hooks nor callbacks
            arm: Any = torch.compiler.disable(_arm)
            arm(carriers, task, grad, layers)
        else:
            _arm(carriers, task, grad, layers)
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_disarm, carriers))
        shape, dtype, device = ctx.loss
        # Zeros let a gradient arrive at the carriers even if the penalty alone is differentiated.
        return None, torch.zeros(shape, dtype=dtype, device=device), grad


def _arm(carriers: Sequence[Carrier], task: int, grad: Tensor, layers: Sequence[Layer]) -> None:
    """Arm carriers for this backward, with the layers whose tensors were saved."""
    for carrier, layer in zip(carriers, layers, strict=True):
        carrier.arm(task, grad, layer)


def _disarm(carriers: Sequence[Carrier]) -> None:
    for carrier in carriers:
        carrier.disarm()


def penalty_of_runs(
    groups: Sequence[Sequence[Run]], reached: Reached, loss: Tensor, alpha: Coefficient, beta: Coefficient
) -> ARTAR:
    """Compute the penalty of runs, whose gradient is added in the backward of the loss.

    Args:
        groups: lists of runs; the runs of one list are joined along time into one activation.
        reached: the marks of the runs in the graph of the loss.
        loss: the loss.
        alpha: coefficient of AR.
        beta: coefficient of TAR.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    carried: Carried = []
    formed: list[ARTAR] = []
    alike: dict[Any, list[_Part]] = {}
    for i, group in enumerate(groups):
        nodes = {mark.captured: node for run in group for mark, node in reached.get(run, ()) if mark.captured}
        if group[0].fused is not None and group[0].fused in nodes:
            terms, some = _of_node(group[0], nodes[group[0].fused], alpha, beta)
            formed.append(terms)
            carried += some
        else:
            part = _part(group, nodes)
            alike.setdefault(part.kind or i, []).append(part)
    for parts in alike.values():  # one call for all allocates and checks once
        terms, some = _measured(parts, alpha, beta)
        formed.append(terms)
        carried += some
    if len(formed) > 1 or formed[0].penalty.device != loss.device:  # layers may live on several devices
        formed = [ARTAR(*(x.to(loss.device) for x in terms)) for terms in formed]
    total = functools.reduce(lambda a, b: ARTAR(*map(torch.add, a, b)), formed)
    if carried and torch.is_grad_enabled():
        return ARTAR(_Carry.apply(carried, loss, total.penalty), total.ar, total.tar)
    return total


def carry_always(run: Run, node: Any, alpha: Coefficient, beta: Coefficient, scale: Coefficient) -> ARTAR:
    """Add the gradient of a run's penalty in every backward through its tensors; return the terms.

    Args:
        run: the run, complete.
        node: the node of the fused dropout that computed the terms, or `None`.
        alpha: coefficient of AR.
        beta: coefficient of TAR.
        scale: the upstream gradient.
    """
    if run.fused is not None:
        terms, carried = _of_node(run, node, alpha, beta)
    else:
        terms, carried = _measured([_part([run], dict.fromkeys(run.carriers))], alpha, beta)
    grad = scale
    if not isinstance(grad, Tensor):
        grad = torch.full((), grad, dtype=terms.penalty.dtype, device=terms.penalty.device)
    for carrier, layer in carried:
        carrier.arm(None, grad, layer)
    return terms


def _of_node(run: Run, node: Any, alpha: Coefficient, beta: Coefficient) -> tuple[ARTAR, Carried]:
    """Weight the terms that a fused dropout computed; its node carries their gradient."""
    call = Call(
        *(None, None, plain(alpha), plain(beta), None, None, None),
        *(run.time_at, "mean", True, run.dropped is run.raw),
    )
    check_options(call)
    tensors = [x if isinstance(x, Tensor) else None for x in (call.alpha, call.beta)]
    layer = Layer(None, None, Values(alpha=tensors[0], beta=tensors[1]))
    return _weighted(run.terms, alpha, beta), [(Carrier(problem_of(call), node=node), layer)]


class _Part(NamedTuple):
    """An activation of the penalty.

    kind          the shape, device and dtypes that activations of one call share; `None` for one with valid steps
    raw, dropped  as `fused_ar_tar` takes them
    group         the runs that are joined in the activation
    nodes         the nodes of the tensors to whose gradients the penalty's gradient is added
    """

    kind: Any
    raw: Any
    dropped: Any
    group: Sequence[Run]
    nodes: dict[Captured, Any]


def _part(group: Sequence[Run], nodes: dict[Captured, Any]) -> _Part:
    """Join the tensors of runs, detached unless autograd has to propagate the gradient."""

    def summed(of: Callable[[Run], Captured]) -> Any:
        tensors = [(run, of(run)) for run in group]
        return group[0].of(
            _joined(group[0], [x.data if x in nodes or not x.needs else run.tensor_of(x) for run, x in tensors])
        )

    first = group[0]
    raw = summed(lambda run: run.raw)
    dropped = raw if all(x.dropped is x.raw for x in group) else summed(lambda run: run.squared)
    kind = None
    if first.packed is None and all(x.valid is None and x.starts is None for x in group):
        shape = raw.shape[:-1] if isinstance(first.time_at, bool) else raw.shape
        kind = shape, raw.device, raw.dtype, dropped.dtype, first.time_at, type(first.time_at)
    return _Part(kind, raw, dropped, group, nodes)


def _measured(parts: Sequence[_Part], alpha: Coefficient, beta: Coefficient) -> tuple[ARTAR, Carried]:
    """Compute the penalty of parts of one kind, and list the carriers of its gradient."""
    first = parts[0].group
    raw: Any = parts[0].raw if len(parts) == 1 else [x.raw for x in parts]
    dropped: Any = parts[0].dropped if len(parts) == 1 else [x.dropped for x in parts]
    raw, dropped = plain_pair(raw, dropped)
    marks = (
        plain(_joined_marks(first, [x.valid for x in first], 1)),
        plain(_joined_marks(first, [x.starts for x in first], 0)),
    )
    computed = penalty_of(Call(raw, dropped, plain(alpha), plain(beta), None, *marks, first[0].time_at, "mean", True))
    of_both, of_tar, of_ar = _of_one_tensor(computed.problem)
    values = computed.values
    carried: Carried = []
    for part in parts:
        raws = [x.raw for x in part.group]
        if part.raw is part.dropped:
            carried += _carried(part, raws, values, of_both)
            continue
        if of_tar is not None:
            carried += _carried(part, raws, values if values.alpha is None else values._replace(alpha=None), of_tar)
        if of_ar is not None:
            squared = [x.squared for x in part.group]
            carried += _carried(part, squared, values if values.beta is None else values._replace(beta=None), of_ar)
    return ARTAR(computed.penalty, *(computed.terms or ())), carried


@functools.lru_cache(64)
def _of_one_tensor(problem: Problem) -> tuple[Problem | None, Problem | None, Problem | None]:
    """Split a problem into AR and TAR of raw, TAR, and AR of the squared tensor; `None` for a term that is off."""
    of_both = problem._replace(ar_of_raw=True)
    of_tar = problem._replace(alpha=0.0) if is_on(problem.beta) else None
    of_ar = of_both._replace(beta=0.0) if is_on(problem.alpha) else None
    return (of_both if of_tar or of_ar else None), of_tar, of_ar


def _carried(part: _Part, tensors: Sequence[Captured], values: Values, problem: Problem | None) -> Carried:
    """List the carrier of the gradient of a term, if the term has one."""
    group, at = part.group, [x if x in part.nodes else None for x in tensors]
    if problem is None or not any(at):
        return []
    found = [run.tensor_of(x) for run, x in zip(group, tensors, strict=True)]
    if not all([x.requires_grad for x in found]):  # second derivatives need the graphs of all
        found = [x.data for x in tensors]
    one = len(group) == 1 and not group[0].is_step
    split = None if one else functools.partial(_split, group[0], [x.shape for x in found])
    layer = Layer(plain(_joined(group[0], found)), None, values)
    return [(Carrier(problem, addition_for(layer, problem), at, split), layer)]


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
    if known is None or (len(group) == 1 and not group[0].is_step):
        return known
    shapes = [known.shape if run.is_step else (*known.shape[:-1], run.steps) for run in group]
    each = [known.new_full(shape, default) if x is None else x for x, shape in zip(marks, shapes, strict=True)]
    return torch.stack(each, -1) if group[0].is_step and known.dim() < 2 else torch.cat(each, -1)


def _weighted(terms: tuple[Tensor, ...], alpha: Coefficient, beta: Coefficient) -> ARTAR:
    """Weight AR and TAR; a coefficient of 0 leaves its term out, even an infinite term or NaN."""
    ar, tar = terms
    penalty = torch.zeros_like(ar)
    for coefficient, term in ((alpha, ar), (beta, tar)):
        if isinstance(coefficient, Tensor):
            factor = plain(coefficient).to(term.device, term.dtype)
            penalty = penalty + torch.where(factor == 0, 0, factor * term)
        elif coefficient != 0:
            penalty = penalty + coefficient * term
    return ARTAR(penalty, ar, tar)
