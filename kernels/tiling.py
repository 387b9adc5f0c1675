"""The division of the work, on the host and on the device.

Activations are viewed as `(outer, time, inner)` with a contiguous inner axis. Each of the `outer * inner` positions is
a lane: one unit of one sequence, walked along time. An item of work is a block of lanes over a run of time steps. A
program keeps the previous row of an item in registers, so it reads each row once, plus a halo row at each end of the
run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastreg.kernels.view import View

THREADS = 128  # each loads 16 bytes, so a block of lanes is 2 KB of a row
WARPS = THREADS // (64 if torch.version.hip else 32)
UNROLL = 4  # rows that a thread has in flight: 64 bytes of each tensor, which hides the latency of memory
SHORTEST_RUN = 16  # time steps: halo rows add at most 1/16 to the reads of raw, 1/8 in the backward
SHORT_RUN = 16  # the same where items are fewer than FEW: shorter runs make more programs, and more halo rows
FEW = 512  # items: four for each of an H100's multiprocessors
LONGEST_RUN = 128  # time steps: long float32 sums drift, so a run has its own sum beside the program's
# 7.8 for each of an H100's 132 multiprocessors, where 5 or 6 run at once; more would only add halo rows.
PROGRAMS = 1024
LARGE = 2**30  # elements from which lanes and time steps are counted in 64 bits; memory offsets always have 64


class Tile(NamedTuple):
    """Describe an item of work inside a kernel.

    sequence, unit  (BLOCK,) the sequence and the unit of each lane
    present         (BLOCK,) whether the lane exists
    start, stop     bounds of the run of time steps, in the dtype that counts time steps
    """

    sequence: Any
    unit: Any
    present: Any
    start: Any
    stop: Any


class Rows(NamedTuple):
    """Describe the memory of a tile's lanes in one tensor, inside a kernel.

    base     (BLOCK,) pointers to time step 0
    stride   stride from one row to the next, in units of ALIGN elements
    ALIGN    compile-time constant
    """

    base: Any
    stride: Any
    ALIGN: Any


class Selection(NamedTuple):
    """Say which time steps count, inside a kernel. If bits are None, all of them count.

    bits     (sequences, time) uint8: bit 0 is set if the step counts, bit 1 if the change into it counts; or None
    time     number of steps of a sequence
    """

    bits: Any
    time: Any


@triton.jit
def tile_of(item, blocks, lanes, inner, time, run, ALIGN: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the tile of an item of work."""
    lane = tl.cast(item % blocks, INDEX) * BLOCK + tl.arange(0, BLOCK)
    width = tl.cast(inner, INDEX) * ALIGN
    start = tl.cast(item // blocks, INDEX) * run
    present = lane < tl.cast(lanes, INDEX) * ALIGN
    return Tile(tl.cast(lane // width, tl.int64), lane % width, present, start, tl.minimum(start + run, time))


@triton.jit
def rows_of(x, tile, outer, stride, ALIGN: tl.constexpr):
    """Return the rows of a tile in a tensor, or None for None; strides are in units of ALIGN elements."""
    rows = None
    if x is not None:
        rows = Rows(x + tile.sequence * outer * ALIGN + tile.unit, stride, ALIGN)
    return rows


@triton.jit
def row(rows, number):
    """Compute the pointers to a row, (BLOCK,), from the number of its time step."""
    # The factor ALIGN lets the compiler emit wide loads. ALIGN comes last, because a stride in 64 bits would take
    # registers that some targets do not have left.
    return rows.base + tl.cast(number, tl.int64) * rows.stride * rows.ALIGN


@triton.jit
def row_behind(rows, first, behind: tl.constexpr):
    """Compute the pointers to the row `behind` steps after `first`, without a product."""
    return first + tl.cast(rows.stride, tl.int64) * (behind * rows.ALIGN)


@triton.jit
def within(tile, step, stop):
    """Return which lanes exist, (BLOCK,), or none if `step >= stop`."""
    return tile.present & (tl.full(tile.present.shape, step, tile.start.dtype) < stop)


@triton.jit
def select(selection, tile, step, stop, FIRST: tl.constexpr):
    """Return which lanes count at a time step, (BLOCK,), and in which lanes the change into the step counts.

    No lane counts from `stop` on. With FIRST the step may be the first, into which no change leads.
    """
    counted = within(tile, step, stop)
    joined = counted & within(tile, 0, step) if FIRST else counted
    if selection.bits is not None:
        # On AMD a load without a mask needs no branch. Numbers take half the registers of pointers.
        sequence = tl.where(tile.present, tile.sequence, 0).to(tile.start.dtype)
        loaded = tl.load(selection.bits + (sequence * selection.time + tl.minimum(step, selection.time - 1)))
        joined = counted & ((loaded & 2) != 0)
        counted &= (loaded & 1) != 0
    return counted, joined


@triton.jit
def select_turn(selection, tile, counted, joined, turn, stop, AHEAD: tl.constexpr, UNROLL: tl.constexpr):
    """Return the results of `select` for the time steps from `turn` to `turn + UNROLL`, as two tuples.

    `counted` and `joined` are the results for `turn` itself. With AHEAD the change into `turn` is not needed.
    """
    if selection.bits is None:  # computing it again takes fewer registers than keeping it
        counted, joined = select(selection, tile, turn, stop, not AHEAD)
    there = (counted,)
    into = (joined,)
    for i in tl.static_range(1, UNROLL + 1):
        counted, joined = select(selection, tile, turn + i, stop, not AHEAD)
        there += (counted,)
        into += (joined,)
    return there, into


@triton.jit
def load_row(rows, step, there, ACC: tl.constexpr):
    """Load the row of a time step, (BLOCK,) in ACC, with 0 in lanes that are not `there`."""
    return tl.load(row(rows, step), mask=there, other=0.0).to(ACC)


@triton.jit
def load_rows(rows, turn, there, OFFSET: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr):
    """Load UNROLL rows from time step `turn + OFFSET` on, each (BLOCK,) in ACC, with 0 in lanes that are not `there`.

    Return () if `rows` is None. `there` begins at `turn`. No store comes between the loads, so the compiler
    can request all rows before it uses the first.
    """
    loaded = ()
    if rows is not None:
        first = row(rows, turn)
        for i in tl.static_range(OFFSET, OFFSET + UNROLL):
            loaded += (tl.load(row_behind(rows, first, i), mask=there[i], other=0.0).to(ACC),)
    return loaded


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Convert values to a dtype of memory."""
    if DTYPE.primitive_bitwidth == 16:  # not every target converts float64 to bfloat16 in one step
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def store_row(rows, first, i: tl.constexpr, values, there):
    """Write one row, (BLOCK,), in the dtype of the memory, in the lanes that are `there`."""
    tl.store(row_behind(rows, first, i), rounded(values, rows.base.dtype.scalar.element_ty), mask=there)


def ceil_div(a: int, b: int) -> int:
    """Divide and round up; `triton.cdiv` is a jit function that takes 2 us on the host."""
    return -(-a // b)


class Tiling:
    """Divide the work of one launch, and hold the arguments of the kernel that follow from this.

    numbers    the strides of all operands, and lanes, inner, time, run, blocks and items, as `ar_tar_kernel` takes them
    programs   the number of programs that share the items
    constants  the compile-time arguments from ACC on, as `ar_tar_kernel` takes them
    """

    def __init__(self, view: View, dtype: torch.dtype) -> None:
        outer, time, inner, operands = view
        strides = [stride for x in operands for stride in ((0, 0) if x is None else (x.outer, x.time))]
        align = math.gcd(16, inner, *strides)
        widest = max(x.dtype.itemsize for x in operands if x is not None)
        block = THREADS * 16 // widest
        if align * widest < 8:  # each narrow load needs its own pointer, and a thread needs twice the registers
            block //= 2
        unroll = UNROLL if align * widest > 2 else UNROLL // 2  # loads of 2 bytes need four times the registers
        blocks = ceil_div(outer * inner, block)
        shortest = SHORT_RUN if blocks * (time // SHORTEST_RUN) < FEW else SHORTEST_RUN
        runs = max(min(PROGRAMS // blocks, time // shortest), ceil_div(time, LONGEST_RUN))
        run = ceil_div(ceil_div(time, runs), unroll) * unroll
        items = blocks * ceil_div(time, run)
        self.programs = min(items, PROGRAMS)
        lanes = outer * inner // align
        self.numbers = [*(stride // align for stride in strides), lanes, inner // align, time, run, blocks, items]
        self.constants: dict[str, Any] = {
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "ALIGN": align,
            "INDEX": tl.int64 if outer * inner * time >= LARGE else tl.int32,
            "BLOCK": block,
            "UNROLL": unroll,
        }
