"""How the work is cut, on the host and on the device.

Activations are seen as `(outer, time, inner)` with a contiguous inner axis. The `outer * inner` positions are
lanes: a lane is one unit of one sequence, walked along time. An item of work is a block of lanes over a run of
time steps. It keeps the previous row in registers, so each row is read once, plus a halo row at a run's edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = 128  # with a 16-byte load each a block of lanes is 2 KB of a row
WARPS = THREADS // (64 if torch.version.hip else 32)
UNROLL = 4  # rows in flight a thread: 64 bytes of each tensor, to hide the latency of memory
SHORTEST_RUN = 16  # time steps: halo rows add at most 1/16 to the reads of raw, 1/8 in the backward
PROGRAMS = 1024  # about 8 for each of an H100's 132 cores, all resident; more would only add halo rows
LARGE = 2**30  # elements from which lanes and time steps are counted in 64 bits; memory offsets always are


@triton.jit
def place(item, lanes, inner, time, run, ALIGN: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Where an item lies: sequence, unit and presence of its lanes, each (BLOCK,), and its run's bounds."""
    lanes = tl.multiple_of(lanes, ALIGN)
    inner = tl.multiple_of(inner, ALIGN)
    blocks = tl.cdiv(lanes, BLOCK)
    lane = tl.cast(item % blocks, INDEX) * BLOCK + tl.arange(0, BLOCK)
    start = tl.cast(item // blocks, INDEX) * run
    return tl.cast(lane // inner, tl.int64), lane % inner, lane < lanes, start, tl.minimum(start + run, time)


@triton.jit
def row(base, step, stride, ALIGN: tl.constexpr):
    """Pointers to time step `step` of a block of lanes."""
    return base + tl.cast(step, tl.int64) * tl.multiple_of(stride, ALIGN)


class Plan:
    """How one launch is cut.

    `lanes`, `inner`, `time`, `run` and `runs` are the kernels' arguments of these names and `constants` their
    compile-time ones; `items` counts the items of work; `dtype` is that of differences, squares and sums.
    """

    def __init__(self, sizes: Sequence[int], strides: Sequence[Sequence[int]], tensors: Sequence[Tensor | None]):
        outer, self.time, self.inner = sizes
        self.lanes = outer * self.inner
        widest = max(x.itemsize for x in tensors if x is not None)
        block = THREADS * 16 // widest
        blocks = triton.cdiv(self.lanes, block)
        runs = max(1, min(PROGRAMS // blocks, self.time // SHORTEST_RUN))
        self.run = triton.cdiv(triton.cdiv(self.time, runs), UNROLL) * UNROLL
        self.runs = triton.cdiv(self.time, self.run)
        self.items = blocks * self.runs
        self.dtype = torch.float64 if widest == 8 else torch.float32
        self.constants: dict[str, Any] = {
            "ACC": tl.float64 if widest == 8 else tl.float32,
            "ALIGN": math.gcd(16, self.inner, *(stride for pair in strides for stride in pair)),
            "INDEX": tl.int64 if self.lanes * self.time >= LARGE else tl.int32,
            "BLOCK": block,
            "UNROLL": UNROLL,
            "num_warps": WARPS,
        }


def current_device(x: Tensor) -> AbstractContextManager[object]:
    """Make `x`'s device the current one, where Triton launches."""
    return torch.accelerator.device_index(None if x.device.type == "cpu" else x.device.index)
