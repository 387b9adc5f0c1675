"""The registry of backends, which says which code runs on which device."""

from __future__ import annotations

import torch

from fastreg.call.torch_state import has_float64, warn_of_the_formula
from fastreg.kernels import cpu
from fastreg.kernels.backend import Backend

# Without these options pip would install the wheel of the last build again.
REINSTALL = "pip install --no-cache-dir --force-reinstall --no-deps ."

CPP: Backend | None = None
if cpu.reason() is None:
    CPP = Backend("the C++ kernels", cpu.Forward, cpu.Backward, cpu.Encoder)
TRITON: Backend | None = None
_why_no_triton, _interpreted = "", False
try:
    from triton import knobs

    from fastreg.kernels import gpu
except Exception as error:  # Triton has no build for some platforms, and a broken one may raise anything
    _why_no_triton = f"Triton cannot be used ({type(error).__name__}: {error}); in a clone: pip install '.[gpu]'"
else:
    _interpreted = knobs.runtime.interpret
    name = "the Triton kernels" + (", interpreted" if _interpreted else "")
    TRITON = Backend(name, gpu.Forward, gpu.Backward, gpu.Encoder)

DEVICES = {"cpu": "CPUs", "cuda": "GPUs", "xpu": "GPUs"}  # the kinds that may have kernels, and in messages


def backend_for(device: torch.device) -> Backend | None:
    """Return the code that runs on a device, or `None` if the plain formula runs there."""
    backend = CPP if device.type == "cpu" and not _interpreted else TRITON
    if device.type not in DEVICES or not has_float64(device):
        backend = None
    if backend is None:
        devices = DEVICES.get(device.type, device.type)
        warn_of_the_formula(f"fastreg runs the plain formula on {devices}: {why_formula(device)}")
    return backend


def why_formula(device: torch.device) -> str:
    """Explain why a device without a backend runs the plain formula, and name the remedy."""
    if device.type == "cpu":
        return f"{cpu.reason()}; in a clone: {REINSTALL}"
    if device.type in DEVICES:
        return _why_no_triton or "the kernels need float64, which this GPU does not have"
    return f"there are no kernels for {device.type}"
