"""Measure on this machine: `python -m bench.run FOLDER` writes FOLDER/DEVICE.json.

Nothing is measured where the tests of what would be measured fail.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = ["-m", "gpu", "tests"]
CPU_TESTS = ["-m", "not gpu", *(f"tests/test_{name}.py" for name in ("cpu", "penalty", "padding", "dropout"))]


def file_name(result: dict) -> str:
    """Of a result: one file a device. What was there before is in git."""
    return re.sub(r"[^a-z0-9]+", "-", result["machine_info"]["device"].lower()).strip("-") + ".json"


def tests_pass() -> bool:
    tests = GPU_TESTS if torch.cuda.is_available() else CPU_TESTS
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT).returncode == 0


def main(folder: Path) -> int:
    print("== the tests of what is measured", flush=True)
    if not tests_pass():
        print("bench.run: the tests fail on this machine: nothing is measured")
        return 1
    print("== the benchmarks", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary, "result.json")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # interrupted, pytest still writes what it has
        options = ["-v", "-W", "default", "-p", "no:cacheprovider", "--benchmark-quiet", f"--benchmark-json={new}"]
        status = pytest.main([*options, f"{ROOT}/bench/benchmarks.py"])
        if not new.exists() or new.stat().st_size == 0:
            print("bench.run: nothing was measured")
            return 1
        text = new.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / file_name(json.loads(text))
    file.write_text(text)
    print(f"bench.run: wrote {file}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "bench" / "results")))
