"""`fused_ar_tar`: from the arguments to the launch, and back to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import check_flags, check_layer, check_layers, check_problem, is_list, plain, ready_lengths
from fastreg.backends import Backend, are_memory, backend_for, keeps_memory_low, observed, remembered
from fastreg.kernels.view import Found, Result
from fastreg.problem import ARTAR, Layer, Problem, compute_dtype
from fastreg.reference import ar_tar, ar_tar_gradients
from fastreg.view import Memory, Signature, allocate, like, readable, signature_of, sums_of, view_of

if TYPE_CHECKING:
    One: TypeAlias = Tensor | PackedSequence
    Activations: TypeAlias = One | list[Tensor] | list[PackedSequence] | tuple[One, ...] | None


@overload
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: float,
    beta: float,
    *,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...
@overload
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: float,
    beta: float,
    *,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[True],
) -> ARTAR: ...
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: float,
    beta: float,
    *,
    batch_first: bool = True,
    lengths: Tensor | None = None,
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
            at and may be `None`.
        dropped: the RNN's output after dropout, of the same shape, or packed as raw is, and on the same device; its
            dtype may differ, and it may be `raw` itself. With `alpha == 0` it is not looked at and may be `None`.
        alpha: coefficient of AR, finite and not negative.
        beta: coefficient of TAR, finite and not negative.
        batch_first: `False` for `(time, batch, hidden)`.
        lengths: of padded sequences, how many time steps each has: integers, `(batch,)`. What lies behind them counts
            in neither sums nor divisors, and its gradient is 0. Lengths on the CPU must be from 0 to the time steps
            there are; on a device, where looking would have to wait for it, they count as the nearest of those.
        reduction: `"mean"` divides AR by the number of elements and TAR by that of changes, padding not counted;
            `"sum"` does not divide.
        return_terms: also return the two terms.

    Returns:
        The penalty, a 0-dim tensor, float32, or float64 for float64 inputs. With `return_terms=True` an
        `ARTAR(penalty, ar, tar)`, whose `ar` and `tar` are unscaled, detached, and 0 for a term that is off.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    problem = check_problem(alpha, beta, batch_first, reduction)
    check_flags(return_terms=return_terms)
    layers = check_layers(raw, dropped, lengths, problem)
    if not layers:  # both terms are off
        zero = _zero_where(raw, dropped)
        return ARTAR(zero, zero.clone(), zero.clone()) if return_terms else zero
    if len(layers) == 1 and not is_list(raw if problem.with_tar else dropped):
        names = [("raw", "dropped")]
    else:
        names = [(f"raw[{i}]", f"dropped[{i}]") for i in range(len(layers))]
    results = [penalty_of(layer, problem, return_terms, x) for layer, x in zip(layers, names, strict=True)]
    total = results[0]
    for more in results[1:]:
        total = [a + b for a, b in zip(total, more, strict=True)]
    return ARTAR(*total) if return_terms else total[0]


def _zero_where(*given: Any) -> Tensor:
    """Return 0 where the activations are, if any were given at all."""
    layers = [x for value in given for x in (value if is_list(value) else [value])]
    tensors = [x.data if isinstance(x, PackedSequence) else x for x in layers]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    return torch.zeros((), dtype=compute_dtype(*tensors), device=tensors[0].device if tensors else None)


def penalty_of(
    layer: Layer, problem: Problem, return_terms: bool, names: tuple[str, str] = ("raw", "dropped")
) -> Sequence[Tensor]:
    """Compute the penalty of one layer.

    Args:
        layer: dense tensors of any subclass; raw and dropped may be one tensor.
        problem: what to compute.
        return_terms: whether AR and TAR are wanted, too.
        names: those of raw and dropped in messages.

    Returns:
        The penalty, (), and where they are wanted AR and TAR, () and detached.
    """
    raw, dropped, lengths, batch_sizes = layer
    if raw is not None and raw is dropped:
        dropped, problem = None, problem.of_raw()
    layer = Layer(
        None if raw is None else plain(raw), None if dropped is None else plain(dropped), lengths, batch_sizes
    )
    raw, dropped, *_ = layer
    needs = (False, False)
    if torch.is_grad_enabled():
        needs = raw is not None and raw.requires_grad, dropped is not None and dropped.requires_grad
    plan = None
    if observed() or not are_memory(layer):
        check_layer(layer, problem, names)
    else:
        plan = _plan_for(signature_of(layer), problem, backend_for(layer.given.device), needs, names)
    if lengths is not None or batch_sizes is not None:
        layer = ready_lengths(layer, problem)
    if plan is None:
        penalty, ar, tar = ar_tar(layer, problem)
        return (penalty, ar.detach(), tar.detach()) if return_terms else (penalty,)
    if needs == (False, False):
        penalty, terms, _ = plan.compute(layer, [None] * len(plan.gradients))
        return (penalty, *terms.unbind()) if return_terms else (penalty,)
    if not return_terms:  # an output more costs 3 us
        return (_Penalty.apply(*layer, plan),)
    penalty, terms = _PenaltyWithTerms.apply(*layer, plan)
    return penalty, *terms.unbind()


class _Plan(NamedTuple):
    """How to compute the penalty of a layer.

    problem    what to compute
    backend    by which code
    launch     its `penalty_forward`
    gradients  what that fills for the backward, beside raw and dropped; empty where it predicts none
    """

    problem: Problem
    backend: Backend
    launch: Any
    gradients: tuple[Memory | None, ...]

    def compute(self, layer: Layer, gradients: Sequence[Tensor | None]) -> Result:
        """Launch the forward, with memory for the gradients that it fills."""
        inputs = [None if x is None else readable(x) for x in layer[:2]]
        return self.launch((*inputs, *gradients), layer.lengths, layer.batch_sizes)

    def allocate(self) -> tuple[Tensor | None, ...]:
        """Allocate what the forward fills for the backward; nothing where memory is what counts."""
        if self.gradients and keeps_memory_low():
            return (None,) * len(self.gradients)
        return tuple(None if x is None else allocate(x) for x in self.gradients)


@remembered
def _plan_for(
    signature: Signature,
    problem: Problem,
    backend: Backend | None,
    needs: tuple[bool, bool],
    names: tuple[str, str],
) -> _Plan | None:
    """Check a layer's metadata and plan its forward; `None` where the plain formula computes it."""
    check_layer(signature, problem, names)
    if backend is None or 0 in signature.given.shape:
        return None
    gradients = ()
    if backend.penalty_forward.predicts:
        gradients = tuple(
            like(x) if x is not None and need else None for x, need in zip(signature[:2], needs, strict=True)
        )
    view = view_of((*signature[:2], *gradients), signature, problem)
    sums = sums_of(signature, problem, compute_dtype(*signature[:2]))
    launch = backend.penalty_forward(view, sums, signature.given.device)
    return _Plan(problem, backend, launch, gradients)


