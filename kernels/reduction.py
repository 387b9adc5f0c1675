"""The one-launch, fixed-order sum that the forwards share.

Every program leaves its partial sums in memory and takes a ticket. The one that draws the last ticket adds all
partial sums, always in the same order, so the result does not depend on which program that was.
"""

from __future__ import annotations

from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastreg.kernels.tiling import ends

CHUNK = tl.constexpr(512)  # partial sums, or lengths, that the last program loads at once
RESERVE = 4096  # tickets a device: one for each stream and for each call captured in a CUDA graph

_lock = Lock()  # for the reserve: no thread draws from it before its zeros are there
_reserve: dict[torch.device, list[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def finish(
    ar,
    tar,
    penalty,
    terms,
    scales,
    partials,
    ticket,
    lengths,
    sequences,
    time,
    hidden,
    alpha,
    beta,
    ar_scale,
    tar_scale,
):
    """Add up the partial sums of all programs and write the penalty and its terms.

    ar, tar              scalars, this program's partial sums of squares
    penalty              () out: alpha * ar_scale * (sum of ar) + beta * tar_scale * (sum of tar)
    terms                (2,) out: the two scaled sums
    scales               (2,) out: ar_scale and tar_scale as found from the lengths; None where they are given
    partials             (2 * programs,) memory for the partial sums
    ticket               (1,) int32, 0 before the launch and after it
    lengths              (sequences,) integers, how many of `time` steps of `hidden` units count; None without scales
    alpha, beta          scalars, the coefficients
    ar_scale, tar_scale  scalars, one over the divisors; not looked at where scales is not None
    """
    programs = tl.num_programs(0)
    partial = partials + tl.program_id(0)
    tl.store(partial, ar)
    tl.store(partial + programs, tar)
    tl.debug_barrier()  # this program's stores come before its ticket, whichever threads make them
    if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
        dtype: tl.constexpr = ar.dtype
        columns = tl.arange(0, CHUNK)
        ar_sums = tl.zeros((CHUNK,), dtype)
        tar_sums = tl.zeros((CHUNK,), dtype)
        for first in range(0, programs, CHUNK):
            there = first + columns < programs
            at = partials + first + columns
            # .cg: past the L1 cache, which other programs' stores do not reach
            ar_sums += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            tar_sums += tl.load(at + programs, mask=there, other=0.0, cache_modifier=".cg")
        if scales is not None:
            steps = tl.zeros((CHUNK,), tl.int64)
            pairs = tl.zeros((CHUNK,), tl.int64)
            for first in range(0, sequences, CHUNK):
                length = ends(lengths, first + columns, first + columns < sequences, time, tl.int64)
                steps += length
                pairs += tl.maximum(length - 1, 0)
            ar_mean = tl.sum(ar_sums) * one_over(tl.sum(steps) * hidden, scales, dtype)
            tar_mean = tl.sum(tar_sums) * one_over(tl.sum(pairs) * hidden, scales + 1, dtype)
        else:
            ar_mean = tl.sum(ar_sums) * tl.full((), ar_scale, dtype)
            tar_mean = tl.sum(tar_sums) * tl.full((), tar_scale, dtype)
        tl.store(terms, ar_mean)
        tl.store(terms + 1, tar_mean)
        tl.store(penalty, tl.full((), alpha, dtype) * ar_mean + tl.full((), beta, dtype) * tar_mean)
        tl.store(ticket, 0)


@triton.jit
def one_over(count, scale, dtype: tl.constexpr):
    """One over a count, of which nothing is 1; written to memory, too."""
    value = 1.0 / tl.maximum(count, 1).to(dtype)
    tl.store(scale, value)
    return value


def ticket_for(device: torch.device) -> Tensor:
    """A zeroed counter, int32, for a launch on the current stream of `device`; no two in flight share one.

    Launches on one stream run one after another and share a ticket, which each leaves at 0. A launch captured
    in a CUDA graph gets a ticket of its own: its replays may run beside anything but each other. On the CPU the
    interpreter may be cut off halfway, so nothing is left to the next launch.
    """
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        with _lock:
            reserve = _reserve.get(device)
            # With no reserve the graph zeroes a ticket at each replay, in one more node.
            return reserve.pop() if reserve else torch.zeros(1, dtype=torch.int32, device=device)
    stream = driver.active.get_current_stream(device.index)
    ticket = _of_stream.get((device, stream))
    if ticket is None:
        with _lock:
            reserve = _reserve.setdefault(device, [])
            if not reserve:
                reserve.extend(torch.zeros(RESERVE, dtype=torch.int32, device=device).split(1))
                torch.accelerator.synchronize(device)  # once: other streams must see the zeros
            ticket = _of_stream.setdefault((device, stream), reserve.pop())
    return ticket
