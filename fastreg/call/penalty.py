"""`fused_ar_tar`: from the arguments to the launch, and back to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import zip_longest
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.fold import Fold
from fastreg.call.operation import compute, facts_of_saved, save, unpack
from fastreg.call.plans import Plan
from fastreg.call.problem import ARTAR, Call, Coefficient, Options, compute_dtype, layers_of
from fastreg.call.reference import ar_tar, ar_tar_gradients
from fastreg.call.torch_state import hooks_on_saved, plain
from fastreg.kernels.view import Sums, Terms, Values, allocator, layout_of, nothing

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
    """Compute the penalty of activation and temporal activation regularization, to be added to the loss.

    The penalty is `alpha * AR + beta * TAR`, with `AR = mean(dropped ** 2)` and
    `TAR = mean((raw[t + 1] - raw[t]) ** 2)`, after Merity, McCann and Socher, "Revisiting Activation Regularization for
    Language RNNs" (2017). Differences, squares and sums are computed in float32, or in float64 if an input is float64.
    TAR of a single time step is 0, and so is the penalty of an empty tensor. The penalty can be differentiated any
    number of times.

    Args:
        raw: the RNN's output before dropout: `(batch, time, hidden)`, any tensor with `time_dim`, a `PackedSequence`,
            or a list or tuple with an item for each layer. The penalties of layers add up; all layers must have the
            same batch and time steps. The dtype is float16, bfloat16, float32 or float64; strides are arbitrary. With
            `beta == 0` raw is not read and may be `None`, but with `return_terms=True` its TAR is computed if raw is
            given.
        dropped: the RNN's output after dropout. It has the shape of raw, or is packed like raw, and is on the same
            device. Its dtype may differ, and it may be `raw` itself. With `alpha == 0` it is not read and may be
            `None`.
        alpha: coefficient of AR, finite and not negative: a number, or a 0-dim tensor on the device of the
            activations. A tensor is read on the device, without a synchronization, and gets no gradient. A schedule may
            change it in place before each forward, also between replays of a CUDA graph.
        beta: coefficient of TAR, as for alpha.
        batch_first: `False` for `(time, batch, hidden)`; `None` for `True`.
        time_dim: the axis of time of tensors with one or more axes, instead of batch_first; a negative axis counts from
            the end. It is 2 for `(batch, channels, time, height, width)`. The batch is the first of the other axes. A
            tensor of two axes needs it: it is 0 for one sequence, `(time, hidden)`.
        lengths: the number of time steps of each padded sequence: integers, `(batch,)`. Padding counts in neither sums
            nor divisors, and its gradient is 0. On the CPU lengths outside of 0 to the number of time steps are an
            error; on other devices they are clamped, because a check would wait for the device.
        valid: a mask of the time steps that count, instead of lengths: `(batch, time)` in every layout, bool or
            integers 0 and 1, such as an `attention_mask`. It is the inverse of PyTorch's `key_padding_mask`, which is
            true at padding. A change counts if both of its steps count. Other steps count
            in neither sums nor divisors, and their gradient is 0. On the CPU other integers are an error; on other
            devices they count as 1.
        starts: a mask of the time steps at which a segment starts, such as an episode, or a document in a stream:
            `(batch, time)` in every layout, like valid, by itself or beside lengths or valid. The change into such a
            step does not count. The step itself counts in AR and in the change that follows. The `dones` of
            reinforcement learning mark the last step of an episode, which is one step earlier. It cannot be given with
            a `PackedSequence`.
        reduction: `"mean"` divides AR by the number of elements and TAR by the number of changes, without padding;
            `"sum"` does not divide.
        return_terms: also return the two terms.

    Returns:
        The penalty: a 0-dim tensor, float64 if an input is float64, else float32. With `return_terms=True` an
            `ARTAR(penalty, ar, tar)`, whose `ar` and `tar` are detached and do not contain the coefficients. A term
            whose coefficient is 0 is computed, too; it is 0 if its activations are `None`.

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


