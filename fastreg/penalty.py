"""`fused_ar_tar`: what it checks, what it launches, what its gradient is."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from fastreg import cpu
from fastreg.layout import (
    canonical,
    check_coefficient,
    check_flags,
    check_layers,
    check_reduction,
    check_steps,
    is_list,
    plain,
    readable,
)
from fastreg.reference import ARTAR, Steps, ar_tar, ar_tar_gradients, compute_dtype, divisors

RUNNERS: dict[str, ModuleType] = {"cpu": cpu}  # device type -> the module whose `forward` and `backward` run there
if find_spec("triton") is not None:  # Triton has no build for some platforms
    from triton import knobs

    from fastreg.kernels import penalty as kernels

    RUNNERS |= dict.fromkeys(("cuda", "xpu"), kernels)
    if knobs.runtime.interpret:
        RUNNERS["cpu"] = kernels

if TYPE_CHECKING:
    One: TypeAlias = Tensor | PackedSequence
    Activations: TypeAlias = One | list[Tensor] | list[PackedSequence] | tuple[One, ...] | None


@overload
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: float,
    beta: float,
    *,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...
@overload
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: float,
    beta: float,
    *,
    batch_first: bool = ...,
    lengths: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    return_terms: Literal[True],
) -> ARTAR: ...
def fused_ar_tar(
    raw: Activations,
    dropped: Activations,
    alpha: float,
    beta: float,
    *,
    batch_first: bool = True,
    lengths: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    return_terms: bool = False,
) -> Tensor | ARTAR:
    """Activation and temporal activation regularization, `alpha * AR + beta * TAR`, to be added to the loss.

    `AR = mean(dropped ** 2)` and `TAR = mean((raw[t + 1] - raw[t]) ** 2)`, after Merity, McCann and Socher,
    "Revisiting Activation Regularization for Language RNNs" (2017). Differences, squares and sums are formed
    in float32, or float64 where an input is float64. One time step has no changes: its TAR is 0. Without any
    elements the penalty is 0. It can be differentiated any number of times.

    Args:
        raw: the RNN's output before dropout: `(batch, time, hidden)`, `(time, hidden)` for one sequence, a
            `PackedSequence`, or a list or tuple of them, one a layer, whose penalties add up. float16, bfloat16,
            float32 or float64, any strides. With `beta == 0` it is not looked at and may be `None`.
        dropped: the RNN's output after dropout, of the same shape, or packed as raw is, and on the same device; its
            dtype may differ, and it may be `raw` itself. With `alpha == 0` it is not looked at and may be `None`.
        alpha: coefficient of AR, finite and not negative.
        beta: coefficient of TAR, finite and not negative.
        batch_first: `False` for `(time, batch, hidden)`.
        lengths: of padded sequences, how many time steps each has: integers, `(batch,)`. What lies behind them counts
            in neither sums nor divisors, and its gradient is 0. Lengths on the CPU must be from 0 to the time steps
            there are; on a device, where looking would have to wait for it, they count as the nearest of those.
        reduction: `"mean"` divides AR by the number of elements and TAR by that of changes, padding not counted;
            `"sum"` does not divide.
        return_terms: also give the two terms.

    Returns:
        The penalty, a 0-dim tensor, float32, or float64 for float64 inputs. With `return_terms=True` an
        `ARTAR(penalty, ar, tar)`, whose `ar` and `tar` are unscaled, detached, and 0 for a term that is off.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    alpha, beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)
    check_flags(batch_first=batch_first, return_terms=return_terms)
    check_reduction(reduction)
    layers = check_layers(raw, dropped, alpha, beta)
    if not layers:  # both terms are off
        zero = _zero_like(raw, dropped)
        return ARTAR(zero, zero.clone(), zero.clone()) if return_terms else zero
    results = [
        _layer(x, y, alpha, beta, check_steps(given(x, y), batch_first, lengths, sizes), reduction, return_terms)
        for x, y, sizes in layers
    ]
    penalty, *terms = results[0]
    for more, *more_terms in results[1:]:
        penalty = penalty + more
        terms = [a + b for a, b in zip(terms, more_terms, strict=True)]
    return ARTAR(penalty, *terms) if return_terms else penalty


def _zero_like(*given: Any) -> Tensor:
    """0 where the activations are, if any were given at all."""
    layers = [x for value in given for x in (value if is_list(value) else [value])]
    tensors = [x.data if isinstance(x, PackedSequence) else x for x in layers]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    return torch.zeros((), dtype=compute_dtype(*tensors), device=tensors[0].device if tensors else None)


