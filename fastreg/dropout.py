"""`fused_dropout_ar_tar`: from the arguments to the launch, and back to the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.arguments import check_flags, check_probability
from fastreg.kernels.view import Layout, Terms, allocate, layout_of
from fastreg.operation import Plan, keep, restored, unpack
from fastreg.penalty import penalty_of
from fastreg.prepare import Options, Pair, call_of_raw
from fastreg.problem import ARTAR, Call, Coefficient, terms_of
from fastreg.reference import added, ar_tar, ar_tar_gradients
from fastreg.torch_state import are_memory, keepable, observed, plain
from fastreg.view import Fold

Upstreams: TypeAlias = Sequence[Tensor | None]  # gradients of dropped and of the penalty; either may be None

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
    if training is not True:
        check_flags(training=training)
    steps, options = (lengths, valid, starts), Options(batch_first, time_dim, reduction, return_terms)
    kept, penalty, terms = drop_and_penalize(raw, (alpha, beta), steps, options, Drop(p, mask, training))
    return raw if kept is None else kept, penalty if terms is None else ARTAR(penalty, *terms)


class Drop(NamedTuple):
    """How units are dropped.

    p, mask, training  as `fused_dropout_ar_tar` takes them
    """

    p: Any
    mask: Any = None
    training: bool = True


def drop_and_penalize(
    raw: Any, coefficients: Pair, steps: Sequence[Any], options: Options, drop: Drop
) -> tuple[Tensor | None, Tensor, Sequence[Tensor] | None]:
    """Apply a dropout mask to raw, and compute the penalty of one layer.

    Args:
        raw: as `fused_dropout_ar_tar` takes it.
        coefficients: alpha and beta.
        steps: lengths, valid steps and starts.
        options: the other arguments of the penalty.
        drop: those of the dropout.

    Returns:
        dropped, or `None` where nothing is dropped; the penalty, (); and if terms are wanted AR and TAR, () and
        detached.

    Raises:
        TypeError, ValueError: as `fused_dropout_ar_tar`.
    """
    p, mask, training = drop
    if type(p) is not float or not 0 <= p < 1:
        check_probability(p)
    drops = training and (mask is not None or p != 0)
    if not drops:
        batch_first, time_dim, reduction, measured, _, fills = options
        options = Options(batch_first, time_dim, reduction, measured, True, fills)
    if isinstance(mask, Tensor):
        mask = keepable(plain(mask))  # before its metadata are looked at: a copy may lie otherwise
    call = call_of_raw(raw, mask, coefficients, steps, options)
    if not drops:
        return None, *penalty_of([call])
    plan = DropoutPlan.of(call, mask)
    mask = _mask_for(call.raw, float(p), mask, call.kind.time_dim)
    if plan is None or plan.backend is None:
        return _by_formula(call, mask)
    saves = plan.is_differentiable
    dropped, penalty, terms = _apply(plan, call, call.raw, mask) if saves else plan.compute(call, mask)
    return dropped, penalty, None if terms is None else terms.unbind()


def _by_formula(call: Call, mask: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor] | None]:
    """Apply the mask and compute the penalty in plain PyTorch."""
    dropped = call.raw * mask
    penalty, ar, tar = ar_tar(call.of(call.raw, dropped))
    return dropped, penalty, (ar.detach(), tar.detach()) if call.kind.measured else None


def _mask_for(raw: Any, p: float, mask: Tensor | None, time_dim: int) -> Tensor:
    """Return a mask expanded to the shape of raw: the given one, or one drawn as fastai's `RNNDropout` draws it.

    A drawn mask has one row for all time steps.
    """
    if mask is not None:
        return mask.expand_as(raw)
    shape = list(raw.shape)
    shape[time_dim] = 1
    return raw.new_empty(shape).bernoulli_(1 - p).div_(1 - p).expand_as(raw)


class DropoutPlan(Plan):
    """How to drop units and compute the penalty of one layer, and the gradient of raw.

    Attributes:
        is_differentiable: whether raw needs a gradient.
        layouts: of raw and of the mask.
        fold: their view.
        dropped: layout of dropped.
        forward: of the backend.
        backward: of each kind of upstream gradients.
    """

    def prepare(self, call: Call, mask: Tensor | None) -> None:
        """Plan the forward."""
        raw = call.raw
        self.is_differentiable = torch.is_grad_enabled() and raw.requires_grad
        if mask is None:
            drawn = _mask_for(torch.empty(raw.shape, device="meta"), 0.5, None, call.kind.time_dim)
            masked = Layout(raw.shape, drawn.stride(), raw.dtype, raw.device, aligned=True)
        else:
            masked = layout_of(mask.expand_as(raw))
        self.layouts = [layout_of(raw), masked]
        self.fold = Fold((*self.layouts, None), call)
        self.dropped = self.fold.like(self.layouts[0])
        self.forward = self.backend.forward(self.fold.view((self.dropped, None, None)), self.terms, self.device)
        self.backward: dict[Any, Adding] = {}

    def compute(self, call: Call, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Launch the forward; return dropped, the penalty, and its terms."""
        dropped = allocate(self.dropped)
        tensors = (*self.fold.read((call.raw, mask, None)), dropped, None, None)
        penalty, terms, _ = self.forward(tensors, call.alpha, call.beta, call.steps)
        return dropped, penalty, terms

    def gradient(self, upstream: Upstreams, call: Call, mask: Tensor) -> Tensor:
        """Launch the backward, for the gradients of dropped and of the penalty that there are."""
        raw, mask = map(restored, ("raw", "mask"), (call.raw, mask), self.layouts)  # pyright: ignore
        arrived, grad = upstream
        layout = None if arrived is None else layout_of(arrived)
        key = layout, grad is None
        backward = self.backward.get(key)
        if backward is None:
            terms = terms_of(call)
            terms = terms if grad is not None else terms._replace(by_ar=False, by_tar=False)
            backward = Adding(self.backend, (*self.layouts, layout), call, terms)
            if len(self.backward) < BACKWARDS:
                self.backward[key] = backward
        return backward(grad, (raw, mask, arrived), call)


