"""Test and measure on this machine: `python -m bench.run test` and `python -m bench.run bench`.

The first writes FOLDER/tests/DEVICE.json, the second FOLDER/DEVICE.json, which bench.report joins. Failed and
missing cases are recorded, too. Interrupted, or sent SIGTERM, either command writes its results so far.
`python -m bench.run bench --only step` measures the training steps alone, prints their tables and writes to
.benchmarks: four minutes on an idle core.

On a CPU `bench` measures twice, each time in a process of its own: with memory kept by the allocator, and with the
system's default. `measure` measures once, in this process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bench import machine, report

ROOT = machine.ROOT
# Those first that say most of the kernels for their time; tests/test_bench.py knows which files there are.
TESTS = (
    *("kernels", "sizes", "concurrency", "dropout", "attachment", "prediction", "penalty", "bench", "coefficients"),
    *("addition", "steps", "plans", "distributed", "padding", "axes", "graphs", "derivatives"),
)
SANITIZERS = "memcheck", "racecheck"
SANITIZED = ["tests/test_kernels.py", "-k", "programs_share"]  # forward and backward, of one and of many programs
FILE_SECONDS, SANITIZER_SECONDS = 120, 75  # at most; a file that hangs must leave time for the others
GRACE = 20  # seconds for pytest to print its failures


def run_file(name: str, seconds: float) -> dict[str, Any]:
    """Run one file of tests in a process of its own, on a GPU those for it, and count the outcomes."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        options += ["-m", "gpu" if torch.cuda.is_available() else "not gpu"]
        tests = subprocess.Popen([sys.executable, "-m", "pytest", *options, f"tests/test_{name}.py"], cwd=ROOT)
        try:
            end = f"ended with status {tests.wait(seconds)}"
        except subprocess.TimeoutExpired:
            end = "out of time"
            tests.send_signal(signal.SIGINT)  # pytest reports its results so far
            with suppress(subprocess.TimeoutExpired):
                tests.wait(GRACE)
        finally:
            tests.kill()  # does nothing after the end
            tests.wait()
        if not report.exists():  # which pytest writes at its end
            return unfinished(name, end)
        cases = list(ElementTree.parse(report).iter("testcase"))
    if end == "out of time":
        del cases[-1:]  # the one that was interrupted, which looks as if it had passed
    outcomes = Counter(map(outcome, cases))
    failed = [f"test_{name}.py::{case.get('name')}" for case in cases if outcome(case) == "failed"]
    failed += [f"test_{name}.py: {end}"] * (end == "out of time")
    return {"passed": outcomes["passed"], "skipped": outcomes["skipped"], "failed": failed}


def unfinished(name: str, why: str) -> dict[str, Any]:
    """Return the record of a file whose tests did not end."""
    return {"passed": 0, "skipped": 0, "failed": [f"test_{name}.py: {why}"]}


def outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def sanitizer() -> str | None:
    """Find compute-sanitizer, which CUDA's folder has where the path does not."""
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def sanitize(program: str, tool: str, seconds: float) -> str:
    """Run a few tests under one tool of compute-sanitizer, and give its verdict."""
    command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *SANITIZED]
    # Else torch's allocator hides a read or a write behind the end of a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, **pipes)
    except subprocess.TimeoutExpired:
        return "out of time"
    print(done.stdout, flush=True)
    verdicts = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    return f"status {done.returncode}: {', '.join(verdicts) or 'no verdict'}"


