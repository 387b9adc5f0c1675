"""Every check of an argument, and every message; a check raises, and changes nothing.

A `TypeError` or a `ValueError` names the argument, and the expected and the given value. Checks of metadata run when a
plan is made, those of values in every call.
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
from fastreg.problem import (
    Call,
    Problem,
    batch_axis,
    is_list,
    reads_dropped,
    reads_raw,
    rows_of,
    steps_of,
    time_axis,
)
from fastreg.torch_state import has_values

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
HINT = " (an RNN gives its output and its state: pass the output)"


# ---- coefficients and options


def check_options(call: Call, **flags: object) -> None:
    """Check the coefficients, the reduction, and flags by their names."""
    check_coefficient("alpha", call.alpha)
    check_coefficient("beta", call.beta)
    if not isinstance(call.reduction, str) or call.reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {call.reduction!r}")
    check_flags(**flags)


def check_coefficient(name: str, value: Any) -> None:
    """Check a coefficient: a finite real number of at least 0, or a 0-dim tensor with one."""
    if isinstance(value, Tensor):
        _check_scalar(name, value)
    elif not torch.compiler.is_compiling():
        _check_real(name, value)
        value = _as_float(value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    else:
        _check_symbolic(name, value)


def _check_symbolic(name: str, value: Any) -> None:
    """Check a coefficient that may be symbolic: during tracing as far as possible, else when the compiled code runs."""
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # which imports sympy

    number: Any = value
    if not isinstance(value, (bool, int, float, str)) and hasattr(value, "item"):
        number = value.item()  # a compiler takes a NumPy scalar for an array
    elif not isinstance(value, float):
        _check_real(name, value)
    if not (guard_or_true(number >= 0) and guard_or_true(number < math.inf)):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {number}")
    torch._check(number * 1.0 >= 0)  # torch 2.11 drops a check of the value itself
    torch._check(number < math.inf)


def _check_scalar(name: str, value: Tensor) -> None:
    if value.shape != () or value.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected a number or a 0-dim floating-point tensor, got {value.dtype} {_shape(value)}"
        )
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")
    _check_dense(name, value)
    check_coefficient_value(name, value)


def check_coefficient_value(name: str, value: Tensor) -> None:
    """Check the value of a coefficient on the CPU; on another device, looking at it would wait for the device."""
    if has_values(value) and not 0 <= value.item() < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value.item()}")


def check_probability(p: Any) -> None:
    """Check that `p`, the probability to drop a unit, is from 0 to below 1."""
    _check_real("p", p)
    if not 0 <= _as_float(p) < 1:
        raise ValueError(f"p: expected a probability from 0 to below 1, got {p}")


def check_flags(**flags: object) -> None:
    """Check that arguments are true or false, given by their names."""
    for name, flag in flags.items():
        if flag is not True and flag is not False:
            raise TypeError(f"{name}: expected True or False, got {flag!r}")


def check_time(batch_first: object, time_dim: object) -> None:
    """Check that at most one of both says where time is, and its type."""
    if batch_first is not None:
        if time_dim is not None:
            raise ValueError("batch_first and time_dim: expected one of them, got both")
        check_flags(batch_first=batch_first)
    elif time_dim is not None and (isinstance(time_dim, bool) or not isinstance(time_dim, Integral)):
        raise TypeError(f"time_dim: expected an int, the axis of time, got {type(time_dim).__name__}")


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")


def _as_float(value: Any) -> float:
    """Convert a number; one that is too large to be a float is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


# ---- activations, layer by layer


