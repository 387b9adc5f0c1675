"""Sessions of `python -m pytest bench`: what crashes, hangs or is interrupted loses no other result."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import more, python, skip_without

skip_without("matplotlib", "pytest_benchmark")

from bench.measure import lines, machine, timing, worker  # noqa: E402
from bench.measure.groups import CLOCK  # noqa: E402

pytestmark = pytest.mark.main


def bench(folder: Path, *options: str) -> tuple[str, Any, list[dict[str, Any]]]:
    """Run `python -m pytest bench` with cases that fail; return its output, its JSON and its lines."""
    own = f"--lines={folder}/lines", f"--benchmark-json={folder}/json", f"--benchmark-storage=file://{folder}/storage"
    command = "-m", "pytest", "bench", "-p", "tests.project.failing_cases", "-p", "no:cacheprovider", "--limit=8"
    fails = "--benchmark-disable" not in options and "fastreg" not in options
    # With the variable of pytest-xdist, pytest-benchmark would measure nothing.
    done = python(*command, *own, *options, fails=fails, CUDA_VISIBLE_DEVICES="", PYTEST_XDIST_WORKER="", COLUMNS="200")
    found = folder / "json"
    return done.stdout, json.loads(found.read_text()) if found.exists() else None, lines.records(folder / "lines")


WHY = {
    "aborts": "the process ended with status -6",
    "hangs": "out of time after 8 s",
    "raises": "ValueError: no",
    "aborts in a turn": "the process ended with status -6",
}


def test_peers_that_crash_hang_or_raise_lose_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a failed test with its reason, and the lines have all that the JSON has."""
    options = "--benchmark-only", "--benchmark-columns=median,rounds", "--benchmark-sort=name", "--tb=short"
    output, found, told = bench(tmp_path, "-k", "2x5x8 and not interrupts", *options)
    assert "= 4 failed, 2 passed, 8 deselected in" in output
    for peer, why in WHY.items():
        assert f"FAILED bench/test_cases.py::test_case[2x5x8-float32-forward+backward-{peer}] - {why}" in output
    assert re.findall(r"^(\w+) .*\(\d", output, re.MULTILINE) == ["eager", "fastreg"]
    assert "Name (time in us)" in output
    assert "Rounds" in output
    assert "StdDev" not in output, "not one of the columns"
    assert {lost["name"]: lost["why"] for lost in found["missing"]} == WHY
    for row in found["benchmarks"]:
        assert (row["group"], row["options"]["timer"]) == ("2x5x8-float32-forward+backward", CLOCK.__name__)
        assert row["stats"]["rounds"] == timing.LEAST
        assert row["extra_info"]["held_bytes"] > 0
    assert [row["extra_info"].get("against", 1.0) for row in found["benchmarks"]][1] == 1.0
    monkeypatch.setattr(sys, "argv", ["lines", f"{tmp_path}/lines", f"{tmp_path}/made"])
    lines.main()
    made = json.loads((tmp_path / "made").read_text())
    assert made | {"datetime": 0} == {key: found[key] for key in made} | {
        "datetime": 0,
        "commit_info": made["commit_info"],
    }
    assert {*made["commit_info"].items()} <= {*found["commit_info"].items()}
    assert len(told) == 1 + 6


def test_sigterm_writes_the_json(tmp_path: Path) -> None:
    """It comes from a peer of the second group; pytest ends at once, with what it has."""
    output, found, told = bench(tmp_path, "-k", "eager or fastreg or (3x5x8 and interrupts)")
    assert "KeyboardInterrupt" in output
    assert [(row["params"]["group"][:5], row["name"]) for row in found["benchmarks"]] == [
        ("2x5x8", "eager"),
        ("2x5x8", "fastreg"),
    ]
    assert [record.get("task") for record in told][1:] == [row["param"] for row in found["benchmarks"]]


@more
def test_two_sessions_are_compared_and_disabled_benchmarks_call_each_peer_once(tmp_path: Path) -> None:
    bench(tmp_path, "-k", "fastreg", "--benchmark-autosave")
    histogram = [f"--benchmark-histogram={tmp_path}/plot"] * bool(find_spec("pygal"))
    output, *_ = bench(tmp_path, "-k", "fastreg", "--benchmark-compare", *histogram)
    assert len(re.findall(r"^fastreg \((?:NOW|0001_\w+)\) ", output, re.MULTILINE)) == 4
    assert len([*tmp_path.glob("plot*.svg")]) == 2 * len(histogram)
    output, _, told = bench(tmp_path, "-k", "eager or fastreg or turn", "--benchmark-disable")
    assert "= 6 passed" in output, "the fourth call of a peer aborts"
    assert [record["found"] for record in told[1:]] == [{}] * 6


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "lines"
    lines.append(file, part="a")
    with file.open("a") as cut:
        cut.write('{"part": "b", "sec\n')
    lines.append(file, part="c")
    assert lines.records(file) == [{"part": "a"}, {"part": "c"}]


def test_a_worker_that_cannot_begin_says_so_and_the_next_one_begins() -> None:
    own = worker.Worker(PYTHONHOME="/nowhere")
    with pytest.raises(worker.Lost, match="the process ended with status"):
        own.do(machine.facts, limit=1.0)
    own.environment.clear()
    with pytest.raises(worker.Lost, match="TypeError: "):
        own.do(machine.file_name, "too", "many", limit=60.0)
    own.stop()