def test(folder: Path, commit: str, seconds: float) -> int:
    """Run the tests of the measured code, file by file, and write their outcomes."""
    on_gpu = torch.cuda.is_available()
    end = time.monotonic() + seconds
    files: dict[str, Any] = {name: unfinished(name, "not reached") for name in TESTS}
    program = sanitizer()
    sanitizers = dict.fromkeys(SANITIZERS, "not reached" if program else "not there") if on_gpu else {}
    result = machine.facts() | {"commit": commit, "files": files, "sanitizers": sanitizers}
    reserved = SANITIZER_SECONDS * len(sanitizers) if program else 0
    most = FILE_SECONDS if on_gpu else math.inf
    try:
        for name in TESTS:
            if time.monotonic() < end - reserved:
                print(f"== tests/test_{name}.py", flush=True)
                files[name] = unfinished(name, "interrupted")
                files[name] = run_file(name, min(end - reserved - time.monotonic(), most))
        for tool in sanitizers:
            if program is not None:
                print(f"== {tool}", flush=True)
                sanitizers[tool] = "interrupted"
                sanitizers[tool] = sanitize(program, tool, SANITIZER_SECONDS)
    except KeyboardInterrupt:
        print("bench.run: interrupted", flush=True)
    write(folder / "tests" / machine.file_name(result["device"]), json.dumps(result, indent=1) + "\n")
    failed = [name for file in files.values() for name in file["failed"]]
    print("\n".join(["bench.run: failed:", *failed]) if failed else "bench.run: no test failed")
    print("".join(f"bench.run: {tool}: {verdict}\n" for tool, verdict in sanitizers.items()), end="", flush=True)
    return 1 if failed else 0


def measure(folder: Path, commit: str, seconds: float, only: str) -> int:
    """Run the benchmarks in this process, write their result, and print the tables of training steps."""
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary, "result.json")
        options = ["-v", "-W", "default", "-p", "no:cacheprovider", "--benchmark-quiet", f"--benchmark-json={new}"]
        limits = [f"--seconds={seconds}", f"--commit={commit}", "-k", only]
        status = pytest.main([*options, *limits, f"{ROOT}/bench/benchmarks.py"])
        text = new.read_text() if new.exists() else ""
    if not text:
        print("bench.run: nothing was measured")
        return 1
    file = folder / machine.file_name(json.loads(text)["machine_info"]["device"])
    write(file, text)
    print("\n".join(report.step_tables(report.load(file))), flush=True)
    return int(status)


def bench(folder: Path, commit: str, seconds: float, only: str) -> int:
    """Measure: on a CPU once for each allocator, in a process that starts with it, and put the results together."""
    if torch.cuda.is_available():
        return measure(folder, commit, seconds, only)
    end, statuses, parts = time.monotonic() + seconds, [], []
    with tempfile.TemporaryDirectory() as temporary, suppress(KeyboardInterrupt):
        for left, (allocator, environment) in zip((2, 1), machine.ALLOCATORS.items(), strict=True):
            print(f"== {allocator}", flush=True)
            part = Path(temporary, allocator)
            limits = [f"--seconds={(end - time.monotonic()) / left}", f"--commit={commit}", f"--only={only}"]
            try:
                statuses.append(in_child(["measure", str(part), *limits], environment))
            finally:
                parts += [json.loads(file.read_text()) for file in part.glob("*.json")]
    if not parts:
        return 1
    write(folder / machine.file_name(parts[0]["machine_info"]["device"]), json.dumps(together(parts), indent=1) + "\n")
    return max(statuses, default=0) if len(statuses) == len(machine.ALLOCATORS) else 1


def in_child(arguments: list[str], environment: dict[str, str]) -> int:
    """Run this module in a process of its own, and pass an interrupt on to it, once."""
    command = [sys.executable, "-m", "bench.run", *arguments]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()  # until it has written its result
        raise


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Put results of several processes into one."""
    missing = {name: peers for part in parts for name, peers in part["missing"].items()}
    return parts[0] | {"benchmarks": [one for part in parts for one in part["benchmarks"]], "missing": missing}


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(f"bench.run: wrote {file}", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("what", choices=["test", "bench", "measure"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--commit", default="", help="of the checkout, where there is no git to tell")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing more after them")
    parser.add_argument("--only", default="", help="benchmark the cases of this name alone, as pytest's -k")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Some of the cases must not take the place of all.
    folder = options.folder or (ROOT / ".benchmarks" if options.only else report.RESULTS)
    if options.what == "test":
        return test(folder, options.commit, options.seconds)
    command = bench if options.what == "bench" else measure
    return command(folder, options.commit, options.seconds, options.only)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
