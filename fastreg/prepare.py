"""The front door: from the arguments that a user gives to calls of one layer, of tensors alone."""

from __future__ import annotations

import math
from functools import partial
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import (
    check_axes,
    check_coefficient,
    check_given,
    check_layers,
    check_no_parts,
    check_not_captured,
    check_options,
    check_packed_options,
    check_steps,
    check_steps_of,
    check_tensor,
    check_time,
    check_values,
)
from fastreg.backends import backend_for
from fastreg.kernels.view import Steps
from fastreg.plans import Plans
from fastreg.problem import Call, Coefficient, compute_dtype, is_on, rows_of, sizes_of
from fastreg.reference import marked
from fastreg.torch_state import are_memory, keepable, observed, plain

MARKERS = Plans()  # of a backend, which are prepared for a shape


class Arguments(NamedTuple):
    """The arguments of a call as they were given: see `fused_ar_tar`. `ar_of_raw` asks for AR of raw."""

    raw: Any
    dropped: Any
    alpha: Any
    beta: Any
    lengths: Any = None
    valid: Any = None
    starts: Any = None
    batch_first: Any = None
    time_dim: Any = None
    reduction: Any = "mean"
    measured: Any = False
    ar_of_raw: bool = False


def calls_of(arguments: Arguments) -> list[Call]:
    """Check the arguments of `fused_ar_tar`, and return a call for each layer; none if no term reads anything.

    Activations that no term reads are not looked at. Those of a term whose coefficient is 0 are read to measure it, if
    they are given.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    raw, dropped, alpha, beta, lengths, valid, starts, batch_first, time_dim, reduction, measured, ar_of_raw = arguments
    alpha, beta = _coefficient("alpha", alpha), _coefficient("beta", beta)
    check_options(reduction, return_terms=measured)
    axis = _axis_given(batch_first, time_dim)
    by_ar, by_tar = is_on(alpha), is_on(beta)
    if by_tar:
        check_given("raw", raw, "beta")
    if by_ar:
        check_given("dropped", dropped, "alpha")
    raw, dropped = raw if by_tar or measured else None, dropped if by_ar or measured else None
    if raw is None and dropped is None:
        return []
    layers = [("", raw, dropped)]
    if not all([x is None or isinstance(x, Tensor) for x in (raw, dropped)]):
        layers = check_layers(raw, dropped, axis)
    tensors = [x for _, *both in layers for x in both if x is not None]
    first, steps = tensors[0], None
    if isinstance(first, PackedSequence):
        check_packed_options(time_dim, lengths=lengths, valid=valid, starts=starts)
        axis, steps = -2, _offsets(first)
        layers = [(label, rows_of(x), rows_of(y)) for label, x, y in layers]
    else:
        for name, x in zip(("raw", "dropped"), layers[0][1:], strict=True):
            if x is not None:
                check_axes(f"{name}{layers[0][0]}", x, None if time_dim is None else axis)
        axis = axis if axis < 0 else axis - first.dim()
        if lengths is not None or valid is not None or starts is not None:
            steps = _steps(first, axis, reduction, plain(lengths), plain(valid), plain(starts))
    dtype = compute_dtype(*[rows_of(x) for x in tensors])
    return [
        Call(
            *(plain(x), None if y is x else plain(y), alpha, beta, steps, axis),
            *(reduction, measured, ar_of_raw or y is x, dtype, label),
        )
        for label, x, y in layers
    ]


def call_of_raw(arguments: Arguments) -> Call:
    """Check the arguments of `fused_dropout_ar_tar` beside those of the dropout, and return a call of raw alone.

    Raises:
        TypeError, ValueError: as `fused_dropout_ar_tar`.
    """
    raw, _, alpha, beta, lengths, valid, starts, batch_first, time_dim, reduction, measured, ar_of_raw = arguments
    alpha, beta = _coefficient("alpha", alpha), _coefficient("beta", beta)
    check_options(reduction, return_terms=measured)
    axis = _axis_given(batch_first, time_dim)
    check_tensor("raw", raw)
    check_axes("raw", raw, None if time_dim is None else axis)
    axis, steps = axis if axis < 0 else axis - raw.dim(), None
    if lengths is not None or valid is not None or starts is not None:
        steps = _steps(raw, axis, reduction, plain(lengths), plain(valid), plain(starts))
    return Call(
        *(plain(raw), None, alpha, beta, steps, axis),
        *(reduction, measured, ar_of_raw, compute_dtype(raw)),
    )


def _coefficient(name: str, value: Any) -> Coefficient:
    """Check a coefficient, and return a float, or a tensor that a backward can keep."""
    if type(value) is float and not torch.compiler.is_compiling() and 0 <= value < math.inf:  # as most are
        return value
    check_coefficient(name, value)
    return keepable(plain(value)) if isinstance(value, Tensor) else coefficient(value)


def coefficient(value: Any) -> Coefficient:
    """Convert a checked coefficient: a number to a float, a tensor to itself."""
    if isinstance(value, (float, Tensor)):
        return value
    if torch.compiler.is_compiling():  # which takes a NumPy scalar for an array
        return value if isinstance(value, int) else value.item()
    return float(value)


def _axis_given(batch_first: Any, time_dim: Any) -> int:
    """Return the axis of time, from either end: -2 by default."""
    if time_dim is None and (batch_first is None or batch_first is True):
        return -2
    check_time(batch_first, time_dim)
    return 0 if time_dim is None else index(time_dim)  # a constant in compiled code, as int() does not make it


def time_given(batch_first: Any, time_dim: Any) -> bool | int:
    """Return where time is: `batch_first`, `True` by default, or the axis as an int.

    Raises:
        TypeError, ValueError: either is of another type, or both are given.
    """
    axis = _axis_given(batch_first, time_dim)
    return axis if time_dim is not None else axis == -2


def _offsets(packed: PackedSequence) -> Steps:
    """Return where each time step of checked packed rows begins, and at the end how many rows there are.

    Kernels trust them, in the backward, too: they are no view of batch sizes, which NumPy may share.
    """
    check_not_captured("lengths", packed.data.device)
    check_no_parts(packed.data)
    return Steps(offsets=torch.nn.functional.pad(packed.batch_sizes.long().cumsum(0), (1, 0)))


def _steps(x: Tensor, time_dim: int, reduction: str, lengths: Any, valid: Any, starts: Any) -> Steps:
    """Check lengths, valid steps and starts, and mark the time steps of activations that count, on their device.

    Values on another device than the CPU are not looked at, as that would wait for it.
    """
    check_steps(lengths, valid, starts)
    check_steps_of(check_tensor("raw", x), time_dim, lengths=lengths, valid=valid, starts=starts)
    sizes, device = sizes_of(x, time_dim), x.device
    if lengths is not None:
        lengths = _brought("lengths", lengths, device, sizes[1]).contiguous()
    if valid is not None:
        valid = _brought("valid", valid, device, sizes[1]).reshape(sizes).contiguous()
    if starts is not None:
        starts = _brought("starts", starts, device, sizes[1]).reshape(sizes).contiguous()
    marks, counts = _marker(x, sizes, lengths, valid, starts)(lengths, valid, starts)
    return Steps(marks, counts if reduction == "mean" else None)


def _marker(x: Tensor, sizes: tuple[Any, Any], *given: Tensor | None) -> Any:
    """Return the `marker` of the backend of activations, which is kept, or the formula."""
    formula = partial(marked, sizes)
    if observed() or 0 in x.shape or not are_memory(given):
        return formula
    key = sizes, x.device, *[None if x is None else x.dtype for x in given]
    marker = MARKERS.get(key)
    if marker is None:
        backend = backend_for(x.device)
        marker = formula if backend is None else backend.marker(sizes, x.device)
        MARKERS.keep(key, marker)
    return marker


def _brought(name: str, x: Tensor, device: torch.device, time: int) -> Tensor:
    """Check the values of lengths or marks, and return them on a device, marks as bool, without waiting for the copy.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too:
    it is not freed before the device has read it, and the host does not wait.
    """
    x = keepable(x)
    if device.type == "cpu" != x.device.type:
        x = x.cpu()
    check_values(name, x, time)
    if name != "lengths" and x.dtype != torch.bool:
        x = x != 0
    if x.device.type == "cpu":
        check_not_captured(name, device)
    if x.device.type == "cpu" != device.type:
        if observed():  # a compiler cannot ask whether memory is pinned
            x = x.clone()
        elif x.is_pinned():
            x = torch.empty_like(x, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=True)
