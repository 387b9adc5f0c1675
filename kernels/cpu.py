"""The kernels of cpu.cpp, called with the addresses of CPU tensors.

A plan holds the metadata of an operation as C knows it, and is built once; a call hands over addresses alone, and
releases the GIL. A library is built for each level of processors when the package is installed (see setup.py); the best
one that runs here is loaded. It shares PyTorch's OpenMP runtime, which is loaded before it, and takes as many
threads as PyTorch does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from hashlib import sha256
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from fastreg.kernels.view import NOTHING, Prediction, Result, Sums, Values, View

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_DONE, _OUT_OF_MEMORY = 0, 2  # as C returns them; 1 if there was nothing to do
# The libraries, the best first: the level of x86-64 that each needs, and the processors that have it.
_LIBRARIES = {
    "_cpu_v4": (4, "processors with AVX-512"),
    "_cpu_v3": (3, "processors with AVX2"),
    "_cpu": (0, "all processors"),
}
_CAPABILITIES = {"AVX512": 4, "AVX2": 3}  # PyTorch's, as such levels
_INSTALL = "install fastreg-rnn again"


class PenaltyForward:
    """Compute penalties of tensors of one layout, and the gradients that the backward is expected to ask for.

    It is built and called as `fastreg.kernels.penalty.PenaltyForward`.
    """

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.launch = _Launch("penalty_forward", _penalty(view, sums), sums.dtype)
        self.dtype, self.measured = sums.dtype, sums.measured
        self.writes = view.operands[2:] != (None, None)
        self.expected = Expected(sums.dtype)

    def __call__(self, tensors: Sequence[Tensor | None], values: Values, before: Result | None = None) -> Result:
        """Compute the penalty, and fill the gradients for the upstream gradient of the last backward."""
        assumed = self.expected.gradient if self.writes else None
        penalty, terms, _ = before or _result(self.dtype, self.measured)
        self.launch((*tensors, assumed, None), values, penalty, terms)
        return Result(penalty, terms, None if assumed is None else Prediction(assumed, self.expected))


class PenaltyBackward:
    """Compute the gradients of penalties of tensors of one layout.

    It is built and called as `fastreg.kernels.penalty.PenaltyBackward`.
    """

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.launch, self.dtype = _Launch("penalty_backward", _penalty(view, sums), sums.dtype), sums.dtype

    def __call__(
        self, grad: Tensor, tensors: Sequence[Tensor | None], values: Values, prediction: Prediction | None
    ) -> None:
        """Fill the gradients, unless the forward has filled them for this very upstream gradient."""
        assumed = None if prediction is None else prediction.assumed
        outcome = self.launch((*tensors, grad, assumed), values)
        if outcome == _DONE and prediction is not None:
            prediction.expected.learn(grad)

    def holds(self, grad: Tensor, prediction: Prediction) -> bool:
        """Return whether the forward has filled the gradients for this upstream gradient, to the bit."""
        bits = torch.int64 if self.dtype == torch.float64 else torch.int32
        return prediction.assumed.view(bits).equal(grad.view(bits))


class DropoutForward:
    """Apply dropout masks and compute penalties, as `fastreg.kernels.dropout.DropoutForward` does."""

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.launch = _Launch("dropout_forward", _dropout(view, sums), sums.dtype)
        self.dtype, self.measured = sums.dtype, sums.measured

    def __call__(self, tensors: Sequence[Tensor], values: Values) -> Result:
        """Fill `dropped` and compute the penalty."""
        result = _result(self.dtype, self.measured)
        self.launch((*tensors, None, None), values, result.penalty, result.terms)
        return result


class DropoutBackward:
    """Compute the gradient of raw, as `fastreg.kernels.dropout.DropoutBackward` does."""

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.launch = _Launch("dropout_backward", _dropout(view, sums), sums.dtype)

    def __call__(self, grad: Tensor | None, tensors: Sequence[Tensor | None], values: Values) -> None:
        """Fill the gradient of raw."""
        self.launch((*tensors, grad), values)


class Marks:
    """Prepare nothing for valid steps: each launch reads the steps themselves."""

    def __init__(self, valid: torch.Size, device: torch.device) -> None:
        pass

    def __call__(self, valid: Tensor, starts: Tensor | None) -> None:
        """Return nothing."""


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
    for path in runnable():
        try:
            return opened(path)
        except OSError as error:
            reasons.append(str(error))
    raise OSError("; ".join(reasons) or f"the kernels were not built: {_INSTALL} where there is a C++ compiler")


def runnable() -> list[Path]:
    """List the files of the libraries that the processor runs and PyTorch's capability allows, the best first."""
    highest = min(_allowed_level(), processor_level())
    return [path for name, (level, _) in _LIBRARIES.items() if level <= highest for path in _files(name)]


def opened(path: Path) -> ctypes.CDLL:
    """Load and check a library that the processor runs."""
    return _checked(ctypes.CDLL(str(path)), path)


def description() -> str:
    """Describe the library that is loaded, and say why it is not a better one."""
    path = library().path
    loaded, processors = _LIBRARIES[path.name.partition(".")[0]]
    better = [library for library in _LIBRARIES.values() if library[0] > loaded]
    why = f"; {_why_not(*better[-1])}" if better else ""
    if not c_int32.in_dll(library(), "threaded"):
        why += "; one thread, as its compiler has no GNU OpenMP"
    return f"{path}, for {processors}{why}"


def _why_not(level: int, processors: str) -> str:
    """Say why a better library is not loaded."""
    if level > processor_level():
        return f"this is none of the {processors}"
    if level > _allowed_level():
        return f"by PyTorch's capability {torch.backends.cpu.get_cpu_capability()} this is none of the {processors}"
    return f"no library for {processors} was built from these sources"


