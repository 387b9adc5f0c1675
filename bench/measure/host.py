"""Measure the host's part of a call, forward and backward: `taskset -c 0 python -m bench.measure.host`.

At AWD-LSTM's own shape a GPU waits for the host. The peers take turns, and a turn ends when its calls return, not when
the device is done. Ratios are of the CPU time of the process, which does not include other programs. On the stand-in
GPU of bench/NOTES.md the process has to stay on one core: otherwise most of the time goes into waking autograd's thread
for the device. Without a GPU, launches do nothing with CPU tensors; as the formulas would still compute there, only an
empty autograd Function is measured beside fastreg.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bench.measure import cases
from bench.measure.report import number, table
from bench.measure.timing import Call, take_turns
from bench.offline.stand_in import h100

SHAPE = (64, 70, 400)
CASES = {
    "fused_ar_tar": cases.PenaltyCase(SHAPE, torch.float32),
    "fused_dropout_ar_tar": cases.DropoutCase(SHAPE, torch.float32),
    "fused_ar_tar, lengths": cases.PaddedCase(SHAPE, torch.float32),
}
PEERS, EMPTY = ("eager", "compiled", "fastreg"), "empty Function"
SECONDS, CALLS = 3.0, 50  # the seconds of a case, and the calls of a turn
INPUTS = 4


class Empty(torch.autograd.Function):
    """An autograd Function that computes nothing: two tensors in, a scalar out, two gradients back."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, dropped: Tensor) -> Tensor:
        ctx.gradients = raw.detach(), dropped.detach()
        return raw.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.gradients


def calls_of(case: cases.Case, device: str) -> dict[str, Call]:
    """Return a call of each peer, on a CPU only of fastreg, and a call of an empty Function over two tensors."""
    peers = PEERS if device == "cuda" else PEERS[-1:]
    calls = cases.calls(case, [case.inputs(device) for _ in range(INPUTS)], peers)
    raw, dropped = (torch.zeros(SHAPE, device=device, requires_grad=True) for _ in range(2))
    one = torch.ones((), device=device)
    return calls | {EMPTY: lambda _: torch.autograd.grad(Empty.apply(raw, dropped), (raw, dropped), one)}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [["host, forward + backward", "us", "own us", "fastreg against it"]]
    with h100() if device == "cpu" else nullcontext():
        for name, case in CASES.items():
            turns = take_turns(calls_of(case, device), device, SECONDS, CALLS, wait=False)
            for peer, those in turns.items():
                times = [number(1e6 * statistics.median(column)) for column in zip(*those, strict=True)]
                ratios = [other.own / fastreg.own for fastreg, other in zip(turns["fastreg"], those, strict=True)]
                rows.append([f"{name}: {peer}", *times, f"{statistics.median(ratios):.2f}x"])
    print(table(rows))


if __name__ == "__main__":
    main()
