"""`fused_dropout_ar_tar`: from the arguments to the launch, and back to the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.arguments import (
    check_layer,
    check_mask,
    check_options,
    check_probability,
    check_steps,
    check_tensor,
)
from fastreg.backends import Backend, backend_for
from fastreg.kernels.view import Layout, Result, Values, allocate, layout_of
from fastreg.penalty import penalty_of
from fastreg.plans import Plans, key_of
from fastreg.prepare import (
    Reader,
    keepable,
    plain,
    problem_of,
    restored,
    restored_values,
    save,
    time_given,
    values_like,
    values_of,
)
from fastreg.problem import ARTAR, Call, Coefficient, Layer, Problem, compute_dtype, kept, time_axis
from fastreg.reference import ar_tar, ar_tar_gradients
from fastreg.torch_state import are_memory, observed
from fastreg.view import Inputs, sums_of

Upstreams: TypeAlias = Sequence[Tensor | None]  # gradients of dropped and of the penalty; either may be None

PLANS = Plans()
KEEP: Any = object()  # the plan of calls that drop nothing
BACKWARDS = 16  # of a plan that are kept: layouts of the gradient of dropped, with and without one of the penalty


@overload
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    training: bool = ...,
    mask: Tensor | None = ...,
    batch_first: bool | None = ...,
    time_dim: int | None = ...,
    lengths: Tensor | None = ...,
    valid: Tensor | None = ...,
    starts: Tensor | None = ...,
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
    batch_first: bool | None = ...,
    time_dim: int | None = ...,
    lengths: Tensor | None = ...,
    valid: Tensor | None = ...,
    starts: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, ARTAR]: ...
@overload
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    training: bool = ...,
    mask: Tensor | None = ...,
    batch_first: bool | None = ...,
    time_dim: int | None = ...,
    lengths: Tensor | None = ...,
    valid: Tensor | None = ...,
    starts: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: bool,
) -> tuple[Tensor, Tensor | ARTAR]: ...
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    training: bool = True,
    mask: Tensor | None = None,
    batch_first: bool | None = None,
    time_dim: int | None = None,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    return_terms: bool = False,
) -> tuple[Tensor, Tensor | ARTAR]:
    """Apply variational dropout to `raw`, and compute the penalty of `raw` and `dropped` in the same pass.

    Variational (locked) dropout drops a unit of a sequence at all its time steps: Gal and Ghahramani, "A
    Theoretically Grounded Application of Dropout in Recurrent Neural Networks" (2016). The mask equals that of
    fastai's `RNNDropout` for the same seed. The penalty is that of `fused_ar_tar`.

    Args:
        raw: the RNN's output: `(batch, time, hidden)`, or `(time, hidden)` for one sequence, or any tensor with
            `time_dim`; float16, bfloat16, float32 or float64, any strides.
        p: the probability to drop a unit, from 0 to below 1.
        alpha: coefficient of AR, as for `fused_ar_tar`.
        beta: coefficient of TAR, as for `fused_ar_tar`.
        training: with `False`, or with `p == 0` and no mask, nothing is dropped, and dropped is `raw` itself.
        mask: a mask to use instead of drawing one, already scaled by `1 / (1 - p)`: `(batch, 1, hidden)` (with
            `batch_first=False` `(1, batch, hidden)`), or the shape of raw; in the dtype of raw and on its device. It
            gets no gradient.
        batch_first: `False` for `(time, batch, hidden)`; `None` for `True`.
        time_dim: the axis of time, instead of batch_first, as for `fused_ar_tar`.
        lengths: the number of time steps of each padded sequence, as for `fused_ar_tar`. Padding is dropped out like
            any other step, but counts in neither term.
        valid: a mask of the time steps that count, instead of lengths, as for `fused_ar_tar`. The others are dropped
            out like any other step.
        starts: a mask of the time steps at which a segment starts, as for `fused_ar_tar`.
        reduction: `"mean"` divides AR by the number of elements and TAR by the number of changes, without padding;
            `"sum"` does not divide.
        return_terms: also return the two terms.

    Returns:
        dropped, in the shape and dtype of raw, and the penalty, 0-dim, float32, or float64 for float64 inputs. With
            `return_terms=True` an `ARTAR(penalty, ar, tar)` instead of the penalty.

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: an argument has the wrong shape, device or value; the message names it.

    Examples:
        >>> raw = torch.randn(4, 10, 16, requires_grad=True)
        >>> dropped, penalty = fused_dropout_ar_tar(raw, 0.4, alpha=2.0, beta=1.0)
        >>> (dropped.sum() + penalty).backward()

        A unit is dropped at all time steps or at none:

        >>> steps_dropped = (dropped == 0).sum(1)
        >>> bool(((steps_dropped == 0) | (steps_dropped == 10)).all())
        True
    """
    values = plain(alpha), plain(beta), plain(lengths), plain(valid), plain(starts)
    call = Call(plain(raw), None, *values, time_given(batch_first, time_dim), reduction, return_terms)
    dropped, penalty, terms = drop_and_penalize(call, p, plain(mask), training)
    return raw if dropped is None else dropped, penalty if terms is None else ARTAR(penalty, *terms)


def drop_and_penalize(
    call: Call, p: Any, mask: Any = None, training: Any = True, lent: bool = False
) -> tuple[Tensor | None, Tensor, Sequence[Tensor] | None]:
    """Apply a dropout mask to raw, and compute the penalty of one layer.

    Args:
        call: of raw; dropped is `None`.
        p: as `fused_dropout_ar_tar` takes it.
        mask: as above.
        training: as above.
        lent: whether the node of dropped keeps the penalty, for `kept_penalty`.

    Returns:
        dropped, or `None` where nothing is dropped; the penalty, (); and if terms are wanted AR and TAR, () and
        detached.

    Raises:
        TypeError, ValueError: as `fused_dropout_ar_tar`.
    """
    key = key_of(call, p, mask, training)
    plan = None if key is None else PLANS.get(key)
    if plan is None:
        problem, drops = _checked(call, p, mask, training), training and (mask is not None or p != 0)
        if key is None:
            if drops:
                return _by_formula(call, problem, _mask_for(call.raw, p, mask, problem))
            return _penalize(call)
        plan = _Plan(call, problem, mask) if drops else KEEP
        PLANS.keep(key, plan)
    return _penalize(call) if plan is KEEP else plan(call, p, mask, lent)


def _penalize(call: Call) -> tuple[None, Tensor, Sequence[Tensor] | None]:
    """Compute the penalty where nothing is dropped."""
    computed = penalty_of(kept(call))
    return None, computed.penalty, computed.terms


def _checked(call: Call, p: Any, mask: Any, training: Any) -> Problem:
    """Check the arguments, and return the problem."""
    check_options(call, training=training, return_terms=call.measured)
    check_probability(p)
    check_steps(call.lengths, call.valid, call.starts)
    problem = problem_of(call)
    raw = check_tensor("raw", call.raw)
    check_layer(call, problem, ("raw", raw))
    if mask is not None:
        check_mask(mask, raw, problem)
    return problem


def _by_formula(call: Call, problem: Problem, mask: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor] | None]:
    """Apply the mask and compute the penalty in plain PyTorch."""
    dropped = call.raw * mask
    penalty, ar, tar = ar_tar(Layer(call.raw, dropped, values_of(call, problem, call.raw)), problem)
    return dropped, penalty, (ar.detach(), tar.detach()) if problem.measured else None


def _mask_for(raw: Any, p: float, mask: Tensor | None, problem: Problem) -> Tensor:
    """Return a mask expanded to the shape of raw: the given one, or one drawn as fastai's `RNNDropout` draws it.

    A drawn mask has one row for all time steps.
    """
    if mask is not None:
        return keepable(mask).expand_as(raw)
    shape = list(raw.shape)
    shape[time_axis(raw, problem)] = 1
    return raw.new_empty(shape).bernoulli_(1 - p).div_(1 - p).expand_as(raw)


class _Plan:
    """How to drop units and compute the penalty for calls of one key: by kernels, or by the formula."""

    def __init__(self, call: Call, problem: Problem, mask: Tensor | None) -> None:
        self.problem, self.backend = problem, None if 0 in call.raw.shape else backend_for(call.raw.device)
        if self.backend is None:
            return
        raw = call.raw
        layer = Layer(raw, None, values_like(call, problem))
        self.read = Reader(call, problem, self.backend.steps, raw)
        self.is_differentiable = torch.is_grad_enabled() and raw.requires_grad
        if mask is None:
            drawn = _mask_for(torch.empty(raw.shape, device="meta"), 0.5, None, problem)
            masked = Layout(raw.shape, drawn.stride(), raw.dtype, raw.device, aligned=True)
        else:
            masked = layout_of(mask.expand_as(raw))
        self.inputs = Inputs((layout_of(raw), masked, None), layer, problem)
        self.dropped = self.inputs.fold.like(layout_of(raw))
        view = self.inputs.view((self.dropped, None, None), layer.values)
        self.forward = self.backend.forward(view, sums_of(layer, problem, compute_dtype(raw)), raw.device)
        self.backward: dict[Any, Backward] = {}

    def __call__(
        self, call: Call, p: float, mask: Tensor | None, lent: bool
    ) -> tuple[Tensor, Tensor, Sequence[Tensor] | None]:
        """Return dropped; the penalty, (); and if terms are wanted AR and TAR, () and detached."""
        mask = _mask_for(call.raw, float(p), mask, self.problem)
        if self.backend is None:
            return _by_formula(call, self.problem, mask)
        values = self.read(call, call.raw)
        if self.is_differentiable:
            dropped, penalty, *terms = _apply(self, values, mask, call.raw, lent)
            return dropped, penalty, terms[0].unbind() if terms else None
        dropped, (penalty, terms, _) = self.compute(call.raw, mask, values)
        return dropped, penalty, None if terms is None else terms.unbind()

    def compute(self, raw: Tensor, mask: Tensor, values: Values) -> tuple[Tensor, Result]:
        """Launch the forward; return dropped and the penalty."""
        dropped = allocate(self.dropped)
        return dropped, self.forward((*self.inputs.read((raw, mask, None)), dropped, None, None), values)

    def gradient(self, upstream: Upstreams, layer: Layer, mask: Tensor, problem: Problem) -> Tensor:
        """Launch the backward, for the gradients of dropped and of the penalty that there are."""
        raw, (grad_dropped, grad) = layer.given(), upstream
        layouts = layout_of(raw), layout_of(mask), None if grad_dropped is None else layout_of(grad_dropped)
        key = *layouts, problem, grad is None
        backward = self.backward.get(key)
        if backward is None:  # one for each layout of the gradient of dropped, and of tensors that a hook has changed
            backend: Any = self.backend
            backward = plan_backward(backend, layouts, layer, problem, grad is not None)
            if len(self.backward) < BACKWARDS:
                self.backward[key] = backward
        return launch_backward(backward, upstream, layer, mask)


class Backward(NamedTuple):
    """The layout of the gradient of raw, the tensors that it is computed from, and the launch of a backend."""

    gradient: Layout
    inputs: Inputs
    launch: Any


def plan_backward(
    backend: Backend, layouts: Sequence[Layout | None], layer: Layer, problem: Problem, is_penalized: bool
) -> Backward:
    """Plan a `backward` of a backend.

    Args:
        backend: that of the forward, as another may be in use by now.
        layouts: of raw, of the mask, and of the gradient of dropped, which arrives at raw where there is no mask.
        layer: of raw.
        problem: the terms.
        is_penalized: whether the penalty has an upstream gradient.
    """
    raw, inputs = layer.given(), Inputs((*layouts, None), layer, problem)
    gradient = inputs.fold.like(layout_of(raw))
    view = inputs.view((gradient, None), layer.values)
    sums = sums_of(layer, problem.penalized(), compute_dtype(raw))
    sums = sums if is_penalized else sums._replace(ar=False, tar=False)
    return Backward(gradient, inputs, backend.backward(view, sums, raw.device))


def launch_backward(backward: Backward, upstream: Upstreams, layer: Layer, mask: Tensor | None = None) -> Tensor:
    """Allocate the gradient of raw, and launch the backward."""
    grad_dropped, grad = upstream
    gradient, tensors = allocate(backward.gradient), backward.inputs.read((layer.raw, mask, grad_dropped, None))
    backward.launch(grad, (*tensors, gradient, None), layer.values)
    return gradient


def carries(dropped: Tensor) -> bool:
    """Return whether a tensor has the node of a fused dropout that keeps its penalty."""
    return getattr(dropped.grad_fn, "lent", False)


def kept_penalty(node: Any) -> Tensor:
    """Return the penalty that the node of a fused dropout keeps, with its graph."""
    return node.saved_tensors[2]


class _DropoutPenalty(Function):
    """Keep references to raw, to the mask, and to the values that the call reads.

    With `lent` the node keeps the penalty, too: a regularizer that finds the node finds its penalty.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, values: Values, mask: Tensor, raw: Tensor, lent: bool) -> Any:
        dropped, (penalty, terms, _) = plan.compute(raw, mask, values)
        save(ctx, (raw, mask, penalty if lent else None), values)
        ctx.plan, ctx.lent = plan, lent
        ctx.set_materialize_grads(False)  # an output without a gradient costs no zeros
        if terms is None:
            return dropped, penalty
        ctx.mark_non_differentiable(terms)
        return dropped, penalty, terms

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_dropped: Tensor | None, grad: Tensor | None, *_: None
    ) -> Any:
        (raw, mask, _, *saved), plan = ctx.saved_tensors, ctx.plan
        values, problem = restored_values(saved, ctx.dtypes), plan.problem
        raw, mask = map(restored, ("raw", "mask"), (raw, mask), plan.inputs.layouts[:2])
        layer, upstream = Layer(raw, None, values), (grad_dropped, grad)
        if grad_dropped is None and grad is None:
            gradient = None
        elif torch.is_grad_enabled() or observed() or not are_memory((raw, mask, *values, *upstream)):
            gradient = _gradient_formula(upstream, layer, mask, problem.penalized())  # which PyTorch must see
        else:
            gradient = plan.gradient(upstream, layer, mask, problem)
        return None, None, None, gradient, None


# `Function.apply` without the part for transforms of torch.func, under which no plan is used: 3 us less.
_apply: Any = super(Function, _DropoutPenalty).apply  # pyright: ignore[reportAttributeAccessIssue]


def _gradient_formula(
    upstream: tuple[Tensor | None, Tensor | None], layer: Layer, mask: Tensor, problem: Problem
) -> Tensor:
    """Compute the gradient of raw in plain PyTorch, itself differentiable in both upstream gradients and in raw.

    Args:
        upstream: gradients of dropped and of the penalty; one may be `None`.
        layer: raw, which steps count, and coefficients.
        mask: of the shape of raw.
        problem: the problem of the forward.
    """
    grad_dropped, grad = upstream
    raw, through_mask, direct = layer.given(), grad_dropped, None
    if grad is not None:
        direct, ar = ar_tar_gradients(grad, Layer(raw, raw * mask, layer.values), problem)
        through_mask = _sum(through_mask, ar)
    gradient = _sum(None if through_mask is None else through_mask * mask, direct)
    return torch.zeros_like(raw) if gradient is None else gradient.to(raw.dtype)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """Add two tensors; `None` is 0."""
    return x if y is None else y if x is None else x + y
