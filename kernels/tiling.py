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
    """The memory of a tile's lanes, inside a kernel.

    base     (BLOCK,) pointers at time step 0
    stride   from one time step to the next, in units of ALIGN elements; of packed rows from one row to the next
    offsets  entry `1 + step` is the packed row where a time step begins; None unless packed
    ALIGN    compile-time constant
    """

    base: Any
    stride: Any
    offsets: Any
    ALIGN: Any


@triton.jit
def place(item, blocks, lanes, inner, time, run, ALIGN: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the tile of an item of work."""
    lane = tl.cast(item % blocks, INDEX) * BLOCK + tl.arange(0, BLOCK)
    width = tl.cast(inner, INDEX) * ALIGN
    start = tl.cast(item // blocks, INDEX) * run
    present = lane < tl.cast(lanes, INDEX) * ALIGN
    return Tile(tl.cast(lane // width, tl.int64), lane % width, present, start, tl.minimum(start + run, time))


@triton.jit
def ends(lengths, sequence, present, time, INDEX: tl.constexpr):
    """Load how many time steps each lane's sequence has, (BLOCK,): its length, from 0 to `time`."""
    length = tl.load(lengths + sequence, mask=present, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0), time).to(INDEX)


@triton.jit
def at(x, tile, outer, ALIGN: tl.constexpr):
    """Compute the pointers to a tile's lanes at time step 0, (BLOCK,); `outer` is in units of ALIGN elements."""
    return x + tile.sequence * outer * ALIGN + tile.unit


@triton.jit
def row(rows, step):
    """Compute the pointers to the rows at time step `step`, (BLOCK,)."""
    if rows.offsets is not None:
        step = tl.load(rows.offsets + 1 + step)
    # That offsets are multiples of ALIGN lets the compiler make loads wide. ALIGN comes last, as a stride in 64 bits
    # would take registers that some targets do not have left.
    return rows.base + tl.cast(step, tl.int64) * rows.stride * rows.ALIGN


@triton.jit
def row_behind(rows, first, turn, i: tl.constexpr):
    """Compute the pointers to the rows at time step `turn + i` from those at `turn`, (BLOCK,), which saves products."""
    if rows.offsets is not None:
        return row(rows, turn + i)
    return first + tl.cast(rows.stride, tl.int64) * (i * rows.ALIGN)


@triton.jit
def within(tile, step, stop):
    """Return the mask of lanes with `step < stop`, (BLOCK,); `stop` is one number or one a lane."""
    return tile.present & (tl.full(tile.present.shape, step, tile.start.dtype) < stop)


@triton.jit
def load_mark(valid, tile, step, time):
    """Load the mark of each lane's sequence at time step `step`, (BLOCK,); None if there are no marks.

    Steps that a sequence does not have are those next to them.
    """
    mark = None
    if valid is not None:
        # A load that needs no mask is no branch on AMD, and pointers would take twice the registers of numbers.
        sequence = tl.where(tile.present, tile.sequence, 0).to(tile.start.dtype)
        mark = as_mark(tl.load(valid + (sequence * time + tl.minimum(tl.maximum(step, 0), time - 1))), valid)
    return mark


@triton.jit
def as_mark(loaded, valid):
    """Return marks as loaded from `valid`: bool, or with starts int8, bit 0 for valid and bit 1 for a start."""
    mark = loaded
    if valid.dtype.element_ty == tl.int1:
        mark = loaded != 0
    return mark


@triton.jit
def is_valid(mark):
    """Return whether marked steps count."""
    counts = mark
    if mark.dtype != tl.int1:
        counts = (mark & 1) != 0
    return counts


@triton.jit
def joined(there, before, now):
    """Return whether the change between two marked steps counts; the second step counts where it is `there`."""
    there &= is_valid(before)
    if now.dtype != tl.int1:
        there &= (now & 2) == 0
    return there


@triton.jit
def load_marks(valid, tile, mark, step, time, UNROLL: tl.constexpr):
    """Load the marks of UNROLL steps from time step `step` on, behind that of the step before; () without marks."""
    marks = ()
    if valid is not None:
        marks = (mark,)
        for i in tl.static_range(UNROLL):
            marks += (load_mark(valid, tile, step + i, time),)
    return marks


@triton.jit
def counts_at(tile, marks, i: tl.constexpr, step, stop):
    """Return the mask of lanes that count at time step `step`, (BLOCK,): before `stop`, and valid in mark i."""
    there = within(tile, step, stop)
    if len(marks) > 0:
        there &= is_valid(marks[i])
    return there


@triton.jit
def load_row(rows, step, there, ACC: tl.constexpr):
    """Load one row, (BLOCK,) in ACC, with 0 where not `there`."""
    return tl.load(row(rows, step), mask=there, other=0.0).to(ACC)


@triton.jit
def load_rows(rows, tile, marks, turn, OFFSET: tl.constexpr, stop, ACC: tl.constexpr, UNROLL: tl.constexpr):
    """Load UNROLL rows from time step `turn + OFFSET` on, each (BLOCK,) in ACC, with 0 where lanes do not count.

    All are asked for before the first is used: no store in between keeps the compiler from it.
    """
    loaded = ()
    first = row(rows, turn)
    for i in tl.static_range(OFFSET, OFFSET + UNROLL):
        there = counts_at(tile, marks, i, turn + i, stop)
        loaded += (tl.load(row_behind(rows, first, turn, i), mask=there, other=0.0).to(ACC),)
    return loaded


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Convert values to the dtype of some memory."""
    if DTYPE.primitive_bitwidth == 16:  # not every target goes from float64 to bfloat16 in one step
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def store_row(rows, first, turn, i: tl.constexpr, values, there):
    """Write one row, (BLOCK,), where `there`, in the dtype of the memory."""
    tl.store(row_behind(rows, first, turn, i), rounded(values, rows.base.dtype.scalar.element_ty), mask=there)


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
        outer, time, inner, operands, _ = view
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
