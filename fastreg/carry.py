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

from fastreg.addition import Addition
from fastreg.arguments import check_options
from fastreg.capture import Captured, Reached, Run
from fastreg.dropout import Upstream
from fastreg.kernels.view import NOTHING, Values, layout_of
from fastreg.penalty import Computed, penalty_of
from fastreg.prepare import dtypes_of, plain, plain_pair, problem_of, restored, restored_values
from fastreg.problem import ARTAR, Call, Coefficient, Layer, Problem, is_on, rows_of


class _Tensors(NamedTuple):
    """Tensors to whose gradients a backward adds the gradient of a penalty.

    addition  the operation on the gradient of the activation that they are
    at        the tensors, `None` for a tensor that is left out
    split     splits the gradient of several tensors, which joined along time are one activation; `None` for one tensor
    """

    addition: Addition
    at: Sequence[Captured | None]
    split: Callable[[Tensor], Sequence[Tensor]] | None

    def arm(self, task: int | None, grad: Tensor, layer: Layer) -> None:
        """Add the gradient of a layer's penalty in this backward, or for `None` in every one."""
        raw, addition = layer.given(), self.addition
        if layout_of(raw) != addition.layout:  # a hook on saved tensors has changed it
            raw = restored("raw", raw, addition.layout)
            addition = Addition(Layer(raw, None, layer.values), addition.problem)
        # A graph would close a cycle, if the backward failed.
        if raw.requires_grad and (not torch.is_grad_enabled() or task is None):
            raw = raw.detach()
        layer = Layer(raw, None, layer.values)
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


class _Node(NamedTuple):
    """The node of a fused dropout, whose backward adds the gradient of a penalty.

    node     the node
    problem  the terms
    """

    node: Any
    problem: Problem

    def arm(self, task: int | None, grad: Tensor, layer: Layer) -> None:
        """Add the gradient of the penalty in this backward, or for `None` in every one."""
        self.node.carried = Upstream(task, grad, self.problem, layer.values.alpha, layer.values.beta)

    def disarm(self) -> None:
        """Drop a gradient that was armed and not used."""
        self.node.carried = None


Carrier: TypeAlias = _Tensors | _Node
Carried: TypeAlias = list[tuple[Carrier, Layer]]  # the layer of a node has coefficients alone


class _Carry(Function):
    """Return the penalty; in the backward, arm its carriers."""

    @staticmethod
    def forward(ctx: Any, carried: Carried, loss: Tensor, penalty: Tensor) -> Tensor:
        ctx.carriers = [carrier for carrier, _ in carried]
        # Most layers have no values to save.
        found = [(i, layer.values) for i, (_, layer) in enumerate(carried) if layer.values is not NOTHING]
        ctx.values = [(i, dtypes_of(values)) for i, values in found]
        ctx.save_for_backward(*[layer.raw for _, layer in carried], *[x for _, values in found for x in values])
        ctx.loss = loss.shape, loss.dtype, loss.device
        return penalty.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        task, saved, carriers = torch._C._current_graph_task_id(), ctx.saved_tensors, ctx.carriers
        layers = [Layer(raw, None) for raw in saved[: len(carriers)]]
        for i, (at, dtypes) in enumerate(ctx.values):
            start, width = len(carriers) + i * len(NOTHING), len(NOTHING)
            layers[at] = Layer(layers[at].raw, None, restored_values(saved[start : start + width], dtypes))
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
    alike: dict[Any, list[_Part]] = {}  # of one call, which allocates and checks once
    for i, group in enumerate(groups):
        nodes = {mark.captured: node for run in group for mark, node in reached.get(run, ()) if mark.captured}
        if group[0].fused is not None and group[0].fused in nodes:
            terms, some = _of_node(group[0], nodes[group[0].fused], alpha, beta)
            formed.append(terms)
            carried += some
        else:
            part = _part(group, nodes)
            alike.setdefault((part.kind() or i) if len(groups) > 1 else i, []).append(part)
    for parts in alike.values():
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
    return _weighted(run.terms, alpha, beta), [(_Node(node, problem_of(call)), layer)]


