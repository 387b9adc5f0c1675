"""What a result says about where it was measured, and of what."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def device_name() -> str:
    """The GPU's, or the processor's with its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} CPU, {os.cpu_count()} cores"


def file_name(device: str) -> str:
    """Of a result: one file a device. What was there before is in git."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def facts() -> dict[str, str]:
    """The device, the releases, and a digest of the source, for where there is no git to tell the commit."""
    return {"device": device_name(), "torch": torch.__version__, "triton": triton_version(), "source": source()}


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def source() -> str:
    """A digest of what is tested and measured."""
    files = sorted(file for pattern in ("fastreg/*.py", "kernels/*.py", "kernels/*.cpp") for file in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
