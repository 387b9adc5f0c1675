"""AR and TAR on GPUs: one kernel that computes penalties, applies dropout and writes gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.kernels.draws import draw_of, drawn_row, words_of
from fastreg.kernels.reduction import Weights, factors, finish
from fastreg.kernels.rows import (
    StepBits,
    load_row,
    load_rows,
    rounded,
    row,
    rows_of,
    steps_at,
    steps_of_turn,
    store_row,
    tile_of,
)


@triton.jit(
    do_not_specialize=[  # values that differ from batch to batch must not compile new code
        *("upstream", "partials", "ticket", "bits", "counts", "alpha_at", "beta_at"),
        *("threshold", "raw_outer", "raw_time", "mask_outer", "mask_time"),
        *("upstream_dropped_outer", "upstream_dropped_time"),
        *("dropped_outer", "dropped_time", "grad_raw_outer", "grad_raw_time"),
        *("grad_dropped_outer", "grad_dropped_time", "lanes", "inner", "time", "stretch", "blocks", "items"),
    ]
)
def ar_tar_kernel(
    ticket,
    raw,
    mask,
    upstream_dropped,
    dropped,
    grad_raw,
    grad_dropped,
    upstream,
    partials,
    penalty,
    terms,
    bits,
    counts,
    alpha_at,
    beta_at,
    alpha: tl.float64,
    beta: tl.float64,
    threshold,
    raw_outer,
    raw_time,
    mask_outer,
    mask_time,
    upstream_dropped_outer,
    upstream_dropped_time,
    dropped_outer,
    dropped_time,
    grad_raw_outer,
    grad_raw_time,
    grad_dropped_outer,
    grad_dropped_time,
    lanes,
    inner,
    time,
    stretch,
    blocks,
    items,
    ar_scale: tl.float64,
    tar_scale: tl.float64,
    SUM_AR: tl.constexpr,
    SUM_TAR: tl.constexpr,
    GRAD_AR: tl.constexpr,
    GRAD_TAR: tl.constexpr,
    AR_OF_RAW: tl.constexpr,
    LOCKED: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Compute the penalty of activations, and apply a dropout mask; or write the gradients of both.

    A forward has a penalty, and sums; a backward has none, and writes gradients. A switch or an operand selects each
    part:

        dropped[t] = raw[t] * mask[t]                                       if there is a mask
        ar = ar_scale * sum over t of dropped[t] ** 2                       SUM_AR
        tar = tar_scale * sum over t > 0 of (raw[t] - raw[t - 1]) ** 2      SUM_TAR
        penalty = alpha * ar + beta * tar
        grad_dropped[t] = upstream * 2 * alpha * ar_scale * dropped[t]      GRAD_AR
        grad_raw[t] = (upstream_dropped[t] + grad_dropped[t]) * mask[t]     if there is a mask
                      + upstream * 2 * beta * tar_scale * ((raw[t] - raw[t - 1]) - (raw[t + 1] - raw[t]))    GRAD_TAR

    With AR_OF_RAW, dropped is raw itself: ar is the mean square of raw, and its gradient is a part of grad_raw.
    Steps and changes that do not count are in no sum. Their only gradient is the upstream gradient of dropped.

    ticket                  (1,) int32, a counter for `is_last`; None in a backward, like partials and penalty
    raw, dropped            (outer, time, inner), or None if no part of this call reads it; a forward that has a mask
                            writes dropped
    mask                    the same shape, already scaled, with one row for all time steps if LOCKED; or a seed,
                            () int64, from which the mask is drawn; or None
    upstream_dropped        the same shape, the upstream gradient of dropped, in a call that has a mask; or None
    grad_raw, grad_dropped  out, the same shape, or None if the gradient is not needed
    upstream                () in ACC, the upstream gradient of the penalty; None in a forward, and if there is none
    partials                (2, programs) in ACC, the partial sums of each program for AR and TAR
    penalty                 () out in ACC
    terms                   (2,) out in ACC: ar and tar; None if the caller does not want them
    bits                    as in `StepBits`
    counts                  (2,) int64, the numbers of steps and changes that count; None if the scales are known
    alpha_at, beta_at       () coefficients in memory, or None
    alpha, beta             coefficients that are not in memory
    threshold               as in `Draw`, if the mask is drawn, and then UNROLL is 8, which divides stretch; or None
    *_outer, *_time         strides in units of ALIGN elements; the inner axis is contiguous
    lanes, inner            outer * inner and inner, in units of ALIGN elements
    time, stretch           the number of time steps, and the number of time steps in a stretch
    blocks, items           the number of blocks of lanes, and of items of work; an item is a block over a stretch
    ar_scale, tar_scale     one over the divisors of the sums
    LOCKED                  the mask is the same at all time steps
    ACC                     dtype of differences, products and sums
    ALIGN                   greatest power of two up to 16 that divides inner and every stride
    INDEX                   integer dtype that counts lanes and time steps
    BLOCK, UNROLL           lanes in a block; time steps that one turn of the loop loads
    """
    program = tl.program_id(0)
    weights = Weights(alpha, beta, alpha_at, beta_at, ar_scale, tar_scale, counts, inner * ALIGN)
    steps = StepBits(bits, time)
    DRAWN: tl.constexpr = threshold is not None
    DROPS: tl.constexpr = penalty is not None and mask is not None
    MASKED_AR: tl.constexpr = GRAD_AR and mask is not None
    READS_RAW: tl.constexpr = raw is not None and (DROPS or SUM_AR or SUM_TAR or GRAD_AR or GRAD_TAR)
    LEAD: tl.constexpr = 1 if GRAD_TAR and grad_raw is not None else 0  # rows loaded before use, as the gradient needs
    CHANGES: tl.constexpr = SUM_TAR or LEAD
    if GRAD_AR or GRAD_TAR:
        ar_factor, tar_factor = factors(weights, tl.load(upstream))
    if DRAWN:
        draw = draw_of(mask, threshold, raw.dtype.element_ty, ACC)
    ar = tl.full((), 0.0, ACC)
    tar = tl.full((), 0.0, ACC)
    for item in range(program, items, tl.num_programs(0)):
        tile = tile_of(item, blocks, lanes, inner, time, stretch, ALIGN, INDEX, BLOCK)
        stop = time if LEAD else tile.stop
        raw_rows = rows_of(raw, tile, raw_outer, raw_time, ALIGN)
        mask_rows = rows_of(None if DRAWN else mask, tile, mask_outer, mask_time, ALIGN)
        upstream_dropped_rows = rows_of(upstream_dropped, tile, upstream_dropped_outer, upstream_dropped_time, ALIGN)
        dropped_rows = rows_of(dropped, tile, dropped_outer, dropped_time, ALIGN)
        grad_raw_rows = rows_of(grad_raw, tile, grad_raw_outer, grad_raw_time, ALIGN)
        grad_dropped_rows = rows_of(grad_dropped, tile, grad_dropped_outer, grad_dropped_time, ALIGN)
        counted, into = steps_at(steps, tile, tile.start, stop, True)
        if CHANGES:  # the last row that was read, and with LEAD the change into it
            last = load_row(raw_rows, tile.start - 1, into, ACC)
            if LEAD:
                first = load_row(raw_rows, tile.start, counted, ACC)
                change_into = tl.where(into, first - last, 0.0)
                last = first
        if LOCKED:
            mask_row = load_row(mask_rows, 0, tile.present, ACC)
        ar_stretch = tl.zeros((BLOCK,), ACC)
        tar_stretch = tl.zeros((BLOCK,), ACC)
        for turn in tl.range(tile.start, tile.stop, UNROLL, num_stages=1):  # rows go to registers
            counted_at, into_at = steps_of_turn(steps, tile, counted, into, turn, stop, LEAD, UNROLL)
            counted, into = counted_at[UNROLL], into_at[UNROLL]
            whole = StepBits(None, time)
            inside = steps_of_turn(whole, tile, counted, into, turn, stop, LEAD, UNROLL)[0]
            if dropped is not None:
                dropped_first = row(dropped_rows, turn)
            if grad_raw is not None:
                grad_raw_first = row(grad_raw_rows, turn)
            if grad_dropped is not None:
                grad_dropped_first = row(grad_dropped_rows, turn)
            if READS_RAW:
                raws = load_rows(raw_rows, turn, inside if DROPS else counted_at, LEAD, ACC, UNROLL)
            if mask is None:
                droppeds = load_rows(dropped_rows, turn, counted_at, 0, ACC, UNROLL)
            if not LOCKED:
                masks = load_rows(mask_rows, turn, inside, 0, ACC, UNROLL)
            if DRAWN:
                words = words_of(draw, tile, inner, turn, ALIGN)
            upstreams = load_rows(upstream_dropped_rows, turn, inside, 0, ACC, UNROLL)
            for i in tl.static_range(UNROLL):
                if READS_RAW:
                    current = last if LEAD else raws[i]
                if CHANGES:
                    change = tl.where(into_at[i + LEAD], raws[i] - last, 0.0)
                if DRAWN:
                    mask_row = drawn_row(draw, words, i)
                elif mask is not None and not LOCKED:
                    mask_row = masks[i]
                if DROPS or MASKED_AR:
                    kept = rounded(current * mask_row, raw.dtype.element_ty)
                    if DROPS:
                        store_row(dropped_rows, dropped_first, i, kept, inside[i])
                    kept = kept.to(ACC)
                elif dropped is not None:
                    kept = droppeds[i]
                if grad_raw is not None:
                    own = tl.zeros((BLOCK,), ACC)
                    if GRAD_TAR:
                        own = tar_factor * (change_into - change)
                    if GRAD_AR and AR_OF_RAW:  # an explicit fma, because a compiler might fuse the other product
                        own = tl.fma(ar_factor, current, own) if GRAD_TAR else ar_factor * current
                    if bits is not None:  # exactly 0 in padding, even if the factor is infinite or NaN
                        own = tl.where(counted_at[i], own, 0.0)
                    gradient = own
                    if upstream_dropped is not None or MASKED_AR:
                        through = upstreams[i] if upstream_dropped is not None else tl.zeros((BLOCK,), ACC)
                        if MASKED_AR:
                            through += tl.where(counted_at[i], ar_factor * kept, 0.0)
                        gradient = own + through * mask_row
                    store_row(grad_raw_rows, grad_raw_first, i, gradient, inside[i])
                if SUM_TAR:
                    tar_stretch += change * change
                if SUM_AR:
                    squared = current if AR_OF_RAW else kept
                    if DROPS:  # an explicit fma takes 63 registers instead of 85 in bfloat16 on sm_90
                        squared = tl.where(counted_at[i], squared, 0.0)
                        ar_stretch = tl.fma(squared, squared, ar_stretch)
                    else:
                        ar_stretch += squared * squared
                if grad_dropped is not None:
                    own = ar_factor * kept
                    if bits is not None:  # as above
                        own = tl.where(counted_at[i], own, 0.0)
                    store_row(grad_dropped_rows, grad_dropped_first, i, own, inside[i])
                if CHANGES:
                    last = raws[i]
                    if LEAD:
                        change_into = change
        ar += tl.sum(ar_stretch)
        tar += tl.sum(tar_stretch)
    if penalty is not None:
        finish(ar, tar, partials, ticket, weights, penalty, terms)
