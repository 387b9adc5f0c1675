"""The tests for a GPU, as tasks of workers: a file of tests, or a few tests under a tool of compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.measure.worker import ROOT, Say

# The tests of the kernels come first. A test for a GPU has a mark, or takes a fixture that has it.
ROOMS = "kernels", "call", "attach", "project"
FOR_A_GPU = re.compile(r"(?<![\".[])\bgpu\b(?![\".])|^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
FILES = [file for room in ROOMS for file in sorted(ROOT.glob(f"tests/{room}/test_*.py"))]
LARGE = "kernels/test_sizes.py"  # needs much memory, and is the last
TESTS = [str(file.relative_to(ROOT / "tests")) for file in FILES if FOR_A_GPU.search(file.read_text())]
TESTS.sort(key=LARGE.__eq__)
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
SANITIZERS = "memcheck", "racecheck"
SANITIZED = ["tests/kernels/test_kernels.py", "-k", "programs_share"]  # forward and backward, one program and many
GRACE = 20  # seconds for pytest to print its failures


def run_file(say: Say, name: str, seconds: float) -> dict[str, Any]:
    """Run the tests for GPUs of one file in another process, and count the outcomes."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        tests = subprocess.Popen([*PYTEST, "--tb=short", f"--junitxml={report}", f"tests/{name}"], cwd=ROOT)
        try:
            end = f"ended with status {tests.wait(seconds)}"
        except subprocess.TimeoutExpired:
            end = "out of time"
            tests.send_signal(signal.SIGINT)  # pytest reports its results so far
            with suppress(subprocess.TimeoutExpired):
                tests.wait(GRACE)
        finally:
            tests.kill()  # this does nothing if the process has ended
            tests.wait()
        if not report.exists():  # pytest writes it when it ends
            return {"passed": 0, "skipped": 0, "failed": [end]}
        cases = list(ElementTree.parse(report).iter("testcase"))
    if end == "out of time":
        del cases[-1:]  # the test that was interrupted looks as if it had passed
    outcomes = Counter(map(outcome, cases))
    failed = [case.get("name", "") for case in cases if outcome(case) == "failed"]
    failed += [end] * (end == "out of time")
    return {"passed": outcomes["passed"], "skipped": outcomes["skipped"], "failed": failed}


def outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def sanitizer() -> str | None:
    """Find compute-sanitizer in the path, or in CUDA's folder."""
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def sanitize(say: Say, tool: str) -> dict[str, Any]:
    """Run a few tests under one tool of compute-sanitizer, and return its verdict."""
    command = [sanitizer() or "", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    # With its caching allocator PyTorch would hide an access behind the end of a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*command, *PYTEST, *SANITIZED], cwd=ROOT, env=environment, **pipes)
    print(done.stdout, flush=True)
    verdicts = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    return {"status": done.returncode, "verdict": ", ".join(verdicts) or "no verdict"}
