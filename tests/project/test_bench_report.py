"""Results of benchmarks: compact files, the pages that they render, and the page of the first minutes on a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fakegpu
from tests.conftest import ROOT, more, python, skip_without

skip_without("matplotlib", "pytest_benchmark")

from bench import test_first  # noqa: E402
from bench.measure import (  # noqa: E402
    benchmarks,
    cases,
    first,
    gpu_tasks,
    gpu_tests,
    lines,
    machine,
    report,
    steps,
)
from bench.measure.groups import Group  # noqa: E402

pytestmark = pytest.mark.main


def rows_of(case: Any, peers: dict[str, dict[str, Any]], allocator: Any = machine.KEPT) -> list[dict[str, Any]]:
    """Return the rows that pytest-benchmark would have of the peers of a case, from their seconds and other figures."""
    group, rows = Group(case, allocator), []
    for peer, figures in benchmarks.paired(peers, case.OURS).items():
        rounds = figures.pop("seconds")
        median, iqr = benchmarks.median_and_spread(rounds)
        stats = dict.fromkeys(report.COLUMNS, 0) | {"rounds": len(rounds), "median": median, "iqr": iqr, "data": rounds}
        rows.append({"group": str(group), "name": peer, "extra_info": group.info | figures, "stats": stats})
    return rows


def call(speed: float, allocator: Any = machine.KEPT, shape: Any = (2, 3, 4), **figures: Any) -> list[dict[str, Any]]:
    """Return the rows of a call in which fastreg is so many times as fast as eager code, except in an odd round."""
    rounds = {"compiled": [0.5, 1.0, 0.5], "eager": [speed, 2 * speed, speed], "fastreg": [1.0, 2.0, 100.0]}
    case = cases.PenaltyCase(shape, figures.pop("dtype", torch.float32))
    return rows_of(case, {peer: {"seconds": seconds} | figures for peer, seconds in rounds.items()}, allocator)


def session_of(rows: list[dict[str, Any]], device: str, missing: Any = (), **facts: Any) -> dict[str, Any]:
    """Return the JSON of a session on a machine."""
    about = {"device": device, "torch": "1", "triton": "2", "python_version": "3", "threads": 2} | facts
    commit = {"id": "0123456789abc", "dirty": False, "version": "9", "source": "s"}
    facts = {"machine_info": about, "commit_info": commit, "datetime": "2026", "version": "5"}
    return facts | {"benchmarks": rows, "missing": [*missing]}


def result_of(folder: Path, rows: list[dict[str, Any]], device: str = "A CPU, 2 cores", **facts: Any) -> report.Result:
    """Write the compact result of a machine, and load it."""
    folder.mkdir(exist_ok=True)
    file = folder / machine.file_name(device)
    file.write_text(report.compact(session_of(rows, device, **facts)))
    return report.load(file)


def test_the_report_names_the_peers_that_are_missing(tmp_path: Path) -> None:
    case = cases.PenaltyCase((2, 3, 4), torch.float32)
    missing = {"eager": "ValueError: broken", "compiled": "does not fit in the device's memory"}
    lost = [{"group": str(case), "name": x, "extra_info": case.info, "why": why} for x, why in missing.items()]
    rows = rows_of(case, {"fastreg": {"seconds": [1.0, 2.0]}}, None)
    result = result_of(tmp_path, rows + call(2.0, shape=(9, 9, 9)), missing=lost)
    told = report.caveats(result)
    assert "Not measured, eager: ValueError: broken: (2, 3, 4), float32, forward + backward.\n" in told
    assert "Not measured, compiled: does not fit in the device's memory: (2, 3, 4)" in told
    assert "(2, 3, 4)" not in report.call_table(result), "which compares all peers"


def test_a_report_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"share_of_copy": 1.0, "launches": 1}
    rows = call(4.0, None, (64, 70, 400), **figures)
    found = session_of(rows, "A GPU", copy_bandwidth=3e12)
    made = tmp_path / "json"
    made.write_text(json.dumps(found))
    result_of(tmp_path, call(8.0))
    page = tmp_path / "performance.md"
    page.write_text(report.BEGIN + report.END)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGES", [(page, report.BEGIN, report.figures)])
    monkeypatch.setattr(sys, "argv", ["report", str(made)])
    report.main()
    text = page.read_text()
    assert "not measured yet" not in text, "there is a CPU, too"
    for told in (
        "| A CPU, 2 cores | 9 | memory kept | 0.5x, 0.50x |",
        "a copy moves 3.00 TB/s",
        "| 0.5x | 4.0x | 100% | 1 |",
    ):
        assert told in text


TESTS = [value for name, value in vars(test_first).items() if name.startswith("test_")]


def findings(folder: Path, rows: list[dict[str, Any]], **found: Any) -> Path:
    """Write lines of bench/test_first.py on this device: headline rows, and what the tasks of a part have found."""
    file = folder / f"{machine.file_name(machine.device_name())}l"
    about = session_of(rows, machine.device_name(), copy_bandwidth=3e12)
    tasks = {part: [f"task {number} of {part}" for number in range(3)] for part in found}
    tasks["headline"] = [row["name"] for row in rows]
    every = [[part, task] for part, of_part in tasks.items() for task in of_part]
    lines.append(file, tests=every, **{key: about[key] for key in ("machine_info", "commit_info", "version")})
    for part, task in every:
        own = {"benchmark": next(x for x in rows if x["name"] == task)} if part == "headline" else found[part]
        lines.append(file, part=part, task=task, seconds=10.0, **own) if own else None
    return file


def test_the_page_of_the_first_minutes_has_a_row_for_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {
        "smoke": {"found": {"errors": {"raw, 2.0": 3.0}, "noticed": True, "verdict": "wrong"}},
        "order": {"lost": "the process ended with status -6"},
        "sweep": {},
        "device": {"found": {"ncu": gpu_tasks.NOT_THERE}},
        "files": {"found": {"passed": 3, "skipped": 0, "failed": [*"abcdefg"]}},
    }
    rows = call(4.0, None, (128, 512, 1024), dtype=torch.bfloat16, share_of_copy=1.0, launches=1)
    file = findings(tmp_path, rows, **found)
    monkeypatch.setattr(sys, "argv", ["first", str(file)])
    first.main()
    page = file.with_suffix(".md").read_text()
    for told in (
        "| task 1 of smoke | True | wrong | raw, 2.0: 3.00 |",
        "| task 2 of order | the process ended with status -6 |",
        "| task 0 of sweep | not reached |",
        "| task 1 of files | 3 | 0 | a, b, c, d, e and 2 more |",
        "headline 30 s",
    ):
        assert told in page
    problems = fakegpu.problems(file)
    assert [x for x in problems if "no record" in x] == [f"sweep task {i} of sweep: no record" for i in range(3)]
    assert len([x for x in problems if "where the values are wrong" in x]) == 3, "of order"
    monkeypatch.setattr(report, "FIRST", tmp_path)
    (sentence,) = report.not_measured([result_of(tmp_path / "cpu", call(2.0))])
    assert "is 0.5 times as fast as the compiled formula and 4.0 times as fast as the eager one, " in sentence
    assert "reaches 100% of the bandwidth of a copy" in sentence


def test_the_parts_of_the_first_minutes_fit() -> None:
    shares = {test.__name__: mark.args[0] for test in TESTS for mark in test.pytestmark if mark.name == "part"}
    assert {"test_" + part for part in fakegpu.PARTS} == {*shares} - {"test_sanitizers"}
    assert sum(shares.values()) - shares["test_sanitizers"] < 540
    settings = [*gpu_tasks.smoke_settings(), *gpu_tasks.order_settings(), *gpu_tasks.sweep_settings()]
    assert {x.short_run for x in gpu_tasks.smoke_settings()} == {16, 4}
    compiled = {x.dtype for x in gpu_tasks.compile_settings()}
    assert {x.dtype for x in settings} == compiled, "nothing else is compiled while something is measured"
    assert gpu_tests.TESTS[-1] == gpu_tests.LARGE


def test_the_readme_names_both_allocators_and_the_least_of_all_machines(tmp_path: Path) -> None:
    both = call(8.0, machine.DEFAULT) + call(4.0) + call(0.8, shape=(3, 3, 4))
    slow = [row | {"extra_info": row["extra_info"] | {"against": 0.25}} for row in call(8.0, machine.DEFAULT)]
    results = [result_of(tmp_path, both), result_of(tmp_path, slow, "Slow CPU")]
    results[1].date = "2025"
    part = report.figures(results)
    assert "| A CPU, 2 cores | 9 | default allocator | 0.5x, 0.50x | 8.0x, 8.00x |" in part
    text = report.speed_of_calls(results)
    fast = "0.5 times as fast as the compiled formula and 8.0 times as fast as the eager one"
    assert f"On a CPU with the default allocator it is {fast}; " in text
    assert "; with memory kept, 0.5 and 1.8 times (geometric means of 2 shapes, A CPU, 2 cores)" in text
    assert re.search(r"slowest shape on 2 .* runs at 0\.25 times the compiled formula's speed", text)


def test_what_is_added_to_a_step_is_a_median_of_pairs(tmp_path: Path) -> None:
    """A busy round counts for both."""
    without = [0.1, 0.3, 0.2, 0.2, 0.2]
    added = {"no penalty": [0.0] * 5, "eager": [0.03, 0.04, 0.05, 0.04, 0.04], "compiled": [0.02] * 5}
    added |= {"hooks by hand": [0.02] * 5, "attach": [0.0, 0.01, 0.02, 0.03, 0.0]}
    peaks = dict.fromkeys(added, 10**8) | {"attach": 181 * 10**6}
    peers = {
        peer: {"seconds": [x + y for x, y in zip(without, times, strict=True)], "peak_bytes": peaks[peer]}
        for peer, times in added.items()
    }
    result = result_of(tmp_path, rows_of(steps.LSTMStep((4, 5, 6)), peers))
    (row,) = re.findall(r"\| LSTM, \(4, 5, 6\) \| 200 \| (.*) \|\n", report.step_table(result))
    means, errors = zip(*(map(float, cell.split("±")) for cell in row.split(" | ")), strict=True)
    assert means == (20, 40, 20, 10)
    formula, attach = (1e3 * benchmarks.median_and_spread(added[peer])[1] for peer in ("eager", "attach"))
    assert errors == pytest.approx((0, 0.929 * formula / 5**0.5, 0, 0.929 * attach / 5**0.5), abs=0.06)
    assert report.added_table(result).endswith("| LSTM, (4, 5, 6) | 1.00x; 0.50x | -; - | 0.880x |\n")
    assert "| formula | hooks by hand | `attach` |\n" in report.step_table(result), "no column of a peer that it lacks"
    assert report.peak_table(result).endswith("| LSTM, (4, 5, 6) | 100 | +0% | +0% | +0% | +81% |\n")
    assert {*report.STEP_PEERS} == {*steps.Step.PEERS}


def test_what_is_committed_is_what_was_measured() -> None:
    results = [report.load(file) for file in sorted(report.RESULTS.glob("*.json"))]
    assert not any("Fake" in result.machine["device"] for result in results), "kernels that do nothing take no time"
    for page, begin, part in report.PAGES:
        text = page.read_text()
        assert report.with_part(text, part(results), begin) == text, "run `python -m bench.measure.report`"
    for result in report.latest(results):
        assert len(result.of(report.STEP, report.HEADLINE)) == 2, "the README has each of its rows"
        assert len(result.of(report.BOTH, report.CALLS)) == len(report.CALLS)
    for found in report.FIRST.glob("*.jsonl"):
        assert found.with_suffix(".md").read_text() == first.page(found)


COLLECT = """
import sys, pytest
from tests import conftest

