"""The division of the work of a launch.

Activations are viewed as `(outer, time, inner)` with a contiguous inner axis. Each of the `outer * inner` positions is
a lane: one unit of one sequence, walked along time. An item of work is a block of lanes over a stretch of time steps. A
program keeps the previous row of an item in registers, so it reads each row once, plus a halo row at each end of the
stretch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl

from fastreg.kernels.view import View

THREADS = 128  # each loads 16 bytes, so a block of lanes is 2 KB of a row
WARPS = THREADS // (64 if torch.version.hip else 32)
UNROLL = 4  # rows that a thread has in flight: 64 bytes of each tensor, which hides the latency of memory
STEPS_DRAWN = 8  # rows of a mask that one counter draws: a turn of the loop takes all of them
SHARE_DRAWN = 4  # random numbers take registers, so a block has a quarter of the lanes, but one for each thread
SHORTEST_STRETCH = 16  # time steps: halo rows add at most 1/16 to the reads of raw, 1/8 in the backward
SHORT_STRETCH = 16  # the same where items are fewer than FEW: shorter stretches make more programs, and more halo rows
FEW = 512  # items: four for each of an H100's multiprocessors
LONGEST_STRETCH = 128  # time steps: long float32 sums drift, so a stretch has its own sum beside the program's
# 7.8 for each of an H100's 132 multiprocessors, where 6 to 12 run at once; more would only add halo rows.
PROGRAMS = 1024
LARGE = 2**30  # elements from which lanes and time steps are counted in 64 bits; memory offsets always have 64


def ceil_div(a: int, b: int) -> int:
    """Divide and round up; `triton.cdiv` is a jit function that takes 2 us on the host."""
    return -(-a // b)


class Tiling:
    """Divide the work of one launch, and hold the arguments of the kernel that follow from this.

    numbers    the strides of all operands, lanes, inner, time, stretch, blocks and items, as `ar_tar_kernel` takes them
    programs   the number of programs that share the items
    constants  the compile-time arguments from ACC on, as `ar_tar_kernel` takes them
    """

    def __init__(self, view: View, dtype: torch.dtype) -> None:
        outer, time, inner, operands = view
        strides = operands.strides()
        align = math.gcd(16, inner, *strides)
        draws = operands.draws()
        rows = operands._replace(mask=None) if draws else operands
        widest = max(x.dtype.itemsize for x in rows if x is not None)
        block = THREADS * 16 // widest
        if align * widest < 8:  # each narrow load needs its own pointer, and a thread needs twice the registers
            block //= 2
        unroll = UNROLL if align * widest > 2 else UNROLL // 2  # loads of 2 bytes need four times the registers
        if draws:
            unroll, block = STEPS_DRAWN, max(block // SHARE_DRAWN, THREADS)
        blocks = ceil_div(outer * inner, block)
        shortest = SHORT_STRETCH if blocks * (time // SHORTEST_STRETCH) < FEW else SHORTEST_STRETCH
        stretches = max(min(PROGRAMS // blocks, time // shortest), ceil_div(time, LONGEST_STRETCH))
        stretch = ceil_div(ceil_div(time, stretches), unroll) * unroll
        items = blocks * ceil_div(time, stretch)
        self.programs = min(items, PROGRAMS)
        lanes = outer * inner // align
        self.numbers = [*(stride // align for stride in strides), lanes, inner // align, time, stretch, blocks, items]
        self.constants: dict[str, Any] = {
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "ALIGN": align,
            "INDEX": tl.int64 if outer * inner * time >= LARGE else tl.int32,
            "BLOCK": block,
            "UNROLL": unroll,
        }
