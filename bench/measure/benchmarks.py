"""Measure benchmark cases: the worker of `bench.measure.run bench`, which passes the names of cases.

All peers of a case are measured in turns. The record of a case has the seconds and the other figures of each peer, and
why a peer is missing.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.measure import cases, machine, timing
from bench.measure.steps import WITHOUT, Step
from bench.measure.worker import append, in_a_line, work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALLOCATOR = machine.allocator() if DEVICE == "cpu" else None
SECONDS = 0.5 if DEVICE == "cuda" else 2.0  # that the rounds of a case take
STEP_SHARE = 0.1 if DEVICE == "cuda" else 1.0  # of the seconds that a step's class asks for
STEP_TURN = 0.02  # seconds that a turn of steps takes at least on a CPU
Measured = dict[str, dict[str, Any]]  # peer -> the seconds of each turn, and other figures
Missing = dict[str, str]  # peer -> why it is not measured


def name_of(case: cases.Case, allocator: str | None) -> str:
    """Name a case, with the allocator unless it keeps memory or the device is a GPU."""
    return f"{case} ({allocator})" if allocator == machine.DEFAULT else str(case)


def reason(error: Exception) -> str:
    """Say why a peer is missing; a full memory is described without its sizes and hints."""
    return "does not fit in the device's memory" if isinstance(error, torch.OutOfMemoryError) else in_a_line(error)


def measure_peers(case: cases.Case) -> tuple[Measured, Missing]:
    """Measure the peers whose first call works; a training step runs on one thread."""
    sets = cases.input_sets(case, DEVICE)
    torch.compiler.reset()  # otherwise Inductor compiles the second shape for all shapes, and slower
    is_step = isinstance(case, Step)
    with timing.threads(1 if is_step else torch.get_num_threads()):
        calls: dict[str, timing.Call] = {}
        figures, failed = {}, {}
        ways = case.peers()
        for peer, way in ways.items():
            began = time.perf_counter()
            try:
                call = case.call(way, sets)
                call(0)
                timing.synchronize(DEVICE)
                calls[peer], figures[peer] = call, {"first_seconds": time.perf_counter() - began}
            except Exception as error:
                failed[peer] = reason(error)
                timing.synchronize(DEVICE)  # raises if a kernel has failed, after which no other peer can run
        if not calls:
            return {}, failed
        for peer, call in calls.items():
            figures[peer] |= figures_of(case, (peer, ways[peer]), call, sets)
        if isinstance(case, Step):
            turns = timing.take_turns(calls, DEVICE, case.SECONDS * STEP_SHARE, repeats_of(calls))
        else:
            turns = timing.take_turns(calls, DEVICE, SECONDS, 10 if DEVICE == "cuda" else 1)
    measured: Measured = {}
    for peer, own_turns in turns.items():
        own = {"own_seconds": [turn.own for turn in own_turns]} if is_step and DEVICE == "cpu" else {}
        measured[peer] = {"seconds": [turn.wall for turn in own_turns]} | figures[peer] | own
    return measured, failed


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
            torch.autograd.grad(way(*sets[0]), leaves_of(sets[0]), torch.ones((), device=DEVICE))
            ready = iter([(way(*inputs), leaves_of(inputs)) for inputs in (sets[0], *sets)])
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


def leaves_of(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return the inputs that need gradients, each once."""
    return list(dict.fromkeys(x for x in inputs if x.requires_grad))


def measure(name: str, file: Path) -> dict[str, Any]:
    """Measure the case of a name, and describe it."""
    case = next(x for x in cases.all_cases(DEVICE, ALLOCATOR) if name_of(x, ALLOCATOR) == name)
    try:
        measured, missing = measure_peers(case)
    except torch.OutOfMemoryError as error:
        measured, missing = {}, dict.fromkeys(case.PEERS, reason(error))
    return {"peers": measured, "missing": missing}


def main() -> None:
    facts: dict[str, Any] = {"threads": torch.get_num_threads()}
    if DEVICE == "cuda":  # measured first, as nothing can be measured once a kernel has failed
        facts = {"copy_bandwidth": timing.copy_bandwidth()}
    append(Path(sys.argv[1]), machine=machine.facts() | facts)
    work(sys.argv[1:], measure)


if __name__ == "__main__":
    main()
