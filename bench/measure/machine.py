"""Facts about the machine and the commit of a result."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
# Two settings of glibc's allocator, read when a process starts. By default it returns large blocks to the system, so
# that every temporary of an eager formula is fetched anew, with a page fault every 4 KB.
ALLOCATORS = DEFAULT, KEPT = "default allocator", "memory kept"
KEEPING = {"MALLOC_TRIM_THRESHOLD_": "4073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}


def allocator() -> str | None:
    """Name the setting of this process."""
    return None if torch.cuda.is_available() else KEPT if KEEPING.items() <= os.environ.items() else DEFAULT


def device_name() -> str:
    """Name the GPU or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """Name the processor, its cores, and the vector instructions that PyTorch uses, which compiled code depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{models[0] if models else platform.machine()} CPU with {vectors}, {os.cpu_count()} cores"


def file_name(device: str) -> str:
    """Return the file name of a device's result. Earlier results are in the history of git."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def facts() -> dict[str, Any]:
    """Describe the device and the releases."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    releases = {"torch": torch.__version__, "triton": triton, "python_version": platform.python_version()}
    return {"device": device_name()} | releases


def source() -> str:
    """Return a digest of the code that is tested and measured."""
    patterns = "fastreg/**/*.py", "kernels/*.py", "kernels/*.cpp", "kernels/*.h"
    files = sorted(file for pattern in patterns for file in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def commit_facts() -> dict[str, Any]:
    """Return the hash of the checkout's commit, whether code differs from it, and the version and digest of the source.

    Without git the hash is the value of the environment variable COMMIT, or `unknown`.
    """
    git = "git", "-C", str(ROOT)
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    facts = {"version": version, "source": source()}
    try:
        named = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "*.cpp", "*.h"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return facts | {"id": os.environ.get("COMMIT") or "unknown", "dirty": False}
    return facts | {"id": named.stdout.strip(), "dirty": changed.returncode != 0}


def commit_name(facts: dict[str, Any]) -> str:
    """Name a commit, and say whether the code differed from it."""
    return facts["id"][:10] + " with changes" * facts["dirty"]
