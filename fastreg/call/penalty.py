"""`fused_ar_tar`: from the arguments to the launch, and back to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.arguments import axis_of, check_given, check_layers, check_like_first, check_packed
from fastreg.call.operation import checked_coefficient, compute
from fastreg.call.packed import by_sequence
from fastreg.call.plan import Gradients, Inputs, Pair, Plan, Results
from fastreg.call.problem import (
    ARTAR,
    Choices,
    Coefficient,
    One,
    Options,
    Penalty,
    compute_dtype,
    is_list,
    is_on,
    layers_of,
    sum_of,
)
from fastreg.call.reference import ar_tar
from fastreg.call.steps import GivenSteps, given_steps
from fastreg.kernels.backend import Backend, Backward
from fastreg.kernels.view import Layout, Operands, Tensors, Values, allocator, nothing

if TYPE_CHECKING:
    from typing_extensions import Unpack

Activations: TypeAlias = One | list[Tensor] | list[PackedSequence] | tuple[One, ...] | None


@overload
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    return_terms: Literal[False] = False,
    **options: Unpack[Choices],
) -> Tensor: ...
@overload
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    return_terms: Literal[True],
    **options: Unpack[Choices],
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
        batch_first: `False` for `(time, batch, hidden)`; `None` means `True`.
        time_dim: the axis of time of tensors with one or more axes, instead of batch_first; a negative axis counts from
            the end. It is 2 for `(batch, channels, time, height, width)`. The batch is the first of the other axes. A
            tensor of two axes needs it: it is 0 for one sequence, `(time, hidden)`.
        lengths: the number of time steps of each padded sequence: integers, `(batch,)`. Padding counts in neither sums
            nor divisors, and its gradient is 0. On the CPU lengths outside of 0 to the number of time steps are an
            error; on other devices they are clamped, because a check would wait for the device.
        valid: a mask of the time steps that count, instead of lengths: bool, or integers 0 and 1. It has the batch and
            time axes of raw, in the order in which raw has them: `(batch, time)`, such as an `attention_mask`; `(time,
            batch)` with `batch_first=False`; `(time,)` for one sequence. Layers of a list share one mask. It is the
            inverse of PyTorch's `key_padding_mask`, which is true at padding. A change counts if both of its steps
            count. Other steps count in neither sums nor divisors, and their gradient is 0. On the CPU other integers
            are an error; on other devices they count as 1.
        starts: a mask of the time steps at which a segment starts, such as an episode, or a document in a stream. Its
            shape and dtype are as for valid, and it may be given beside lengths or valid. The change into such a step
            does not count. The step itself counts in AR and in the change that follows. A rollout of `(time, batch)`
            needs `batch_first=False, starts=dones.bool()` if its flags mark the first step of an episode;
            docs/reinforcement-learning.md says whose flags do. It cannot be given with a `PackedSequence`.
        reduction: `"mean"` divides AR by the number of elements and TAR by the number of changes, without padding;
            `"sum"` does not divide.
        return_terms: also return the two terms.

    Returns:
        The penalty: a 0-dim tensor, float64 if an input that is read is float64, else float32. With
            `return_terms=True` an `ARTAR(penalty, ar, tar)`, whose `ar` and `tar` are detached and do not contain the
            coefficients. A term whose coefficient is 0 is computed, too; it is 0 if its activations are `None`.

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

        Leave the changes out that lead into a new episode of a rollout, `(time, batch, hidden)`:

        >>> states, dones = torch.randn(16, 6, 8), torch.rand(16, 6) < 0.1
        >>> penalty = fused_ar_tar(states, states, 2.0, 1.0, batch_first=False, starts=dones)
    """
    options = Options(batch_first, time_dim, reduction, return_terms)
    penalty = penalize((raw, dropped), (alpha, beta), given_steps(lengths, valid, starts), options, None)
    return penalty.split() if return_terms else penalty.value


