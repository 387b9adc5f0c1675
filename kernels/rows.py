"""The rows of a tile inside a kernel: which lanes and time steps it covers, which of them count, loads and stores."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Describe an item of work inside a kernel.

    sequence, unit  (BLOCK,) the sequence and the unit of each lane
    present         (BLOCK,) whether the lane exists
    start, stop     bounds of the stretch of time steps, in the dtype that counts time steps
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


class StepBits(NamedTuple):
    """Say which time steps count, inside a kernel. If bits are None, all of them count.

    bits     (sequences, time) uint8: bit 0 is set if the step counts, bit 1 if the change into it counts; or None
    time     number of steps of a sequence
    """

    bits: Any
    time: Any


@triton.jit
def tile_of(item, blocks, lanes, inner, time, stretch, ALIGN: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the tile of an item of work."""
    lane = tl.cast(item % blocks, INDEX) * BLOCK + tl.arange(0, BLOCK)
    width = tl.cast(inner, INDEX) * ALIGN
    start = tl.cast(item // blocks, INDEX) * stretch
    present = lane < tl.cast(lanes, INDEX) * ALIGN
    return Tile(tl.cast(lane // width, tl.int64), lane % width, present, start, tl.minimum(start + stretch, time))


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
def steps_at(steps, tile, step, stop, FIRST: tl.constexpr):
    """Return which lanes count at a time step, (BLOCK,), and in which lanes the change into the step counts.

    No lane counts from `stop` on. With FIRST the step may be the first, into which no change leads.
    """
    counted = within(tile, step, stop)
    into = counted & within(tile, 0, step) if FIRST else counted
    if steps.bits is not None:
        # On AMD a load without a mask needs no branch. Numbers take half the registers of pointers.
        sequence = tl.where(tile.present, tile.sequence, 0).to(tile.start.dtype)
        loaded = tl.load(steps.bits + (sequence * steps.time + tl.minimum(step, steps.time - 1)))
        into = counted & ((loaded & 2) != 0)
        counted &= (loaded & 1) != 0
    return counted, into


@triton.jit
def steps_of_turn(steps, tile, counted, into, turn, stop, LEAD: tl.constexpr, UNROLL: tl.constexpr):
    """Return the results of `steps_at` for the time steps from `turn` to `turn + UNROLL`, as two tuples.

    `counted` and `into` are the results for `turn` itself. With LEAD the change into `turn` is not needed.
    """
    if steps.bits is None:  # computing it again takes fewer registers than keeping it
        counted, into = steps_at(steps, tile, turn, stop, not LEAD)
    counted_at = (counted,)
    into_at = (into,)
    for i in tl.static_range(1, UNROLL + 1):
        counted, into = steps_at(steps, tile, turn + i, stop, not LEAD)
        counted_at += (counted,)
        into_at += (into,)
    return counted_at, into_at


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