def _allowed_level() -> int:
    """Return the level that PyTorch itself uses, which `ATEN_CPU_CAPABILITY` limits."""
    return _CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), 0)


def processor_level() -> int:
    """Ask the processor for its level, through the library that all processors run; 0 without that library."""
    for path in _files("_cpu"):
        try:
            return opened(path).processor_level()
        except OSError:
            continue
    return 0


def _files(name: str) -> Iterable[Path]:
    """List the files of a library."""
    return Path(__file__).parent.glob(f"{name}.*")


def sources(folder: Path) -> int:
    """Hash the source of the libraries in a folder; an installed package has none, and the hash is that of nothing."""
    files = sorted((*folder.glob("cpu.cpp"), *folder.glob("cpu_*.h")))
    return int(sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16], 16)


def _checked(library: ctypes.CDLL, path: Path) -> ctypes.CDLL:
    """Check that the library was built from this source, and declare its functions to ctypes."""
    plans = ctypes.sizeof(_Penalty), ctypes.sizeof(_Dropout)
    memories = [len(names) * ctypes.sizeof(c_void_p) for names in (_PENALTY_MEMORY, _DROPOUT_MEMORY)]
    expected = [plans[0], memories[0], plans[1], memories[1]]
    try:
        built = list((c_int64 * len(expected)).in_dll(library, "structure_sizes"))
        built_from = c_uint64.in_dll(library, "sources").value
    except ValueError:  # there is no such symbol
        built, built_from = [], 0
    is_source = (path.parent / "cpu.cpp").exists()
    if built != expected or (is_source and built_from != sources(path.parent)):
        raise OSError(f"{path.name} was built from another version of the source: {_INSTALL}")
    for name, plan in (("penalty", _Penalty), ("dropout", _Dropout)):
        for direction in ("forward", "backward"):
            function = getattr(library, f"{name}_{direction}")
            function.argtypes = [POINTER(plan), c_char_p, c_int]
            function.restype = c_int
    library.path = path  # pyright: ignore[reportAttributeAccessIssue]
    return library


class Expected:
    """The upstream gradient that the next forward of a plan expects: that of the plan's last backward.

    A new plan expects that of the last backward of any plan, and the first one expects 1. No tensor here is ever
    written to, as graphs refer to it. Threads may overwrite each other's: a wrong guess costs time alone.
    """

    with torch.inference_mode(False):
        latest = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}

    def __init__(self, dtype: torch.dtype) -> None:
        self.gradient = self.latest[dtype]

    def learn(self, grad: Tensor) -> None:
        """Expect this upstream gradient."""
        with torch.inference_mode(False):
            self.gradient = self.latest[grad.dtype] = grad.detach().clone()


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


_NOTHING = (None,) * 5  # the result of `_read` for a call without values
# The tensors whose addresses C takes, in this order: PenaltyMemory and DropoutMemory there.
_READ_AND_WRITTEN = "lengths", "valid", "starts", "alpha", "beta", "penalty", "terms"
_PENALTY_MEMORY = "raw", "dropped", "grad_raw", "grad_dropped", "grad", "assumed", *_READ_AND_WRITTEN
_DROPOUT_MEMORY = "raw", "mask", "dropped", "grad_raw", "grad", *_READ_AND_WRITTEN


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
    """Return the fields that both operations share: sizes, strides of four tensors, steps, and coefficients."""
    strides = [(0, 0) if x is None else (x.outer, x.time) for x in (*view.operands, None)[:4]]
    return view[:3], *strides, (*(sums.divisors or (0, 0)), view.packed), *sums.weights[:2]


def _read(values: Values, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return lengths or batch sizes, valid steps, starts, and the coefficients as C reads them."""
    lengths, batch_sizes, valid, _, alpha, beta, starts = values
    steps = batch_sizes if lengths is None else lengths.long()
    return steps, valid, starts, *(None if x is None else x.to(dtype) for x in (alpha, beta))


def _result(dtype: torch.dtype, measured: bool) -> Result:
    """Allocate the penalty, and its terms if they are measured."""
    terms = torch.empty((2,), dtype=dtype, device="cpu") if measured else None
    return Result(torch.empty((), dtype=dtype, device="cpu"), terms, None)


class _Launch:
    """A C function, with the plan that it takes in every call.

    Args:
        function: its name.
        plan: the metadata.
        dtype: of coefficients.
    """

    def __init__(self, function: str, plan: _Penalty | _Dropout, dtype: torch.dtype) -> None:
        self.function, self.plan, self.dtype = getattr(library(), function), byref(plan), dtype
        memory = _PENALTY_MEMORY if isinstance(plan, _Penalty) else _DROPOUT_MEMORY
        self.pack = Struct(f"{len(memory)}P").pack  # a third of the time of a ctypes structure

    def __call__(
        self,
        tensors: Sequence[Tensor | None],
        values: Values,
        penalty: Tensor | None = None,
        terms: Tensor | None = None,
    ) -> int:
        """Hand over the addresses of tensors, which live as long as the call; return the outcome.

        Raises:
            MemoryError: there is too little memory for the offsets of packed rows.
        """
        read = _NOTHING if values is NOTHING else _read(values, self.dtype)
        every = (*tensors, *read, penalty, terms)
        addresses = self.pack(*[0 if x is None else x.data_ptr() for x in every])
        outcome = self.function(self.plan, addresses, torch.get_num_threads())
        if outcome == _OUT_OF_MEMORY:
            raise MemoryError("the kernels for CPUs found too little memory for lengths and offsets of sequences")
        return outcome
