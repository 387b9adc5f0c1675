"""AR and TAR on GPUs: one kernel that computes penalties, applies dropout and writes gradients, and its launches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels import tiling
from fastreg.kernels.launch import Launch
from fastreg.kernels.prediction import OnDevice
from fastreg.kernels.reduction import Weights, factors, finish
from fastreg.kernels.tiling import (
    Selection,
    Tiling,
    load_row,
    load_rows,
    rounded,
    row,
    rows_of,
    select,
    select_turn,
    store_row,
    tile_of,
)
from fastreg.kernels.view import Layout, Spec, Values, View, allocator, switches

THREADS = tl.constexpr(tiling.THREADS)


@triton.jit(
    do_not_specialize=[  # values that differ from batch to batch must not compile new code
        *("upstream", "expected", "partials", "ticket", "bits", "counts", "alpha_at", "beta_at"),
        *("raw_outer", "raw_time", "mask_outer", "mask_time", "arrived_outer", "arrived_time"),
        *("dropped_outer", "dropped_time", "grad_raw_outer", "grad_raw_time"),
        *("grad_dropped_outer", "grad_dropped_time", "lanes", "inner", "time", "run", "blocks", "items"),
    ]
)
def ar_tar_kernel(
    ticket,
    raw,
    mask,
    arrived,
    dropped,
    grad_raw,
    grad_dropped,
    upstream,
    expected,
    partials,
    penalty,
    terms,
    bits,
    counts,
    alpha_at,
    beta_at,
    alpha: tl.float64,
    beta: tl.float64,
    raw_outer,
    raw_time,
    mask_outer,
    mask_time,
    arrived_outer,
    arrived_time,
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
    """Compute the penalty of activations, apply a dropout mask, and write gradients, in one pass.

    A switch or an operand selects each part:

        dropped[t] = raw[t] * mask[t]                                       if there is a mask
        ar = ar_scale * sum over t of dropped[t] ** 2                       SUM_AR
        tar = tar_scale * sum over t > 0 of (raw[t] - raw[t - 1]) ** 2      SUM_TAR
        penalty = alpha * ar + beta * tar
        grad_dropped[t] = upstream * 2 * alpha * ar_scale * dropped[t]      GRAD_AR
        grad_raw[t] = (arrived[t] + grad_dropped[t]) * mask[t]              if there is a mask
                      + upstream * 2 * beta * tar_scale * ((raw[t] - raw[t - 1]) - (raw[t + 1] - raw[t]))    GRAD_TAR

    With AR_OF_RAW, ar is the mean square of raw, and its gradient is a part of grad_raw, outside of the parentheses.
    Steps and changes that do not count are in no sum. Their only gradient is the one that arrives.

    A forward has a penalty, and does not know the upstream gradient yet. If it writes gradients, it writes them for the
    expected upstream gradient, which the last backward of its plan has left. Each program stores the value that it
    expected. In the backward the program with the same number has the same items. It returns if the upstream gradient
    has the bits that it expected, and otherwise writes its gradients again. So no gradient depends on the prediction.
    The programs of a launch may even expect different values, if a backward on another stream writes its upstream
    gradient meanwhile. A wrong prediction only costs time.

    ticket                  (1,) int32, a counter for `is_last`; None in a backward, like penalty
    raw, dropped            (outer, time, inner), or None if no part of this call reads it; a forward that has a mask
                            writes dropped
    mask                    the same shape, already scaled, with one row for all time steps if LOCKED; or None
    arrived                 the same shape, a gradient that arrives at dropped, in a call that has a mask; or None
    grad_raw, grad_dropped  out, the same shape, or None if the gradient is not needed
    upstream                () in ACC, the upstream gradient of the penalty; None in a forward, and if there is none
    expected                () in ACC, the expected upstream gradient of forwards, which a backward replaces by its own;
                            None in a forward without gradients, and in a backward for which nothing was predicted
    partials                (3, programs) in ACC: for each program the upstream gradient that it expected, and its
                            partial sums for AR and TAR; None in a backward for which nothing was predicted
    penalty                 () out in ACC
    terms                   (2,) out in ACC: ar and tar; None unless they are measured
    bits                    as in `Selection`
    counts                  (2,) int64, the numbers of steps and changes that count; None if the scales are known
    alpha_at, beta_at       () coefficients in memory, or None
    alpha, beta             coefficients that are not in memory
    *_outer, *_time         strides in units of ALIGN elements; the inner axis is contiguous
    lanes, inner            outer * inner and inner, in units of ALIGN elements
    time, run               the number of time steps, and the number of time steps in a run
    blocks, items           the number of blocks of lanes, and of items of work; an item is a block over a run
    ar_scale, tar_scale     one over the divisors of the sums
    LOCKED                  the mask is the same at all time steps
    ACC                     dtype of differences, products and sums
    ALIGN                   greatest power of two up to 16 that divides inner and every stride
    INDEX                   integer dtype that counts lanes and time steps
    BLOCK, UNROLL           lanes in a block; time steps that one turn of the loop loads
    """
    program = tl.program_id(0)
    weights = Weights(alpha, beta, alpha_at, beta_at, ar_scale, tar_scale, counts, inner * ALIGN)
    selection = Selection(bits, time)
    DROPS: tl.constexpr = penalty is not None and mask is not None
    MASKED_AR: tl.constexpr = GRAD_AR and mask is not None and not AR_OF_RAW
    READS_RAW: tl.constexpr = raw is not None and (DROPS or SUM_AR or SUM_TAR or GRAD_AR or GRAD_TAR)
    AHEAD: tl.constexpr = 1 if GRAD_TAR and grad_raw is not None else 0  # the gradient needs the following row
    CHANGES: tl.constexpr = SUM_TAR or AHEAD
    if GRAD_AR or GRAD_TAR:
        if penalty is not None:
            used = load_once(expected)
            tl.store(partials + program, used)
        else:
            used = tl.load(upstream)
            if expected is not None:
                tl.store(expected, used, mask=program == 0)
                if not differ(tl.load(partials + program), used):
                    return
        ar_factor, tar_factor = factors(weights, used)
    ar = tl.full((), 0.0, ACC)
    tar = tl.full((), 0.0, ACC)
    for item in range(program, items, tl.num_programs(0)):
        tile = tile_of(item, blocks, lanes, inner, time, run, ALIGN, INDEX, BLOCK)
        stop = time if AHEAD else tile.stop
        raw_rows = rows_of(raw, tile, raw_outer, raw_time, ALIGN)
        mask_rows = rows_of(mask, tile, mask_outer, mask_time, ALIGN)
        arrived_rows = rows_of(arrived, tile, arrived_outer, arrived_time, ALIGN)
        dropped_rows = rows_of(dropped, tile, dropped_outer, dropped_time, ALIGN)
        grad_raw_rows = rows_of(grad_raw, tile, grad_raw_outer, grad_raw_time, ALIGN)
        grad_dropped_rows = rows_of(grad_dropped, tile, grad_dropped_outer, grad_dropped_time, ALIGN)
        counted, joined = select(selection, tile, tile.start, stop, True)
        if CHANGES:  # the last row that was read, and with AHEAD the change into it
            last = load_row(raw_rows, tile.start - 1, joined, ACC)
            if AHEAD:
                first = load_row(raw_rows, tile.start, counted, ACC)
                change_to = tl.where(joined, first - last, 0.0)
                last = first
        if LOCKED:
            mask_row = load_row(mask_rows, 0, tile.present, ACC)
        ar_run = tl.zeros((BLOCK,), ACC)
        tar_run = tl.zeros((BLOCK,), ACC)
        for turn in tl.range(tile.start, tile.stop, UNROLL, num_stages=1):  # rows go to registers
            there, into = select_turn(selection, tile, counted, joined, turn, stop, AHEAD, UNROLL)
            counted, joined = there[UNROLL], into[UNROLL]
            whole = Selection(None, time)
            inside = select_turn(whole, tile, counted, joined, turn, stop, AHEAD, UNROLL)[0]
            if dropped is not None:
                dropped_first = row(dropped_rows, turn)
            if grad_raw is not None:
                grad_raw_first = row(grad_raw_rows, turn)
            if grad_dropped is not None:
                grad_dropped_first = row(grad_dropped_rows, turn)
            if mask is None:
                droppeds = load_rows(dropped_rows, turn, there, 0, ACC, UNROLL)
            if READS_RAW:
                raws = load_rows(raw_rows, turn, inside if DROPS else there, AHEAD, ACC, UNROLL)
            if not LOCKED:
                masks = load_rows(mask_rows, turn, inside, 0, ACC, UNROLL)
            arriving = load_rows(arrived_rows, turn, inside, 0, ACC, UNROLL)
            for i in tl.static_range(UNROLL):
                if READS_RAW:
                    current = last if AHEAD else raws[i]
                if CHANGES:
                    change = tl.where(into[i + AHEAD], raws[i] - last, 0.0)
                if mask is not None and not LOCKED:
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
                        own = tar_factor * (change_to - change)
                    if GRAD_AR and AR_OF_RAW:  # an explicit fma, because a compiler might fuse the other product
                        own = tl.fma(ar_factor, current, own) if GRAD_TAR else ar_factor * current
                    if bits is not None:  # exactly 0 in padding, even if the factor is infinite or NaN
                        own = tl.where(there[i], own, 0.0)
                    gradient = own
                    if arrived is not None or MASKED_AR:
                        through = arriving[i] if arrived is not None else tl.zeros((BLOCK,), ACC)
                        if MASKED_AR:
                            through += tl.where(there[i], ar_factor * kept, 0.0)
                        gradient = own + through * mask_row
                    store_row(grad_raw_rows, grad_raw_first, i, gradient, inside[i])
                if SUM_TAR:
                    tar_run += change_to * change_to if AHEAD else change * change
                if SUM_AR:
                    squared = current if AR_OF_RAW else kept
                    if DROPS:  # an explicit fma takes 63 registers instead of 85 in bfloat16 on sm_90
                        squared = tl.where(there[i], squared, 0.0)
                        ar_run = tl.fma(squared, squared, ar_run)
                    else:
                        ar_run += squared * squared
                if grad_dropped is not None:
                    own = ar_factor * kept
                    if bits is not None:  # as above
                        own = tl.where(there[i], own, 0.0)
                    store_row(grad_dropped_rows, grad_dropped_first, i, own, inside[i])
                if CHANGES:
                    last = raws[i]
                    if AHEAD:
                        change_to = change
        ar += tl.sum(ar_run)
        tar += tl.sum(tar_run)
    if penalty is not None:
        finish(ar, tar, partials, ticket, weights, penalty, terms)


@triton.jit
def load_once(x):
    """Load a scalar by one thread of the program and pass it to the others, which might load another value."""
    BITS: tl.constexpr = tl.int64 if x.dtype.element_ty == tl.float64 else tl.int32
    thread = tl.arange(0, THREADS)
    bits = tl.load(x.to(tl.pointer_type(BITS), bitcast=True) + 0 * thread, mask=thread == 0, other=0)
    return tl.sum(bits).to(x.dtype.element_ty, bitcast=True)


@triton.jit
def differ(x, y):
    """Return whether two scalars differ in their bits. 0 and -0 differ; a NaN does not differ from itself."""
    BITS: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    return x.to(BITS, bitcast=True) != y.to(BITS, bitcast=True)


class Forward:
    """Apply dropout masks, compute penalties, and write the gradients that the backward is expected to ask for.

    Args:
        view: the view of the operands: raw, dropped and the gradients to write; or raw, mask, and dropped to write.
            A mask that is the same at all time steps has a time stride of 0.
        spec: what is computed.
        device: the device of the tensors.

    Attributes:
        prediction: the upstream gradient for which gradients are written; a `Backward` keeps it up to date.
        summing: the forward that writes no gradients, from the first call that needs it on.
    """

    def __init__(self, view: View, spec: Spec, device: torch.device) -> None:
        self.facts = view.without_gradients(), spec, device
        self.writes, self.launch = view.writes(), launch_of(view, spec, device, is_forward=True)
        self.measured, self.prediction = spec.measured, OnDevice(spec.dtype, device)
        self.summing: Forward | None = None
        shapes = torch.Size(), torch.Size([2]), torch.Size([3 * self.launch.grid[0]])
        self.penalty, self.terms, self.partials = (
            allocator(Layout(shape, (1,) * len(shape), spec.dtype, device, aligned=True)) for shape in shapes
        )

    def __call__(self, tensors: Sequence[Tensor | None], values: Values) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute the penalty; write dropped, or the gradients for the expected upstream gradient.

        Args:
            tensors: as in the view, or without memory for gradients.
            values: coefficients, and the steps that count.

        Returns:
            The penalty, (). AR and TAR, (2,), or `None` unless they are measured. The upstream gradients for which
                gradients were written, in the form that a `Backward` compares, or `None` if none were written.
        """
        if self.writes and tensors[4] is None is tensors[5]:
            if self.summing is None:
                self.summing = Forward(*self.facts)
            return self.summing(tensors, values)
        penalty, terms, partials = self.penalty(), self.terms() if self.measured else None, self.partials()
        expected = self.prediction.expected() if self.writes else None
        self.launch(*tensors, None, expected, partials, penalty, terms, *_arguments(values))
        return penalty, terms, partials if self.writes else None


