"""All checks of arguments, and their messages. A check raises an error, and changes nothing.

A `TypeError` or a `ValueError` names the argument, the expected value and the given value. Metadata of activations,
options and lists are checked once for each new kind of call; values are checked in every call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from math import inf
from numbers import Integral, Real
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.problem import ARTAR, Coefficient, One, TimeAxis, axes_of, is_list, names_of, sizes_of
from fastreg.call.torch_state import has_values, plain
from fastreg.kernels.streams import is_captured

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # compiled code compares those up to its own
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The arguments that say which time steps count: their dtypes, the dtypes in words, the remedy for another dtype.
MARKS = (torch.bool, *INTEGERS), "a bool or integer tensor", "; use .bool()"
STEPS: dict[str, tuple[Sequence[torch.dtype], str, str]] = {
    "lengths": (INTEGERS, "an integer tensor", "; use .long(), or pass a mask as valid="),
    "valid": MARKS,
    "starts": MARKS,
}
ACTIVATIONS = "a tensor, a PackedSequence, or a list or tuple of them"
TWO_AXES = (
    ". Pass time_dim=0 if a tensor of two axes is one sequence, (time, hidden), or time_dim=1 if it has a number for "
    "each time step, (batch, time). If it is one time step, (batch, hidden), pass all steps in one tensor, "
    "torch.stack(states, 1)"
)
PAD = "; pad_packed_sequence returns a tensor and lengths"
HINT = " (an RNN returns its output and its state: pass the output)"


class ValidShapeError(ValueError):
    """Say that the mask of valid steps does not fit the activations: an adapter explains its default mask by it."""


def _expect(fits: bool, name: str, words: str, *values: object, error: type[Exception] = ValueError) -> None:
    """Raise an error unless an argument fits.

    Args:
        fits: whether the argument fits.
        name: the name of the argument.
        words: the expectation and the given values, with `{}` for each value.
        values: the values. Only an error formats them, because formatting takes time and makes sizes constants in
            compiled code.
        error: the type of the error.
    """
    if not fits:
        plain = [tuple(x) if isinstance(x, torch.Size) else getattr(x, "__name__", x) for x in values]
        raise error(f"{name}: expected {words.format(*plain)}")


# ---- coefficients and options


def check_options(reduction: object, return_terms: object) -> None:
    """Check the options of both operations."""
    is_known = isinstance(reduction, str) and reduction in ("mean", "sum")
    _expect(is_known, "reduction", "'mean' or 'sum', got {!r}", reduction)
    check_flag("return_terms", return_terms)


def check_flag(name: str, flag: object) -> None:
    """Check that an argument is `True` or `False`."""
    _expect(isinstance(flag, bool), name, "True or False, got {!r}", flag, error=TypeError)


def check_locked(locked: object, mask: object) -> None:
    """Check `locked`, and that a mask is given only to variational dropout."""
    check_flag("locked", locked)
    words = "locked=False without a mask, which it would draw, got both"
    _expect(locked is True or mask is None, "locked and mask", words)


def check_coefficient(name: str, value: Any) -> Coefficient:
    """Check a coefficient, and return a number as one of Python's, such as a float for `np.float64`.

    It is a finite real number of at least 0, or a 0-dim tensor that holds one. The value of a tensor is checked only on
    the CPU. On other devices a check would have to wait for the device.
    """
    if isinstance(value, Tensor):
        _check_dense(name, value)
        is_scalar = value.shape == () and value.dtype in DTYPES
        words = "a number or a 0-dim floating-point tensor, got {} {}"
        _expect(is_scalar, name, words, value.dtype, value.shape)
        _check_no_gradient(name, value)
        number = value.item() if has_values(value) else 0.0
    elif torch.compiler.is_compiling():
        return _check_symbolic(name, value)
    else:
        number = value = _real(name, value)
    _expect(0 <= number < inf, name, "a finite number of at least 0, got {}", number)
    return value


def _check_symbolic(name: str, value: Any) -> float:
    """Check a number that may be symbolic: as far as possible during tracing, otherwise when the code runs."""
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # this imports sympy

    number: Any = value
    if not isinstance(value, float):
        if not isinstance(value, (bool, int, str)) and hasattr(value, "item"):
            number = value.item()  # a compiler treats a NumPy scalar as an array
        else:
            _check_number(name, value, Real, "a real number, got {}")
    fits = guard_or_true(number >= 0) and guard_or_true(number < inf)
    _expect(fits, name, "a finite number of at least 0, got {}", number)
    torch._check(number * 1.0 >= 0)  # torch 2.11 would drop a check of the value itself
    torch._check(number < inf)
    return number


def check_unchanged(before: Sequence[int], now: Sequence[int]) -> None:
    """Check, by their versions in the forward and now, that coefficients were not changed before the backward."""
    for name, version, other in zip(("alpha", "beta"), before, now, strict=True):
        words = "the value that the forward has read, got one modified by an inplace operation{}"
        remedy = "; change it after the backward, or pass a clone"
        _expect(version == other, name, words, remedy, error=RuntimeError)


def check_probability(p: object) -> None:
    """Check that `p`, the probability to drop a unit, is from 0 to below 1."""
    _expect(0 <= _real("p", p) < 1, "p", "a probability from 0 to below 1, got {}", p)


def time_axis_of(batch_first: object, time_dim: object) -> TimeAxis:
    """Check `batch_first` and `time_dim`, and return the axis of time as the one of them that says it."""
    axis = axis_of(batch_first, time_dim)
    return TimeAxis(batch_first is not False) if time_dim is None else TimeAxis(None, axis)


def axis_of(batch_first: object, time_dim: object) -> int:
    """Check that at most one of the two is given, and their types; return the number of the axis of time."""
    if time_dim is None:
        check_flag("batch_first", batch_first is None or batch_first)
        return 0 if batch_first is False else -2
    _expect(batch_first is None, "batch_first and time_dim", "one of them, got both")
    _check_number("time_dim", time_dim, Integral, "an int, the axis of time, got {}")
    # In compiled code int() returns no constant.
    return index(time_dim)  # pyright: ignore[reportArgumentType]


def check_count(name: str, value: Any) -> int:
    """Check a number of time steps, and return it as an int."""
    _check_number(name, value, Integral, "a positive integer, got {}")
    _expect(int(value) > 0, name, "a positive integer, got {}", value)
    return int(value)


def _check_number(name: str, value: object, kind: type, words: str) -> None:
    """Check the type of a number; a flag is none."""
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    _expect(is_number, name, words, type(value), error=TypeError)


def _real(name: str, value: Any) -> float:
    """Check for a real number, and convert it to a float; a number that is too large becomes infinite."""
    _check_number(name, value, Real, "a real number, got {}")
    try:
        return float(value)
    except OverflowError:
        return inf if value > 0 else -inf


# ---- lists of layers and packed sequences, before there are calls of one layer


def _given(raw: Any, dropped: Any, layer: int | None = None) -> dict[str, Any]:
    """Return the activations that are not `None`, by their names in messages."""
    return {name: x for name, x in zip(names_of(layer), (raw, dropped), strict=True) if x is not None}


def check_given(raw: object, dropped: object, reads_raw: bool, reads_dropped: bool, layer: int | None) -> None:
    """Check that activations are given if the term of a coefficient reads them."""
    words, (name_of_raw, name_of_dropped) = "{}, got NoneType (it may be None only if {} is 0)", names_of(layer)
    _expect(raw is not None or not reads_raw, name_of_raw, words, ACTIVATIONS, "beta", error=TypeError)
    _expect(dropped is not None or not reads_dropped, name_of_dropped, words, ACTIVATIONS, "alpha", error=TypeError)


def check_layers(raw: Any, dropped: Any) -> list[tuple[One | None, One | None]]:
    """Check that lists of layers go together, and return raw and dropped of each layer; `None` for at most one list."""
    given = _given(raw, dropped)
    counts = [f"{len(x)} layers" if is_list(x) else "one tensor" for x in given.values()]
    hint = HINT if "one tensor" in counts else ""
    alike = "the same layers in both, got {} and {}{}"
    _expect(counts[0] == counts[-1], "raw and dropped", alike, *counts, hint)
    for name, layers in given.items():
        _expect(len(layers) > 0, name, "a tensor a layer, got an empty {}", type(layers))
        for i, x in enumerate(layers):
            if type(x) is not Tensor and not isinstance(x, PackedSequence):
                check_tensor(f"{name}[{i}]", x)
    return [*zip_longest(raw or (), dropped or ())]


def check_like_first(layer: int, pair: Sequence[Any], pair0: Sequence[Any], axis: int) -> None:
    """Check that a layer has the batch and the time steps of the first one."""
    at = pair[0] is None
    x, x0 = pair[at], pair0[at]
    if type(x) is type(x0) is Tensor and x.shape == x0.shape:
        return  # most layers; the other checks take 4 us
    name, name0 = names_of(layer)[at], names_of(0)[at]
    if not _check_packed_alike(name, x, name0, x0):
        fits = x.dim() == x0.dim() and sizes_of(x, axis) == sizes_of(x0, axis)
        words = "the batch and time steps of {}, of shape {}, got {}{}"
        _expect(fits, name, words, name0, x0.shape, x.shape, HINT)


def check_packed(
    raw: object, dropped: object, time_dim: int | None, steps: Sequence[Tensor | None] | None, layer: int | None
) -> None:
    """Check packed sequences, `None` for at most one of them, and that no argument is given that does not fit them."""
    for name, given in () if steps is None else zip(STEPS, steps, strict=True):
        _expect(given is None, name, "None with a PackedSequence{}", PAD)
    _expect(time_dim in (None, 0, -2), "time_dim", "0 or None with a PackedSequence, got {}", time_dim)
    pair = _given(raw, dropped, layer)
    for name, x in pair.items():
        _check_packed_alike(name, x, *next(iter(pair.items())))
        data, sizes = check_tensor(f"{name}.data", x.data), plain(x.batch_sizes)
        _expect(data.dim() == 2, f"{name}.data", "(rows, hidden), got {}", data.shape)
        name = f"{name}.batch_sizes"
        _check_tensor_of(name, sizes, INTEGERS, "an integer tensor")
        _check_batch_sizes(name, sizes, data.shape[0])


def check_tensor(name: str, x: object) -> Tensor:
    """Check for a dense tensor."""
    if not isinstance(x, Tensor):
        hints = {PackedSequence: PAD, ARTAR: "; pass its .penalty", tuple: HINT}
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}{hints.get(type(x), '')}")
    _check_dense(name, x)
    return x


def _check_batch_sizes(name: str, sizes: Tensor, rows: int) -> None:
    """Check the values of batch sizes, because with wrong ones kernels would read past the end of the rows."""
    if sizes.numel() and not has_values(sizes):
        return
    values: Any = sizes.tolist()  # Python's integers, whose sum does not overflow
    fits = sizes.dim() == 1 and sum(values) == rows and min(values, default=0) > 0 and values == sorted(values)[::-1]
    _expect(fits, name, "sizes above 0 that never grow and add up to the {} rows, got {}", rows, values)


def _check_packed_alike(name: str, x: Any, other: str, y: Any) -> bool:
    """Check that two layers are packed in the same way, or that neither is packed; return whether they are."""
    is_packed, kinds = isinstance(x, PackedSequence), ("a tensor", "a PackedSequence")
    fits = is_packed == isinstance(y, PackedSequence)
    _expect(fits, name, "{}, as {} is, got {}", kinds[not is_packed], other, kinds[is_packed], error=TypeError)
    if is_packed:
        sizes, others = plain(x.batch_sizes), plain(y.batch_sizes)
        are_unlike = sizes is not others and has_values(sizes) and has_values(others) and not sizes.equal(others)
        _expect(not are_unlike, name, "the batch_sizes of {}, got others", other)
    return is_packed


def _check_axes(name: str, x: Tensor, time_dim: int | None) -> None:
    """Check that activations have an axis of time: `time_dim`, or three axes without it."""
    dims = x.dim()
    if time_dim is None:
        layouts = "(batch, time, hidden), (time, batch, hidden) with batch_first=False"
        _expect(dims == 3, name, "{}, or time_dim, got {}{}", layouts, x.shape, TWO_AXES if dims == 2 else "")
    else:
        axes = f", from {-dims} to {dims - 1}" if dims else ""
        words = "an axis of {}, of shape {}{}, got {}"
        _expect(-dims <= time_dim < dims, "time_dim", words, name, x.shape, axes, time_dim)


# ---- one layer


def check_pair(raw: object, dropped: object, time_dim: int | None, layer: int | None) -> dict[str, Tensor]:
    """Check raw and dropped, and return them by their names; `None` for at most one of them."""
    pair, dtypes = _given(raw, dropped, layer), "float16, bfloat16, float32 or float64, got {}"
    for name, given in pair.items():
        _expect(isinstance(given, Tensor), name, "{}, got {}", ACTIVATIONS, type(given), error=TypeError)
        _check_dense(name, given)
        _expect(given.dtype in DTYPES, name, dtypes, given.dtype, error=TypeError)
    (one, x), *others = pair.items()
    _check_axes(one, x, time_dim)
    for name, other in others:
        _expect(other.shape == x.shape, name, "the shape of {}, {}, got {}", one, x.shape, other.shape)
        _check_device(name, other, one, x)
    return pair


def check_devices(coefficients: Sequence[Coefficient], layer: Mapping[str, Tensor]) -> None:
    """Check that coefficients that are tensors are on the device of a layer."""
    for name, x in zip(("alpha", "beta"), coefficients, strict=True):
        if isinstance(x, Tensor):
            _check_device(name, x, *next(iter(layer.items())))


# ---- which time steps count


def check_steps(lengths: object, valid: object, starts: object) -> None:
    """Check lengths, valid and starts: at most one of the first two, and their dtypes."""
    _expect(lengths is None or valid is None, "lengths and valid", "one of them, got both")
    for name, given in zip(STEPS, (lengths, valid, starts), strict=True):
        if given is not None:
            _check_tensor_of(name, given, *STEPS[name])


def check_steps_of(x: Tensor, time_dim: int, steps: Sequence[Tensor | None]) -> None:
    """Check that the shapes and devices of lengths, valid and starts fit a layer."""
    check_no_parts(x)
    batch, _ = sizes_of(x, time_dim)
    for name, given in zip(STEPS, steps, strict=True):
        if given is None:
            continue
        if name == "lengths":
            fits = list(given.shape) == [batch]
            _expect(fits, name, "shape ({},), one length a sequence, got {}", batch, given.shape)
        else:
            _check_shape_of_steps(name, given, x, time_dim)
        words = "a tensor on {}, or another device with memory, got one on meta"
        _expect(x.is_meta or not given.is_meta, name, words, x.device)


def _check_shape_of_steps(name: str, given: Tensor, x: Tensor, time_dim: int) -> None:
    """Check that valid or starts has the batch and time axes of activations, in their order."""
    time, batch = axes_of(x, time_dim)
    axes = [time] if batch is None else sorted([batch, time])
    shape, expected = list(given.shape), [x.shape[axis] for axis in axes]
    if shape == expected:
        return
    remedy = ""
    if shape == expected[::-1]:
        remedy = f", which is transposed; use {name}.T"
    elif batch is not None and shape == [x.shape[batch]]:
        remedy = "; a (batch, time) mask of lengths is torch.arange(time) < lengths[:, None]"
    elif given.shape == x.shape:  # of two axes, which are read as time and hidden
        remedy = f"; if the activations are numbers, (time, batch), pass their .T and {name}.T with time_dim=1"
    names = "(time,)" if batch is None else "(time, batch)" if time < batch else "(batch, time)"
    words = "shape {} = {}, as the activations have these axes, got {}{}"
    error = ValidShapeError if name == "valid" else ValueError
    _expect(False, name, words, names, torch.Size(expected), given.shape, remedy, error=error)


def check_no_parts(x: Tensor) -> None:
    """Refuse a DTensor: the encoded steps are plain tensors and cannot be mixed with it."""
    words = "no DTensor with lengths, valid steps or starts, and no packed DTensor; pass x.to_local() of each part"
    _expect(getattr(x, "to_local", None) is None, "raw and dropped", words, error=TypeError)


def check_range(name: str, time: int, x: Tensor) -> None:
    """Check the values of lengths, valid or starts on the CPU."""
    # Python compares a few values in a third of the time that an operator takes.
    values = x.reshape(-1).tolist() if x.numel() <= 100 else [*map(int, x.aminmax())]
    least, greatest = min(values), max(values)
    most, words = (time, f"from 0 to the {time} time steps of a sequence") if name == "lengths" else (1, "0 or 1")
    if least < 0 or greatest > most:
        raise ValueError(f"{name}: expected {words}, got {least if least < 0 else greatest}")


def check_not_captured(name: str, device: torch.device) -> None:
    """Check that no CUDA graph is being captured, because it would read memory of the CPU in each replay."""
    # A compiler cannot ask, and captures its own graphs, whose inputs it copies. Fake tensors need no device.
    is_compiling = torch.compiler.is_compiling()
    words = "a tensor on the GPU during CUDA-graph capture, and no PackedSequence: a replay would read {}"
    fits = is_compiling or not torch.accelerator.is_available() or not is_captured(device)
    _expect(fits, name, words, "freed CPU memory", error=RuntimeError)


def check_mask(mask: Tensor, raw: Tensor, row: Sequence[int]) -> None:
    """Check a dropout mask for `raw`: one row for all time steps, or raw's shape, as an elementwise dropout has it."""
    fits = mask.shape == raw.shape or list(mask.shape) == row  # `in` would not compare symbolic sizes
    words = "shape {} or raw's shape {}, got {}"
    _expect(fits, "mask", words, torch.Size(row), raw.shape, mask.shape)
    _expect(mask.dtype == raw.dtype, "mask", "the dtype of raw, {}, got {}", raw.dtype, mask.dtype, error=TypeError)
    _check_device("mask", mask, "raw", raw)
    _check_no_gradient("mask", mask)


# ---- the checks of every tensor


def _check_tensor_of(name: str, x: Any, dtypes: Sequence[torch.dtype], words: str, remedy: str = "") -> None:
    made = "; use torch.tensor()" if type(x) in (list, tuple) else ""
    _expect(isinstance(x, Tensor), name, "{}, got {}{}", words, type(x), made, error=TypeError)
    _expect(x.dtype in dtypes, name, "{}, got one of {}{}", words, x.dtype, remedy, error=TypeError)
    _check_dense(name, x)


def _check_dense(name: str, x: Tensor) -> None:
    layout = "nested" if x.is_nested else x.layout  # a nested tensor has any
    _expect(layout == torch.strided, name, "a dense (strided) tensor, got {}", layout, error=TypeError)


def _check_no_gradient(name: str, x: Tensor) -> None:
    _expect(not x.requires_grad, name, "a tensor that requires no gradient, got one that does")


def _check_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    words = "a tensor on {}, where {} is, got one on {}"
    _expect(x.device == y.device, name, words, y.device, other, x.device)
