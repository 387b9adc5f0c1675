"""Test and measure on this machine: `python -m bench.measure.run test` and `python -m bench.measure.run bench`.

The first writes FOLDER/tests/DEVICE.json, and the second FOLDER/DEVICE.json; bench.measure.report joins them. Failed
and lost cases are recorded, too. When it is interrupted, or gets SIGTERM, either command writes the results that it
has. `python -m bench.measure.run bench --only step` measures only the training steps, prints their tables and writes to
.benchmarks; it takes four minutes on an idle core.

`bench` measures in a worker (bench.measure.worker), which appends each result to a file of lines, by default in
.benchmarks; the result summarizes the lines. On a CPU there are two workers, one after the other: in one the
allocator keeps memory, in the other it has the system's default settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from operator import truediv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench.measure import benchmarks, cases, machine, report
from bench.measure.steps import WITHOUT
from bench.measure.worker import Limits, records, supervise

ROOT = machine.ROOT
# The tests of the kernels come first. A test for a GPU has a mark, or takes a fixture that has it.
ROOMS = "kernels", "call", "attach", "project"
FOR_A_GPU = re.compile(r"(?<![\".[])\bgpu\b(?![\".])|^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
FILES = [file for room in ROOMS for file in sorted(ROOT.glob(f"tests/{room}/test_*.py"))]
TESTS = [str(file.relative_to(ROOT / "tests")) for file in FILES if FOR_A_GPU.search(file.read_text())]
LARGE = "kernels/test_sizes.py"  # needs much memory
SANITIZERS = "memcheck", "racecheck"
SANITIZED = ["tests/kernels/test_kernels.py", "-k", "programs_share"]  # forward and backward, one program and many
FILE_SECONDS, SANITIZER_SECONDS = 120, 75  # limits, so that a file that hangs leaves time for the others
GRACE = 20  # seconds for pytest to print its failures
WORKER = [sys.executable, "-m", "bench.measure.benchmarks"]
QUIET = {"KINETO_LOG_LEVEL": "99"}  # PyTorch's profiler prints a line whenever it starts or stops
CASE_SECONDS = 90 if benchmarks.DEVICE == "cuda" else 600


def run_file(name: str, seconds: float) -> dict[str, Any]:
    """Run one file of tests in another process, on a GPU only the tests for GPUs, and count the outcomes."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        options += ["-m", "gpu" if torch.cuda.is_available() else "not gpu"]
        tests = subprocess.Popen([sys.executable, "-m", "pytest", *options, f"tests/{name}"], cwd=ROOT)
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
            return unfinished(name, end)
        cases = list(ElementTree.parse(report).iter("testcase"))
    if end == "out of time":
        del cases[-1:]  # the test that was interrupted looks as if it had passed
    outcomes = Counter(map(outcome, cases))
    failed = [f"{name}::{case.get('name')}" for case in cases if outcome(case) == "failed"]
    failed += [f"{name}: {end}"] * (end == "out of time")
    return {"passed": outcomes["passed"], "skipped": outcomes["skipped"], "failed": failed}


def unfinished(name: str, why: str) -> dict[str, Any]:
    """Record that the tests of a file did not end."""
    return {"passed": 0, "skipped": 0, "failed": [f"{name}: {why}"]}


def outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def sanitizer() -> str | None:
    """Find compute-sanitizer in the path, or in CUDA's folder."""
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def sanitize(program: str, tool: str, seconds: float) -> str:
    """Run a few tests under one tool of compute-sanitizer, and return its verdict."""
    command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *SANITIZED]
    # With its caching allocator PyTorch would hide an access behind the end of a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, **pipes)
    except subprocess.TimeoutExpired:
        return "out of time"
    print(done.stdout, flush=True)
    verdicts = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    return f"status {done.returncode}: {', '.join(verdicts) or 'no verdict'}"


def test(folder: Path, seconds: float) -> int:
    """Run the tests of the measured code, file by file, and write their outcomes."""
    on_gpu = torch.cuda.is_available()
    end = time.monotonic() + seconds
    files: dict[str, Any] = {name: unfinished(name, "not reached") for name in TESTS}
    program = sanitizer()
    sanitizers = dict.fromkeys(SANITIZERS, "not reached" if program else "not there") if on_gpu else {}
    result = machine.facts() | {"commit": machine.commit(), "files": files, "sanitizers": sanitizers}
    reserved = SANITIZER_SECONDS * len(sanitizers) if program else 0
    most = FILE_SECONDS if on_gpu else math.inf
    try:
        for name in TESTS:
            if time.monotonic() < end - reserved:
                print(f"== tests/{name}", flush=True)
                files[name] = unfinished(name, "interrupted")
                files[name] = run_file(name, min(end - reserved - time.monotonic(), most))
        for tool in sanitizers:
            if program is not None:
                print(f"== {tool}", flush=True)
                sanitizers[tool] = "interrupted"
                sanitizers[tool] = sanitize(program, tool, SANITIZER_SECONDS)
    except KeyboardInterrupt:
        print("bench.measure.run: interrupted", flush=True)
    write(folder / "tests" / machine.file_name(result["device"]), json.dumps(result, indent=1) + "\n")
    failed = [name for file in files.values() for name in file["failed"]]
    print("\n".join(["bench.measure.run: failed:", *failed]) if failed else "bench.measure.run: no test failed")
    print(
        "".join(f"bench.measure.run: {tool}: {verdict}\n" for tool, verdict in sanitizers.items()), end="", flush=True
    )
    return 1 if failed else 0


