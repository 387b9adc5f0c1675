"""`fused_dropout_ar_tar`: from the arguments to the launch, and back to the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import dropout

from fastreg.call.arguments import (
    axis_of,
    check_flag,
    check_locked,
    check_mask,
    check_pair,
    check_probability,
    check_tensor,
)
from fastreg.call.fold import Fold, fold_of
from fastreg.call.operation import compute
from fastreg.call.penalty import penalize
from fastreg.call.plan import Gradients, Inputs, Pair, Plan, Results
from fastreg.call.problem import ARTAR, Choices, Coefficient, Options, Penalty
from fastreg.call.reference import ar_tar
from fastreg.call.steps import GivenSteps, given_steps
from fastreg.call.torch_state import keepable, plain
from fastreg.kernels.backend import Backend, Backward
from fastreg.kernels.view import Layout, Operand, Operands, Tensors, Values, allocator, layout_of, memory

if TYPE_CHECKING:
    from typing_extensions import Unpack

BACKWARDS = 16  # backwards that a plan keeps: for layouts of dropped's gradient, with and without the penalty's


class DropChoices(Choices, total=False):
    """Name the options that only this operation has, too."""

    training: bool
    mask: Tensor | None
    locked: bool


@overload
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    return_terms: Literal[False] = False,
    **options: Unpack[DropChoices],
) -> tuple[Tensor, Tensor]: ...
@overload
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    return_terms: Literal[True],
    **options: Unpack[DropChoices],
) -> tuple[Tensor, ARTAR]: ...
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: Coefficient,
    beta: Coefficient,
    *,
    training: bool = True,
    mask: Tensor | None = None,
    locked: bool = True,
    batch_first: bool | None = None,
    time_dim: int | None = None,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    return_terms: bool = False,
) -> tuple[Tensor, Tensor | ARTAR]:
    """Apply dropout to `raw`, and compute the penalty of `raw` and `dropped` in the same pass.

    Variational (locked) dropout drops a unit of a sequence at all its time steps: Gal and Ghahramani, "A
    Theoretically Grounded Application of Dropout in Recurrent Neural Networks" (2016). fastai's `RNNDropout` draws the
    same mask from the same seed. `fused_ar_tar` describes the penalty.

    With `locked=False` each element is dropped by itself, as by `torch.nn.Dropout`. Kernels draw the mask of a call
    from one seed, by Philox4x32 with 7 rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), and
    keep it in no memory. The seed is of PyTorch's default generator of the device. p is rounded to `n / 65536`, and
    what is kept is scaled by `65536 / (65536 - n)`. A seed of PyTorch gives another mask than `torch.nn.Dropout`
    draws. Where the formula runs, such as under `torch.compile`, PyTorch's own dropout draws the mask.

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
        locked: `False` drops each element by itself, instead of a unit at all time steps; not with a mask.
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
        check_flag("training", training)
    if locked is not True:
        check_locked(locked, mask)
    steps, options = given_steps(lengths, valid, starts), Options(batch_first, time_dim, reduction, return_terms)
    dropped, penalty = drop_and_penalize(raw, (alpha, beta), steps, options, Drop(p, mask, training, locked))
    return dropped, penalty.split() if return_terms else penalty.value


class Drop(NamedTuple):
    """Say how units or elements are dropped.

    p, mask, training, locked  as for `fused_dropout_ar_tar`
    """

    p: float
    mask: Tensor | None = None
    training: bool = True
    locked: bool = True


def drop_and_penalize(
    raw: Tensor, coefficients: Sequence[Coefficient], steps: GivenSteps | None, options: Options, drop: Drop
) -> tuple[Tensor, Penalty]:
    """Apply dropout to raw, and compute the penalty of one layer.

    Args:
        raw: as `fused_dropout_ar_tar` takes it.
        coefficients: alpha and beta.
        steps: the steps that the call counts, or `None` if it counts all.
        options: the other arguments of the penalty.
        drop: the arguments of the dropout.

    Returns:
        dropped, or raw itself if nothing is dropped; and the penalty.

    Raises:
        TypeError, ValueError: as `fused_dropout_ar_tar`.
    """
    p, mask, training, locked = drop
    if type(p) is not float or not 0 <= p < 1:
        check_probability(p)
    if not isinstance(raw, Tensor):
        check_tensor("raw", raw)
    if not training or (mask is None and p == 0):
        return raw, penalize((raw, raw), coefficients, steps, options)
    results: Any
    if not locked:
        results = compute(SeededPlan, (raw, p if type(p) is float else float(p)), coefficients, steps, options)
        return results[0][0], results[1]
    mask = drawn_mask(raw, p, options) if mask is None else check_tensor("mask", mask)
    mask = keepable(plain(mask))  # before the key: a copy may have other metadata
    results = compute(DropoutPlan, (raw, mask), coefficients, steps, options)
    return results[0][0], results[1]


