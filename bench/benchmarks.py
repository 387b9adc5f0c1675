"""The benchmarks, for pytest-benchmark: `python -m bench.run bench`.

A case is a group, and each of its peers a benchmark. The first benchmark of a group measures all peers in turns.
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
SECONDS = 0.5 if DEVICE == "cuda" else 2.0  # that the rounds of a case take
STEP_SHARE = 0.1 if DEVICE == "cuda" else 1.0  # of the seconds that a step's class asks for
STEP_TURN = 0.02  # seconds that a turn of steps takes at least on a CPU
CLOCK = timing.Replay()
Measured = dict[str, tuple[list[float], dict[str, Any]]]  # peer -> seconds a call, other figures
Missing = dict[str, str]  # peer -> why it is not measured


def group_of(case: cases.Case) -> str:
    """Name a case, with the allocator unless it keeps memory or the device is a GPU."""
    return f"{case} ({ALLOCATOR})" if ALLOCATOR == machine.DEFAULT else str(case)


def in_a_line(error: Exception) -> str:
    """Describe an error in one line; a full memory is described without its sizes and hints."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in the device's memory"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


@functools.lru_cache(maxsize=1)  # one case is measured at a time, and its inputs are freed when it is done
def measure(case: cases.Case, deadline: float) -> tuple[Measured, Missing]:
    """Measure all peers of a case, and record the errors of peers that fail. No case starts after the deadline."""
    if time.monotonic() > deadline:
        pytest.skip("out of time")
    try:
        return measure_peers(case)
    except Exception as error:
        return {}, dict.fromkeys(case.PEERS, in_a_line(error))


def measure_peers(case: cases.Case) -> tuple[Measured, Missing]:
    """Measure the peers whose first call works; a training step runs on one thread."""
    sets = cases.input_sets(case, DEVICE)
    torch.compiler.reset()  # otherwise Inductor compiles the second shape for all shapes, and slower
    is_step = isinstance(case, Step)
    with timing.threads(1 if is_step else torch.get_num_threads()):
        calls: dict[str, timing.Call] = {}
        figures, failed = {}, {}
        for peer, way in case.peers().items():
            began = time.perf_counter()
            try:
                call = case.call(way, sets)
                call(0)
                timing.synchronize(DEVICE)
                calls[peer], figures[peer] = call, {"first_seconds": time.perf_counter() - began}
            except Exception as error:
                failed[peer] = in_a_line(error)
        if not calls:
            return {}, failed
        for peer, call in calls.items():
            figures[peer] |= figures_of(case, peer, call, sets)
        if isinstance(case, Step):
            turns = timing.take_turns(calls, DEVICE, case.SECONDS * STEP_SHARE, repeats_of(calls))
        else:
            turns = timing.take_turns(calls, DEVICE, SECONDS, 10 if DEVICE == "cuda" else 1)
    measured: Measured = {}
    for peer, own_turns in turns.items():
        own = {"own_seconds": [turn.own for turn in own_turns]} if is_step and DEVICE == "cpu" else {}
        measured[peer] = [turn.wall for turn in own_turns], figures[peer] | own
    return measured, failed


def repeats_of(calls: Mapping[str, timing.Call]) -> int:
    """Return the number of steps in a turn: on a CPU, enough for the clock to measure a short step."""
    if DEVICE == "cuda":
        return 10
    began = time.perf_counter()
    (calls.get(WITHOUT) or next(iter(calls.values())))(0)
    return math.ceil(STEP_TURN / (time.perf_counter() - began))


def figures_of(case: cases.Case, peer: str, call: timing.Call, sets: list[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    """Measure everything except the time of a call."""
    if isinstance(case, Step):
        peak = timing.peak_bytes(call, DEVICE)
        return {} if peak is None else {"peak_bytes": peak}
    moved = case.bytes_moved(peer)
    figures: dict[str, Any] = {"kept_bytes": timing.kept_bytes(call, sets[0]), "least_bytes": case.bytes_moved("least")}
    figures |= {} if moved is None else {"moved_bytes": moved}
    if DEVICE == "cuda":
        return figures | gpu_figures(call, moved, len(sets))
    return figures | {"page_faults": timing.page_faults(call)}


def gpu_figures(call: timing.Call, moved: int | None, sets: int) -> dict[str, Any]:
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
            figures |= {"bandwidth": moved / cold, "share_of_copy": moved / cold / timing.copy_bandwidth()}
    except RuntimeError as error:  # the peer cannot be captured, but its time has been measured
        figures["no_graph"] = in_a_line(error)
    return figures


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(
    ("case", "peer"),
    [(case, peer) for case in cases.all_cases(DEVICE, ALLOCATOR) for peer in case.PEERS],
    ids=str,
)
def test_case(benchmark: Any, deadline: float, case: cases.Case, peer: str) -> None:
    """Report the seconds of a peer's turns to pytest-benchmark, one turn for each round."""
    measured, failed = measure(case, deadline)
    if peer in failed:
        pytest.fail(failed[peer], pytrace=False)
    seconds, figures = measured[peer]
    benchmark.group = group_of(case)
    benchmark.extra_info |= case.info | {"peer": peer, "allocator": ALLOCATOR} | figures
    turns = iter(seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(turns)), rounds=len(seconds))
