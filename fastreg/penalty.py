"""`fused_ar_tar`: from the arguments to the launch, and back to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from fastreg.kernels.view import allocate, layout_of
from fastreg.operation import Plan, keep, restored, unpack
from fastreg.prepare import Options, Pair, calls_of, rows_of_layers
from fastreg.problem import ARTAR, Call, Coefficient, compute_dtype
from fastreg.reference import ar_tar, ar_tar_gradients
from fastreg.torch_state import are_memory, observed
from fastreg.view import Fold

One: TypeAlias = Tensor | PackedSequence
Activations: TypeAlias = One | list[Tensor] | list[PackedSequence] | tuple[One, ...] | None


@overload
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    batch_first: bool | None = ...,
    time_dim: int | None = ...,
    lengths: Tensor | None = ...,
    valid: Tensor | None = ...,
    starts: Tensor | None = ...,
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
    batch_first: bool | None = ...,
    time_dim: int | None = ...,
    lengths: Tensor | None = ...,
    valid: Tensor | None = ...,
    starts: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[True],
) -> ARTAR: ...
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    batch_first: bool | None = None,
    time_dim: int | None = None,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    return_terms: bool = False,
) -> Tensor | ARTAR:
    """Compute activation and temporal activation regularization, to be added to the loss.

    The penalty is `alpha * AR + beta * TAR`, with `AR = mean(dropped ** 2)` and
    `TAR = mean((raw[t + 1] - raw[t]) ** 2)`, after Merity, McCann and Socher, "Revisiting Activation Regularization for
    Language RNNs" (2017). Differences, squares and sums are formed in float32, or in float64 where an input is float64.
    A single time step has a TAR of 0, and an empty tensor a penalty of 0. The penalty can be differentiated any number
    of times.

    Args:
        raw: the RNN's output before dropout: `(batch, time, hidden)`, `(time, hidden)` for one sequence, any tensor
            with `time_dim`, a `PackedSequence`, or a list or tuple with one for each layer, whose penalties add up; all
            layers have the same batch and time steps. float16, bfloat16, float32 or float64, any strides. With
            `beta == 0` it is not read and may be `None`; with `return_terms=True` it is measured if it is given.
        dropped: the RNN's output after dropout: the shape of raw, or packed as raw is, on the same device. Its dtype
            may differ, and it may be `raw` itself. With `alpha == 0` it is not read and may be `None`.
        alpha: coefficient of AR, finite and not negative: a number, or a 0-dim tensor on the device of the
            activations. A tensor is read on the device, without a sync, and gets no gradient. A schedule may change it
            in place before each forward, also between replays of a CUDA graph.
        beta: coefficient of TAR, as for alpha.
        batch_first: `False` for `(time, batch, hidden)`; `None` for `True`.
        time_dim: the axis of time, instead of batch_first, of tensors of one or more axes, negative from the end: 2 for
            `(batch, channels, time, height, width)`. The batch is the first of the other axes; two axes with
            `time_dim=0` are `(time, hidden)`.
        lengths: the number of time steps of each padded sequence: integers, `(batch,)`. Padding counts in neither sums
            nor divisors, and its gradient is 0. On the CPU lengths outside of 0 to the number of time steps are an
            error; on other devices they are clamped, because a check would wait for the device.
        valid: a mask of the time steps that count, instead of lengths: `(batch, time)` in every layout, bool or
            integers 0 and 1, such as an `attention_mask`. A change counts where both of its steps do. Other steps count
            in neither sums nor divisors, and their gradient is 0. On the CPU other integers are an error; on other
            devices they count as 1.
        starts: a mask of the time steps at which a segment starts, such as an episode, or a document in a stream:
            `(batch, time)` in every layout, like valid, and beside lengths or valid. The change into such a step does
            not count; the step itself does, in AR and in the change that follows. It goes with no `PackedSequence`.
        reduction: `"mean"` divides AR by the number of elements and TAR by the number of changes, without padding;
            `"sum"` does not divide.
        return_terms: also return the two terms.

    Returns:
        The penalty, a 0-dim tensor, float32, or float64 for float64 inputs. With `return_terms=True` an
            `ARTAR(penalty, ar, tar)`, whose `ar` and `tar` are unscaled and detached. A term whose coefficient is 0 is
            measured, too; it is 0 where its activations are `None`.

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: an argument has the wrong shape, device or value; the message names it.

    Examples:
        >>> rnn = torch.nn.LSTM(8, 16, batch_first=True)
        >>> raw, _ = rnn(torch.randn(4, 10, 8))
        >>> dropped = torch.nn.functional.dropout(raw, 0.4)
        >>> fused_ar_tar(raw, dropped, alpha=2.0, beta=1.0).backward()

        Leave the padding out:

        >>> lengths = torch.tensor([10, 7, 3, 1])
        >>> terms = fused_ar_tar(raw.detach(), dropped.detach(), 2.0, 1.0, lengths=lengths, return_terms=True)
        >>> torch.testing.assert_close(terms.penalty, 2.0 * terms.ar + terms.tar)
    """
    options = Options(batch_first, time_dim, reduction, return_terms)
    return penalize((raw, dropped), (alpha, beta), (lengths, valid, starts), options)


def penalize(activations: Pair, coefficients: Pair, steps: Sequence[Any], options: Options) -> Any:
    """Compute the penalty of activations, with its terms if they are wanted.

    Args:
        activations: raw and dropped, as `fused_ar_tar` takes them.
        coefficients: alpha and beta.
        steps: lengths, valid steps and starts.
        options: the other arguments.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    calls = calls_of(activations, coefficients, steps, options)
    if not calls:
        return _zero(*activations, options.measured)
    penalty, terms = penalty_of(calls)
    return penalty if terms is None else ARTAR(penalty, *terms)


