"""`fused_dropout_ar_tar`: from the arguments to the launch, and back to the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.arguments import (
    check_flags,
    check_layer,
    check_mask,
    check_probability,
    check_problem,
    check_steps,
    check_tensor,
    plain,
    ready_steps,
)
from fastreg.backends import Backend, are_memory, backend_for, observed, remembered
from fastreg.kernels.view import Result
from fastreg.penalty import penalty_of
from fastreg.problem import ARTAR, Coefficient, Layer, Problem, compute_dtype, replaced, time_dim
from fastreg.reference import ar_tar, ar_tar_gradients
from fastreg.view import Memory, Signature, allocate, like, memory_of, readable, signature_of, sums_of, view_of


@overload
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    training: bool = ...,
    mask: Tensor | None = ...,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    valid: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    training: bool = ...,
    mask: Tensor | None = ...,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    valid: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, ARTAR]: ...
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    training: bool = True,
    mask: Tensor | None = None,
    batch_first: bool = True,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    return_terms: bool = False,
) -> tuple[Tensor, Tensor | ARTAR]:
    """Apply variational dropout to `raw`, and compute the penalty of `raw` and of what is left of it in the same pass.

    Variational (locked) dropout drops a unit of a sequence at all its time steps: Gal and Ghahramani, "A
    Theoretically Grounded Application of Dropout in Recurrent Neural Networks" (2016). The mask is drawn from
    torch's generator as fastai's `RNNDropout` draws it, so that one seed gives both the same. The penalty is
    that of `fused_ar_tar`.

    Args:
        raw: the RNN's output: `(batch, time, hidden)`, or `(time, hidden)` for one sequence; float16, bfloat16,
            float32 or float64, any strides.
        p: the probability to drop a unit, from 0 to below 1.
        alpha: coefficient of AR, finite and not negative: a number, or a 0-dim tensor on the device of the
            activations, which is read there, without a sync, and gets no gradient. So a schedule changes the tensor in
            place, before the forward, also between replays of a CUDA graph.
        beta: coefficient of TAR, likewise.
        training: with `False`, as with `p == 0` and no mask, nothing is dropped, and dropped is `raw` itself.
        mask: a mask to use instead of drawing one, already scaled by `1 / (1 - p)`: `(batch, 1, hidden)` (with
            `batch_first=False` `(1, batch, hidden)`), or of raw's shape; of raw's dtype and on its device. It
            gets no gradient.
        batch_first: `False` for `(time, batch, hidden)`.
        lengths: of padded sequences, how many time steps each has, as for `fused_ar_tar`. Padding is dropped out like
            all the rest, but counts in neither term.
        valid: in the place of lengths, which time steps count, `(batch, time)` as for `fused_ar_tar`. The others are
            dropped out like all the rest.
        reduction: `"mean"` divides AR by the number of elements and TAR by that of changes, padding not counted;
            `"sum"` does not divide.
        return_terms: also return the two terms.

    Returns:
        dropped, of raw's shape and dtype, and the penalty, 0-dim, float32 or for float64 inputs float64; with
        `return_terms=True` an `ARTAR(penalty, ar, tar)` in its place.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    asked = check_problem(alpha, beta, batch_first, reduction, return_terms)
    check_flags(training=training, return_terms=return_terms)
    p = check_probability(p)
    steps = check_steps(lengths, valid)
    raw = check_tensor("raw", raw)
    layer = Layer(raw, None, steps.lengths, valid=steps.valid, alpha=asked.alpha, beta=asked.beta)
    if mask is not None:
        check_layer(layer, asked.problem)
        mask = check_mask(mask, raw, batch_first)
    used = 0.0 if not training else p if mask is None else mask
    dropped, results = drop_and_penalize(layer, used, asked.problem)
    return dropped, ARTAR(*results) if return_terms else results[0]


