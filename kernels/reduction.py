"""The sum in one launch and a fixed order that all forward kernels share, and the factors of the sums.

Every program leaves its partial sums in memory and takes a ticket. The one that draws the last ticket adds all
partial sums, always in the same order, so the result does not depend on which program that was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastreg.kernels.streams import PerStream
from fastreg.kernels.tiling import as_mark, ends, is_valid, joined
from fastreg.kernels.view import Layout, Result, Sums, allocate

CHUNK = tl.constexpr(512)  # partial sums, lengths, sequences, or counts that a program loads at once
STEPS = tl.constexpr(1024)  # valid steps that a program loads at once
FEW = tl.constexpr(8192)  # valid steps up to which each program counts all of them: 64 a thread
TICKETS = PerStream(torch.int32, 0)


class Outputs(NamedTuple):
    """The outputs of a forward kernel, inside the kernel: pointers in ACC to a scalar and to two terms.

    With ADDS the results are added to the values in memory.
    """

    penalty: Any
    terms: Any
    ADDS: Any


class Scratch(NamedTuple):
    """Memory that programs share, inside a kernel: `(2 * programs,)` partial sums in ACC, and a ticket, int32."""

    partials: Any
    ticket: Any


class Extents(NamedTuple):
    """The sources of the divisors, inside a kernel; neither lengths nor valid if the divisors are numbers.

    lengths    (sequences,) time steps that count, or None
    valid      (sequences, time) marks of time steps that count, or None
    counted    of `count_kernel`, where it has counted valid
    sequences  how many; 0 where nothing is to be read
    time       time steps in all
    hidden     elements a time step of a sequence
    """

    lengths: Any
    valid: Any
    counted: Any
    sequences: Any
    time: Any
    hidden: Any


class Weights(NamedTuple):
    """The factors of the two sums, inside a kernel: float64 numbers, or pointers to them.

    alpha, beta          coefficients
    alpha_at, beta_at    pointers to scalars that take the place of the coefficients, or None
    ar_scale, tar_scale  one over the divisors, unless they are counted
    """

    alpha: Any
    beta: Any
    alpha_at: Any
    beta_at: Any
    ar_scale: Any
    tar_scale: Any


@triton.jit
def coefficients(weights, dtype: tl.constexpr):
    """Return alpha and beta, float64; those in memory as the dtype of the computation has them."""
    alpha = tl.full((), weights.alpha, tl.float64)
    beta = tl.full((), weights.beta, tl.float64)
    if weights.alpha_at is not None:
        alpha = tl.load(weights.alpha_at).to(dtype).to(tl.float64)
    if weights.beta_at is not None:
        beta = tl.load(weights.beta_at).to(dtype).to(tl.float64)
    return alpha, beta


@triton.jit
def count(valid, start, stop, time):
    """Count valid steps from number `start` to `stop` of all sequences' together, and changes between two of them.

    Returns:
        steps, pairs, int64.
    """
    columns = tl.arange(0, STEPS)
    steps = tl.zeros((STEPS,), tl.int32)
    pairs = tl.zeros((STEPS,), tl.int32)
    for first in range(start, stop, STEPS):
        at = first + columns
        now = as_mark(tl.load(valid + at, mask=at < stop, other=0), valid)
        before = as_mark(tl.load(valid + (at - 1), mask=(at > 0) & (at < stop), other=0), valid)
        steps += is_valid(now).to(tl.int32)
        pairs += joined(is_valid(now), before, now).to(tl.int32)
    # Between the sequences there is no change. A division for each of them takes less time than one for each step.
    number = tl.arange(0, CHUNK)
    between = tl.zeros((CHUNK,), tl.int32)
    sequences = tl.cdiv(stop, time)
    for first in range(tl.maximum(tl.cdiv(start, time), 1), sequences, CHUNK):
        there = first + number < sequences
        at = (first + number) * time
        now = as_mark(tl.load(valid + at, mask=there, other=0), valid)
        before = as_mark(tl.load(valid + (at - 1), mask=there, other=0), valid)
        between += joined(is_valid(now), before, now).to(tl.int32)
    return tl.sum(steps.to(tl.int64)), tl.sum(pairs.to(tl.int64)) - tl.sum(between.to(tl.int64))


@triton.jit(do_not_specialize=["valid", "total", "time"])
def count_kernel(valid, counts, total, time, INDEX: tl.constexpr):
    """Count valid steps, a share in each program.

    valid   (sequences, time) marks
    counts  memory out of (2, programs) int64: steps, and pairs of steps that follow each other
    total   steps of all sequences
    time    steps of a sequence
    INDEX   integer dtype that counts steps
    """
    programs = tl.num_programs(0)
    share = tl.cast(tl.cdiv(total, programs), INDEX)
    start = tl.program_id(0) * share
    steps, pairs = count(valid, start, tl.minimum(start + share, total), time)
    counts = counts.to(tl.pointer_type(tl.int64), bitcast=True) + tl.program_id(0)
    tl.store(counts, steps)
    tl.store(counts + programs, pairs)


@triton.jit
def scales(weights, extents):
    """Return one over the divisors of AR and of TAR, float64: as given, or counted from lengths or valid steps."""
    ar_scale = tl.full((), weights.ar_scale, tl.float64)
    tar_scale = tl.full((), weights.tar_scale, tl.float64)
    columns = tl.arange(0, CHUNK)
    if extents.lengths is not None:
        lane_steps = tl.zeros((CHUNK,), tl.int64)
        lane_pairs = tl.zeros((CHUNK,), tl.int64)
        for first in range(0, extents.sequences, CHUNK):
            sequence = first + columns
            length = ends(extents.lengths, sequence, sequence < extents.sequences, extents.time, tl.int64)
            lane_steps += length
            lane_pairs += tl.maximum(length - 1, 0)
        ar_scale = one_over(tl.sum(lane_steps) * extents.hidden)
        tar_scale = one_over(tl.sum(lane_pairs) * extents.hidden)
    if extents.valid is not None:
        total = tl.cast(extents.sequences, tl.int64) * extents.time
        parts = tl.where(total <= FEW, 0, tl.minimum(tl.cdiv(total, FEW // 2), CHUNK)).to(tl.int32)
        steps, pairs = count(extents.valid, 0, tl.where(parts == 0, total, 0).to(tl.int32), extents.time)
        counted = extents.counted.to(tl.pointer_type(tl.int64), bitcast=True) + columns
        steps += tl.sum(tl.load(counted, mask=columns < parts, other=0))
        pairs += tl.sum(tl.load(counted + parts, mask=columns < parts, other=0))
        ar_scale = one_over(steps * extents.hidden)
        tar_scale = one_over(pairs * extents.hidden)
    return ar_scale, tar_scale


@triton.jit
def one_over(count):
    """Compute one over a count, float64, or 1 where it is 0."""
    return 1.0 / tl.maximum(count, 1).to(tl.float64)


@triton.jit
def factors(weights, extents, upstream):
    """Return the factors of the gradients of both sums of squares, in the dtype of the upstream gradient.

        2 * alpha * ar_scale * upstream, 2 * beta * tar_scale * upstream

    The upstream gradient comes last: with a coefficient alone it may overflow.
    """
    alpha, beta = coefficients(weights, upstream.dtype)
    ar_scale, tar_scale = scales(weights, extents)
    ar_factor = (2 * alpha * ar_scale).to(upstream.dtype)
    tar_factor = (2 * beta * tar_scale).to(upstream.dtype)
    return ar_factor * upstream, tar_factor * upstream


@triton.jit
def finish(ar, tar, outputs, scratch, extents, weights):
    """Add up the partial sums of all programs, in the last of them, and write the penalty and its terms.

        terms = ar_scale * sum of ar, tar_scale * sum of tar
        penalty = alpha * terms[0] + beta * terms[1], without a term whose coefficient is 0

    ar, tar  scalars, this program's partial sums of squares
    outputs  where to
    scratch  its ticket is a multiple of the number of programs before the launch and after it
    extents  to count divisors
    weights  coefficients and scales
    """
    programs = tl.num_programs(0)
    partial = scratch.partials + tl.program_id(0)
    tl.store(partial, ar)
    tl.store(partial + programs, tar)
    tl.debug_barrier()  # this program's stores come before its ticket, whichever threads make them
    if (tl.atomic_add(scratch.ticket, 1, sem="acq_rel") + 1) % programs == 0:
        dtype: tl.constexpr = ar.dtype
        columns = tl.arange(0, CHUNK)
        ar_sums = tl.zeros((CHUNK,), dtype)
        tar_sums = tl.zeros((CHUNK,), dtype)
        for first in range(0, programs, CHUNK):
            there = first + columns < programs
            at = scratch.partials + first + columns
            # .cg: past the L1 cache, which other programs' stores do not reach
            ar_sums += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            tar_sums += tl.load(at + programs, mask=there, other=0.0, cache_modifier=".cg")
        alpha, beta = coefficients(weights, dtype)
        ar_scale, tar_scale = scales(weights, extents)
        ar_mean = tl.sum(ar_sums) * ar_scale.to(dtype)
        tar_mean = tl.sum(tar_sums) * tar_scale.to(dtype)
        penalty = weighted(alpha, ar_mean) + weighted(beta, tar_mean)
        if outputs.ADDS:
            penalty += tl.load(outputs.penalty)
            if outputs.terms is not None:
                ar_mean += tl.load(outputs.terms)
                tar_mean += tl.load(outputs.terms + 1)
            tl.debug_barrier()  # all threads must read before one overwrites
        tl.store(outputs.penalty, penalty)
        if outputs.terms is not None:
            tl.store(outputs.terms, ar_mean)
            tl.store(outputs.terms + 1, tar_mean)
        tl.atomic_add(scratch.ticket, 0 - programs, sem="relaxed")  # a store of 0 would undo the tickets of others


@triton.jit
def weighted(coefficient, term):
    """Multiply a term by its coefficient; one that is 0 leaves it out, even if it is infinite or NaN."""
    return tl.where(coefficient == 0, 0.0, coefficient.to(term.dtype) * term)


def ticket_for(device: torch.device, programs: int) -> Tensor:
    """Return a counter, (1,) int32, for a launch of so many programs on the current stream; the launch leaves it at 0.

    docs/kernels.md says why launches that share it, on streams of one handle, can not spoil it for those after them.
    """
    if device.type == "cpu":  # the interpreter may be cut off halfway, so nothing is left to the next launch
        return torch.zeros(1, dtype=torch.int32, device=device)
    return TICKETS.exclusive(device, driver.active.get_current_stream(device.index), programs)


class SumMemory:
    """Allocate the memory that a forward kernel needs for its sums.

    Args:
        sums: the sums to compute.
        programs: of a launch; each leaves up to three numbers in memory.
        device: where they run.
    """

    def __init__(self, sums: Sums, programs: int, device: torch.device) -> None:
        self.device, self.programs, self.measured = device, programs, sums.measured
        shapes = torch.Size(), torch.Size([2]), torch.Size([3 * programs])
        self.penalty, self.terms, self.partials = (
            Layout(shape, (1,) * len(shape), sums.dtype, device, aligned=True) for shape in shapes
        )

    def allocate(self, before: Result | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return memory for the penalty and its terms, or that of the layers before; for partial sums; a ticket."""
        if before is None:
            penalty, terms = allocate(self.penalty), allocate(self.terms) if self.measured else None
        else:
            penalty, terms, _ = before
        return penalty, terms, allocate(self.partials), ticket_for(self.device, self.programs)
