"""The front door: the checks and conversions of a call's arguments, and the plan that results from them.

If the metadata of the arguments are new, all arguments are checked, and a plan is made and kept under these metadata.
Later calls with the same metadata use that plan. Only values are checked in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.call import arguments
from fastreg.call.backends import backend_for
from fastreg.call.plans import FormulaPlan
from fastreg.call.problem import Coefficient, Options, Place, are_same, compute_dtype, is_on, sizes_of
from fastreg.call.reference import encoded
from fastreg.call.torch_state import has_values, keepable, observed, plain
from fastreg.kernels.view import Steps, Terms


def prepare(operation: Any, inputs: Sequence[Any], options: Options, is_kept: bool) -> tuple[FormulaPlan, Any]:
    """Check the arguments of a call; return its plan in plain PyTorch, and the backend that could run it, or `None`.

    Args:
        operation: the class of the plan for a backend, which also has the formula.
        inputs: raw; dropped, a mask, or the probability to drop a unit; alpha, beta; lengths, valid steps, starts. Raw
            and dropped are `None` if no term reads them.
        options: the other arguments.
        is_kept: whether later calls use the plan; it is `False` if plain PyTorch has to see each call.

    Raises:
        TypeError, ValueError: as `fused_ar_tar` and `fused_dropout_ar_tar`.
    """
    first, second, alpha, beta, *step_arguments = inputs
    by_ar, by_tar = is_on(alpha), is_on(beta)
    raw, dropped = (first, None) if operation.drops else (first, second)
    if not operation.drops:
        arguments.check_given("raw", raw, by_tar, "beta")
        arguments.check_given("dropped", dropped, by_ar, "alpha")
    arguments.check_options(options.reduction, return_terms=options.measured)
    place = place_of(options.batch_first, options.time_dim)
    if raw is None and dropped is None:
        return FormulaPlan(operation.formula, (), None, ()), None
    one, layers = arguments.check_layers(raw, dropped, place)
    x, *_ = layers[0].values()
    axis, row = place.axis() % x.dim() - x.dim(), list(x.shape)
    row[axis] = 1
    backend = backend_for(x.device) if is_kept else None
    steps_of: Callable[[Sequence[Any]], Steps] | None = None
    there = {name: y for name, y in zip(arguments.STEP_ARGUMENTS, step_arguments, strict=True) if y is not None}
    if isinstance(one, PackedSequence):
        arguments.check_packed_options(options.time_dim, there)
        steps_of = _offsets
    elif there:
        arguments.check_steps(*step_arguments)
        arguments.check_steps_of(x, axis, there)
        sizes = sizes_of(x, axis)
        encoder = partial(encoded, sizes) if backend is None else backend.encoder(sizes, x.device)
        steps_of = partial(_steps, encoder, sizes, x.device, options.reduction)
    dtype = compute_dtype([x for layer in layers for x in layer.values()])
    terms: list[Terms] = []
    for layer, is_same in zip_longest(layers, are_same(raw, dropped), fillvalue=False):
        arguments.check_layer(layer, layers[0], axis)  # pyright: ignore[reportArgumentType]
        of_raw = options.ar_of_raw or bool(is_same)
        terms.append(Terms(by_ar, by_tar, options.measured, of_raw, dtype, axis, options.reduction))
    arguments.check_devices((alpha, beta), layers[0])
    if operation.drops and isinstance(second, Tensor):
        arguments.check_mask(second, x, row)
    return FormulaPlan(operation.formula, terms, steps_of, row), backend


def converted(name: str, value: Any) -> Coefficient:
    """Check a coefficient; return a float, or a tensor that a backward can keep."""
    arguments.check_coefficient(name, value)
    return keepable(plain(value)) if isinstance(value, Tensor) else coefficient(value)


def coefficient(value: Any) -> Coefficient:
    """Convert a checked coefficient: a number to a float, a tensor to itself."""
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():  # a compiler treats a NumPy scalar as an array
        return value if isinstance(value, (int, float)) else value.item()
    return float(value)  # np.float64 is a float, but becomes one of Python's


def place_of(batch_first: Any, time_dim: Any) -> Place:
    """Return the axis of time; the default is `(batch, time, hidden)`.

    Raises:
        TypeError, ValueError: one of them has another type, or both are given.
    """
    arguments.check_time(batch_first, time_dim)
    # index() returns a constant in compiled code; int() does not.
    return Place(batch_first is not False) if time_dim is None else Place(None, index(time_dim))


def _offsets(inputs: Sequence[Any]) -> Steps:
    """Return where each time step of packed rows begins, and at the end the number of rows.

    Kernels trust these offsets, in the backward, too. So they are new memory, and not a view of the batch sizes, whose
    memory NumPy may share. Batch sizes are values, and are checked in every call.
    """
    raw, dropped, *_ = inputs
    packed, _ = arguments.check_layers(raw, dropped, Place())
    arguments.check_not_captured("lengths", packed.data.device)
    arguments.check_no_parts(packed.data)
    return Steps(offsets=torch.nn.functional.pad(packed.batch_sizes.long().cumsum(0), (1, 0)))


def _steps(encoder: Any, sizes: tuple[Any, Any], device: torch.device, reduction: str, inputs: Sequence[Any]) -> Steps:
    """Check the values of lengths, valid steps and starts, and encode which time steps count.

    Values are checked only on the CPU. On other devices a check would have to wait for the device.
    """
    named = zip(arguments.STEP_ARGUMENTS, inputs[4:], strict=True)
    bits, counts = encoder(*[None if x is None else _brought(name, device, sizes, x) for name, x in named])
    return Steps(bits, counts if reduction == "mean" else None)


def _brought(name: str, device: torch.device, sizes: tuple[Any, Any], x: Tensor) -> Tensor:
    """Check the values of lengths or of a mask, and return them on a device, a mask as bool; do not wait for the copy.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too.
    PyTorch does not free it before the device has read it, and the host does not wait.
    """
    x = plain(x)
    if x.device == device and x.dtype == torch.bool and x.shape == sizes:
        return x.contiguous()
    if device.type == "cpu" != x.device.type:
        x = x.cpu()
    if x.dtype != torch.bool and has_values(x):
        arguments.check_range(name, sizes[1], x)
    if name != "lengths":
        x = x.bool().reshape(sizes)
    if x.device.type == "cpu" != device.type:
        arguments.check_not_captured(name, device)
        if observed():  # a compiler cannot ask whether memory is pinned
            x = x.clone()
        elif x.is_pinned():
            x = torch.empty_like(x, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=True).contiguous()
