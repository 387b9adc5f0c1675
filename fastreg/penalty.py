"""`fused_ar_tar`: from the arguments to the launch, and back to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import check_activations, check_options, check_steps
from fastreg.backends import Backend, backend_for
from fastreg.kernels.view import NOTHING, Layout, Operands, Prediction, Result, Sums, Values, allocate, layout_of
from fastreg.plans import Plans, key_of
from fastreg.prepare import (
    Reader,
    parts_of,
    plain,
    plain_pair,
    problem_of,
    restored,
    restored_values,
    save,
    time_given,
    values_like,
    values_of,
)
from fastreg.problem import ARTAR, Call, Coefficient, Layer, Problem, compute_dtype, is_list, is_on, rows_of
from fastreg.reference import ar_tar, ar_tar_gradients
from fastreg.torch_state import are_memory, keeps_memory_low, observed
from fastreg.view import Inputs, sums_of

One: TypeAlias = Tensor | PackedSequence
Activations: TypeAlias = One | list[Tensor] | list[PackedSequence] | tuple[One, ...] | None

PLANS = Plans()


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
    return_terms: bool,
) -> Tensor | ARTAR: ...
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
    raw, dropped = plain_pair(raw, dropped)
    values = plain(alpha), plain(beta), plain(lengths), plain(valid), plain(starts)
    call = Call(raw, dropped, *values, time_given(batch_first, time_dim), reduction, return_terms)
    computed = penalty_of(call)
    return computed.penalty if computed.terms is None else ARTAR(computed.penalty, *computed.terms)


class Computed(NamedTuple):
    """The penalty of a call, and the inputs of its gradient.

    penalty    ()
    terms      AR and TAR, () and detached; `None` unless they are wanted
    values     as they were read, for activations of one layer or of all
    problem    the problem of the call
    additions  how to add the gradient of each layer, as `fastreg.carry` keeps it with the plan of the call
    """

    penalty: Tensor
    terms: Sequence[Any] | None
    values: Values
    problem: Problem
    additions: dict[int, Any]


def penalty_of(call: Call) -> Computed:
    """Compute the penalty of one layer or of several.

    A tensor that requires no gradient is summed and nothing else: `fastreg.addition` adds the gradient of
    the penalty of detached tensors.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    key = key_of(call)
    if key is None:
        return _by_formula(call, _checked(call))
    plan = PLANS.get(key)
    if plan is None:
        plan = _Plan(call, _checked(call))
        PLANS.keep(key, plan)
    return plan(call)


def _checked(call: Call) -> Problem:
    """Check the arguments, and return the problem."""
    check_options(call, return_terms=call.measured)
    check_steps(call.lengths, call.valid, call.starts)
    problem = problem_of(call)
    check_activations(call, problem)
    return problem


def _by_formula(call: Call, problem: Problem) -> Computed:
    """Compute the penalty in plain PyTorch."""
    parts = parts_of(call, problem)
    if not parts:
        return Computed(*_zero(call), NOTHING, problem, {})
    values = values_of(call, problem, parts[0][0].given())
    results = [ar_tar(Layer(layer.raw, layer.dropped, values), of) for layer, of in parts]
    penalty, ar, tar = reduce(lambda a, b: ARTAR(a.penalty + b.penalty, a.ar + b.ar, a.tar + b.tar), results)
    return Computed(penalty, (ar.detach(), tar.detach()) if problem.measured else None, values, problem, {})


def _zero(call: Call) -> tuple[Tensor, Sequence[Tensor] | None]:
    """Return 0 where the activations are, if any were given at all: both terms are off."""
    given = [rows_of(x) for value in (call.raw, call.dropped) for x in (value if is_list(value) else [value])]
    tensors = [x for x in given if isinstance(x, Tensor)]
    zero = torch.zeros((), dtype=compute_dtype(*tensors), device=tensors[0].device if tensors else None)
    return zero, (zero.clone(), zero.clone()) if call.measured else None


