"""`fused_dropout_ar_tar` and its module: what they check, what they launch, what the gradient is."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastreg import cpu, cpu_dropout
from fastreg.layout import (
    canonical,
    check_coefficient,
    check_flags,
    check_mask,
    check_probability,
    check_reduction,
    check_steps,
    check_tensor,
    plain,
)
from fastreg.penalty import RUNNERS, empty_like, factors, fusable, fused_ar_tar, known_divisors
from fastreg.reference import ARTAR, Steps, ar_tar_gradients, time_dim


@overload
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: float,
    beta: float,
    *,
    training: bool = ...,
    mask: Tensor | None = ...,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: float,
    beta: float,
    *,
    training: bool = ...,
    mask: Tensor | None = ...,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, ARTAR]: ...
def fused_dropout_ar_tar(
    raw: Tensor,
    p: float,
    alpha: float,
    beta: float,
    *,
    training: bool = True,
    mask: Tensor | None = None,
    batch_first: bool = True,
    lengths: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    return_terms: bool = False,
) -> tuple[Tensor, Tensor | ARTAR]:
    """Variational dropout of `raw`, and the penalty of `raw` and what is left of it, in the same pass.

    Variational (locked) dropout drops a unit of a sequence at all its time steps: Gal and Ghahramani, "A
    Theoretically Grounded Application of Dropout in Recurrent Neural Networks" (2016). The mask is drawn from
    torch's generator as fastai's `RNNDropout` draws it, so that one seed gives both the same. The penalty is
    that of `fused_ar_tar`.

    Args:
        raw: the RNN's output: `(batch, time, hidden)`, or `(time, hidden)` for one sequence; float16, bfloat16,
            float32 or float64, any strides.
        p: the probability to drop a unit, from 0 to below 1.
        alpha: coefficient of AR, finite and not negative.
        beta: coefficient of TAR, finite and not negative.
        training: with `False`, as with `p == 0` and no mask, nothing is dropped, and dropped is `raw` itself.
        mask: a mask to use instead of drawing one, already scaled by `1 / (1 - p)`: `(batch, 1, hidden)` (with
            `batch_first=False` `(1, batch, hidden)`), or of raw's shape; of raw's dtype and on its device. It
            gets no gradient.
        batch_first: `False` for `(time, batch, hidden)`.
        lengths: of padded sequences, how many time steps each has, as for `fused_ar_tar`. Padding is dropped out like
            all the rest, but counts in neither term.
        reduction: `"mean"` divides AR by the number of elements and TAR by that of changes, padding not counted;
            `"sum"` does not divide.
        return_terms: also give the two terms.

    Returns:
        dropped, of raw's shape and dtype, and the penalty, 0-dim, float32 or for float64 inputs float64; with
        `return_terms=True` an `ARTAR(penalty, ar, tar)` in its place.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_flags(training=training, batch_first=batch_first, return_terms=return_terms)
    check_reduction(reduction)
    dropped, results = _drop(raw, p, alpha, beta, training, mask, False, batch_first, lengths, reduction)
    return dropped, results if return_terms else results.penalty


def _drop(
    raw: Tensor,
    p: float,
    alpha: float,
    beta: float,
    training: bool,
    mask: Tensor | None,
    ar_of_raw: bool,
    batch_first: bool,
    lengths: Tensor | None,
    reduction: str,
) -> tuple[Tensor, ARTAR]:
    """What the function and the module do."""
    alpha, beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)
    p = check_probability(p)
    check_tensor("raw", raw)
    if mask is not None:
        mask = check_mask(mask, raw, batch_first)
    steps = check_steps(raw, batch_first, lengths)
    lengths = steps.lengths
    options: Any = {"batch_first": batch_first, "lengths": lengths, "reduction": reduction, "return_terms": True}
    if not training or (p == 0 and mask is None):
        return raw, fused_ar_tar(raw, raw, alpha, beta, **options)
    x, mask = plain(raw), None if mask is None else plain(mask)
    if mask is None:
        shape = list(x.shape)
        shape[time_dim(x, batch_first)] = 1
        mask = x.new_empty(shape).bernoulli_(1 - p).div_(1 - p).expand_as(x)
    if not all(fusable(y) for y in (x, mask, lengths) if y is not None) or x.numel() == 0:
        dropped = x * mask
        return dropped, fused_ar_tar(x, x if ar_of_raw else dropped, alpha, beta, **options)
    if torch.is_grad_enabled() and x.requires_grad:
        arguments = (x, mask, lengths, alpha, beta, ar_of_raw, batch_first, reduction)
        dropped, penalty, terms = _DropoutPenalty.apply(*arguments)
    else:
        dropped, penalty, terms, _ = _forward(x, mask, steps, alpha, beta, ar_of_raw, reduction)
    return dropped, ARTAR(penalty, *terms.unbind())


def _runner(x: Tensor) -> Any:
    """The module whose `forward` and `backward` run where `x` is."""
    if RUNNERS[x.device.type] is cpu:
        return cpu_dropout
    from fastreg.kernels import dropout as kernels

    return kernels


