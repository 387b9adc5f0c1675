"""`fused_ar_tar`: from the arguments to the launch, and back to the gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import (
    check_flags,
    check_layer,
    check_layers,
    check_problem,
    check_steps,
    is_list,
    plain,
    ready_steps,
)
from fastreg.backends import Backend, are_memory, backend_for, keeps_memory_low, observed, remembered
from fastreg.kernels.view import Values
from fastreg.problem import ARTAR, Coefficient, Layer, Problem, compute_dtype, is_on, replaced
from fastreg.reference import ar_tar, ar_tar_gradients
from fastreg.view import Memory, Signature, allocate, like, readable, signature_of, sums_of, view_of

if TYPE_CHECKING:
    One: TypeAlias = Tensor | PackedSequence
    Activations: TypeAlias = One | list[Tensor] | list[PackedSequence] | tuple[One, ...] | None

VALUES = len(Values._fields)


@overload
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    valid: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...
@overload
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    valid: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[True],
) -> ARTAR: ...
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    batch_first: bool = True,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    return_terms: bool = False,
) -> Tensor | ARTAR:
    """Compute activation and temporal activation regularization, to be added to the loss.

    The penalty is `alpha * AR + beta * TAR`, `AR = mean(dropped ** 2)` and `TAR = mean((raw[t + 1] - raw[t]) ** 2)`,
    after Merity, McCann and Socher, "Revisiting Activation Regularization for Language RNNs" (2017). Differences,
    squares and sums are formed in float32, or float64 where an input is float64. One time step has no changes: its TAR
    is 0. Without any elements the penalty is 0. It can be differentiated any number of times.

    Args:
        raw: the RNN's output before dropout: `(batch, time, hidden)`, `(time, hidden)` for one sequence, a
            `PackedSequence`, or a list or tuple of them, one a layer, whose penalties add up; all layers have the same
            batch and time steps. float16, bfloat16, float32 or float64, any strides. With `beta == 0` it is not looked
            at and may be `None`, unless terms are wanted and it is given: then it is measured.
        dropped: the RNN's output after dropout, of the same shape, or packed as raw is, and on the same device; its
            dtype may differ, and it may be `raw` itself. With `alpha == 0` likewise.
        alpha: coefficient of AR, finite and not negative: a number, or a 0-dim tensor on the device of the
            activations, which is read there, without a sync, in the dtype of the computation, and gets no gradient. So
            a schedule changes the tensor in place, before the forward, also between replays of a CUDA graph.
        beta: coefficient of TAR, likewise.
        batch_first: `False` for `(time, batch, hidden)`.
        lengths: of padded sequences, how many time steps each has: integers, `(batch,)`. What lies behind them counts
            in neither sums nor divisors, and its gradient is 0. Lengths on the CPU must be from 0 to the time steps
            there are; on a device, where looking would have to wait for it, they count as the nearest of those.
        valid: in the place of lengths, which time steps count, wherever they are: `(batch, time)` in every layout, bool
            or integers, 1 and 0, such as an `attention_mask`. A change counts where both of its steps do. What does not
            count is in neither sums nor divisors, and its gradient is 0. Integers on a device, where looking would have
            to wait for it, count unless they are 0.
        reduction: `"mean"` divides AR by the number of elements and TAR by that of changes, padding not counted;
            `"sum"` does not divide.
        return_terms: also return the two terms.

    Returns:
        The penalty, a 0-dim tensor, float32, or float64 for float64 inputs. With `return_terms=True` an
        `ARTAR(penalty, ar, tar)`, whose `ar` and `tar` are unscaled and detached. A term whose coefficient is 0 is
        measured, too, unless its activations are `None`: then it is 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    asked = check_problem(alpha, beta, batch_first, reduction, return_terms)
    check_flags(return_terms=return_terms)
    layers = check_layers(raw, dropped, check_steps(lengths, valid), asked)
    if not layers:  # both terms are off
        zero = _zero_where(raw, dropped)
        return ARTAR(zero, zero.clone(), zero.clone()) if return_terms else zero
    names = [("raw", "dropped")]
    if len(layers) > 1 or is_list(raw) or is_list(dropped):
        names = [(f"raw[{i}]", f"dropped[{i}]") for i in range(len(layers))]
    results = penalty_of(layers, asked.problem, names)
    return ARTAR(*results) if return_terms else results[0]


def _zero_where(*given: Any) -> Tensor:
    """Return 0 where the activations are, if any were given at all."""
    layers = [x for value in given for x in (value if is_list(value) else [value])]
    tensors = [x.data if isinstance(x, PackedSequence) else x for x in layers]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    return torch.zeros((), dtype=compute_dtype(*tensors), device=tensors[0].device if tensors else None)


