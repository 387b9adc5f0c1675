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
CASES = {str(case): case for case in cases.all_cases(DEVICE)}
STEP = cases.step(DEVICE)
SECONDS = 0.5 if DEVICE == "cuda" else 3.0  # of rounds a case
REPLAY = timing.Replay()
Measured = dict[str, tuple[list[float], dict[str, Any]]]  # of every peer: seconds a call, and other figures


@functools.lru_cache(maxsize=1)  # one case is measured at a time, and its inputs go when it is done
def measure(name: str) -> Measured:
    """All peers of a case."""
    case = CASES[name]
    sets = cases.input_sets(case, DEVICE)
    calls = cases.calls(case, sets)
    times = timing.take_turns(calls, DEVICE, SECONDS)
    measured: Measured = {}
    for peer, call in calls.items():
        moved = case.bytes_moved(peer)
        figures: dict[str, Any] = {"kept_bytes": timing.kept_bytes(call, sets[0]), "bytes_moved": moved}
        if DEVICE == "cuda":
            figures |= gpu_figures(call, moved, len(sets))
        measured[peer] = times[peer], figures
    return measured


def gpu_figures(call: cases.Call, moved: int, sets: int) -> dict[str, Any]:
    """What only a GPU has."""
    cold = timing.graph_seconds(call, range(sets))
    bandwidth = moved / cold
    return {
        "graph_warm_seconds": timing.graph_seconds(call, [0] * sets),
        "graph_rotated_seconds": cold,
        "bandwidth": bandwidth,
        "share_of_copy": bandwidth / copy_bandwidth(),
        "launches": timing.launches(call),
        "peak_bytes": timing.peak_bytes(call),
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
@pytest.mark.parametrize("peer", cases.STEP_PEERS)
def test_training_step(benchmark: Any, peer: str) -> None:
    report(benchmark, str(STEP), measure_step()[peer], {"pass": "training step", "peer": peer})


@pytest.mark.benchmark(timer=REPLAY.read)
@pytest.mark.parametrize(("name", "peer"), [(name, peer) for name, case in CASES.items() for peer in case.PEERS])
def test_case(benchmark: Any, name: str, peer: str) -> None:
    times, figures = measure(name)[peer]
    report(benchmark, name, times, CASES[name].info | {"peer": peer} | figures)
