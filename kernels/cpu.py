"""The kernels of cpu.cpp, called with the addresses of CPU tensors.

A plan holds the metadata of an operation as C knows it, and is built once; a call hands over addresses alone, and does
not hold Python's lock. The library is built when the package is installed (see pyproject.toml), for each level of
processors on its own; the best that was built and that runs here is loaded. It shares PyTorch's OpenMP runtime, as
that is in the process first, and takes as many threads as PyTorch does.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_LENGTHS = {torch.uint8: 1, torch.int8: -1, torch.int16: -2, torch.int32: -4, torch.int64: -8}
_LEVELS = {"AVX512": ("_cpu_v4", "_cpu_v3", "_cpu"), "AVX2": ("_cpu_v3", "_cpu")}  # what PyTorch says runs here


class Sizes(NamedTuple):
    """Extents of a view, none of them 0; of packed rows `outer` is not used, and `inner` is the hidden size."""

    outer: int
    time: int
    inner: int


class Rows(NamedTuple):
    """How a tensor lies in memory: strides in elements; the inner axis is contiguous. Packed rows have one for both."""

    dtype: torch.dtype
    outer: int
    time: int


class Steps(NamedTuple):
    """Which time steps count, and what the sums are divided by.

    lengths   dtype of `(outer,)` lengths, any integers, which count as from 0 to `time`; None: all steps count
    packed    the tensors are rows as in a `PackedSequence`, and lengths its `(time,)` batch sizes, int64
    divisors  of AR and of TAR; None: the elements and the changes that lengths leave
    """

    lengths: torch.dtype | None = None
    packed: bool = False
    divisors: tuple[float, float] | None = None


class Terms(NamedTuple):
    """The coefficients, and whether AR is that of raw."""

    alpha: float
    beta: float
    ar_of_raw: bool = False


class PenaltyRows(NamedTuple):
    """How the tensors of the penalty lie in memory; None: there is none."""

    raw: Rows | None = None
    dropped: Rows | None = None
    grad_raw: Rows | None = None
    grad_dropped: Rows | None = None


class DropoutRows(NamedTuple):
    """How the tensors of dropout lie in memory, all of one dtype; a mask for all time steps has a time stride of 0."""

    raw: Rows
    mask: Rows
    dropped: Rows | None = None  # in a backward its gradient, or None: it has none
    grad_raw: Rows | None = None


class PenaltyMemory(Structure):
    """Addresses, of memory that lives as long as the call; None: there is none, and it is neither read nor written.

    raw, dropped            (outer, time, inner); AR is that of dropped, or with `ar_of_raw` of raw, TAR that of raw
    grad_raw, grad_dropped  likewise: out, their gradients
    lengths                 (outer,) integers, or (time,) batch sizes
    grad                    () in the dtype of the computation: the gradient of the penalty; in a forward the one to
                            expect, or None, and no gradient is written
    assumed                 () out of a forward with `grad`, a copy of it; of a backward in, or None: gradients that
                            a forward wrote are not right
    results                 (3,) out of a forward: penalty, ar and tar
    """

    _fields_ = [
        (name, c_void_p)
        for name in ("raw", "dropped", "grad_raw", "grad_dropped", "lengths", "grad", "assumed", "results")
    ]


class DropoutMemory(Structure):
    """Addresses, as in `PenaltyMemory`.

    raw, mask  (outer, time, inner), one row of the mask for all time steps where its time stride is 0
    dropped    (outer, time, inner): out of a forward; of a backward its gradient, or None
    grad_raw   (outer, time, inner): out of a backward
    lengths    (outer,) integers
    grad       () in the dtype of the computation, the gradient of the penalty in a backward, or None
    results    (3,) out of a forward: penalty, ar and tar
    """

    _fields_ = [(name, c_void_p) for name in ("raw", "mask", "dropped", "grad_raw", "lengths", "grad", "results")]


class PenaltyPlan:
    """AR and TAR of tensors that lie in memory as `rows` says.

    Differences, squares and sums are formed in float32, or float64 where a tensor is; sums over rows in float64.
    """

    def __init__(self, sizes: Sizes, rows: PenaltyRows, steps: Steps, terms: Terms) -> None:
        dtypes = [x.dtype for x in rows if x is not None]
        self._plan = _Penalty(
            sizes,
            *(_strides(x) for x in rows),
            _steps(steps),
            terms.alpha,
            terms.beta,
            *(_DTYPES[x.dtype if x else torch.float32] for x in rows[:2]),
            _DTYPES[torch.float64 if torch.float64 in dtypes else torch.float32],
            terms.ar_of_raw,
        )
        self._library = library()

    def forward(self, memory: PenaltyMemory) -> None:
        """Write the penalty and its terms, and the gradients for the upstream gradient expected, if one is given."""
        self._library.penalty_forward(self._plan, byref(memory), torch.get_num_threads())

    def backward(self, memory: PenaltyMemory) -> bool:
        """Write the gradients, unless they were written for this upstream gradient; tell whether it wrote any."""
        return bool(self._library.penalty_backward(self._plan, byref(memory), torch.get_num_threads()))


class DropoutPlan:
    """Variational dropout with AR and TAR; a term whose coefficient is 0 is off."""

    def __init__(self, sizes: Sizes, rows: DropoutRows, steps: Steps, terms: Terms) -> None:
        self._plan = _Dropout(
            sizes,
            *(_strides(x) for x in rows),
            _steps(steps),
            terms.alpha,
            terms.beta,
            _DTYPES[rows.raw.dtype],
            _DTYPES[torch.promote_types(rows.raw.dtype, torch.float32)],
            terms.alpha != 0,
            terms.beta != 0,
            terms.ar_of_raw,
        )
        self._library = library()

    def forward(self, memory: DropoutMemory) -> None:
        """Write dropped, and the penalty and its terms."""
        self._library.dropout_forward(self._plan, byref(memory), torch.get_num_threads())

    def backward(self, memory: DropoutMemory) -> None:
        """Write the gradient of raw."""
        self._library.dropout_backward(self._plan, byref(memory), torch.get_num_threads())


def reason() -> str | None:
    """Why the kernels do not run here, or None: they do."""
    try:
        library()
    except OSError as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The library for this processor. Raises OSError where there is none."""
    level = torch.backends.cpu.get_cpu_capability()
    for name in _LEVELS.get(level, ("_cpu",)):
        for path in Path(__file__).parent.glob(f"{name}.*"):
            return _typed(ctypes.CDLL(str(path)))
    raise OSError("the kernels for CPUs were not built: install the package where there is a C++ compiler")


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("penalty", "dropout"):
        plan, memory = {"penalty": (_Penalty, PenaltyMemory), "dropout": (_Dropout, DropoutMemory)}[name]
        for direction in ("forward", "backward"):
            function = getattr(library, f"{name}_{direction}")
            function.argtypes = [POINTER(plan), POINTER(memory), c_int]
            function.restype = None
    library.penalty_backward.restype = c_int
    return library


