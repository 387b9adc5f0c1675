"""Every check of an argument, and every message; a check raises, and changes nothing.

A `TypeError` or a `ValueError` names the argument, and the expected and the given value. Checks of the metadata of
activations run when a plan is made, those of values, options and lists in every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.kernels.streams import is_captured
from fastreg.kernels.view import Layout
from fastreg.problem import Call, axes_of, is_list, rows_of, sizes_of
from fastreg.torch_state import has_values

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Arguments that leave steps out: their dtypes, in words, and the reason that they do not go with a PackedSequence.
_OWN, _PAD = (
    ", as a PackedSequence has lengths of its own",
    " with a PackedSequence; pad_packed_sequence gives a tensor, ",
)
STEPS: dict[str, tuple[Sequence[torch.dtype], str, str]] = {
    "lengths": (INTEGERS, "an integer tensor", _OWN),
    "valid": ((torch.bool, *INTEGERS), "a bool or integer tensor", _OWN),
    "starts": ((torch.bool, *INTEGERS), "a bool or integer tensor", f"{_PAD}and lengths"),
}
ACTIVATIONS = "a tensor, a PackedSequence, or a list or tuple of them"
HINT = " (an RNN gives its output and its state: pass the output)"


# ---- coefficients and options


def check_options(reduction: object, **flags: object) -> None:
    """Check the reduction, and flags by their names."""
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    check_flags(**flags)


def check_coefficient(name: str, value: Any) -> None:
    """Check a coefficient: a finite real number of at least 0, or a 0-dim tensor with one.

    The value of a tensor on another device than the CPU is not looked at, as that would wait for the device.
    """
    if isinstance(value, Tensor):
        is_scalar = value.shape == () and value.dtype in DTYPES
        _expect(is_scalar, name, "a number or a 0-dim floating-point tensor", (value.dtype, value.shape))
        _check_no_gradient(name, value)
        value = _check_dense(name, value).item() if has_values(value) else 0.0
    elif torch.compiler.is_compiling():
        _check_symbolic(name, value)
        return
    else:
        _check_real(name, value)
        value = _as_float(value)
    _expect(0 <= value < math.inf, name, "a finite number of at least 0", value)


def _check_symbolic(name: str, value: Any) -> None:
    """Check a coefficient that may be symbolic: during tracing as far as possible, else when the compiled code runs."""
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # which imports sympy

    number: Any = value
    if not isinstance(value, (bool, int, float, str)) and hasattr(value, "item"):
        number = value.item()  # a compiler takes a NumPy scalar for an array
    elif not isinstance(value, float):
        _check_real(name, value)
    fits = guard_or_true(number >= 0) and guard_or_true(number < math.inf)
    _expect(fits, name, "a finite number of at least 0", number)
    torch._check(number * 1.0 >= 0)  # torch 2.11 drops a check of the value itself
    torch._check(number < math.inf)


def check_probability(p: Any) -> None:
    """Check that `p`, the probability to drop a unit, is from 0 to below 1."""
    _check_real("p", p)
    _expect(0 <= _as_float(p) < 1, "p", "a probability from 0 to below 1", p)


def check_flags(**flags: object) -> None:
    """Check that arguments are true or false, given by their names."""
    for name, flag in flags.items():
        if flag is not True and flag is not False:
            raise TypeError(f"{name}: expected True or False, got {flag!r}")


def check_time(batch_first: object, time_dim: object) -> None:
    """Check that at most one of both says where time is, and its type."""
    if time_dim is None:
        check_flags(batch_first=batch_first is not None and batch_first)
        return
    _expect(batch_first is None, "batch_first and time_dim", "one of them", "both")
    is_axis = isinstance(time_dim, Integral) and not isinstance(time_dim, bool)
    _expect(is_axis, "time_dim", "an int, the axis of time", type(time_dim), TypeError)


def _check_real(name: str, value: object) -> None:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    _expect(is_real, name, "a real number", type(value), TypeError)


def _as_float(value: Any) -> float:
    """Convert a number; one that is too large to be a float is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


# ---- lists of layers and packed sequences, before there are calls of one layer


def check_given(name: str, value: object, coefficient: str) -> None:
    """Check that activations are given that a term with a coefficient reads."""
    if value is None:
        raise TypeError(f"{name}: expected {ACTIVATIONS}, got NoneType (it may be None only where {coefficient} is 0)")


