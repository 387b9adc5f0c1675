"""The benchmarks: known work, rows that survive ways that fail, and pages that show the measured figures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, python, skip_on_formula, skip_without

skip_without("matplotlib", "pytest_benchmark")

from bench.measure import figures, lines, machine, report, results, timing  # noqa: E402
from bench.measure.timing import Rounds  # noqa: E402

pytestmark = pytest.mark.main


def test_known_work_takes_its_time_in_turns(device: str) -> None:
    short = partial(torch.cuda._sleep, 2_000_000) if device == "cuda" else partial(time.sleep, 0.02)
    seen, ways = list[str](), {"long": lambda: [short() for _ in range(3)], "short": short}
    turns = timing.take_turns(ways, Rounds(2, 0.0), seen.append)
    seconds = {way: [turn.wall for turn in turns[way]] for way in turns}
    assert seen[:6] == ["long", "short", "long", "short", "short", "long"], "the first round is a warm-up"
    assert len(seconds["long"]) == Rounds(2, 0.0).least == len(seen) / 2 - 1
    assert timing.compared(seconds, "long")["short"][0] == pytest.approx(3, rel=0.1)
    if device == "cpu":
        assert min(seconds["short"]) >= 0.02
        assert all(turn.own < turn.wall / 2 for turn in turns["long"]), "sleeping takes no time of the processor"


def test_ways_are_compared_round_by_round() -> None:
    """A busy round counts for both."""
    found = timing.compared({"no penalty": [1.0, 100.0, 1.0], "eager": [2.0, 200.0, 2.0]}, "eager")
    assert found == {"no penalty": [2.0, 0.0]}
    torch.manual_seed(0)
    median, error = timing.median_and_error(torch.randn(10_000).tolist())
    assert error == pytest.approx((torch.pi / 2 / 10_000) ** 0.5, rel=0.05)
    assert abs(median) < 3 * error


def test_peak_bytes_are_those_of_the_temporaries(device: str) -> None:
    x = torch.randn(128, 128, device=device)
    # There are two temporaries at a time, and one of them together with the result.
    assert figures.peak_bytes(lambda _: (x.exp().add(1).exp(),), device) == pytest.approx(x.nbytes, abs=64)
    assert figures.peak_bytes(lambda _: (), "cpu") is None


def test_kernels_that_are_missing_or_older_than_their_sources_are_refused(tmp_path: Path) -> None:
    """Benchmarks would measure the formula, and tests would test it."""
    skip_on_formula("cpu")
    for name in ("fastreg", "kernels", "bench", "examples", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "kernels" / "cpu_rows.h").open("a") as header:
        header.write("// another version\n")
    collect = "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"
    said = python(*collect, "bench", folder=tmp_path, fails=True, CUDA_VISIBLE_DEVICES="").stderr
    build = r" {4}\S+ setup\.py --quiet build_ext$"
    assert re.search(rf"^ERROR: fastreg runs the plain formula on CPUs: .*\n.*\n{build}", said, re.MULTILINE)
    said = python(*collect, "tests/call", folder=tmp_path, fails=True).stderr
    assert re.search(rf"was built from another version .*\n{build}", said, re.MULTILINE)


# With the variable of pytest-xdist, pytest-benchmark would measure nothing.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "PYTEST_XDIST_WORKER": "", "PYTHON": sys.executable}
FAILING = "-p", "tests.project.failing_ways"


def another_package(folder: Path) -> Path:
    """Make the package of another commit, here of the same, by the lines of bench/before.sh."""
    lines = [line for line in (ROOT / "bench" / "before.sh").read_text().splitlines() if "fastreg_before" in line]
    script = "\n".join(lines[1:])
    subprocess.run(["bash", "-ec", script], cwd=folder, env=os.environ | {"tree": f"{ROOT}"}, check=True)
    return folder


def test_ways_that_fail_lose_no_other_row(tmp_path: Path) -> None:
    """After a crash or a hang another process goes on behind it, and at the end the missing rows are named."""
    skip_on_formula("cpu")
    shape, file = "20x70x96-float32", tmp_path / "lines.jsonl"
    command = ["bash", "bench/run.sh", "300", f"{file}", "bench", *FAILING, "-k", f"{shape} and not compiled"]
    command += ["--limit=15", "--benchmark-max-time=0.02", "--benchmark-min-rounds=10"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{another_package(tmp_path)}"}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    found, case = lines.read(file), f"penalty-{shape}-batch_first"
    why = {
        "raises": "ValueError: no",
        "is_too_large": "OutOfMemoryError: out of memory. Tried to allocate 2 GiB",
        "wrong": "AssertionError: differs from the formula in float64 by 1.0e-03",
    }
    why |= dict.fromkeys(["aborts", "hangs", "aborts_late"], lines.DIED)
    assert found["missing"] == {f"{case}/{way}": reason for way, reason in why.items()}
    assert f"{case}/hangs: {lines.DIED}" in output
    assert re.search(rf"{case}: fastreg before: [\d.]+ ± [\d.]+ of fastreg\n", output)
    assert [row["name"] for row in found["benchmarks"]] == ["eager", "tight", "fastreg", "fastreg before"]
    own = found["benchmarks"][2]
    assert own["extra_info"]["peak_bytes"] < 20 * 70 * 96 * 4, "no temporary is as large as raw"
    assert own["options"]["timer"] == "seconds of turns"
    with file.open("a") as cut_off:
        cut_off.write('{"row": {"cut off')
    assert lines.read(file) == found


def row(case: str, way: str, facts: dict[str, Any], seconds: float, **found: Any) -> dict[str, Any]:
    about = {"shape": [2, 3, 4], "allocator": machine.KEPT, "waiting": 0.0, "over": {}} | facts | found
    return {
        "group": case,
        "name": way,
        "extra_info": about,
        "stats": {"median": seconds, "rounds": 5},
    }


def test_each_table_shows_what_is_computed_by_hand() -> None:
    """The fastest formula of the step is the eager one."""
    call = {"pass": results.BOTH, "dtype": "float32"}
    step = {"pass": "step", "model": "LSTM", "dropout": "variational"}
    default = {"shape": [16, 70, 200], "allocator": machine.DEFAULT}
    trainer = default | {"pass": "Lightning", "model": "LSTM", "dropout": "elementwise"}
    dropout = call | {"pass": "dropout", "dropout": "variational"}
    without, lost = {"no penalty": [1.2, 0.005]}, {"no penalty": [1.03, 0.02]}
    rows = [
        row("a", "no penalty", step, 0.010, peak_bytes=100e6),
        row("a", "compiled", step, 0.016, peak_bytes=150e6, over=lost),
        row("a", "eager", step, 0.010, peak_bytes=160e6, over=without),
        row("a", "attach", step, 0.012, over=without | {"eager": [1.2, 0.02]}),
        row("a", "fused dropout", step, 0.012, waiting=0.5),
        row("b", "compiled", call, 0.004),
        row("b", "fastreg", call, 0.002, over={"compiled": [0.5, 0.0]}),
        row("c", "compiled", call | {"dtype": "bfloat16"}, 0.004),
        row("c", "fastreg", call | {"dtype": "bfloat16"}, 0.0005, over={"compiled": [0.125, 0.0]}),
        row("d", "compiled with dropout", dropout, 0.001),
        row("d", "fastreg", dropout, 0.001, over={"compiled with dropout": [1, 0], "fused_ar_tar": [0.4, 0]}),
        row("d", "fused_ar_tar", dropout, 0.0023, over={"compiled with dropout": [2.3, 0.0]}),
        row("f", "no penalty", trainer, 0.010, operators=60),
        row("f", "eager", trainer, 0.011, operators=92, over={"no penalty": [1.1, 0.01]}),
        row("f", "tight", trainer, 0.011, operators=92, over=lost),
        row("f", "adapter", trainer, 0.01, operators=72.4, over={"no penalty": [0.95, 0.01], "eager": [0.9, 0.01]}),
    ]
    (found,) = (json.loads(file.read_text()) for file in machine.RESULTS.glob("*.json"))
    runs = [[x for x in rows if x["extra_info"]["allocator"] == allocator] for allocator in machine.ALLOCATORS]
    merged = results.merged([found | {"missing": {}, "benchmarks": run} for run in runs])
    result = results.result_of(json.loads(results.compact(merged)))
    page = "\n".join(report.tables(result)).splitlines()
    for line in (
        f"- Not measured, {results.BUSY}: a/fused dropout.",
        "| LSTM, (2, 3, 4), variational dropout | 10 ms | +20.0 ± 0.5% | no difference seen, ±2% | +20.0 ± 0.5% |",
        "| LSTM, (2, 3, 4), variational dropout | 1.20±0.02 |",
        "| LSTM, (2, 3, 4), variational dropout | 100 MB | +60% | +50% |  |",  # peak memory
        "| LSTM, (16, 70, 200), elementwise dropout, in Lightning | 60.0 | +32.0 | +32.0 | +12.4 |",  # operators
        "| (2, 3, 4), bfloat16 | 0.125±0.000 | 0.5 ms |",  # of a call: its ratio to the formula, and its time
        "| (2, 3, 4), float32, variational dropout | no difference seen, ±0.0% | 2.300±0.000 |",
    ):
        assert line in page, line
    assert "2 of 6 ratios are above 1" in report.losing(result)
    assert "| (2, 3, 4), float32, variational dropout | memory kept | 2.300±0.000 |" in report.losing(result)
    lightning = report.in_full(result).splitlines()[2]
    assert lightning.endswith("in Lightning | 10 ms | +10 ± 1% | no difference seen, ±2% | \N{MINUS SIGN}5 ± 1% |")
    brief = "| +10 ± 1% | no difference seen, ±2% |  |  | \N{MINUS SIGN}5 ± 1% |  |\n\nMeasured on "
    assert brief in report.in_brief(result), "of the README"


def test_the_pages_show_what_was_measured() -> None:
    assert not any("Fake" in result.machine["device"] for result in results.load()), "its kernels take no time"
    for page, text in report.pages().items():
        assert page.read_text() == text, "run `python -m bench.measure.report`"