def penalty_of(
    layers: Sequence[Layer], problem: Problem, names: Sequence[tuple[str, str]] = (("raw", "dropped"),)
) -> Sequence[Tensor]:
    """Compute the penalty of layers, whose penalties add up.

    Args:
        layers: dense tensors of any subclass, all with the same values; raw and dropped of a layer may be one tensor.
        problem: what to compute.
        names: those of raw and dropped of each layer in messages.

    Returns:
        The penalty, (), and if the problem is measured AR and TAR, () and detached.
    """
    problems = tuple([problem.of_raw() if x.raw is x.dropped else problem for x in layers])
    layers = [_plain(layer) for layer in layers]
    plans = None
    if observed() or not all([are_memory(layer) for layer in layers]):
        for part in zip(layers, problems, names, strict=True):
            check_layer(*part)
    else:
        signatures = tuple([signature_of(layer) for layer in layers])
        needs = tuple([_needs(*part) for part in zip(layers, problems, strict=True)])
        backend = backend_for(layers[0].given().device)
        plans = _plans_for(signatures, problems, tuple(names), needs, backend, keeps_memory_low())
    if not layers[0].is_whole():
        ready = ready_steps(layers[0], problem)
        marks = None if plans is None or ready.valid is None else plans[0].backend.marks_of(ready.valid)
        layers = [replaced(layer, lengths=ready.lengths, valid=ready.valid, marks=marks) for layer in layers]
    if plans is None:
        results = [ar_tar(*part) for part in zip(layers, problems, strict=True)]
        penalty, ar, tar = functools.reduce(lambda a, b: ARTAR(*map(torch.add, a, b)), results)
        return (penalty, ar.detach(), tar.detach()) if problem.measured else (penalty,)
    if all([plan.needs == (False, False) for plan in plans]):
        result, _ = _compute(plans, layers)
        return (result.penalty, *result.terms.unbind()) if problem.measured else (result.penalty,)
    results = _Penalty.apply(plans, *layers[0].values(), *[x for layer in layers for x in layer[:2]])
    return (results[0], *results[1].unbind()) if problem.measured else (results,)


def _plain(layer: Layer) -> Layer:
    """Return a layer without subclasses that only decorate; where raw and dropped are one tensor, dropped is `None`."""
    raw, dropped, *values = layer
    dropped = None if dropped is None or dropped is raw else plain(dropped)
    return Layer(None if raw is None else plain(raw), dropped, *values)


def _needs(layer: Layer, problem: Problem) -> tuple[bool, bool]:
    """Tell whether raw and dropped need gradients: a term that is only measured has none."""
    if not torch.is_grad_enabled():
        return False, False
    raw, dropped, *_ = layer
    ar, tar = is_on(problem.alpha), is_on(problem.beta)
    return (
        raw is not None and raw.requires_grad and (tar or (ar and problem.ar_of_raw)),
        dropped is not None and dropped.requires_grad and ar,
    )


class _Plan(NamedTuple):
    """How to compute the penalty of a layer.

    problem    what to compute
    backend    by which code
    needs      whether raw and dropped need gradients
    unread     the memory of raw and of dropped, `None` where the backward reads the tensor
    launch     its `penalty_forward`
    gradients  what that fills for the backward, beside raw and dropped
    """

    problem: Problem
    backend: Backend
    needs: tuple[bool, bool]
    unread: tuple[Memory | None, ...]
    launch: Any
    gradients: tuple[Memory | None, ...]


class _Ahead(NamedTuple):
    """Gradients that a forward has filled, and the upstream gradients that it assumed; `None` if it filled none."""

    gradients: tuple[Tensor | None, ...]
    assumed: Tensor | None


def _compute(plans: Sequence[_Plan], layers: Sequence[Layer]) -> tuple[Any, list[_Ahead]]:
    """Launch the forward of each layer, which adds its penalty to those before; return the last `Result`."""
    result, ahead = None, []
    for plan, layer in zip(plans, layers, strict=True):
        inputs = [None if x is None else readable(x) for x in layer[:2]]
        gradients = tuple([None if x is None else allocate(x) for x in plan.gradients])
        result = plan.launch((*inputs, *gradients), layer.values(), result)
        ahead.append(_Ahead(gradients, result.assumed))
    return result, ahead


