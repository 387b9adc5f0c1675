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

from fastreg import arguments
from fastreg.backends import backend_for
from fastreg.kernels.view import Steps
from fastreg.problem import Coefficient, Kind, Options, Place, are_same, compute_dtype, sizes_of
from fastreg.reference import encoded
from fastreg.torch_state import has_values, keepable, keeps_memory_low, observed, plain

Given = Sequence[Any]  # lengths, valid steps and starts


class Plan:
    """Compute all calls whose arguments have the metadata of one key, by a backend or by the formula.

    Args:
        tensors: raw and dropped, each `None` if no term reads it, and a mask.
        coefficients: alpha and beta.
        given: lengths, valid steps and starts.
        options: the other arguments.
        is_kept: whether later calls use the plan; it is `False` if plain PyTorch has to see each call.

    Attributes:
        kinds: the kind of each layer; empty if no term reads anything.
        steps_of: a function of (lengths, valid steps, starts) and of (raw, dropped) that checks their values and
        returns
            the steps that count; `None` if all steps count.
        backend: the code that runs; `None` for the formula.
        fills: whether the forward fills gradients for the backward.
        names: the names of the tensors that a node saves.
        saved, layouts: the facts and the layouts of the tensors that a node saves, as the first node has found them.

    Raises:
        TypeError, ValueError: as `fused_ar_tar` and `fused_dropout_ar_tar`.
    """

    backend: Any = None
    saved: Any = None

    def __init__(
        self, tensors: Sequence[Any], coefficients: Sequence[Any], given: Given, options: Options, is_kept: bool
    ) -> None:
        raw, dropped, mask = tensors
        arguments.check_options(options.reduction, return_terms=options.measured)
        place = place_of(options.batch_first, options.time_dim)
        self.kinds: list[Kind] = []
        self.steps_of: Callable[[Given, Sequence[Any]], Steps] | None = None
        if raw is None is dropped:
            return
        first, layers = arguments.check_layers(raw, dropped, place)
        x, *_ = layers[0].values()
        axis, names = place.axis() % x.dim() - x.dim(), arguments.STEP_ARGUMENTS
        self.backend = backend_for(x.device) if is_kept else None
        # If saved tensors are packed away, memory matters more than time.
        self.fills = is_kept and options.fills and not keeps_memory_low()
        there = {name: y for name, y in zip(names, given, strict=True) if y is not None}
        if isinstance(first, PackedSequence):
            arguments.check_packed_options(options.time_dim, there)
            self.steps_of = _offsets
        elif there:
            arguments.check_steps(*given)
            arguments.check_steps_of(x, axis, there)
            sizes = sizes_of(x, axis)
            encoder = partial(encoded, sizes) if self.backend is None else self.backend.encoder(sizes, x.device)
            self.steps_of = partial(_steps, encoder, sizes, x.device, options.reduction)
        dtype = compute_dtype([x for layer in layers for x in layer.values()])
        for layer, is_same in zip_longest(layers, are_same(raw, dropped), fillvalue=False):
            arguments.check_layer(layer, layers[0], axis)  # pyright: ignore[reportArgumentType]
            of_raw = options.ar_of_raw or bool(is_same)
            self.kinds.append(Kind(axis, options.reduction, options.measured, of_raw, dtype))
        arguments.check_devices(coefficients, layers[0])
        if mask is not None:
            arguments.check_mask(mask, x, axis)

    @staticmethod
    def read(tensors: Sequence[Any], are_on: Sequence[bool], options: Options) -> Sequence[Any]:
        """Return the tensors that a call reads; `are_on` says whether AR and TAR are in the penalty."""
        return tensors


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


def _offsets(_: Sequence[Any], tensors: Sequence[Any]) -> Steps:
    """Return where each time step of packed rows begins, and at the end the number of rows.

    Kernels trust these offsets, in the backward, too. So they are new memory, and not a view of the batch sizes, whose
    memory NumPy may share. Batch sizes are values, and are checked in every call.
    """
    raw, dropped = tensors
    packed, _ = arguments.check_layers(raw, dropped, Place())
    arguments.check_not_captured("lengths", packed.data.device)
    arguments.check_no_parts(packed.data)
    return Steps(offsets=torch.nn.functional.pad(packed.batch_sizes.long().cumsum(0), (1, 0)))


def _steps(encoder: Any, sizes: tuple[Any, Any], device: torch.device, reduction: str, given: Given, _: Any) -> Steps:
    """Check the values of lengths, valid steps and starts, and encode which time steps count.

    Values are checked only on the CPU. On other devices a check would have to wait for the device.
    """
    named = zip(arguments.STEP_ARGUMENTS, given, strict=True)
    bits, counts = encoder(*[None if x is None else _brought(name, device, sizes, x) for name, x in named])
    return Steps(bits, counts if reduction == "mean" else None)


def _brought(name: str, device: torch.device, sizes: tuple[Any, Any], given: Tensor) -> Tensor:
    """Check the values of lengths or of a mask, and return them on a device, a mask as bool; do not wait for the copy.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too.
    PyTorch does not free it before the device has read it, and the host does not wait.
    """
    given = plain(given)
    if given.device == device and given.dtype == torch.bool and given.shape == sizes:
        return given.contiguous()
    if device.type == "cpu" != given.device.type:
        given = given.cpu()
    if given.dtype != torch.bool and has_values(given):
        arguments.check_range(name, sizes[1], given)
    if name != "lengths":
        given = given.bool().reshape(sizes)
    if given.device.type == "cpu" != device.type:
        arguments.check_not_captured(name, device)
        if observed():  # a compiler cannot ask whether memory is pinned
            given = given.clone()
        elif given.is_pinned():
            given = torch.empty_like(given, pin_memory=True).copy_(given)
    return given.to(device, non_blocking=True).contiguous()
