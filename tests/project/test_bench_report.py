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
from bench.measure import benchmarks, cases, first, gpu_tasks, gpu_tests, lines, machine, report, steps  # noqa: E402
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


def on_gpu(shape: Any, **options: Any) -> list[dict[str, Any]]:
    return call(4.0, None, shape, share_of_copy=1.0, launches=1, **options)


def session_of(rows: list[dict[str, Any]], device: str, **facts: Any) -> dict[str, Any]:
    """Return the JSON of a session on a machine."""
    about = {"device": device, "torch": "1", "triton": "2", "python_version": "3", "threads": 2} | facts
    commit = {"id": "0123456789abc", "dirty": False, "version": "9", "source": "s"}
    facts = {"machine_info": about, "commit_info": commit, "datetime": "2026", "version": "5"}
    return facts | {"benchmarks": rows, "missing": []}


def result_of(rows: list[dict[str, Any]], device: str = "A CPU") -> report.Result:
    """Return what a compact result keeps of a session."""
    return report.result_of(device, json.loads(report.compact(session_of(rows, device))))


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
    parts: dict[str, tuple[Any, str]] = {
        "smoke": ({"found": {"errors": {"raw, 2.0": 3.0}, "verdict": "wrong"}}, "smoke | wrong | raw, 2.0: 3.00 |"),
        "order": ({"lost": "the process ended"}, "| task 2 of order | the process ended |"),
        "sweep": ({}, "| task 0 of sweep | not reached |"),
        "device": ({"found": {"ncu": gpu_tasks.NOT_THERE}}, "ncu:"),
        "files": ({"found": {"passed": 3, "failed": ["a", "b"]}}, "| task 1 of files | 3 | a, b |"),
    }
    rows = on_gpu((128, 512, 1024), dtype=torch.bfloat16)
    file = findings(tmp_path, rows, **{part: found for part, (found, _) in parts.items()})
    about = {"group": rows[0]["group"], "extra_info": rows[0]["extra_info"]}
    lines.append(file, part="headline", task="lost", missing=about | {"name": "attach", "why": "ValueError: broken"})
    monkeypatch.setattr(sys, "argv", ["first", str(file)])
    first.main()
    page = file.with_suffix(".md").read_text()
    told = "a copy moves 3.00 TB/s", "| 0.5x | 4.0x | 100% | 1 |", "Not measured, attach: ValueError: broken: (128, "
    for row in (*told, *(row for _, row in parts.values())):
        assert row in page
    problems = fakegpu.problems(file)
    assert [x for x in problems if "no record" in x] == [f"sweep task {i} of sweep: no record" for i in range(3)]
    assert [x[:6] for x in problems if "where the values are wrong" in x] == ["order "] * 3
    monkeypatch.setattr(report, "FIRST", tmp_path)
    (sentence,) = report.not_measured([])
    assert "is 0.5 times as fast as the compiled formula and 4.0 times as fast as the eager one, " in sentence


def test_the_parts_of_the_first_minutes_fit() -> None:
    tests = [test for name, test in vars(test_first).items() if name.startswith("test_")]
    shares = {test.__name__: mark.args[0] for test in tests for mark in test.pytestmark if mark.name == "part"}
    assert {"test_" + part for part in fakegpu.PARTS} == {*shares} - {"test_sanitizers"}
    assert sum(shares.values()) - shares["test_sanitizers"] < 540
    settings = [*gpu_tasks.smoke_settings(), *gpu_tasks.order_settings(), *gpu_tasks.sweep_settings()]
    compiled = {x.dtype for x in gpu_tasks.compile_settings()}
    assert {x.dtype for x in settings} == compiled, "nothing else is compiled while something is measured"


def test_a_speed_is_a_geometric_mean_with_each_allocator_and_the_least_of_all_machines() -> None:
    both = call(8.0, machine.DEFAULT) + call(4.0) + call(0.8, shape=(3, 3, 4))
    slow = [row | {"extra_info": row["extra_info"] | {"against": 0.25}} for row in call(8.0, machine.DEFAULT)]
    results = [result_of(both), result_of(slow, "Slow CPU")]
    results[1].date = "2025"
    text = report.speed_of_calls(results)
    assert re.findall(r"\d\.\d+", text.partition("\nOn a GPU")[0]) == ["0.5", "8.0", "0.5", "1.8", "0.25"]


def test_what_is_added_to_a_step_is_a_median_of_pairs() -> None:
    """A busy round counts for both."""
    without, formula, attach = [0.1, 0.3, 0.2, 0.2], [0.03, 0.04, 0.04, 0.04], [0.0, 0.01, 0.02, 0.01]
    added = {steps.WITHOUT: [0.0] * 4, "eager": formula, "attach": attach}
    seconds = {peer: {"seconds": [x + y for x, y in zip(without, own, strict=True)]} for peer, own in added.items()}
    paired = benchmarks.paired(seconds, "attach")
    for peer, own in added.items():
        assert paired[peer]["added_seconds"] == pytest.approx(benchmarks.median_and_spread(own)), peer
    assert paired["attach"]["over_formula"][0] == pytest.approx((0.31 / 0.34 + 0.21 / 0.24) / 2)


def test_what_is_committed_is_what_was_measured() -> None:
    results = [report.load(file) for file in sorted(report.RESULTS.glob("*.json"))]
    assert not any("Fake" in result.machine["device"] for result in results), "kernels that do nothing take no time"
    for page, begin, part in report.PAGES:
        text = page.read_text()
        assert report.with_part(text, part(results), begin) == text, "run `python -m bench.measure.report`"
    for found in report.FIRST.glob("*.jsonl"):
        assert found.with_suffix(".md").read_text() == first.page(found)


COLLECT = """import sys, pytest; from tests import conftest; conftest.NEEDS.clear()  # no case is left out
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]))"""


@more
def test_all_files_with_tests_for_a_gpu_run_on_it() -> None:
    """Their text shows them, without the time that pytest takes to collect all tests on a GPU."""
    assert {*gpu_tests.TESTS} == {*re.findall(r"^tests/(.*\.py)::", python("-c", COLLECT).stdout, re.MULTILINE)}


@more
def test_the_notebook_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a copy, where a made-up shell writes a made-up result instead of bench/on_gpu.sh."""
    skip_without("nbclient")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "bench" / "on_gpu.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs before a commit"
    code[0].source = code[0].source.replace("torch.cuda.is_available()", "True")
    checkout, shell = tmp_path / "checkout", tmp_path / "bash"
    shutil.copytree(ROOT / "bench", checkout / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    for name in ("fastreg", "kernels"):
        (checkout / name).symlink_to(ROOT / name)
    found = findings(tmp_path / "made", on_gpu((128, 512, 1024)), smoke={"found": {"verdict": "right"}})
    found.with_suffix(".md").write_text(first.page(found))
    copy = f"mkdir -p {checkout}/bench/results && cp -r {found.parent} {checkout}/bench/results/first"
    shell.write_text(f'#!/bin/sh\necho "$@" in $LIMIT >> {tmp_path}/called\n{copy}\n')
    shell.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(checkout / "bench")}}).execute()
    outputs = "".join(str(output) for cell in code for output in cell.outputs)
    assert (tmp_path / "called").read_text() == "bench/on_gpu.sh first in 540\n"
    assert "self-test passed" in outputs
    assert "| (128, 512, 1024), float32 | 100% | 98% |" in outputs
    with zipfile.ZipFile(checkout / "bench" / "gpu-results.zip") as archive:
        assert archive.namelist() == sorted(found.with_suffix(x).name for x in (".jsonl", ".md"))
