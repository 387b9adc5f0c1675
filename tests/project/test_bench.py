"""The benchmarks: timers against known work, peers against the reference, predictions, and the help of commands."""

from __future__ import annotations

import logging
import os
import re
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.conftest import gpu, python, skip_without

skip_without("matplotlib", "pytest_benchmark")

from bench.measure import benchmarks, cases, machine, nets, steps, timing  # noqa: E402
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


@pytest.mark.usefixtures("quick")
def test_peers_that_fail_lose_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = ValueError("broken\nindeed"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    case = cases.PenaltyCase((2, 3, 4), torch.float32)
    peers = case.peers() | {name: Mock(side_effect=x) for name, x in zip(("eager", "compiled"), errors, strict=True)}
    monkeypatch.setattr(cases.PenaltyCase, "peers", lambda case: peers)
    measured, missing = benchmarks.measure_peers(str, case, case.PEERS, False)
    assert [*measured] == ["fastreg"], "what was measured is kept"
    assert missing == {"eager": "ValueError: broken", "compiled": "does not fit in the device's memory"}


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
