"""`fused_ar_tar`: what it checks, what it launches, what its gradient is."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastreg import cpu
from fastreg.layout import canonical, check_coefficient, check_layers, check_options
from fastreg.reference import ARTAR, ar_tar, ar_tar_gradients, compute_dtype, divisors

RUNNERS: dict[str, ModuleType] = {"cpu": cpu}  # device type -> the module whose `forward` and `backward` run there
if find_spec("triton") is not None:  # Triton has no build for some platforms
    from triton import knobs

    from fastreg.kernels import penalty as kernels

    RUNNERS |= dict.fromkeys(("cuda", "xpu"), kernels)
    if knobs.runtime.interpret:
        RUNNERS["cpu"] = kernels

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence

    Activations: TypeAlias = Tensor | PackedSequence | list[Tensor] | tuple[Tensor, ...] | None


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
        raw: the RNN's output before dropout: `(batch, time, hidden)`, `(time, hidden)` for one sequence, or a
            list or tuple of such tensors, one a layer, whose penalties add up. float16, bfloat16, float32 or
            float64, any strides. With `beta == 0` it is not looked at and may be `None`.
        dropped: the RNN's output after dropout, of the same shape and on the same device; its dtype may differ,
            and it may be `raw` itself. With `alpha == 0` it is not looked at and may be `None`.
        alpha: coefficient of AR, finite and not negative.
        beta: coefficient of TAR, finite and not negative.
        batch_first: `False` for `(time, batch, hidden)`.
        lengths: reserved for padded batches; only `None` so far.
        reduction: `"mean"` divides AR by the number of elements and TAR by that of changes; `"sum"` does not.
        return_terms: also give the two terms.

    Returns:
        The penalty, a 0-dim tensor, float32, or float64 for float64 inputs. With `return_terms=True` an
        `ARTAR(penalty, ar, tar)`, whose `ar` and `tar` are unscaled, detached, and 0 for a term that is off.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        NotImplementedError: for `lengths` and `PackedSequence`.
    """
    alpha, beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)
    check_options(batch_first, lengths, reduction, return_terms)
    layers = check_layers(raw, dropped, alpha, beta)
    if not layers:  # both terms are off
        zero = _zero_like(raw, dropped)
        return ARTAR(zero, zero.clone(), zero.clone()) if return_terms else zero
    results = [_layer(x, y, alpha, beta, batch_first, reduction, return_terms) for x, y in layers]
    penalty, *terms = results[0]
    for more, *more_terms in results[1:]:
        penalty = penalty + more
        terms = [a + b for a, b in zip(terms, more_terms, strict=True)]
    return ARTAR(penalty, *terms) if return_terms else penalty


def _zero_like(*given: Any) -> Tensor:
    """0 where the activations are, if any were given at all."""
    layers = [x for value in given for x in (value if isinstance(value, (list, tuple)) else [value])]
    tensors = [x for x in layers if isinstance(x, Tensor)]
    return torch.zeros((), dtype=compute_dtype(*tensors), device=tensors[0].device if tensors else None)


def _layer(
    raw: Tensor | None,
    dropped: Tensor | None,
    alpha: float,
    beta: float,
    batch_first: bool,
    reduction: str,
    return_terms: bool,
) -> tuple[Tensor, ...]:
    """The penalty of one layer, and its terms if asked for. A tensor that is `None` is a term that is off."""
    same = raw is dropped
    raw = None if raw is None else plain(raw)
    dropped = raw if same else None if dropped is None else plain(dropped)
    x = raw if raw is not None else dropped
    assert x is not None
    if x.numel() == 0 or not fusable(x) or not fusable(dropped if dropped is not None else x):
        penalty, ar, tar = ar_tar(raw, dropped, alpha, beta, batch_first, reduction)
        return (penalty, ar.detach(), tar.detach()) if return_terms else (penalty,)
    arguments = (raw, None if same else dropped, same, alpha, beta, batch_first, reduction, return_terms)
    if torch.is_grad_enabled() and (x.requires_grad or (dropped is not None and dropped.requires_grad)):
        return _Penalty.apply(*arguments)
    return _forward(*arguments)


def plain(x: Tensor) -> Tensor:
    """`x` without a subclass that only decorates it; one with a dispatcher of its own stays as it is."""
    if type(x) is Tensor:
        return x
    dispatches = getattr(type(x), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)
    return x if dispatches else x.as_subclass(Tensor)


def fusable(x: Tensor) -> bool:
    """Whether `x` is memory that a kernel can read now; else it is for the formula, which torch sees through."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and type(x) is Tensor
        and x.device.type in RUNNERS
        and not x.is_neg()
        and torch._C._has_storage(x)
    )


def _forward(
    raw: Tensor | None,
    dropped: Tensor | None,
    same: bool,
    alpha: float,
    beta: float,
    batch_first: bool,
    reduction: str,
    return_terms: bool,
) -> tuple[Tensor, ...]:
    x = raw if raw is not None else dropped
    assert x is not None
    sizes, (raw, dropped), strides = canonical((raw, dropped), batch_first)
    elements, pairs = divisors(x, batch_first, reduction)
    penalty, terms = RUNNERS[x.device.type].forward(raw, dropped, same, sizes, strides, alpha, beta, elements, pairs)
    return (penalty, terms[0], terms[1]) if return_terms else (penalty,)


class _Penalty(Function):
    """Saves references to the inputs that need gradients, nothing else.

    With `same`, raw is dropped as well, and dropped is None.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor | None, dropped: Tensor | None, *options: Any) -> Any:
        need_raw, need_dropped = ctx.needs_input_grad[:2]
        ctx.save_for_backward(raw if need_raw else None, dropped if need_dropped else None)
        ctx.options = options
        ctx.set_materialize_grads(False)  # the terms get no gradients: no zeros in their place
        results = _forward(raw, dropped, *options)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        raw, dropped = ctx.saved_tensors
        same, alpha, beta, batch_first, reduction, _ = ctx.options
        if torch.is_grad_enabled() or not fusable(grad):  # torch must see the gradient's formula
            gradients = ar_tar_gradients(grad, raw, dropped, same, alpha, beta, batch_first, reduction)
        else:
            gradients = _backward(grad, raw, dropped, same, alpha, beta, batch_first, reduction)
        return *gradients, *[None] * len(ctx.options)


def _backward(
    grad: Tensor,
    raw: Tensor | None,
    dropped: Tensor | None,
    same: bool,
    alpha: float,
    beta: float,
    batch_first: bool,
    reduction: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the tensors that are not None."""
    x = raw if raw is not None else dropped
    assert x is not None
    elements, pairs = divisors(x, batch_first, reduction)
    outputs = [None if x is None else empty_like(x) for x in (raw, dropped)]
    sizes, views, strides = canonical((raw, dropped, *outputs), batch_first)
    RUNNERS[x.device.type].backward(grad, *views, same, sizes, strides, 2 * alpha / elements, 2 * beta / pairs)
    return outputs[0], outputs[1]


def empty_like(x: Tensor) -> Tensor:
    """Memory like that of `x`, in the order of its axes as long as the hidden axis is the innermost."""
    memory = torch.empty_like(x)
    if memory.stride(-1) == 1 or x.shape[-1] == 1:
        return memory
    return torch.empty_like(x, memory_format=torch.contiguous_format)