def drawn_mask(raw: Tensor, p: float, options: Options) -> Tensor:
    """Draw a mask with one row for all time steps, as fastai's `RNNDropout` draws it."""
    axis = axis_of(options.batch_first, options.time_dim)
    check_pair(raw, None, options.time_dim, None)
    row = [*raw.shape]
    row[axis] = 1
    return raw.new_empty(row).bernoulli_(1 - p).div_(1 - p)


class DropoutPlan(Plan):
    """Drop units of one layer by a mask, and compute its penalty and the gradient of raw.

    The tensors of a call are raw and the mask.

    Attributes:
        allocate: a function that allocates dropped, or the gradient of raw.
        raw, mask, written: the layouts of raw, of the mask, and of dropped or the gradient of raw.
        forward: the launch of the forward.
        backward_of: a function of the backend that prepares the launch of a backward.
        backwards: the launches of backwards, one for each kind of upstream gradients.
    """

    def __init__(self, inputs: Inputs, options: Options, layer: int | None) -> None:
        raw, mask, alpha, beta = inputs
        super().__init__((raw, None, alpha, beta), options, layer)
        self.backwards: dict[object, Backward] = {}
        if isinstance(mask, Tensor):
            row = [*self.shape]
            row[self.time_dim] = 1
            check_mask(mask, raw, row)  # pyright: ignore[reportArgumentType]

    def formula(self, values: Values, tensors: Any) -> Results:
        """Compute dropped, and the penalty and its terms, in plain PyTorch."""
        raw, mask = tensors
        dropped = raw * mask
        if dropped.dtype != mask.dtype:  # in a backward, which rounds dropped as the forward did, and no gradient
            dropped = dropped + (dropped.to(mask.dtype) - dropped).detach()
        return [dropped], ar_tar(raw, dropped, values, self.spec, self.time_dim)

    def prepare(self, backend: Backend, tensors: Any, layouts: Any) -> None:
        """Prepare the launch of the forward. The launches of a backward depend on its upstream gradients."""
        self.needs, self.saves_all = (torch.is_grad_enabled() and tensors[0].requires_grad, False), True
        (self.raw, self.mask), fold = layouts, self.fold
        self.written = fold.dense(self.raw)
        self.allocate, of = allocator(self.written, self.raw), fold.operand
        view = fold.view(Operands(raw=of(self.raw), mask=self.mask_operand(fold), dropped=of(self.written)))
        self.forward, self.backward_of = backend.forward(view, self.spec, self.device), backend.backward

    def mask_operand(self, fold: Fold) -> Operand | None:
        """Describe the mask."""
        return fold.operand(self.mask)

    def launch(self, values: Values, tensors: Any) -> tuple[Tensor, ...]:
        """Launch the forward; return dropped, the penalty, and the terms if they are wanted."""
        raw, mask = tensors
        dropped = self.allocate(raw)
        penalty, terms = self.forward(Tensors(raw=raw, mask=mask, dropped=dropped), values)
        return (dropped, penalty) if terms is None else (dropped, penalty, terms)

    def backward(self, of_dropped: Layout | None, of_penalty: bool, is_whole: bool) -> Backward | None:
        """Prepare the launch of a backward.

        Args:
            of_dropped: the layout of the upstream gradient of dropped, if there is one.
            of_penalty: whether the penalty has an upstream gradient.
            is_whole: whether all time steps count.

        Returns:
            The launch, or `None` if kernels cannot read the upstream gradient in place.
        """
        fold = self.fold
        if of_dropped is not None and not fold.fits(of_dropped.stride):
            # The raw of an nn.LSTM may be time first in memory, and the gradient of a layer behind it batch first.
            layouts = self.raw, self.mask, self.written, of_dropped
            fold, fits = fold_of(layouts, self.time_dim, is_whole, self.is_in_order)
            if not fits:
                return None
        of = fold.operand
        tensors = {"raw": of(self.raw), "mask": self.mask_operand(fold), "upstream_dropped": of(of_dropped)}
        view = fold.view(Operands(**tensors, grad_raw=of(self.written)))
        spec = self.spec if of_penalty else self.spec._replace(by_ar=False, by_tar=False)
        return self.backward_of(view, spec, self.device)

    def differentiate(self, upstream: Gradients, saved: Any, values: Values) -> Gradients:
        """Launch the backward for the upstream gradients of dropped and of the penalty; return the gradient of raw."""
        (of_dropped, of_penalty), (raw, mask) = upstream, saved
        key = None if of_dropped is None else (of_dropped.stride(), of_dropped.data_ptr() % 16 == 0), of_penalty is None
        launch = self.backwards.get(key)
        if launch is None:
            given = None if of_dropped is None else layout_of(of_dropped)
            launch = self.backward(given, of_penalty is not None, values.bits is None)
            if launch is None:
                copied = self.allocate(raw).copy_(of_dropped)  # pyright: ignore[reportArgumentType]
                return self.differentiate((copied, of_penalty), saved, values)
            if len(self.backwards) < BACKWARDS:
                self.backwards[key] = launch
        gradient = self.allocate(raw)
        launch(of_penalty, Tensors(raw=raw, mask=mask, upstream_dropped=of_dropped, grad_raw=gradient), values)
        return gradient, None


