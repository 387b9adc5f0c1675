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

CHUNK = tl.constexpr(512)  # partial sums that the last program loads at once
RESERVE = 4096  # tickets a device: one for each stream and for each call captured in a CUDA graph

_lock = Lock()  # for the reserve: no thread draws from it before its zeros are there
_reserve: dict[torch.device, list[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def finish(ar, tar, penalty, terms, partials, ticket, alpha, beta, ar_scale, tar_scale):
    """Add up the partial sums of all programs and write the penalty and its terms.

    ar, tar              scalars, this program's partial sums of squares
    penalty              () out: alpha * ar_scale * (sum of ar) + beta * tar_scale * (sum of tar)
    terms                (2,) out: the two scaled sums
    partials             (2 * programs,) memory for the partial sums
    ticket               (1,) int32, 0 before the launch and after it
    alpha, beta          scalars, the coefficients
    ar_scale, tar_scale  scalars, one over the divisors
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
        ar_mean = tl.sum(ar_sums) * tl.full((), ar_scale, dtype)
        tar_mean = tl.sum(tar_sums) * tl.full((), tar_scale, dtype)
        tl.store(terms, ar_mean)
        tl.store(terms + 1, tar_mean)
        tl.store(penalty, tl.full((), alpha, dtype) * ar_mean + tl.full((), beta, dtype) * tar_mean)
        tl.store(ticket, 0)


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