class _Sizes(Structure):
    _fields_ = [(name, c_int64) for name in ("outer", "time", "inner")]


class _Strides(Structure):
    _fields_ = [("outer", c_int64), ("time", c_int64)]


class _Steps(Structure):
    _fields_ = [("ar_divisor", c_double), ("tar_divisor", c_double), ("lengths", c_int32), ("packed", c_int32)]


class _Penalty(Structure):
    _fields_ = [
        ("sizes", _Sizes),
        *((name, _Strides) for name in PenaltyRows._fields),
        ("steps", _Steps),
        *((name, c_double) for name in ("alpha", "beta")),
        *((name, c_int32) for name in ("raw_dtype", "dropped_dtype", "compute_dtype", "ar_of_raw")),
    ]


class _Dropout(Structure):
    _fields_ = [
        ("sizes", _Sizes),
        *((name, _Strides) for name in DropoutRows._fields),
        ("steps", _Steps),
        *((name, c_double) for name in ("alpha", "beta")),
        *((name, c_int32) for name in ("dtype", "compute_dtype", "ar", "tar", "ar_of_raw")),
    ]


def _strides(rows: Rows | None) -> tuple[int, int]:
    return (0, 0) if rows is None else (rows.outer, rows.time)


def _steps(steps: Steps) -> tuple[float, float, int, bool]:
    lengths = 0 if steps.lengths is None else _LENGTHS[steps.lengths]
    return *(steps.divisors or (0, 0)), lengths, steps.packed