conftest.NEEDS.clear()  # no case is left out
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]))
"""


@more
def test_all_files_with_tests_for_a_gpu_run_on_it() -> None:
    """Their text shows them, without the time that pytest takes to collect all tests on a GPU."""
    collected = re.findall(r"^tests/(.*\.py)::", python("-c", COLLECT).stdout, re.MULTILINE)
    assert {*gpu_tests.TESTS} == {*collected}


@more
def test_the_notebook_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a copy, where a made-up shell writes a made-up result instead of bench/on_gpu.sh."""
    skip_without("nbclient")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "bench" / "on_gpu.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs before a commit"
    assert "torch.cuda.is_available()" in code[0].source
    code[0].source = code[0].source.replace("torch.cuda.is_available()", "True")
    checkout, shell = tmp_path / "checkout", tmp_path / "bash"
    shutil.copytree(ROOT / "bench", checkout / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    for name in ("fastreg", "kernels"):
        (checkout / name).symlink_to(ROOT / name)
    made = tmp_path / "made"
    rows = call(1.0, None, (128, 512, 1024), share_of_copy=1.0, launches=1)
    found = findings(made, rows, smoke={"found": {"verdict": "right"}})
    monkeypatch.setattr(sys, "argv", ["first", str(found)])
    first.main()
    shell.write_text(
        f'#!/bin/sh\necho "$@" with limit $LIMIT >> {tmp_path}/called\n'
        f"mkdir -p {checkout}/bench/results/first && cp {made}/* {checkout}/bench/results/first\n"
    )
    shell.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(checkout / "bench")}}).execute()
    outputs = "".join(str(output) for cell in code for output in cell.outputs)
    assert (tmp_path / "called").read_text() == "bench/on_gpu.sh first with limit 540\n"
    for text in (
        "self-test passed",
        "A copy moves 3.00 TB/s in this run",
        "| (128, 512, 1024), float32 | 100% | 98% |",
    ):
        assert text in outputs
    with zipfile.ZipFile(checkout / "bench" / "gpu-results.zip") as archive:
        assert archive.namelist() == sorted(found.with_suffix(x).name for x in (".json", ".jsonl", ".md"))