def drop_and_penalize(layer: Layer, mask: Tensor | float, problem: Problem) -> tuple[Tensor, Sequence[Tensor]]:
    """Apply a dropout mask to raw, and compute the penalty of one layer.

    Args:
        layer: of raw, a dense tensor of any subclass, and of lengths or valid steps; dropped is `None`.
        mask: of the shape of raw, or expanded to it; or the probability to drop a unit, to draw one. With 0 nothing is
            dropped, and dropped is raw itself.
        problem: what to compute.

    Returns:
        dropped, and a tuple of the penalty, (), and if the problem is measured AR and TAR, () and detached.

    Raises:
        TypeError, ValueError: the layer's tensors are not as `fused_dropout_ar_tar` wants them.
    """
    if not isinstance(mask, Tensor) and mask == 0:
        raw = layer.given()
        if not problem.with_ar() and not problem.with_tar():
            check_layer(layer, problem)
            return raw, torch.zeros(3, dtype=compute_dtype(raw), device=raw.device).unbind()
        used = replaced(layer, raw=raw if problem.with_tar() else None, dropped=raw if problem.with_ar() else None)
        return raw, penalty_of([used], problem)
    raw = plain(layer.given())
    layer = replaced(layer, raw=raw)
    mask = plain(mask) if isinstance(mask, Tensor) else mask
    plan = None
    if observed() or not are_memory((*layer, mask if isinstance(mask, Tensor) else None)):
        check_layer(layer, problem)
    else:
        known = memory_of(mask) if isinstance(mask, Tensor) else None
        plan = _plan_for(signature_of(layer), known, problem, backend_for(raw.device))
    if not isinstance(mask, Tensor):
        mask = _locked_mask(raw, mask, problem)
    if not layer.is_whole():
        layer = ready_steps(layer, problem)
        if plan is not None and layer.valid is not None:
            layer = replaced(layer, marks=plan.backend.marks_of(layer.valid))
    if plan is None:
        dropped = raw * mask
        penalty, ar, tar = ar_tar(replaced(layer, dropped=dropped), problem)
        return dropped, (penalty, ar.detach(), tar.detach()) if problem.measured else (penalty,)
    if torch.is_grad_enabled() and raw.requires_grad:
        dropped, penalty, terms = _DropoutPenalty.apply(plan, mask, *layer)
    else:
        dropped, (penalty, terms, _) = plan.compute(layer, mask)
    return dropped, (penalty, *terms.unbind()) if problem.measured else (penalty,)


def _locked_mask(raw: Any, p: float, problem: Problem) -> Tensor:
    """Draw a mask as fastai's `RNNDropout` does, of one row for all time steps, expanded to the shape of raw."""
    shape = list(raw.shape)
    shape[time_dim(raw, problem.batch_first)] = 1
    return raw.new_empty(shape).bernoulli_(1 - p).div_(1 - p).expand_as(raw)


class _Plan(NamedTuple):
    """How to drop units and compute the penalty of a layer: the problem, the code, memory for dropped, the launch."""

    problem: Problem
    backend: Backend
    dropped: Memory
    launch: Any  # a `dropout_forward` of the backend

    def compute(self, layer: Layer, mask: Tensor) -> tuple[Tensor, Result]:
        """Launch the forward; return dropped and the penalty."""
        dropped = allocate(self.dropped)
        return dropped, self.launch((readable(layer.given()), readable(mask), dropped), layer.values())


@remembered
def _plan_for(signature: Signature, mask: Memory | None, problem: Problem, backend: Backend | None) -> _Plan | None:
    """Check a layer's metadata and plan its forward; `None` where the plain formula computes it.

    Without the memory of a mask the plan is for one that `_locked_mask` draws.
    """
    check_layer(signature, problem)
    raw = signature.given()
    if backend is None or 0 in raw.shape:
        return None
    if mask is None:
        drawn = _locked_mask(torch.empty(raw.shape, device="meta"), 0.5, problem)
        mask = Memory(raw.shape, raw.dtype, raw.device, drawn.stride(), aligned=True)
    dropped = like(raw)
    view = view_of((raw, mask, dropped), signature, problem)
    sums = sums_of(signature, problem, compute_dtype(raw))
    return _Plan(problem, backend, dropped, backend.dropout_forward(view, sums, raw.device))


