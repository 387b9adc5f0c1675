"""The benchmarks: timers against known work, peers against the reference, and rendered pages against the JSON."""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import shutil
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests import fakegpu
from tests.conftest import ROOT, gpu, more, python, skip_without

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
    nets,
    report,
    steps,
    timing,
    worker,
)
from bench.measure.groups import CLOCK, Group  # noqa: E402
from bench.offline import prediction  # noqa: E402

pytestmark = pytest.mark.main


def sleeper(sleep: Callable[[Any], None], duration: float) -> cases.Call:
    """Return a call that sleeps and has no results."""
    return lambda _: (sleep(duration), ())[1]


def test_known_work_takes_its_time() -> None:
    (turns,) = timing.take_turns({"sleep": sleeper(time.sleep, 0.03)}, "cpu", 0.0, repeats=2).values()
    assert min(turn.wall for turn in turns) >= 0.03
    assert all(turn.own < turn.wall / 2 for turn in turns), "sleeping takes no time of the processor"


@gpu
def test_known_work_takes_its_time_on_a_gpu() -> None:
    long, call = (sleeper(torch.cuda._sleep, cycles) for cycles in (600_000, 200_000))
    turns = timing.take_turns({"long": long, "short": call}, "cuda", 0.5, repeats=10)
    short = statistics.median(turn.wall for turn in turns["short"])
    assert statistics.median(turn.wall for turn in turns["long"]) / short == pytest.approx(3, rel=0.1)
    assert timing.graph_seconds(call, range(4)) == pytest.approx(short, rel=0.1)
    assert timing.host_seconds(call) < short / 3, "the host does not wait"


def test_peers_take_turns_and_inputs_rotate() -> None:
    seen: list[tuple[str, int]] = []
    calls: dict[str, cases.Call] = {name: lambda i, name=name: (seen.append((name, i)), ())[1] for name in "abc"}
    turns = timing.take_turns(calls, "cpu", 0.0, repeats=1)
    assert [number for _, number in seen] == list(range(len(seen))), "each call takes the next inputs"
    rounds = "".join(name for name, _ in seen)[3 * timing.WARM_UP[1] :]
    assert rounds.startswith("abcbcacab")
    assert all(len(of_peer) * 3 == len(rounds) for of_peer in turns.values())