def check_layers(raw: Any, dropped: Any, time_dim: int) -> list[tuple[str, Any, Any]]:
    """Check activations that are not two tensors: their types, the layers in pairs, and all of them together.

    Args:
        raw: a tensor, a `PackedSequence`, or a list or tuple of them; `None` if no term reads it.
        dropped: like raw.
        time_dim: the axis of time.

    Returns:
        Of each layer its label, raw and dropped.
    """
    raws, kept = _named("raw", raw), _named("dropped", dropped)
    if raws and kept:
        if len(raws) != len(kept) or is_list(raw) != is_list(dropped):
            hint = HINT if isinstance(raw, tuple) and not is_list(dropped) else ""
            raise ValueError(
                f"raw and dropped: expected the same layers in both, got {_count(raw)} and {_count(dropped)}{hint}"
            )
        for x, y in zip(raws, kept, strict=True):
            _check_packed_alike(*y, *x)
    layers = raws or kept
    for x in (*raws, *kept) if len(layers) > 1 else ():
        _check_alike(x, layers[0], time_dim)
    nothing = [("", None)] * len(layers)
    pairs = zip(raws or nothing, kept or nothing, strict=True)
    labels = [f"[{i}]" if is_list(raw) or is_list(dropped) else "" for i in range(len(layers))]
    return [(label, x, y) for label, ((_, x), (_, y)) in zip(labels, pairs, strict=True)]


def check_packed_options(time_dim: int | None, *steps: object) -> None:
    """Check the options of packed sequences: there are no lengths, valid steps or starts."""
    for name, given in zip(STEPS, steps, strict=True):
        if given is not None:
            raise ValueError(f"{name}: expected None{STEPS[name][2]}")
    _expect(time_dim in (None, 0, -2), "time_dim", "0 or None with a PackedSequence", time_dim)


def _named(name: str, value: Any) -> list[tuple[str, Any]]:
    """Check for a tensor, a `PackedSequence`, or a list or tuple of them; return each layer with its name."""
    if value is None:
        return []
    if isinstance(value, (Tensor, PackedSequence)):
        return [(name, _check_one(name, value))]
    _expect(isinstance(value, (list, tuple)), name, ACTIVATIONS, type(value), TypeError)
    _expect(len(value) > 0, name, "a tensor a layer", f"an empty {type(value).__name__}")
    return [(f"{name}[{i}]", _check_one(f"{name}[{i}]", x)) for i, x in enumerate(value)]


def _check_one(name: str, x: Any) -> Any:
    """Check a layer: a dense tensor, or the metadata of packed rows and their batch sizes."""
    if not isinstance(x, PackedSequence):
        return check_tensor(name, x)
    data, sizes = check_tensor(f"{name}.data", x.data), x.batch_sizes
    _check_dtype(f"{name}.data", data)
    _expect(data.dim() == 2, f"{name}.data", "(rows, hidden)", data.shape)
    _check_tensor_of(f"{name}.batch_sizes", sizes, INTEGERS, "an integer tensor")
    is_near = sizes.device.type == "cpu" or (sizes.is_meta and data.is_meta)
    _expect(is_near, f"{name}.batch_sizes", "a tensor on the CPU", f"one on {sizes.device}")
    _check_batch_sizes(name, sizes, data.shape[0])
    return x


def check_tensor(name: str, x: object) -> Tensor:
    """Check for a dense tensor."""
    if isinstance(x, PackedSequence):
        raise TypeError(f"{name}: expected a tensor, got a PackedSequence; pad_packed_sequence gives one, and lengths")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}{HINT if isinstance(x, tuple) else ''}")
    return _check_dense(name, x)


def _check_batch_sizes(name: str, sizes: Tensor, rows: int) -> None:
    """Check the values of batch sizes, as kernels would read past the end of rows that do not fit them."""
    if sizes.numel() and not has_values(sizes):
        return
    sizes = sizes.to(torch.int64)  # differences of few bits would wrap
    fits = sizes.dim() == 1 and sizes.numel() > 0 and int(sizes.min()) > 0 and int(sizes.max()) <= rows
    if not fits or int(sizes.sum()) != rows or bool((sizes.diff() > 0).any()):
        raise ValueError(
            f"{name}.batch_sizes: expected sizes above 0 that never grow and add up to the {rows} rows, "
            f"got {sizes.tolist()}"
        )


def _check_packed_alike(name: str, x: Any, other: str, y: Any) -> None:
    """Check that two layers are packed alike, or neither is packed."""
    if isinstance(x, PackedSequence) != isinstance(y, PackedSequence):
        kinds = ["a PackedSequence" if isinstance(z, PackedSequence) else "a tensor" for z in (y, x)]
        raise TypeError(f"{name}: expected {kinds[0]}, as {other} is, got {kinds[1]}")
    if isinstance(x, PackedSequence):
        sizes, others = x.batch_sizes, y.batch_sizes
        are_unlike = sizes is not others and has_values(sizes) and has_values(others) and not sizes.equal(others)
        _expect(not are_unlike, name, f"the batch_sizes of {other}", "others")


