"""The registry of backends, which says which code runs on which device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from fastreg.call.key import PLANS
from fastreg.call.torch_state import has_float64, level_of_caller
from fastreg.kernels import cpu

# Without these options pip would install the wheel of the last build again.
REINSTALL = "pip install --no-cache-dir --force-reinstall --no-deps ."


class Backend(NamedTuple):
    """Hold the code for some devices: its name, and its classes, which have the same interface in all backends.

    `forward` and `backward` launch walks. `encoder` encodes the time steps that count, once for all launches of a call.
    """

    name: str
    forward: Any
    backward: Any
    encoder: Any


CPP: Backend | None = None
if cpu.reason() is None:
    CPP = Backend("the C++ kernels", cpu.Forward, cpu.Backward, cpu.Encoder)
TRITON: Backend | None = None
WHY_NO_TRITON, _interpreted = "", False
try:
    from triton import knobs

    from fastreg.kernels.ar_tar import Backward, Forward
    from fastreg.kernels.steps import Encoder
except Exception as error:  # Triton has no build for some platforms, and a broken one may raise anything
    WHY_NO_TRITON = f"Triton cannot be used ({type(error).__name__}: {error}); in a clone: pip install '.[gpu]'"
else:
    _interpreted = knobs.runtime.interpret
    TRITON = Backend("the Triton kernels" + (", interpreted" if _interpreted else ""), Forward, Backward, Encoder)

_cpu: Backend | None = TRITON if _interpreted else CPP


def backend_for(device: torch.device) -> Backend | None:
    """Return the code that runs on a device, or `None` if the plain formula runs there."""
    installed, chosen = (CPP, _cpu) if device.type == "cpu" else (TRITON, TRITON)
    if device.type not in ("cpu", "cuda", "xpu") or not has_float64(device):
        return None
    if installed is None and chosen is None:
        _warn_of_the_formula(device.type)
    return chosen


@cache
def _warn_of_the_formula(kind: str) -> None:
    """Warn, once in a process for each kind of device, that calls are slower than necessary."""
    devices, why = "CPUs" if kind == "cpu" else "GPUs", why_formula(torch.device(kind))
    warnings.warn(f"fastreg runs the plain formula on {devices}: {why}", stacklevel=level_of_caller())


def why_formula(device: torch.device) -> str:
    """Explain why a device without a backend runs the plain formula, and name the remedy."""
    if device.type == "cpu":
        return f"{cpu.reason()}; in a clone: {REINSTALL}"
    if device.type in ("cuda", "xpu"):
        return WHY_NO_TRITON or "the kernels need float64, which this GPU does not have"
    return f"there are no kernels for {device.type}"


@contextmanager
def cpu_tensors_by(backend: Backend | None) -> Iterator[None]:
    """Let another backend compute CPU tensors within a `with` block, in all threads; for tests and measurements.

    Args:
        backend: the code to run, or `None` for the plain formula.
    """
    global _cpu
    before, _cpu = _cpu, backend
    PLANS.clear()
    try:
        yield
    finally:
        _cpu = before
        PLANS.clear()
