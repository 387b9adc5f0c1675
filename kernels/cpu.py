"""The kernels of cpu.cpp, called with the addresses of CPU tensors.

A plan holds the metadata of an operation as C knows it, and is built once; a call hands over addresses alone, and
releases the GIL. A library is built for each level of processors when the package is installed (see setup.py); the best
one that runs here is loaded. It shares PyTorch's OpenMP runtime, which is loaded before it, and takes as many
threads as PyTorch does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastreg.kernels.view import Result, Sums, Values, View

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_DONE, _OUT_OF_MEMORY = 0, 2  # as C returns them; 1 if there was nothing to do
_LIBRARIES = {"_cpu_v3": "processors with AVX2", "_cpu": "all processors"}  # the best first
_INSTALL = "install fastreg-rnn again"


class PenaltyForward:
    """Compute penalties of tensors of one layout, and the gradients that the backward is expected to ask for.

    It is built and called as `fastreg.kernels.penalty.PenaltyForward`.
    """

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.plan, self.dtype, self.function = _penalty(view, sums), sums.dtype, library().penalty_forward

    def __call__(self, tensors: Sequence[Tensor | None], values: Values, before: Result | None = None) -> Result:
        """Compute the penalty, and fill the gradients for the upstream gradient of the last backward."""
        _, _, grad_raw, grad_dropped = tensors
        assumed = None if grad_raw is None and grad_dropped is None else _expected[self.dtype]
        penalty, terms, _ = before or _result(self.dtype)
        read = _read(values, self.dtype)
        _call(self.function, self.plan, _PenaltyMemory, (*tensors, assumed, None, *read, penalty, terms))
        return Result(penalty, terms, assumed)


class PenaltyBackward:
    """Compute the gradients of penalties of tensors of one layout.

    It is built and called as `fastreg.kernels.penalty.PenaltyBackward`.
    """

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.plan, self.dtype, self.function = _penalty(view, sums), sums.dtype, library().penalty_backward

    def __call__(self, grad: Tensor, tensors: Sequence[Tensor | None], values: Values, assumed: Tensor | None) -> None:
        """Fill the gradients, unless the forward has filled them for this very upstream gradient."""
        arguments = *tensors, grad, assumed, *_read(values, self.dtype), None, None
        if _call(self.function, self.plan, _PenaltyMemory, arguments) == _DONE:
            # A new tensor, as other graphs refer to the old one, and one that graphs may keep. Threads may overwrite
            # each other's: a wrong guess costs time alone.
            with torch.inference_mode(False):
                _expected[self.dtype] = grad.detach().clone()


class DropoutForward:
    """Apply dropout masks and compute penalties, as `fastreg.kernels.dropout.DropoutForward` does."""

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.plan, self.dtype, self.function = _dropout(view, sums), sums.dtype, library().dropout_forward

    def __call__(self, tensors: Sequence[Tensor], values: Values) -> Result:
        """Fill `dropped` and compute the penalty."""
        result = _result(self.dtype)
        arguments = *tensors, None, None, *_read(values, self.dtype), *result[:2]
        _call(self.function, self.plan, _DropoutMemory, arguments)
        return result


class DropoutBackward:
    """Compute the gradient of raw, as `fastreg.kernels.dropout.DropoutBackward` does."""

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.plan, self.dtype, self.function = _dropout(view, sums), sums.dtype, library().dropout_backward

    def __call__(self, grad: Tensor | None, tensors: Sequence[Tensor | None], values: Values) -> None:
        """Fill the gradient of raw."""
        arguments = *tensors, grad, *_read(values, self.dtype), None, None
        _call(self.function, self.plan, _DropoutMemory, arguments)


def marks_of(valid: Tensor) -> None:
    """Prepare nothing: each launch reads the valid steps themselves."""


def reason() -> str | None:
    """Return why the kernels do not run here, or `None`: they do."""
    try:
        library()
    except OSError as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """Load the best library that runs here.

    Raises:
        OSError: there is none.
    """
    reasons = []
    for name in _LIBRARIES:
        for path in Path(__file__).parent.glob(f"{name}.*") if _runs_here(name) else ():
            try:
                return _checked(ctypes.CDLL(str(path)), path)
            except OSError as error:
                reasons.append(str(error))
    raise OSError("; ".join(reasons) or f"the kernels were not built: {_INSTALL} where there is a C++ compiler")


def description() -> str:
    """Describe the library that is loaded, and say why it is not a better one."""
    path, (best, *_) = Path(library()._name), _LIBRARIES
    name = path.name.partition(".")[0]
    if name == best:
        why = ""
    elif _runs_here(best):
        why = f"; no library for {_LIBRARIES[best]} was built"
    else:
        why = f"; by PyTorch's capability {torch.backends.cpu.get_cpu_capability()} this is none with AVX2"
    if not c_int32.in_dll(library(), "threaded"):
        why += "; one thread, as its compiler has no GNU OpenMP"
    return f"{path}, for {_LIBRARIES[name]}{why}"


def sources(folder: Path) -> int:
    """Hash the source of the libraries in a folder; an installed package has none, and the hash is that of nothing."""
    files = sorted((*folder.glob("cpu.cpp"), *folder.glob("cpu_*.h")))
    return int(sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16], 16)


def _runs_here(name: str) -> bool:
    """Return whether this processor is of the level of a library."""
    return name == "_cpu" or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _checked(library: ctypes.CDLL, path: Path) -> ctypes.CDLL:
    """Check that the library was built from this source, and declare its functions to ctypes."""
    structures = _Penalty, _PenaltyMemory, _Dropout, _DropoutMemory
    try:
        built = list((c_int64 * len(structures)).in_dll(library, "structure_sizes"))
        built_from = c_uint64.in_dll(library, "sources").value
    except ValueError:  # there is no such symbol
        built, built_from = [], 0
    is_source = (path.parent / "cpu.cpp").exists()
    if built != [ctypes.sizeof(x) for x in structures] or (is_source and built_from != sources(path.parent)):
        raise OSError(f"{path.name} was built from another version of the source: {_INSTALL}")
    for name, plan, memory in (("penalty", _Penalty, _PenaltyMemory), ("dropout", _Dropout, _DropoutMemory)):
        for direction in ("forward", "backward"):
            function = getattr(library, f"{name}_{direction}")
            function.argtypes = [POINTER(plan), POINTER(memory), c_int]
            function.restype = c_int
    return library


# The upstream gradient that is expected: that of the last backward, or 1. None of these tensors is ever written to.
with torch.inference_mode(False):
    _expected = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


class _Sizes(Structure):
    _fields_ = [(name, c_int64) for name in ("outer", "time", "inner")]


class _Strides(Structure):
    _fields_ = [("outer", c_int64), ("time", c_int64)]


class _Steps(Structure):
    _fields_ = [("ar_divisor", c_double), ("tar_divisor", c_double), ("packed", c_int64)]


class _Penalty(Structure):
    _fields_ = [
        ("sizes", _Sizes),
        *((name, _Strides) for name in ("raw", "dropped", "grad_raw", "grad_dropped")),
        ("steps", _Steps),
        *((name, c_double) for name in ("alpha", "beta")),
        *((name, c_int32) for name in ("raw_dtype", "dropped_dtype", "compute_dtype", "ar_of_raw", "adds")),
    ]


class _Dropout(Structure):
    _fields_ = [
        ("sizes", _Sizes),
        *((name, _Strides) for name in ("raw", "mask", "dropped", "grad_raw")),
        ("steps", _Steps),
        *((name, c_double) for name in ("alpha", "beta")),
        *((name, c_int32) for name in ("dtype", "compute_dtype", "ar", "tar", "ar_of_raw", "adds")),
    ]


_READ_AND_WRITTEN = "lengths", "valid", "alpha", "beta", "penalty", "terms"


class _PenaltyMemory(Structure):
    _fields_ = [
        (name, c_void_p)
        for name in ("raw", "dropped", "grad_raw", "grad_dropped", "grad", "assumed", *_READ_AND_WRITTEN)
    ]


class _DropoutMemory(Structure):
    _fields_ = [(name, c_void_p) for name in ("raw", "mask", "dropped", "grad_raw", "grad", *_READ_AND_WRITTEN)]


def _penalty(view: View, sums: Sums) -> _Penalty:
    """Describe a penalty to C."""
    dtypes = [_DTYPES[torch.float32 if x is None else x.dtype] for x in view.operands[:2]]
    switches = sums.ar_of_raw and sums.ar, sums.adds
    return _Penalty(*_described(view, sums), *dtypes, _DTYPES[sums.dtype], *switches)


def _dropout(view: View, sums: Sums) -> _Dropout:
    """Describe dropout to C."""
    dtypes = [_DTYPES[dtype] for x in view.operands[:1] if x is not None for dtype in (x.dtype, sums.dtype)]
    return _Dropout(*_described(view, sums), *dtypes, sums.ar, sums.tar, sums.ar_of_raw, sums.adds)


def _described(view: View, sums: Sums) -> tuple[Any, ...]:
    """Return what both operations are described by: sizes, strides of four tensors, steps, and coefficients."""
    strides = [(0, 0) if x is None else (x.outer, x.time) for x in (*view.operands, None)[:4]]
    return view[:3], *strides, (*(sums.divisors or (0, 0)), view.packed), *sums.weights[:2]


def _read(values: Values, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return lengths or batch sizes, valid steps, and the coefficients as C reads them."""
    lengths, batch_sizes, valid, _, alpha, beta = values
    steps = batch_sizes if lengths is None else lengths.long()
    return steps, valid, *(None if x is None else x.to(dtype) for x in (alpha, beta))


def _result(dtype: torch.dtype) -> Result:
    """Allocate the penalty and its terms."""
    return Result(torch.empty((), dtype=dtype, device="cpu"), torch.empty((2,), dtype=dtype, device="cpu"), None)


def _call(function: Any, plan: Structure, memory: type[Structure], tensors: Sequence[Tensor | None]) -> int:
    """Call C with the addresses of tensors, which live as long as the call; return the outcome.

    Raises:
        MemoryError: there is too little memory for the offsets of packed rows.
    """
    addresses = memory(*(None if x is None else x.data_ptr() for x in tensors))
    outcome = function(byref(plan), byref(addresses), torch.get_num_threads())
    if outcome == _OUT_OF_MEMORY:
        raise MemoryError("the kernels for CPUs found too little memory for lengths and offsets of sequences")
    return outcome
