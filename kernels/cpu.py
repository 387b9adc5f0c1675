"""The binding of cpu.cpp, which calls its kernels with the addresses of CPU tensors.

A structure with the metadata of an operation is packed once. A call passes only addresses and coefficients, and
releases the GIL. The installation builds a library for each level of processors (see setup.py), and the best library
that runs here is loaded. It shares PyTorch's OpenMP runtime, which is loaded before it, and uses as many threads as
PyTorch does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ctypes import c_char_p, c_int, c_int32, c_int64, c_uint64
from functools import cache
from hashlib import sha256
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor, get_num_threads

from fastreg.kernels.view import EncodedSteps, Operands, Spec, Tensors, Values, View, memory, switches

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
# The libraries, the best one first: the level of x86-64 that each needs, and the processors that have it.
_LIBRARIES = {
    "_cpu_v4": (4, "processors with AVX-512"),
    "_cpu_v3": (3, "processors with AVX2"),
    "_cpu": (0, "all processors"),
}
_CAPABILITIES = {"AVX512": 4, "AVX2": 3, "NO AVX": 0, "DEFAULT": 0}  # PyTorch's, as levels of x86-64
_INSTALL = "install fastreg-rnn again"


class Forward:
    """A `fastreg.kernels.backend.Forward`; gpu.py describes its arguments."""

    def __init__(self, view: View, spec: Spec, device: torch.device) -> None:
        self.function, self.metadata = library().forward, _metadata(view, spec, True)
        self.penalty = memory((), spec.dtype, device)
        self.terms = memory((2,), spec.dtype, device) if spec.return_terms else None

    def __call__(self, tensors: Tensors, values: Values) -> tuple[Tensor, Tensor | None]:
        """Compute the penalty; write dropped if there is a mask."""
        penalty, terms = self.penalty(), None if self.terms is None else self.terms()
        given = *tensors, None, values.bits, values.counts, penalty, terms  # kept alive during the call
        self.function(self.metadata, _memory(given, values), get_num_threads())
        return penalty, terms


class Backward:
    """A `fastreg.kernels.backend.Backward`; gpu.py describes its arguments."""

    def __init__(self, view: View, spec: Spec, device: torch.device) -> None:
        self.function, self.metadata = library().backward, _metadata(view, spec, False)

    def __call__(self, upstream: Tensor | None, tensors: Tensors, values: Values) -> None:
        """Write the gradients."""
        given = *tensors, upstream, values.bits, values.counts, None, None
        self.function(self.metadata, _memory(given, values), get_num_threads())


class Encoder:
    """A `fastreg.kernels.backend.Encoder`; gpu.py describes its arguments."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape, self.encode = shape, library().encode_steps
        self.bits, self.counts = memory(shape, torch.uint8, device), memory((2,), torch.int64, device)

    def __call__(self, lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None) -> EncodedSteps:
        """Return the steps that count."""
        bits, counts = self.bits(), self.counts()
        if lengths is not None:
            lengths = lengths.long()
        addresses = [0 if x is None else x.data_ptr() for x in (lengths, valid, starts, bits, counts)]
        self.encode(_pack_encoding(*addresses), *self.shape)
        return EncodedSteps(bits, counts)


def reason() -> str | None:
    """Return why the kernels do not run here, or `None` if they do."""
    try:
        library()
    except OSError as error:
        return str(error)
    return None


class Library(ctypes.CDLL):
    """Hold a library that is loaded, with its path."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


@cache
def library() -> Library:
    """Load the best library that runs here.

    Raises:
        OSError: no library runs here; the message says why.
    """
    reasons = []
    for path in runnable():
        try:
            return opened(path)
        except OSError as error:
            reasons.append(str(error))
    raise OSError("; ".join(reasons) or f"the kernels were not built: {_INSTALL} where there is a C++ compiler")


def runnable() -> list[Path]:
    """List the files of the libraries that the processor can run and PyTorch's capability allows, the best first."""
    highest = min(_allowed_level(), processor_level())
    return [path for name, (level, _) in _LIBRARIES.items() if level <= highest for path in _files(name)]


def opened(path: Path) -> Library:
    """Load a library that the processor can run, check its sources, and declare its functions to ctypes."""
    loaded = Library(path)
    if (path.parent / "cpu.cpp").exists() and c_uint64.in_dll(loaded, "sources").value != sources(path.parent):
        raise OSError(f"{path.name} was built from another version of the source: {_INSTALL}")
    loaded.forward.argtypes = loaded.backward.argtypes = [c_char_p, c_char_p, c_int]
    loaded.encode_steps.argtypes = [c_char_p, c_int64, c_int64]
    loaded.forward.restype = loaded.backward.restype = loaded.encode_steps.restype = None
    return loaded


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
    instructions = processors.removeprefix("processors with ")
    if level > processor_level():
        return f"this CPU has no {instructions}"
    if level > _allowed_level():
        return f"PyTorch's capability, {torch.backends.cpu.get_cpu_capability()}, has no {instructions}"
    return f"no library for {processors} was built from these sources"


def _allowed_level() -> int:
    """Return the level that PyTorch itself uses; `ATEN_CPU_CAPABILITY` limits it, and an unknown one is no limit."""
    return _CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), max(_CAPABILITIES.values()))


def processor_level() -> int:
    """Ask the processor for its level, by the library that all processors can run; return 0 without that library."""
    for path in _files("_cpu"):
        with suppress(OSError):
            return opened(path).processor_level()
    return 0


def _files(name: str) -> Iterable[Path]:
    """List the files of a library."""
    return Path(__file__).parent.glob(f"{name}.*")


def sources(folder: Path) -> int:
    """Hash the sources of the libraries in a folder; for an installed package, which has none, hash nothing."""
    files = sorted((*folder.glob("cpu.cpp"), *folder.glob("cpu_*.h")))
    return int(sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16], 16)


# The structures `Metadata` and `Addresses` of C. Packing takes a third of the time of filling a ctypes structure.
_METADATA = Struct(f"3q{2 * len(Operands._fields)}q2d8i")  # sizes, strides, divisors, dtypes and switches
_ADDRESSES = Struct(f"{len(Operands._fields) + 5}P2dq")  # and two coefficients, and a threshold


def _memory(given: Sequence[Tensor | None], values: Values) -> bytes:
    """Return the memory and the numbers of a call as C knows them."""
    alpha, beta, _, _, threshold = values
    addresses = [0 if x is None else x.data_ptr() for x in given]
    return _pack(*addresses, float(alpha), float(beta), -1 if threshold is None else threshold)


def _metadata(view: View, spec: Spec, is_forward: bool) -> bytes:
    """Return the metadata of calls as C knows them."""
    operands = view.operands
    dtypes = [_DTYPES[torch.float32 if x is None else x.dtype] for x in (operands.raw, operands.dropped)]
    numbers = *view[:3], *operands.strides(), *view.divisors(spec.reduction), *dtypes, _DTYPES[spec.dtype]
    return _METADATA.pack(*numbers, *switches(view, spec, is_forward))


_pack_encoding, _pack = Struct("5P").pack, _ADDRESSES.pack