def _check_alike(x: tuple[str, Any], first: tuple[str, Any], time_dim: int) -> None:
    """Check that a layer has the device, batch and time steps of the first."""
    _check_device(x[0], rows_of(x[1]), first[0], rows_of(first[1]))
    _check_packed_alike(*x, *first)
    if isinstance(x[1], Tensor) and not _are_alike(x[1], first[1], time_dim):
        raise ValueError(
            f"{x[0]}: expected the batch and time steps of {first[0]}, of shape {_shape(first[1])}, "
            f"got {_shape(x[1])}{HINT}"
        )


def _are_alike(x: Any, y: Any, time_dim: int) -> bool:
    """Return whether layers have the same batch and time steps, as far as they have an axis of time."""
    dims = len(x.shape)
    if dims != len(y.shape) or not -dims <= time_dim < dims:
        return dims == len(y.shape)
    (batch, time), (other_batch, other_time) = sizes_of(x, time_dim), sizes_of(y, time_dim)
    return batch == other_batch and time == other_time


# ---- one layer


def check_axes(name: str, x: Any, time_dim: int | None) -> None:
    """Check that activations have an axis of time: `time_dim`, or that of `batch_first`, of two or three axes."""
    dims = len(x.shape)
    if time_dim is None:
        if dims not in (2, 3):
            raise ValueError(
                f"{name}: expected (batch, time, hidden), (time, batch, hidden) with batch_first=False, "
                f"or (time, hidden), or time_dim, got {_shape(x)}"
            )
    elif not -dims <= time_dim < dims:
        axes = f", from {-dims} to {dims - 1}" if dims else ""
        raise ValueError(f"time_dim: expected an axis of {name}, of shape {_shape(x)}{axes}, got {time_dim}")


def check_call(call: Call, mask: Any = None) -> None:
    """Check the tensors of a call: dtypes, shapes and devices.

    Args:
        call: of one layer.
        mask: of a dropout, or `None`.
    """
    tensors = [
        (f"{name}{call.label}", x) for name, x in (("raw", call.raw), ("dropped", call.dropped)) if x is not None
    ]
    first_name, first = tensors[0]
    for name, x in tensors:
        _check_dense(name, x)
        _check_dtype(name, x)
        if x.shape != first.shape:
            raise ValueError(f"{name}: expected the shape of {first_name}, {_shape(first)}, got {_shape(x)}")
        _check_device(name, x, first_name, first)
    for name, x in ("alpha", call.alpha), ("beta", call.beta):
        if isinstance(x, Tensor):
            _check_device(name, x, first_name, first)
    if mask is not None:
        _check_mask(mask, first, call.time_dim)


# ---- which time steps count


def check_steps(lengths: object, valid: object, starts: object) -> None:
    """Check lengths, valid steps and starts: at most one of the first two, and their dtypes."""
    _expect(lengths is None or valid is None, "lengths and valid", "one of them", "both")
    for name, given in zip(STEPS, (lengths, valid, starts), strict=True):
        if given is not None:
            _check_tensor_of(name, given, *STEPS[name][:2])


def check_steps_of(x: Any, time_dim: int, steps: Sequence[Any]) -> None:
    """Check the shapes and devices of lengths, valid steps and starts against those of a layer."""
    check_no_parts(x)
    batch, time = sizes_of(x, time_dim)
    for name, given in zip(STEPS, steps, strict=True):
        if given is None:
            continue
        if name == "lengths":
            fits = given.dim() == 1 and given.shape[0] == batch
        else:
            fits = axes_of(x, time_dim)[1] is None and given.dim() == 1 and given.shape[0] == time
            fits = fits or (given.dim() == 2 and given.shape[0] == batch and given.shape[1] == time)
        if not fits:  # a message specializes sizes in compiled code, so that only a wrong shape may form one
            expected = f"({batch},), one length a sequence"
            if name != "lengths":
                layout = ", in every layout" if time_dim == -len(x.shape) else ""
                expected = f"({batch}, {time}), batch and time steps{layout}"
            raise ValueError(f"{name}: expected shape {expected}, got {_shape(given)}")
        if given.device.type == "meta" != x.device.type:
            raise ValueError(f"{name}: expected a tensor on {x.device}, or another device with memory, got one on meta")


