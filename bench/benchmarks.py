"""Measure cases: the peers of each take turns. `python -m bench.run bench` writes the result.

A result is a dictionary with the parts of pytest-benchmark's JSON that bench.report reads: `machine_info`,
`commit_info`, and `benchmarks` with a group for each case; beside them `missing`, which says for each case why a peer
was not measured.
"""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from bench import cases, machine, timing
from bench.steps import WITHOUT, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALLOCATOR = machine.allocator() if DEVICE == "cpu" else None
SECONDS = 0.5 if DEVICE == "cuda" else 2.0  # of rounds a case
STEP_SHARE = 0.1 if DEVICE == "cuda" else 1.0  # of the seconds of a step
STEP_TURN = 0.02  # seconds of a turn of steps on a CPU, at least
Measured = dict[str, tuple[list[float], dict[str, Any]]]  # of every peer: seconds a call, and other figures
Missing = dict[str, str]  # peer -> why it is not measured


def measure_all(commit: str, seconds: float, only: str) -> dict[str, Any]:
    """Measure the cases whose names contain `only`; begin none after `seconds`. An interrupt ends the measurement."""
    chosen = {group_of(case): case for case in cases.all_cases(DEVICE, ALLOCATOR) if only in str(case)}
    missing: dict[str, Missing] = {group: dict.fromkeys(case.PEERS, "not reached") for group, case in chosen.items()}
    facts: dict[str, Any] = machine.facts() | {"python_version": platform.python_version()}
    name, _, changed = (commit or machine.commit()).partition(" ")
    if DEVICE == "cuda":
        facts["copy_bandwidth"] = copy_bandwidth()  # now: nothing can be measured once a kernel has failed
    else:
        facts["threads"] = torch.get_num_threads()
    benchmarks, start = [], time.monotonic()
    with suppress(KeyboardInterrupt):
        for number, (group, case) in enumerate(chosen.items(), start=1):
            if time.monotonic() - start > seconds:
                missing[group] = dict.fromkeys(case.PEERS, "out of time")
                continue
            measured, missing[group] = measure(case)
            for peer, (times, figures) in measured.items():
                info = case.info | {"peer": peer, "allocator": ALLOCATOR} | figures
                benchmarks.append({"group": group, "extra_info": info, "stats": {"data": times}})
            failed = "".join(f"; {peer}: {why}" for peer, why in missing[group].items())
            print(f"{time.monotonic() - start:4.0f} s, {number} of {len(chosen)}: {group}{failed}", flush=True)
    return {
        "machine_info": facts,
        "commit_info": {"id": name, "dirty": bool(changed)},
        "benchmarks": benchmarks,
        "missing": {group: peers for group, peers in missing.items() if peers},
    }


def group_of(case: cases.AnyCase) -> str:
    """Name a case as measured here; the plain name is that with memory kept, or on a GPU."""
    return f"{case} ({ALLOCATOR})" if ALLOCATOR == machine.DEFAULT else str(case)


def in_a_line(error: Exception) -> str:
    """Describe an error; that of a full memory names neither sizes nor hints."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in the device's memory"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def measure(case: cases.AnyCase) -> tuple[Measured, Missing]:
    """Measure all peers of a case, and record the errors of peers that fail."""
    try:
        return measure_peers(case)
    except Exception as error:
        return {}, dict.fromkeys(case.PEERS, in_a_line(error))


def measure_peers(case: cases.AnyCase) -> tuple[Measured, Missing]:
    """Measure the peers whose first call works, a training step on one thread."""
    sets = cases.input_sets(case, DEVICE)
    torch.compiler.reset()  # else the second shape would be compiled for all shapes, and run slower
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
        own = {"own_seconds": [turn.own for turn in own_turns]} if is_step else {}
        measured[peer] = [turn.wall for turn in own_turns], figures[peer] | own
    return measured, failed


def repeats_of(calls: Mapping[str, timing.Call]) -> int:
    """Return the number of steps in a turn; on a CPU as many as the clock needs for small ones."""
    if DEVICE == "cuda":
        return 10
    began = time.perf_counter()
    (calls.get(WITHOUT) or next(iter(calls.values())))(0)
    return math.ceil(STEP_TURN / (time.perf_counter() - began))


def figures_of(
    case: cases.AnyCase, peer: str, call: timing.Call, sets: list[tuple[torch.Tensor, ...]]
) -> dict[str, Any]:
    """Measure all but the time of a call that waits for the device."""
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
            figures |= {"bandwidth": moved / cold, "share_of_copy": moved / cold / copy_bandwidth()}
    except RuntimeError as error:  # a peer that cannot be captured has been timed already
        figures["no_graph"] = in_a_line(error)
    return figures


@functools.cache
def copy_bandwidth() -> float:
    return timing.copy_bandwidth()
