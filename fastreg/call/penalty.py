"""`fused_ar_tar`: from the arguments to the launch, and back to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.arguments import check_given
from fastreg.call.fold import Fold
from fastreg.call.operation import Plan, compute
from fastreg.call.problem import ARTAR, Call, Coefficient, NoTerms, Options, WithTerms, compute_dtype, is_on, layers_of
from fastreg.call.reference import ar_tar
from fastreg.call.torch_state import hooks_on_saved, plain
from fastreg.kernels.view import Sums, Terms, Values, allocator, layout_of, nothing

if TYPE_CHECKING:
    from typing_extensions import Unpack

One: TypeAlias = Tensor | PackedSequence
Activations: TypeAlias = One | list[Tensor] | list[PackedSequence] | tuple[One, ...] | None


@overload
def fused_ar_tar(
    raw: Activations, dropped: Activations, alpha: Coefficient, beta: Coefficient, **options: Unpack[NoTerms]
) -> Tensor: ...
@overload
def fused_ar_tar(
    raw: Activations, dropped: Activations, alpha: Coefficient, beta: Coefficient, **options: Unpack[WithTerms]
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
        valid: a mask of the time steps that count, instead of lengths: `(batch, time)` in every layout, bool or
            integers 0 and 1, such as an `attention_mask`. It is the inverse of PyTorch's `key_padding_mask`, which is
            true at padding. A change counts if both of its steps count. Other steps count
            in neither sums nor divisors, and their gradient is 0. On the CPU other integers are an error; on other
            devices they count as 1.
        starts: a mask of the time steps at which a segment starts, such as an episode, or a document in a stream:
            `(batch, time)` in every layout, like valid, by itself or beside lengths or valid. The change into such a
            step does not count. The step itself counts in AR and in the change that follows. In reinforcement learning,
            flags that mark the first step of an episode are starts as they are: CleanRL's `dones`, as `dones[step] =
            next_done`, and SB3's `episode_starts`, both floats, so pass `.bool()`. Flags that mark its last step, the
            `terminated | truncated` of the step that ended it, shift by one: `starts[:, 1:] = ended[:, :-1]`. It cannot
            be given with a `PackedSequence`.
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


def penalize(
    activations: Sequence[Any], coefficients: Sequence[Any], selectors: Sequence[Any], options: Options
) -> Any:
    """Compute the penalty of activations, with its terms if they are wanted.

    Args:
        activations: raw and dropped, as `fused_ar_tar` takes them.
        coefficients: alpha and beta.
        selectors: lengths, valid and starts.
        options: the other arguments.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    result = compute(PenaltyPlan, activations, coefficients, selectors, options)
    return _zero(activations, options.measured) if result is None else result


def _zero(activations: Sequence[Any], measured: bool) -> Tensor | ARTAR:
    """Return a penalty of 0 on the device of the activations, if any are given, for a call with both terms off."""
    tensors = [x for layers in map(layers_of, activations) for x in layers if isinstance(x, Tensor)]
    zero = torch.zeros((), dtype=compute_dtype(tensors), device=tensors[0].device if tensors else None)
    return ARTAR(zero, zero.clone(), zero.clone()) if measured else zero


class PenaltyPlan(Plan):
    """Compute the penalty of all layers of a call, and its gradients.

    The tensors of a call are raw and dropped of the first layer, raw and dropped of the second layer, and so on. Each
    is `None` if no term reads it; dropped is also `None` if AR is the mean square of raw.

    Args:
        inputs: raw, dropped, alpha, beta, lengths, valid and starts.
        options: the other arguments of the call.
        is_kept: as for `Plan`.

    Attributes:
        layers: a `Layer` for each layer.
    """

    def __init__(self, inputs: Sequence[Any], options: Options, is_kept: bool) -> None:
        raw, dropped, alpha, beta, *_ = inputs
        check_given("raw", raw, is_on(beta), "beta")
        check_given("dropped", dropped, is_on(alpha), "alpha")
        super().__init__((raw, dropped), inputs[2:], options, is_kept)
        self.predicts = options.predicts

    @staticmethod
    def read(first: Any, second: Any, alpha: Coefficient, beta: Coefficient, options: Options) -> Sequence[Any]:
        """Return raw and dropped, with `None` for a tensor that no term reads."""
        if options.measured or options.ar_of_raw:
            return first, second
        return first if is_on(beta) else None, second if is_on(alpha) else None

    def tensors_of(self, first: Any, second: Any) -> Sequence[Any]:
        """Return raw and dropped of each layer."""
        if type(first) is Tensor and type(second) is Tensor and second is not first:
            return first, second
        layers = zip_longest(self.terms, layers_of(first), layers_of(second))
        return [plain(x) for terms, *pair in layers for x in (pair[0], None if terms.ar_of_raw else pair[1])]

    def formula(self, values: Values, *tensors: Any) -> Sequence[Any]:
        """Compute the penalty and its terms in plain PyTorch; leave layers without tensors out."""
        calls = [call for call in calls_of(tensors, values, self.terms) if call.present() is not None]
        return (by_formula(calls),)

    def prepare(self, tensors: Sequence[Any], values: Values) -> None:
        """Prepare the launches of each layer. Layers of the same kind share them."""
        # Where hooks pack saved tensors away, memory matters more than time.
        predicts = self.predicts and hooks_on_saved(False) is None
        kinds: dict[Any, Layer] = {}
        self.layers: list[Layer] = []
        for call in calls_of(tensors, values, self.terms):
            kind = call.terms, *(layout_of(x) and (layout_of(x), x.requires_grad) for x in (call.raw, call.dropped))
            if kind not in kinds:
                kinds[kind] = Layer(call, self.backend, predicts)
            self.layers.append(kinds[kind])
        self.needs = self.saves = [need for layer in self.layers for need in layer.needs]

    def launch(self, values: Values, *tensors: Any) -> tuple[Any, Any]:
        """Launch the forward of each layer; return the penalty, with the terms if they are wanted; and predictions."""
        penalty: Any = None
        terms: Any = None
        predictions: list[Prediction] = []
        for layer, raw, dropped in zip(self.layers, tensors[::2], tensors[1::2], strict=True):
            sums, prediction = layer(raw, dropped, values)
            predictions.append(prediction)
            penalty = sums.penalty if penalty is None else penalty + sums.penalty
            terms = sums.terms if terms is None else terms + sums.terms
        return penalty if terms is None else (penalty, terms), predictions

    def differentiate(self, upstream: Sequence[Any], saved: Sequence[Any], values: Values, predictions: Any) -> Any:
        """Launch the backward of each layer that has saved a tensor; return the gradients of raw and dropped."""
        (grad,), predictions = upstream, predictions or [NOTHING] * len(self.layers)
        if len(self.layers) == 1:
            return self.layers[0].differentiate(grad, saved[0], saved[1], values, predictions[0])
        gradients: list[Tensor | None] = []
        for layer, raw, dropped, prediction in zip(self.layers, saved[::2], saved[1::2], predictions, strict=False):
            is_saved = True in layer.needs
            gradients += layer.differentiate(grad, raw, dropped, values, prediction) if is_saved else (None, None)
        return gradients


