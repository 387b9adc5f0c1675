"""Measure the peers of a case in turns: the tasks of the worker of `python -m pytest bench`.

The result has the seconds and the other figures of each peer, and why a peer is missing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping
from operator import sub, truediv
from typing import Any

import torch
from pytest_benchmark.stats import Stats

from bench.measure import cases, machine, timing
from bench.measure.steps import WITHOUT, Step
from bench.measure.worker import Say, in_a_line

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 0.5 if DEVICE == "cuda" else 2.0  # that the rounds of a case take
STEP_SHARE = 0.1 if DEVICE == "cuda" else 1.0  # of the seconds that a step's class asks for
STEP_TURN = 0.02  # seconds that a turn of steps takes at least on a CPU
Measured = dict[str, dict[str, Any]]  # peer -> the seconds of each turn, and other figures
Missing = dict[str, str]  # peer -> why it is not measured


def facts(say: Say) -> dict[str, Any]:
    """Describe the machine."""
    if DEVICE == "cuda":
        return machine.facts() | {"copy_bandwidth": timing.copy_bandwidth()}
    return machine.facts() | {"threads": torch.get_num_threads()}


def reason(error: Exception) -> str:
    """Say why a peer is missing; a full memory is described without its sizes and hints."""
    return "does not fit in the device's memory" if isinstance(error, torch.OutOfMemoryError) else in_a_line(error)


def measure_peers(say: Say, case: cases.Case, peers: Collection[str], once: bool) -> tuple[Measured, Missing]:
    """Measure the peers whose first call works; a training step runs on one thread.

    Args:
        say: gets the name of each peer before it is called, so that after a crash the others can be measured.
        case: the case.
        peers: names of peers.
        once: whether to call each peer only once.
    """
    try:
        sets = cases.input_sets(case, DEVICE)
    except torch.OutOfMemoryError as error:
        return {}, dict.fromkeys(peers, reason(error))
    torch.compiler.reset()  # otherwise Inductor compiles the second shape for all shapes, and slower
    is_step = isinstance(case, Step)
    with timing.threads(1 if is_step else torch.get_num_threads()):
        calls: dict[str, timing.Call] = {}
        measured: Measured = {}
        missing: Missing = {}
        ways = {peer: way for peer, way in case.peers().items() if peer in peers}
        for peer, way in ways.items():
            say(peer)
            began = time.perf_counter()
            try:
                call = case.call(way, sets)
                call(0)
                timing.synchronize(DEVICE)
                first = time.perf_counter() - began
                calls[peer], measured[peer] = call, {"seconds": [first], "first_seconds": first}
            except Exception as error:
                missing[peer] = reason(error)
                timing.synchronize(DEVICE)  # raises if a kernel has failed, after which no other peer can run
        if once or not calls:
            return measured, missing
        for peer, call in calls.items():
            say(peer)
            measured[peer] |= figures_of(case, (peer, ways[peer]), call, sets)
        seconds, repeats = SECONDS, 10 if DEVICE == "cuda" else 1
        if isinstance(case, Step):
            seconds, repeats = case.SECONDS * STEP_SHARE, repeats_of(calls)
        turns = timing.take_turns(calls, DEVICE, seconds, repeats, say=say)
    own_time = is_step and DEVICE == "cpu"
    for peer, figures in measured.items():
        # The CPU time of the process does not include other programs.
        figures["seconds"] = [turn.own if own_time else turn.wall for turn in turns[peer]]
        figures["clock"] = "CPU time of one thread" if own_time else "wall time"
        if "moved_bytes" in figures:  # a GPU has it by its graph
            figures.setdefault("bandwidth", figures["moved_bytes"] / median_and_spread(figures["seconds"])[0])
    return paired(measured, case.OURS), missing


def paired(measured: Measured, ours: str) -> Measured:
    """Add the figures that compare peers round by round, where the other peer is measured as well.

    `against` is the median of a peer's time over the time of `ours`. The others are pairs of median and spread (the
    interquartile range): `added_seconds` is the difference of a training step to the one without the penalty, and
    `over_formula` the time of `ours` over the formula's.
    """
    for peer, figures in measured.items():
        against, without, formula = (
            zip(figures["seconds"], measured[other]["seconds"], strict=True) if other in measured else None
            for other in (ours, WITHOUT, "eager")
        )
        if against:
            figures["against"] = median_and_spread(truediv(*pair) for pair in against)[0]
        if without:
            figures["added_seconds"] = median_and_spread(sub(*pair) for pair in without)
            if formula and peer == ours:
                figures["over_formula"] = median_and_spread(truediv(*pair) for pair in formula)
    return measured


def median_and_spread(values: Iterable[float]) -> list[float]:
    """Return the median and the interquartile range, as pytest-benchmark defines them."""
    stats: Any = Stats()
    for value in values:
        stats.update(value)
    return [float(stats.median), float(stats.iqr)]


def repeats_of(calls: Mapping[str, timing.Call]) -> int:
    """Return the number of steps in a turn: on a CPU, enough for the clock to measure a short step."""
    if DEVICE == "cuda":
        return 10
    began = time.perf_counter()
    (calls.get(WITHOUT) or next(iter(calls.values())))(0)
    return math.ceil(STEP_TURN / (time.perf_counter() - began))


def figures_of(
    case: cases.Case, peer: tuple[str, Any], call: timing.Call, sets: list[tuple[torch.Tensor, ...]]
) -> dict[str, Any]:
    """Measure everything except the time of a call, for a peer with its name."""
    if isinstance(case, Step):
        peak = timing.peak_bytes(call, DEVICE)
        return {} if peak is None else {"peak_bytes": peak}
    name, way = peer
    moved = case.bytes_moved(name)
    held = timing.held_bytes(lambda: case.forward(way, sets[0]), DEVICE)
    figures: dict[str, Any] = {"held_bytes": held, "least_bytes": case.bytes_moved("least")}
    figures |= {} if moved is None else {"moved_bytes": moved}
    if DEVICE == "cuda":
        figures |= gpu_figures(call, moved, len(sets))
        return figures | (parts_of(case, way, sets) if name == "fastreg" and case.kind == cases.BOTH else {})
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
        figures["no_graph"] = reason(error)
    return figures


def parts_of(case: cases.PenaltyCase, way: cases.Peer, sets: list[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    """Measure the forward and each kind of backward by itself, and a copy of as many bytes as the penalty must move."""
    numbers, least = range(len(sets)), case.bytes_moved("least") or 0

    def forward(i: int) -> tuple[torch.Tensor, ...]:
        return case.forward(way, sets[i])

    def backward_seconds(upstream: float) -> float:
        """Measure backwards of forwards that expect an upstream gradient of 1."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.autograd.grad(way(*sets[0]), cases.leaves_of(sets[0]), torch.ones((), device=DEVICE))
            ready = iter([(way(*inputs), cases.leaves_of(inputs)) for inputs in (sets[0], *sets)])
            slope = torch.full((), upstream, device=DEVICE)
        return timing.graph_seconds(lambda _: torch.autograd.grad(*next(ready), slope), numbers, stream)

    try:
        return {
            "forward_seconds": timing.graph_seconds(forward, numbers),
            "predicted_seconds": backward_seconds(1.0),
            "again_seconds": backward_seconds(2.0),
            "copy_warm_seconds": timing.copy_seconds(least // 2, [0] * len(sets)),
            "copy_rotated_seconds": timing.copy_seconds(least // 2, numbers),
        }
    except RuntimeError as error:
        return {"no_parts": reason(error)}