class _Part(NamedTuple):
    """An activation of the penalty.

    raw, dropped  as `fused_ar_tar` takes them
    group         the runs that are joined in the activation
    nodes         the nodes of the tensors to whose gradients the penalty's gradient is added
    """

    raw: Any
    dropped: Any
    group: Sequence[Run]
    nodes: dict[Captured, Any]

    def kind(self) -> Any:
        """Return the shape, device and dtypes that activations of one call share; `None` with valid steps."""
        first, raw = self.group[0], self.raw
        if first.packed is not None or any(x.valid is not None or x.starts is not None for x in self.group):
            return None
        shape = raw.shape[:-1] if isinstance(first.time_at, bool) else raw.shape
        return shape, raw.device, raw.dtype, self.dropped.dtype, first.time_at, type(first.time_at)


def _part(group: Sequence[Run], nodes: dict[Captured, Any]) -> _Part:
    """Join the tensors of runs, detached unless autograd has to propagate the gradient."""

    def summed(tensors: Sequence[Captured]) -> Any:
        found = [
            x.data if x in nodes or not x.needs else run.tensor_of(x) for run, x in zip(group, tensors, strict=True)
        ]
        return group[0].of(_joined(group[0], found))

    raws, squared = [x.raw for x in group], [x.squared for x in group]
    raw = summed(raws)
    return _Part(raw, raw if raws == squared else summed(squared), group, nodes)


def _measured(parts: Sequence[_Part], alpha: Coefficient, beta: Coefficient) -> tuple[ARTAR, Carried]:
    """Compute the penalty of parts of one kind, and list the carriers of its gradient."""
    first = parts[0].group
    raw: Any = parts[0].raw if len(parts) == 1 else [x.raw for x in parts]
    dropped: Any = parts[0].dropped if len(parts) == 1 else [x.dropped for x in parts]
    raw, dropped = plain_pair(raw, dropped)
    valid = plain(_joined_marks(first, [x.valid for x in first], 1))
    starts = plain(_joined_marks(first, [x.starts for x in first], 0))
    time_at = first[0].time_at
    computed = penalty_of(Call(raw, dropped, plain(alpha), plain(beta), None, valid, starts, time_at, "mean", True))
    carried: Carried = []
    for i, part in enumerate(parts):
        if not part.nodes:
            continue
        additions = computed.additions.get(i)
        if additions is None:
            additions = computed.additions[i] = _additions(part, computed)
        for of_raw, addition in additions:
            tensors = [x.raw if of_raw else x.squared for x in part.group]
            carried += _carried(part, tensors, addition, computed.values)
    return ARTAR(computed.penalty, *(computed.terms or ())), carried


def _additions(part: _Part, computed: Computed) -> list[tuple[bool, Addition]]:
    """Plan which gradients are added to those of raw and dropped, as TAR is of raw and AR is of dropped.

    Returns:
        Whether it is raw, and the addition.
    """
    problem = computed.problem
    ar, tar, of_both = is_on(problem.alpha), is_on(problem.beta), problem._replace(ar_of_raw=True)
    if part.raw is part.dropped:
        terms = [(True, part.raw, of_both)] if ar or tar else []
    else:
        terms = [(True, part.raw, problem._replace(alpha=0.0))] if tar else []
        terms += [(False, part.dropped, of_both._replace(beta=0.0))] if ar else []
    return [(of_raw, Addition(Layer(plain(rows_of(x)), None, computed.values), of)) for of_raw, x, of in terms]


def _carried(part: _Part, tensors: Sequence[Captured], addition: Addition, values: Values) -> Carried:
    """List the carrier of the gradient of a term, if the backward reaches any of its tensors."""
    group, at = part.group, [x if x in part.nodes else None for x in tensors]
    if not any(at):
        return []
    found = [run.tensor_of(x) for run, x in zip(group, tensors, strict=True)]
    if not all([x.requires_grad for x in found]):  # second derivatives need the graphs of all
        found = [x.data for x in tensors]
    one = len(group) == 1 and not group[0].is_step
    split = None if one else functools.partial(_split, group[0], [x.shape for x in found])
    return [(_Tensors(addition, at, split), Layer(plain(_joined(group[0], found)), None, values))]


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
