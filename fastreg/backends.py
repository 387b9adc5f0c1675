"""Which code runs where, and when it is the plain formula."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastreg.kernels import cpu

P = ParamSpec("P")
R = TypeVar("R")
PLANS = 1024  # of each kind that are remembered: a few hundred sequence lengths, with and without gradients
_forget: list[Callable[[], None]] = []


def remembered(plan: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of metadata alone, such as shapes and coefficients, to be computed once for each."""
    cached = lru_cache(PLANS)(plan)
    _forget.append(cached.cache_clear)
    return cached  # pyright: ignore[reportReturnType]


def forget() -> None:
    """Forget what all functions remember: for tests that change what plans are made from."""
    for clear in _forget:
        clear()


class Backend(NamedTuple):
    """Code for some devices: what it is, and the classes that launch it, of one interface in all backends.

    `marks_of` prepares valid steps, once for all launches that read them.
    """

    name: str
    penalty_forward: Any
    penalty_backward: Any
    dropout_forward: Any
    dropout_backward: Any
    marks_of: Callable[[Tensor], Tensor | None]


CPP: Backend | None = None
if cpu.reason() is None:
    CPP = Backend(
        "the C++ kernels",
        *(cpu.PenaltyForward, cpu.PenaltyBackward, cpu.DropoutForward, cpu.DropoutBackward),
        cpu.marks_of,
    )
TRITON: Backend | None = None
_interpreted = False
if find_spec("triton") is not None:  # Triton has no build for some platforms
    from triton import knobs

    from fastreg.kernels.dropout import DropoutBackward, DropoutForward
    from fastreg.kernels.launch import marks_of
    from fastreg.kernels.penalty import PenaltyBackward, PenaltyForward

    _interpreted = knobs.runtime.interpret
    TRITON = Backend(
        "the Triton kernels" + (", interpreted" if _interpreted else ""),
        *(PenaltyForward, PenaltyBackward, DropoutForward, DropoutBackward),
        marks_of,
    )

_cpu: Backend | None = TRITON if _interpreted else CPP


def backend_for(device: torch.device) -> Backend | None:
    """Return the code that runs on a device, or `None` where that is the plain formula."""
    if device.type == "cpu":
        if _cpu is CPP is None:
            _warn_of_the_formula()
        return _cpu
    return TRITON if device.type in ("cuda", "xpu") else None


@cache
def _warn_of_the_formula() -> None:
    """Warn once a process that calls on CPUs are slower than need be."""
    warnings.warn(f"fastreg runs the plain formula on CPUs: {cpu.reason()}", stacklevel=2)


def why_formula(device: torch.device) -> str:
    """Say why a device without a backend takes the plain formula, and what would change that."""
    if device.type == "cpu":
        return str(cpu.reason())
    if device.type in ("cuda", "xpu"):
        return "Triton is not installed: install fastreg-rnn[gpu]"
    return f"there are no kernels for {device.type}"


@contextmanager
def cpu_tensors_by(backend: Backend | None) -> Iterator[None]:
    """Run CPU tensors by another backend inside of the block, in all threads: for tests and measurements.

    Args:
        backend: the code to run, or `None` for the plain formula.
    """
    global _cpu
    before, _cpu = _cpu, backend
    try:
        yield
    finally:
        _cpu = before


def keeps_memory_low() -> bool:
    """Tell whether what a forward saves is packed away, as under activation checkpointing and `save_on_cpu`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore[reportAttributeAccessIssue]


def observed() -> bool:
    """Tell whether something else than memory is computed on, so that PyTorch must see the formula."""
    return (
        torch.compiler.is_compiling()  # a compiler fuses the formula with its neighbours
        or torch._C._is_tracing()  # torch.jit.trace records operators
        or torch._C._len_torch_dispatch_stack() > 0  # a mode, such as FakeTensorMode, intercepts operators
        or torch._C._are_functorch_transforms_active()  # vmap and grad transform operators
        or forward_ad._current_level >= 0  # forward-mode derivatives are those of operators
    )


def are_memory(tensors: Iterable[Tensor | None]) -> bool:
    """Tell whether all tensors that there are are memory."""
    for x in tensors:  # noqa: SIM110 - a generator expression takes twice as long
        if x is not None and not is_memory(x):
            return False
    return True


def is_memory(x: Tensor) -> bool:
    """Tell whether a dense tensor is memory that holds its values as they are."""
    return (
        type(x) is Tensor  # a subclass has operators of its own
        and not x.is_neg()  # the values of a negated view have the other sign in memory
        and not x.is_meta  # a meta tensor has no values
        and not torch._is_zerotensor(x)  # pyright: ignore[reportPrivateImportUsage] - zeros without memory
        and torch._C._has_storage(x)  # a wrapper of functorch has no memory of its own
    )