def test_peak_bytes(device: str) -> None:
    x = torch.randn(128, 128, device=device)
    # There are two temporaries at a time, and one of them together with the result.
    assert timing.peak_bytes(lambda _: (x.exp().add(1).exp(),), device) == pytest.approx(x.nbytes, abs=64)
    assert timing.peak_bytes(lambda _: (), "cpu") is None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure few rounds on the CPU, without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda way, **options: way)
    for name, value in {"DEVICE": "cpu", "STEP_SHARE": 0.0, "SECONDS": 0.0}.items():
        monkeypatch.setattr(benchmarks, name, value)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "case",
    [
        cases.PenaltyCase((3, 5, 8), torch.float32, cases.CHANGING, cases.TIME_FIRST),
        cases.PenaltyCase((3, 5, 8), torch.float32, same=True),
        cases.PenaltyCase((3, 5, 8), torch.float32, cases.FORWARD),
        cases.DropoutCase((3, 5, 8), torch.float32, layout=cases.TIME_FIRST),
        cases.PaddedCase((3, 5, 8), torch.float32),
        cases.ChangesCase((3, 5, 8), torch.float32, layout=cases.CONTIGUOUS),
        cases.ChangesCase((3, 5, 8), torch.float32),
    ],
    ids=str,
)
def test_the_calls_of_peers_give_the_same(case: Any) -> None:
    """All get one seed. Peers without a penalty or without lengths give something else."""
    sets = cases.input_sets(case, "cpu")
    assert len(sets) == cases.MOST_SETS, "small inputs: as many as are allowed"
    assert sets[0][0].is_contiguous() == (case.layout == cases.CONTIGUOUS or not isinstance(case, cases.ChangesCase))
    got = {}
    for name, peer in case.peers().items():
        call = case.call(peer, sets)
        call(0)
        torch.manual_seed(5)
        got[name] = call(1)
    one_tensor = case.kind == cases.FORWARD or case.same or isinstance(case, cases.ChangesCase)
    assert len(got["eager"]) == (1 if one_tensor else 2)
    for name in got:
        if name in ("dropout alone", "compiled dropout alone", "without lengths"):
            assert not torch.allclose(got[name][-1], got["eager"][-1])
        else:
            torch.testing.assert_close(got[name], got["eager"], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "step",
    [
        steps.MinGRUStep((2, 5, 4)),
        steps.CompiledStep((2, 5, 4)),
        steps.LSTMStep((3, 6, 4)),
        steps.AWDLSTMStep((3, 6, 4), words=9, hidden=5, layers=2),
        steps.MambaStep((2, 5, 8)),
        steps.LightningStep((3, 6, 4)),
    ],
    ids=str,
)
def test_a_step_is_the_same_with_each_way_of_adding_the_penalty(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one seed the losses and the weights of two steps agree, except for the step without the penalty."""
    # A measured training silences Lightning, whose messages other tests read.
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "setLevel", lambda _: None)
    for kind, package in {steps.MambaStep: "transformers", steps.LightningStep: "lightning"}.items():
        if isinstance(step, kind):
            skip_without(package)
    monkeypatch.setattr(torch, "compile", lambda way, **options: way)
    monkeypatch.setattr(steps, "P", 0.4)
    monkeypatch.setattr(nets, "LEARNING_RATE", 1.0)
    made, net = [], type(step).net
    monkeypatch.setattr(type(step), "net", lambda *options: made.append(net(*options)) or made[-1])
    torch.manual_seed(1)
    sets = [step.inputs("cpu")]
    weights, losses = {}, {}
    for name, way in step.peers().items():
        call = step.call(way, sets)
        torch.manual_seed(2)
        losses[name] = [call(i) for i in range(2)]
        weights[name] = torch.cat([x.detach().flatten() for x in made[-1].parameters()])
    assert tuple(weights) == step.PEERS
    without, want = weights.pop(steps.WITHOUT), weights["eager"]
    for name, got in weights.items():
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(losses[name], losses["eager"], rtol=1e-5, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(without, want, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_the_figures_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is measured on one thread.

    Between forward and backward, dropout holds its mask, the formula its changes, and `fused_ar_tar` both gradients.
    """
    threads, forward = [], nets.LSTM.forward
    monkeypatch.setattr(nets.LSTM, "forward", lambda *xs: threads.append(torch.get_num_threads()) or forward(*xs))
    before, one = torch.get_num_threads(), 3 * 5 * 8 * 4
    step, dropout = steps.LSTMStep((3, 6, 4)), cases.DropoutCase((3, 5, 8), torch.float32)
    of_step, of_dropout = (benchmarks.measure_peers(str, x, x.PEERS, False)[0] for x in (step, dropout))
    assert (tuple(of_step), tuple(of_dropout)) == (step.PEERS, dropout.PEERS)
    assert {*threads} == {1}
    assert torch.get_num_threads() == before
    for figures in of_step.values():
        assert (len(figures["seconds"]), figures["clock"]) == (timing.LEAST, "CPU time of one thread")
        assert figures["peak_bytes"] > 3 * 6 * 4 * 4
    for peer, figures in of_dropout.items():
        beside = {"eager": one * 4 // 5, "compiled": one * 4 // 5}.get(peer, 2 * one * ("fused_ar_tar" in peer))
        assert figures["held_bytes"] == pytest.approx(one // 5 + beside, abs=64), peer
        assert figures["least_bytes"] == 5 * one


LAUNCHES = {
    cases.PenaltyCase((64, 70, 400), torch.bfloat16): {"eager": 30, "compiled": 6, "fastreg": 2},
    cases.DropoutCase((64, 70, 400), torch.bfloat16): {"dropout alone": 4, "eager": 36, "compiled": 8, "fastreg": 4},
    cases.PaddedCase((64, 70, 400), torch.bfloat16): {"without lengths": 2, "eager": 44, "compiled": 10, "fastreg": 3},
}


@gpu
@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_launches(case: Any, device: str) -> None:
    torch.compiler.reset()  # otherwise Inductor compiles the second shape for all shapes
    sets, peers = cases.input_sets(case, device), case.peers()
    assert {peer: timing.launches(case.call(peers[peer], sets)) for peer in LAUNCHES[case]} == LAUNCHES[case]


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


@pytest.mark.usefixtures("quick")
def test_a_measurement_records_the_peers_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = ValueError("broken\nindeed"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    case = cases.PenaltyCase((2, 3, 4), torch.float32)
    peers = case.peers() | {name: Mock(side_effect=x) for name, x in zip(("eager", "compiled"), errors, strict=True)}
    monkeypatch.setattr(cases.PenaltyCase, "peers", lambda case: peers)
    measured, missing = benchmarks.measure_peers(str, case, case.PEERS, False)
    assert [*measured] == ["fastreg"], "what was measured is kept"
    assert missing == {"eager": "ValueError: broken", "compiled": "does not fit in the device's memory"}
    lost = [{"group": str(case), "name": x, "extra_info": case.info, "why": why} for x, why in missing.items()]
    result = result_of(tmp_path, rows_of(case, measured, None) + call(2.0, shape=(9, 9, 9)), missing=lost)
    told = report.caveats(result)
    assert "Not measured, eager: ValueError: broken: (2, 3, 4), float32, forward + backward.\n" in told
    assert "Not measured, compiled: does not fit in the device's memory: (2, 3, 4)" in told
    assert "(2, 3, 4)" not in report.call_table(result), "which compares all peers"


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
    skip_without("pygal")
    bench(tmp_path, "-k", "fastreg", "--benchmark-autosave")
    output, *_ = bench(tmp_path, "-k", "fastreg", "--benchmark-compare", f"--benchmark-histogram={tmp_path}/plot")
    assert len(re.findall(r"^fastreg \((?:NOW|0001_\w+)\) ", output, re.MULTILINE)) == 4
    assert len([*tmp_path.glob("plot*.svg")]) == 2
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


def test_a_step_in_autocast_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda way, **options: way)
    monkeypatch.setattr(nets, "LEARNING_RATE", 1.0)
    step, losses = steps.AutocastStep((3, 6, 4), words=9, hidden=5, layers=2), {}
    for name, way in step.peers().items():
        torch.manual_seed(1)
        call = step.call(way, [step.inputs("cpu")])
        torch.manual_seed(2)
        losses[name] = [call(i)[0].item() for i in range(3)]
    without = losses.pop(steps.WITHOUT)
    for name, got in losses.items():
        assert got == pytest.approx(losses["eager"], rel=2e-2), name
        assert got[0] > without[0], "with the penalty"
        assert got[2] != got[1] != got[0], "the weights change"


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


def test_an_allocator_keeps_memory_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is kept, a call gets no pages from the system; glibc by itself keeps blocks of up to 32 MB."""
    script = (
        "import torch; from bench.measure import timing; x = torch.zeros(2**24)\n"
        "print(timing.page_faults(lambda _: (x + 1,)))"
    )
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    faults = {}
    for allocator, own in machine.ALLOCATORS.items():
        done = python("-c", script, CUDA_VISIBLE_DEVICES="", **own)
        faults[allocator] = int(done.stdout)
    assert faults[machine.KEPT] < 2**26 // 4096 / 10 < faults[machine.DEFAULT]


def test_the_prediction_of_the_notes_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["prediction"])
    prediction.main()
    shares = [int(share) for share in re.findall(r" (\d+)%", capsys.readouterr().out)]
    assert len(shares) == 2 * len(cases.SHAPES) * len(prediction.COPY)
    assert all(0 < share <= 100 for share in shares)


COMMANDS = (
    *("bench.measure.report", "bench.measure.lines", "bench.measure.first", "bench.offline.prediction"),
    *("bench.offline.registers", "bench.study.two_rooms", "bench.study.run", "bench.study.demo", "tests.fakegpu"),
)


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_help_shows_help(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if module == "bench.offline.registers":
        skip_without("triton")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("usage: ")


def test_predicted_times_count_waves_latency_and_traffic() -> None:
    """One wave that a copy limits, one that latency limits, and several waves, whose last one may be short."""
    one = prediction.times((64, 70, 400), torch.float32, 3e12, prediction.Resident(5, 8))
    assert one.forward == pytest.approx(4.6e-6 + 4 * 64 * 70 * 400 * 4 / 3e12)
    late = prediction.times((1, 70, 400), torch.float32, 3e12, prediction.Resident(5, 8))
    assert late.again == pytest.approx(2.5e-6 + (20 / 4 + 1) * 0.75e-6), "runs of 20 steps, and one halo row"
    many = prediction.times((128, 512, 1024), torch.bfloat16, 3e12, prediction.Resident(4, 7))
    assert many.share == pytest.approx(prediction.share((128, 512, 1024), torch.bfloat16, 3e12), abs=0.02)
    slow = prediction.times((128, 512, 1024), torch.bfloat16, 3e13, prediction.Resident(1, 7))
    assert slow.forward == pytest.approx(4.6e-6 + 8 * (64 / 4 + 1) * 0.75e-6), "eight waves of 132 programs"
    assert (one.predicted, many.programs) == (2.5e-6, 1024)


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
