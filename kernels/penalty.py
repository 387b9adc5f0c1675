"""AR and TAR: one kernel for the penalty and its gradients, and the objects that launch it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels import tiling
from fastreg.kernels.launch import Launch, marks_of, table_of
from fastreg.kernels.reduction import Extents, Outputs, Scratch, SumMemory, Weights, factors, finish
from fastreg.kernels.streams import Expected
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
    row,
    store_row,
    within,
)
from fastreg.kernels.view import Prediction, Result, Sums, Values, View

THREADS = tl.constexpr(tiling.THREADS)


@triton.jit(
    do_not_specialize=[  # values that differ from batch to batch must not compile new code
        *("grad", "expected", "partials", "ticket", "lengths", "offsets", "valid", "counted", "alpha_at", "beta_at"),
        *("raw_outer", "raw_time", "dropped_outer", "dropped_time"),
        *("grad_raw_outer", "grad_raw_time", "grad_dropped_outer", "grad_dropped_time"),
        *("lanes", "inner", "time", "run", "blocks", "items"),
    ]
)
def penalty_kernel(
    raw,
    dropped,
    grad_raw,
    grad_dropped,
    grad,
    expected,
    partials,
    ticket,
    penalty,
    terms,
    lengths,
    offsets,
    valid,
    counted,
    alpha_at,
    beta_at,
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
    items,
    alpha: tl.float64,
    beta: tl.float64,
    ar_scale: tl.float64,
    tar_scale: tl.float64,
    SUM: tl.constexpr,
    WRITE: tl.constexpr,
    AR_OF_RAW: tl.constexpr,
    BY_AR: tl.constexpr,
    BY_TAR: tl.constexpr,
    ADDS: tl.constexpr,
    COUNT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Compute the penalty of activations (SUM), write its gradients (WRITE), or both in one pass.

        ar = ar_scale * sum over t of dropped[t] ** 2
        tar = tar_scale * sum over t > 0 of (raw[t] - raw[t - 1]) ** 2
        penalty = alpha * ar + beta * tar
        grad_dropped[t] = grad * 2 * alpha * ar_scale * dropped[t]
        grad_raw[t] = grad * 2 * beta * tar_scale * ((raw[t] - raw[t - 1]) - (raw[t + 1] - raw[t]))

    A change to or from a step that a sequence does not have is 0. With AR_OF_RAW dropped is raw, and grad_raw the sum
    of both gradients.

    A forward that does both does not know the upstream gradient yet, and assumes that of the last backward on its
    stream. Each program records its assumption and uses its own record. In the backward the program of the same
    number, which has the same items, returns if the upstream gradient has the bits of that record, and writes its
    gradients anew if not. So no gradient depends on the assumption, nor on whether all programs of a launch assumed
    the same, as they may not while a backward on another stream writes its upstream gradient: a wrong assumption costs
    time alone.

    raw, dropped            (outer, time, inner), or None where nothing that is asked for reads it
    grad_raw, grad_dropped  out, of the same shape and dtype, or None where no gradient is asked for
    grad                    () in ACC: the upstream gradient; with SUM the one that is expected; None without WRITE
    expected                () out in ACC: the upstream gradient, for the next forward of the plan; None with SUM, and
                            without partials
    partials                (3 * programs,) in ACC: partial sums of AR, of TAR, and assumed upstream gradients; None
                            where no forward has assumed any
    ticket                  (1,) int32, as `finish` wants it; None without SUM, like penalty
    penalty                 () out in ACC
    terms                   (2,) out in ACC: ar and tar; None unless they are measured
    lengths                 (outer,) integers, how many time steps of a sequence count; None if all do
    offsets                 (1 + time + UNROLL,) int64, None unless packed: `1 + step` has the row where a step begins
    valid                   (outer, time) marks, which time steps count; None if all do, or those within lengths
    counted                 of `count_kernel`, where it has counted them; with valid alone
    alpha_at, beta_at       () coefficients that take the place of alpha and beta, or None
    *_outer, *_time         strides in units of ALIGN elements; the inner axis is contiguous
    lanes, inner            outer * inner and inner, in units of ALIGN elements
    time, run               time steps in all, and a run
    blocks, items           blocks of lanes, and items of work: a block over a run each
    alpha, beta             coefficients
    ar_scale, tar_scale     one over the divisors of the sums
    AR_OF_RAW               AR is that of raw, and dropped is None
    BY_AR, BY_TAR           whether each term has a gradient; one that is only measured has none
    ADDS                    the penalty and its terms are added to the values in memory
    COUNT                   the divisors of the sums are counted, from lengths or valid
    ACC                     dtype of differences, products and sums
    ALIGN                   greatest power of two up to 16 that divides inner and every stride
    INDEX                   integer dtype that counts lanes and time steps
    BLOCK, UNROLL           lanes a block; time steps that one turn of the loop loads
    """
    program = tl.program_id(0)
    weights = Weights(alpha, beta, alpha_at, beta_at, ar_scale, tar_scale)
    sequences = lanes // inner
    padded: tl.constexpr = (lengths is not None and offsets is None) or valid is not None
    if WRITE:
        upstream = load_once(grad) if SUM else tl.load(grad)
        if partials is not None:
            record = partials + 2 * tl.num_programs(0) + program
            if not SUM:
                differs = differ(tl.load(record), upstream).to(tl.int32)
                items *= differs
                sequences *= differs
            elif offsets is None:
                tl.store(record, upstream)
        if not SUM and expected is not None:
            tl.store(expected, upstream, mask=program == 0)
        extents = Extents(lengths if COUNT else None, valid if COUNT else None, counted, sequences, time, inner * ALIGN)
        ar_factor, tar_factor = factors(weights, extents, upstream)
    ar = tl.full((), 0.0, ACC)
    tar = tl.full((), 0.0, ACC)
    for item in range(program, items, tl.num_programs(0)):
        tile = place(item, blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
        last = time  # later steps are padding, or do not exist
        stop = tile.stop
        if lengths is not None:
            last = ends(lengths, tile.sequence, tile.present, time, INDEX)
            if not (WRITE and padded):  # there is no padding to fill
                stop = tl.minimum(stop, tl.max(last))
        seen = last if WRITE else tl.minimum(last, tile.stop)  # only gradients need the row behind a run
        mark = load_mark(valid, tile, tile.start, time)
        if raw is not None:
            raw_rows = Rows(at(raw, tile, raw_outer, ALIGN), raw_time, offsets, ALIGN)
            there = within(tile, tile.start, last)
            if valid is not None:
                there &= is_valid(mark)
            halo = there & within(tile, 0, tile.start)
            if valid is not None:
                halo = joined(halo, load_mark(valid, tile, tile.start - 1, time), mark)
            current = load_row(raw_rows, tile.start, there, ACC)
            change_to = tl.where(halo, current - load_row(raw_rows, tile.start - 1, halo, ACC), 0.0)
        if dropped is not None:
            dropped_rows = Rows(at(dropped, tile, dropped_outer, ALIGN), dropped_time, offsets, ALIGN)
        if grad_raw is not None:
            grad_raw_rows = Rows(at(grad_raw, tile, grad_raw_outer, ALIGN), grad_raw_time, offsets, ALIGN)
        if grad_dropped is not None:
            grad_dropped_base = at(grad_dropped, tile, grad_dropped_outer, ALIGN)
            grad_dropped_rows = Rows(grad_dropped_base, grad_dropped_time, offsets, ALIGN)
        ar_run = tl.zeros((BLOCK,), ACC)
        tar_run = tl.zeros((BLOCK,), ACC)
        for turn in range(tile.start, stop, UNROLL):
            marks = load_marks(valid, tile, mark, turn + 1, time, UNROLL)
            if grad_raw is not None:
                grad_raw_first = row(grad_raw_rows, turn)
            if grad_dropped is not None:
                grad_dropped_first = row(grad_dropped_rows, turn)
            if valid is not None:
                mark = marks[UNROLL]
            if raw is not None:
                following = load_rows(raw_rows, tile, marks, turn, 1, seen, ACC, UNROLL)
            if dropped is not None:
                kept = load_rows(dropped_rows, tile, marks, turn, 0, last, ACC, UNROLL)
            for i in tl.static_range(UNROLL):
                counts = counts_at(tile, marks, i, turn + i, last)
                inside = within(tile, turn + i, time) if padded else counts
                if raw is not None:
                    paired = counts_at(tile, marks, i + 1, turn + i + 1, seen)
                    if valid is not None:
                        paired = joined(paired, marks[i], marks[i + 1])
                    change_from = tl.where(paired, following[i] - current, 0.0)
                    if SUM:
                        tar_run += change_to * change_to
                        if AR_OF_RAW:
                            ar_run += current * current
                    if grad_raw is not None:
                        if BY_TAR:
                            gradient = tar_factor * (change_to - change_from)
                            if AR_OF_RAW and BY_AR:  # fused here, as a compiler might choose the other product
                                gradient = tl.fma(ar_factor, current, gradient)
                        else:
                            gradient = ar_factor * current
                        if padded:  # exactly 0 in padding, even where the factor is inf or NaN
                            gradient = tl.where(counts, gradient, 0.0)
                        store_row(grad_raw_rows, grad_raw_first, turn, i, gradient, inside)
                    change_to = change_from
                    current = following[i]
                if dropped is not None:
                    if SUM:
                        ar_run += kept[i] * kept[i]
                    if grad_dropped is not None:
                        gradient = ar_factor * kept[i]
                        if padded:
                            gradient = tl.where(counts, gradient, 0.0)
                        store_row(grad_dropped_rows, grad_dropped_first, turn, i, gradient, inside)
        ar += tl.sum(ar_run)
        tar += tl.sum(tar_run)
    if SUM:
        if WRITE and offsets is not None:  # here, as packed rows leave no registers for it on sm_80
            tl.store(partials + 2 * tl.num_programs(0) + program, upstream)
        outputs = Outputs(penalty, terms, ADDS)
        extents = Extents(lengths if COUNT else None, valid if COUNT else None, counted, sequences, time, inner * ALIGN)
        finish(ar, tar, outputs, Scratch(partials, ticket), extents, weights)


@triton.jit
def load_once(x):
    """Load a scalar by one thread of the program, which the others, that may find another, get from it."""
    BITS: tl.constexpr = tl.int64 if x.dtype.element_ty == tl.float64 else tl.int32
    thread = tl.arange(0, THREADS)
    bits = tl.load(x.to(tl.pointer_type(BITS), bitcast=True) + 0 * thread, mask=thread == 0, other=0)
    return tl.sum(bits).to(x.dtype.element_ty, bitcast=True)


@triton.jit
def differ(x, y):
    """Return whether two scalars differ in their bits: 0 and -0 do, a NaN and itself do not."""
    BITS: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    return x.to(BITS, bitcast=True) != y.to(BITS, bitcast=True)


class PenaltyForward:
    """Compute penalties of tensors of one layout, and the gradients that the backward is expected to ask for.

    Args:
        view: of raw, dropped, and the gradients of both; the operand of a tensor that no term reads, or of a gradient
            that is not wanted, is `None`.
        sums: the sums to compute.
        device: where the tensors are.
    """

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.writes = view.operands[2:] != (None, None)
        tiling = Tiling(view, sums.dtype)
        self.launch = _launch(tiling, sums, device, SUM=True, WRITE=self.writes)
        self.memory = SumMemory(sums, tiling.programs, device)
        self.device, self.expected = device, Expected(sums.dtype, device)

    def __call__(self, tensors: Sequence[Tensor | None], values: Values, before: Result | None = None) -> Result:
        """Compute the penalty, and fill the gradients for the upstream gradient of the last backward.

        Args:
            tensors: as in the view.
            values: lengths and coefficients, those that all calls have.
            before: the result of the layers before, to whose memory this one is added, if the sums say so.
        """
        penalty, terms, partials, ticket = self.memory.allocate(before)
        expected = self.expected.memory() if self.writes else None
        self.launch(*tensors, expected, None, partials, ticket, penalty, terms, *_steps(values, self.device))
        return Result(penalty, terms, Prediction(partials, self.expected) if self.writes else None)


class PenaltyBackward:
    """Compute the gradients of penalties of tensors of one layout.

    Args:
        view: that of the forward, as a program of the same number must have the same items.
        sums: those of the forward.
        device: where the tensors are.
    """

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        tiling = Tiling(view, sums.dtype)
        # Code that compares is other code than that of a backward for which nothing was assumed.
        self.comparing, self.writing = (_launch(tiling, sums, device, SUM=False, WRITE=True) for _ in range(2))
        self.device = device

    def __call__(
        self, grad: Tensor, tensors: Sequence[Tensor | None], values: Values, prediction: Prediction | None
    ) -> None:
        """Fill the gradients, unless the forward has filled them for this very upstream gradient.

        Args:
            grad: the upstream gradient, () in the dtype of the sums.
            tensors: as in the view, but `None` without a gradient.
            values: those of the forward.
            prediction: that of the forward's result, if it has filled these gradients.
        """
        steps = _steps(values, self.device)
        if prediction is None:
            self.writing(*tensors, grad, None, None, None, None, None, *steps)
        else:
            expected = prediction.expected.learn()
            self.comparing(*tensors, grad, expected, prediction.assumed, None, None, None, *steps)

    def holds(self, grad: Tensor, prediction: Prediction) -> bool:
        """Return `False`: only the device can compare, and the host does not wait for it."""
        return False


def _launch(tiling: Tiling, sums: Sums, device: torch.device, **switches: bool) -> Launch:
    """Prepare a launch of the kernel in one of its ways."""
    constants = {
        **switches,
        **tiling.constants,
        "BY_AR": sums.alpha != 0,
        "BY_TAR": sums.beta != 0,
        "AR_OF_RAW": sums.ar_of_raw and sums.ar,
        "ADDS": sums.adds,
        "COUNT": sums.divisors is None,
    }
    return Launch(penalty_kernel, (*tiling.numbers, *sums.weights), constants, tiling.programs, device)


def _steps(values: Values, device: torch.device) -> tuple[Tensor | None, ...]:
    """Return the kernel's arguments on time steps and coefficients, on the device, from lengths to beta."""
    lengths, offsets = values.lengths, None
    if values.batch_sizes is not None:
        offsets, lengths = table_of(values.batch_sizes, device)
    return lengths, offsets, *marks_of(values), values.alpha, values.beta