@remembered
def _plans_for(
    signatures: tuple[Signature, ...],
    problems: tuple[Problem, ...],
    names: tuple[tuple[str, str], ...],
    needs: tuple[tuple[bool, bool], ...],
    backend: Backend | None,
    low_memory: bool,
) -> tuple[_Plan, ...] | None:
    """Check the layers' metadata and plan their forward; `None` where the plain formula computes it."""
    for part in zip(signatures, problems, names, strict=True):
        check_layer(*part)
    if backend is None or any(0 in x.given().shape for x in signatures):
        return None
    dtype = compute_dtype(*(x for signature in signatures for x in signature[:2]))
    plans = []
    for signature, problem, need in zip(signatures, problems, needs, strict=True):
        filled = tuple(
            like(x) if x is not None and needed and not low_memory else None
            for x, needed in zip(signature[:2], need, strict=True)
        )
        view = view_of((*signature[:2], *filled), signature, problem)
        sums = sums_of(signature, problem, dtype)._replace(adds=len(plans) > 0)
        launch = backend.penalty_forward(view, sums, signature.given().device)
        unread = tuple(None if needed else x for x, needed in zip(signature[:2], need, strict=True))
        plans.append(_Plan(problem, backend, need, unread, launch, filled))
    return tuple(plans)


class _GradientPlan(NamedTuple):
    """How to compute the gradients of a layer: their memory, and the launch that fills it."""

    gradients: tuple[Memory | None, ...]
    launch: Any  # a `penalty_backward` of the backend

    def compute(self, grad: Tensor, layer: Layer, ahead: _Ahead | None) -> tuple[Tensor | None, ...]:
        """Launch the backward, for gradients that the forward has filled, or for new memory."""
        inputs = [None if x is None else readable(x) for x in layer[:2]]
        if ahead is None or ahead.assumed is None:
            ahead = _Ahead(tuple([None if x is None else allocate(x) for x in self.gradients]), None)
        self.launch(grad, (*inputs, *ahead.gradients), layer.values(), ahead.assumed)
        return ahead.gradients


@remembered
def _gradient_plan_for(
    signature: Signature, unread: tuple[Memory | None, ...], problem: Problem, backend: Backend, dtype: torch.dtype
) -> _GradientPlan:
    """Plan the backward for the tensors that were saved, with the view that the forward had."""
    gradients = tuple(None if x is None else like(x) for x in signature[:2])
    inputs = tuple(y if x is None else x for x, y in zip(signature[:2], unread, strict=True))
    view = view_of((*inputs, *gradients), signature, problem)
    sums = sums_of(signature, problem.penalized(), dtype)
    return _GradientPlan(gradients, backend.penalty_backward(view, sums, signature.given().device))


class _Penalty(Function):
    """Keep references to the inputs that need gradients, and what the forward has filled for the backward.

    What it has filled belongs to the first backward; a second one computes gradients anew.
    """

    @staticmethod
    def forward(ctx: Any, plans: Sequence[_Plan], *tensors: Tensor | None) -> Any:
        result, ctx.ahead = _compute(plans, _layers(tensors))
        needs = (True,) * VALUES + tuple([need for plan in plans for need in plan.needs])
        ctx.save_for_backward(*[x if need else None for x, need in zip(tensors, needs, strict=True)])
        ctx.plans = plans
        if not plans[0].problem.measured:  # an output more costs 3 us
            return result.penalty
        ctx.set_materialize_grads(False)  # no zeros in the place of a gradient of the terms
        ctx.mark_non_differentiable(result.terms)
        return result.penalty, result.terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, plans = ctx.saved_tensors, ctx.plans
        if grad is None:
            return (None,) * (1 + len(saved))
        ahead = vars(ctx).pop("ahead", [None] * len(plans))  # in one step, so that no two threads get it
        formula = torch.is_grad_enabled() or observed() or not are_memory((grad, *saved))
        gradients: list[Tensor | None] = []
        for plan, layer, filled in zip(plans, _layers(saved), ahead, strict=True):
            if plan.needs == (False, False):
                gradients += None, None
            elif formula:  # PyTorch must see that of the gradient
                wide = ar_tar_gradients(grad, layer, plan.problem.penalized())
                gradients += [None if g is None else g.to(x.dtype) for g, x in zip(wide, layer[:2], strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
            else:
                saved_plan = _gradient_plan_for(
                    signature_of(layer), plan.unread, plan.problem, plan.backend, grad.dtype
                )
                gradients += saved_plan.compute(grad, layer, filled)
        return (None,) * (1 + VALUES) + tuple(gradients)


def _layers(tensors: Sequence[Tensor | None]) -> list[Layer]:
    """Put together layers of the values that all have, and of raw and dropped of each."""
    return [Layer(*tensors[i : i + 2], *tensors[:VALUES]) for i in range(VALUES, len(tensors), 2)]
