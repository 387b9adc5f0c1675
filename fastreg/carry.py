"""The penalty of captured runs: its sums now, and its gradient added in the backward where gradients arrive anyway.

`penalty_of_runs` puts one node, `_Carry`, between the penalty and the loss. Its backward runs before any node of the
loss's graph, and arms the runs with the upstream gradient for this backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.arguments import check_options
from fastreg.capture import Captured, Reached, Run
from fastreg.dropout import Upstream, add_gradient
from fastreg.kernels.view import Values
from fastreg.penalty import measure
from fastreg.prepare import plain, plain_pair, problem_of
from fastreg.problem import ARTAR, Call, Coefficient, Layer, Problem, is_on


class Carrier(NamedTuple):
    """Where a backward adds the gradient of a penalty: at tensors, or in the node of a fused dropout.

    at       the tensors that a gradient arrives at, `None` for one that it is not to be added to
    split    splits a gradient for several tensors, which joined along time are one activation; `None` for one tensor
    node     the node, where there are no tensors
    layer    the activation, as `add_gradient` takes it; for a node, coefficients alone
    problem  the problem of the penalty
    """

    at: Sequence[Captured | None]
    split: Callable[[Tensor], Sequence[Tensor]] | None
    node: Any
    layer: Layer
    problem: Problem

    def arm(self, task: int | None, grad: Tensor, layer: Layer) -> None:
        """Add the gradient in this backward, or for `None` in every one, for a layer whose tensors were saved."""
        if layer.raw is None:
            self.node.carried = Upstream(task, grad, self.problem, layer.values.alpha, layer.values.beta)
            return
        if not torch.is_grad_enabled() or task is None:  # its graph would close a circle, if the backward failed
            layer = layer._replace(raw=layer.raw.detach())
        if self.split is None:
            adds = [functools.partial(add_gradient, upstream=grad, layer=layer, problem=self.problem)]
        else:
            whole = add_gradient(torch.zeros_like(layer.given()), grad, layer, self.problem)
            adds = [functools.partial(torch.add, piece) for piece in self.split(whole)]
        for captured, add in zip(self.at, adds, strict=True):
            if captured is not None:
                captured.arm(task, add)

    def disarm(self) -> None:
        """Add nothing in later backwards, where this one ended before it came by."""
        for captured in self.at:
            if captured is not None:
                captured.armed = None
        if self.node is not None:
            self.node.carried = None


class _Carry(Function):
    """Return the penalty; in the backward, arm its carriers."""

    @staticmethod
    def forward(ctx: Any, carriers: Sequence[Carrier], loss: Tensor, penalty: Tensor) -> Tensor:
        ctx.carriers = [x._replace(layer=Layer(None, None)) for x in carriers]
        ctx.save_for_backward(*[x for carrier in carriers for x in (carrier.layer.raw, *carrier.layer.values)])
        ctx.loss = loss.shape, loss.dtype, loss.device
        return penalty.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        task, saved, width = torch._C._current_graph_task_id(), ctx.saved_tensors, 1 + len(Values._fields)
        carriers = ctx.carriers
        layers = [Layer(saved[i], None, Values(*saved[i + 1 : i + width])) for i in range(0, len(saved), width)]
        # Compiled autograd cannot trace how functions are stored in carriers.
        arm: Any = torch.compiler.disable(_arm) if torch.compiler.is_compiling() else _arm
        arm(carriers, task, grad, layers)
        if not torch.compiler.is_compiling():  # which takes no callbacks
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_disarm, carriers))
        shape, dtype, device = ctx.loss
        # Zeros, so that gradients pass where the carriers wait for them, even if the penalty alone is differentiated.
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
        groups: runs that joined along time are one activation, or one run.
        reached: the marks by which the loss depends on them.
        loss: the loss.
        alpha: coefficient of AR.
        beta: coefficient of TAR.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    carriers: list[Carrier] = []
    formed: list[ARTAR] = []
    alike: dict[Any, list[_Part]] = {}
    for i, group in enumerate(groups):
        nodes = {mark.captured: node for run in group for mark, node in reached.get(run, ()) if mark.captured}
        if group[0].fused is not None and group[0].fused in nodes:
            terms, carrier = _of_node(group[0], nodes[group[0].fused], alpha, beta)
            formed.append(terms)
            carriers.append(carrier)
        else:
            part = _part(group, nodes)
            alike.setdefault(part.kind or i, []).append(part)
    for parts in alike.values():  # in one call, which allocates and checks once
        terms, some = _measured(parts, alpha, beta)
        formed.append(terms)
        carriers += some
    moved = [ARTAR(*(x.to(loss.device) for x in terms)) for terms in formed]  # layers may live on several devices
    total = functools.reduce(lambda a, b: ARTAR(*map(torch.add, a, b)), moved)
    if carriers and torch.is_grad_enabled():
        total = total._replace(penalty=_Carry.apply(carriers, loss, total.penalty))
    return total


def carry_always(run: Run, node: Any, alpha: Coefficient, beta: Coefficient, scale: Coefficient) -> ARTAR:
    """Add the gradient of a run's penalty in every backward through its tensors; return the terms.

    Args:
        run: the run, complete.
        node: that of the fused dropout that has formed the terms, or `None`.
        alpha: coefficient of AR.
        beta: coefficient of TAR.
        scale: the upstream gradient.
    """
    if run.fused is not None:
        terms, carrier = _of_node(run, node, alpha, beta)
        carriers = [carrier]
    else:
        terms, carriers = _measured([_part([run], dict.fromkeys(run.carriers))], alpha, beta)
    grad = scale
    if not isinstance(grad, Tensor):
        grad = torch.full((), grad, dtype=terms.penalty.dtype, device=terms.penalty.device)
    for carrier in carriers:
        carrier.arm(None, grad, carrier.layer)
    return terms


def _of_node(run: Run, node: Any, alpha: Coefficient, beta: Coefficient) -> tuple[ARTAR, Carrier]:
    """Weigh the terms that a fused dropout has formed; its node carries their gradient."""
    call = Call(
        *(None, None, plain(alpha), plain(beta), None, None, None),
        *(run.batch_first, "mean", True, run.dropped is run.raw),
    )
    check_options(call)
    tensors = [x if isinstance(x, Tensor) else None for x in (call.alpha, call.beta)]
    layer, problem = Layer(None, None, Values(alpha=tensors[0], beta=tensors[1])), problem_of(call)
    return _weighted(run.terms, alpha, beta), Carrier((), None, node, layer, problem)


class _Part(NamedTuple):
    """An activation to form the penalty of.

    kind          of its memory, by which several are summed in one call; `None` for one that has steps of its own
    raw, dropped  as `fused_ar_tar` takes them
    group         the runs that are joined in it
    nodes         those of its tensors that the gradient is added to
    """

    kind: Any
    raw: Any
    dropped: Any
    group: Sequence[Run]
    nodes: dict[Captured, Any]


def _part(group: Sequence[Run], nodes: dict[Captured, Any]) -> _Part:
    """Join the tensors of runs: without a graph, unless autograd has to lead the gradient to one."""

    def summed(of: Callable[[Run], Captured]) -> Any:
        tensors = [(run, of(run)) for run in group]
        return group[0].of(
            _joined(group[0], [x.data if x in nodes or not x.needs else run.tensor_of(x) for run, x in tensors])
        )

    first = group[0]
    raw = summed(lambda run: run.raw)
    dropped = raw if all(x.dropped is x.raw for x in group) else summed(lambda run: run.squared)
    kind = None
    if first.packed is None and all(x.valid is None for x in group):
        kind = raw.shape[:-1], raw.device, raw.dtype, dropped.dtype, first.batch_first
    return _Part(kind, raw, dropped, group, nodes)


def _measured(parts: Sequence[_Part], alpha: Coefficient, beta: Coefficient) -> tuple[ARTAR, list[Carrier]]:
    """Compute the penalty of parts of a kind, and list where its gradient is to be added."""
    first = parts[0]
    raw, dropped = (
        (first.raw, first.dropped) if len(parts) == 1 else ([x.raw for x in parts], [x.dropped for x in parts])
    )
    valid, batch_first = _valid(first.group), first.group[0].batch_first
    raw, dropped = plain_pair(raw, dropped)
    terms, layers, problem = measure(
        Call(raw, dropped, plain(alpha), plain(beta), None, plain(valid), None, batch_first, "mean", True)
    )
    carriers = []
    for part, layer in zip(parts, layers, strict=True):
        if part.raw is part.dropped:
            carriers += _carriers(part, [x.raw for x in part.group], layer.values, problem._replace(ar_of_raw=True))
        else:
            of_tar = layer.values._replace(alpha=None), problem._replace(alpha=0.0)
            carriers += _carriers(part, [x.raw for x in part.group], *of_tar)
            of_ar = layer.values._replace(beta=None), problem._replace(beta=0.0, ar_of_raw=True)
            carriers += _carriers(part, [x.squared for x in part.group], *of_ar)
    return terms, carriers


def _carriers(part: _Part, tensors: Sequence[Captured], values: Values, problem: Problem) -> list[Carrier]:
    """List where the gradient of a term is to be added, if it has one."""
    group, at = part.group, [x if x in part.nodes else None for x in tensors]
    if not any(at) or not (is_on(problem.alpha) or is_on(problem.beta)):
        return []
    found = [run.tensor_of(x) for run, x in zip(group, tensors, strict=True)]
    if not all(x.requires_grad for x in found):  # second derivatives need the graphs of all
        found = [x.data for x in tensors]
    one = len(group) == 1 and not group[0].is_step
    split = None if one else functools.partial(_split, group[0], [x.shape for x in found])
    return [Carrier(at, split, None, Layer(_joined(group[0], found), None, values), problem)]


def _axis(run: Run, dims: int) -> int:
    """Return the time axis of runs joined along time."""
    return 1 if dims + run.is_step == 3 and run.batch_first else 0


def _joined(run: Run, tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors along time, all of them like that of a run."""
    if run.is_step:
        return torch.stack(tensors, _axis(run, tensors[0].dim()))  # pyright: ignore[reportArgumentType]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, _axis(run, tensors[0].dim()))  # pyright: ignore


