"""The benchmarks: timers against known work, peers against the reference, and rendered pages against the JSON."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
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

from tests.conftest import ROOT, gpu, more, python, skip_without

skip_without("matplotlib")

from bench.measure import (  # noqa: E402
    benchmarks,
    cases,
    first,
    gpu_tasks,
    host,
    machine,
    nets,
    report,
    run,
    steps,
    timing,
    worker,
)
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
    for name, call in cases.calls(case, sets, case.PEERS).items():
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
    (of_step, _), (of_dropout, _) = map(benchmarks.measure_peers, (step, dropout))
    assert (tuple(of_step), tuple(of_dropout)) == (step.PEERS, dropout.PEERS)
    assert {*threads} == {1}
    assert torch.get_num_threads() == before
    for figures in of_step.values():
        assert len(figures["seconds"]) == len(figures["own_seconds"]) == timing.LEAST
        assert figures["peak_bytes"] > 3 * 6 * 4 * 4
    for peer, figures in of_dropout.items():
        beside = {"eager": one * 4 // 5, "compiled": one * 4 // 5}.get(peer, 2 * one * ("fused_ar_tar" in peer))
        assert figures["held_bytes"] == pytest.approx(one // 5 + beside, abs=64), peer
        assert figures["least_bytes"] == 5 * one


ONES = dict.fromkeys(report.FIGURES, 1.0)  # before their units


LAUNCHES = {
    cases.PenaltyCase((64, 70, 400), torch.bfloat16): {"eager": 30, "compiled": 6, "fastreg": 2},
    cases.DropoutCase((64, 70, 400), torch.bfloat16): {"dropout alone": 4, "eager": 36, "compiled": 8, "fastreg": 4},
    cases.PaddedCase((64, 70, 400), torch.bfloat16): {"without lengths": 2, "eager": 44, "compiled": 10, "fastreg": 3},
}


@gpu
@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_launches(case: Any, device: str) -> None:
    calls = cases.calls(case, cases.input_sets(case, device), LAUNCHES[case])
    assert {peer: timing.launches(call) for peer, call in calls.items()} == LAUNCHES[case]


Recorded = list[tuple[tuple[Any, Any], dict[str, Any]]]  # cases with their allocators, and the records of a worker


def call(speed: float, allocator: Any = machine.KEPT, shape: Any = (2, 3, 4), **figures: Any) -> Recorded:
    """Record a call in which fastreg is so many times as fast as the eager formula, except in an odd round."""
    rounds = {"compiled": [0.5, 1.0, 0.5], "eager": [speed, 2 * speed, speed], "fastreg": [1.0, 2.0, 100.0]}
    peers = {peer: {"seconds": data} | figures for peer, data in rounds.items()}
    return [((cases.PenaltyCase(shape, torch.float32), allocator), {"peers": peers})]


def result_of(folder: Path, recorded: Recorded, device: str = "A CPU, 2 cores", **facts: Any) -> report.Result:
    """Write the result of a machine, and load it."""
    info = {"device": device, "torch": "1", "triton": "2", "python_version": "3", "threads": 2, "source": "s"}
    names = {str(number): case for number, (case, _) in enumerate(recorded)}
    found = [{"machine": info | facts}, *({"end": str(i)} | record for i, (_, record) in enumerate(recorded))]
    folder.mkdir(exist_ok=True)
    file = folder / machine.file_name(device)
    file.write_text(run.in_rows(run.summary(found, names)))
    return report.load(file)


@pytest.mark.usefixtures("quick")
def test_a_measurement_records_the_peers_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = ValueError("broken\nindeed"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    case = cases.PenaltyCase((2, 3, 4), torch.float32)
    peers = case.peers() | {name: Mock(side_effect=x) for name, x in zip(("eager", "compiled"), errors, strict=True)}
    monkeypatch.setattr(cases.PenaltyCase, "peers", lambda case: peers)
    measured, missing = benchmarks.measure_peers(case)
    assert [*measured] == ["fastreg"], "what was measured is kept"
    assert missing == {"eager": "ValueError: broken", "compiled": "does not fit in the device's memory"}
    record = {"peers": measured, "missing": missing}
    result = result_of(tmp_path, [((case, machine.KEPT), record), *call(2.0, shape=(9, 9, 9))])
    told = "lost (eager): ValueError: broken; lost (compiled): does not fit in the device's memory"
    assert f"| (2, 3, 4), float32 | {told} |" in report.call_table(result)
    assert "Not measured, lost (eager): ValueError: broken: (2, 3, 4), float32, " in report.caveats(result)
    page = report.full_table(result)
    for peer in ("fastreg", *told.split("; ")):
        assert f"| (2, 3, 4), float32 | forward + backward | {peer} |" in page


HANG = "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); ctypes.PyDLL(None).sleep(999)"
FAILURES = {
    "abort": ("os.abort()", "the process ended with status -6"),
    "hang": (HANG, "out of time after 20 s"),
    "raise": ("raise ValueError('no\\nsuch')", "ValueError: no"),
}


@pytest.mark.parametrize(("failure", "why"), FAILURES.values(), ids=FAILURES)
def test_a_lost_case_loses_no_other(failure: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of five cases aborts, or hangs in C, where no signal helps: a new worker measures the other cases."""
    five = [cases.PenaltyCase((batch, 5, 8), torch.float32) for batch in range(2, 7)]
    script = tmp_path / "worker_of_the_test.py"
    script.write_text(
        "import ctypes, os, signal, sys, torch\n"
        "from bench.measure import benchmarks, cases\n"
        "benchmarks.SECONDS, torch.compile = 0.0, lambda way: way\n"
        "five = [cases.PenaltyCase((batch, 5, 8), torch.float32) for batch in range(2, 7)]\n"
        "cases.all_cases = lambda device, allocator: five\n"
        "inputs = cases.PenaltyCase.inputs\n"
        "def failing(case, device):\n"
        f"    if case.shape[0] == 4: {failure}\n"
        "    return inputs(case, device)\n"
        "cases.PenaltyCase.inputs = failing\n"
        "benchmarks.main()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(run, "WORKER", [sys.executable, str(script)])
    monkeypatch.setattr(cases, "all_cases", lambda device, allocator: five)
    monkeypatch.setattr(machine, "ALLOCATORS", {machine.KEPT: machine.ALLOCATORS[machine.KEPT]})
    lines = tmp_path / "lines.jsonl"
    result = run.bench(lines, worker.Limits(math.inf, 20.0), [""])
    assert [case["info"]["shape"][0] for case in result["cases"]] == [2, 3, 4, 5, 6]
    lost = result["cases"][2]
    assert {why in reason for reason in lost["missing"].values()} == {True}
    assert ([*lost["missing"]], lost["peers"]) == ([*five[2].PEERS], {})
    for case in (*result["cases"][:2], *result["cases"][3:]):
        assert ([*case["peers"]], case.get("missing")) == ([*five[0].PEERS], None)
    file = tmp_path / "result.json"
    file.write_text(run.in_rows(result))
    assert f"| (4, 5, 8), float32 | lost (all): {why}" in report.call_table(report.load(file))


def test_a_record_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "lines"
    worker.append(file, begin="a")
    with file.open("a") as lines:
        lines.write('{"end": "a", "sec')
    worker.append(file, begin="b")
    assert worker.records(file) == [{"begin": "a"}, {"begin": "b"}]


def test_where_no_worker_starts_all_cases_are_lost(tmp_path: Path) -> None:
    began, file = time.monotonic(), tmp_path / "lines"
    worker.supervise(["false"], file, [*"abc"], worker.Limits(math.inf, 20.0))
    assert [record["lost"] for record in worker.records(file)] == ["no worker could begin a task"] * 3
    worker.supervise(["false"], file, ["d"], worker.Limits(began, 20.0))
    assert worker.records(file)[-1] == {"end": "d", "lost": "not reached"}


def test_a_report_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = result_of(tmp_path, call(4.0, None, shape=(64, 70, 400), **ONES), "A GPU", copy_bandwidth=3e12)
    result_of(tmp_path, call(8.0))
    assert "no outcome is recorded" in report.caveats(result)
    files = {"some": {"passed": 3, "skipped": 1, "failed": [*"abcdefg"]}}
    result.tests = {"source": "other", "files": files, "sanitizers": {"memcheck": "no verdict"}}
    outcome = "3 passed, 1 skipped, failed: a, b, c, d, e and 2 more, memcheck: no verdict."
    assert f"The tests on this device, of source other: {outcome}" in report.caveats(result)
    page = tmp_path / "performance.md"
    page.write_text(report.BEGIN + report.END)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGES", [(page, report.BEGIN, report.figures)])
    report.main()
    text = page.read_text()
    assert "not measured yet" not in text, "there is a CPU, which the page links"
    for told in ("(../bench/results/a-cpu-2-cores.md)", "a copy moves 3.00 TB/s", "| 0.5x | 4.0x | 100% | 1 |"):
        assert told in text


def findings(folder: Path, recorded: Recorded, **found: Any) -> Path:
    """Write a result of bench.measure.first on this device: headline cases, and `found` for each task of that kind."""
    lines = folder / f"{machine.file_name(machine.device_name())}l"
    facts = machine.facts() | {"copy_bandwidth": 3e12}
    worker.append(lines, machine=facts)
    for name, part in first.PARTS.items():
        for task in part.tasks if name in found else ():
            worker.append(lines, end=task, seconds=1.0, **found[name])
        worker.append(lines, part=name, seconds=10.0)
    names = {str(number): case for number, (case, _) in enumerate(recorded)}
    records = [{"end": str(number)} | record for number, (_, record) in enumerate(recorded)]
    lines.with_suffix(".json").write_text(run.in_rows(run.summary([{"machine": facts}, *records], names)))
    lines.with_suffix(".md").write_text(first.page(lines))
    return lines


def test_the_page_of_the_first_minutes_has_a_row_for_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {
        "smoke": {"errors": {"raw, 2.0": 3.0}, "noticed": True, "verdict": "wrong"},
        "order": {"lost": "the process ended with status -6"},
        "tests": {"passed": 3, "skipped": 0, "failed": [*"abcdefg"]},
    }
    large = call(4.0, None, (128, 512, 1024), **ONES)
    ((_, allocator), record), *_ = large
    large = [((cases.PenaltyCase((128, 512, 1024), torch.bfloat16), allocator), record)]
    lines = findings(tmp_path, large, **found)
    page = lines.with_suffix(".md").read_text()
    for name in ("smoke", "order", "sweep", "tests"):
        for task in first.PARTS[name].tasks:
            assert f"\n| {task.removeprefix(name + ' ')} | " in page, "what is lost or not reached has a row, too"
    for told in ("PROGRAMS=1024 | True | wrong | raw, 2.0: 3.00 |", "| the process ended with status -6 |"):
        assert told in page
    assert "| 3 | 0 | a, b, c, d, e and 2 more |" in page
    assert "| not reached |" in page, "the sweep"
    monkeypatch.setattr(report, "FIRST", tmp_path)
    (sentence,) = report.not_measured([result_of(tmp_path / "cpu", call(2.0))])
    assert "is 0.5 times as fast as the compiled formula and 4.0 times as fast as the eager one, " in sentence
    assert "reaches 100% of the bandwidth of a copy" in sentence


def test_the_parts_of_the_first_minutes_fit_and_have_names_that_workers_know() -> None:
    assert sum(part.seconds for part in first.PARTS.values()) < 540
    settings = [x for make in SETTINGS for x in make()]
    assert {gpu_tasks.Setting.of(str(setting)) for setting in settings} == {*settings}
    assert {x.short_run for x in gpu_tasks.smoke_settings()} == {16, 4}
    compiled = {x.dtype for x in gpu_tasks.compile_settings()}
    assert {x.dtype for x in settings} == compiled, "nothing else is compiled while something is measured"
    tests = [task.removeprefix("tests ") for task in first.PARTS["tests"].tasks]
    assert run.LARGE in tests


SETTINGS = gpu_tasks.smoke_settings, gpu_tasks.order_settings, gpu_tasks.sweep_settings


def test_an_interrupt_leaves_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def do(file: Path, tasks: list[str], limits: worker.Limits) -> None:
        worker.append(file, end=tasks[0], seconds=1.0, verdict="right")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(first.PARTS, "compile", first.Part(5, 5, first.PARTS["smoke"].tasks, do))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        first.main([str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, handler)
    (page,) = tmp_path.glob("*.md")
    assert "| right |" in page.read_text()


def test_workers_that_share_a_file_follow_only_their_own_tasks(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    progress = worker.Progress(file, ["a"])
    worker.append(file, begin="b")
    progress.update()
    assert (progress.current, progress.begun) == (None, False)
    worker.append(file, begin="a")
    progress.update()
    assert progress.current == "a"


def test_what_a_part_leaves_goes_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def do(file: Path, tasks: list[str], limits: worker.Limits) -> None:
        seen.append(limits.last - time.monotonic())

    parts = {name: first.Part(seconds, 1, [], do) for name, seconds in {"a": 100, "b": 50, "c": 500}.items()}
    monkeypatch.setattr(first, "PARTS", parts)
    file = tmp_path / "lines"
    first.measure(file, 300)
    assert seen == pytest.approx([100, 150, 300], abs=1)
    assert [record["part"] for record in worker.records(file) if "part" in record] == ["a", "b", "c"]


def test_a_step_in_autocast_scales_the_loss_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda way, **options: way)
    monkeypatch.setattr(nets, "LEARNING_RATE", 1.0)
    step = steps.AutocastStep((3, 6, 4), words=9, hidden=5, layers=2)
    scaled: list[float] = []
    scale = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda its, x: scaled.append(its.get_scale()) or scale(its, x))
    losses = {}
    for name, way in step.peers().items():
        torch.manual_seed(1)
        sets = [step.inputs("cpu")]
        call = step.call(way, sets)
        torch.manual_seed(2)
        losses[name] = [call(i)[0].item() for i in range(3)]
    assert min(scaled) > 1
    without = losses.pop(steps.WITHOUT)
    for name, got in losses.items():
        assert got == pytest.approx(losses["eager"], rel=2e-2), name
        assert got[0] > without[0], "with the penalty"
        assert got[2] != got[1] != got[0], "the weights change"


def test_a_report_of_a_cpu_leads_with_memory_kept_and_the_readme_with_the_default_allocator(tmp_path: Path) -> None:
    result = result_of(tmp_path, call(8.0, machine.DEFAULT) + call(4.0) + call(0.8, shape=(3, 3, 4)))
    speeds = "0.5 times as fast as the compiled formula and 1.8 times as fast as the eager one in float32"
    part = report.figures([result])
    assert f"A call of `fused_ar_tar` is {speeds} (geometric means).\n" in part
    assert "8.0" not in part
    speeds = "0.5 times (0.5 to 0.5) as fast as the compiled formula and 8.0 times as fast as the eager one"
    means = f"{speeds} (geometric means over 1 shapes and dtypes, with the default allocator"
    assert means in report.speed_of_calls([result])


def test_what_is_added_to_a_step_is_a_median_of_pairs(tmp_path: Path) -> None:
    """A busy round counts for both, and on a CPU the process's own time counts, not the clock's."""
    without = [0.1, 0.3, 0.2, 0.2, 0.2]
    added = {"no penalty": [0.0] * 5, "eager": [0.03, 0.04, 0.05, 0.04, 0.04], "compiled": [0.02] * 5}
    added |= {"hooks by hand": [0.02] * 5, "attach": [0.0, 0.01, 0.02, 0.03, 0.0]}
    peaks = dict.fromkeys(added, 10**8) | {"attach": 181 * 10**6}
    peers = {}
    for peer, times in added.items():
        own = [x + y for x, y in zip(without, times, strict=True)]
        peers[peer] = {"seconds": [9 * x for x in own], "own_seconds": own, "peak_bytes": peaks[peer]}
    recorded = [((steps.LSTMStep((4, 5, 6)), machine.KEPT), {"peers": peers})]
    result = result_of(tmp_path, recorded)
    errors = [0.93 * quartiles / 5**0.5 for quartiles in (10, 25)]  # of 35 to 45 and of 0 to 25
    row = f"+20.0±0.0 | +40.0±{errors[0]:.1f} | +20.0±0.0 | +10.0±{errors[1]:.1f} |"
    assert report.step_table(result).endswith(f"| LSTM, (4, 5, 6) | 200 | {row}\n")
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
    for result in results:
        table = report.RESULTS / f"{result.name}.md"
        assert table.read_text() == report.full_table(result), "run `python -m bench.measure.report`"
        picture = report.RESULTS / f"{result.name}-speedup.svg"
        assert f"JSON {result.digest}" in picture.read_text(), "run `python -m bench.measure.report`"
    for lines in report.FIRST.glob("*.jsonl"):
        assert lines.with_suffix(".md").read_text() == first.page(lines)


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
    assert {*run.TESTS} == {*collected}


def test_an_allocator_keeps_memory_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is kept, a call gets no pages from the system; glibc by itself keeps blocks of up to 32 MB."""
    script = (
        "import torch; from bench.measure import machine, timing; x = torch.zeros(2**24)\n"
        "print(machine.allocator(), timing.page_faults(lambda _: (x + 1,)))"
    )
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    faults = {}
    for allocator, own in machine.ALLOCATORS.items():
        done = python("-c", script, CUDA_VISIBLE_DEVICES="", **own)
        named, count = done.stdout.strip().rsplit(" ", 1)
        assert named == allocator
        faults[allocator] = int(count)
    assert faults[machine.KEPT] < 2**26 // 4096 / 10 < faults[machine.DEFAULT]


def test_the_commands_of_the_notes_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(host, "SECONDS", 0.0)
    monkeypatch.setattr(host, "CALLS", 2)
    host.main()
    prediction.main()
    output = capsys.readouterr().out
    assert all(f"| {name}: empty Function |" in output for name in host.CASES)
    shares = [int(share) for share in re.findall(r"(\d+)%", output)]
    assert len(shares) == 2 * len(cases.SHAPES) * (1 + len(prediction.COPY))
    assert all(0 < share <= 100 for share in shares)


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
    recorded = [x for shape in ((128, 512, 1024), (64, 70, 400)) for x in call(1.0, None, shape, **ONES)]
    lines = findings(made, recorded)
    shell.write_text(
        f'#!/bin/sh\necho "$@" with limit $LIMIT, bench.measure.first: >> {tmp_path}/called\n'
        f"mkdir -p {checkout}/bench/results/first && cp {made}/* {checkout}/bench/results/first\n"
    )
    shell.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(checkout / "bench")}}).execute()
    outputs = "".join(str(output) for cell in code for output in cell.outputs)
    assert (tmp_path / "called").read_text() == "bench/on_gpu.sh first with limit 540, bench.measure.first:\n"
    for text in (
        "self-test passed",
        "A copy moves 3.00 TB/s in this run",
        "| (128, 512, 1024), float32 | 100% | 98% |",
    ):
        assert text in outputs
    with zipfile.ZipFile(checkout / "bench" / "gpu-results.zip") as archive:
        assert archive.namelist() == sorted(lines.with_suffix(x).name for x in (".json", ".jsonl", ".md"))
