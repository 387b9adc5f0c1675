"""The front door: from the arguments that a user gives to calls of one layer, of tensors alone.

Arguments whose metadata are new are checked, and their `Form` is kept under these metadata. Later arguments of that
kind take it: only values are checked in every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
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
from fastreg.torch_state import keepable, keeps_memory_low, observed, plain


class Options(NamedTuple):
    """The options of a call as they were given: see `fused_ar_tar`.

    `ar_of_raw` asks for AR of raw. With `fills` the forward may fill gradients for the backward; without it no gradient
    is held in between.
    """

    batch_first: Any = None
    time_dim: Any = None
    reduction: Any = "mean"
    measured: Any = False
    ar_of_raw: bool = False
    fills: bool = True


Pair: TypeAlias = tuple[Any, Any]


class Form(NamedTuple):
    """How arguments of one kind become calls.

    kinds  of the call of each layer; none if no term reads anything
    steps  a function of lengths, valid steps and starts, and of raw, dropped and a mask, that returns the `Steps`;
           `None` where all steps count
    """

    kinds: Sequence[Kind]
    steps: Callable[[Sequence[Any], Sequence[Any]], Steps] | None


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
    (raw, dropped), measured = activations, options.measured
    coefficients, (by_ar, by_tar) = _checked(*coefficients)
    arguments.check_given("raw", raw, by_tar, "beta")
    arguments.check_given("dropped", dropped, by_ar, "alpha")
    raw, dropped = raw if by_tar or measured else None, dropped if by_ar or measured else None
    return _calls((raw, dropped, None), coefficients, steps, options)


def call_of_raw(raw: Any, mask: Any, coefficients: Pair, steps: Sequence[Any], options: Options) -> Call:
    """Check the arguments of `fused_dropout_ar_tar` beside those of the dropout, and return a call of raw alone.

    Raises:
        TypeError, ValueError: as `fused_dropout_ar_tar`.
    """
    coefficients, _ = _checked(*coefficients)
    if not isinstance(raw, Tensor):
        arguments.check_tensor("raw", raw)
    return _calls((raw, None, mask), coefficients, steps, options)[0]


def rows_of_layers(x: Any) -> Sequence[Any]:
    """Return the tensors of activations, one a layer: packed rows, too, and without subclasses that only decorate."""
    if type(x) is Tensor:
        return (x,)
    layers = x if is_list(x) else () if x is None else (x,)
    return tuple([plain(rows_of(layer)) for layer in layers])


def _calls(tensors: Sequence[Any], coefficients: Pair, steps: Sequence[Any], options: Options) -> list[Call]:
    """Return the calls of raw and dropped that a term reads, and of a mask, with checked coefficients."""
    (raw, dropped, _), (alpha, beta), calls = tensors, coefficients, []
    xs = rows_of_layers(raw)
    # torch 2.8 fails to compile a comparison of lists, and there is no subclass in compiled code.
    ys = xs if not torch.compiler.is_compiling() and dropped is raw else rows_of_layers(dropped)
    same = tuple(map(is_, xs, ys))
    key = key_of((*tensors, alpha, beta, *steps), (*options, same))
    form = None if key is None else kept(key)  # a compiler would compile anew for new plans
    if form is None:
        form = _form(tensors, coefficients, steps, options, same, key is not None)
        if key is not None:
            keep(key, form)
    counting = None if form.steps is None else form.steps(steps, tensors)
    for x, y, kind in zip_longest(xs, ys, form.kinds):
        calls.append(Call(x, None if y is x else y, alpha, beta, counting, kind))
    return calls


def _form(
    tensors: Sequence[Any],
    coefficients: Pair,
    steps: Sequence[Any],
    options: Options,
    same: Sequence[bool],
    is_kept: bool,
) -> Form:
    """Check the metadata of arguments, and return their form; `same` says of each layer whether dropped is raw."""
    (raw, dropped, mask), (batch_first, time_dim, reduction, measured, ar_of_raw, fills) = tensors, options
    arguments.check_options(reduction, return_terms=measured)
    place = place_of(batch_first, time_dim)
    if raw is None is dropped:
        return Form([], None)
    first, layers = arguments.check_layers(raw, dropped, place)
    x, *_ = layers[0].values()
    axis, counting = place.axis() % x.dim() - x.dim(), None
    given = {name: y for name, y in zip(arguments.STEPS, steps, strict=True) if y is not None}
    if isinstance(first, PackedSequence):
        arguments.check_packed_options(time_dim, given)
        counting = _offsets
    elif given:
        arguments.check_steps(*steps)
        arguments.check_steps_of(x, axis, given)
        sizes, backend = sizes_of(x, axis), backend_for(x.device) if is_kept and 0 not in x.shape else None
        marker = partial(marked, sizes) if backend is None else backend.marker(sizes, x.device)
        counting = partial(_steps, marker, sizes, x.device, reduction)
    dtype, kinds = compute_dtype([x for layer in layers for x in layer.values()]), []
    # Where saved tensors are packed away, memory is the point. Dynamo cannot ask, and has no plans to fill.
    fills = fills and is_kept and not keeps_memory_low()
    for layer, is_same in zip_longest(layers, same, fillvalue=False):
        arguments.check_layer(layer, layers[0], axis)  # pyright: ignore[reportArgumentType]
        kinds.append(Kind(axis, reduction, measured, ar_of_raw or is_same, dtype, fills, {} if is_kept else None))
    arguments.check_devices(coefficients, layers[0])
    if mask is not None:
        arguments.check_mask(mask, x, axis)
    return Form(kinds, counting)


def _checked(*coefficients: Any) -> tuple[Pair, Pair]:
    """Check alpha and beta; return floats, or tensors that a backward can keep, and whether the term of each is on."""
    alpha, beta = coefficients
    are_plain = type(alpha) is float is type(beta) and not torch.compiler.is_compiling()  # as most are
    if are_plain and 0 <= alpha < math.inf and 0 <= beta < math.inf:
        return coefficients, (alpha != 0, beta != 0)
    alpha, beta = map(_converted, ("alpha", "beta"), coefficients)
    return (alpha, beta), (is_on(alpha), is_on(beta))


def _converted(name: str, value: Any) -> Coefficient:
    """Check a coefficient; return a float, or a tensor that a backward can keep."""
    arguments.check_coefficient(name, value)
    return keepable(plain(value)) if isinstance(value, Tensor) else coefficient(value)


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
    arguments.check_time(batch_first, time_dim)
    # A constant in compiled code, as int() does not make it
    return Place(batch_first is not False) if time_dim is None else Place(None, index(time_dim))


def _offsets(_: Sequence[Any], tensors: Sequence[Any]) -> Steps:
    """Return where each time step of packed rows begins, and at the end how many rows there are.

    Kernels trust them, in the backward, too: they are no view of batch sizes, which NumPy may share. Batch sizes are
    values, and checked in every call.
    """
    raw, dropped, _ = tensors
    packed, _ = arguments.check_layers(raw, dropped, Place())
    arguments.check_not_captured("lengths", packed.data.device)
    arguments.check_no_parts(packed.data)
    return Steps(offsets=torch.nn.functional.pad(packed.batch_sizes.long().cumsum(0), (1, 0)))


def _steps(marker: Any, sizes: Pair, device: torch.device, reduction: str, steps: Sequence[Any], _: Any) -> Steps:
    """Check the values of lengths, valid steps and starts, and mark the time steps of activations that count.

    Values on another device than the CPU are not looked at, as that would wait for it.
    """
    given = zip(arguments.STEPS, steps, strict=True)
    marks, counts = marker(*[None if y is None else _brought(name, plain(y), device, sizes) for name, y in given])
    return Steps(marks, counts if reduction == "mean" else None)


def _brought(name: str, given: Tensor, device: torch.device, sizes: Pair) -> Tensor:
    """Check the values of lengths or marks, and bring them to activations, marks as bool, without waiting for the copy.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too:
    it is not freed before the device has read it, and the host does not wait.
    """
    if device.type == "cpu" != given.device.type:
        given = given.cpu()
    arguments.check_values(name, given, sizes[1])
    if name != "lengths":
        given = given.bool().reshape(sizes)
    if given.device.type == "cpu" != device.type:
        arguments.check_not_captured(name, device)
        if observed():  # a compiler cannot ask whether memory is pinned
            given = given.clone()
        elif given.is_pinned():
            given = torch.empty_like(given, pin_memory=True).copy_(given)
    return given.to(device, non_blocking=True).contiguous()