def calls_of(tensors: Sequence[Any], values: Values, terms: Sequence[Terms]) -> Sequence[Call]:
    """Return a call for each layer."""
    layers = zip(tensors[::2], tensors[1::2], terms, strict=False)
    return [Call(raw, dropped, *values, of_layer) for raw, dropped, of_layer in layers]


def by_formula(calls: Sequence[Call]) -> ARTAR:
    """Compute the penalty of the layers of a call, and its terms, in plain PyTorch."""
    penalty, ar, tar = reduce(lambda x, y: ARTAR(*map(torch.add, x, y)), map(ar_tar, calls))
    return ARTAR(penalty, ar.detach(), tar.detach())


class Prediction(NamedTuple):
    """Hold the upstream gradient that a forward has expected, and the gradients that it has written for it.

    The expected upstream gradient is the one of the plan's last backward; the backend keeps it, and compares it with
    the true one. If they are the same, to the bit, the predicted gradients are right. Otherwise the backward writes the
    gradients anew, over the predicted ones.

    expected      the expected upstream gradient, as the backend compares it; `None` if nothing was predicted
    grad_raw      the gradient of raw; `None` if raw needs none
    grad_dropped  the gradient of dropped; `None` if dropped needs none
    """

    expected: Any = None
    grad_raw: Tensor | None = None
    grad_dropped: Tensor | None = None


NOTHING = Prediction()


class Layer:
    """Compute the penalty of one layer, and its gradients.

    Args:
        call: a call of this kind.
        backend: the code that runs.
        predicts: whether the forward predicts the gradients.

    Attributes:
        needs: whether raw and dropped need gradients; a term that is only measured has none.
        fold: the fold of raw and dropped.
        gradients: functions that allocate the gradients of raw and dropped.
        predicted: functions that allocate the gradients that the forward writes.
        forward, backward: the launches of the backend; no backward if neither needs a gradient.
    """

    def __init__(self, call: Call, backend: Any, predicts: bool) -> None:
        raw, dropped, terms, enabled = call.raw, call.dropped, call.terms, torch.is_grad_enabled()
        by_raw, by_dropped = terms.by_tar or (terms.by_ar and terms.ar_of_raw), terms.by_ar and not terms.ar_of_raw
        self.needs = enabled and by_raw and raw.requires_grad, enabled and by_dropped and dropped.requires_grad
        layouts = layout_of(raw), layout_of(dropped)
        self.fold = Fold((layouts[0], None, None, layouts[1]), terms.time_dim, call.steps)
        written = [self.fold.like(x) if need else None for x, need in zip(layouts, self.needs, strict=True)]
        view, others = self.fold.view(written), (terms, call.present().device)
        self.gradients = self.predicted = [*map(allocator, written, layouts)]
        if not predicts:
            self.predicted = nothing, nothing
        self.forward = backend.forward(view if predicts else self.fold.view((None, None)), *others)
        expected = self.forward.expected
        self.backward: Any = backend.backward(view, *others, expected) if True in self.needs else None

    def __call__(self, raw: Any, dropped: Any, values: Values) -> tuple[Sums, Prediction]:
        """Launch the forward."""
        first, second = self.predicted
        grad_raw, grad_dropped = first(raw), second(dropped)
        operands = self.fold.readable((raw, None, None, dropped))
        sums = self.forward((*operands, grad_raw, grad_dropped), values)
        return sums, Prediction(sums.expected, grad_raw, grad_dropped)

    def differentiate(
        self, grad: Tensor, raw: Any, dropped: Any, values: Values, prediction: Prediction
    ) -> Sequence[Any]:
        """Launch the backward over the predicted gradients, or over new memory; return the gradients."""
        expected, *gradients = prediction
        if expected is None:
            first, second = self.gradients
            gradients = [first(raw), second(dropped)]
        elif self.fold.copies and self.backward.is_expected(grad, expected):
            return gradients  # without copying anything
        self.backward(grad, (*self.fold.readable((raw, None, None, dropped)), *gradients), values, expected)
        return gradients