def penalize(activations: Sequence[Any], coefficients: Sequence[Any], steps: Sequence[Any], options: Options) -> Any:
    """Compute the penalty of activations, with its terms if they are wanted.

    Args:
        activations: raw and dropped, as `fused_ar_tar` takes them.
        coefficients: alpha and beta.
        steps: lengths, valid steps and starts.
        options: the other arguments.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    result = compute(PenaltyPlan, activations, coefficients, steps, options)
    return _zero(activations, options.measured) if result is None else result


def _zero(activations: Sequence[Any], measured: bool) -> Tensor | ARTAR:
    """Return a penalty of 0 on the device of the activations, if any are given, for a call with both terms off."""
    tensors = [x for layers in map(layers_of, activations) for x in layers if isinstance(x, Tensor)]
    zero = torch.zeros((), dtype=compute_dtype(tensors), device=tensors[0].device if tensors else None)
    return ARTAR(zero, zero.clone(), zero.clone()) if measured else zero


def by_formula(calls: Sequence[Call]) -> Tensor | ARTAR:
    """Compute the penalty of the layers of a call in plain PyTorch, with its terms if they are wanted."""
    penalty, ar, tar = reduce(lambda x, y: ARTAR(*map(torch.add, x, y)), map(ar_tar, calls))
    return ARTAR(penalty, ar.detach(), tar.detach()) if calls[0].terms.measured else penalty


def calls_of(tensors: Sequence[Any], values: Values, terms: Sequence[Terms]) -> Sequence[Call]:
    """Return a call for each layer."""
    layers = zip(tensors[::2], tensors[1::2], terms, strict=True)
    return [Call(raw, dropped, *values, of_layer) for raw, dropped, of_layer in layers]


class PenaltyPlan(Plan):
    """Compute the penalty of all layers of a call, and its gradients.

    The tensors of a call are raw and dropped of the first layer, raw and dropped of the second layer, and so on. Each
    is `None` if no term reads it; dropped is also `None` if AR is the mean square of raw.

    Args:
        checked: the plan by the formula.
        backend: the code that runs.
        fills: whether the forward may fill gradients for the backward.
        tensors: the tensors of the first call.
        values: coefficients and the steps that count, of the first call.

    Attributes:
        drops: whether the operation applies a mask to raw; otherwise it takes dropped.
        layers: a `Layer` for each layer.
        needs: for each tensor, whether it needs a gradient.
        names, facts: the names and the facts of the tensors that a node saves.
    """

    drops = False

    def __init__(self, checked: Plan, backend: Any, fills: bool, tensors: Sequence[Any], values: Values) -> None:
        super().__init__(checked.terms, checked.steps_of, checked.row)
        fills = fills and hooks_on_saved(False) is None  # where tensors are packed away, memory matters more than time
        self.layers = [Layer(call, backend, fills) for call in calls_of(tensors, values, self.terms)]
        self.needs = [need for layer in self.layers for need in layer.needs]
        self.is_measured, self.is_differentiable = self.terms[0].measured, True in self.needs
        self.names, self.facts = ["raw", "dropped"] * len(self.layers), facts_of_saved(self.kept(tensors), values)

    @staticmethod
    def tensors_of(raw: Any, dropped: Any, plan: Plan) -> Sequence[Any]:
        """Return the tensors of a call."""
        if type(raw) is Tensor and type(dropped) is Tensor and dropped is not raw:
            return raw, dropped
        layers = zip_longest(plan.terms, layers_of(raw), layers_of(dropped))
        return [plain(x) for terms, *pair in layers for x in (pair[0], None if terms.ar_of_raw else pair[1])]

    @staticmethod
    def formula(tensors: Sequence[Any], values: Values, terms: Sequence[Terms]) -> Tensor | ARTAR:
        """Compute the penalty in plain PyTorch, or an `ARTAR` if the caller wants the terms."""
        return by_formula(calls_of(tensors, values, terms))

    def __call__(self, tensors: Sequence[Any], values: Values) -> Any:
        """Compute the penalty, or an `ARTAR` if the caller wants the terms."""
        if not self.is_differentiable:
            results = launched(self.layers, tensors, values, [])
        else:
            results = _apply(self, values, *tensors)
        return ARTAR(results[0], *results[1].unbind()) if self.is_measured else results

    def kept(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return the tensors that a node saves: those that need gradients, and `None` for each other tensor."""
        return [x if need else None for x, need in zip(tensors, self.needs, strict=True)]


# An upstream gradient that a forward has assumed, and the gradients of raw and dropped that it has filled for it.
Ahead: TypeAlias = tuple[Any, Tensor | None, Tensor | None]
NOTHING_AHEAD: Ahead = None, None, None


