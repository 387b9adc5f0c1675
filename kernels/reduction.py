"""The sum in one launch and a fixed order that all forward kernels share.

Every program leaves its partial sums in memory and takes a ticket. The one that draws the last ticket adds all
partial sums, always in the same order, so the result does not depend on which program that was.
"""

from __future__ import annotations

from threading import Lock
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastreg.kernels.tiling import ends
from fastreg.kernels.view import Found, Result, Sums

CHUNK = tl.constexpr(512)  # partial sums, or lengths, that the last program loads at once
RESERVE = 4096  # tickets a device: one for each stream and for each call captured in a CUDA graph

_lock = Lock()  # for the reserve: no thread draws from it before its zeros are there
_reserve: dict[torch.device, list[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


class Outputs(NamedTuple):
    """What a forward kernel writes, inside the kernel: pointers in ACC; `scales` may be None."""

    penalty: Any
    terms: Any
    scales: Any


class Scratch(NamedTuple):
    """Memory that programs share, inside a kernel: `(2 * programs,)` partial sums in ACC, and a ticket, int32."""

    partials: Any
    ticket: Any


class Extents(NamedTuple):
    """What counts follow from, inside a kernel: lengths or None, how many, time steps in all, and the hidden size."""

    lengths: Any
    sequences: Any
    time: Any
    hidden: Any


class Weights(NamedTuple):
    """Numbers that the two sums are multiplied by, inside a kernel: coefficients, and one over the divisors."""

    alpha: Any
    beta: Any
    ar_scale: Any
    tar_scale: Any


@triton.jit
def finish(ar, tar, outputs, scratch, extents, weights):
    """Add up the partial sums of all programs, in the last of them, and write the penalty and its terms.

        terms = ar_scale * sum of ar, tar_scale * sum of tar
        penalty = alpha * terms[0] + beta * terms[1]

    ar, tar  scalars, this program's partial sums of squares
    outputs  of which `scales`, where it is not None, receives one over the divisors that follow from the lengths; they
             take the place of ar_scale and tar_scale
    scratch  of which the ticket is 0 before the launch and after it
    extents  of which the lengths are only read for `scales`
    weights  alpha, beta, ar_scale, tar_scale
    """
    programs = tl.num_programs(0)
    partial = scratch.partials + tl.program_id(0)
    tl.store(partial, ar)
    tl.store(partial + programs, tar)
    tl.debug_barrier()  # this program's stores come before its ticket, whichever threads make them
    if tl.atomic_add(scratch.ticket, 1, sem="acq_rel") == programs - 1:
        dtype: tl.constexpr = ar.dtype
        columns = tl.arange(0, CHUNK)
        ar_sums = tl.zeros((CHUNK,), dtype)
        tar_sums = tl.zeros((CHUNK,), dtype)
        for first in range(0, programs, CHUNK):
            there = first + columns < programs
            at = scratch.partials + first + columns
            # .cg: past the L1 cache, which other programs' stores do not reach
            ar_sums += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            tar_sums += tl.load(at + programs, mask=there, other=0.0, cache_modifier=".cg")
        if outputs.scales is not None:
            steps = tl.zeros((CHUNK,), tl.int64)
            pairs = tl.zeros((CHUNK,), tl.int64)
            for first in range(0, extents.sequences, CHUNK):
                sequence = first + columns
                length = ends(extents.lengths, sequence, sequence < extents.sequences, extents.time, tl.int64)
                steps += length
                pairs += tl.maximum(length - 1, 0)
            ar_mean = tl.sum(ar_sums) * one_over(tl.sum(steps) * extents.hidden, outputs.scales, dtype)
            tar_mean = tl.sum(tar_sums) * one_over(tl.sum(pairs) * extents.hidden, outputs.scales + 1, dtype)
        else:
            ar_mean = tl.sum(ar_sums) * tl.full((), weights.ar_scale, dtype)
            tar_mean = tl.sum(tar_sums) * tl.full((), weights.tar_scale, dtype)
        tl.store(outputs.terms, ar_mean)
        tl.store(outputs.terms + 1, tar_mean)
        penalty = tl.full((), weights.alpha, dtype) * ar_mean + tl.full((), weights.beta, dtype) * tar_mean
        tl.store(outputs.penalty, penalty)
        tl.store(scratch.ticket, 0)


@triton.jit
def one_over(count, scale, dtype: tl.constexpr):
    """Compute one over a count, or 1 where it is 0, and write it to `scale`, too."""
    value = 1.0 / tl.maximum(count, 1).to(dtype)
    tl.store(scale, value)
    return value


def ticket_for(device: torch.device) -> Tensor:
    """Return a zeroed counter, (1,) int32, for a launch on the current stream of `device`.

    No two launches in flight share one.

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


class SumMemory:
    """Allocate the memory that a forward kernel needs for its sums.

    Args:
        sums: what is computed.
        programs: how many programs share the work.
        device: where they run.
    """

    def __init__(self, sums: Sums, programs: int, device: torch.device) -> None:
        self.options = {"dtype": sums.dtype, "device": device}
        self.partials, self.with_scales, self.device = 2 * programs, sums.divisors is None, device

    def allocate(self) -> tuple[Result, Tensor, Tensor]:
        """Return the result to be written, memory for partial sums, and a ticket."""
        scales = self._empty(2) if self.with_scales else None
        penalty = torch.empty_strided((), (), **self.options)
        return Result(penalty, self._empty(2), Found(scales, None)), self._empty(self.partials), ticket_for(self.device)

    def _empty(self, count: int) -> Tensor:
        """Allocate a vector; `torch.empty` takes 1 us longer."""
        return torch.empty_strided((count,), (1,), **self.options)