def check_activations(call: Call, problem: Problem) -> None:
    """Check raw and dropped: each layer, the layers in pairs, and all of them together.

    Activations that no term reads are not looked at.
    """
    raws = _named("raw", call.raw, "beta") if reads_raw(call, problem) else None
    kept = _named("dropped", call.dropped, "alpha") if reads_dropped(call, problem) else None
    if raws is not None and kept is not None:
        if len(raws) != len(kept) or is_list(call.raw) != is_list(call.dropped):
            counts = f"{_count(call.raw)} and {_count(call.dropped)}"
            raise ValueError(f"raw and dropped: expected the same layers in both, got {counts}")
        for x, y in zip(raws, kept, strict=True):
            _check_packed_alike(*y, *x)
    layers = [[x] for x in raws or kept or []] if raws is None or kept is None else list(zip(raws, kept, strict=True))
    if not layers:
        return
    first = layers[0][0]
    if isinstance(first[1], PackedSequence):
        for name, given in ("lengths", call.lengths), ("valid", call.valid):
            if given is not None:
                raise ValueError(f"{name}: expected None, as a PackedSequence has lengths of its own")
        if call.starts is not None:
            raise ValueError(
                "starts: expected None with a PackedSequence; pad_packed_sequence gives a tensor, and lengths"
            )
    if len(layers) > 1:
        for x in (*(raws or []), *(kept or [])):
            _check_alike(x, first, problem)
    for layer in layers:
        check_layer(call, problem, *layer)


def check_layer(call: Call, problem: Problem, *tensors: tuple[str, Any]) -> None:
    """Check the shapes, dtypes and devices of the tensors of one layer, given with their names."""
    first_name, first = tensors[0][0], rows_of(tensors[0][1])
    for name, x in tensors:
        x = rows_of(x)
        _check_dtype(name, x)
        _check_axes(name, x, call, isinstance(tensors[0][1], PackedSequence))
        if x.shape != first.shape:
            raise ValueError(f"{name}: expected the shape of {first_name}, {_shape(first)}, got {_shape(x)}")
        _check_device(name, x, first_name, first)
    packed = isinstance(tensors[0][1], PackedSequence)
    is_whole = call.lengths is None and call.valid is None and call.starts is None and not packed
    if not is_whole and getattr(first, "to_local", None) is not None:
        raise TypeError(
            "raw and dropped: expected no DTensor with lengths, valid steps or starts, or packed; pass x.to_local() of "
            "each part"
        )
    for name, given in ("lengths", call.lengths), ("valid", call.valid), ("starts", call.starts):
        if given is not None:
            _check_steps_of(name, given, first, problem)
    for name, x in ("alpha", call.alpha), ("beta", call.beta):
        if isinstance(x, Tensor):
            _check_device(name, x, first_name, first)


def _check_axes(name: str, x: Any, call: Call, packed: bool) -> None:
    """Check that activations, or packed rows, have an axis of time where the call says."""
    dims = len(x.shape)
    if type(call.time_at) is not int:
        if dims not in (2, 3):
            raise ValueError(
                f"{name}: expected (batch, time, hidden), (time, batch, hidden) with batch_first=False, "
                f"or (time, hidden), or time_dim, got {_shape(x)}"
            )
    elif not -dims <= call.time_at < dims:
        axes = f", from {-dims} to {dims - 1}" if dims else ""
        raise ValueError(f"time_dim: expected an axis of {name}, of shape {_shape(x)}{axes}, got {call.time_at}")
    elif packed and call.time_at % dims:
        raise ValueError(f"time_dim: expected 0 or None with a PackedSequence, got {call.time_at}")


def _named(name: str, value: Any, coefficient: str) -> list[tuple[str, Any]]:
    """Check for a tensor, a `PackedSequence`, or a list or tuple of them; return each layer with its name."""
    if isinstance(value, PackedSequence):
        return [(name, _check_packed(name, value))]
    if isinstance(value, Tensor):
        return [(name, _check_dense(name, value))]
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name}: expected a tensor, a PackedSequence, or a list or tuple of them, got {type(value).__name__}"
            + (f" (it may be None only where {coefficient} is 0)" if value is None else "")
        )
    if not value:
        raise ValueError(f"{name}: expected a tensor a layer, got an empty {type(value).__name__}")
    layers = [(f"{name}[{i}]", x) for i, x in enumerate(value)]
    return [
        (label, _check_packed(label, x) if isinstance(x, PackedSequence) else check_tensor(label, x))
        for label, x in layers
    ]


