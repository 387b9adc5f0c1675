"""The benchmarks: timers against known work, peers against the reference, and rendered tables against the JSON."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg

from bench import benchmarks, cases, compare, host, machine, report, run, steps, timing
from bench.formulas import awd_lstm_lm, fastai, rnn_dropout
from fastreg import fused_ar_tar
from fastreg.problem import Layer, Problem
from fastreg.reference import ar_tar
from tests.conftest import gpu

ROOT = Path(__file__).resolve().parent.parent
PIPES: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
CASE = cases.PenaltyCase((3, 5, 8), torch.float32)


@pytest.mark.parametrize(("formula", "batch_first"), [(fastai, True), (awd_lstm_lm, False)])
def test_the_formulas_are_the_penalty(formula: Callable[..., Tensor], batch_first: bool) -> None:
    raw, dropped = torch.randn(2, 4, 6, 5, dtype=torch.double)
    for alpha, beta in ((2.0, 1.0), (2.0, 0.0), (0.0, 1.0)):
        want = ar_tar(Layer(raw, dropped), Problem(alpha, beta, -2 if batch_first else 0)).penalty
        assert formula(raw, dropped, alpha, beta).item() == pytest.approx(want.item(), rel=1e-5)


def sleeper(sleep: Callable[[Any], None], duration: float) -> cases.Call:
    """Return a call that sleeps and has no results."""
    return lambda _: (sleep(duration), ())[1]


def test_known_work_takes_its_time() -> None:
    turns = timing.take_turns(
        {"long": sleeper(time.sleep, 0.03), "short": sleeper(time.sleep, 0.01)}, "cpu", 0.0, repeats=2
    )
    assert [len(rounds) for rounds in turns.values()] == [timing.LEAST] * 2
    assert 0.03 <= min(turn.wall for turn in turns["long"]) < 0.045
    assert 0.01 <= min(turn.wall for turn in turns["short"]) < 0.025
    assert max(turn.own for turn in turns["long"]) < 0.01, "sleeping takes no time of the processor"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_known_work_takes_its_time_on_a_gpu(device: str) -> None:
    long, call = (sleeper(torch.cuda._sleep, cycles) for cycles in (600_000, 200_000))
    turns = timing.take_turns({"long": long, "short": call}, device, 0.5, repeats=10)
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


def test_the_clock_replays_measured_times() -> None:
    clock = timing.Replay()
    clock.load([0.25, 0.5])
    readings = [clock.read(), *((clock.advance(), clock.read())[1] for _ in range(2))]
    assert readings == [0.0, 0.25, 0.75]


def test_kept_bytes() -> None:
    raw, dropped = (torch.randn(4, 6, 5, requires_grad=True) for _ in range(2))
    assert timing.kept_bytes(lambda _: (fused_ar_tar(raw, dropped, 2.0, 1.0),), (raw, dropped)) == 0
    assert timing.kept_bytes(lambda _: (raw.exp(),), (raw,)) == 0, "it is given anyway"
    assert timing.kept_bytes(lambda _: (raw.exp().sum(),), (raw,)) == raw.nbytes
    # the backward's results are not in the memory of tensors that were kept before
    sets = [(raw, dropped)]
    assert timing.kept_bytes(CASE.call(fastai, sets), (raw, dropped)) == 4 * 5 * 5 * 4, "the changes"


def test_peak_bytes() -> None:
    x = torch.randn(100, 10)
    # two temporaries at a time, and one of them with the result
    assert timing.peak_bytes(lambda _: (x.exp().add(1).exp(),), "cpu") == pytest.approx(x.nbytes, abs=64)
    assert timing.peak_bytes(lambda _: (), "cpu") is None


@pytest.mark.parametrize(
    ("kind", "options", "least", "moved"),
    [
        (cases.PenaltyCase, {}, 4, {"eager": None, "compiled": 6, "fastreg": 4}),
        (cases.PenaltyCase, {"changing": True}, 4, {"eager": None, "compiled": 6, "fastreg": 8}),
        (cases.PenaltyCase, {"backward": False}, 2, {"eager": None, "compiled": 2, "fastreg": 2}),
        (cases.PenaltyCase, {"same": True}, 2, {"eager": None, "compiled": 3, "fastreg": 2}),
        (cases.DropoutCase, {}, 5, {"eager": None, "dropout alone": 4, "fused_ar_tar": 14, "fastreg": 5}),
        (cases.PaddedCase, {}, 3, {"eager": None, "compiled": 6, "without lengths": 4, "fastreg": 3}),
    ],
)
def test_bytes_that_move(kind: Any, options: dict[str, Any], least: int, moved: dict[str, int | None]) -> None:
    one = 128 * 512 * 1024 * 2
    case = kind((128, 512, 1024), torch.bfloat16, **options)
    assert case.least_bytes == least * one
    assert {peer: case.bytes_moved(peer) for peer in moved} == {k: v and v * one for k, v in moved.items()}


def test_upstream_gradients_that_change() -> None:
    case = cases.PenaltyCase((3, 5, 8), torch.float32, changing=True)
    sets = [case.inputs("cpu")]
    call = case.call(case.fused, sets)
    one, two, again = (call(0) for _ in range(3))
    torch.testing.assert_close(two, tuple(2 * x for x in one))
    assert all(torch.equal(x, y) for x, y in zip(one, again, strict=True))


def test_a_gpu_runs_the_cases_of_a_cpu_in_the_order_of_their_use() -> None:
    everything, on_cpu = cases.all_cases("cuda"), cases.all_cases("cpu")
    assert len({str(case) for case in everything}) == len(everything)
    assert {case for case in on_cpu if not isinstance(case, steps.Step)} < {*everything}
    kinds = product((cases.PenaltyCase, cases.DropoutCase), ((64, 70, 400), (128, 512, 1024)))
    assert {(type(case), case.shape) for case in everything[:8]} == {*kinds}
    assert {type(case) for case in everything[8:17]} == {type(x) for x in on_cpu if isinstance(x, steps.Step)}
    penalty = [x for x in everything if isinstance(x, cases.PenaltyCase) and not x.same and x.shape in cases.SHAPES]
    assert len({(c.shape, c.dtype, c.batch_first, c.backward) for c in penalty}) == len(cases.SHAPES) * 3 * 2 * 2
    by_default = [x for x in cases.all_cases("cpu", machine.DEFAULT) if isinstance(x, steps.Step)]
    assert by_default == [steps.MinGRUStep((4, 256, 256)), steps.TanhStep((4, 256, 256))]


@pytest.mark.parametrize(
    ("case", "shape", "results"),
    [
        *(
            (cases.PenaltyCase((3, 5, 8), torch.float32, batch_first=False, same=same, backward=backward), (5, 3, 8), n)
            for same, backward, n in [(True, True, 1), (True, False, 1), (False, True, 2), (False, False, 1)]
        ),
        (cases.ChangesCase((3, 5, 8), torch.float32, contiguous=True), (3, 8, 5, 1, 1), 1),
        (cases.ChangesCase((3, 5, 8), torch.float32, contiguous=False), (3, 8, 5, 1, 1), 1),
    ],
    ids=str,
)
def test_the_calls_of_peers_give_the_same(case: Any, shape: tuple[int, ...], results: int) -> None:
    sets = cases.input_sets(case, "cpu")
    assert len(sets) == cases.MOST_SETS, "small inputs: as many as are allowed"
    assert sets[0][0].shape == shape
    assert sets[0][0].is_contiguous() == getattr(case, "contiguous", True)
    want, got = (case.call(peer, sets)(1) for name, peer in case.peers().items() if name != "compiled")
    assert len(got) == results
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_peers_are_the_same(batch_first: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one seed: compiled, too, where the compiler leaves the drawing to torch."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case = cases.DropoutCase((3, 5, 8), dtype, batch_first)
    sets = cases.input_sets(case, "cpu")
    raw, slope = sets[1]
    exact = raw.detach().double().requires_grad_()
    torch.manual_seed(5)
    dropped = exact * rnn_dropout(torch.ones_like(raw), cases.P, batch_first).double()
    penalty = ar_tar(Layer(exact, dropped), Problem(cases.ALPHA, cases.BETA, -2 if batch_first else 0)).penalty
    eps = torch.finfo(dtype).eps
    for name, call in cases.calls(case, sets).items():
        torch.manual_seed(5)
        results = call(1)
        torch.manual_seed(5)
        _, *penalties = case.peers()[name](raw)
        assert len(penalties) == (0 if name.endswith("dropout alone") else 1)
        loss = (dropped * slope).sum() + penalty * len(penalties)
        want = [dropped, *torch.autograd.grad(loss, exact, retain_graph=True), *[penalty] * len(penalties)]
        tolerance: Any = {"rtol": 4 * eps, "atol": eps, "check_dtype": False}
        torch.testing.assert_close([*results, *penalties], want, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_padded_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half is padding, and peers with lengths leave it out."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case = cases.PaddedCase((5, 8, 6), torch.float32)
    sets = cases.input_sets(case, "cpu")
    raw, dropped, lengths = sets[1]
    assert lengths.sum() * 2 == 5 * 8
    there = [(r[:n], d[:n]) for r, d, n in zip(raw, dropped, lengths.tolist(), strict=True)]
    squares, pairs = torch.cat([d for _, d in there]).square(), torch.cat([r.diff(dim=0) for r, _ in there]).square()
    want = torch.autograd.grad(cases.ALPHA * squares.mean() + cases.BETA * pairs.mean(), (raw, dropped))
    calls = cases.calls(case, sets)
    for peer in ("eager", "compiled", "fastreg"):
        torch.testing.assert_close(calls[peer](1), want)
    assert calls["without lengths"](1)[0].count_nonzero() > want[0].count_nonzero()
    assert case.PEERS[-1] == "fastreg", "a result that has fastreg is complete"


STEPS = (
    steps.MinGRUStep((2, 5, 4)),
    steps.LSTMStep((3, 6, 4)),
    steps.AWDLSTMStep((3, 6, 4), words=9, hidden=5, layers=2),
    steps.MambaStep((2, 5, 8)),
    steps.LightningStep((3, 6, 4)),
)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.MODEL)
def test_a_step_is_the_same_with_each_way_of_adding_the_penalty(
    step: steps.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one seed: the losses of two steps, or the weights after them, but for the step without penalty."""
    if isinstance(step, steps.MambaStep):
        pytest.importorskip("transformers", reason="transformers is not installed")
    if isinstance(step, steps.LightningStep):
        pytest.importorskip("lightning", reason="Lightning is not installed")
    monkeypatch.setattr(torch, "compile", lambda way, **options: way)
    monkeypatch.setattr(steps, "P", 0.4)
    monkeypatch.setattr(steps, "LEARNING_RATE", 1.0)
    nets, net = [], type(step).net
    monkeypatch.setattr(type(step), "net", lambda *options: nets.append(net(*options)) or nets[-1])
    torch.manual_seed(1)
    sets = [step.inputs("cpu")]
    weights, losses = {}, {}
    for name, way in step.peers().items():
        call = step.call(way, sets)
        torch.manual_seed(2)
        losses[name] = [call(i) for i in range(2)]
        weights[name] = torch.cat([x.detach().flatten() for x in nets[-1].parameters()])
    assert tuple(weights) == step.PEERS
    without, want = weights.pop(steps.WITHOUT), weights["eager"]
    for name, got in weights.items():
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(losses[name], losses["eager"], rtol=1e-5, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(without, want, rtol=1e-3, atol=1e-5)


def test_an_error_of_a_training_in_turns_is_that_of_the_call() -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    step = steps.LightningStep((3, 6, 4))
    broken = (torch.tensor([[99, 99]]),)  # no such word
    call = step.call(step.peers()[steps.WITHOUT], [step.inputs("cpu"), broken])
    call(0)
    with pytest.raises(IndexError):
        call(1)


@pytest.fixture
def measured_small(monkeypatch: pytest.MonkeyPatch) -> Callable[[cases.AnyCase], benchmarks.Measured]:
    """Measure every peer of a small case on the CPU, without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda way, **options: way)
    monkeypatch.setattr(benchmarks, "DEVICE", "cpu")
    monkeypatch.setattr(benchmarks, "STEP_SHARE", 0.0)
    monkeypatch.setattr(benchmarks, "SECONDS", 0.0)

    def measure(case: cases.AnyCase) -> benchmarks.Measured:
        measured, failed = benchmarks.measure_peers(case)
        assert not failed
        assert tuple(measured) == case.PEERS
        assert all(len(times) == timing.LEAST for times, _ in measured.values())
        return measured

    return measure


def test_a_step_is_measured_on_one_thread(measured_small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rounds of the process's own time, and the peak memory."""
    threads, forward = [], steps.LSTM.forward
    monkeypatch.setattr(
        steps.LSTM, "forward", lambda *options: threads.append(torch.get_num_threads()) or forward(*options)
    )
    before = torch.get_num_threads()
    measured = measured_small(steps.LSTMStep((3, 6, 4)))
    assert set(threads) == {1}
    assert torch.get_num_threads() == before
    for times, figures in measured.values():
        assert len(times) == len(figures["own_seconds"])
        assert figures["peak_bytes"] > 3 * 6 * 4 * 4


def test_dropout_keeps_nothing_but_its_mask_and_the_formula_the_changes(measured_small: Any) -> None:
    case = cases.DropoutCase((3, 5, 8), torch.float32)
    assert case.PEERS[-1] == "fastreg", "a result that has fastreg is complete"
    one, mask, changes = 3 * 5 * 8 * 4, 3 * 8 * 4, 3 * 4 * 8 * 4
    for peer, (_, figures) in measured_small(case).items():
        kept = mask + (changes if peer in ("eager", "compiled") else 0)
        moved = case.bytes_moved(peer)
        known = {} if moved is None else {"moved_bytes": moved}
        assert figures.pop("first_seconds") > 0
        assert figures.pop("page_faults") >= 0
        assert figures == {"kept_bytes": kept, "least_bytes": 5 * one, **known}, peer


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the timers' `torch.cuda` by a device that is busy until some time, by a clock of its own.

    The host launches a graph in 3 ms, and its replay takes 6 more; a graph has 2 nodes, and a call holds 3000 bytes.
    """
    now = busy_until = 0.0

    def read() -> float:
        nonlocal now
        now += 1e-6
        return now

    def synchronize() -> None:
        nonlocal now
        now = max(busy_until, now)

    def work(seconds: float) -> None:
        nonlocal busy_until
        busy_until = max(busy_until, now) + seconds

    def replay() -> None:
        nonlocal now
        now += 0.003
        work(0.006)

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            work(0)
            self.at = busy_until

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.at - self.at)

    def get_nodes(graph: Any, nodes: Any, count: Any) -> int:
        count._obj.value = 2
        return 0

    cuda = mock.MagicMock(synchronize=synchronize, Event=Event)  # streams and captures do nothing
    cuda._sleep = lambda cycles: work(cycles / timing.CLOCK)
    cuda.CUDAGraph.return_value = mock.Mock(replay=replay, raw_cuda_graph=lambda: 0)
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 200, 3200
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=read, process_time=read))
    monkeypatch.setattr(timing.ctypes, "CDLL", lambda _: SimpleNamespace(cudaGraphGetNodes=get_nodes))


@pytest.mark.usefixtures("pretend_gpu")
def test_figures_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "copy_bandwidth", lambda: 1e6)
    call = CASE.call(fastai, cases.input_sets(CASE, "cpu"))
    figures = benchmarks.gpu_figures(call, CASE.bytes_moved("compiled"), 3)
    assert figures.pop("host_seconds") > 0
    bandwidth = 6 * 480 / 0.002
    assert figures == pytest.approx(
        {"graph_warm_seconds": 0.002, "graph_rotated_seconds": 0.002, "launches": 2, "peak_bytes": 3000 - 2 * 480}
        | {"bandwidth": bandwidth, "share_of_copy": bandwidth / 1e6}
    )
    more = {"host_seconds", "kept_bytes", "least_bytes", "moved_bytes", "first_seconds", "page_faults"}
    assert set(report.FIGURES) == {*figures, *more}
    assert {"bandwidth", "share_of_copy"} & {*benchmarks.gpu_figures(call, None, 3)} == set()
    turns = timing.take_turns({"eager": call}, "cuda", 0.0, repeats=1)
    assert len(turns["eager"]) == timing.LEAST
    monkeypatch.setattr(timing, "capture", mock.Mock(side_effect=RuntimeError("no capture\nhere")))
    figures = benchmarks.gpu_figures(lambda _: (), 1, 3)
    assert set(figures) == {"host_seconds", "peak_bytes", "no_graph"}
    assert figures["no_graph"] == "RuntimeError: no capture"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_failed_capture_leaves_no_stream_behind(device: str) -> None:
    x = torch.ones(3, device=device)

    def call(_: int) -> tuple[Tensor, ...]:
        torch.cuda.default_stream().wait_stream(torch.cuda.current_stream())  # which no capture allows
        return (x + 1,)

    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        timing.capture(call, [0])
    assert torch.cuda.current_stream() == before
    assert timing.launches(lambda _: (x + 1,)) == 1


LAUNCHES = {
    cases.PenaltyCase((64, 70, 400), torch.bfloat16): {"eager": 30, "compiled": 6, "fastreg": 2},
    cases.PenaltyCase((64, 70, 400), torch.float32, backward=False): {"fastreg": 1},
    cases.DropoutCase((64, 70, 400), torch.bfloat16): {"dropout alone": 4, "eager": 36, "compiled": 8, "fastreg": 4},
    cases.PaddedCase((64, 70, 400), torch.bfloat16): {"without lengths": 2, "eager": 44, "compiled": 10, "fastreg": 2},
}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_launches(case: Any, device: str) -> None:
    """Count no more of fastreg in deterministic mode, in which PyTorch fills memory."""
    calls, want = cases.calls(case, cases.input_sets(case, device)), LAUNCHES[case]
    assert {peer: timing.launches(calls[peer]) for peer in want} == want
    torch.use_deterministic_algorithms(True)
    try:
        filled = 1 if isinstance(case, cases.DropoutCase) else 0  # the mask, which PyTorch allocates
        assert timing.launches(calls["fastreg"]) <= want["fastreg"] + filled
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize(("batch", "more"), [(64, 0), (128, 1)])
def test_valid_steps_take_one_launch_more_beyond_8192(batch: int, more: int, device: str) -> None:
    raw, dropped = (torch.zeros(batch, 70, 400, device=device, requires_grad=True) for _ in range(2))
    valid, one = torch.ones(batch, 70, dtype=torch.bool, device=device), torch.ones((), device=device)

    def call(_: int, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(fused_ar_tar(raw, dropped, 2.0, 1.0, **options), (raw, dropped), one)

    assert timing.launches(call) == 2
    assert timing.launches(functools.partial(call, valid=valid)) == 2 + more


MadeUp = tuple[str, tuple[int, ...], dict[str, float]]  # of a case: the pass, the shape, and the seconds of each peer


def penalties(*speeds: float) -> list[MadeUp]:
    """Cases in which fastreg is so many times as fast as the eager formula."""
    peers = {"compiled": 0.5, "fastreg": 1.0}
    return [(report.BOTH, (number, 2, 3), {"eager": speed} | peers) for number, speed in enumerate(speeds)]


DROPOUT_SECONDS = {"dropout alone": 0.8, "eager": 4.0, "compiled": 0.5, "fastreg": 1.0}
DROPOUT: MadeUp = report.DROPOUT, (64, 70, 400), dict.fromkeys(cases.DropoutCase.PEERS, 2.0) | DROPOUT_SECONDS
PADDED_SECONDS = {"without lengths": 3.0, "eager": 4.0, "compiled": 0.5, "fastreg": 1.0}
PADDED: MadeUp = report.PADDED, (64, 70, 400), PADDED_SECONDS
STEP: MadeUp = report.STEP, (4, 5, 6), dict.fromkeys(steps.Step.PEERS, 3.0) | {"no penalty": 2.0, "compiled": 2.5}
GPU = {"copy_bandwidth": 3e12}


def made_up(
    folder: Path, made: list[MadeUp] | dict[str, list[MadeUp]], device: str = "A CPU, 2 cores", **more: Any
) -> Path:
    """Write a result, with memory kept, or of each allocator. One round is odd; all figures of a GPU are 1."""
    benchmarks = []
    for allocator, those in (made if isinstance(made, dict) else {machine.KEPT: made}).items():
        for number, (kind, shape, seconds) in enumerate(those):
            info = {"pass": kind, "shape": shape, "dtype": "float32", "layout": "batch first", "model": "GRU"}
            info |= dict.fromkeys(report.FIGURES, 1.0) if more else {}
            info["allocator"] = None if more else allocator
            group = f"case {number}" + f" ({allocator})" * (allocator != machine.KEPT)
            for peer, x in seconds.items():
                own = {"peer": peer, "own_seconds": [x / 10, x / 10 + 0.02], "peak_bytes": x * 1e6}
                stats = {"data": [x, 2 * x, 100.0 if peer == "fastreg" else x]}
                benchmarks.append({"group": group, "extra_info": info | own, "stats": stats})
    info = {"device": device, "torch": "1", "triton": "2", "python_version": "3", "threads": 2, "source": "s"} | more
    result = {"benchmarks": benchmarks, "machine_info": info, "commit_info": {"id": "0123456789abcdef", "dirty": False}}
    folder.mkdir(exist_ok=True)
    file = folder / machine.file_name(device)
    file.write_text(json.dumps(result))
    return file


@pytest.mark.parametrize(
    ("new", "status", "message"),
    [
        (penalties(4.0, 2.0), 0, "2 cases compared, 0 not committed"),
        (penalties(3.41, 1.71), 0, "no case is slower"),
        (penalties(3.39, 2.0), 1, "case 0: 3.39x the eager formula's speed, 4.00x committed"),
        (penalties(9.0, 1.6), 1, "case 1: 1.60x the eager formula's speed, 2.00x committed"),
        (penalties(5.0), 0, "1 cases compared, 0 not committed"),
        ([*penalties(4.0, 2.0), DROPOUT], 0, "2 cases compared, 1 not committed"),
    ],
)
def test_the_guard_fails_on_a_loss_of_speed(
    new: list[MadeUp], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(tmp_path / "old", penalties(4.0, 2.0))
    made_up(tmp_path / "new", new)
    assert compare.main(tmp_path / "new", tmp_path / "old") == status
    assert message in capsys.readouterr().out
    assert compare.main(tmp_path / "new", tmp_path) == 1
    assert "nothing to compare with" in capsys.readouterr().out


def test_a_report_of_a_cpu_leads_with_memory_kept(tmp_path: Path) -> None:
    """Whichever was measured first. The README shows it alone."""
    made = {machine.DEFAULT: penalties(8.0), machine.KEPT: [*penalties(4.0, 0.8), DROPOUT, PADDED, STEP]}
    result = report.load(made_up(tmp_path, made))
    assert [part.allocator for part in result.parts()] == [machine.KEPT, machine.DEFAULT]
    first, second = report.figures([result]).split(report.HOW[machine.DEFAULT])
    for text in (
        "A CPU, 2 cores: PyTorch 1, Python 3, 2 threads, commit 0123456789, source s.",
        "MALLOC_TRIM_THRESHOLD_=4073741824 MALLOC_MMAP_THRESHOLD_=1073741824",
        "| (0, 2, 3), float32 | 500 | 4000 | 2000 | 0.5x | 4.0x |",
        "in 2 cases: 0.5x to 0.5x as fast as the formula under `torch.compile` (geometric mean 0.5x, slower in 2), ",
        " 0.8x to 4.0x as fast as the eager formula (geometric mean 1.8x, slower in 1).",
        "| (64, 70, 400), float32 | 800 | 4000 | 2000 | 2000 | 1.25x | 0.5x | 4.0x |",
        "in 1 cases: 1.25x to 1.25x the time of dropout alone, 4.0x to 4.0x as fast as dropout and the",
        "| (64, 70, 400), float32 | 3000 | 500 | 4000 | 2000 | 3.0x | 0.5x | 4.0x |",
        step := "| GRU, (4, 5, 6) | 210 | +50.0±0.0 | +100.0±0.0 | +100.0±0.0 |",
        "| GRU, (4, 5, 6) | 2 | +25.0% | +50.0% | +50.0% | +50.0% | +50.0% |",
    ):
        assert text in first
    assert "| 0.5x | 8.0x |" in second
    assert "Dropout" not in second
    assert "padding" not in second
    assert "](../bench/results/a-cpu-2-cores-dropout.svg)" in second
    assert "On a GPU: **not measured yet**" in second
    assert "The tests on this device" not in first + second, "they are those of make test"
    first, second = report.full_table(result).split(report.HOW[machine.DEFAULT])
    assert " 4.00x " in first
    assert " 8.00x " in second
    part = report.headline([result])
    assert part.startswith("A CPU, 2 cores, freed memory kept for the next call by `MALLOC_TRIM")
    assert part.index(step) < part.index("The penalty in float32, forward + backward, in 2 cases: ")
    assert "8.0x" not in part


def test_a_report_tells_what_became_of_the_tests(tmp_path: Path) -> None:
    file = made_up(tmp_path, penalties(4.0), "A GPU", **GPU)
    assert "no outcome is recorded" in report.caveats(report.load(file))
    failed = [f"test_{number}" for number in range(7)]
    files = {"some": {"passed": 3, "skipped": 1, "failed": failed}, "others": {"passed": 4, "skipped": 0, "failed": []}}
    tests = {"source": "other", "commit": "", "files": files, "sanitizers": {"memcheck": "no verdict"}}
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / file.name).write_text(json.dumps(tests))
    those = "test_0, test_1, test_2, test_3, test_4 and 2 more"
    outcome = f"7 passed, 1 skipped, failed: {those}, memcheck: no verdict."
    assert f"The tests on this device, of source other: {outcome}" in report.caveats(report.load(file))


def test_a_report_of_what_little_there_is(tmp_path: Path) -> None:
    """No case of the penalty, peers that no graph could be made of, and no version."""
    result = report.load(made_up(tmp_path, [DROPOUT], "A GPU", **GPU))
    for info in result.cases[0].info.values():
        for figure in ("bandwidth", "share_of_copy", "launches", "graph_warm_seconds", "graph_rotated_seconds"):
            del info[figure]
    result.commit["id"] = "unversioned"
    assert "commit unknown, source s" in report.figures([result])
    assert "(64, 70, 400), float32" in report.full_table(result)
    assert [kind for kind, *_ in report.plots(result)] == ["dropout"]
    penalty = report.load(made_up(tmp_path, penalties(4.0), "A GPU", **GPU))
    del penalty.cases[0].info["fastreg"]["bandwidth"]
    assert [kind for kind, *_ in report.plots(penalty)] == ["speedup", "roofline"]
    assert all(plot(penalty).axes for _, _, plot in report.plots(penalty))


def test_a_report_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(tmp_path, [*penalties(4.0), DROPOUT], "A GPU", **GPU)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    readme, performance = tmp_path / "README.md", tmp_path / "performance.md"
    monkeypatch.setattr(report, "PAGES", {readme: report.headline, performance: report.figures})
    for page in (readme, performance):
        page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    report.main()
    for text in (readme.read_text(), performance.read_text()):
        assert re.fullmatch(r"before\n.*after\n", text, re.DOTALL)
        assert "old" not in text
        assert "as fast as the eager formula" in text
        assert "On a CPU: **not measured yet**" in text
        assert "MALLOC" not in text
    assert "a copy moves 3.00 TB/s" in performance.read_text()
    assert "| 0.5x | 4.0x | 100% | 1.0 |" in performance.read_text()
    assert "| 1.25x | 0.5x | 4.0x | 100% | 1.0 |" in performance.read_text()
    assert {file.name for file in tmp_path.iterdir()} == {
        *("README.md", "performance.md", "a-gpu.json", "a-gpu.md"),
        *("a-gpu-speedup.svg", "a-gpu-dropout.svg", "a-gpu-roofline.svg"),
    }


@pytest.mark.parametrize(("allocator", "scale"), [(machine.KEPT, 1), (None, 9)], ids=["cpu", "gpu"])
def test_what_is_added_to_a_step_is_a_mean_of_pairs(allocator: str | None, scale: int) -> None:
    """A busy round counts for both; on a CPU the process's own time counts, on a GPU that of the clock."""
    own = {"no penalty": [0.1, 0.2], "eager": [0.13, 0.25], "compiled": [0.12, 0.22], "attach": [0.11, 0.21]}
    common = {"pass": report.STEP, "model": "GRU", "shape": [4, 5, 6], "allocator": allocator}
    wall = {peer: [9.0 * x for x in rounds] for peer, rounds in own.items()}
    case = report.Case("step", wall, {peer: common | {"own_seconds": rounds} for peer, rounds in own.items()})
    result = report.Result("", "", {}, {}, [case], {}, None)
    row = f"| {150 * scale} | +{20 * scale}.0±0.0 | +{40 * scale}.0±{10 * scale}.0 |  | +{10 * scale}.0±0.0 |  |"
    assert report.step_table(result).endswith(f"| GRU, (4, 5, 6) {row}\n")
    assert report.added_table(result).endswith("| GRU, (4, 5, 6) |  | 0.50x; 0.25x |  | 0.843x |\n")
    assert report.peak_table(result).count("\n") == 2, "nothing is known of it"
    assert {*report.STEP_PEERS} == {*steps.Step.PEERS}


def test_the_readme_says_first_that_no_gpu_has_run_it_until_one_has() -> None:
    results = [report.load(file) for file in report.RESULTS.glob("*.json")]
    _, first, second, *_ = (ROOT / "README.md").read_text().split("\n\n")
    assert first.startswith("Activation regularization (AR) and")
    assert second.startswith("No GPU has run it yet") == (not any(result.on_gpu for result in results))


@pytest.mark.parametrize("shapes", [1, 16])
@pytest.mark.parametrize("kind", ["speedup", "dropout"])
def test_a_plot_has_a_title_a_log_axis_and_labels_within_its_frame(kind: str, shapes: int, tmp_path: Path) -> None:
    speeds = [4.0 * number for number in range(1, shapes + 1)]
    result = report.load(made_up(tmp_path, [*penalties(*speeds), *[DROPOUT] * shapes]))
    (plot,) = [plot for name, _, plot in report.plots(result) if name == kind]
    figure = plot(result)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert figure.get_suptitle()
    assert axes.get_ylabel() == "(batch, time, hidden), dtype"
    frame = axes.get_window_extent()
    labels = [text.get_window_extent() for text in axes.texts]
    assert len(labels) == shapes * (2 if kind == "speedup" else 3)
    assert all(frame.x0 <= label.x0 and label.x1 <= frame.x1 for label in labels)
    assert len([text for text in axes.get_xticklabels() if text.get_text() and text.get_visible()]) >= 2


def test_what_is_committed_is_what_was_measured() -> None:
    results = [report.load(file) for file in sorted(report.RESULTS.glob("*.json"))]
    assert not any("Fake" in result.machine["device"] for result in results), "kernels that do nothing take no time"
    for page, part in report.PAGES.items():
        text = page.read_text()
        assert report.with_part(text, part(results)) == text, "run `python -m bench.report`"
    rendered = {f"{result.name}.json" for result in results}
    for result in results:
        table = report.RESULTS / f"{result.name}.md"
        assert table.read_text() == report.full_table(result), "run `python -m bench.report`"
        rendered.add(table.name)
        for kind, *_ in report.plots(result):
            picture = report.RESULTS / f"{result.name}-{kind}.svg"
            assert f"JSON {result.digest}" in picture.read_text(), "run `python -m bench.report`"
            rendered.add(picture.name)
    studies = {file.with_suffix(suffix).name for file in report.RESULTS.glob("*.jsonl") for suffix in (".md", ".svg")}
    stray = {file.name for file in report.RESULTS.glob("*") if file.suffix in (".md", ".svg")} - rendered - studies
    assert not stray


def test_failing_tests_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    marks = "pytest.mark.gpu" if torch.cuda.is_available() else "[]"
    (tmp_path / "tests" / "test_some.py").write_text(
        f"import pytest\npytestmark = {marks}\n"
        "def test_right(): pass\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_wrong(x): assert x == 1\n"
        "def test_left_out(): pytest.skip('why')\n"
    )
    (tmp_path / "tests" / "test_dying.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "TESTS", ["some", "dying"])
    monkeypatch.setattr(run, "SANITIZERS", ())
    assert run.test(tmp_path / "results", "abc", 60.0) == 1
    (file,) = (tmp_path / "results" / "tests").iterdir()
    result = json.loads(file.read_text())
    assert result["commit"] == "abc"
    assert result["files"] == {
        "some": {"passed": 2, "skipped": 1, "failed": ["test_some.py::test_wrong[2]"]},
        "dying": {"passed": 0, "skipped": 0, "failed": ["test_dying.py: ended with status 7"]},
    }
    (tmp_path / "tests" / "test_some.py").write_text("import time\ndef test_long(): time.sleep(60)\n")
    assert run.run_file("some", 2.0) == {"passed": 0, "skipped": 0, "failed": ["test_some.py: out of time"]}
    assert run.test(tmp_path / "results", "abc", -1.0) == 1
    assert json.loads(file.read_text())["files"]["dying"]["failed"] == ["test_dying.py: not reached"]


def test_the_verdict_of_a_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\necho '=== ERROR SUMMARY: 2 errors'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert run.sanitizer() == str(program)
    assert run.sanitize(str(program), "memcheck", 10.0) == "status 9: ERROR SUMMARY: 2 errors"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert run.sanitize(str(program), "memcheck", 0.5) == "out of time"


def test_all_files_with_tests_for_a_gpu_run_on_it() -> None:
    on_gpu = {file.stem.removeprefix("test_") for file in ROOT.glob("tests/test_*.py") if runs_on_gpu(file)}
    assert set(run.TESTS) == on_gpu


def runs_on_gpu(file: Path) -> bool:
    """Whether it marks a test, or a test in it takes the fixture that does."""
    return bool(re.search(r"(?<![\".])\bgpu\b(?![\".])|^def test_\w+\([^)]*\bdevice\b", file.read_text(), re.MULTILINE))


# Two measurements that one process has imported PyTorch for; the deadline is passed by a clock that is put forward.
MEASURE = """
import os, signal, sys, time, torch._dynamo
torch.compile = lambda way: way
late, monotonic = [0], time.monotonic
time.monotonic = lambda: monotonic() + late[0]
from bench import cases, run

class Slow(cases.PenaltyCase):
    def peers(self):
        late[0] = 10000
        return super().peers()

class Broken(cases.PenaltyCase):
    def peers(self):
        def broken(*_):
            with open(f"{folder}/calls", "a") as calls:
                print("a call of broken code", file=calls)
            raise ValueError("broken\\nindeed")
        return super().peers() | {"compiled": broken}

class Dead(cases.PenaltyCase):
    def call(self, peer, sets):
        raise ValueError("dead")

class Ended(cases.PenaltyCase):
    def peers(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().peers()

kinds = {"broken": Broken, "dead": Dead, "slow": Slow, "late": cases.PenaltyCase, "ended": Ended}
for folder, names in zip(sys.argv[1::2], sys.argv[2::2]):
    made = [kinds[name]((2, 3, size), torch.float32) for size, name in enumerate(names.split(), 4)]
    if os.fork() == 0:
        cases.all_cases = lambda *_: made
        from bench import benchmarks
        benchmarks.SECONDS = 0.0
        sys.exit(run.main(["measure", folder, "--seconds=5000", "--commit=0123456789abcdef"]))
    os.wait()
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the results of a measurement with a deadline and of one that is sent SIGTERM."""
    folders = [tmp_path_factory.mktemp(name) for name in ("deadline", "sigterm")]
    kinds = ["broken dead slow late", "late ended late"]
    command = [sys.executable, "-c", MEASURE, *map(str, chain(*zip(folders, kinds, strict=True)))]
    inherited = {name: os.environ[name] for name in os.environ if not name.startswith(("MALLOC_", "PYTEST_XDIST_"))}
    done = subprocess.run(command, cwd=ROOT, env=inherited | {"CUDA_VISIBLE_DEVICES": ""}, **PIPES)
    files = [file for folder in folders for file in folder.glob("*.json")]
    assert len(files) == 2, done.stdout
    return files


def test_a_measurement_records_what_is_not_measured(measured: list[Path]) -> None:
    result = report.load(measured[0])
    broken, dead, slow, late = (f"2x3x{hidden}-float32-forward+backward ({machine.DEFAULT})" for hidden in range(4, 8))
    (case,) = result.cases
    assert case.name == slow, "what was begun before the deadline is complete"
    peers = cases.PenaltyCase.PEERS
    assert set(case.seconds) == {*peers}
    assert len({len(seconds) for seconds in case.seconds.values()}) == 1
    assert case.info["fastreg"]["kept_bytes"] == 0 < case.info["eager"]["kept_bytes"]
    assert result.missing == {
        broken: {"compiled": "ValueError: broken"},
        dead: dict.fromkeys(peers, "ValueError: dead"),
        late: dict.fromkeys(peers, "out of time"),
    }
    assert (measured[0].parent / "calls").read_text() == "a call of broken code\n"
    assert result.commit["id"] == "0123456789abcdef"
    assert f"Not measured (ValueError: broken): {broken} (compiled)." in report.caveats(result)
    assert f"Not measured (out of time): {late}." in report.caveats(result)
    assert slow.split()[0] not in report.caveats(result)
    assert "(2, 3, 6), float32" in report.full_table(result)


def test_a_measurement_is_written_on_sigterm(measured: list[Path]) -> None:
    result = report.load(measured[1])
    first, ended, last = (f"2x3x{hidden}-float32-forward+backward ({machine.DEFAULT})" for hidden in (4, 5, 6))
    assert [case.name for case in result.cases] == [first]
    assert result.missing == {name: dict.fromkeys(cases.PenaltyCase.PEERS, "not reached") for name in (ended, last)}


def test_pytest_benchmark_compares_results(measured: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(measured[0]), "--group-by=group"]
    done = subprocess.run(command, cwd=tmp_path, **PIPES)
    assert "2x3x6-float32-forward+backward" in done.stdout, done.stderr


CHILD = """
import json, os, pathlib, signal, sys, time
assert sys.argv[1] == "measure"
folder = pathlib.Path(sys.argv[2])
names = {name: os.environ.get(name) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}
def write(*_):
    folder.mkdir()
    benchmark = {"group": str(names), "extra_info": {"commit": sys.argv[4]}}
    result = {"machine_info": {"device": "A CPU"}, "benchmarks": [benchmark], "missing": {str(names): {"eager": "why"}}}
    (folder / "result.json").write_text(json.dumps(result))
    sys.exit(0)
signal.signal(signal.SIGTERM, write)
if WAIT:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
write()
"""


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_cpu_is_measured_by_a_process_for_each_allocator(
    interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each starts with its own environment; an interrupt ends the first, which still writes its result."""
    popen, script = subprocess.Popen, CHILD.replace("WAIT", f"{interrupted}")
    for name in machine.ALLOCATORS[machine.KEPT]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **more: popen([sys.executable, "-c", script, *command[3:]], **more)
    )
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert run.main(["bench", str(tmp_path), "--commit=0123"]) == interrupted
    finally:
        signal.signal(signal.SIGTERM, handler)
    result = json.loads((tmp_path / "a-cpu.json").read_text())
    kept = machine.ALLOCATORS[machine.KEPT]
    environments = [kept] if interrupted else [kept, dict.fromkeys(kept)]
    assert [benchmark["group"] for benchmark in result["benchmarks"]] == list(map(str, environments))
    assert result["missing"] == {str(one): {"eager": "why"} for one in environments}
    assert {benchmark["extra_info"]["commit"] for benchmark in result["benchmarks"]} == {"--commit=0123"}


def test_an_allocator_keeps_memory_or_not() -> None:
    """Where it is kept, a call gets no pages from the system; glibc by itself keeps blocks of up to 32 MB."""
    script = (
        "import torch; from bench import machine, timing; x = torch.zeros(2**24)\n"
        "print(machine.allocator(), timing.page_faults(lambda _: (x + 1,)))"
    )
    faults = {}
    for allocator, environment in machine.ALLOCATORS.items():
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=inherited | environment, check=True, **PIPES
        )
        named, count = done.stdout.strip().rsplit(" ", 1)
        assert named == allocator
        faults[allocator] = int(count)
    assert faults[machine.KEPT] < 2**26 // 4096 / 10 < faults[machine.DEFAULT]


def test_the_time_of_the_host(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured with few calls, of launches that do nothing or of a GPU's."""
    for name, few in {"WARM_UP": 1, "ROUNDS": 3, "CALLS": 2}.items():
        monkeypatch.setattr(host, name, few)
    host.main()
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["shape"] == [64, 70, 400]
    assert set(result["cases"]) == {"fused_ar_tar", "fused_dropout_ar_tar", "fused_ar_tar, lengths"}
    for name, peers in result["cases"].items():
        assert {"fastreg", "empty Function"} <= set(peers)
        assert peers["fastreg"]["fastreg_times_as_fast"] == 1
        assert 0 < peers["empty Function"]["own_us"] < peers["fastreg"]["own_us"]
        assert any(line.startswith(f"| {name}: fastreg | ") for line in lines)


def test_a_part_of_the_cases_does_not_take_the_place_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    monkeypatch.setattr(run, "bench", lambda folder, *options: folders.append(folder) or 0)
    handler = signal.getsignal(signal.SIGTERM)
    for options in ([], ["--only=step"], ["here", "--only=step"]):
        assert run.main(["bench", *options]) == 0
    signal.signal(signal.SIGTERM, handler)
    assert folders == [ROOT / "bench" / "results", ROOT / ".benchmarks", Path("here")]
