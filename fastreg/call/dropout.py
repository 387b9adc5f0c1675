"""`fused_dropout_ar_tar`: from the arguments to the launch, and back to the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.call.arguments import check_flags, check_probability, check_tensor
from fastreg.call.fold import Fold
from fastreg.call.operation import compute, facts_of_saved, save, unpack
from fastreg.call.penalty import by_formula, penalize
from fastreg.call.plans import Plan
from fastreg.call.problem import ARTAR, Call, Coefficient, Options
from fastreg.call.reference import added, ar_tar_gradients
from fastreg.call.torch_state import keepable, plain
from fastreg.kernels.view import Terms, Values, allocator, layout_of

Upstreams: TypeAlias = Sequence[Tensor | None]  # the gradients of dropped and of the penalty; each may be None

BACKWARDS = 16  # backwards that a plan keeps: for layouts of dropped's gradient, with and without the penalty's


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
    Theoretically Grounded Application of Dropout in Recurrent Neural Networks" (2016). fastai's `RNNDropout` draws the
    same mask from the same seed. `fused_ar_tar` describes the penalty.

    Args:
        raw: the RNN's output: `(batch, time, hidden)`, or any tensor with `time_dim`, which is 0 for one sequence,
            `(time, hidden)`. The dtype is float16, bfloat16, float32 or float64; strides are arbitrary.
        p: the probability to drop a unit, from 0 to below 1.
        alpha: coefficient of AR, as for `fused_ar_tar`.
        beta: coefficient of TAR, as for `fused_ar_tar`.
        training: if `False`, nothing is dropped, and dropped is `raw` itself; the same holds for `p == 0` without a
            mask.
        mask: a mask to use instead of drawing one, already scaled by `1 / (1 - p)`. Its shape is `(batch, 1, hidden)`
            (`(1, batch, hidden)` with `batch_first=False`), or the shape of raw; it has raw's dtype and device. It gets
            no gradient.
        batch_first: `False` for `(time, batch, hidden)`; `None` for `True`.
        time_dim: the axis of time, instead of batch_first, as for `fused_ar_tar`.
        lengths: the number of time steps of each padded sequence, as for `fused_ar_tar`. Dropout applies to padding as
            to any other step, but padding counts in neither term.
        valid: a mask of the time steps that count, instead of lengths, as for `fused_ar_tar`. Dropout applies
            to all other steps, too.
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
    return drop_and_penalize(raw, (alpha, beta), steps, options, Drop(p, mask, training))


class Drop(NamedTuple):
    """Say how units are dropped.

    p, mask, training  as for `fused_dropout_ar_tar`
    """

    p: Any
    mask: Any = None
    training: bool = True


def drop_and_penalize(
    raw: Any, coefficients: Sequence[Any], steps: Sequence[Any], options: Options, drop: Drop
) -> tuple[Tensor, Any]:
    """Apply a dropout mask to raw, and compute the penalty of one layer.

    Args:
        raw: as `fused_dropout_ar_tar` takes it.
        coefficients: alpha and beta.
        steps: lengths, valid steps and starts.
        options: the other arguments of the penalty.
        drop: the arguments of the dropout.

    Returns:
        dropped, or raw itself if nothing is dropped; and the penalty, or an `ARTAR` if the caller wants the terms.

    Raises:
        TypeError, ValueError: as `fused_dropout_ar_tar`.
    """
    p, mask, training = drop
    if type(p) is not float or not 0 <= p < 1:
        check_probability(p)
    if not isinstance(raw, Tensor):
        check_tensor("raw", raw)
    if not training or (mask is None and p == 0):
        return raw, penalize((raw, raw), coefficients, steps, options._replace(ar_of_raw=True))
    if mask is not None:  # before the key: a copy may have other metadata
        mask = keepable(plain(check_tensor("mask", mask)))
    return compute(DropoutPlan, (raw, float(p) if mask is None else mask), coefficients, steps, options)


class DropoutPlan(Plan):
    """Drop units of one layer, and compute its penalty and the gradient of raw.

    Args:
        checked: the plan by the formula.
        backend: the code that runs.
        _: whether the forward may fill gradients; this operation never does.
        tensors: raw and the mask of the first call.
        values: coefficients and the steps that count, of the first call.

    Attributes:
        drops: whether the operation applies a mask to raw.
        is_differentiable: whether raw needs a gradient.
        fold: the fold of raw and of the mask.
        dropped: a function that allocates dropped.
        forward: the forward of the backend.
        backwards: a fold, an allocator and a backward of the backend for each kind of upstream gradients.
        names, facts: the names and the facts of the tensors that a node saves.
    """

    drops, names = True, ("raw", "mask")

    def __init__(self, checked: Plan, backend: Any, _: bool, tensors: Sequence[Any], values: Values) -> None:
        super().__init__(checked.terms, checked.steps_of, checked.row)
        (raw, mask), (terms,), self.backend, self.backwards = tensors, self.terms, backend, {}
        self.is_differentiable = torch.is_grad_enabled() and raw.requires_grad
        self.operands = layout_of(raw), layout_of(mask.expand_as(raw))
        self.fold = Fold((*self.operands, None), terms.time_dim, values.steps)
        layout = self.fold.like(self.operands[0])
        self.dropped = allocator(layout, self.operands[0])
        self.forward = backend.forward(self.fold.view((layout, None, None)), terms, raw.device)
        self.facts = facts_of_saved(tensors, values)

    @staticmethod
    def tensors_of(raw: Any, mask: Any, plan: Plan) -> Sequence[Any]:
        """Return raw and the mask; a mask that is drawn is drawn as by fastai's `RNNDropout`.

        Args:
            raw: raw of the call.
            mask: the mask, or the probability to drop a unit.
            plan: the plan of the call.
        """
        raw = plain(raw)
        return raw, mask if isinstance(mask, Tensor) else raw.new_empty(plan.row).bernoulli_(1 - mask).div_(1 - mask)

    @staticmethod
    def formula(tensors: Sequence[Any], values: Values, terms: Sequence[Terms]) -> Any:
        """Compute dropped, and the penalty, or an `ARTAR` if the caller wants the terms, in plain PyTorch."""
        raw, mask = tensors
        dropped = raw * mask
        return dropped, by_formula([Call(raw, dropped, *values, terms[0])])

    def __call__(self, tensors: Sequence[Any], values: Values) -> Any:
        """Compute dropped, and the penalty, or an `ARTAR` if the caller wants the terms."""
        run = _apply if self.is_differentiable else DropoutPlan.launch
        dropped, penalty, terms = run(self, values, *tensors)
        return dropped, penalty if terms is None else ARTAR(penalty, *terms.unbind())

    def launch(self, values: Values, raw: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Launch the forward; return dropped, the penalty, and its terms."""
        dropped = self.dropped(raw)
        operands = *self.fold.readable((raw, mask, None)), dropped, None, None
        sums = self.forward(operands, values)
        return dropped, sums.penalty, sums.terms

    def gradient(self, upstream: Upstreams, raw: Tensor, mask: Tensor, values: Values) -> Tensor:
        """Launch the backward for the gradients of dropped and of the penalty that arrive."""
        arrived, grad = upstream
        key = None if arrived is None else (arrived.stride(), arrived.data_ptr() % 16 == 0), grad is None
        found = self.backwards.get(key)
        if found is None:
            (terms,) = self.terms
            if grad is None:
                terms = terms._replace(by_ar=False, by_tar=False)
            fold = Fold((*self.operands, layout_of(arrived), None), terms.time_dim, values.steps)
            layout = fold.like(self.operands[0])
            launch = self.backend.backward(fold.view((layout, None)), terms, raw.device)
            found = fold, allocator(layout, self.operands[0]), launch
            if len(self.backwards) < BACKWARDS:
                self.backwards[key] = found
        fold, allocate, launch = found
        gradient = allocate(raw)
        launch(grad, (*fold.readable((raw, mask, arrived, None)), gradient, None), values)
        return gradient