def check_tensor(name: str, x: object) -> Tensor:
    """Check for a dense tensor."""
    if isinstance(x, PackedSequence):
        raise TypeError(f"{name}: expected a tensor, got a PackedSequence; pad_packed_sequence gives one, and lengths")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}{HINT if isinstance(x, tuple) else ''}")
    return _check_dense(name, x)


def _check_packed(name: str, x: PackedSequence) -> PackedSequence:
    """Check the metadata of packed rows and their batch sizes."""
    data = check_tensor(f"{name}.data", x.data)
    _check_dtype(f"{name}.data", data)
    if data.dim() != 2:
        raise ValueError(f"{name}.data: expected (rows, hidden), got {_shape(data)}")
    _check_tensor_of(f"{name}.batch_sizes", x.batch_sizes, INTEGERS, "an integer tensor")
    sizes = x.batch_sizes
    if sizes.device.type != "cpu" and not (sizes.is_meta and data.is_meta):
        raise ValueError(f"{name}.batch_sizes: expected a tensor on the CPU, got one on {sizes.device}")
    check_batch_sizes(name, sizes, data.shape[0])
    return x


def check_batch_sizes(name: str, sizes: Tensor, rows: int) -> None:
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
        check_same_batch_sizes(name, x.batch_sizes, other, y.batch_sizes)


