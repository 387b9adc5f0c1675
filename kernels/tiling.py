"""How the work is cut, on the host and on the device.

Activations are seen as `(outer, time, inner)` with a contiguous inner axis. The `outer * inner` positions are
lanes: a lane is one unit of one sequence, walked along time. An item of work is a block of lanes over a run of
time steps. It keeps the previous row in registers, so each row is read once, plus a halo row at a run's edge.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastreg.kernels.view import View

THREADS = 128  # with a 16-byte load each a block of lanes is 2 KB of a row
WARPS = THREADS // (64 if torch.version.hip else 32)
UNROLL = 4  # rows in flight a thread: 64 bytes of each tensor, to hide the latency of memory
SHORTEST_RUN = 16  # time steps: halo rows add at most 1/16 to the reads of raw, 1/8 in the backward
LONGEST_RUN = 128  # time steps: float32 sums drift with their length: a run and a program have separate sums
PROGRAMS = 1024  # about 8 for each of an H100's 132 cores, all resident; more would only add halo rows
LARGE = 2**30  # elements from which lanes and time steps are counted in 64 bits; memory offsets always are


class Tile(NamedTuple):
    """Where an item of work lies, inside a kernel.

    sequence, unit  (BLOCK,) of each lane
    present         (BLOCK,) whether there is such a lane
    start, stop     bounds of the run of time steps, in the dtype that counts time steps
    """

    sequence: Any
    unit: Any
    present: Any
    start: Any
    stop: Any


class Rows(NamedTuple):
    """The memory of a tile's lanes in one tensor, inside a kernel.

    base     (BLOCK,) pointers at time step 0
    stride   from one row to the next, in units of ALIGN elements
    ALIGN    compile-time constant
    """

    base: Any
    stride: Any
    ALIGN: Any


class Marks(NamedTuple):
    """The time steps that count, inside a kernel: all, or one of both pointers says which.

    steps    (sequences, time) uint8: bit 0 if a step counts, bit 1 if the change into it does; or None
    offsets  (1 + time,) int64, of packed rows: where each time step begins, and how many rows there are; or None
    time     steps of a sequence
    """

    steps: Any
    offsets: Any
    time: Any


@triton.jit
def place(item, blocks, lanes, inner, time, run, ALIGN: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the tile of an item of work."""
    lane = tl.cast(item % blocks, INDEX) * BLOCK + tl.arange(0, BLOCK)
    width = tl.cast(inner, INDEX) * ALIGN
    start = tl.cast(item // blocks, INDEX) * run
    present = lane < tl.cast(lanes, INDEX) * ALIGN
    return Tile(tl.cast(lane // width, tl.int64), lane % width, present, start, tl.minimum(start + run, time))


@triton.jit
def rows_of(x, tile, outer, stride, ALIGN: tl.constexpr):
    """Find a tile's lanes in a tensor, or None in None; strides are in units of ALIGN elements."""
    rows = None
    if x is not None:
        rows = Rows(x + tile.sequence * outer * ALIGN + tile.unit, stride, ALIGN)
    return rows


@triton.jit
def begins(marks, step, COUNT: tl.constexpr):
    """Load the packed rows at which COUNT time steps from `step` on begin, a tuple; () unless rows are packed."""
    rows = ()
    if marks.offsets is not None:
        for i in tl.static_range(COUNT):
            rows += (tl.load(marks.offsets + tl.minimum(tl.maximum(step + i, 0), marks.time)),)
    return rows


@triton.jit
def row(rows, number):
    """Compute the pointers to a row, (BLOCK,), from its number: of its time step, or that of a packed row."""
    # That numbers are multiplied by ALIGN lets the compiler make loads wide. ALIGN comes last, as a stride in 64 bits
    # would take registers that some targets do not have left.
    return rows.base + tl.cast(number, tl.int64) * rows.stride * rows.ALIGN


@triton.jit
def row_behind(rows, first, packed, i: tl.constexpr, behind: tl.constexpr):
    """Compute the pointers to the row `behind` steps from that at `first`, without a product, or to i of `packed`."""
    if len(packed) > 0:
        return row(rows, packed[i])
    return first + tl.cast(rows.stride, tl.int64) * (behind * rows.ALIGN)


@triton.jit
def within(tile, step, stop):
    """Return the mask of lanes with `step < stop`, (BLOCK,)."""
    return tile.present & (tl.full(tile.present.shape, step, tile.start.dtype) < stop)


@triton.jit
def mark(marks, tile, step, packed, i: tl.constexpr, stop, FIRST: tl.constexpr):
    """Return which lanes count at time step `step`, (BLOCK,), none from `stop` on, and into which a change counts.

    `packed` are `begins`, with those of this step and the next at i and i + 1. With FIRST the step may be the first,
    into which no change leads.
    """
    counts = within(tile, step, stop)
    if len(packed) > 0:  # sizes never grow: a sequence that has a step has the one before
        counts &= tile.sequence < packed[i + 1] - packed[i]
    changes = counts & within(tile, 0, step) if FIRST else counts
    if marks.steps is not None:
        # A load that needs no mask is no branch on AMD, and pointers would take twice the registers of numbers.
        sequence = tl.where(tile.present, tile.sequence, 0).to(tile.start.dtype)
        loaded = tl.load(marks.steps + (sequence * marks.time + tl.minimum(step, marks.time - 1)))
        changes = counts & ((loaded & 2) != 0)
        counts &= (loaded & 1) != 0
    return counts, changes


@triton.jit
def mark_turn(marks, tile, counts, changes, turn, packed, stop, AHEAD: tl.constexpr, UNROLL: tl.constexpr):
    """Return two tuples of `mark` from time step `turn`, where it is `counts` and `changes`, to `turn + UNROLL`.

    With AHEAD the change into `turn` is not asked for.
    """
    if marks.steps is None:  # to compute it again takes fewer registers than to keep it
        counts, changes = mark(marks, tile, turn, packed, 0, stop, not AHEAD)
    there = (counts,)
    into = (changes,)
    for i in tl.static_range(1, UNROLL + 1):
        counts, changes = mark(marks, tile, turn + i, packed, i, stop, not AHEAD)
        there += (counts,)
        into += (changes,)
    return there, into


@triton.jit
def load_row(rows, step, packed, i: tl.constexpr, there, ACC: tl.constexpr):
    """Load the row of a time step, i of `packed`, (BLOCK,) in ACC, with 0 where not `there`."""
    return tl.load(row_behind(rows, row(rows, step), packed, i, 0), mask=there, other=0.0).to(ACC)


@triton.jit
def load_rows(rows, turn, packed, there, OFFSET: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr):
    """Load UNROLL rows from time step `turn + OFFSET` on, each (BLOCK,) in ACC, with 0 where not `there`; () of None.

    `packed` and `there` begin at `turn`. All rows are asked for before the first is used: no store in between keeps the
    compiler from it.
    """
    loaded = ()
    if rows is not None:
        first = row(rows, turn)
        for i in tl.static_range(OFFSET, OFFSET + UNROLL):
            loaded += (tl.load(row_behind(rows, first, packed, i, i), mask=there[i], other=0.0).to(ACC),)
    return loaded


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Convert values to the dtype of some memory."""
    if DTYPE.primitive_bitwidth == 16:  # not every target goes from float64 to bfloat16 in one step
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def store_row(rows, first, packed, i: tl.constexpr, values, there):
    """Write one row, (BLOCK,), where `there`, in the dtype of the memory."""
    tl.store(row_behind(rows, first, packed, i, i), rounded(values, rows.base.dtype.scalar.element_ty), mask=there)


def ceil_div(a: int, b: int) -> int:
    """Divide and round up; `triton.cdiv` is a jit function that takes 2 us on the host."""
    return -(-a // b)


class Tiling:
    """How one launch is cut: arguments that all kernels take.

    numbers    strides of each operand, one after the other, and lanes, inner, time, run, blocks, items: outer * inner
               and inner, like the strides in units of ALIGN elements; time steps in all, and a run; blocks of lanes;
               items of work, a block over a run each
    programs   programs that share the items
    constants  compile-time arguments: ACC, dtype of differences, squares and sums; ALIGN; INDEX, integer dtype that
               counts lanes and time steps; BLOCK, lanes a block; UNROLL, time steps that one turn of the loop loads
    """

    def __init__(self, view: View, dtype: torch.dtype) -> None:
        outer, time, inner, operands = view
        strides = [stride for x in operands for stride in ((0, 0) if x is None else (x.outer, x.time))]
        align = math.gcd(16, inner, *strides)
        widest = max(x.dtype.itemsize for x in operands if x is not None)
        block = THREADS * 16 // widest
        if align * widest < 8:  # narrow loads need a pointer each, and twice the registers
            block //= 2
        unroll = UNROLL if align * widest > 2 else UNROLL // 2  # loads of 2 bytes need four times as many
        blocks = ceil_div(outer * inner, block)
        runs = min(PROGRAMS // blocks, time // SHORTEST_RUN)
        runs = max(runs, ceil_div(time, LONGEST_RUN))
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
            "num_warps": WARPS,
            "enable_fp_fusion": True,
        }
