"""Variational dropout with AR and TAR in the same pass: forward and backward, each with the object that launches it.

The forward reads raw and writes dropped, as dropout alone does, and takes the sums along. The backward reads raw
and the gradient of dropped, and writes that of raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels.launch import Launch, marks_of
from fastreg.kernels.reduction import Extents, Outputs, Scratch, SumMemory, Weights, factors, finish
from fastreg.kernels.tiling import (
    Rows,
    Tiling,
    at,
    counts_at,
    ends,
    is_valid,
    joined,
    load_mark,
    load_marks,
    load_row,
    load_rows,
    place,
    rounded,
    row,
    store_row,
    within,
)
from fastreg.kernels.view import Result, Sums, Values, View


@triton.jit(
    do_not_specialize=[  # values that differ from batch to batch must not compile new code
        *("partials", "ticket", "lengths", "valid", "counted", "alpha_at", "beta_at"),
        *("raw_outer", "raw_time", "mask_outer", "mask_time", "dropped_outer", "dropped_time"),
        *("lanes", "inner", "time", "run", "blocks", "items"),
    ]
)
def dropout_forward(
    raw,
    mask,
    dropped,
    partials,
    ticket,
    penalty,
    terms,
    lengths,
    valid,
    counted,
    alpha_at,
    beta_at,
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
    COUNT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Apply a dropout mask and compute the penalty.

        dropped[t] = raw[t] * mask[t]
        ar = ar_scale * sum over t of dropped[t] ** 2
        tar = tar_scale * sum over t > 0 of (raw[t] - raw[t - 1]) ** 2
        penalty = alpha * ar + beta * tar

    Padding is dropped out like all the rest, but counts in neither sum.

    raw                  (outer, time, inner)
    mask                 the same shape, already scaled; one row for all time steps if LOCKED
    dropped              (outer, time, inner) out
    AR, TAR              whether each term is on
    AR_OF_RAW            AR is that of raw, as fastai v1 forms it, not that of dropped
    LOCKED               the mask does not differ from time step to time step

    All other parameters are those of `penalty_kernel`.
    """
    ar = tl.full((), 0.0, ACC)
    tar = tl.full((), 0.0, ACC)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = place(item, blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
        raw_rows = Rows(at(raw, tile, raw_outer, ALIGN), raw_time, None, ALIGN)
        mask_rows = Rows(at(mask, tile, mask_outer, ALIGN), mask_time, None, ALIGN)
        dropped_rows = Rows(at(dropped, tile, dropped_outer, ALIGN), dropped_time, None, ALIGN)
        last = time  # later steps are padding
        if lengths is not None:
            last = ends(lengths, tile.sequence, tile.present, time, INDEX)
        if LOCKED:
            scale = load_row(mask_rows, 0, tile.present, ACC)
        if TAR:
            previous = load_row(raw_rows, tile.start - 1, within(tile, 0, tile.start), ACC)
        mark = load_mark(valid, tile, tile.start - 1, time)
        ar_run = tl.zeros((BLOCK,), ACC)
        tar_run = tl.zeros((BLOCK,), ACC)
        for turn in range(tile.start, tile.stop, UNROLL):
            marks = load_marks(valid, tile, mark, turn, time, UNROLL)
            if valid is not None:
                mark = marks[UNROLL]
            raws = load_rows(raw_rows, tile, (), turn, 0, tile.stop, ACC, UNROLL)
            if not LOCKED:
                masks = load_rows(mask_rows, tile, (), turn, 0, tile.stop, ACC, UNROLL)
            for i in tl.static_range(UNROLL):
                inside = within(tile, turn + i, tile.stop)
                kept = rounded(raws[i] * (scale if LOCKED else masks[i]), dropped.dtype.element_ty)
                store_row(dropped_rows, row(dropped_rows, turn), turn, i, kept, inside)
                counts = inside & counts_at(tile, marks, i + 1, turn + i, last)
                if AR:
                    squared = raws[i] if AR_OF_RAW else kept.to(ACC)
                    ar_run += tl.where(counts, squared * squared, 0.0)
                if TAR:
                    paired = counts & within(tile, 0, turn + i)
                    if valid is not None:
                        paired = joined(paired, marks[i], marks[i + 1])
                    change = tl.where(paired, raws[i] - previous, 0.0)
                    tar_run += change * change
                    previous = raws[i]
        ar += tl.sum(ar_run)
        tar += tl.sum(tar_run)
    weights = Weights(alpha, beta, alpha_at, beta_at, ar_scale, tar_scale)
    sequences = lanes // inner
    extents = Extents(lengths if COUNT else None, valid if COUNT else None, counted, sequences, time, inner * ALIGN)
    finish(ar, tar, Outputs(penalty, terms, False), Scratch(partials, ticket), extents, weights)


@triton.jit(
    do_not_specialize=[
        *("grad", "lengths", "valid", "counted", "alpha_at", "beta_at"),
        *("raw_outer", "raw_time", "mask_outer", "mask_time"),
        *("grad_dropped_outer", "grad_dropped_time", "grad_raw_outer", "grad_raw_time"),
        *("lanes", "inner", "time", "run", "blocks", "items"),
    ]
)
def dropout_backward(
    grad,
    raw,
    mask,
    grad_dropped,
    grad_raw,
    lengths,
    valid,
    counted,
    alpha_at,
    beta_at,
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
    items,
    alpha: tl.float64,
    beta: tl.float64,
    ar_scale: tl.float64,
    tar_scale: tl.float64,
    AR: tl.constexpr,
    TAR: tl.constexpr,
    AR_OF_RAW: tl.constexpr,
    LOCKED: tl.constexpr,
    COUNT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write the gradient of `raw`.

        grad_raw[t] = (grad_dropped[t] + grad * 2 * alpha * ar_scale * raw[t] * mask[t]) * mask[t]
                      + grad * 2 * beta * tar_scale * ((raw[t] - raw[t - 1]) - (raw[t + 1] - raw[t]))

    A change to or from a step that a sequence does not have is 0. With AR_OF_RAW the term of AR is
    `grad * 2 * alpha * ar_scale * raw[t]`, outside of the parentheses. Without a mask, which goes with AR_OF_RAW,
    grad_dropped is a gradient that arrives at raw, and the penalty's is added to it.

    grad                 () in ACC, the gradient of the penalty; None where it has none, and AR and TAR are off
    raw                  (outer, time, inner); read if AR or TAR
    mask                 the same shape, already scaled; one row for all time steps if LOCKED; None for a mask of 1
    grad_dropped         (outer, time, inner), or None where dropped has no gradient
    grad_raw             (outer, time, inner) out

    All other parameters are those of `dropout_forward`.
    """
    if AR or TAR:
        weights = Weights(alpha, beta, alpha_at, beta_at, ar_scale, tar_scale)
        sequences = lanes // inner
        extents = Extents(lengths if COUNT else None, valid if COUNT else None, counted, sequences, time, inner * ALIGN)
        ar_factor, tar_factor = factors(weights, extents, tl.load(grad))
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = place(item, blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
        grad_raw_rows = Rows(at(grad_raw, tile, grad_raw_outer, ALIGN), grad_raw_time, None, ALIGN)
        if mask is not None:
            mask_rows = Rows(at(mask, tile, mask_outer, ALIGN), mask_time, None, ALIGN)
            if LOCKED:
                scale = load_row(mask_rows, 0, tile.present, ACC)
        last = time  # later steps are padding
        if lengths is not None:
            last = ends(lengths, tile.sequence, tile.present, time, INDEX)
        if grad_dropped is not None:
            grad_dropped_rows = Rows(at(grad_dropped, tile, grad_dropped_outer, ALIGN), grad_dropped_time, None, ALIGN)
        mark = load_mark(valid, tile, tile.start, time)
        there = within(tile, tile.start, last)
        if valid is not None:
            there &= is_valid(mark)
        if AR or TAR:
            raw_rows = Rows(at(raw, tile, raw_outer, ALIGN), raw_time, None, ALIGN)
            current = load_row(raw_rows, tile.start, there, ACC)
        if TAR:
            halo = there & within(tile, 0, tile.start)
            if valid is not None:
                halo = joined(halo, load_mark(valid, tile, tile.start - 1, time), mark)
            previous = load_row(raw_rows, tile.start - 1, halo, ACC)
            change_to = tl.where(halo, current - previous, 0.0)
        for turn in range(tile.start, tile.stop, UNROLL):
            marks = load_marks(valid, tile, mark, turn + 1, time, UNROLL)
            if valid is not None:
                mark = marks[UNROLL]
            if AR or TAR:
                following = load_rows(raw_rows, tile, marks, turn, 1, last, ACC, UNROLL)
            if mask is not None and not LOCKED:
                masks = load_rows(mask_rows, tile, (), turn, 0, tile.stop, ACC, UNROLL)
            if grad_dropped is not None:
                upstream_rows = load_rows(grad_dropped_rows, tile, (), turn, 0, tile.stop, ACC, UNROLL)
            for i in tl.static_range(UNROLL):
                gradient = tl.zeros((BLOCK,), ACC)
                if mask is not None:
                    keep = scale if LOCKED else masks[i]
                counts = counts_at(tile, marks, i, turn + i, last)
                if grad_dropped is not None:
                    gradient += upstream_rows[i]
                if AR and not AR_OF_RAW:
                    ar_gradient = ar_factor * rounded(current * keep, raw.dtype.element_ty).to(ACC)
                    gradient += tl.where(counts, ar_gradient, 0.0)
                # Where nothing has passed the mask, 0 * inf would be NaN.
                if mask is not None and (grad_dropped is not None or (AR and not AR_OF_RAW)):
                    gradient *= keep
                if AR and AR_OF_RAW:
                    gradient += tl.where(counts, ar_factor * current, 0.0)
                if TAR:
                    paired = counts_at(tile, marks, i + 1, turn + i + 1, last)
                    if valid is not None:
                        paired = joined(paired, marks[i], marks[i + 1])
                    change_from = tl.where(paired, following[i] - current, 0.0)
                    gradient += tl.where(counts, tar_factor * (change_to - change_from), 0.0)
                    change_to = change_from
                if AR or TAR:
                    current = following[i]
                store_row(grad_raw_rows, row(grad_raw_rows, turn), turn, i, gradient, within(tile, turn + i, tile.stop))


class DropoutForward:
    """Launch `dropout_forward` for tensors of one layout.

    Args:
        view: of raw, mask and dropped; a mask that is the same at all time steps has a time stride of 0.
        sums: the sums to compute.
        device: where the tensors are.
    """

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        tiling = Tiling(view, sums.dtype)
        self.launch = _launch(dropout_forward, tiling, view, sums, device)
        self.memory = SumMemory(sums, tiling.programs, device)

    def __call__(self, tensors: Sequence[Tensor], values: Values) -> Result:
        """Fill `dropped` and compute the penalty.

        Args:
            tensors: raw, mask, and memory for dropped, as in the view.
            values: lengths and coefficients, those that all calls have; rows are never packed.
        """
        penalty, terms, partials, ticket = self.memory.allocate(None)
        self.launch(*tensors, partials, ticket, penalty, terms, *_read(values))
        return Result(penalty, terms, None)


class DropoutBackward:
    """Launch `dropout_backward` for tensors of one layout.

    Args:
        view: of raw, mask, the gradient of dropped, and that of raw. Without a mask, whose operand is `None`, the
            gradient of dropped is one that arrives at raw; without a gradient of dropped its operand is `None`.
        sums: those of the forward; a term is off if the penalty has no upstream gradient.
        device: where the tensors are.
    """

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.launch = _launch(dropout_backward, Tiling(view, sums.dtype), view, sums, device)

    def __call__(self, grad: Tensor | None, tensors: Sequence[Tensor | None], values: Values) -> None:
        """Fill the gradient of raw.

        Args:
            grad: the upstream gradient of the penalty, () in the dtype of the sums, if it has one.
            tensors: raw, mask, the gradient of dropped, and memory for that of raw, as in the view.
            values: those of the forward.
        """
        self.launch(grad, *tensors, *_read(values))


def _read(values: Values) -> tuple[Tensor | None, ...]:
    """Return the arguments of both kernels on time steps and coefficients, from lengths to beta."""
    return values.lengths, *marks_of(values), values.alpha, values.beta


def _launch(kernel: Any, tiling: Tiling, view: View, sums: Sums, device: torch.device) -> Launch:
    """Prepare a launch of either kernel, in the variant for this view and these sums."""
    mask = view.operands[1]
    locked = view.time == 1 or mask is None or mask.time == 0
    terms = {"AR": sums.ar, "TAR": sums.tar, "AR_OF_RAW": sums.ar_of_raw}
    constants = {**terms, "LOCKED": locked, "COUNT": sums.divisors is None, **tiling.constants}
    return Launch(kernel, (*tiling.numbers, *sums.weights), constants, tiling.programs, device)
