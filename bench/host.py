"""Measure the host's part of a call, forward and backward: `taskset -c 0 python -m bench.host`.

At AWD-LSTM's own shape a GPU waits for the host. The peers take turns, and a turn ends when its calls return, not when
the device is done. Ratios are of the process's own time, to which other programs do not add. On the stand-in GPU of
bench/NOTES.md the process has to stay on one core: else the hand-over to autograd's thread for the device costs more
than all the rest. Without a GPU, CPU tensors go to launches that do nothing; the formulas would do their work there, so
that only an empty autograd Function is measured beside fastreg.

It prints a table, and in the last line the same as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bench import cases, machine
from bench.report import number, table
from bench.timing import Turn, synchronize

SHAPE = (64, 70, 400)
CASES: dict[str, tuple[cases.AnyCase, tuple[str, ...]]] = {
    "fused_ar_tar": (cases.PenaltyCase(SHAPE, torch.float32), ("eager", "compiled", "fastreg")),
    "fused_dropout_ar_tar": (cases.DropoutCase(SHAPE, torch.float32), ("eager", "compiled", "fastreg")),
    "fused_ar_tar, lengths": (cases.PaddedCase(SHAPE, torch.float32), ("eager", "compiled", "fastreg")),
}
EMPTY = "empty Function"
WARM_UP, ROUNDS, CALLS = 3, 30, 50  # rounds, rounds, calls a turn
INPUTS = 4


class Empty(torch.autograd.Function):
    """Measure autograd alone: two tensors in, a scalar out, two gradients back."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, dropped: Tensor) -> Tensor:
        ctx.gradients = raw.detach(), dropped.detach()
        return raw.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.gradients


@contextmanager
def launch_nothing() -> Iterator[None]:
    """Send CPU tensors to the Triton kernels, compiled for an H100, and their launches to a driver that makes none."""
    from triton.backends.compiler import GPUTarget

    from bench.stand_in import StandInDriver, active
    from fastreg.backends import TRITON, cpu_tensors_by
    from fastreg.plans import forget

    with active(StandInDriver(GPUTarget("cuda", 90, 32))), cpu_tensors_by(TRITON):
        yield
    forget()


def calls_of(case: cases.AnyCase, peers: tuple[str, ...], device: str) -> dict[str, cases.Call]:
    """Build one call of every peer, and of an empty Function over two tensors of the case's shape."""
    sets = [case.inputs(device) for _ in range(INPUTS)]
    torch.compiler.reset()
    calls = {name: case.call(peer, sets) for name, peer in case.peers().items() if name in peers}
    raw, dropped = (torch.zeros(SHAPE, device=device, requires_grad=True) for _ in range(2))
    one = torch.ones((), device=device)
    return calls | {EMPTY: lambda _: torch.autograd.grad(Empty.apply(raw, dropped), (raw, dropped), one)}


def take_turns(calls: Mapping[str, cases.Call], device: str) -> dict[str, list[Turn]]:
    """Measure how long calls take to return, the device idle before each turn; one `Turn` a peer and round."""
    turns: dict[str, list[Turn]] = {name: [] for name in calls}
    order, count = list(calls), itertools.count()
    for _ in range(WARM_UP + ROUNDS):
        for name in order:
            call, numbers = calls[name], [next(count) for _ in range(CALLS)]
            synchronize(device)
            wall, own = time.perf_counter(), time.process_time()
            for i in numbers:
                call(i)
            own, wall = time.process_time() - own, time.perf_counter() - wall
            turns[name].append(Turn(wall / CALLS, own / CALLS))
        order.append(order.pop(0))
    synchronize(device)
    return {name: peer[WARM_UP:] for name, peer in turns.items()}


def figures(turns: Mapping[str, list[Turn]]) -> dict[str, dict[str, float]]:
    """Of every peer: microseconds a call, and how many times as fast fastreg is; medians over the rounds."""
    return {
        name: {
            "wall_us": 1e6 * statistics.median(turn.wall for turn in peer),
            "own_us": 1e6 * statistics.median(turn.own for turn in peer),
            "fastreg_times_as_fast": statistics.median(
                other.own / fastreg.own for fastreg, other in zip(turns["fastreg"], peer, strict=True)
            ),
        }
        for name, peer in turns.items()
    }


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured: dict[str, dict[str, dict[str, float]]] = {}
    with launch_nothing() if device == "cpu" else nullcontext():
        for name, (case, peers) in CASES.items():
            calls = calls_of(case, peers if device == "cuda" else ("fastreg",), device)
            measured[name] = figures(take_turns(calls, device))
    rows = [["host, forward + backward", "us", "own us", "fastreg against it"]]
    for name, peers in measured.items():
        for peer, own in peers.items():
            cells = number(own["wall_us"]), number(own["own_us"]), f"{own['fastreg_times_as_fast']:.2f}x"
            rows.append([f"{name}: {peer}", *cells])
    print(table(rows))
    cores = len(os.sched_getaffinity(0))
    print(
        json.dumps(machine.facts() | {"shape": SHAPE, "cores": cores, "launches": device == "cuda", "cases": measured})
    )


if __name__ == "__main__":
    main()