class SeededPlan(DropoutPlan):
    """Drop elements of one layer, and compute its penalty and the gradient of raw.

    The second activation of a call is the probability to drop an element. Kernels draw the mask from a seed, which is
    the second tensor. Lanes have the order of raw's axes, so that the mask does not depend on strides.

    Attributes:
        ones: a function that allocates a tensor of raw's layout, which shows the mask of a seed.
        seed: a function that allocates a seed.
    """

    is_in_order = True

    def finish(self, tensors: Any, values: Values) -> None:
        """Prepare launches, for the tensors and the values of the first call, unless the formula computes the calls."""
        self.seed = memory((), torch.int64, self.device)
        super().finish((tensors[0], self.seed()), values)  # a seed that is not drawn, so that a hit draws the same

    @staticmethod
    def layouts(tensors: Pair, shape: Sequence[int]) -> list[Layout | None]:
        """Return the layout of raw; the seed has none."""
        return Plan.layouts((tensors[0], None), shape)

    @staticmethod
    def moved(mover: Fold, tensors: Pair) -> Pair:
        """Return raw as kernels can read it, and the seed."""
        return mover.moved(tensors[0]), tensors[1]

    def mask_operand(self, fold: Fold) -> Operand | None:
        """Describe the seed."""
        return Operand(torch.int64, 0, 0)

    def prepare(self, backend: Backend, tensors: Any, layouts: Any) -> None:
        """Prepare the launch of the forward. The launches of a backward depend on its upstream gradients."""
        super().prepare(backend, tensors, layouts)
        self.ones = allocator(layouts[0])

    def __call__(self, tensors: Any, values: Values) -> Results:
        """Compute a call, and return its results."""
        raw, p = tensors
        if self.backend is None:
            dropped = dropout(raw, p)
            return [dropped], ar_tar(raw, dropped, values, self.spec, self.time_dim)
        values = values._replace(threshold=min(round(p * 65536), 65535))
        return super().__call__((raw, self.seed().random_()), values)

    def formula(self, values: Values, tensors: Any) -> Results:
        """Compute dropped by the mask of a forward, and the penalty and its terms, in plain PyTorch."""
        raw, seed = tensors
        seed = self.seed().copy_(seed)  # a hook on saved tensors may have moved it
        mask, *_ = self.launch(values, (self.ones().fill_(1), seed))
        return super().formula(values, (raw, mask))