def check_no_parts(x: Any) -> None:
    """Check that activations are no DTensor, as marks and offsets of steps are not."""
    if getattr(x, "to_local", None) is not None:
        raise TypeError(
            "raw and dropped: expected no DTensor with lengths, valid steps or starts, or packed; pass x.to_local() of "
            "each part"
        )


def check_values(name: str, x: Tensor, time: int) -> None:
    """Check the values of lengths or marks on the CPU; on another device, looking at them would wait for the device."""
    if x.dtype != torch.bool and has_values(x):
        (least, greatest), is_length = [int(n) for n in x.aminmax()], name == "lengths"
        if least < 0 or greatest > (time if is_length else 1):
            expected = f"from 0 to the {time} time steps there are" if is_length else "0 or 1"
            raise ValueError(f"{name}: expected {expected}, got {least if least < 0 else greatest}")


def check_not_captured(name: str, device: torch.device) -> None:
    """Check that no graph is captured that would read memory of the CPU in each replay."""
    if torch.compiler.is_compiling():  # a compiler cannot ask, and captures its own graphs with inputs that it copies
        return
    if torch.accelerator.is_available() and is_captured(device):  # fake tensors need no device
        raise RuntimeError(
            f"{name}: expected them on the GPU, and no PackedSequence, while a graph is captured: the replay would "
            "read freed memory of the CPU"
        )


def _check_mask(mask: object, raw: Tensor, time_dim: int) -> None:
    """Check a dropout mask for `raw`: of one row for all time steps, or of raw's shape."""
    mask = check_tensor("mask", mask)
    one_row = list(raw.shape)
    one_row[time_dim] = 1
    if mask.shape != raw.shape and list(mask.shape) != one_row:  # `in` would not compare symbolic sizes
        raise ValueError(f"mask: expected shape {tuple(one_row)} or that of raw, {_shape(raw)}, got {_shape(mask)}")
    _expect(mask.dtype == raw.dtype, "mask", f"the dtype of raw, {raw.dtype}", mask.dtype, TypeError)
    _check_device("mask", mask, "raw", raw)
    _check_no_gradient("mask", mask)


def check_saved(name: str, before: Layout, saved: Any) -> None:
    """Check that a tensor kept its shape, dtype and device from forward to backward."""
    for fact in "shape", "dtype", "device":
        expected, given = getattr(before, fact), getattr(saved, fact)
        if given != expected:
            expected, given = (tuple(x) if fact == "shape" else x for x in (expected, given))
            raise RuntimeError(
                f"{name}: expected the {fact} of the forward, {expected}, got {given} in the backward, as its data was "
                "replaced, or a hook on saved tensors returned another; let unpack hooks restore what pack hooks change"
            )


# ---- the checks of every tensor


def _expect(fits: bool, name: str, expected: str, given: Any, error: type[Exception] = ValueError) -> None:
    """Raise an error unless an argument fits; shapes and types are given as they are, and formatted in the error."""
    if not fits:
        parts = given if type(given) is tuple else (given,)
        words = [
            x.__name__ if isinstance(x, type) else _shape(x) if isinstance(x, torch.Size) else f"{x}" for x in parts
        ]
        raise error(f"{name}: expected {expected}, got {' '.join(words)}")


def _check_tensor_of(name: str, x: object, dtypes: Sequence[torch.dtype], expected: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    _expect(x.dtype in dtypes, name, expected, ("one of", x.dtype), TypeError)
    _check_dense(name, x)


def _check_dense(name: str, x: Tensor) -> Tensor:
    is_dense = x.layout == torch.strided and not x.is_nested
    _expect(is_dense, name, "a dense (strided) tensor", "nested" if x.is_nested else x.layout, TypeError)
    return x


def _check_no_gradient(name: str, x: Tensor) -> None:
    _expect(not x.requires_grad, name, "a tensor that requires no gradient", "one that does")


def _check_device(name: str, x: Any, other: str, y: Any) -> None:
    if x.device != y.device:
        raise ValueError(f"{name}: expected a tensor on {y.device}, where {other} is, got one on {x.device}")


def _check_dtype(name: str, x: Any) -> None:
    _expect(x.dtype in DTYPES, name, "float16, bfloat16, float32 or float64", x.dtype, TypeError)


def _shape(x: Any) -> str:
    return f"{tuple(x if isinstance(x, torch.Size) else x.shape)}"


def _count(value: object) -> str:
    return f"{len(value)} layers" if is_list(value) else "one tensor"  # pyright: ignore[reportArgumentType]
