"""Variational dropout with AR and TAR in the same pass: forward and backward, each with the function that launches it.

The forward reads raw and writes dropped, as dropout alone does, and takes the sums along. The backward reads raw
and the gradient of dropped, and writes that of raw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels.reduction import finish, ticket_for
from fastreg.kernels.tiling import Plan, at, current_device, ends, load_rows, place, rounded, row, store_row, within


@triton.jit(
    do_not_specialize=[  # what differs from batch to batch must not decide what is compiled
        *("ticket", "lengths", "raw_outer", "raw_time", "mask_outer", "mask_time", "dropped_outer", "dropped_time"),
        *("lanes", "inner", "time", "run", "blocks", "items"),
    ]
)
def dropout_forward(
    raw,
    mask,
    dropped,
    penalty,
    terms,
    scales,
    partials,
    ticket,
    lengths,
    raw_outer,
    raw_time,
    mask_outer,
    mask_time,
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
    AR: tl.constexpr,
    TAR: tl.constexpr,
    AR_OF_RAW: tl.constexpr,
    LOCKED: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write `raw * mask`; sum its squares and those of the changes of `raw` over time.

    raw                  (outer, time, inner)
    mask                 the same shape, already scaled; one row for all time steps if LOCKED
    dropped              (outer, time, inner) out
    penalty              () out in ACC: alpha * ar + beta * tar
    terms                (2,) out in ACC: ar and tar
    scales               (2,) out in ACC: one over the divisors, found from lengths; None where they are given
    partials             (2 * programs,) in ACC, memory for partial sums
    ticket               (1,) int32, 0 before the launch and after it
    lengths              (outer,) integers, how many time steps of a sequence count in the sums; None if all do
    *_outer, *_time      strides in units of ALIGN elements; the inner axis is contiguous
    lanes, inner         outer * inner and inner, in units of ALIGN elements
    time, run            time steps in all, and a run
    blocks, items        blocks of lanes, and items of work: a block over a run each
    alpha, beta          coefficients
    ar_scale, tar_scale  one over the divisors of the sums, where scales is None
    AR, TAR              whether each term is on
    AR_OF_RAW            AR is that of raw, as fastai v1 forms it, not that of dropped
    LOCKED               the mask does not differ from time step to time step
    ACC                  dtype of differences, products and sums
    ALIGN                greatest power of two up to 16 that divides inner and every stride
    INDEX                integer dtype that counts lanes and time steps
    BLOCK, UNROLL        lanes a block; time steps that one turn of the loop loads
    """
    ar = tl.full((), 0.0, ACC)
    tar = tl.full((), 0.0, ACC)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        sequence, unit, present, start, stop = place(item, blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
        raw_base = at(raw, sequence, unit, raw_outer, ALIGN)
        mask_base = at(mask, sequence, unit, mask_outer, ALIGN)
        dropped_base = at(dropped, sequence, unit, dropped_outer, ALIGN)
        last = time  # what lies behind it is padding
        if lengths is not None:
            last = ends(lengths, sequence, present, time, INDEX)
        if LOCKED:
            scale = tl.load(mask_base, mask=present, other=0.0).to(ACC)
        if TAR:
            halo = within(present, 0, start, INDEX)
            previous = tl.load(row(raw_base, start - 1, raw_time, None, ALIGN), mask=halo, other=0.0).to(ACC)
        ar_run = tl.zeros((BLOCK,), ACC)
        tar_run = tl.zeros((BLOCK,), ACC)
        for turn in range(start, stop, UNROLL):
            raws = load_rows(raw_base, turn, stop, raw_time, None, present, ACC, ALIGN, INDEX, UNROLL)
            if not LOCKED:
                masks = load_rows(mask_base, turn, stop, mask_time, None, present, ACC, ALIGN, INDEX, UNROLL)
            for i in tl.static_range(UNROLL):
                inside = within(present, turn + i, stop, INDEX)
                kept = rounded(raws[i] * (scale if LOCKED else masks[i]), dropped.dtype.element_ty)
                store_row(dropped_base, turn + i, dropped_time, None, kept, inside, ALIGN)
                counts = inside & within(present, turn + i, last, INDEX)
                if AR:
                    counted = raws[i] if AR_OF_RAW else kept.to(ACC)
                    ar_run += tl.where(counts, counted * counted, 0.0)
                if TAR:
                    paired = counts & within(present, 0, turn + i, INDEX)
                    change = tl.where(paired, raws[i] - previous, 0.0)
                    tar_run += change * change
                    previous = raws[i]
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
        *("grad", "scales", "lengths", "raw_outer", "raw_time", "mask_outer", "mask_time"),
        *("grad_dropped_outer", "grad_dropped_time", "grad_raw_outer", "grad_raw_time"),
        *("lanes", "inner", "time", "run", "blocks"),
    ]
)
def dropout_backward(
    grad,
    raw,
    mask,
    grad_dropped,
    grad_raw,
    scales,
    lengths,
    raw_outer,
    raw_time,
    mask_outer,
    mask_time,
    grad_dropped_outer,
    grad_dropped_time,
    grad_raw_outer,
    grad_raw_time,
    lanes,
    inner,
    time,
    run,
    blocks,
    ar_factor: tl.float64,
    tar_factor: tl.float64,
    AR: tl.constexpr,
    TAR: tl.constexpr,
    AR_OF_RAW: tl.constexpr,
    LOCKED: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write the gradient of `raw`: that of dropped and of AR through the mask, and that of TAR.

    grad                   () in ACC, the gradient of the penalty; None where it has none, and AR and TAR are off
    raw                    (outer, time, inner); read if AR or TAR
    mask                   the same shape, already scaled; one row for all time steps if LOCKED
    grad_dropped           (outer, time, inner), or None where dropped has no gradient
    grad_raw               (outer, time, inner) out
    scales                 (2,) in ACC, one over the divisors of the sums; None where the factors hold them
    lengths                (outer,) integers, how many time steps of a sequence count in the sums; None if all do
    *_outer, *_time        strides in units of ALIGN elements; the inner axis is contiguous
    lanes, inner           outer * inner and inner, in units of ALIGN elements
    time, run              time steps in all, and a run
    blocks                 blocks of lanes; a program takes one over one run
    ar_factor, tar_factor  2 * alpha and 2 * beta over the divisors of the sums
    AR, TAR                whether each term is on
    AR_OF_RAW              AR is that of raw, as fastai v1 forms it, not that of dropped
    LOCKED                 the mask does not differ from time step to time step
    ACC                    dtype of differences and products
    ALIGN                  greatest power of two up to 16 that divides inner and every stride
    INDEX                  integer dtype that counts lanes and time steps
    BLOCK, UNROLL          lanes a block; time steps that one turn of the loop loads
    """
    item = tl.program_id(0)
    sequence, unit, present, start, stop = place(item, blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
    mask_base = at(mask, sequence, unit, mask_outer, ALIGN)
    grad_raw_base = at(grad_raw, sequence, unit, grad_raw_outer, ALIGN)
    if LOCKED:
        scale = tl.load(mask_base, mask=present, other=0.0).to(ACC)
    last = time  # what lies behind it is padding
    if lengths is not None:
        last = ends(lengths, sequence, present, time, INDEX)
    if grad_dropped is not None:
        grad_dropped_base = at(grad_dropped, sequence, unit, grad_dropped_outer, ALIGN)
    if AR or TAR:
        raw_base = at(raw, sequence, unit, raw_outer, ALIGN)
        there = within(present, start, last, INDEX)
        current = tl.load(row(raw_base, start, raw_time, None, ALIGN), mask=there, other=0.0).to(ACC)
        ar_scale = tl.load(grad).to(ACC) * tl.full((), ar_factor, ACC)
        tar_scale = tl.load(grad).to(ACC) * tl.full((), tar_factor, ACC)
        if scales is not None:
            ar_scale *= tl.load(scales)
            tar_scale *= tl.load(scales + 1)
    if TAR:
        halo = within(there, 0, start, INDEX)
        previous = tl.load(row(raw_base, start - 1, raw_time, None, ALIGN), mask=halo, other=0.0).to(ACC)
        arriving = tl.where(halo, current - previous, 0.0)
    for turn in range(start, stop, UNROLL):
        if AR or TAR:
            followings = load_rows(raw_base, turn + 1, last, raw_time, None, present, ACC, ALIGN, INDEX, UNROLL)
        if not LOCKED:
            masks = load_rows(mask_base, turn, stop, mask_time, None, present, ACC, ALIGN, INDEX, UNROLL)
        if grad_dropped is not None:
            arrived = load_rows(
                grad_dropped_base, turn, stop, grad_dropped_time, None, present, ACC, ALIGN, INDEX, UNROLL
            )
        for i in tl.static_range(UNROLL):
            slope = tl.zeros((BLOCK,), ACC)
            keep = scale if LOCKED else masks[i]
            counts = within(present, turn + i, last, INDEX)
            if grad_dropped is not None:
                slope += arrived[i]
            if AR and not AR_OF_RAW:
                pull = ar_scale * rounded(current * keep, raw.dtype.element_ty).to(ACC)
                slope += tl.where(counts, pull, 0.0)
            if grad_dropped is not None or (AR and not AR_OF_RAW):  # else 0 * inf would be NaN
                slope *= keep
            if AR and AR_OF_RAW:
                slope += tl.where(counts, ar_scale * current, 0.0)
            if TAR:
                paired = within(present, turn + i + 1, last, INDEX)
                leaving = tl.where(paired, followings[i] - current, 0.0)
                slope += tl.where(counts, tar_scale * (arriving - leaving), 0.0)
                arriving = leaving
            if AR or TAR:
                current = followings[i]
            inside = within(present, turn + i, stop, INDEX)
            store_row(grad_raw_base, turn + i, grad_raw_time, None, slope, inside, ALIGN)


def forward(
    raw: Tensor,
    mask: Tensor,
    dropped: Tensor,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    lengths: Tensor | None,
    alpha: float,
    beta: float,
    ar_of_raw: bool,
    divisors: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch `dropout_forward`, which fills `dropped`.

    `sizes` is (outer, time, inner), none of them 0; `strides` is (outer, time) for raw, mask and dropped; a mask
    that stands for all time steps has a time stride of 0. `lengths`, (outer,), lies on the same device. Returns the
    penalty, (), and ar and tar, (2,), in float32, or float64 if raw is; and, without divisors, one over those of the
    lengths, (2,).
    """
    dtype = torch.promote_types(raw.dtype, torch.float32)
    plan = Plan(sizes, strides, (raw,), dtype)
    penalty = torch.empty((), dtype=dtype, device=raw.device)
    terms = torch.empty(2, dtype=dtype, device=raw.device)
    scales = torch.empty(2, dtype=dtype, device=raw.device) if divisors is None else None
    partials = torch.empty(2 * plan.programs, dtype=dtype, device=raw.device)
    with current_device(raw.device):
        dropout_forward[(plan.programs,)](
            raw,
            mask,
            dropped,
            penalty,
            terms,
            scales,
            partials,
            ticket_for(raw.device),
            lengths,
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
            AR=alpha != 0,
            TAR=beta != 0,
            AR_OF_RAW=ar_of_raw,
            LOCKED=plan.time == 1 or strides[1][1] == 0,
            **plan.constants,
        )
    return penalty, terms, scales


def backward(
    grad: Tensor | None,
    raw: Tensor,
    mask: Tensor,
    grad_dropped: Tensor | None,
    grad_raw: Tensor,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    lengths: Tensor | None,
    scales: Tensor | None,
    ar_of_raw: bool,
    ar_factor: float,
    tar_factor: float,
) -> None:
    """Launch `dropout_backward`, which fills `grad_raw`.

    The gradient of the penalty or of dropped is None where there is none; `strides` is (outer, time) for raw, mask,
    grad_dropped and grad_raw. The factors are 2 * alpha and 2 * beta, over the divisors where `scales`, what the
    forward found, is None.
    """
    plan = Plan(sizes, strides, (raw,), torch.promote_types(raw.dtype, torch.float32))
    with current_device(raw.device):
        dropout_backward[(plan.items,)](
            grad,
            raw,
            mask,
            grad_dropped,
            grad_raw,
            scales,
            lengths,
            *plan.strides,
            plan.lanes,
            plan.inner,
            plan.time,
            plan.run,
            plan.blocks,
            ar_factor,
            tar_factor,
            AR=grad is not None and ar_factor != 0,
            TAR=grad is not None and tar_factor != 0,
            AR_OF_RAW=ar_of_raw,
            LOCKED=plan.time == 1 or strides[1][1] == 0,
            **plan.constants,
        )