class _GradientPlan(NamedTuple):
    """How to compute the gradients of a layer: their memory, and the launch that fills it."""

    gradients: tuple[Memory | None, ...]
    launch: Any  # a `penalty_backward` of the backend

    def compute(
        self, grad: Tensor, layer: Layer, found: Found, gradients: tuple[Tensor | None, ...] | None
    ) -> tuple[Tensor | None, ...]:
        """Launch the backward, for gradients that the forward has filled, or for new memory."""
        inputs = [None if x is None else readable(x) for x in layer[:2]]
        if gradients is None or found.assumed is None:
            gradients = tuple(None if x is None else allocate(x) for x in self.gradients)
            found = Found(found.scales, None)
        self.launch(grad, (*inputs, *gradients), found, layer.lengths, layer.batch_sizes)
        return gradients


@remembered
def _gradient_plan_for(signature: Signature, problem: Problem, backend: Backend, dtype: torch.dtype) -> _GradientPlan:
    """Plan the backward for the tensors that were saved."""
    gradients = tuple(None if x is None else like(x) for x in signature[:2])
    view = view_of((*signature[:2], *gradients), signature, problem)
    sums = sums_of(signature, problem, dtype)
    return _GradientPlan(gradients, backend.penalty_backward(view, sums, signature.given.device))


class _Penalty(Function):
    """Keep references to the inputs that need gradients, and what the forward has found for the backward.

    Where the forward predicts gradients, they belong to the first backward; a second one computes them anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        raw: Tensor | None,
        dropped: Tensor | None,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        plan: _Plan,
    ) -> Any:
        return _compute(ctx, Layer(raw, dropped, lengths, batch_sizes), plan).penalty

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return (None,) * 5
        *saved, scales, assumed = ctx.saved_tensors
        layer, problem = Layer(*saved), ctx.plan.problem
        predicted = vars(ctx).pop("gradients", None)  # in one step, so that no two threads get them
        if torch.is_grad_enabled() or observed() or not are_memory((grad, *layer)):
            # PyTorch must see the formula of the gradient.
            wide = ar_tar_gradients(grad, layer, problem)
            gradients = [None if g is None else g.to(x.dtype) for g, x in zip(wide, layer[:2], strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
        else:
            plan = _gradient_plan_for(signature_of(layer), problem, ctx.plan.backend, grad.dtype)
            gradients = plan.compute(grad, layer, Found(scales, assumed), predicted)
        return *gradients, None, None, None


class _PenaltyWithTerms(_Penalty):
    """The same with AR and TAR, (2,), as a second result that has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        raw: Tensor | None,
        dropped: Tensor | None,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        plan: _Plan,
    ) -> Any:
        penalty, terms, _ = _compute(ctx, Layer(raw, dropped, lengths, batch_sizes), plan)
        ctx.set_materialize_grads(False)  # no zeros in the place of a gradient of the terms
        ctx.mark_non_differentiable(terms)
        return penalty, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Penalty.backward(ctx, grad)


def _compute(ctx: Any, layer: Layer, plan: _Plan) -> Result:
    """Launch a forward, and save what its backward needs."""
    gradients = plan.allocate()
    result = plan.compute(layer, gradients)
    raw, dropped, lengths, batch_sizes = layer
    need_raw, need_dropped = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        raw if need_raw else None, dropped if need_dropped else None, lengths, batch_sizes, *result.found
    )
    ctx.plan, ctx.gradients = plan, gradients or None
    return result
