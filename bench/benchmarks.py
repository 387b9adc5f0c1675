"""The benchmarks, for pytest-benchmark; `python -m bench.run` runs them where the tests pass.

A case is a group, and each of its peers a benchmark. The first benchmark of a group measures all of them by turns.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from bench import cases, timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {str(case): case for case in cases.penalty_cases(DEVICE)}
STEP = cases.step(DEVICE)
PEERS = ("eager", "compiled", "fastreg")
SECONDS = 0.5 if DEVICE == "cuda" else 3.0  # of rounds a case
REPLAY = timing.Replay()
Measured = dict[str, tuple[list[float], dict[str, Any]]]  # of every peer: seconds a call, and other figures


@functools.lru_cache(maxsize=1)  # one case is measured at a time, and its inputs go when it is done
def measure(name: str) -> Measured:
    """All peers of a case of the penalty."""
    case = CASES[name]
    sets = cases.input_sets(case, DEVICE)
    penalties = cases.peers(case)
    calls = {peer: cases.call(penalty, case, sets) for peer, penalty in penalties.items()}
    times = timing.take_turns(calls, DEVICE, SECONDS)
    measured: Measured = {}
    for peer, penalty in penalties.items():
        kept = timing.kept_bytes(functools.partial(penalty, *sets[0], cases.ALPHA, cases.BETA), sets[0])
        figures: dict[str, Any] = {"kept_bytes": kept, "bytes_moved": case.bytes_moved}
        if DEVICE == "cuda":
            figures |= gpu_figures(calls[peer], case, len(sets))
        measured[peer] = times[peer], figures
    return measured


def gpu_figures(call: cases.Call, case: cases.Case, sets: int) -> dict[str, Any]:
    """What only a GPU has."""
    cold = timing.graph_seconds(call, range(sets))
    bandwidth = case.bytes_moved / cold
    return {
        "graph_warm_seconds": timing.graph_seconds(call, [0] * sets),
        "graph_rotated_seconds": cold,
        "bandwidth": bandwidth,
        "share_of_copy": bandwidth / copy_bandwidth(),
        "launches": timing.launches(call),
        "peak_bytes": timing.peak_bytes(call, case.backward),
        "host_seconds": timing.host_seconds(call),
    }


@functools.cache
def copy_bandwidth() -> float:
    return timing.copy_bandwidth()


@functools.lru_cache(maxsize=1)
def measure_step() -> dict[str, list[float]]:
    return timing.take_turns(cases.step_calls(STEP, DEVICE), DEVICE, 3 * SECONDS)


def report(benchmark: Any, group: str, times: list[float], info: dict[str, Any]) -> None:
    """Hand what was measured to pytest-benchmark."""
    benchmark.group = group
    benchmark.extra_info |= info
    REPLAY.load(times)
    benchmark.pedantic(REPLAY.advance, rounds=len(times))


@pytest.mark.benchmark(timer=REPLAY.read)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_penalty(benchmark: Any, name: str, peer: str) -> None:
    case = CASES[name]
    times, figures = measure(name)[peer]
    what = {
        "shape": case.shape,
        "dtype": f"{case.dtype}".removeprefix("torch."),
        "layout": "batch first" if case.batch_first else "time first",
        "same": case.same,
        "pass": "forward + backward" if case.backward else "forward",
        "peer": peer,
    }
    report(benchmark, name, times, what | figures)


@pytest.mark.benchmark(timer=REPLAY.read)
@pytest.mark.parametrize("peer", cases.STEP_PEERS)
def test_training_step(benchmark: Any, peer: str) -> None:
    report(benchmark, str(STEP), measure_step()[peer], {"pass": "training step", "peer": peer})