def penalize(
    activations: Sequence[Any],
    coefficients: Sequence[Coefficient],
    steps: GivenSteps | None,
    options: Options,
    layer: int | None = None,
) -> Penalty:
    """Compute the penalty of activations, with its terms if they are wanted.

    The penalty of a list of layers is a sum, and packed rows are selected in the order of their sequences.

    Args:
        activations: raw and dropped, as `fused_ar_tar` takes them.
        coefficients: alpha and beta.
        steps: the steps that the call counts, or `None` if it counts all.
        options: the other arguments.
        layer: the number of the layer in a list, for messages.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    raw, dropped = activations
    if isinstance(raw, (tuple, list)) or isinstance(dropped, (tuple, list)):
        coefficients = alpha, beta = [*map(checked_coefficient, ("alpha", "beta"), coefficients)]
        raw, dropped = PenaltyPlan.without_unread(raw, dropped, alpha, beta, options.return_terms)
        if is_list(raw) or is_list(dropped):
            return _sum_of_layers((raw, dropped), coefficients, steps, options)
        if not raw is dropped is None:
            axis_of(options.batch_first, options.time_dim)
            check_packed(raw, dropped, options.time_dim, steps and steps.given, layer)
            activations, steps = by_sequence(raw, dropped)
            # Dynamo of PyTorch 2.8 can trace neither `_replace` nor a slice.
            options = Options(None, None, options.reduction, options.return_terms, options.dtype)
    results = compute(PenaltyPlan, activations, coefficients, steps, options, layer)
    return _zero(activations, options.return_terms) if results is None else results[1]


def _sum_of_layers(
    activations: Sequence[Any], coefficients: Sequence[Coefficient], steps: GivenSteps | None, options: Options
) -> Penalty:
    """Add up the penalties of layers, all in the dtype of their sum; a message names the layer."""
    layers = check_layers(*activations)
    batch_first, time_dim, reduction, return_terms, _ = options
    axis, dtype = axis_of(batch_first, time_dim), compute_dtype(_tensors_of(activations))
    options = Options(batch_first, time_dim, reduction, return_terms, dtype)
    penalties: list[Penalty] = []
    for i, pair in enumerate(layers):
        if i > 0:
            check_like_first(i, pair, layers[0], axis)
        penalties.append(penalize(pair, coefficients, steps, options, i))
    return sum_of(penalties)


def _zero(activations: Sequence[Any], return_terms: bool) -> Penalty:
    """Return a penalty of 0 on the device of the activations, if any are given, for a call with both terms off."""
    tensors = _tensors_of(activations)  # which nothing reads, so their dtype does not matter
    zeros = torch.zeros(3, dtype=torch.float32, device=tensors[0].device if tensors else None)
    return Penalty(zeros[0], zeros[1:] if return_terms else None)


def _tensors_of(activations: Sequence[Any]) -> Sequence[Tensor]:
    """Return the tensors and the packed rows of all layers."""
    return [x for layers in map(layers_of, activations) for x in layers if isinstance(x, Tensor)]


class PenaltyPlan(Plan):
    """Compute the penalty of one layer, and its gradients.

    The tensors of a call are raw and dropped. Each is `None` if no term reads it; dropped is also `None` if it is raw
    itself.

    Attributes:
        grad_raw, grad_dropped: functions that allocate the gradients.
        forward, backward: the launches of the backend; no backward if neither needs a gradient.
    """

    backward: Backward

    def __init__(self, inputs: Inputs, options: Options, layer: int | None) -> None:
        raw, dropped, alpha, beta = inputs
        check_given(raw, dropped, is_on(beta), is_on(alpha), layer)
        super().__init__(inputs, options, layer)

    @staticmethod
    def without_unread(
        first: Any, second: Any, alpha: Coefficient, beta: Coefficient, return_terms: bool
    ) -> Sequence[Any]:
        """Return raw and dropped, with `None` for a tensor that no term reads."""
        if return_terms:
            return first, second
        return first if is_on(beta) else None, second if is_on(alpha) else None

    def tensors_of(self, first: Any, second: Any) -> Pair:
        """Return raw and dropped."""
        return first, None if self.spec.ar_of_raw else second

    def formula(self, values: Values, tensors: Pair) -> Results:
        """Compute the penalty and its terms in plain PyTorch."""
        raw, dropped = tensors
        return [], ar_tar(raw, dropped, values, self.spec, self.time_dim)

    def prepare(self, backend: Backend, tensors: Pair, layouts: Sequence[Layout | None]) -> None:
        """Prepare the launches. A term that is not in the penalty has no gradient."""
        (raw, dropped), spec, fold = layouts, self.spec, self.fold
        by_raw, by_dropped = spec.by_tar or (spec.by_ar and spec.ar_of_raw), spec.by_ar and not spec.ar_of_raw
        asked = zip(tensors, (by_raw, by_dropped), strict=True)
        self.needs = [torch.is_grad_enabled() and y and x is not None and x.requires_grad for x, y in asked]
        self.saves_all = False not in self.needs
        grad_raw, grad_dropped = (fold.dense(x) if x and y else None for x, y in zip(layouts, self.needs, strict=True))
        gradients = zip((grad_raw, grad_dropped), layouts, strict=True)
        self.grad_raw, self.grad_dropped = (nothing if x is None else allocator(x, like) for x, like in gradients)
        of = fold.operand
        forward = Operands(raw=of(raw), dropped=of(dropped))
        self.forward = backend.forward(fold.view(forward), spec, self.device)
        if True in self.needs:
            backward = forward._replace(grad_raw=of(grad_raw), grad_dropped=of(grad_dropped))
            self.backward = backend.backward(fold.view(backward), spec, self.device)

    def launch(self, values: Values, tensors: Pair) -> tuple[Tensor, ...]:
        """Launch the forward; return the penalty, with the terms if they are wanted."""
        raw, dropped = tensors
        penalty, terms = self.forward(Tensors(raw=raw, dropped=dropped), values)
        return (penalty,) if terms is None else (penalty, terms)

    def differentiate(self, upstream: Gradients, saved: Pair, values: Values) -> Gradients:
        """Launch the backward; return the gradients."""
        raw, dropped = saved
        grad_raw, grad_dropped = self.grad_raw(raw), self.grad_dropped(dropped)
        given = Tensors(raw=raw, dropped=dropped, grad_raw=grad_raw, grad_dropped=grad_dropped)
        self.backward(upstream[0], given, values)
        return grad_raw, grad_dropped