class _LayerPlan:
    """How to compute the penalty of one layer, and its gradients.

    problem  the terms
    needs    whether raw and dropped need gradients
    inputs   raw and dropped
    filled   layouts of the gradients that the forward fills for the backward
    forward  a `forward` of the backend
    """

    def __init__(self, layer: Layer, problem: Problem, backend: Backend, sums: Sums) -> None:
        self.problem, self.backend, self.sums = problem, backend, sums
        self.needs = _needs(layer, problem)
        layouts = [None if x is None else layout_of(x) for x in (layer.raw, None, None, layer.dropped)]
        self.inputs = Inputs(layouts, layer, problem)
        # Where saved tensors are packed away, memory is the point: gradients are formed in the backward alone.
        self.filled = (None, None) if keeps_memory_low() else self._gradients(self.inputs)
        view = self.inputs.view(self.filled, layer.values)
        self.forward = backend.forward(view, sums, layer.given().device)
        self.backward: Any = None  # made by the first backward

    def __call__(self, values: Values, raw: Tensor | None, dropped: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute the penalty, and its terms if they are measured."""
        if self.needs == (False, False):
            return self.compute(values, raw, dropped)[0][:2]
        if self.problem.measured:
            return _apply(self, values, raw, dropped)
        return _apply(self, values, raw, dropped), None  # an output more costs 3 us

    def compute(
        self, values: Values, raw: Tensor | None, dropped: Tensor | None
    ) -> tuple[Result, Sequence[Tensor | None]]:
        """Launch the forward; return the result, and the gradients it has filled."""
        first, second = self.filled
        filled = None if first is None else allocate(first), None if second is None else allocate(second)
        return self.forward((*self.inputs.read((raw, None, None, dropped)), *filled), values), filled

    def gradients(
        self, grad: Tensor, layer: Layer, prediction: Prediction | None, filled: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Launch the backward for gradients that the forward has filled, or for new memory without a prediction."""
        saved, inputs = (layer.raw, None, None, layer.dropped), self.inputs
        layouts = tuple([x if y is None else layout_of(y) for x, y in zip(inputs.layouts, saved, strict=True)])
        if layouts == inputs.layouts:
            if self.backward is None:
                self.backward = self._plan_backward(inputs, layer)
            gradients, launch = self.backward
            if inputs.copies and prediction is not None and launch.holds(grad, prediction):
                return filled  # before anything is copied
        else:  # a hook on saved tensors, or an assignment to `x.data`, has changed one
            saved = tuple(map(restored, Operands._fields, saved, inputs.layouts))
            layouts = [before if x is None else layout_of(x) for before, x in zip(layouts, saved, strict=True)]
            inputs, prediction = Inputs(layouts, layer, self.problem), None
            gradients, launch = self._plan_backward(inputs, layer)
        if prediction is None:
            filled = [None if x is None else allocate(x) for x in gradients]
        launch(grad, (*inputs.read(saved), *filled), layer.values, prediction)
        return filled

    def _plan_backward(self, inputs: Inputs, layer: Layer) -> tuple[Any, Any]:
        """Return the layouts of the gradients, and a `backward` of the backend."""
        gradients = self._gradients(inputs)
        view = inputs.view(gradients, layer.values)
        return gradients, self.backend.backward(view, self.sums, layer.given().device)

    def _gradients(self, inputs: Inputs) -> tuple[Layout | None, ...]:
        """Return the layouts of the gradients of raw and dropped, `None` for one that is not needed."""
        raw, _, _, dropped = inputs.layouts
        pairs = zip((raw, dropped), self.needs, strict=True)
        return tuple([inputs.fold.like(x) if x is not None and need else None for x, need in pairs])


def _needs(layer: Layer, problem: Problem) -> tuple[bool, bool]:
    """Return whether raw and dropped need gradients: a term that is only measured has none."""
    if not torch.is_grad_enabled():
        return False, False
    raw, dropped, _ = layer
    ar, tar = is_on(problem.alpha), is_on(problem.beta)
    return (
        raw is not None and raw.requires_grad and (tar or (ar and problem.ar_of_raw)),
        dropped is not None and dropped.requires_grad and ar,
    )


class _Plan:
    """How to compute the penalty for calls of one key: by kernels, layer by layer, or by the formula."""

    def __init__(self, call: Call, problem: Problem) -> None:
        self.problem = problem
        self.layers: tuple[_LayerPlan, ...] = ()
        self.additions: dict[int, Any] = {}
        parts = parts_of(call, problem)
        if not parts or any(0 in layer.given().shape for layer, _ in parts):
            return
        first, values = parts[0][0], values_like(call, problem)
        backend = backend_for(first.given().device)
        if backend is None:
            return
        self.read = Reader(call, problem, backend.steps, first.given())
        is_alone = (first.raw is None or first.raw is call.raw) and (
            first.dropped is None or first.dropped is call.dropped
        )
        self.reads = (first.raw is not None, first.dropped is not None) if is_alone else None
        dtype = compute_dtype(*[x for layer, _ in parts for x in (layer.raw, layer.dropped)])
        layers = [(Layer(layer.raw, layer.dropped, values), of) for layer, of in parts]
        self.layers = tuple([_LayerPlan(layer, of, backend, sums_of(layer, of, dtype)) for layer, of in layers])

    def __call__(self, call: Call) -> Computed:
        """Compute the penalty of a call."""
        if not self.layers:
            return _by_formula(call, self.problem)
        tensors: list[Any]
        if self.reads is not None:  # tensors that are no lists, which are most calls
            tensors = [call.raw if self.reads[0] else None, call.dropped if self.reads[1] else None]
        else:
            tensors = [x for layer, _ in parts_of(call, self.problem) for x in (layer.raw, layer.dropped)]
        values = self.read(call, tensors[1] if tensors[0] is None else tensors[0])
        penalty, terms = self.layers[0](values, *tensors[:2])
        for i, layer in enumerate(self.layers[1:], 1):
            more, its_terms = layer(values, *tensors[2 * i : 2 * i + 2])
            penalty, terms = penalty + more, None if its_terms is None or terms is None else terms + its_terms
        return Computed(penalty, None if terms is None else terms.unbind(), values, self.problem, self.additions)


class _Penalty(Function):
    """Keep references to the inputs that need gradients, and the gradients that the forward has filled.

    Filled gradients belong to the first backward; a second one computes gradients anew.
    """

    @staticmethod
    def forward(ctx: Any, plan: _LayerPlan, values: Values, raw: Tensor | None, dropped: Tensor | None) -> Any:
        (penalty, terms, prediction), filled = plan.compute(values, raw, dropped)
        save(ctx, [x if need else None for x, need in zip((raw, dropped), plan.needs, strict=True)], values)
        ctx.plan, ctx.ahead = plan, (prediction, filled)
        if terms is None:
            return penalty
        ctx.set_materialize_grads(False)  # no zeros for a gradient of the terms
        ctx.mark_non_differentiable(terms)
        return penalty, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, plan = ctx.saved_tensors, ctx.plan
        if grad is None:
            return None, None, None, None
        layer = Layer(saved[0], saved[1], restored_values(saved[2:], ctx.dtypes))
        ahead = vars(ctx).pop("ahead", (None, ()))  # in one step, for two threads
        if torch.is_grad_enabled() or observed() or not are_memory((grad, *saved)):  # PyTorch must see the gradient's
            wide = ar_tar_gradients(grad, layer, plan.problem.penalized())
            gradients = [None if g is None else g.to(x.dtype) for g, x in zip(wide, layer[:2], strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
        else:
            gradients = plan.gradients(grad, layer, *ahead)
        return None, None, *gradients


# `Function.apply` without the part for transforms of torch.func, under which no plan is used: 3 us less.
_apply: Any = super(Function, _Penalty).apply  # pyright: ignore[reportAttributeAccessIssue]