def _forward(
    raw: Tensor, mask: Tensor, steps: Steps, alpha: float, beta: float, ar_of_raw: bool, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Dropped, the penalty, (), ar and tar, (2,), and, where the device found the divisors, one over them, (2,)."""
    _, inputs, _ = canonical((raw, mask), steps)
    assert inputs[0] is not None
    dropped = empty_like(inputs[0])
    sizes, views, strides = canonical((*inputs, dropped), steps)
    divisors = known_divisors(raw, steps, reduction)
    results = _runner(raw).forward(*views, sizes, strides, steps.lengths, alpha, beta, ar_of_raw, divisors)
    return dropped, *results


class _DropoutPenalty(Function):
    """Saves references to raw and to the mask, and two numbers where the divisors come from lengths."""

    @staticmethod
    def forward(
        ctx: Any,
        raw: Tensor,
        mask: Tensor,
        lengths: Tensor | None,
        alpha: float,
        beta: float,
        ar_of_raw: bool,
        batch_first: bool,
        reduction: str,
    ) -> Any:
        steps = Steps(batch_first, lengths)
        dropped, penalty, terms, scales = _forward(raw, mask, steps, alpha, beta, ar_of_raw, reduction)
        ctx.save_for_backward(raw, mask, lengths, scales)
        ctx.options = alpha, beta, ar_of_raw, batch_first, reduction
        ctx.set_materialize_grads(False)  # what has no gradient costs no zeros
        ctx.mark_non_differentiable(terms)
        return dropped, penalty, terms

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_dropped: Tensor | None, grad: Tensor | None, *terms: None
    ) -> Any:
        raw, mask, lengths, scales = ctx.saved_tensors
        alpha, beta, ar_of_raw, batch_first, reduction = ctx.options
        steps = Steps(batch_first, lengths)
        arrived = [x for x in (grad_dropped, grad) if x is not None]
        if not arrived:
            gradient = None
        elif torch.is_grad_enabled() or not all(fusable(x) for x in arrived):  # torch must see the gradient's formula
            gradient = _gradient_formula(grad_dropped, grad, raw, mask, steps, alpha, beta, ar_of_raw, reduction)
        else:
            _, inputs, _ = canonical((raw, mask, grad_dropped), steps)
            assert inputs[0] is not None
            gradient = empty_like(inputs[0])
            sizes, views, strides = canonical((*inputs, gradient), steps)
            scaled = factors(alpha, beta, known_divisors(raw, steps, reduction))
            _runner(raw).backward(grad, *views, sizes, strides, lengths, scales, ar_of_raw, *scaled)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


def _gradient_formula(
    grad_dropped: Tensor | None,
    grad: Tensor | None,
    raw: Tensor,
    mask: Tensor,
    steps: Steps,
    alpha: float,
    beta: float,
    ar_of_raw: bool,
    reduction: str,
) -> Tensor:
    """The gradient of raw in plain PyTorch, itself differentiable in both gradients and in raw."""
    masked, direct = [grad_dropped], []
    if grad is not None and (alpha or beta):
        counted = None if not alpha else raw if ar_of_raw else raw * mask
        tar, ar = ar_tar_gradients(grad, raw if beta else None, counted, False, alpha, beta, steps, reduction)
        direct.append(tar)
        (direct if ar_of_raw else masked).append(ar)
    parts = [x * mask for x in masked if x is not None] + [x for x in direct if x is not None]
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(raw)


class Waiting(NamedTuple):
    """The penalty of a forward, and what it was formed of."""

    terms: ARTAR
    raw: Tensor
    dropped: Tensor
    coefficients: tuple[float, float]


class FusedRNNDropout(nn.Module):
    """Variational dropout that takes AR and TAR along, in the place of fastai's `RNNDropout` or a `LockedDropout`.

    The penalty of the last forward in training waits in the module until `take()`, with its input and output. It is
    part of neither the state dict nor a copy or pickle of the module. Under activation checkpointing use
    `use_reentrant=False`: a reentrant one runs the forward without gradients, and the penalty has none.

    Args:
        p: the probability to drop a unit, from 0 to below 1.
        alpha: coefficient of AR, finite and not negative.
        beta: coefficient of TAR, finite and not negative.
        batch_first: `False` for `(time, batch, hidden)`.
        ar_of: what AR is the mean square of: `"dropped"`, as Merity et al. and fastai v2 have it, or `"raw"`, as
            fastai v1 has it.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. In a forward, as
            `fused_dropout_ar_tar`.
    """

    def __init__(
        self,
        p: float = 0.5,
        alpha: float = 0.0,
        beta: float = 0.0,
        *,
        batch_first: bool = True,
        ar_of: Literal["dropped", "raw"] = "dropped",
    ) -> None:
        super().__init__()
        if ar_of not in ("dropped", "raw"):
            raise ValueError(f"ar_of: expected 'dropped' or 'raw', got {ar_of!r}")
        self.p = check_probability(p)
        self.alpha, self.beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)
        check_flags(batch_first=batch_first)
        self.batch_first, self.ar_of = batch_first, ar_of
        self._waiting: Waiting | None = None
        self._lent: tuple[float, float] | None = None  # coefficients of a regularizer, for one forward

    def forward(self, raw: Tensor) -> Tensor:
        """Drop units of `raw`, `(batch, time, hidden)`, in training; give `raw` itself in evaluation."""
        coefficients = self._lent or (self.alpha, self.beta)
        self._waiting = self._lent = None
        if not self.training:
            return raw
        options = self.ar_of == "raw", self.batch_first, None, "mean"
        dropped, terms = _drop(raw, self.p, *coefficients, True, None, *options)
        # Inside a backward checkpointing recomputes. torch.compile cannot ask, and refuses to checkpoint this module.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._waiting = Waiting(terms, raw, dropped, coefficients)
        return dropped

    def take(self) -> ARTAR | None:
        """Hand out the penalty of the last forward, once; `None` if there is none or that was in evaluation."""
        waiting, self._waiting = self._waiting, None
        return None if waiting is None else waiting.terms

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        extra = [] if self.batch_first else ["batch_first=False"]
        extra += [] if self.ar_of == "dropped" else [f"ar_of={self.ar_of!r}"]
        return ", ".join([f"p={self.p:g}, alpha={self.alpha:g}, beta={self.beta:g}", *extra])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": None, "_lent": None}
