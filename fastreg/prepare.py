"""The front door: from the arguments that a user gives to calls of one layer, of tensors alone.

Arguments whose metadata are new are checked, and their `Form` is kept under these metadata. Later arguments of that
kind take it: only values are checked in every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import index, is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg import arguments
from fastreg.backends import backend_for
from fastreg.kernels.view import Steps
from fastreg.plans import keep, kept, key_of
from fastreg.problem import Call, Coefficient, Kind, Place, compute_dtype, is_list, is_on, rows_of, sizes_of
from fastreg.reference import marked
from fastreg.torch_state import keepable, observed, plain


class Options(NamedTuple):
    """The options of a call as they were given: see `fused_ar_tar`. `ar_of_raw` asks for AR of raw."""

    batch_first: Any = None
    time_dim: Any = None
    reduction: Any = "mean"
    measured: Any = False
    ar_of_raw: bool = False


Pair: TypeAlias = tuple[Any, Any]


class Form(NamedTuple):
    """How arguments of one kind become calls.

    kinds  of the call of each layer
    steps  a function of lengths, valid steps and starts, and of raw and dropped, that returns the `Steps`; `None` where
           all steps count
    """

    kinds: Sequence[Kind]
    steps: Callable[[Sequence[Any], Pair], Steps] | None


def calls_of(activations: Pair, coefficients: Pair, steps: Sequence[Any], options: Options) -> list[Call]:
    """Check the arguments of `fused_ar_tar`, and return a call for each layer; none if no term reads anything.

    Activations that no term reads are not looked at. Those of a term whose coefficient is 0 are read to measure it, if
    they are given.

    Args:
        activations: raw and dropped.
        coefficients: alpha and beta.
        steps: lengths, valid steps and starts.
        options: the other arguments.

    Raises:
        TypeError, ValueError: as `fused_ar_tar`.
    """
    raw, dropped = activations
    coefficients, (by_ar, by_tar) = _checked(*coefficients)
    if by_tar and raw is None:
        arguments.check_given("raw", raw, "beta")
    if by_ar and dropped is None:
        arguments.check_given("dropped", dropped, "alpha")
    is_same, measured = dropped is raw, options.measured
    raw = _stripped(raw) if by_tar or measured else None
    dropped = None if not (by_ar or measured) else raw if is_same and raw is not None else _stripped(dropped)
    if raw is dropped is None:
        _check_options(options)
        return []
    return _calls((raw, dropped), coefficients, steps, options)


def call_of_raw(raw: Any, mask: Any, coefficients: Pair, steps: Sequence[Any], options: Options) -> Call:
    """Check the arguments of `fused_dropout_ar_tar` beside those of the dropout, and return a call of raw alone.

    Raises:
        TypeError, ValueError: as `fused_dropout_ar_tar`.
    """
    coefficients, _ = _checked(*coefficients)
    if not isinstance(raw, Tensor):
        arguments.check_tensor("raw", raw)
    return _calls((plain(raw), None), coefficients, steps, options, mask)[0]


def _stripped(x: Any) -> Any:
    """Return activations without subclasses that only decorate them."""
    if x is None or type(x) is Tensor:
        return x
    if is_list(x):
        layers = [_stripped(layer) for layer in x]
        return layers if isinstance(x, list) else tuple(layers)
    if not isinstance(x, PackedSequence):
        return plain(x)
    data = plain(x.data)
    return x if data is x.data else x._replace(data=data)  # which torch 2.8 does not trace


def _calls(
    activations: Pair, coefficients: Pair, steps: Sequence[Any], options: Options, mask: Any = None
) -> list[Call]:
    """Return calls of activations without decoration that a term reads, and of checked coefficients."""
    (raw, dropped), (alpha, beta) = activations, coefficients
    are_lists = type(raw) is not Tensor and is_list(raw) and is_list(dropped)
    if are_lists:
        same: Any = tuple(map(is_, map(rows_of, raw), map(rows_of, dropped)))
    else:
        same = rows_of(dropped) is rows_of(raw)
    steps = [x if x is None else plain(x) for x in steps]
    key = key_of((raw, dropped, alpha, beta, mask, *steps), (*options, same))
    form = None if key is None else kept(key)
    if form is None:
        form = _form(activations, coefficients, steps, options, mask, key is not None)
        if key is not None:
            keep(key, form)
    counting = None if form.steps is None else form.steps(steps, activations)
    if type(dropped if raw is None else raw) is Tensor:
        return [Call(raw, None if dropped is raw else dropped, alpha, beta, counting, form.kinds[0])]
    columns = [[rows_of(y) for y in x] if is_list(x) else [rows_of(x)] * len(form.kinds) for x in activations]
    layers = zip(columns[0], columns[1], form.kinds, strict=True)
    return [Call(x, None if y is x else y, alpha, beta, counting, kind) for x, y, kind in layers]


def _check_options(options: Options) -> int:
    """Check options; return the axis of time, from either end."""
    arguments.check_options(options.reduction, return_terms=options.measured)
    return place_of(options.batch_first, options.time_dim).axis()


def _form(
    activations: Pair, coefficients: Pair, steps: Sequence[Any], options: Options, mask: Any, is_kept: bool
) -> Form:
    """Check the metadata of arguments, and return their form."""
    (raw, dropped), (_, time_dim, reduction, measured, ar_of_raw) = activations, options
    axis, counting = _check_options(options), None
    first, layers = dropped if raw is None else raw, [("", raw, dropped)]
    if not isinstance(first, Tensor) or not (dropped is None or isinstance(dropped, Tensor)):
        layers = arguments.check_layers(raw, dropped, axis)
        _, x, y = layers[0]
        first = y if x is None else x
    if isinstance(first, PackedSequence):
        arguments.check_packed_options(time_dim, *steps)
        axis, counting = -2, _offsets
        layers = [(label, rows_of(x), rows_of(y)) for label, x, y in layers]
    else:
        label, *both = layers[0]
        for name, x in zip(("raw", "dropped"), both, strict=True):
            if x is not None:
                arguments.check_axes(name + label, x, None if time_dim is None else axis)
        axis = axis if axis < 0 else axis - first.dim()
        if any([x is not None for x in steps]):
            arguments.check_steps(*steps)
            arguments.check_steps_of(arguments.check_tensor("raw", first), axis, steps)
            sizes, backend = sizes_of(first, axis), None
            if is_kept and 0 not in first.shape:
                backend = backend_for(first.device)
            marker = partial(marked, sizes) if backend is None else backend.marker(sizes, first.device)
            counting = partial(_steps, marker, sizes, first.device, reduction)
    dtype, kinds = compute_dtype(*[x for _, *both in layers for x in both]), []
    for label, x, y in layers:
        kind = Kind(axis, reduction, measured, ar_of_raw or y is x, dtype, {} if is_kept else None)
        arguments.check_call(Call(x, None if y is x else y, *coefficients, None, kind), label, mask)
        kinds.append(kind)
    return Form(kinds, counting)


def _checked(*coefficients: Any) -> tuple[Pair, Pair]:
    """Check alpha and beta; return floats, or tensors that a backward can keep, and whether the term of each is on."""
    alpha, beta = coefficients
    are_plain = type(alpha) is float is type(beta) and not torch.compiler.is_compiling()  # as most are
    if are_plain and 0 <= alpha < math.inf and 0 <= beta < math.inf:
        return coefficients, (alpha != 0, beta != 0)
    for name, value in zip(("alpha", "beta"), coefficients, strict=True):
        arguments.check_coefficient(name, value)
    alpha, beta = [keepable(plain(x)) if isinstance(x, Tensor) else coefficient(x) for x in coefficients]
    return (alpha, beta), (is_on(alpha), is_on(beta))


def coefficient(value: Any) -> Coefficient:
    """Convert a checked coefficient: a number to a float, a tensor to itself."""
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():  # which takes a NumPy scalar for an array
        return value if isinstance(value, (int, float)) else value.item()
    return float(value)  # also of np.float64, which is a float


def place_of(batch_first: Any, time_dim: Any) -> Place:
    """Return where time is: `(batch, time, hidden)` by default.

    Raises:
        TypeError, ValueError: either is of another type, or both are given.
    """
    if time_dim is None and (batch_first is None or batch_first is True):
        return Place()
    arguments.check_time(batch_first, time_dim)
    # A constant in compiled code, as int() does not make it
    return Place(batch_first) if time_dim is None else Place(None, index(time_dim))


def _offsets(_: Sequence[Any], activations: Pair) -> Steps:
    """Return where each time step of packed rows begins, and at the end how many rows there are.

    Kernels trust them, in the backward, too: they are no view of batch sizes, which NumPy may share. Batch sizes are
    values, and checked in every call.
    """
    _, raw, dropped = arguments.check_layers(*activations, -2)[0]
    packed = dropped if raw is None else raw
    arguments.check_not_captured("lengths", packed.data.device)
    arguments.check_no_parts(packed.data)
    return Steps(offsets=torch.nn.functional.pad(packed.batch_sizes.long().cumsum(0), (1, 0)))


def _steps(marker: Any, sizes: Pair, device: torch.device, reduction: str, steps: Sequence[Any], _: Pair) -> Steps:
    """Check the values of lengths, valid steps and starts, and mark the time steps of activations that count.

    Values on another device than the CPU are not looked at, as that would wait for it.
    """
    given = zip(arguments.STEPS, steps, strict=True)
    marks, counts = marker(*[None if y is None else _brought(name, y, device, sizes) for name, y in given])
    return Steps(marks, counts if reduction == "mean" else None)


def _brought(name: str, given: Tensor, device: torch.device, sizes: Pair) -> Tensor:
    """Check the values of lengths or marks, and bring them to activations, marks as bool, without waiting for the copy.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too:
    it is not freed before the device has read it, and the host does not wait.
    """
    if device.type == "cpu" != given.device.type:
        given = given.cpu()
    arguments.check_values(name, given, sizes[1])
    if name != "lengths" and given.dtype != torch.bool:
        given = given != 0
    if given.device.type == "cpu" != device.type:
        arguments.check_not_captured(name, device)
        if observed():  # a compiler cannot ask whether memory is pinned
            given = given.clone()
        elif given.is_pinned():
            given = torch.empty_like(given, pin_memory=True).copy_(given)
    given = given.to(device, non_blocking=True)
    return (given if name == "lengths" else given.reshape(sizes)).contiguous()
