"""The time steps that count, on GPUs: one kernel encodes them as bytes, and counts them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.kernels.reduction import CHUNK, is_last

AT_ONCE = tl.constexpr(1024)  # steps that a program encodes at once


@triton.jit(do_not_specialize=["lengths", "valid", "starts", "partials", "ticket", "total", "time", "share"])
def steps_kernel(
    ticket,
    lengths,
    valid,
    starts,
    bits,
    counts,
    partials,
    total,
    time,
    share,
    INDEX: tl.constexpr,
):
    """Encode which time steps count, and count them.

        step t counts             if t < length and valid[t]
        the change into t counts  if step t counts, step t - 1 counts, and not starts[t]

    ticket    (1,) int32, a counter for `is_last`
    lengths   (sequences,) integers, the number of time steps of each sequence that count; None if all count
    valid     (sequences, time) bool, true at time steps that count; None if all count
    starts    (sequences, time) bool, true at steps into which no change counts; or None
    bits      (sequences, time) uint8 out: bit 0 is set if the step counts, bit 1 if the change into it counts
    counts    (2,) int64 out: the number of steps that count, and of changes that count
    partials  (2, programs) int64: the counts of each program
    total     number of steps of all sequences
    time      number of steps of a sequence
    share     number of steps of a program
    INDEX     integer dtype that counts steps
    """
    programs = tl.num_programs(0)
    begin = tl.cast(tl.program_id(0), INDEX) * share
    end = tl.minimum(begin + share, total)
    steps = tl.zeros((AT_ONCE,), tl.int32)
    changes = tl.zeros((AT_ONCE,), tl.int32)
    for first in range(begin, end, AT_ONCE):
        at = first + tl.arange(0, AT_ONCE)
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
        tl.store(bits + at, now.to(tl.uint8) | (into.to(tl.uint8) << 1), mask=inside)
        steps += now.to(tl.int32)
        changes += into.to(tl.int32)
    partial = partials + tl.program_id(0)
    tl.store(partial, tl.sum(steps.to(tl.int64)))
    tl.store(partial + programs, tl.sum(changes.to(tl.int64)))
    if is_last(ticket):
        columns = tl.arange(0, CHUNK)
        for i in tl.static_range(2):  # .cg: past the L1 cache, which other programs' stores do not reach
            at = partials + i * programs + columns
            tl.store(counts + i, tl.sum(tl.load(at, mask=columns < programs, other=0, cache_modifier=".cg")))
