"""The registry of backends: which code runs on which device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from fastreg.kernels import cpu
from fastreg.plans import forget
from fastreg.torch_state import level_of_caller

# Without these options pip would take the wheel of the last build again.
REINSTALL = "pip install --no-cache-dir --force-reinstall --no-deps ."


class Backend(NamedTuple):
    """Code for some devices: its name, and its classes, with one interface in all backends.

    `forward` and `backward` launch walks, and `steps` marks the time steps that count, once for all launches of a call.
    """

    name: str
    forward: Any
    backward: Any
    steps: Any


CPP: Backend | None = None
if cpu.reason() is None:
    CPP = Backend("the C++ kernels", cpu.Forward, cpu.Backward, cpu.Steps)
TRITON: Backend | None = None
_interpreted = False
if find_spec("triton") is not None:  # Triton has no build for some platforms
    from triton import knobs

    from fastreg.kernels.ar_tar import Backward, Forward
    from fastreg.kernels.steps import Steps

    _interpreted = knobs.runtime.interpret
    TRITON = Backend("the Triton kernels" + (", interpreted" if _interpreted else ""), Forward, Backward, Steps)

_cpu: Backend | None = TRITON if _interpreted else CPP


def backend_for(device: torch.device) -> Backend | None:
    """Return the code that runs on a device, or `None` where that is the plain formula."""
    if device.type == "cpu":
        if _cpu is CPP is None:
            _warn_of_the_formula()
        return _cpu
    return TRITON if device.type == "cuda" or (device.type == "xpu" and _has_float64(device)) else None


@cache
def _has_float64(device: torch.device) -> bool:
    """Return whether an Intel GPU has float64, which all kernels use for coefficients and divisors; Arc has not."""
    return torch.xpu.get_device_properties(device).has_fp64


@cache
def _warn_of_the_formula() -> None:
    """Warn once a process that calls on CPUs are slower than need be."""
    why = why_formula(torch.device("cpu"))
    warnings.warn(f"fastreg runs the plain formula on CPUs: {why}", stacklevel=level_of_caller())


def why_formula(device: torch.device) -> str:
    """Explain why a device without a backend takes the plain formula, and name the remedy."""
    if device.type == "cpu":
        return f"{cpu.reason()}; in a clone: {REINSTALL}"
    if device.type in ("cuda", "xpu"):
        if TRITON is not None:
            return "the kernels need float64, which this GPU does not have"
        return "Triton is not installed; in a clone: pip install '.[gpu]'"
    return f"there are no kernels for {device.type}"


@contextmanager
def cpu_tensors_by(backend: Backend | None) -> Iterator[None]:
    """Run CPU tensors by another backend inside of the block, in all threads: for tests and measurements.

    Args:
        backend: the code to run, or `None` for the plain formula.
    """
    global _cpu
    before, _cpu = _cpu, backend
    forget()  # plans are for one backend
    try:
        yield
    finally:
        _cpu = before
        forget()
