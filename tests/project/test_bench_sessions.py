"""Sessions of `python -m pytest bench`: what crashes, hangs or is interrupted loses no other result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import more, python, skip_without

skip_without("matplotlib", "pytest_benchmark")

from bench.measure import lines, machine, timing, worker  # noqa: E402
from bench.measure.groups import CLOCK  # noqa: E402

pytestmark = pytest.mark.main
WHY = {
    "aborts": "the process ended with status -6",
    "hangs": "out of time after 20 s",
    "raises": "ValueError: no",
    "is too large": "does not fit in the device's memory",
    "aborts in a turn": "the process ended with status -6",
}


def bench(folder: Path, *options: str, fails: bool) -> str:
    """Run `python -m pytest bench` with cases that fail; return its output."""
    own = f"--lines={folder}/lines", f"--benchmark-json={folder}/json", "--limit=20", "--tb=short"
    command = "-m", "pytest", "bench", "-p", "tests.project.failing_cases", "-p", "no:cacheprovider"
    # With the variable of pytest-xdist, pytest-benchmark would measure nothing.
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTEST_XDIST_WORKER": "", "COLUMNS": "200"}
    return python(*command, *own, *options, fails=fails, **environment).stdout


def test_peers_that_fail_and_an_interrupt_lose_no_other_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes from a peer of the second group. The lines give the same JSON, even if one of them is cut off."""
    selected = "(2x5x8 and not interrupts) or (3x5x8 and interrupts)"
    output = bench(tmp_path, "-k", selected, fails=True)
    found = json.loads((tmp_path / "json").read_text())
    assert "KeyboardInterrupt" in output
    for peer, why in WHY.items():
        assert f"FAILED bench/test_cases.py::test_case[2x5x8-float32-forward+backward-{peer}] - {why}" in output
    assert {lost["name"]: lost["why"] for lost in found["missing"]} == WHY
    assert [row["name"] for row in found["benchmarks"]] == ["eager", "fastreg"]
    for row in found["benchmarks"]:
        assert (row["group"], row["options"]["timer"]) == ("2x5x8-float32-forward+backward", CLOCK.__name__)
        assert row["stats"]["rounds"] == timing.LEAST
        assert row["extra_info"]["held_bytes"] > 0
    _, *ended = lines.records(tmp_path / "lines")
    assert [line["task"].rpartition("-")[2] for line in ended] == ["eager", *WHY, "fastreg"]
    with (tmp_path / "lines").open("a") as cut:
        cut.write('{"part": "cut off", "sec\n')
    monkeypatch.setattr(sys, "argv", ["lines", f"{tmp_path}/lines", f"{tmp_path}/made"])
    lines.main()
    made = json.loads((tmp_path / "made").read_text())
    for key in ("machine_info", "benchmarks", "missing", "version"):
        assert made[key] == found[key], key
    assert made["commit_info"].items() <= found["commit_info"].items()


@more
def test_disabled_benchmarks_call_each_peer_once(tmp_path: Path) -> None:
    output = bench(tmp_path, "-k", "eager or fastreg or turn", "--benchmark-disable", fails=False)
    assert "= 6 passed" in output, "the fifth call of a peer aborts"
    assert [line["found"] for line in lines.records(tmp_path / "lines")[1:]] == [{}] * 6


def test_a_worker_that_cannot_begin_says_so_and_the_next_one_begins() -> None:
    own = worker.Worker(PYTHONHOME="/nowhere")
    with pytest.raises(worker.Lost, match="the process ended with status"):
        own.do(machine.facts, limit=1.0)
    own.environment.clear()
    with pytest.raises(worker.Lost, match="TypeError: "):
        own.do(machine.file_name, "too", "many", limit=60.0)
    own.stop()
