"""The benchmarks: timers against known work, peers against the formula, and sessions that lose no result."""

from __future__ import annotations

import json
import logging
import re
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, gpu, more, python, skip_without

skip_without("matplotlib", "pytest_benchmark")

from bench.measure import benchmarks, cases, lines, machine, nets, steps, timing, worker  # noqa: E402
from bench.measure.groups import CLOCK  # noqa: E402

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
    sets, got = cases.input_sets(case, "cpu"), {}
    for name, peer in case.peers().items():
        call = case.call(peer, sets)
        call(0)
        torch.manual_seed(5)
        got[name] = call(1)
    for name in got:
        if name in ("dropout alone", "compiled dropout alone", "without lengths"):
            assert not torch.allclose(got[name][-1], got["eager"][-1])
        else:
            torch.testing.assert_close(got[name], got["eager"], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "step",
    [
        *(steps.MinGRUStep((2, 5, 4)), steps.CompiledStep((2, 5, 4)), steps.LSTMStep((3, 6, 4))),
        *(kind((3, 6, 4), words=9, hidden=5, layers=2) for kind in (steps.AWDLSTMStep, steps.AutocastStep)),
        *(steps.MambaStep((2, 5, 8)), steps.LightningStep((3, 6, 4))),
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
    sets, weights, losses = [step.inputs("cpu")], {}, {}
    for name, way in step.peers().items():
        call = step.call(way, sets)
        torch.manual_seed(2)
        losses[name] = [call(i) for i in range(2)]
        weights[name] = torch.cat([x.detach().flatten() for x in made[-1].parameters()])
    assert tuple(weights) == step.PEERS
    without, want = weights.pop(steps.WITHOUT), weights["eager"]
    close = dict.fromkeys(("rtol", "atol"), 2e-2 if isinstance(step, steps.AutocastStep) else 1e-5)
    for name, got in weights.items():
        torch.testing.assert_close(got, want, **close, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(losses[name], losses["eager"], **close)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(without, want, **close)


@pytest.mark.usefixtures("quick")
def test_a_step_is_measured_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, forward = [], nets.LSTM.forward
    monkeypatch.setattr(nets.LSTM, "forward", lambda *xs: threads.append(torch.get_num_threads()) or forward(*xs))
    before, step = torch.get_num_threads(), steps.LSTMStep((3, 6, 4))
    measured, _ = benchmarks.measure_peers(str, step, step.PEERS, False)
    assert (tuple(measured), {*threads}, torch.get_num_threads()) == (step.PEERS, {1}, before)
    assert {figures["clock"] for figures in measured.values()} == {"CPU time of one thread"}
    assert min(figures["peak_bytes"] for figures in measured.values()) > 3 * 6 * 4 * 4


@pytest.mark.usefixtures("quick")
def test_the_memory_that_peers_hold() -> None:
    """From forward to backward dropout holds its mask, the formula its changes, and `fused_ar_tar` both gradients."""
    case, one = cases.DropoutCase((3, 5, 8), torch.float32), 3 * 5 * 8 * 4
    for peer, figures in benchmarks.measure_peers(str, case, case.PEERS, False)[0].items():
        beside = {"eager": one * 4 // 5, "compiled": one * 4 // 5}.get(peer, 2 * one * ("fused_ar_tar" in peer))
        assert figures["held_bytes"] == pytest.approx(one // 5 + beside, abs=64), peer


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


FILES = [*sorted(ROOT.glob("bench/*/*.py")), ROOT / "tests" / "fakegpu.py"]
MODULES = [name for file in FILES for name in re.findall(r'prog="([\w.]+)"', file.read_text())]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_help_shows_help(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "registers" in module:
        skip_without("triton")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("usage: ")


WHY = {
    "aborts": "the process ended with status -6",
    "hangs": "out of time after 8 s",
    "raises": "ValueError: no",
    "is too large": "does not fit in the device's memory",
    "aborts in a turn": "the process ended with status -6",
}


def bench(folder: Path, *options: str, fails: bool) -> str:
    """Run `python -m pytest bench` with cases that fail; return its output."""
    own = f"--lines={folder}/lines", f"--benchmark-json={folder}/json", "--limit=8", "--tb=short"
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
