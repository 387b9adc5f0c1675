"""The benchmarks, for pytest-benchmark: `python -m bench.run bench`.

A case is a group, and each of its peers a benchmark. The first benchmark of a group measures all of them in turns.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bench import cases, machine, timing
from bench.steps import WITHOUT, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALLOCATOR = machine.allocator() if DEVICE == "cpu" else None
CASES = {str(case): case for case in cases.all_cases(DEVICE, ALLOCATOR)}
SECONDS = 0.5 if DEVICE == "cuda" else 2.0  # of rounds a case
STEP_SHARE = 0.1 if DEVICE == "cuda" else 1.0  # of the seconds of a step
STEP_TURN = 0.02  # seconds of a turn of steps on a CPU, at least
REPLAY = timing.Replay()
Measured = dict[str, tuple[list[float], dict[str, Any]]]  # of every peer: seconds a call, and other figures


def group_of(name: str) -> str:
    """Name a case as measured here; the plain name is that with memory kept, or on a GPU."""
    return f"{name} ({ALLOCATOR})" if ALLOCATOR == machine.DEFAULT else name


def in_a_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


@functools.lru_cache(maxsize=1)  # one case is measured at a time, and its inputs go when it is done
def measure(name: str, deadline: float) -> tuple[Measured, dict[str, str]]:
    """Measure all peers of a case, and record the errors of peers that fail. No case starts after the deadline."""
    if time.monotonic() > deadline:
        pytest.skip("out of time")
    try:
        return measure_peers(CASES[name])
    except Exception as error:
        return {}, dict.fromkeys(CASES[name].PEERS, in_a_line(error))


def measure_peers(case: cases.AnyCase) -> tuple[Measured, dict[str, str]]:
    """Measure the peers whose first call works, a training step on one thread."""
    sets = cases.input_sets(case, DEVICE)
    torch.compiler.reset()  # else the second shape would be compiled for all shapes, and run slower
    with timing.threads(1 if isinstance(case, Step) else torch.get_num_threads()):
        calls: dict[str, cases.Call] = {}
        first: dict[str, float] = {}
        failed: dict[str, str] = {}
        for peer, way in case.peers().items():
            began = time.perf_counter()
            try:
                calls[peer] = case.call(way, sets)
                calls[peer](0)
                timing.synchronize(DEVICE)
            except Exception as error:
                calls.pop(peer, None)
                failed[peer] = in_a_line(error)
            first[peer] = time.perf_counter() - began
        if not calls:
            return {}, failed
        figures = {peer: {"first_seconds": first[peer]} | figures_of(case, peer, calls[peer], sets) for peer in calls}
        if isinstance(case, Step):
            turns = timing.take_turns(calls, DEVICE, case.SECONDS * STEP_SHARE, repeats_of(calls))
        else:
            turns = timing.take_turns(calls, DEVICE, SECONDS, 10 if DEVICE == "cuda" else 1)
    measured: Measured = {}
    for peer, own_turns in turns.items():
        own = {"own_seconds": [turn.own for turn in own_turns]} if isinstance(case, Step) else {}
        measured[peer] = [turn.wall for turn in own_turns], figures[peer] | own
    return measured, failed


def repeats_of(calls: Mapping[str, cases.Call]) -> int:
    """Return the number of steps in a turn; on a CPU as many as the clock needs for small ones."""
    if DEVICE == "cuda":
        return 10
    began = time.perf_counter()
    (calls.get(WITHOUT) or next(iter(calls.values())))(0)
    return math.ceil(STEP_TURN / (time.perf_counter() - began))


def figures_of(
    case: cases.AnyCase, peer: str, call: cases.Call, sets: list[tuple[torch.Tensor, ...]]
) -> dict[str, Any]:
    """Measure all but the time of a call that waits for the device."""
    if isinstance(case, Step):
        peak = timing.peak_bytes(call, DEVICE)
        return {} if peak is None else {"peak_bytes": peak}
    moved = case.bytes_moved(peer)
    figures: dict[str, Any] = {"kept_bytes": timing.kept_bytes(call, sets[0]), "least_bytes": case.least_bytes}
    figures |= {} if moved is None else {"moved_bytes": moved}
    if DEVICE == "cuda":
        return figures | gpu_figures(call, moved, len(sets))
    return figures | {"page_faults": timing.page_faults(call)}


def gpu_figures(call: cases.Call, moved: int | None, sets: int) -> dict[str, Any]:
    """Measure the figures that only a GPU has."""
    figures: dict[str, Any] = {"peak_bytes": timing.peak_bytes(call, "cuda"), "host_seconds": timing.host_seconds(call)}
    try:
        cold = timing.graph_seconds(call, range(sets))
        figures |= {
            "graph_warm_seconds": timing.graph_seconds(call, [0] * sets),
            "graph_rotated_seconds": cold,
            "launches": timing.launches(call),
        }
        if moved is not None:
            figures |= {"bandwidth": moved / cold, "share_of_copy": moved / cold / copy_bandwidth()}
    except RuntimeError as error:  # a peer that cannot be captured has been timed already
        figures["no_graph"] = in_a_line(error)
    return figures


@functools.cache
def copy_bandwidth() -> float:
    return timing.copy_bandwidth()


@pytest.mark.benchmark(timer=REPLAY.read)
@pytest.mark.parametrize(("name", "peer"), [(name, peer) for name, case in CASES.items() for peer in case.PEERS])
def test_case(benchmark: Any, deadline: float, name: str, peer: str) -> None:
    """Pass the measurements to pytest-benchmark."""
    measured, failed = measure(name, deadline)
    if peer in failed:
        pytest.fail(failed[peer], pytrace=False)
    times, figures = measured[peer]
    benchmark.group = group_of(name)
    benchmark.extra_info |= CASES[name].info | {"peer": peer, "allocator": ALLOCATOR} | figures
    REPLAY.load(times)
    benchmark.pedantic(REPLAY.advance, rounds=len(times))