class _DropoutPenalty(Function):
    """Compute dropped and the penalty, and keep raw, the mask, and the values of the call."""

    @staticmethod
    def forward(ctx: Any, plan: DropoutPlan, values: Values, raw: Tensor, mask: Tensor) -> Any:
        results = plan.launch(values, raw, mask)
        save(ctx, plan, (raw, mask), values)
        ctx.set_materialize_grads(False)  # PyTorch need not make zeros for an output without a gradient
        if results[2] is not None:
            ctx.mark_non_differentiable(results[2])
        return results

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_dropped: Tensor | None, grad: Tensor | None, *_: None
    ) -> Any:
        upstream, gradient = (grad_dropped, grad), None
        if grad_dropped is not None or grad is not None:
            saved, values, is_seen = unpack(ctx, grad_dropped, grad)
            gradient_of = _gradient_formula if is_seen else DropoutPlan.gradient
            gradient = gradient_of(ctx.plan, upstream, saved[0], saved[1], values)
        return None, None, gradient, None


# `Function.apply` without its part for transforms of torch.func, under which no plan is used. This saves 3 us.
_apply: Any = super(Function, _DropoutPenalty).apply  # pyright: ignore[reportAttributeAccessIssue]


def _gradient_formula(plan: DropoutPlan, upstream: Upstreams, raw: Tensor, mask: Tensor, values: Values) -> Tensor:
    """Compute the gradient of raw in plain PyTorch, itself differentiable in both upstream gradients and in raw.

    Args:
        plan: the plan of the forward.
        upstream: the gradients of dropped and of the penalty; one may be `None`.
        raw: raw of the forward.
        mask: the mask of the forward.
        values: the values of the forward.
    """
    through_mask, grad = upstream
    direct = None
    if grad is not None:
        direct, ar = ar_tar_gradients(grad, Call(raw, raw * mask, *values, plan.terms[0]))
        through_mask = added(through_mask, ar)
    if through_mask is not None:
        through_mask = through_mask.to(plan.terms[0].dtype) * mask  # rounded once, as by the kernels
    gradient = added(through_mask, direct)
    return torch.zeros_like(raw) if gradient is None else gradient.to(raw.dtype)
