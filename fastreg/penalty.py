"""`fused_ar_tar`: from the arguments to the launch, and back to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import check_given
from fastreg.fold import Fold
from fastreg.kernels.view import Sums, Values, allocator, layout_of
from fastreg.operation import compute, save, unpack
from fastreg.prepare import Given, Plan
from fastreg.problem import ARTAR, Call, Coefficient, Options, compute_dtype, is_on, layers_of, terms_of
from fastreg.reference import ar_tar, ar_tar_gradients
from fastreg.torch_state import plain

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
    tensors = [x for given in activations for x in layers_of(given) if isinstance(x, Tensor)]
    zero = torch.zeros((), dtype=compute_dtype(tensors), device=tensors[0].device if tensors else None)
    return ARTAR(zero, zero.clone(), zero.clone()) if measured else zero


def by_formula(calls: Sequence[Call]) -> Tensor | ARTAR:
    """Compute the penalty of the layers of a call in plain PyTorch, with its terms if they are wanted."""
    penalty, ar, tar = reduce(lambda x, y: ARTAR(*map(torch.add, x, y)), map(ar_tar, calls))
    return ARTAR(penalty, ar.detach(), tar.detach()) if calls[0].kind.measured else penalty


class PenaltyPlan(Plan):
    """Compute the penalty of all layers of a call, and its gradients.

    The tensors of a call are raw and dropped of the first layer, raw and dropped of the second layer, and so on. Each
    is `None` if no term reads it; dropped is also `None` if AR is the mean square of raw.

    Attributes:
        layers: a `Layer` for each layer; `None` before the first call.
        needs: for each tensor, whether it needs a gradient.
    """

    layers: Any = None

    def __init__(
        self, tensors: Sequence[Any], coefficients: Sequence[Any], given: Given, options: Options, is_kept: bool
    ) -> None:
        (raw, dropped), (alpha, beta) = tensors, coefficients
        check_given("raw", raw, is_on(beta), "beta")
        check_given("dropped", dropped, is_on(alpha), "alpha")
        super().__init__((raw, dropped, None), coefficients, given, options, is_kept)

    @staticmethod
    def read(tensors: Sequence[Any], are_on: Sequence[bool], options: Options) -> Sequence[Any]:
        """Return raw and dropped, each `None` if no term reads it.

        If the caller wants the terms, a given tensor is read even if its coefficient is 0.
        """
        (raw, dropped), (by_ar, by_tar) = tensors, are_on
        if options.measured or options.ar_of_raw:
            return tensors
        return raw if by_tar else None, dropped if by_ar else None

    def __call__(self, given: Sequence[Any], values: Values) -> Any:
        """Compute the penalty, or an `ARTAR` if the caller wants the terms; return `None` if no term reads anything.

        Args:
            given: raw and dropped.
            values: coefficients, and the steps that count.
        """
        raw, dropped = tensors = given
        if type(raw) is not Tensor or type(dropped) is not Tensor or dropped is raw:
            layers = zip_longest(self.kinds, layers_of(raw), layers_of(dropped))
            tensors = [plain(x) for kind, *pair in layers for x in (pair[0], None if kind.ar_of_raw else pair[1])]
        if self.layers is None:
            layers = zip(tensors[::2], tensors[1::2], self.kinds, strict=True)
            calls = [Call(raw, dropped, *values, kind) for raw, dropped, kind in layers]
            if self.backend is None:
                return by_formula(calls) if calls else None
            self.prepare(calls)
        if not self.is_differentiable:
            results = launched(self.layers, tensors, values, [])  # pyright: ignore[reportArgumentType]
        else:
            results = _apply(self, values, *tensors)
        return ARTAR(results[0], *results[1].unbind()) if self.is_measured else results

    def prepare(self, calls: Sequence[Call]) -> None:
        """Plan each layer, in the first call."""
        layers = [Layer(call, self.backend, self.fills) for call in calls]
        self.needs = [need for layer in layers for need in layer.needs]
        self.names, self.is_measured = ["raw", "dropped"] * len(layers), layers[0].terms.measured
        self.is_differentiable = True in self.needs
        self.layers = layers


class Ahead(NamedTuple):
    """Hold the gradients of raw and dropped that a forward has filled, and the upstream gradient that it assumed."""

    assumed: Any = None
    raw: Tensor | None = None
    dropped: Tensor | None = None


NOTHING_AHEAD = Ahead()


class Layer:
    """Compute the penalty of one layer, and its gradients.

    Attributes:
        needs: whether raw and dropped need gradients; a term that is only measured has none.
        fold: the fold of raw and dropped.
        gradients: functions that allocate the gradients of raw and dropped.
        filled: functions that allocate the gradients that the forward fills for the backward.
        forward, backward: the launches of the backend; the first backward makes `backward`.
    """

    def __init__(self, call: Call, backend: Any, fills: bool) -> None:
        raw, dropped, terms, enabled = call.raw, call.dropped, terms_of(call), torch.is_grad_enabled()
        by_raw, by_dropped = terms.by_tar or (terms.by_ar and terms.ar_of_raw), terms.by_ar and not terms.ar_of_raw
        self.needs = enabled and by_raw and raw.requires_grad, enabled and by_dropped and dropped.requires_grad
        self.kind, self.terms, self.backend, self.device = call.kind, terms, backend, call.given().device
        layouts = layout_of(raw), layout_of(dropped)
        self.fold = Fold((layouts[0], None, None, layouts[1]), call)
        written = [self.fold.like(x) if need else None for x, need in zip(layouts, self.needs, strict=True)]
        self.view, ahead = self.fold.view(written), written if fills else (None, None)
        self.gradients, self.filled = ([*map(allocator, x, (raw, dropped))] for x in (written, ahead))
        self.forward = backend.forward(self.fold.view(ahead), terms, self.device)
        self.backward: Any = None

    def __call__(self, raw: Any, dropped: Any, values: Values) -> tuple[Sums, Ahead]:
        """Launch the forward."""
        first, second = self.filled
        grad_raw, grad_dropped = first(raw), second(dropped)
        operands = self.fold.read((raw, None, None, dropped))
        sums = self.forward((*operands, grad_raw, grad_dropped), values)
        return sums, Ahead(sums.assumed, grad_raw, grad_dropped)

    def differentiate(self, grad: Tensor, raw: Any, dropped: Any, values: Values, ahead: Ahead) -> Sequence[Any]:
        """Launch the backward over gradients that the forward has filled, or over new memory; return the gradients."""
        assumed, *gradients = ahead
        if self.backward is None:
            self.backward = self.backend.backward(self.view, self.terms, self.device, self.forward.expected)
        if assumed is None:
            first, second = self.gradients
            gradients = [first(raw), second(dropped)]
        elif self.fold.copies and self.backward.holds(grad, assumed):
            return gradients  # without copying anything
        self.backward(grad, (*self.fold.read((raw, None, None, dropped)), *gradients), values, assumed)
        return gradients

    def derive(self, grad: Tensor, raw: Any, dropped: Any, values: Values, _: Ahead) -> Sequence[Any]:
        """Compute both gradients in plain PyTorch, so that they can be differentiated."""
        gradients = ar_tar_gradients(grad, Call(raw, dropped, *values, self.kind))
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
        if False in plan.needs:
            tensors = tuple([x if need else None for x, need in zip(tensors, plan.needs, strict=True)])
        save(ctx, plan, tensors, values)
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
