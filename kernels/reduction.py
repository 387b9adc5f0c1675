"""The sum in one launch and a fixed order that all forward kernels share, and what sums are multiplied by.

Every program leaves its partial sums in memory and takes a ticket. The one that draws the last ticket adds all
partial sums, always in the same order, so the result does not depend on which program that was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels.streams import PerStream
from fastreg.kernels.tiling import ends
from fastreg.kernels.view import Layout, Result, Sums, allocate

CHUNK = tl.constexpr(512)  # partial sums, or lengths, that a program loads at once
TICKETS = PerStream(torch.int32, 0)


class Outputs(NamedTuple):
    """What a forward kernel writes, inside the kernel: pointers in ACC to a scalar and to two terms.

    With ADDS the results are added to what is there.
    """

    penalty: Any
    terms: Any
    ADDS: Any


class Scratch(NamedTuple):
    """Memory that programs share, inside a kernel: `(2 * programs,)` partial sums in ACC, and a ticket, int32."""

    partials: Any
    ticket: Any


class Extents(NamedTuple):
    """What divisors are counted from, inside a kernel; nothing where they are given.

    lengths    (sequences,) time steps that count, or None
    marks      of `mark_kernel`, which has counted, or None
    sequences  how many
    time       time steps in all
    hidden     elements a time step of a sequence
    """

    lengths: Any
    marks: Any
    sequences: Any
    time: Any
    hidden: Any


class Weights(NamedTuple):
    """What the two sums are multiplied by, inside a kernel: float64 numbers, or where they are to be found.

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
def scales(weights, extents):
    """Return one over the divisors of AR and of TAR, float64: as given, or counted from lengths or in marks."""
    ar_scale = tl.full((), weights.ar_scale, tl.float64)
    tar_scale = tl.full((), weights.tar_scale, tl.float64)
    if extents.lengths is not None:
        columns = tl.arange(0, CHUNK)
        steps = tl.zeros((CHUNK,), tl.int64)
        pairs = tl.zeros((CHUNK,), tl.int64)
        for first in range(0, extents.sequences, CHUNK):
            sequence = first + columns
            length = ends(extents.lengths, sequence, sequence < extents.sequences, extents.time, tl.int64)
            steps += length
            pairs += tl.maximum(length - 1, 0)
        ar_scale = one_over(tl.sum(steps) * extents.hidden)
        tar_scale = one_over(tl.sum(pairs) * extents.hidden)
    if extents.marks is not None:
        counts = extents.marks.to(tl.pointer_type(tl.int64), bitcast=True)
        ar_scale = one_over(tl.load(counts) * extents.hidden)
        tar_scale = one_over(tl.load(counts + 1) * extents.hidden)
    return ar_scale, tar_scale


@triton.jit(do_not_specialize=["sequences", "time"])
def mark_kernel(valid, marks, sequences, time, CHUNK: tl.constexpr, UNROLL: tl.constexpr):
    """Prepare valid steps for other kernels, in one program: a word for each turn of their loops, and what counts.

        counts = sum of valid[s, t], sum over t > 0 of valid[s, t] * valid[s, t - 1]
        bit k of words[s, j] = valid[s, UNROLL * j + k - 1], for k from 0 to UNROLL + 1

    valid            (sequences, time) int8, 0 or 1
    marks            uint8 out: the memory of (2,) int64 counts, and behind it that of the words, a byte each
    sequences, time  extents
    CHUNK            words that are formed at once
    UNROLL           time steps that one turn loads
    """
    columns = tl.arange(0, CHUNK)
    steps = tl.zeros((CHUNK,), tl.int32)
    pairs = tl.zeros((CHUNK,), tl.int32)
    turns = tl.cdiv(time, UNROLL)
    for first in range(0, tl.cast(sequences, tl.int64) * turns, CHUNK):
        number = first + columns
        sequence = number // turns
        step = number % turns * UNROLL - 1
        word = tl.zeros((CHUNK,), tl.int32)
        before = tl.zeros((CHUNK,), tl.int32)
        for k in tl.static_range(UNROLL + 2):
            there = (sequence < sequences) & (step >= 0) & (step < time)
            now = tl.load(valid + sequence * time + step, mask=there, other=0).to(tl.int32)
            word |= now << k
            if k > 0 and k <= UNROLL:
                steps += now
                pairs += now & before
            before = now
            step += 1
        tl.store(marks + 16 + number, word.to(tl.uint8), mask=sequence < sequences)
    counts = marks.to(tl.pointer_type(tl.int64), bitcast=True)
    tl.store(counts, tl.sum(steps.to(tl.int64)))
    tl.store(counts + 1, tl.sum(pairs.to(tl.int64)))


@triton.jit
def one_over(count):
    """Compute one over a count, float64, or 1 where it is 0."""
    return 1.0 / tl.maximum(count, 1).to(tl.float64)


@triton.jit
def factors(weights, extents, upstream):
    """Return what gradients of the two sums of squares are multiplied by, in the dtype of the upstream gradient.

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
    scratch  of which the ticket is 0 before the launch and after it
    extents  to count divisors
    weights  coefficients and scales
    """
    programs = tl.num_programs(0)
    partial = scratch.partials + tl.program_id(0)
    tl.store(partial, ar)
    tl.store(partial + programs, tar)
    tl.debug_barrier()  # this program's stores come before its ticket, whichever threads make them
    if tl.atomic_add(scratch.ticket, 1, sem="acq_rel") == programs - 1:
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
            tl.debug_barrier()  # every thread has read what one of them is about to overwrite
        tl.store(outputs.penalty, penalty)
        if outputs.terms is not None:
            tl.store(outputs.terms, ar_mean)
            tl.store(outputs.terms + 1, tar_mean)
        tl.store(scratch.ticket, 0)


@triton.jit
def weighted(coefficient, term):
    """Multiply a term by its coefficient; one that is 0 leaves it out, even if it is infinite or NaN."""
    return tl.where(coefficient == 0, 0.0, coefficient.to(term.dtype) * term)


def ticket_for(device: torch.device) -> Tensor:
    """Return a counter, (1,) int32 and 0, that no other launch in flight has; the launch leaves it at 0."""
    if device.type == "cpu":  # the interpreter may be cut off halfway, so nothing is left to the next launch
        return torch.zeros(1, dtype=torch.int32, device=device)
    return TICKETS.exclusive(device)


class SumMemory:
    """Allocate the memory that a forward kernel needs for its sums.

    Args:
        sums: what is computed.
        partials: how many numbers all programs leave in memory.
        device: where they run.
    """

    def __init__(self, sums: Sums, partials: int, device: torch.device) -> None:
        self.device, self.measured = device, sums.measured
        shapes = torch.Size(), torch.Size([2]), torch.Size([partials])
        self.penalty, self.terms, self.partials = (
            Layout(shape, (1,) * len(shape), sums.dtype, device, aligned=True) for shape in shapes
        )

    def allocate(self, before: Result | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return memory for the penalty and its terms, or that of the layers before; for partial sums; a ticket."""
        if before is None:
            penalty, terms = allocate(self.penalty), allocate(self.terms) if self.measured else None
        else:
            penalty, terms, _ = before
        return penalty, terms, allocate(self.partials), ticket_for(self.device)
