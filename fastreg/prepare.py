"""The front door: from the arguments that a user gives to calls of one layer, of tensors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import (
    STEPS,
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
    raw, dropped, measured = arguments.raw, arguments.dropped, arguments.measured
    alpha, beta, axis = _checked(arguments)
    by_ar, by_tar = is_on(alpha), is_on(beta)
    if by_tar and raw is None:
        check_given("raw", raw, "beta")
    if by_ar and dropped is None:
        check_given("dropped", dropped, "alpha")
    raw, dropped = raw if by_tar or measured else None, dropped if by_ar or measured else None
    first = dropped if raw is None else raw
    if first is None:
        return []
    layers, steps = [("", raw, dropped)], None
    if not isinstance(first, Tensor) or not (dropped is None or isinstance(dropped, Tensor)):
        layers = check_layers(raw, dropped, axis)
        _, x, y = layers[0]
        first = y if x is None else x
    if isinstance(first, PackedSequence):
        check_packed_options(arguments.time_dim, arguments.lengths, arguments.valid, arguments.starts)
        axis, steps = -2, _offsets(first)
        layers = [(label, rows_of(x), rows_of(y)) for label, x, y in layers]
    else:
        label, *both = layers[0]
        axis, steps = _axis_and_steps(arguments, axis, both, label)
    dtype = compute_dtype(*[x for _, *both in layers for x in both])
    options = arguments.reduction, measured
    calls = []
    for label, x, y in layers:
        of_raw, y = (True, None) if y is x else (arguments.ar_of_raw, plain(y))
        calls.append(Call(plain(x), y, alpha, beta, steps, axis, *options, of_raw, dtype, label))
    return calls


def call_of_raw(arguments: Arguments) -> Call:
    """Check the arguments of `fused_dropout_ar_tar` beside those of the dropout, and return a call of raw alone.

    Raises:
        TypeError, ValueError: as `fused_dropout_ar_tar`.
    """
    alpha, beta, axis = _checked(arguments)
    raw = check_tensor("raw", arguments.raw)
    axis, steps = _axis_and_steps(arguments, axis, [raw, None])
    options = axis, arguments.reduction, arguments.measured, arguments.ar_of_raw, compute_dtype(raw)
    return Call(plain(raw), None, alpha, beta, steps, *options)


def _checked(arguments: Arguments) -> tuple[Coefficient, Coefficient, int]:
    """Check coefficients and options; return alpha, beta, and the axis of time, from either end."""
    check_options(arguments.reduction, return_terms=arguments.measured)
    axis = _axis_given(arguments.batch_first, arguments.time_dim)
    return _coefficient("alpha", arguments.alpha), _coefficient("beta", arguments.beta), axis


def _axis_and_steps(
    arguments: Arguments, axis: int, layer: Sequence[Tensor | None], label: str = ""
) -> tuple[int, Steps | None]:
    """Return the axis of time of raw and dropped, negative from the end, and their steps that count."""
    for name, x in zip(("raw", "dropped"), layer, strict=True):
        if x is not None:
            check_axes(name + label, x, None if arguments.time_dim is None else axis)
    x: Any = layer[0] if layer[0] is not None else layer[1]
    axis = axis if axis < 0 else axis - x.dim()
    if arguments.lengths is arguments.valid is arguments.starts is None:
        return axis, None
    return axis, _steps(x, axis, arguments.reduction, (arguments.lengths, arguments.valid, arguments.starts))


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


def _steps(x: Tensor, time_dim: int, reduction: str, given: Sequence[Any]) -> Steps:
    """Check lengths, valid steps and starts, and mark the time steps of activations that count, on their device.

    Values on another device than the CPU are not looked at, as that would wait for it.
    """
    given = [plain(y) for y in given]
    marker, sizes = _marker(x, time_dim, given), sizes_of(x, time_dim)
    brought = [None if y is None else _brought(name, y, x, sizes) for name, y in zip(STEPS, given, strict=True)]
    marks, counts = marker(*brought)
    return Steps(marks, counts if reduction == "mean" else None)


def _marker(x: Tensor, time_dim: int, given: Sequence[Any]) -> Any:
    """Check metadata, and return the marker of a backend, which is kept under them, or the formula."""
    key = None
    if not observed() and are_memory([x, *given]):
        facts = [None if y is None else (y.shape, y.dtype, y.device) for y in given]
        key = x.shape, x.device, time_dim, *facts
    marker = None if key is None else MARKERS.get(key)
    if marker is None:
        check_steps(*given)
        check_steps_of(check_tensor("raw", x), time_dim, given)
        sizes = sizes_of(x, time_dim)
        backend = None if key is None or 0 in x.shape else backend_for(x.device)
        marker = partial(marked, sizes) if backend is None else backend.marker(sizes, x.device)
        if key is not None:
            MARKERS.keep(key, marker)
    return marker


def _brought(name: str, given: Tensor, x: Tensor, sizes: tuple[Any, Any]) -> Tensor:
    """Check the values of lengths or marks, and bring them to activations, marks as bool, without waiting for the copy.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too:
    it is not freed before the device has read it, and the host does not wait.
    """
    device, given = x.device, keepable(given)
    if device.type == "cpu" != given.device.type:
        given = given.cpu()
    check_values(name, given, sizes[1])
    if name != "lengths" and given.dtype != torch.bool:
        given = given != 0
    if given.device.type == "cpu":
        check_not_captured(name, device)
    if given.device.type == "cpu" != device.type:
        if observed():  # a compiler cannot ask whether memory is pinned
            given = given.clone()
        elif given.is_pinned():
            given = torch.empty_like(given, pin_memory=True).copy_(given)
    given = given.to(device, non_blocking=True)
    return (given if name == "lengths" else given.reshape(sizes)).contiguous()
