"""AR and TAR: the forward and the backward kernel, each with the function that launches it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels.reduction import finish, ticket_for
from fastreg.kernels.tiling import Plan, at, current_device, load_rows, place, row, store_row, within


@triton.jit(
    do_not_specialize=[  # what differs from batch to batch must not decide what is compiled
        *("ticket", "raw_outer", "raw_time", "dropped_outer", "dropped_time"),
        *("lanes", "inner", "time", "run", "blocks", "items"),
    ]
)
def penalty_forward(
    raw,
    dropped,
    penalty,
    terms,
    partials,
    ticket,
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
    partials             (2 * programs,) in ACC, memory for partial sums
    ticket               (1,) int32, 0 before the launch and after it
    *_outer, *_time      strides in units of ALIGN elements; the inner axis is contiguous
    lanes, inner         outer * inner and inner, in units of ALIGN elements
    time, run            time steps in all, and a run
    blocks, items        blocks of lanes, and items of work: a block over a run each
    alpha, beta          coefficients
    ar_scale, tar_scale  one over the divisors of the sums
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
        if raw is not None:
            raw_base = at(raw, sequence, unit, raw_outer, ALIGN)
            halo = within(present, 0, start, INDEX)
            previous = tl.load(row(raw_base, start - 1, raw_time, ALIGN), mask=halo, other=0.0).to(ACC)
        if dropped is not None:
            dropped_base = at(dropped, sequence, unit, dropped_outer, ALIGN)
        ar_run = tl.zeros((BLOCK,), ACC)
        tar_run = tl.zeros((BLOCK,), ACC)
        for turn in range(start, stop, UNROLL):
            if raw is not None:
                raws = load_rows(raw_base, turn, stop, raw_time, present, ACC, ALIGN, INDEX, UNROLL)
            if dropped is not None:
                droppeds = load_rows(dropped_base, turn, stop, dropped_time, present, ACC, ALIGN, INDEX, UNROLL)
            for i in tl.static_range(UNROLL):
                if raw is not None:
                    paired = within(present, turn + i, stop, INDEX) & within(present, 0, turn + i, INDEX)
                    change = tl.where(paired, raws[i] - previous, 0.0)
                    tar_run += change * change
                    previous = raws[i]
                    if SAME:
                        ar_run += raws[i] * raws[i]
                if dropped is not None:
                    ar_run += droppeds[i] * droppeds[i]
        ar += tl.sum(ar_run)
        tar += tl.sum(tar_run)
    finish(ar, tar, penalty, terms, partials, ticket, alpha, beta, ar_scale, tar_scale)


@triton.jit(
    do_not_specialize=[
        *("grad", "raw_outer", "raw_time", "dropped_outer", "dropped_time"),
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
    if raw is not None:
        raw_base = at(raw, sequence, unit, raw_outer, ALIGN)
        grad_raw_base = at(grad_raw, sequence, unit, grad_raw_outer, ALIGN)
        halo = within(present, 0, start, INDEX)
        previous = tl.load(row(raw_base, start - 1, raw_time, ALIGN), mask=halo, other=0.0).to(ACC)
        current = tl.load(row(raw_base, start, raw_time, ALIGN), mask=present, other=0.0).to(ACC)
        arriving = tl.where(halo, current - previous, 0.0)
    if dropped is not None:
        dropped_base = at(dropped, sequence, unit, dropped_outer, ALIGN)
        grad_dropped_base = at(grad_dropped, sequence, unit, grad_dropped_outer, ALIGN)
    for turn in range(start, stop, UNROLL):
        if raw is not None:
            followings = load_rows(raw_base, turn + 1, time, raw_time, present, ACC, ALIGN, INDEX, UNROLL)
        if dropped is not None:
            droppeds = load_rows(dropped_base, turn, stop, dropped_time, present, ACC, ALIGN, INDEX, UNROLL)
        for i in tl.static_range(UNROLL):
            inside = within(present, turn + i, stop, INDEX)
            if raw is not None:
                paired = within(present, turn + i + 1, time, INDEX)
                leaving = tl.where(paired, followings[i] - current, 0.0)
                slope = tar_scale * (arriving - leaving)
                if SAME:
                    slope += ar_scale * current
                store_row(grad_raw_base, turn + i, grad_raw_time, slope, inside, ALIGN)
                arriving = leaving
                current = followings[i]
            if dropped is not None:
                slope = ar_scale * droppeds[i]
                store_row(grad_dropped_base, turn + i, grad_dropped_time, slope, inside, ALIGN)


def forward(
    raw: Tensor | None,
    dropped: Tensor | None,
    same: bool,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    alpha: float,
    beta: float,
    ar_divisor: int,
    tar_divisor: int,
) -> tuple[Tensor, Tensor]:
    """Launch `penalty_forward`.

    `sizes` is (outer, time, inner), none of them 0; `strides` is (outer, time) for raw and for dropped. With
    `same`, raw is dropped as well, and `dropped` is None. Returns the penalty, (), and ar and tar, (2,), in
    float32, or float64 if an input is.
    """
    device = next(x.device for x in (raw, dropped) if x is not None)
    dtype = reduce(torch.promote_types, [x.dtype for x in (raw, dropped) if x is not None], torch.float32)
    plan = Plan(sizes, strides, (raw, dropped), dtype)
    penalty = torch.empty((), dtype=dtype, device=device)
    terms = torch.empty(2, dtype=dtype, device=device)
    partials = torch.empty(2 * plan.programs, dtype=dtype, device=device)
    with current_device(device):
        penalty_forward[(plan.programs,)](
            raw,
            dropped,
            penalty,
            terms,
            partials,
            ticket_for(device),
            *plan.strides,
            plan.lanes,
            plan.inner,
            plan.time,
            plan.run,
            plan.blocks,
            plan.items,
            alpha,
            beta,
            1 / ar_divisor,
            1 / tar_divisor,
            SAME=same,
            **plan.constants,
        )
    return penalty, terms


def backward(
    grad: Tensor,
    raw: Tensor | None,
    dropped: Tensor | None,
    grad_raw: Tensor | None,
    grad_dropped: Tensor | None,
    same: bool,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    ar_factor: float,
    tar_factor: float,
) -> None:
    """Launch `penalty_backward`, which fills `grad_raw` and `grad_dropped`.

    A tensor that needs no gradient is None, and so is its gradient; `strides` is (outer, time) for raw,
    dropped, grad_raw and grad_dropped. The factors are 2 * alpha and 2 * beta over the divisors.
    """
    plan = Plan(sizes, strides, (raw, dropped), grad.dtype)
    with current_device(grad.device):
        penalty_backward[(plan.items,)](
            grad,
            raw,
            dropped,
            grad_raw,
            grad_dropped,
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
