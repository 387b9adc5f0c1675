"""AR and TAR: the forward and the backward kernel, each with the function that launches it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels.reduction import finish, ticket_for
from fastreg.kernels.tiling import Plan, at, current_device, ends, load_rows, place, row, store_row, table_of, within


@triton.jit(
    do_not_specialize=[  # what differs from batch to batch must not decide what is compiled
        *("ticket", "lengths", "offsets", "raw_outer", "raw_time", "dropped_outer", "dropped_time"),
        *("lanes", "inner", "time", "run", "blocks", "items"),
    ]
)
def penalty_forward(
    raw,
    dropped,
    penalty,
    terms,
    scales,
    partials,
    ticket,
    lengths,
    offsets,
    raw_outer,
    raw_time,
    dropped_outer,
    dropped_time,
    lanes,
    inner,
    time,
    run,
    blocks,
    items,
    alpha: tl.float64,
    beta: tl.float64,
    ar_scale: tl.float64,
    tar_scale: tl.float64,
    SAME: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sum the squares of `dropped` and of the changes of `raw` over time, and combine them.

    raw, dropped         (outer, time, inner), or None for a term that is off
    penalty              () out in ACC: alpha * ar + beta * tar
    terms                (2,) out in ACC: ar and tar
    scales               (2,) out in ACC: one over the divisors, found from lengths; None where they are given
    partials             (2 * programs,) in ACC, memory for partial sums
    ticket               (1,) int32, 0 before the launch and after it
    lengths              (outer,) integers, how many time steps of a sequence count; None if all do
    offsets              (1 + time + UNROLL,) int64, None unless packed: `1 + step` has the row where a step begins
    *_outer, *_time      strides in units of ALIGN elements; the inner axis is contiguous
    lanes, inner         outer * inner and inner, in units of ALIGN elements
    time, run            time steps in all, and a run
    blocks, items        blocks of lanes, and items of work: a block over a run each
    alpha, beta          coefficients
    ar_scale, tar_scale  one over the divisors of the sums, where scales is None
    SAME                 `dropped` is `raw`, given as `raw` alone: AR is on, too
    ACC                  dtype of differences, squares and sums
    ALIGN                greatest power of two up to 16 that divides inner and every stride
    INDEX                integer dtype that counts lanes and time steps
    BLOCK, UNROLL        lanes a block; time steps that one turn of the loop loads
    """
    ar = tl.full((), 0.0, ACC)
    tar = tl.full((), 0.0, ACC)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        sequence, unit, present, start, stop = place(item, blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
        stops = stop
        if lengths is not None:
            stops = tl.minimum(ends(lengths, sequence, present, time, INDEX), stop)
            stop = tl.max(stops)
        if raw is not None:
            raw_base = at(raw, sequence, unit, raw_outer, ALIGN)
            halo = within(present, 0, start, INDEX) & within(present, start, stops, INDEX)
            previous = tl.load(row(raw_base, start - 1, raw_time, offsets, ALIGN), mask=halo, other=0.0).to(ACC)
        if dropped is not None:
            dropped_base = at(dropped, sequence, unit, dropped_outer, ALIGN)
        ar_run = tl.zeros((BLOCK,), ACC)
        tar_run = tl.zeros((BLOCK,), ACC)
        for turn in range(start, stop, UNROLL):
            if raw is not None:
                raws = load_rows(raw_base, turn, stops, raw_time, offsets, present, ACC, ALIGN, INDEX, UNROLL)
            if dropped is not None:
                droppeds = load_rows(
                    dropped_base, turn, stops, dropped_time, offsets, present, ACC, ALIGN, INDEX, UNROLL
                )
            for i in tl.static_range(UNROLL):
                if raw is not None:
                    paired = within(present, turn + i, stops, INDEX) & within(present, 0, turn + i, INDEX)
                    change = tl.where(paired, raws[i] - previous, 0.0)
                    tar_run += change * change
                    previous = raws[i]
                    if SAME:
                        ar_run += raws[i] * raws[i]
                if dropped is not None:
                    ar_run += droppeds[i] * droppeds[i]
        ar += tl.sum(ar_run)
        tar += tl.sum(tar_run)
    finish(
        ar,
        tar,
        penalty,
        terms,
        scales,
        partials,
        ticket,
        lengths,
        lanes // inner,
        time,
        inner * ALIGN,
        alpha,
        beta,
        ar_scale,
        tar_scale,
    )


@triton.jit(
    do_not_specialize=[
        *("grad", "scales", "lengths", "offsets", "raw_outer", "raw_time", "dropped_outer", "dropped_time"),
        *("grad_raw_outer", "grad_raw_time", "grad_dropped_outer", "grad_dropped_time"),
        *("lanes", "inner", "time", "run", "blocks"),
    ]
)
def penalty_backward(
    grad,
    raw,
    dropped,
    grad_raw,
    grad_dropped,
    scales,
    lengths,
    offsets,
    raw_outer,
    raw_time,
    dropped_outer,
    dropped_time,
    grad_raw_outer,
    grad_raw_time,
    grad_dropped_outer,
    grad_dropped_time,
    lanes,
    inner,
    time,
    run,
    blocks,
    ar_factor: tl.float64,
    tar_factor: tl.float64,
    SAME: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write the gradients: `ar_factor * dropped`, and `tar_factor` times each change less the next, times grad.

    grad                    () in ACC, the gradient of the penalty
    raw, dropped            (outer, time, inner), or None where no gradient is asked for
    grad_raw, grad_dropped  out, of the same shape and dtype, or None likewise
    scales                  (2,) in ACC, one over the divisors of the sums; None where the factors hold them
    lengths                 (outer,) integers, how many time steps of a sequence count; None if all do
    offsets                 (1 + time + UNROLL,) int64, None unless packed: `1 + step` has the row where a step begins
    *_outer, *_time         strides in units of ALIGN elements; the inner axis is contiguous
    lanes, inner            outer * inner and inner, in units of ALIGN elements
    time, run               time steps in all, and a run
    blocks                  blocks of lanes; a program takes one over one run
    ar_factor, tar_factor   2 * alpha and 2 * beta over the divisors of the sums
    SAME                    `dropped` is `raw`, given as `raw` alone: grad_raw takes both terms
    ACC                     dtype of differences and products
    ALIGN                   greatest power of two up to 16 that divides inner and every stride
    INDEX                   integer dtype that counts lanes and time steps
    BLOCK, UNROLL           lanes a block; time steps that one turn of the loop loads
    """
    item = tl.program_id(0)
    sequence, unit, present, start, stop = place(item, blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
    scale = tl.load(grad).to(ACC)
    ar_scale = scale * tl.full((), ar_factor, ACC)
    tar_scale = scale * tl.full((), tar_factor, ACC)
    if scales is not None:
        ar_scale *= tl.load(scales)
        tar_scale *= tl.load(scales + 1)
    last = time  # what lies behind it is padding, or not there
    stops = stop
    if lengths is not None:
        last = ends(lengths, sequence, present, time, INDEX)
        if offsets is not None:  # there is no padding to fill
            stops = tl.minimum(last, stop)
            stop = tl.max(stops)
    if raw is not None:
        raw_base = at(raw, sequence, unit, raw_outer, ALIGN)
        grad_raw_base = at(grad_raw, sequence, unit, grad_raw_outer, ALIGN)
        there = within(present, start, last, INDEX)
        halo = within(there, 0, start, INDEX)
        previous = tl.load(row(raw_base, start - 1, raw_time, offsets, ALIGN), mask=halo, other=0.0).to(ACC)
        current = tl.load(row(raw_base, start, raw_time, offsets, ALIGN), mask=there, other=0.0).to(ACC)
        arriving = tl.where(halo, current - previous, 0.0)
    if dropped is not None:
        dropped_base = at(dropped, sequence, unit, dropped_outer, ALIGN)
        grad_dropped_base = at(grad_dropped, sequence, unit, grad_dropped_outer, ALIGN)
    for turn in range(start, stop, UNROLL):
        if raw is not None:
            followings = load_rows(raw_base, turn + 1, last, raw_time, offsets, present, ACC, ALIGN, INDEX, UNROLL)
        if dropped is not None:
            droppeds = load_rows(dropped_base, turn, last, dropped_time, offsets, present, ACC, ALIGN, INDEX, UNROLL)
        for i in tl.static_range(UNROLL):
            inside = within(present, turn + i, stops, INDEX)
            counts = within(present, turn + i, last, INDEX)
            if raw is not None:
                paired = within(present, turn + i + 1, last, INDEX)
                leaving = tl.where(paired, followings[i] - current, 0.0)
                slope = tar_scale * (arriving - leaving)
                if SAME:
                    slope += ar_scale * current
                if lengths is not None:  # exactly 0 in padding, even where the scale is inf or NaN
                    slope = tl.where(counts, slope, 0.0)
                store_row(grad_raw_base, turn + i, grad_raw_time, offsets, slope, inside, ALIGN)
                arriving = leaving
                current = followings[i]
            if dropped is not None:
                slope = ar_scale * droppeds[i]
                if lengths is not None:
                    slope = tl.where(counts, slope, 0.0)
                store_row(grad_dropped_base, turn + i, grad_dropped_time, offsets, slope, inside, ALIGN)


def forward(
    raw: Tensor | None,
    dropped: Tensor | None,
    same: bool,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    alpha: float,
    beta: float,
    divisors: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch `penalty_forward`.

    `sizes` is (outer, time, inner), none of them 0; `strides` is (outer, time) for raw and for dropped. With
    `same`, raw is dropped as well, and `dropped` is None. `lengths`, (outer,), lies on the same device, `batch_sizes`,
    (time,), of packed rows on the CPU. Returns the penalty, (), and ar and tar, (2,), in float32, or float64 if an
    input is; and, without divisors, one over those of the lengths, (2,).
    """
    device = next(x.device for x in (raw, dropped) if x is not None)
    dtype = reduce(torch.promote_types, [x.dtype for x in (raw, dropped) if x is not None], torch.float32)
    plan = Plan(sizes, strides, (raw, dropped), dtype)
    penalty = torch.empty((), dtype=dtype, device=device)
    terms = torch.empty(2, dtype=dtype, device=device)
    scales = torch.empty(2, dtype=dtype, device=device) if divisors is None else None
    partials = torch.empty(2 * plan.programs, dtype=dtype, device=device)
    offsets, lengths = (None, lengths) if batch_sizes is None else table_of(batch_sizes, device)
    with current_device(device):
        penalty_forward[(plan.programs,)](
            raw,
            dropped,
            penalty,
            terms,
            scales,
            partials,
            ticket_for(device),
            lengths,
            offsets,
            *plan.strides,
            plan.lanes,
            plan.inner,
            plan.time,
            plan.run,
            plan.blocks,
            plan.items,
            alpha,
            beta,
            *(1 / n for n in divisors or (1, 1)),
            SAME=same,
            **plan.constants,
        )
    return penalty, terms, scales


def backward(
    grad: Tensor,
    raw: Tensor | None,
    dropped: Tensor | None,
    grad_raw: Tensor | None,
    grad_dropped: Tensor | None,
    same: bool,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    scales: Tensor | None,
    ar_factor: float,
    tar_factor: float,
) -> None:
    """Launch `penalty_backward`, which fills `grad_raw` and `grad_dropped`.

    A tensor that needs no gradient is None, and so is its gradient; `strides` is (outer, time) for raw,
    dropped, grad_raw and grad_dropped. The factors are 2 * alpha and 2 * beta, over the divisors where `scales`,
    what the forward found, is None.
    """
    plan = Plan(sizes, strides, (raw, dropped), grad.dtype)
    offsets, lengths = (None, lengths) if batch_sizes is None else table_of(batch_sizes, grad.device)
    with current_device(grad.device):
        penalty_backward[(plan.items,)](
            grad,
            raw,
            dropped,
            grad_raw,
            grad_dropped,
            scales,
            lengths,
            offsets,
            *plan.strides,
            plan.lanes,
            plan.inner,
            plan.time,
            plan.run,
            plan.blocks,
            ar_factor,
            tar_factor,
            SAME=same,
            **plan.constants,
        )