def bench(lines: Path, limits: Limits, only: Sequence[str]) -> dict[str, Any]:
    """Measure cases, on a CPU once for each allocator, and return the result; an interrupt ends the measurement.

    Args:
        lines: the file that gets a line for each case as it comes.
        limits: the limits of cases.
        only: parts of names: a case is measured if its name has one of them.
    """
    device = benchmarks.DEVICE
    settings = [(None, {})] if device == "cuda" else [*machine.ALLOCATORS.items()]
    known = {
        allocator: {
            benchmarks.name_of(case, allocator): case
            for case in cases.all_cases(device, allocator)
            if any(part in str(case) for part in only)
        }
        for allocator, _ in settings
    }
    lines.unlink(missing_ok=True)
    with suppress(KeyboardInterrupt):
        for left, (allocator, environment) in zip(range(len(settings), 0, -1), settings, strict=True):
            now = time.monotonic()
            share = limits._replace(end=now + (limits.end - now) / left)
            supervise(WORKER, lines, [*known[allocator]], share, environment | QUIET)
    of_names = {name: (case, allocator) for allocator, named in known.items() for name, case in named.items()}
    return summary(records(lines), of_names)


def summary(found: list[dict[str, Any]], names: Mapping[str, tuple[cases.Case, str | None]]) -> dict[str, Any]:
    """Return the figures that bench.measure.report reads.

    Args:
        found: the records of the workers.
        names: the case and the allocator of each name.
    """
    ended = {record["end"]: record for record in found if "end" in record}
    about = machine.facts()
    for record in found:  # each worker describes the machine
        about |= record.get("machine", {})
    summaries = [summary_of(case, allocator, ended.get(name, {})) for name, (case, allocator) in names.items()]
    date = datetime.now(timezone.utc).isoformat()
    return {"machine": about, "commit": machine.commit_facts(), "date": date, "cases": summaries}


def summary_of(case: cases.Case, allocator: str | None, record: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one case, and why peers are missing."""
    info = {key: value for key, value in (case.info | {"allocator": allocator}).items() if value}
    peers, missing = record.get("peers", {}), record.get("missing", {})
    if not record or "lost" in record:
        missing = dict.fromkeys(case.PEERS, record.get("lost", "not reached"))
    for facts in peers.values():
        if "least_bytes" in facts:  # which all peers share
            info[report.LEAST] = rounded(facts.pop("least_bytes") / 1e6, 3)
    made = {"info": info, "peers": rows(peers, report.OURS.get(info["pass"], "fastreg"))}
    return made | ({"missing": missing} if missing else {})


def rows(peers: dict[str, Any], ours: str) -> dict[str, Any]:
    """Return the row of each peer of a case; columns that compare a peer with a missing one are left out.

    A row has the number of rounds, and the median and the spread (the interquartile range) of the time of a call. The
    column "against" is the median over the rounds of the peer's time over fastreg's. A training step has more pairs of
    median and spread: "step, ms" is the time of the step, on a CPU the CPU time of the process, which does not include
    other programs; "added, ms" is its difference to the step without the penalty in the same round; and "over formula"
    is fastreg's time over the formula's.
    """
    made = {}
    for peer, facts in peers.items():
        seconds = facts["seconds"]
        row: dict[str, Any] = {"count": len(seconds), "ms": median_and_spread(1e3 * x for x in seconds)}
        if ours in peers:
            row["against"] = median_and_spread(map(truediv, seconds, peers[ours]["seconds"]))[0]
        if WITHOUT in peers and "eager" in peers:
            three = facts, peers[WITHOUT], peers["eager"]
            own, without, formula = (x.get("own_seconds", x["seconds"]) for x in three)
            row["step, ms"] = median_and_spread(1e3 * x for x in own)
            row["added, ms"] = median_and_spread(1e3 * (x - y) for x, y in zip(own, without, strict=True))
            row |= {"over formula": median_and_spread(map(truediv, own, formula))} if peer == ours else {}
        figures = {heading: facts[key] / unit for key, (heading, unit) in report.FIGURES.items() if key in facts}
        made[peer] = row | {x: rounded(y, 5 if x == report.PEAK else 3) for x, y in figures.items()}
    return made


def median_and_spread(values: Iterable[float]) -> list[float]:
    first, middle, third = statistics.quantiles(values, n=4)
    return [rounded(middle), rounded(third - first, 3)]


def rounded(x: float, digits: int = 5) -> float:
    """Round to so many significant digits; a whole number becomes an int. Pages show three digits."""
    return int(x) if x == int(x) else float(f"{x:.{digits}g}")


def in_rows(result: dict[str, Any]) -> str:
    """Render a result as JSON with each innermost record on a line."""
    text = json.dumps(result, indent=0)
    return re.sub(r"\{[^{}]*\}", lambda record: record[0].replace(",\n", ", ").replace("\n", ""), text) + "\n"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(f"bench.measure.run: wrote {file}", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.measure.run", description=__doc__)
    parser.add_argument("what", choices=["test", "bench"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing more after them")
    parser.add_argument("--only", default="", help="measure only the cases whose names contain this")
    parser.add_argument("--lines", type=Path, help="the file that gets a line for each case as it comes")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A result of some cases must not replace a result of all.
    folder = options.folder or (ROOT / ".benchmarks" if options.only else report.RESULTS)
    if options.what == "test":
        return test(folder, options.seconds)
    name = machine.file_name(machine.device_name())
    lines = options.lines or ROOT / ".benchmarks" / f"{name}l"
    result = bench(lines.absolute(), Limits(time.monotonic() + options.seconds, CASE_SECONDS), [options.only])
    if not any(case["peers"] for case in result["cases"]):
        print("bench.measure.run: nothing was measured")
        return 1
    file = folder / machine.file_name(result["machine"]["device"])
    write(file, in_rows(result))
    print("\n".join(report.step_tables(report.load(file))), flush=True)
    return int(any("missing" in case for case in result["cases"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