def check_same_batch_sizes(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Check that two layers have the same batch sizes."""
    if x is not y and has_values(x) and has_values(y) and not x.equal(y):
        raise ValueError(f"{name}: expected the batch_sizes of {other}, got others")


def _check_alike(x: tuple[str, Any], first: tuple[str, Any], problem: Problem) -> None:
    """Check that a layer has the device, batch and time steps of the first."""
    _check_device(x[0], rows_of(x[1]), first[0], rows_of(first[1]))
    _check_packed_alike(*x, *first)
    if isinstance(x[1], Tensor) and not _are_alike(x[1], first[1], problem):
        raise ValueError(
            f"{x[0]}: expected the batch and time steps of {first[0]}, of shape {_shape(first[1])}, "
            f"got {_shape(x[1])}{HINT}"
        )


def _are_alike(x: Any, y: Any, problem: Problem) -> bool:
    """Return whether layers have the same batch and time steps, as far as they have an axis of time."""
    dims = len(x.shape)
    if dims != len(y.shape) or not dims or not -dims <= problem.time_dim < dims:
        return dims == len(y.shape)
    (batch, time), (other_batch, other_time) = steps_of(x, problem), steps_of(y, problem)
    return batch == other_batch and time == other_time


# ---- which time steps count


def check_steps(lengths: object, valid: object, starts: object) -> None:
    """Check lengths, valid steps and starts: at most one of the first two, and their dtypes."""
    if lengths is not None and valid is not None:
        raise ValueError("lengths and valid: expected one of them, got both")
    if lengths is not None:
        _check_tensor_of("lengths", lengths, INTEGERS, "an integer tensor")
    if valid is not None:
        _check_tensor_of("valid", valid, (torch.bool, *INTEGERS), "a bool or integer tensor")
    if starts is not None:
        _check_tensor_of("starts", starts, (torch.bool, *INTEGERS), "a bool or integer tensor")


def _check_steps_of(name: str, given: Tensor, x: Any, problem: Problem) -> None:
    """Check the shape and the device of lengths, valid steps or starts against those of a layer."""
    batch, time = steps_of(x, problem)
    if name == "lengths":
        fits = given.dim() == 1 and given.shape[0] == batch
    else:
        fits = batch_axis(x, problem) is None and given.dim() == 1 and given.shape[0] == time
        fits = fits or (given.dim() == 2 and given.shape[0] == batch and given.shape[1] == time)
    if not fits:  # a message specializes sizes in compiled code, so that only a wrong shape may form one
        expected = f"({batch},), one length a sequence"
        if name != "lengths":
            layout = ", in every layout" if problem.time_dim == 0 else ""
            expected = f"({batch}, {time}), batch and time steps{layout}"
        raise ValueError(f"{name}: expected shape {expected}, got {_shape(given)}")
    if given.device.type == "meta" != x.device.type:
        raise ValueError(f"{name}: expected a tensor on {x.device}, or another device with memory, got one on meta")


def check_lengths_values(lengths: Tensor, time: int) -> None:
    """Check the values of lengths on the CPU; on another device, looking at them would wait for the device."""
    if has_values(lengths):
        least, most = (int(n) for n in lengths.aminmax())
        if least < 0 or most > time:
            raise ValueError(
                f"lengths: expected from 0 to the {time} time steps there are, got {least if least < 0 else most}"
            )


def check_marks_values(name: str, marks: Tensor) -> None:
    """Check the values of valid steps or starts on the CPU; on another device the check would wait for it."""
    if marks.dtype != torch.bool and has_values(marks):
        least, most = (int(n) for n in marks.aminmax())
        if least < 0 or most > 1:
            raise ValueError(f"{name}: expected 0 or 1, got {least if least < 0 else most}")


def check_not_captured(name: str, device: torch.device) -> None:
    """Check that no graph is captured that would read memory of the CPU in each replay."""
    if torch.compiler.is_compiling():  # a compiler cannot ask, and captures its own graphs with inputs that it copies
        return
    if torch.accelerator.is_available() and is_captured(device):  # fake tensors need no device
        raise RuntimeError(
            f"{name}: expected them on the GPU, and no PackedSequence, while a graph is captured: the replay would "
            "read freed memory of the CPU"
        )


# ---- masks


def check_mask(mask: object, raw: Tensor, problem: Problem) -> None:
    """Check a dropout mask for `raw`: of one row for all time steps, or of raw's shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    _check_dense("mask", mask)
    one_row = list(raw.shape)
    one_row[time_axis(raw, problem)] = 1
    if mask.shape != raw.shape and list(mask.shape) != one_row:  # `in` would not compare symbolic sizes
        raise ValueError(f"mask: expected shape {tuple(one_row)} or that of raw, {_shape(raw)}, got {_shape(mask)}")
    if mask.dtype != raw.dtype:
        raise TypeError(f"mask: expected the dtype of raw, {raw.dtype}, got {mask.dtype}")
    _check_device("mask", mask, "raw", raw)
    if mask.requires_grad:
        raise ValueError("mask: expected a tensor that requires no gradient, got one that does")


def check_saved(name: str, before: Any, saved: Any) -> None:
    """Check that a tensor kept its shape from forward to backward, as its `data` and unpacking hooks may change."""
    if saved.shape != before.shape:
        raise RuntimeError(
            f"{name}: expected the shape of the forward, {_shape(before)}, got {_shape(saved)} in the backward, as its "
            "data was replaced, or a hook on saved tensors returned another"
        )


# ---- the checks of every tensor


def _check_tensor_of(name: str, x: object, dtypes: Sequence[torch.dtype], expected: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {expected}, got one of {x.dtype}")
    _check_dense(name, x)


def _check_dense(name: str, x: Tensor) -> Tensor:
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {'nested' if x.is_nested else x.layout}")
    return x


def _check_device(name: str, x: Any, other: str, y: Any) -> None:
    if x.device != y.device:
        raise ValueError(f"{name}: expected a tensor on {y.device}, where {other} is, got one on {x.device}")


def _check_dtype(name: str, x: Any) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def _shape(x: Any) -> str:
    return f"{tuple(x.shape)}"


def _count(value: object) -> str:
    return f"{len(value)} layers" if is_list(value) else "one tensor"  # pyright: ignore[reportArgumentType]