class Adding:
    """Compute a gradient of raw: the penalty's, added to the one that arrives at dropped, or at raw without a mask.

    Args:
        backend: that of the forward, as another may be in use by now.
        layouts: of raw, of the mask, and of the gradient that arrives.
        call: of raw.
        terms: those that have a gradient.
    """

    def __init__(self, backend: Any, layouts: Sequence[Layout | None], call: Call, terms: Terms) -> None:
        self.fold = Fold((*layouts, None), call)
        self.gradient = self.fold.like(layouts[0])  # pyright: ignore[reportArgumentType]
        self.launch = backend.backward(self.fold.view((self.gradient, None)), terms, call.raw.device)

    def __call__(self, upstream: Tensor | None, tensors: Sequence[Tensor | None], call: Call) -> Tensor:
        """Allocate the gradient of raw, and launch the backward."""
        gradient = allocate(self.gradient)
        operands = (*self.fold.read((*tensors, None)), gradient, None)
        self.launch(upstream, operands, call.alpha, call.beta, call.steps)
        return gradient


class _DropoutPenalty(Function):
    """Keep references to raw, to the mask, and to the values that the call reads."""

    @staticmethod
    def forward(ctx: Any, plan: DropoutPlan, call: Call, raw: Tensor, mask: Tensor) -> Any:
        dropped, penalty, terms = plan.compute(call, mask)
        keep(ctx, (raw, mask), call)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # an output without a gradient costs no zeros
        if terms is not None:
            ctx.mark_non_differentiable(terms)
        return dropped, penalty, terms

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_dropped: Tensor | None, grad: Tensor | None, *_: None
    ) -> Any:
        (raw, mask, *saved), plan = ctx.saved_tensors, ctx.plan
        call, upstream, gradient = Call(raw, None, *unpack(saved, ctx.rest), plan.kind), (grad_dropped, grad), None
        if grad_dropped is not None or grad is not None:
            tensors = raw, mask, call.alpha, call.beta, *saved, *upstream
            given = [x for x in tensors if isinstance(x, Tensor)]
            if torch.is_grad_enabled() or observed() or not are_memory(given):
                gradient = _gradient_formula(upstream, call, mask)  # which PyTorch must see
            else:
                gradient = plan.gradient(upstream, call, mask)
        return None, None, gradient, None


# `Function.apply` without the part for transforms of torch.func, under which no plan is used: 3 us less.
_apply: Any = super(Function, _DropoutPenalty).apply  # pyright: ignore[reportAttributeAccessIssue]


def _gradient_formula(upstream: Upstreams, call: Call, mask: Tensor) -> Tensor:
    """Compute the gradient of raw in plain PyTorch, itself differentiable in both upstream gradients and in raw.

    Args:
        upstream: gradients of dropped and of the penalty; one may be `None`.
        call: of raw.
        mask: of the shape of raw.
    """
    grad_dropped, grad = upstream
    raw, through_mask, direct = call.raw, grad_dropped, None
    if grad is not None:
        direct, ar = ar_tar_gradients(grad, call.of(raw, raw * mask))
        through_mask = added(through_mask, ar)
    gradient = added(None if through_mask is None else through_mask * mask, direct)
    return torch.zeros_like(raw) if gradient is None else gradient.to(raw.dtype)
