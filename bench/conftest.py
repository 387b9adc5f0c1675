"""What a result says about where it was measured."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from bench import benchmarks

ROOT = Path(__file__).resolve().parent.parent


def pytest_report_header() -> str:
    of = len(benchmarks.cases.all_cases("cuda"))
    return f"fastreg: {len(benchmarks.CASES)} of {of} cases, and a training step, on {device_name()}"


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the name of a machine is nobody's business
    machine_info |= {
        "device": device_name(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "source": source(),
    }
    if benchmarks.DEVICE == "cuda":
        machine_info["copy_bandwidth"] = benchmarks.copy_bandwidth()
    else:
        machine_info["threads"] = torch.get_num_threads()


def device_name() -> str:
    """The GPU's, or the processor's with its cores."""
    if benchmarks.DEVICE == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} CPU, {os.cpu_count()} cores"


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def source() -> str:
    """A digest of what was measured, for where there is no git to tell the commit."""
    files = sorted([*ROOT.glob("fastreg/*.py"), *ROOT.glob("kernels/*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
