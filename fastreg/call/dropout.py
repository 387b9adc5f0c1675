"""`fused_dropout_ar_tar`: from the arguments to the launch, and back to the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from fastreg.call.arguments import check_flags, check_mask, check_probability, check_tensor
from fastreg.call.operation import Plan, compute
from fastreg.call.penalty import penalize
from fastreg.call.problem import ARTAR, Coefficient, NoTerms, Options, WithTerms
from fastreg.call.reference import ar_tar
from fastreg.call.selectors import Selectors, selectors_of
from fastreg.call.torch_state import keepable, plain
from fastreg.kernels.view import Values, allocator, layout_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

BACKWARDS = 16  # backwards that a plan keeps: for layouts of dropped's gradient, with and without the penalty's


class DropChoices(TypedDict, total=False):
    """Name the options that only this operation has, for type checkers."""

    training: bool
    mask: Tensor | None


class DropNoTerms(DropChoices, NoTerms):
    """Name the options of a call that returns no terms."""


class DropWithTerms(DropChoices, WithTerms):
    """Name the options of a call that returns its terms."""


@overload
def fused_dropout_ar_tar(
    raw: Tensor, p: float, alpha: Coefficient, beta: Coefficient, **options: Unpack[DropNoTerms]
) -> tuple[Tensor, Tensor]: ...
@overload
def fused_dropout_ar_tar(
    raw: Tensor, p: float, alpha: Coefficient, beta: Coefficient, **options: Unpack[DropWithTerms]
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
        batch_first: `False` for `(time, batch, hidden)`; `None` means `True`.
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
    selectors, options = selectors_of(lengths, valid, starts), Options(batch_first, time_dim, reduction, return_terms)
    return drop_and_penalize(raw, (alpha, beta), selectors, options, Drop(p, mask, training))


class Drop(NamedTuple):
    """Say how units are dropped.

    p, mask, training  as for `fused_dropout_ar_tar`
    """

    p: Any
    mask: Any = None
    training: bool = True


def drop_and_penalize(
    raw: Any, coefficients: Sequence[Any], selectors: Selectors | None, options: Options, drop: Drop
) -> tuple[Tensor, Any]:
    """Apply a dropout mask to raw, and compute the penalty of one layer.

    Args:
        raw: as `fused_dropout_ar_tar` takes it.
        coefficients: alpha and beta.
        selectors: the selectors of the call, or `None` if all time steps count.
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
        return raw, penalize((raw, raw), coefficients, selectors, options)
    if mask is not None:  # before the key: a copy may have other metadata
        mask = keepable(plain(check_tensor("mask", mask)))
    activations = raw, float(p) if mask is None else mask
    return compute(DropoutPlan, activations, coefficients, selectors, options)


class DropoutPlan(Plan):
    """Drop units of one layer, and compute its penalty and the gradient of raw. Nothing is predicted.

    The tensors of a call are raw and the mask.

    Args:
        inputs: raw, the mask or the probability to drop a unit, alpha and beta.
        options: the other arguments of the call.
        is_kept: as for `Plan`.

    Attributes:
        row: the shape of a mask with one row for all time steps.
        allocate: a function that allocates dropped, or the gradient of raw.
        forward: the forward of the backend.
        backwards: a backward of the backend for each kind of upstream gradients.
    """

    def __init__(self, inputs: Sequence[Any], options: Options, is_kept: bool) -> None:
        raw, mask, *others = inputs
        super().__init__((raw, None), others, options, is_kept)
        self.row = list(raw.shape)
        self.row[self.spec.time_dim] = 1
        if isinstance(mask, Tensor):
            check_mask(mask, raw, self.row)

    def tensors_of(self, first: Any, second: Any) -> Sequence[Any]:
        """Return raw and the mask; a mask that is drawn is drawn as by fastai's `RNNDropout`."""
        if isinstance(second, Tensor):
            return first, second
        return first, first.new_empty(self.row).bernoulli_(1 - second).div_(1 - second)

    def formula(self, values: Values, *tensors: Any) -> Sequence[Any]:
        """Compute dropped, and the penalty and its terms, in plain PyTorch."""
        raw, mask = tensors
        dropped = raw * mask
        if dropped.dtype != mask.dtype:  # in a backward, which rounds dropped as the forward did, and no gradient
            dropped = dropped + (dropped.to(mask.dtype) - dropped).detach()
        return dropped, ar_tar(raw, dropped, values, self.spec)

    def prepare(self, tensors: Sequence[Any], layouts: Sequence[Any]) -> None:
        """Prepare the launch of the forward. The launches of a backward depend on its upstream gradients."""
        raw, self.operands, self.backwards = tensors[0], layouts, {}
        self.needs, self.saves = [torch.is_grad_enabled() and raw.requires_grad, False], [True, True]
        self.written = self.fold.dense(layouts[0])
        self.allocate = allocator(self.written, layouts[0])
        view = self.fold.view(*layouts, None, self.written, None, None)
        self.forward = self.backend.forward(view, self.spec, raw.device)

    def launch(self, values: Values, *tensors: Any) -> tuple[Any, Any]:
        """Launch the forward; return dropped and the penalty, with the terms if they are wanted; and no gradients."""
        dropped = self.allocate(tensors[0])
        penalty, terms, _ = self.forward((*tensors, None, dropped, None, None), values)
        return (dropped, penalty) if terms is None else (dropped, penalty, terms), None

    def differentiate(self, upstream: Sequence[Any], saved: Sequence[Any], values: Values, ahead: Any) -> Any:
        """Launch the backward for the upstream gradients of dropped and of the penalty; return the gradient of raw."""
        (arrived, grad), (raw, mask), gradient = upstream, saved, self.allocate(saved[0])
        key = None if arrived is None else (arrived.stride(), arrived.data_ptr() % 16 == 0), grad is None
        launch = self.backwards.get(key)
        if launch is None:
            if arrived is not None and not self.fold.fits(arrived.stride()):
                return self.differentiate((self.allocate(raw).copy_(arrived), grad), saved, values, None)
            spec = self.spec if grad is not None else self.spec._replace(by_ar=False, by_tar=False)
            view = self.fold.view(*self.operands, layout_of(arrived), None, self.written, None)
            launch = self.backend.backward(view, spec, raw.device)
            if len(self.backwards) < BACKWARDS:
                self.backwards[key] = launch
        launch(grad, (raw, mask, arrived, None, gradient, None), values)
        return gradient, None