def _zero(raw: Any, dropped: Any, measured: bool) -> Tensor | ARTAR:
    """Return 0 where the activations are, if any were given at all: both terms are off."""
    tensors = [x for x in (*rows_of_layers(raw), *rows_of_layers(dropped)) if isinstance(x, Tensor)]
    zero = torch.zeros((), dtype=compute_dtype(tensors), device=tensors[0].device if tensors else None)
    return ARTAR(zero, zero.clone(), zero.clone()) if measured else zero


def penalty_of(calls: Sequence[Call]) -> tuple[Tensor, Sequence[Tensor] | None]:
    """Compute the penalty of the layers of a call, and AR and TAR, detached, if they are wanted; all 0-dim.

    A tensor that requires no gradient is summed and nothing else: `fastreg.addition` adds the gradient of
    the penalty of detached tensors.
    """
    plans: list[PenaltyPlan] = []
    tensors: list[Tensor | None] = []
    needs: list[bool] = []
    for call in calls:
        plan = PenaltyPlan.of(call)
        if plan is None or plan.backend is None:
            return by_formula(calls)
        plans.append(plan)
        tensors += call.raw, call.dropped
        needs += plan.needs
    if True in needs:
        results = _apply(plans, calls, needs, *tensors)
        penalty, terms = results if calls[0].kind.measured else (results, None)  # an output more costs 3 us
    else:
        penalty, terms, _ = _launched(plans, calls)
    return penalty, None if terms is None else terms.unbind()


def by_formula(calls: Sequence[Call]) -> tuple[Tensor, Sequence[Tensor] | None]:
    """Compute the penalty in plain PyTorch, and its terms if they are wanted."""
    penalty, ar, tar = reduce(lambda x, y: ARTAR(*map(torch.add, x, y)), map(ar_tar, calls))
    return penalty, (ar.detach(), tar.detach()) if calls[0].kind.measured else None


def _launched(plans: Sequence[PenaltyPlan], calls: Sequence[Call]) -> tuple[Tensor, Tensor | None, list[Any]]:
    """Launch the forward of each layer; return the sums, and each assumption with the gradients filled under it."""
    penalty, terms, *ahead = plans[0].compute(calls[0])
    aheads = [ahead]
    for plan, call in zip(plans[1:], calls[1:], strict=True):
        more, its_terms, *ahead = plan.compute(call)
        penalty, terms = penalty + more, None if terms is None or its_terms is None else terms + its_terms
        aheads.append(ahead)
    return penalty, terms, aheads