class Layer:
    """Compute the penalty of one layer, and its gradients.

    Attributes:
        needs: whether raw and dropped need gradients; a term that is only measured has none.
        fold: the fold of raw and dropped.
        gradients: functions that allocate the gradients of raw and dropped.
        filled: functions that allocate the gradients that the forward fills for the backward.
        forward, backward: the launches of the backend; no backward if neither needs a gradient.
    """

    def __init__(self, call: Call, backend: Any, fills: bool) -> None:
        raw, dropped, terms, enabled = call.raw, call.dropped, call.terms, torch.is_grad_enabled()
        by_raw, by_dropped = terms.by_tar or (terms.by_ar and terms.ar_of_raw), terms.by_ar and not terms.ar_of_raw
        self.needs = enabled and by_raw and raw.requires_grad, enabled and by_dropped and dropped.requires_grad
        layouts = layout_of(raw), layout_of(dropped)
        self.terms, self.fold = terms, Fold((layouts[0], None, None, layouts[1]), terms.time_dim, call.steps)
        written = [self.fold.like(x) if need else None for x, need in zip(layouts, self.needs, strict=True)]
        view, others = self.fold.view(written), (terms, call.present().device)
        self.gradients = self.filled = [*map(allocator, written, layouts)]
        if not fills:
            self.filled = nothing, nothing
        self.forward = backend.forward(view if fills else self.fold.view((None, None)), *others)
        expected = self.forward.expected
        self.backward: Any = backend.backward(view, *others, expected) if True in self.needs else None

    def __call__(self, raw: Any, dropped: Any, values: Values) -> tuple[Sums, Ahead]:
        """Launch the forward."""
        first, second = self.filled
        grad_raw, grad_dropped = first(raw), second(dropped)
        operands = self.fold.readable((raw, None, None, dropped))
        sums = self.forward((*operands, grad_raw, grad_dropped), values)
        return sums, (sums.assumed, grad_raw, grad_dropped)

    def differentiate(self, grad: Tensor, raw: Any, dropped: Any, values: Values, ahead: Ahead) -> Sequence[Any]:
        """Launch the backward over gradients that the forward has filled, or over new memory; return the gradients."""
        assumed, *gradients = ahead
        if assumed is None:
            first, second = self.gradients
            gradients = [first(raw), second(dropped)]
        elif self.fold.copies and self.backward.holds(grad, assumed):
            return gradients  # without copying anything
        self.backward(grad, (*self.fold.readable((raw, None, None, dropped)), *gradients), values, assumed)
        return gradients

    def derive(self, grad: Tensor, raw: Any, dropped: Any, values: Values, _: Ahead) -> Sequence[Any]:
        """Compute both gradients in plain PyTorch, so that they can be differentiated."""
        gradients = ar_tar_gradients(grad, Call(raw, dropped, *values, self.terms))
        return [None if y is None else y.to(x.dtype) for x, y in zip((raw, dropped), gradients, strict=True)]


def launched(layers: Sequence[Layer], tensors: Sequence[Any], values: Values, aheads: list[Any]) -> Any:
    """Launch the forward of each layer, and append its `Ahead` to a list; return the penalty, and terms if wanted."""
    penalty: Any = None
    terms: Any = None
    for layer, raw, dropped in zip(layers, tensors[::2], tensors[1::2], strict=True):
        sums, ahead = layer(raw, dropped, values)
        aheads.append(ahead)
        penalty = sums.penalty if penalty is None else penalty + sums.penalty
        terms = sums.terms if terms is None else terms + sums.terms
    return penalty if terms is None else (penalty, terms)


class _Penalty(Function):
    """Compute the penalty, and keep the inputs that need gradients, and the gradients that the forward has filled.

    The first backward returns the filled gradients; a second backward computes them again.
    """

    @staticmethod
    def forward(ctx: Any, plan: PenaltyPlan, values: Values, *tensors: Tensor | None) -> Any:
        ctx.ahead = []
        results = launched(plan.layers, tensors, values, ctx.ahead)
        save(ctx, plan, plan.kept(tensors) if False in plan.needs else tensors, values)
        if plan.is_measured:  # the second output costs 3 us
            ctx.set_materialize_grads(False)  # PyTorch need not make zeros for the terms
            ctx.mark_non_differentiable(results[1])
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan = ctx.plan
        if grad is None:
            return (None,) * (2 + len(plan.needs))
        saved, values, is_seen = unpack(ctx, grad)
        aheads = vars(ctx).pop("ahead", None) or [NOTHING_AHEAD] * len(plan.layers)  # atomic, for two threads
        gradients_of = Layer.derive if is_seen else Layer.differentiate
        if len(plan.layers) == 1:
            return None, None, *gradients_of(plan.layers[0], grad, saved[0], saved[1], values, aheads[0])
        gradients: list[Tensor | None] = []
        for layer, raw, dropped, ahead in zip(plan.layers, saved[::2], saved[1::2], aheads, strict=False):
            is_kept = True in layer.needs  # of other layers no tensor is saved
            gradients += gradients_of(layer, grad, raw, dropped, values, ahead) if is_kept else (None, None)
        return None, None, *gradients


# `Function.apply` without its part for transforms of torch.func, under which no plan is used. This saves 3 us.
_apply: Any = super(Function, _Penalty).apply  # pyright: ignore[reportAttributeAccessIssue]