def _split(run: Run, shapes: Sequence[torch.Size], x: Tensor) -> Sequence[Tensor]:
    """Split what `_joined` has joined."""
    axis = _axis(run, len(shapes[0]))
    return x.unbind(axis) if run.is_step else x.split([shape[axis] for shape in shapes], axis)


def _valid(group: Sequence[Run]) -> Tensor | None:
    """Join the valid steps of runs; all steps count of a run that has none."""
    known = next((x.valid for x in group if x.valid is not None), None)
    if known is None or (len(group) == 1 and not group[0].is_step):
        return known
    each = [torch.ones_like(known) if x.valid is None else x.valid for x in group]
    return torch.stack(each, -1) if group[0].is_step and known.dim() < 2 else torch.cat(each, -1)


def _weighted(terms: tuple[Tensor, ...], alpha: Coefficient, beta: Coefficient) -> ARTAR:
    """Weigh AR and TAR; a coefficient of 0 leaves its term out, even if that is infinite or NaN."""
    ar, tar = terms
    penalty = torch.zeros_like(ar)
    for coefficient, term in ((alpha, ar), (beta, tar)):
        if isinstance(coefficient, Tensor):
            factor = plain(coefficient).to(term.device, term.dtype)
            penalty = penalty + torch.where(factor == 0, 0, factor * term)
        elif coefficient != 0:
            penalty = penalty + coefficient * term
    return ARTAR(penalty, ar, tar)