class PenaltyPlan(Plan):
    """How to compute the penalty of one layer, and its gradients.

    Attributes:
        needs: whether raw and dropped need gradients: a term that is only measured has none.
        fold: the view of raw and dropped.
        gradients: layouts of their gradients.
        filled: layouts of the gradients that the forward fills for the backward.
        forward, backward: of the backend; the first backward makes the latter.
    """

    def prepare(self, call: Call, mask: Tensor | None) -> None:
        """Plan the forward."""
        raw, dropped, terms, enabled = call.raw, call.dropped, self.terms, torch.is_grad_enabled()
        by_raw = terms.by_tar or (terms.by_ar and terms.ar_of_raw)
        by_dropped = terms.by_ar and not terms.ar_of_raw
        self.needs = enabled and by_raw and raw.requires_grad, enabled and by_dropped and dropped.requires_grad
        self.layouts = [None if x is None else layout_of(x) for x in (raw, dropped)]
        self.fold = Fold((self.layouts[0], None, None, self.layouts[1]), call)
        pairs = zip(self.layouts, self.needs, strict=True)
        self.gradients = [self.fold.like(x) if need else None for x, need in pairs]  # pyright: ignore
        self.filled = self.gradients if call.kind.fills else [None, None]
        self.forward = self.backend.forward(self.fold.view(self.filled), terms, self.device)
        self.backward: Any = None

    def compute(self, call: Call) -> tuple[Any, ...]:
        """Launch the forward; return the penalty, its terms, the assumption, and the gradients that it filled."""
        first, second = self.filled
        filled = None if first is None else allocate(first), None if second is None else allocate(second)
        tensors = (*self.fold.read((call.raw, None, None, call.dropped)), *filled)
        return *self.forward(tensors, call.alpha, call.beta, call.steps), filled

    def gradients_of(self, grad: Tensor, call: Call, assumed: Any, filled: Any) -> Sequence[Tensor | None]:
        """Launch the backward for gradients that the forward has filled, or for new memory without an assumption."""
        raw, dropped = map(restored, ("raw", "dropped"), (call.raw, call.dropped), self.layouts)
        if self.backward is None:
            view, expected = self.fold.view(self.gradients), self.forward.expected
            self.backward = self.backend.backward(view, self.terms, self.device, expected)
        if assumed is None:
            filled = [None if x is None else allocate(x) for x in self.gradients]
        elif True in self.fold.copied and self.backward.holds(grad, assumed):
            return filled  # before anything is copied
        tensors = (*self.fold.read((raw, None, None, dropped)), *filled)
        self.backward(grad, tensors, call.alpha, call.beta, call.steps, assumed)
        return filled


class _Penalty(Function):
    """Keep references to the inputs that need gradients, and the gradients that the forward has filled.

    Filled gradients belong to the first backward; a second one computes gradients anew.
    """

    @staticmethod
    def forward(
        ctx: Any, plans: Sequence[PenaltyPlan], calls: Sequence[Call], needs: Sequence[bool], *tensors: Tensor | None
    ) -> Any:
        penalty, terms, ctx.ahead = _launched(plans, calls)
        keep(ctx, [x if need else None for x, need in zip(tensors, needs, strict=True)], calls[0])
        ctx.plans = plans
        if terms is None:
            return penalty
        ctx.set_materialize_grads(False)  # no zeros for a gradient of the terms
        ctx.mark_non_differentiable(terms)
        return penalty, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        plans, saved = ctx.plans, ctx.saved_tensors
        count = 2 * len(plans)
        if grad is None:
            return (None,) * (3 + count)
        values = unpack(saved[count:], ctx.rest)
        ahead = vars(ctx).pop("ahead", None) or [(None, None)] * len(plans)  # in one step, for two threads
        formula = torch.is_grad_enabled() or observed() or not are_memory((grad, *saved))
        gradients: list[Tensor | None] = []
        for i, plan in enumerate(plans):
            call = Call(saved[2 * i], saved[2 * i + 1], *values, plan.kind)
            if plan.needs == (False, False):  # nothing of this layer is kept
                gradients += None, None
            elif formula:  # PyTorch must see the gradient's
                pairs = zip(ar_tar_gradients(grad, call), (call.raw, call.dropped), strict=True)
                gradients += [None if g is None else g.to(x.dtype) for g, x in pairs]
            else:
                gradients += plan.gradients_of(grad, call, *ahead[i])
        return None, None, None, *gradients


# `Function.apply` without the part for transforms of torch.func, under which no plan is used: 3 us less.
_apply: Any = super(Function, _Penalty).apply  # pyright: ignore[reportAttributeAccessIssue]
