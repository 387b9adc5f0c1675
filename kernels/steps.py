"""The time steps that count on GPUs, marked and counted once a call, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels.launch import Grid, Launch
from fastreg.kernels.reduction import CHUNK, is_last
from fastreg.kernels.tiling import LARGE, WARPS, ceil_div
from fastreg.kernels.view import Layout, allocator

SHARE = 4096  # steps that a program marks at least
STEPS = 1024  # steps that it marks at once


@triton.jit(do_not_specialize=["lengths", "valid", "starts", "partials", "ticket", "total", "time", "share"])
def steps_kernel(
    ticket,
    lengths,
    valid,
    starts,
    steps,
    counts,
    partials,
    total,
    time,
    share,
    INDEX: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Mark the time steps that count, and count them.

        counts[t] = t < length and valid[t]
        change into t counts = counts[t] and counts[t - 1] and not starts[t]

    ticket    (1,) int32, as `is_last` wants it
    lengths   (sequences,) integers, how many time steps of a sequence count; None if all do
    valid     (sequences, time) bool, which time steps count; None if all do
    starts    (sequences, time) bool, the steps that no change leads to, or None
    steps     (sequences, time) uint8 out: bit 0 if a step counts, bit 1 if the change into it does
    counts    (2,) int64 out: how many of each
    partials  (2, programs) int64: those of each program
    total     steps of all sequences
    time      steps of a sequence
    share     steps of a program
    INDEX     integer dtype that counts steps
    STEPS     steps that a program marks at once
    """
    programs = tl.num_programs(0)
    begin = tl.cast(tl.program_id(0), INDEX) * share
    end = tl.minimum(begin + share, total)
    rows = tl.zeros((STEPS,), tl.int32)
    pairs = tl.zeros((STEPS,), tl.int32)
    for first in range(begin, end, STEPS):
        at = first + tl.arange(0, STEPS)
        step = at % time
        inside = at < end
        now = inside
        before = inside & (step > 0)
        if lengths is not None:
            length = tl.load(lengths + at // time, mask=inside, other=0)
            now &= step < length
            before &= step - 1 < length
        if valid is not None:
            now &= tl.load(valid + at, mask=now, other=0) != 0
            before &= tl.load(valid + at - 1, mask=before, other=0) != 0
        into = now & before
        if starts is not None:
            into &= tl.load(starts + at, mask=into, other=0) == 0
        tl.store(steps + at, now.to(tl.uint8) | (into.to(tl.uint8) << 1), mask=inside)
        rows += now.to(tl.int32)
        pairs += into.to(tl.int32)
    partial = partials + tl.program_id(0)
    tl.store(partial, tl.sum(rows.to(tl.int64)))
    tl.store(partial + programs, tl.sum(pairs.to(tl.int64)))
    if is_last(ticket):
        columns = tl.arange(0, CHUNK)
        for i in tl.static_range(2):  # .cg: past the L1 cache, which other programs' stores do not reach
            at = partials + i * programs + columns
            tl.store(counts + i, tl.sum(tl.load(at, mask=columns < programs, other=0, cache_modifier=".cg")))


class Marker:
    """Mark and count the time steps of sequences, once for all launches of a call.

    Args:
        shape: `(sequences, time)`.
        device: where the activations are.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        total = shape[0] * shape[1]
        programs = min(ceil_div(total, SHARE), CHUNK.value)
        share = ceil_div(ceil_div(total, programs), STEPS) * STEPS
        index = tl.int64 if total >= LARGE else tl.int32
        constants = {"INDEX": index, "STEPS": STEPS, "num_warps": WARPS, "enable_fp_fusion": True}
        self.launch = Launch(steps_kernel, (total, shape[1], share), constants, Grid(programs, device))
        self.steps = allocator(Layout(torch.Size(shape), (shape[1], 1), torch.uint8, device, aligned=True))
        self.counts, self.partials = (
            allocator(Layout(torch.Size([2 * n]), (1,), torch.int64, device, aligned=True)) for n in (1, programs)
        )

    def __call__(self, lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the marks and counts of `Steps`.

        Args:
            lengths: `(sequences,)` integers on the device: how many time steps count; `None` for all.
            valid: `(sequences, time)` contiguous bool on the device: which time steps count.
            starts: like valid: the steps that no change leads to.
        """
        steps, counts, partials = self.steps(), self.counts(), self.partials()
        self.launch(lengths, valid, starts, steps, counts, partials)
        return steps, counts
