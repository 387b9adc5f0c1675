"""The benchmarks: known work, rows that survive ways that fail, and pages that show the measured figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, gpu, more, python, skip_without

skip_without("matplotlib", "pytest_benchmark")

from bench.measure import before, figures, lines, machine, picture, report, results, timing  # noqa: E402
from bench.measure.timing import Rounds  # noqa: E402

pytestmark = pytest.mark.main


def test_known_work_takes_its_time(device: str) -> None:
    short = partial(torch.cuda._sleep, 2_000_000) if device == "cuda" else partial(time.sleep, 0.02)
    turns = timing.take_turns({"long": lambda: [short() for _ in range(3)], "short": short}, Rounds(2, 0.0))
    seconds = {way: [turn.wall for turn in turns[way]] for way in turns}
    assert len(seconds["long"]) == Rounds(2, 0.0).least
    assert timing.compared(seconds, "long")["over"]["short"][0] == pytest.approx(3, rel=0.1)
    if device == "cpu":
        assert min(seconds["short"]) >= 0.02
        assert all(turn.own < turn.wall / 2 for turn in turns["long"]), "sleeping takes no time of the processor"


def test_ways_take_turns() -> None:
    seen: list[str] = []
    turns = timing.take_turns({way: lambda way=way: seen.append(way) for way in "abc"}, Rounds(1, 0.0))
    assert "".join(seen).startswith("abc" + "abcbcacab"), "the first round is a warm-up"
    assert {len(of_way) * 3 for of_way in turns.values()} == {len(seen) - 3}


def test_ways_are_compared_round_by_round() -> None:
    """A busy round counts for both."""
    found = timing.compared({"no penalty": [1.0, 100.0, 1.0], "eager": [2.0, 200.0, 2.0]}, "eager")
    assert found == {"over": {"no penalty": [2.0, 0.0]}, "added": [1.0, pytest.approx(53.1, abs=0.1)]}
    torch.manual_seed(0)
    median, error = timing.median_and_error(torch.randn(10_000).tolist())
    assert error == pytest.approx((torch.pi / 2 / 10_000) ** 0.5, rel=0.05)
    assert abs(median) < 3 * error


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_busy_machine_is_noticed() -> None:
    """Another process computes on the core of this thread."""
    core = {min(cores := os.sched_getaffinity(0))}
    script = f"import os; os.sched_setaffinity(0, {core})\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", script])
    os.sched_setaffinity(0, core)
    try:
        turns = timing.take_turns({"work": lambda: sum(range(10**6))}, Rounds(5, 1.0))
    finally:
        os.sched_setaffinity(0, cores)
        other.kill()
        other.wait()
    assert timing.share_waiting(turns["work"]) > timing.MOST_WAITING


def test_peak_bytes(device: str) -> None:
    x = torch.randn(128, 128, device=device)
    # There are two temporaries at a time, and one of them together with the result.
    assert figures.peak_bytes(lambda _: (x.exp().add(1).exp(),), device) == pytest.approx(x.nbytes, abs=64)
    assert figures.peak_bytes(lambda _: (), "cpu") is None


@gpu
def test_launches() -> None:
    """The formula launches 30 kernels in bfloat16, forward and backward, the compiled formula 6, and fastreg 2."""
    from bench import test_call

    inputs, one = test_call.penalty_inputs(test_call.SMALL, torch.bfloat16), torch.ones((), device="cuda")
    for way, count in {"eager": 30, "compiled": 6, "fastreg": 2}.items():
        penalty = partial(test_call.WAYS[way], *inputs, 2.0, 1.0)
        assert figures.launches(lambda _, penalty=penalty: torch.autograd.grad(penalty(), inputs, one)) == count, way


def test_the_fastreg_of_another_checkout_is_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastreg

    monkeypatch.setattr(before, "fastreg", None)
    before.load(ROOT)
    assert before.fastreg.fused_ar_tar is not fastreg.fused_ar_tar
    assert sys.modules["fastreg"] is fastreg
    x = torch.randn(3, 5, 8)
    assert before.fastreg.fused_ar_tar(x, x, 2.0, 1.0) == fastreg.fused_ar_tar(x, x, 2.0, 1.0)
    with pytest.raises((FileNotFoundError, ModuleNotFoundError)):
        before.load(ROOT / "docs")


def bench(folder: Path, *options: str, fails: bool = True, script: bool = False) -> str:
    """Run benchmarks by bench/run.sh or by pytest itself; return the output."""
    own = "--limit=15", "--benchmark-max-time=0.02", f"--benchmark-json={folder}/json"
    # With the variable of pytest-xdist, pytest-benchmark would measure nothing.
    environment: dict[str, Any] = {"CUDA_VISIBLE_DEVICES": "", "PYTEST_XDIST_WORKER": "", "PYTHON": sys.executable}
    if not script:
        return python("-m", "pytest", "bench", *own, *options, fails=fails, **environment).stdout
    command = ["bash", "bench/run.sh", "300", f"{folder}/lines.jsonl", "bench", *own, *options]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True).stdout


WHY = {
    "raises": "ValueError: no",
    "is_too_large": "OutOfMemoryError: out of memory. Tried to allocate 2 GiB",
    "wrong": "AssertionError: differs from the formula in float64 by 1.0e-03",
}
DIED = ["aborts", "hangs", "aborts_late"]
FAILING = "-p", "tests.project.failing_ways"
SHAPE = "20x70x96-float32"
CASE = f"penalty-{SHAPE}-batch_first"


def test_ways_that_fail_lose_no_other_row(tmp_path: Path) -> None:
    """After a crash or a hang another process goes on behind it, and at the end the missing rows are named."""
    output = bench(tmp_path, *FAILING, "-k", f"{SHAPE} and not compiled and not interrupts", script=True)
    found = lines.read(tmp_path / "lines.jsonl")
    missing = {test.removeprefix(f"{CASE}/"): why for test, why in found["missing"].items()}
    assert missing == WHY | dict.fromkeys(DIED, lines.DIED)
    assert [row["name"] for row in found["benchmarks"]] == ["eager", "fastreg"]
    assert f"{CASE}/hangs: {lines.DIED}" in output
    (own,) = (row for row in found["benchmarks"] if row["name"] == "fastreg")
    assert own["extra_info"]["peak_bytes"] < 20 * 70 * 96 * 4, "no temporary is as large as raw"
    assert own["options"]["timer"] == "seconds of turns"
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write('{"row": {"cut off')
    assert lines.read(tmp_path / "lines.jsonl") == found


def test_an_interrupt_loses_no_row(tmp_path: Path) -> None:
    selected = f"({SHAPE} and (eager or fastreg)) or (forward and float32 and (interrupts or fastreg))"
    file = tmp_path / "lines.jsonl"
    output = bench(tmp_path, *FAILING, "-k", selected, f"--lines={file}")
    assert "KeyboardInterrupt" in output
    rows = json.loads((tmp_path / "json").read_text())["benchmarks"]
    assert [row["name"] for row in rows] == ["eager", "fastreg"]
    assert lines.records(file)[-1] == {"end": int(pytest.ExitCode.INTERRUPTED)}
    bench(tmp_path, *FAILING, "-k", f"({selected}) and not interrupts", f"--lines={file}", fails=False)
    assert len(lines.read(file)["benchmarks"]) == 3, "the second run went on"


@more
def test_steps_are_checked(tmp_path: Path) -> None:
    output = bench(tmp_path, *FAILING, "-k", "LSTM-8x10x16", "--benchmark-disable", "--limit=300")
    assert "adds something else than the formula" in output
    assert "1 failed, 6 passed" in output


@more
def test_two_runs_are_compared(tmp_path: Path) -> None:
    skip_without("pygal")
    own = f"--benchmark-storage={tmp_path}", "-k", f"{SHAPE} and (fastreg or before)", f"--before={ROOT}"
    bench(tmp_path, *own, "--benchmark-save=one", fails=False)
    output = bench(tmp_path, *own, "--benchmark-compare", f"--benchmark-histogram={tmp_path}/drawn", fails=False)
    assert re.search(rf"{CASE}: before: [01]\.\d+ ± 0\.\d+ of fastreg", output)
    assert "(0001_one)" in output
    assert [*tmp_path.glob("drawn*.svg")]


@pytest.mark.parametrize("option", ["--benchmark-timer=time.time", "--benchmark-cprofile=tottime"])
def test_options_without_effect_are_refused(option: str) -> None:
    done = python("-m", "pytest", "bench", option, "--collect-only", fails=True)
    assert f"{option.partition('=')[0]} has no effect here: " in done.stderr


def test_rows_of_a_busy_machine_are_missing() -> None:
    found = results.read(next(results.RESULTS.glob("*.json")))
    busy, *others = (row for row in found["benchmarks"] if row["extra_info"].get("allocator") != machine.DEFAULT)
    busy["extra_info"]["waiting"] = 0.5
    merged = results.merged([found | {"benchmarks": [busy, *others]}])
    assert merged["benchmarks"] == others
    page = "\n".join(report.tables(results.result_of(json.loads(results.compact(merged)))))
    assert f"threads waited for a core during more than 10% of the time: {busy['group']}/{busy['name']}." in page


def test_what_is_committed_is_what_was_measured() -> None:
    """Every row is on the page of its machine, and every kind in the summary."""
    found, drawn = [results.load(file) for file in results.RESULTS.glob("*.json")], picture.FILE.read_text()
    for result in found:
        assert "Fake" not in result.machine["device"], "kernels that do nothing take no time"
        for case in result.cases:
            title = report.TITLES[case.info["pass"]]
            below = [part for part in report.all_rows(result).split("## ") if part.startswith(title)]
            assert any(f"| {case.label} |" in part for part in below), f"{case.name} is missing"
            assert f"| {title}, " in report.summary([result])
    for page, text in (report.pages(found) | {picture.FILE: drawn}).items():
        assert page.read_text() == text, "run `python -m bench.measure.report`"


COLLECT = """import sys, pytest; from tests import conftest; conftest.NEEDS.clear()  # no case is left out
folders = "tests/kernels", "tests/call", "tests/attach"
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *folders]))"""


@more
def test_all_files_with_tests_for_a_gpu_run_on_it() -> None:
    """Their text shows them, without the time that pytest takes to collect all tests on a GPU."""
    (line,) = re.findall(r"^files=\$\((.*)\)$", (ROOT / "bench" / "on_gpu.sh").read_text(), re.MULTILINE)
    files = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True).stdout.split()
    collected = {*re.findall(r"^(tests/.*\.py)::", python("-c", COLLECT).stdout, re.MULTILINE)}
    assert {*files, "tests/kernels/test_order.py", "tests/kernels/test_sizes.py"} >= collected
    assert len(files) < len(collected) + 6, "files without such tests take seconds"


def test_the_first_minutes_refuse_a_machine_without_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", "bench/on_gpu.sh", "first"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode
    assert "expected a GPU, got none" in done.stderr
    assert not [*tmp_path.iterdir()]


@more
def test_the_notebook_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a folder where a made-up bench/on_gpu.sh writes a made-up result."""
    skip_without("nbclient")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "bench" / "on_gpu.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs before a commit"
    code[0].source = code[0].source.replace("torch.cuda.is_available()", "True")
    results = tmp_path / "bench" / "results" / "first"
    results.mkdir(parents=True)
    (tmp_path / "bench" / "on_gpu.sh").write_text(f'cd {results}; echo "tables of $@" | tee first.md > sweep.md\n')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path / "bench")}}).execute()
    outputs = "".join(str(output) for cell in code for output in cell.outputs)
    assert "self-test passed" in outputs
    assert "tables of first" in outputs
    with zipfile.ZipFile(tmp_path / "bench" / "gpu-results.zip") as archive:
        assert archive.namelist() == ["first.md", "sweep.md"]
