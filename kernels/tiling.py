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
LONGEST_RUN = 128  # time steps: float32 sums drift with their length, and a run's and a program's are kept apart
PROGRAMS = 1024  # about 8 for each of an H100's 132 cores, all resident; more would only add halo rows
LARGE = 2**30  # elements from which lanes and time steps are counted in 64 bits; memory offsets always are


@triton.jit
def place(item, blocks, lanes, inner, time, run, ALIGN: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Where an item lies: sequence, unit and presence of its lanes, each (BLOCK,), and its run's bounds."""
    lane = tl.cast(item % blocks, INDEX) * BLOCK + tl.arange(0, BLOCK)
    width = tl.cast(inner, INDEX) * ALIGN
    start = tl.cast(item // blocks, INDEX) * run
    present = lane < tl.cast(lanes, INDEX) * ALIGN
    return tl.cast(lane // width, tl.int64), lane % width, present, start, tl.minimum(start + run, time)


@triton.jit
def ends(lengths, sequence, present, time, INDEX: tl.constexpr):
    """How many time steps each lane's sequence has, (BLOCK,): its length, from 0 to `time`."""
    length = tl.load(lengths + sequence, mask=present, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0), time).to(INDEX)


@triton.jit
def at(x, sequence, unit, stride, ALIGN: tl.constexpr):
    """Pointers to an item's lanes at time step 0."""
    return x + sequence * stride * ALIGN + unit


@triton.jit
def row(base, step, stride, offsets, ALIGN: tl.constexpr):
    """Pointers to an item's lanes at time step `step`; where rows are packed, `offsets` tells where the step begins."""
    if offsets is not None:
        step = tl.load(offsets + 1 + step)
    return base + tl.cast(step, tl.int64) * stride * ALIGN


@triton.jit
def within(present, step, stop, INDEX: tl.constexpr):
    """Which of an item's lanes there are at time step `step`: none from `stop`, theirs or all's, on; (BLOCK,)."""
    return present & (tl.full(present.shape, step, INDEX) < stop)


@triton.jit
def load_rows(
    base,
    first,
    stop,
    stride,
    offsets,
    present,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """UNROLL rows from time step `first` on, each (BLOCK,) in ACC, 0 where there is none.

    All are asked for before the first is used: no store in between keeps the compiler from it.
    """
    rows = ()
    for i in tl.static_range(UNROLL):
        pointers = row(base, first + i, stride, offsets, ALIGN)
        rows += (tl.load(pointers, mask=within(present, first + i, stop, INDEX), other=0.0).to(ACC),)
    return rows


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """`values` in the dtype of some memory."""
    if DTYPE.primitive_bitwidth == 16:  # not every target goes from float64 to bfloat16 in one step
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def store_row(base, step, stride, offsets, values, there, ALIGN: tl.constexpr):
    """Write one row, (BLOCK,), where `there`, in the dtype of the memory."""
    tl.store(row(base, step, stride, offsets, ALIGN), rounded(values, base.dtype.scalar.element_ty), mask=there)


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up. `triton.cdiv` takes 2 us on the host, and a plan needs five."""
    return -(-a // b)


class Plan:
    """How one launch is cut: what the kernels take by the names of these attributes.

    lanes, inner, strides  outer * inner, inner, and the strides given, one after the other, in units of ALIGN
                           elements: what the compiler must know to make loads wide is in the multiplication
    time, run              time steps in all, and a run
    blocks, items          blocks of lanes; items of work, a block over a run each
    programs               programs that share the items where a launch has at most PROGRAMS
    constants              compile-time arguments: ACC, dtype of differences, squares and sums; ALIGN; INDEX,
                           integer dtype that counts lanes and time steps; BLOCK, lanes a block; UNROLL, time
                           steps that one turn of the loop loads
    """

    def __init__(
        self,
        sizes: Sequence[int],
        strides: Sequence[Sequence[int]],
        tensors: Sequence[Tensor | None],
        dtype: torch.dtype,
    ):
        outer, self.time, inner = sizes
        align = math.gcd(16, inner, *(stride for pair in strides for stride in pair))
        self.lanes, self.inner = outer * inner // align, inner // align
        self.strides = [stride // align for pair in strides for stride in pair]
        widest = max(x.itemsize for x in tensors if x is not None)
        block = THREADS * 16 // widest
        self.blocks = ceil_div(outer * inner, block)
        runs = min(PROGRAMS // self.blocks, self.time // SHORTEST_RUN)
        runs = max(runs, ceil_div(self.time, LONGEST_RUN))
        self.run = ceil_div(ceil_div(self.time, runs), UNROLL) * UNROLL
        self.items = self.blocks * ceil_div(self.time, self.run)
        self.programs = min(self.items, PROGRAMS)
        self.constants: dict[str, Any] = {
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "ALIGN": align,
            "INDEX": tl.int64 if outer * inner * self.time >= LARGE else tl.int32,
            "BLOCK": block,
            "UNROLL": UNROLL,
            "num_warps": WARPS,
            "enable_fp_fusion": True,
        }


def table_of(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernels need to know of packed rows, in one copy to the device: offsets and lengths."""
    time, sequences = len(batch_sizes), int(batch_sizes[0])
    before = 1 + time + UNROLL  # entries at both ends that pointers are made from, but nothing is read by
    table = torch.zeros(before + sequences, dtype=torch.int64, device="cpu")
    torch.cumsum(batch_sizes[:-1], 0, out=table[2 : 1 + time])
    positions = torch.arange(sequences, device="cpu")
    # Batch sizes never grow, so that a sequence has as many steps as there are sizes above its position.
    torch.searchsorted(-batch_sizes, -positions, out=table[before:])
    table = table.to(device, non_blocking=True)
    return table[:before], table[before:]


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one, where Triton launches."""
    return torch.accelerator.device_index(None if device.type == "cpu" else device.index)