def _layer(
    raw: Tensor | None,
    dropped: Tensor | None,
    alpha: float,
    beta: float,
    steps: Steps,
    reduction: str,
    return_terms: bool,
) -> tuple[Tensor, ...]:
    """The penalty of one layer, and its terms if asked for. A tensor that is `None` is a term that is off."""
    same = raw is dropped
    raw = None if raw is None else plain(raw)
    dropped = raw if same else None if dropped is None else plain(dropped)
    x = given(raw, dropped)
    others = [y for y in (dropped, steps.lengths, steps.batch_sizes) if y is not None]
    if not (fusable(x) and all(map(readable, others))) or x.numel() == 0:
        penalty, ar, tar = ar_tar(raw, dropped, alpha, beta, steps, reduction)
        return (penalty, ar.detach(), tar.detach()) if return_terms else (penalty,)
    dropped = None if same else dropped
    options = same, alpha, beta, steps.batch_first, reduction
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (raw, dropped)):
        penalty, terms = _Penalty.apply(raw, dropped, steps.lengths, steps.batch_sizes, *options)
    else:
        penalty, terms, _ = _forward(raw, dropped, steps, same, alpha, beta, reduction)
    return (penalty, terms[0], terms[1]) if return_terms else (penalty,)


def given(*tensors: Tensor | None) -> Tensor:
    """The first that is there."""
    return next(x for x in tensors if x is not None)


def fusable(x: Tensor) -> bool:
    """Whether `x` is memory that a kernel can read now; else it is for the formula, which torch sees through."""
    return readable(x) and x.device.type in RUNNERS


def known_divisors(x: Tensor, steps: Steps, reduction: str) -> tuple[int, int] | None:
    """What the sums are divided by, as far as it is known here; lengths are for the device to add up."""
    if reduction == "mean" and steps.lengths is not None:
        return None
    elements, pairs = divisors(x, steps, reduction)
    return int(elements), int(pairs)


def factors(alpha: float, beta: float, divisors: tuple[int, int] | None) -> tuple[float, float]:
    """What the gradients of the sums are multiplied by, but for the incoming one."""
    elements, pairs = divisors or (1, 1)
    return 2 * alpha / elements, 2 * beta / pairs


def _forward(
    raw: Tensor | None, dropped: Tensor | None, steps: Steps, same: bool, alpha: float, beta: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The penalty, (), ar and tar, (2,), and, where the device found the divisors, one over them, (2,)."""
    x = given(raw, dropped)
    sizes, (raw, dropped), strides = canonical((raw, dropped), steps)
    _, lengths, batch_sizes = steps
    divisors = known_divisors(x, steps, reduction)
    forward = RUNNERS[x.device.type].forward
    return forward(raw, dropped, same, sizes, strides, lengths, batch_sizes, alpha, beta, divisors)


class _Penalty(Function):
    """Saves references to the inputs that need gradients, and two numbers where the divisors come from lengths.

    With `same`, raw is dropped as well, and dropped is None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        raw: Tensor | None,
        dropped: Tensor | None,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        same: bool,
        alpha: float,
        beta: float,
        batch_first: bool,
        reduction: str,
    ) -> Any:
        steps = Steps(batch_first, lengths, batch_sizes)
        penalty, terms, scales = _forward(raw, dropped, steps, same, alpha, beta, reduction)
        need_raw, need_dropped = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            raw if need_raw else None, dropped if need_dropped else None, lengths, batch_sizes, scales
        )
        ctx.options = batch_first, same, alpha, beta, reduction
        ctx.set_materialize_grads(False)  # the terms get no gradients: no zeros in their place
        ctx.mark_non_differentiable(terms)
        return penalty, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        raw, dropped, lengths, batch_sizes, scales = ctx.saved_tensors
        batch_first, same, alpha, beta, reduction = ctx.options
        steps = Steps(batch_first, lengths, batch_sizes)
        if torch.is_grad_enabled() or not fusable(grad):  # torch must see the gradient's formula
            gradients = ar_tar_gradients(grad, raw, dropped, same, alpha, beta, steps, reduction)
        else:
            gradients = _backward(grad, raw, dropped, steps, scales, same, alpha, beta, reduction)
        return *gradients, *[None] * (len(ctx.needs_input_grad) - 2)


def _backward(
    grad: Tensor,
    raw: Tensor | None,
    dropped: Tensor | None,
    steps: Steps,
    scales: Tensor | None,
    same: bool,
    alpha: float,
    beta: float,
    reduction: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the tensors that are not None."""
    x = given(raw, dropped)
    outputs = [None if x is None else empty_like(x) for x in (raw, dropped)]
    sizes, views, strides = canonical((raw, dropped, *outputs), steps)
    _, lengths, batch_sizes = steps
    scaled = factors(alpha, beta, known_divisors(x, steps, reduction))
    backward = RUNNERS[x.device.type].backward
    backward(grad, *views, same, sizes, strides, lengths, batch_sizes, scales, *scaled)
    return outputs[0], outputs[1]


def empty_like(x: Tensor) -> Tensor:
    """Memory like that of `x`, in the order of its axes as long as the hidden axis is the innermost."""
    filled = torch.are_deterministic_algorithms_enabled()  # a pass over memory for nothing: all of it gets written
    like = torch.empty_like(x, device="meta" if filled else x.device)
    if like.stride(-1) != 1 and x.shape[-1] != 1:
        like = torch.empty_like(like, memory_format=torch.contiguous_format)
    if not filled:
        return like
    storage = torch.UntypedStorage(like.nbytes, device=x.device)  # which is never filled
    return x.new_empty(0).set_(storage, 0, like.shape, like.stride())