class _GradientPlan(NamedTuple):
    """How to compute the gradient of raw: its memory, and the launch that fills it."""

    gradient: Memory
    launch: Any  # a `dropout_backward` of the backend

    def compute(self, upstream: Sequence[Tensor | None], layer: Layer, mask: Tensor) -> Tensor:
        """Allocate and launch the backward, for the gradients of dropped and of the penalty that there are."""
        gradient = allocate(self.gradient)
        grad_dropped, grad = upstream
        grad_dropped = None if grad_dropped is None else readable(grad_dropped)
        self.launch(grad, (readable(layer.given()), readable(mask), grad_dropped, gradient), layer.values())
        return gradient


@remembered
def _gradient_plan_for(
    signature: Signature, others: tuple[Memory, Memory | None], problem: Problem, backend: Backend, penalized: bool
) -> _GradientPlan:
    """Plan the backward for tensors that were saved, and for `others`, the mask and the gradient of dropped."""
    raw, gradient = signature.given(), like(signature.given())
    view = view_of((raw, *others, gradient), signature, problem)
    sums = sums_of(signature, problem.penalized(), compute_dtype(raw))
    if not penalized:
        sums = sums._replace(ar=False, tar=False)
    return _GradientPlan(gradient, backend.dropout_backward(view, sums, raw.device))


class _DropoutPenalty(Function):
    """Keep references to raw, to the mask, and to what the layer has beside raw."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, mask: Tensor, *tensors: Tensor | None) -> Any:
        dropped, (penalty, terms, _) = plan.compute(Layer(*tensors), mask)
        ctx.save_for_backward(mask, *tensors)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # what has no gradient costs no zeros
        ctx.mark_non_differentiable(terms)
        return dropped, penalty, terms

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_dropped: Tensor | None, grad: Tensor | None, _: None
    ) -> Any:
        mask, *tensors = ctx.saved_tensors
        layer, upstream, problem = Layer(*tensors), (grad_dropped, grad), ctx.plan.problem
        if grad_dropped is None and grad is None:
            gradient = None
        elif torch.is_grad_enabled() or observed() or not are_memory((mask, *tensors, *upstream)):
            gradient = _gradient_formula(upstream, layer, mask, problem.penalized())  # which PyTorch must see
        else:
            others = memory_of(mask), None if grad_dropped is None else memory_of(grad_dropped)
            plan = _gradient_plan_for(signature_of(layer), others, problem, ctx.plan.backend, grad is not None)
            gradient = plan.compute(upstream, layer, mask)
        return None, None, gradient, *(None,) * (len(tensors) - 1)


def _gradient_formula(
    upstream: tuple[Tensor | None, Tensor | None], layer: Layer, mask: Tensor, problem: Problem
) -> Tensor:
    """Compute the gradient of raw in plain PyTorch, itself differentiable in both upstream gradients and in raw.

    Args:
        upstream: gradients of dropped and of the penalty, of which one may be `None`.
        layer: raw, which steps count, and coefficients.
        mask: of the shape of raw.
        problem: what the forward computed.
    """
    grad_dropped, grad = upstream
    raw, dtype = layer.given(), compute_dtype(layer.raw)
    through_mask = None if grad_dropped is None else grad_dropped.to(dtype)
    direct = None
    if grad is not None:
        direct, ar = ar_tar_gradients(grad, replaced(layer, dropped=raw * mask), problem)
        through_mask = _sum(through_mask, ar)
    gradient = _sum(None if through_mask is None else through_mask * mask.to(dtype), direct)
    return torch.zeros_like(raw) if gradient is None else gradient.to(raw.dtype)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """Add what there is."""
    return x if y is None else y if x is None else x + y
