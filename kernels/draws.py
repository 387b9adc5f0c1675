"""Masks of elementwise dropout inside a kernel, which are drawn from a seed, as cpu_draws.h draws them on CPUs.

Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) turns a counter of 128 bits and a key of
64 bits into 4 random words of 32 bits. The key is the seed. The counter has the number of a lane and that of a group of
8 time steps, so a mask does not depend on tiles. docs/kernels.md fixes the mapping.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastreg.kernels import tiling
from fastreg.kernels.rows import rounded

STEPS_DRAWN = tl.constexpr(tiling.STEPS_DRAWN)
ROUNDS = tl.constexpr(7)  # the fewest that pass all tests of BigCrush


class Draw(NamedTuple):
    """Describe a mask that is drawn, inside a kernel.

    seed       the key, int64
    threshold  an element is dropped if its random number of 16 bits is below
    scale      of elements that are kept, in ACC
    """

    seed: Any
    threshold: Any
    scale: Any


@triton.jit
def draw_of(seed, threshold, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """Load a seed, whose mask is of a dtype of memory: scale = 65536 / (65536 - threshold)."""
    threshold = tl.full((), threshold, tl.int32)
    scale = 65536.0 / (65536 - threshold).to(tl.float64)
    return Draw(tl.load(seed), threshold, rounded(scale, DTYPE).to(ACC))


@triton.jit
def words_of(draw, tile, inner, step, ALIGN: tl.constexpr):
    """Compute the 4 random words of each lane of a tile, (BLOCK,) each, for the group of time steps from `step` on.

    words = philox(counter=(lower half of lane, step / 8, upper half of lane, 0), key=seed)
    lane = sequence * inner + unit, in elements
    """
    lane = tile.sequence * (tl.cast(inner, tl.int64) * ALIGN) + tile.unit
    zero = tl.zeros(lane.shape, tl.uint32)
    group = zero + tl.cast(step // STEPS_DRAWN, tl.uint32)
    return tl.philox(draw.seed, lane.to(tl.uint32), group, (lane >> 32).to(tl.uint32), zero, ROUNDS)


@triton.jit
def drawn_row(draw, words, i: tl.constexpr):
    """Return row i of the mask of a group, (BLOCK,) in ACC; even rows have the lower halves of words."""
    half = words[i // 2] >> 16 if i % 2 else words[i // 2] & 0xFFFF
    return tl.where(half.to(tl.int32) >= draw.threshold, draw.scale, 0.0)