class Backward:
    """Compute the gradients of penalties, and add those that arrive.

    Args:
        view: the view of the operands: raw, mask, arrived and grad_raw; or raw, dropped and their gradients. If the
            forward predicts gradients, this must be the forward's view, because a program must have the same items.
        spec: what the forward computes; no term has a gradient if the penalty has no upstream gradient.
        device: the device of the tensors.
        prediction: the `prediction` of the forward; `None` if it never predicts gradients.
    """

    def __init__(self, view: View, spec: Spec, device: torch.device, prediction: Any = None) -> None:
        self.prediction = prediction
        # A backward that compares upstream gradients runs other compiled code than one for which nothing was predicted.
        self.comparing = launch_of(view, spec, device, is_forward=False)
        self.writing = copy(self.comparing)

    def __call__(
        self, upstream: Tensor | None, tensors: Sequence[Tensor | None], values: Values, expected: Tensor | None = None
    ) -> None:
        """Write the gradients, unless the forward has written them for this very upstream gradient.

        Args:
            upstream: the gradient of the penalty, () in the dtype of the penalty; `None` if the penalty has none.
            tensors: as in the view; a gradient that is not needed is `None`.
            values: the values of the forward.
            expected: the last result of the forward, if it has written these gradients.
        """
        launch, memory = self.writing, None
        if expected is not None:
            launch, memory = self.comparing, self.prediction.learn(upstream)
        launch(*tensors, upstream, memory, expected, None, None, *_arguments(values))


def _arguments(values: Values) -> Sequence[Any]:
    """Return the values as the kernel takes them: a coefficient is either a pointer into memory or a number."""
    alpha, beta, bits, counts = values
    alpha_at, alpha = (None, alpha) if type(alpha) is float else (alpha, 1.0)
    beta_at, beta = (None, beta) if type(beta) is float else (beta, 1.0)
    return bits, counts, alpha_at, beta_at, alpha, beta


def launch_of(view: View, spec: Spec, device: torch.device, is_forward: bool) -> Launch:
    """Prepare the launch of the kernel over a view. A forward draws tickets, and a backward does not."""
    mask, tiling = view.operands.mask, Tiling(view, spec.dtype)
    locked = mask is not None and (view.time == 1 or mask.time == 0)
    scales = [1 / divisor for divisor in view.divisors(spec.reduction)]
    rest = *tiling.numbers, *scales, *switches(view, spec, is_forward), locked, *tiling.constants.values()
    return Launch(ar_tar_kernel, rest, tiling.programs, device, is_forward)
