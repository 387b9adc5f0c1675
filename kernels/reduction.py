"""The sum of all programs in one launch, in a fixed order, and the factors of the sums.

Every program leaves its partial sums in memory and draws a ticket. The program that draws the last ticket adds all
partial sums, always in the same order, so the result does not depend on which program this is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

CHUNK = tl.constexpr(512)  # partial sums or counts that the last program loads at once


class Weights(NamedTuple):
    """Hold the factors of the two sums inside a kernel: float64 numbers, or pointers to them.

    alpha, beta          coefficients
    alpha_at, beta_at    pointers to coefficients in memory, which replace the numbers; or None
    ar_scale, tar_scale  one over the divisors, unless there are counts
    counts               pointer to (2,) int64, the numbers of steps and changes that count; or None
    hidden               number of elements in one time step of a sequence
    """

    alpha: Any
    beta: Any
    alpha_at: Any
    beta_at: Any
    ar_scale: Any
    tar_scale: Any
    counts: Any
    hidden: Any


@triton.jit
def coefficients(weights):
    """Return alpha and beta as float64, so that a coefficient in memory has the value of its `item()`."""
    alpha = tl.full((), weights.alpha, tl.float64)
    beta = tl.full((), weights.beta, tl.float64)
    if weights.alpha_at is not None:
        alpha = tl.load(weights.alpha_at).to(tl.float64)
    if weights.beta_at is not None:
        beta = tl.load(weights.beta_at).to(tl.float64)
    return alpha, beta


@triton.jit
def scales(weights):
    """Return one over the divisors of AR and of TAR, as float64: the given scales, or scales from the counts."""
    ar_scale = tl.full((), weights.ar_scale, tl.float64)
    tar_scale = tl.full((), weights.tar_scale, tl.float64)
    if weights.counts is not None:
        ar_scale = one_over(tl.load(weights.counts) * weights.hidden)
        tar_scale = one_over(tl.load(weights.counts + 1) * weights.hidden)
    return ar_scale, tar_scale


@triton.jit
def one_over(count):
    """Compute one over a count as float64, or 1 if the count is 0."""
    return 1.0 / tl.maximum(count, 1).to(tl.float64)


@triton.jit
def factors(weights, upstream):
    """Return the factors of the gradients of both sums of squares, in the dtype of the upstream gradient.

        2 * alpha * ar_scale * upstream, 2 * beta * tar_scale * upstream

    The upstream gradient is multiplied last, because its product with only a coefficient may overflow.
    """
    alpha, beta = coefficients(weights)
    ar_scale, tar_scale = scales(weights)
    ar_factor = (2 * alpha * ar_scale).to(upstream.dtype)
    tar_factor = (2 * beta * tar_scale).to(upstream.dtype)
    return ar_factor * upstream, tar_factor * upstream


@triton.jit
def finish(ar, tar, partials, ticket, weights, penalty, terms):
    """Let the last program add up the partial sums of all programs, and write the penalty and its terms.

        terms = ar_scale * sum of ar, tar_scale * sum of tar
        penalty = alpha * terms[0] + beta * terms[1], without a term whose coefficient is 0

    ar, tar         scalars, this program's partial sums of squares
    partials        (2, programs) in ACC, the sums of all programs
    ticket          (1,) int32, a counter for `is_last`
    weights         coefficients and scales
    penalty, terms  () and (2,) out in ACC; terms may be None
    """
    programs = tl.num_programs(0)
    tl.store(partials + tl.program_id(0), ar)
    tl.store(partials + programs + tl.program_id(0), tar)
    if is_last(ticket):
        dtype: tl.constexpr = ar.dtype
        columns = tl.arange(0, CHUNK)
        ar_sums = tl.zeros((CHUNK,), dtype)
        tar_sums = tl.zeros((CHUNK,), dtype)
        for first in range(0, programs, CHUNK):
            there = first + columns < programs
            at = partials + first + columns
            # .cg: past the L1 cache, which other programs' stores do not reach
            ar_sums += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            tar_sums += tl.load(at + programs, mask=there, other=0.0, cache_modifier=".cg")
        alpha, beta = coefficients(weights)
        ar_scale, tar_scale = scales(weights)
        ar_mean = tl.sum(ar_sums) * ar_scale.to(dtype)
        tar_mean = tl.sum(tar_sums) * tar_scale.to(dtype)
        tl.store(penalty, weighted(alpha, ar_mean) + weighted(beta, tar_mean))
        if terms is not None:
            tl.store(terms, ar_mean)
            tl.store(terms + 1, tar_mean)


@triton.jit
def is_last(ticket):
    """Draw a ticket after all stores of this program; return whether it is the last ticket of the launch.

    The ticket, (1,) int32, is a multiple of the number of programs before the launch and after it.
    """
    programs = tl.num_programs(0)
    tl.debug_barrier()  # the stores of all threads of this program come before its ticket
    last = (tl.atomic_add(ticket, 1, sem="acq_rel") + 1) % programs == 0
    if last:
        tl.atomic_add(ticket, 0 - programs, sem="relaxed")  # a store of 0 would undo the tickets of others
    return last


@triton.jit
def weighted(coefficient, term):
    """Multiply a term by its coefficient; a coefficient of 0 leaves the term out, even if it is infinite or NaN."""
    return tl.where(coefficient == 0, 0.0, coefficient.to(term.dtype) * term)
