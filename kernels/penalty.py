"""AR and TAR: the forward and the backward kernel, each with the object that launches it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels.launch import Launch, table_of
from fastreg.kernels.reduction import Extents, Outputs, Scratch, SumMemory, Weights, finish
from fastreg.kernels.tiling import Rows, Tiling, at, ends, load_row, load_rows, place, store_row, within
from fastreg.kernels.view import Found, Result, Sums, View


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
    AR_OF_RAW: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Compute the penalty of activations.

        ar = ar_scale * sum over t of dropped[t] ** 2
        tar = tar_scale * sum over t > 0 of (raw[t] - raw[t - 1]) ** 2
        penalty = alpha * ar + beta * tar

    raw, dropped         (outer, time, inner), or None where no term reads it
    penalty              () out in ACC
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
    AR_OF_RAW            AR is that of raw, and dropped is None
    ACC                  dtype of differences, squares and sums
    ALIGN                greatest power of two up to 16 that divides inner and every stride
    INDEX                integer dtype that counts lanes and time steps
    BLOCK, UNROLL        lanes a block; time steps that one turn of the loop loads
    """
    ar = tl.full((), 0.0, ACC)
    tar = tl.full((), 0.0, ACC)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = place(item, blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
        stop = tile.stop
        stops = stop
        if lengths is not None:
            stops = tl.minimum(ends(lengths, tile.sequence, tile.present, time, INDEX), stop)
            stop = tl.max(stops)
        if raw is not None:
            raw_rows = Rows(at(raw, tile, raw_outer, ALIGN), raw_time, offsets, ALIGN)
            halo = within(tile, 0, tile.start) & within(tile, tile.start, stops)
            previous = load_row(raw_rows, tile.start - 1, halo, ACC)
        if dropped is not None:
            dropped_rows = Rows(at(dropped, tile, dropped_outer, ALIGN), dropped_time, offsets, ALIGN)
        ar_run = tl.zeros((BLOCK,), ACC)
        tar_run = tl.zeros((BLOCK,), ACC)
        for turn in range(tile.start, stop, UNROLL):
            if raw is not None:
                raws = load_rows(raw_rows, tile, turn, stops, ACC, UNROLL)
            if dropped is not None:
                kept = load_rows(dropped_rows, tile, turn, stops, ACC, UNROLL)
            for i in tl.static_range(UNROLL):
                if raw is not None:
                    paired = within(tile, turn + i, stops) & within(tile, 0, turn + i)
                    change = tl.where(paired, raws[i] - previous, 0.0)
                    tar_run += change * change
                    previous = raws[i]
                    if AR_OF_RAW:
                        ar_run += raws[i] * raws[i]
                if dropped is not None:
                    ar_run += kept[i] * kept[i]
        ar += tl.sum(ar_run)
        tar += tl.sum(tar_run)
    outputs = Outputs(penalty, terms, scales)
    extents = Extents(lengths, lanes // inner, time, inner * ALIGN)
    finish(ar, tar, outputs, Scratch(partials, ticket), extents, Weights(alpha, beta, ar_scale, tar_scale))


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
    AR_OF_RAW: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write the gradients of the penalty.

        grad_dropped[t] = grad * ar_factor * dropped[t]
        grad_raw[t] = grad * tar_factor * ((raw[t] - raw[t - 1]) - (raw[t + 1] - raw[t]))

    A change to or from a step that a sequence does not have is 0. With AR_OF_RAW grad_raw has `grad * ar_factor *
    raw[t]` added.

    grad                    () in ACC, the upstream gradient
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
    AR_OF_RAW               AR is that of raw, and dropped is None
    ACC                     dtype of differences and products
    ALIGN                   greatest power of two up to 16 that divides inner and every stride
    INDEX                   integer dtype that counts lanes and time steps
    BLOCK, UNROLL           lanes a block; time steps that one turn of the loop loads
    """
    tile = place(tl.program_id(0), blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
    ar_scale = tl.full((), ar_factor, ACC)
    tar_scale = tl.full((), tar_factor, ACC)
    if scales is not None:  # before the upstream gradient: together they may overflow
        ar_scale *= tl.load(scales)
        tar_scale *= tl.load(scales + 1)
    upstream = tl.load(grad).to(ACC)
    ar_scale *= upstream
    tar_scale *= upstream
    last = time  # what lies behind it is padding, or not there
    stop = tile.stop
    stops = stop
    if lengths is not None:
        last = ends(lengths, tile.sequence, tile.present, time, INDEX)
        if offsets is not None:  # there is no padding to fill
            stops = tl.minimum(last, stop)
            stop = tl.max(stops)
    if raw is not None:
        raw_rows = Rows(at(raw, tile, raw_outer, ALIGN), raw_time, offsets, ALIGN)
        grad_raw_rows = Rows(at(grad_raw, tile, grad_raw_outer, ALIGN), grad_raw_time, offsets, ALIGN)
        there = within(tile, tile.start, last)
        halo = there & within(tile, 0, tile.start)
        previous = load_row(raw_rows, tile.start - 1, halo, ACC)
        current = load_row(raw_rows, tile.start, there, ACC)
        change_to = tl.where(halo, current - previous, 0.0)
    if dropped is not None:
        dropped_rows = Rows(at(dropped, tile, dropped_outer, ALIGN), dropped_time, offsets, ALIGN)
        grad_dropped_rows = Rows(at(grad_dropped, tile, grad_dropped_outer, ALIGN), grad_dropped_time, offsets, ALIGN)
    for turn in range(tile.start, stop, UNROLL):
        if raw is not None:
            following = load_rows(raw_rows, tile, turn + 1, last, ACC, UNROLL)
        if dropped is not None:
            kept = load_rows(dropped_rows, tile, turn, last, ACC, UNROLL)
        for i in tl.static_range(UNROLL):
            inside = within(tile, turn + i, stops)
            counts = within(tile, turn + i, last)
            if raw is not None:
                paired = within(tile, turn + i + 1, last)
                change_from = tl.where(paired, following[i] - current, 0.0)
                gradient = tar_scale * (change_to - change_from)
                if AR_OF_RAW:
                    gradient += ar_scale * current
                if lengths is not None:  # exactly 0 in padding, even where the scale is inf or NaN
                    gradient = tl.where(counts, gradient, 0.0)
                store_row(grad_raw_rows, turn + i, gradient, inside)
                change_to = change_from
                current = following[i]
            if dropped is not None:
                gradient = ar_scale * kept[i]
                if lengths is not None:
                    gradient = tl.where(counts, gradient, 0.0)
                store_row(grad_dropped_rows, turn + i, gradient, inside)


class PenaltyForward:
    """Launch `penalty_forward` for tensors of one layout.

    Args:
        view: of raw and dropped; the operand of one that no term reads is `None`.
        sums: what to compute.
        device: where the tensors are.
    """

    predicts = False  # it fills no gradients

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        tiling = Tiling(view, sums.dtype)
        numbers = [tiling.lanes, tiling.inner, tiling.time, tiling.run, tiling.blocks, tiling.items]
        weights = [sums.alpha, sums.beta, *sums.scales]
        constants = {"AR_OF_RAW": sums.ar_of_raw, **tiling.constants}
        self.launch = Launch(penalty_forward, tiling.programs, [*tiling.strides, *numbers, *weights], constants, device)
        self.memory = SumMemory(sums, tiling.programs, device)
        self.device = device

    def __call__(self, tensors: Sequence[Tensor | None], lengths: Tensor | None, batch_sizes: Tensor | None) -> Result:
        """Compute the penalty.

        Args:
            tensors: raw and dropped, as in the view.
            lengths: `(outer,)` integers on the same device, or `None` where all time steps count.
            batch_sizes: `(time,)` int64 on the CPU where the rows are packed, else `None`.
        """
        offsets, lengths = (None, lengths) if batch_sizes is None else table_of(batch_sizes, self.device)
        result, partials, ticket = self.memory.allocate()
        penalty, terms, found = result
        self.launch(*tensors, penalty, terms, found.scales, partials, ticket, lengths, offsets)
        return result


class PenaltyBackward:
    """Launch `penalty_backward` for tensors of one layout.

    Args:
        view: of raw, dropped and their gradients; the operand of one that needs no gradient is `None`, like that of
            its gradient.
        sums: what the forward computed.
        device: where the tensors are.
    """

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        tiling = Tiling(view, sums.dtype)
        numbers = [tiling.lanes, tiling.inner, tiling.time, tiling.run, tiling.blocks]
        constants = {"AR_OF_RAW": sums.ar_of_raw, **tiling.constants}
        arguments = [*tiling.strides, *numbers, *sums.factors]
        self.launch = Launch(penalty_backward, tiling.items, arguments, constants, device)
        self.device = device

    def __call__(
        self,
        grad: Tensor,
        tensors: Sequence[Tensor | None],
        found: Found,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
    ) -> None:
        """Fill the gradients.

        Args:
            grad: the upstream gradient, () in the dtype of the sums.
            tensors: raw, dropped and memory for their gradients, as in the view.
            found: that of the forward's result.
            lengths: those of the forward.
            batch_sizes: those of the forward.
        """
        offsets, lengths = (None, lengths) if batch_sizes is None else table_of(batch_sizes, self.device)
        self.launch(grad, *tensors, found.scales, lengths, offsets)
