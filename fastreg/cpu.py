"""The penalty on CPU tensors, a block at a time, so that no temporary is as large as the input.

Its functions take and give what those of `fastreg.kernels.penalty` do.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.kernels.view import Result, Sums, View
from fastreg.problem import compute_dtype

BLOCK = 2**19  # elements: smaller blocks lose to the cost of dispatch, larger ones leave the cache


class Forward:
    """Compute the penalty as `fastreg.kernels.penalty.Forward` does."""

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.view, self.sums, self.strides = view, sums, strides_of(view)

    def __call__(
        self, raw: Tensor | None, dropped: Tensor | None, lengths: Tensor | None, batch_sizes: Tensor | None
    ) -> Result:
        sums, sizes = self.sums, self.view[:3]
        options = self.strides, lengths, batch_sizes, sums.alpha, sums.beta, sums.divisors
        return Result(*forward(raw, dropped, sums.ar_of_raw, sizes, *options))


class Backward:
    """Fill gradients as `fastreg.kernels.penalty.Backward` does."""

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.view, self.sums, self.strides = view, sums, strides_of(view)

    def __call__(
        self,
        grad: Tensor,
        inputs: tuple[Tensor | None, Tensor | None],
        gradients: tuple[Tensor | None, Tensor | None],
        scales: Tensor | None,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
    ) -> None:
        tensors = *inputs, *gradients, self.sums.ar_of_raw
        backward(grad, *tensors, self.view[:3], self.strides, lengths, batch_sizes, scales, *self.sums.factors)


def strides_of(view: View) -> list[tuple[int, int]]:
    """Return the strides of each operand, of outer and of time."""
    return [(0, 0) if x is None else (x.outer, x.time) for x in view.operands]


def forward(
    raw: Tensor | None,
    dropped: Tensor | None,
    same: bool,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    alpha: float,
    beta: float,
    divisors: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The penalty, (), a vector of ar and tar, and without divisors one over those of the lengths.

    `sizes` is (outer, time, inner), none of them 0.
    """
    dtype = compute_dtype(raw, dropped)
    if lengths is not None or batch_sizes is not None:
        ar, tar = sums_of_rows(raw, raw if same else dropped, strides, Rows(sizes, lengths, batch_sizes), dtype)
        return results(ar, tar, alpha, beta, divisors, sizes, lengths, dtype)
    raw, dropped = _view(raw, sizes, strides[0]), _view(dropped, sizes, strides[1])
    rows, squares = Scratch(dtype), Scratch(dtype)
    ar = tar = 0.0
    for outer, start, stop, inner in blocks(sizes):
        if raw is not None:
            first = max(start - 1, 0)
            block = rows.hold(raw[outer, first:stop, inner])
            tar += change_square_sum(block, squares)
            if same:
                ar += square_sum(block[:, start - first :], squares)
        if dropped is not None:
            ar += square_sum(rows.hold(dropped[outer, start:stop, inner]), squares)
    return results(ar, tar, alpha, beta, divisors, sizes, lengths, dtype)


def backward(
    grad: Tensor,
    raw: Tensor | None,
    dropped: Tensor | None,
    grad_raw: Tensor | None,
    grad_dropped: Tensor | None,
    same: bool,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    scales: Tensor | None,
    ar_factor: float,
    tar_factor: float,
) -> None:
    """Fill `grad_raw` and `grad_dropped`; a tensor that needs no gradient is None, and so is its gradient."""
    ar_scale, tar_scale = gradient_scales(grad, scales, ar_factor, tar_factor)
    if lengths is not None or batch_sizes is not None:
        counted = Rows(sizes, lengths, batch_sizes)
        _fill_rows(raw, dropped, grad_raw, grad_dropped, same, strides, counted, ar_scale, tar_scale, grad.dtype)
        return
    raw, dropped = _view(raw, sizes, strides[0]), _view(dropped, sizes, strides[1])
    grad_raw, grad_dropped = _view(grad_raw, sizes, strides[2]), _view(grad_dropped, sizes, strides[3])
    rows, changes, slopes = Scratch(grad.dtype), Scratch(grad.dtype), Scratch(grad.dtype)
    for outer, start, stop, inner in blocks(sizes):
        if raw is not None and grad_raw is not None:
            change = change_of_rows(raw[outer, :, inner], start, stop, rows, changes)
            target = grad_raw[outer, start:stop, inner]
            slope = target if target.dtype == grad.dtype else slopes.shaped(*target.shape)
            torch.sub(change[:, :-1], change[:, 1:], out=slope).mul_(tar_scale)
            if same:
                slope.add_(raw[outer, start:stop, inner], alpha=ar_scale)
            if slope is not target:
                target.copy_(slope)
        if dropped is not None and grad_dropped is not None:
            target = grad_dropped[outer, start:stop, inner]
            block = dropped[outer, start:stop, inner]
            if grad.dtype == torch.float32 or target.dtype == grad.dtype:  # mul works in float32 on half precision
                torch.mul(block, ar_scale, out=target)
            else:
                target.copy_(slopes.hold(block).mul_(ar_scale))


class Idle(threading.local):
    """What the scratches of a thread leave to those of its next call."""

    def __init__(self) -> None:
        self.memory: list[Tensor] = []


_idle = Idle()


class Scratch:
    """Memory for one block at a time, in the dtype of the computation.

    A thread keeps its own, a few MB in all. Fetched anew it would come from the system page by page, which takes longer
    than the sums do, and freed it can make the allocator hand back the memory of the gradients as well.
    """

    def __init__(self, dtype: torch.dtype):
        self.kept = _idle.memory.pop() if _idle.memory else _doubles(0)
        self.memory = self.kept.view(dtype)

    def __del__(self) -> None:
        _idle.memory.append(self.kept)

    def shaped(self, *shape: int) -> Tensor:
        count = shape[0] * shape[1] * shape[2]
        if len(self.memory) < count:
            self.kept = _doubles(-(-count * self.memory.itemsize // 8))
            self.memory = self.kept.view(self.memory.dtype)
        return self.memory[:count].view(shape)

    def hold(self, block: Tensor) -> Tensor:
        """`block` in the computation's dtype: itself, or a copy."""
        return block if block.dtype == self.memory.dtype else self.shaped(*block.shape).copy_(block)


@torch.inference_mode(False)  # in which memory can be written by later calls
def _doubles(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float64, device="cpu")


def blocks(sizes: Sequence[int]) -> Iterator[tuple[slice, int, int, slice]]:
    """Cover the view by blocks: sequences, first and last time step, units. Long axes are cut from the last."""
    outer, time, inner = sizes
    units = min(inner, BLOCK)
    steps = min(time, max(BLOCK // units, 1))
    sequences = min(outer, max(BLOCK // (units * steps), 1)) if steps == time and units == inner else 1
    for sequence in range(0, outer, sequences):
        for start in range(0, time, steps):
            for unit in range(0, inner, units):
                chosen = slice(sequence, sequence + sequences), slice(unit, unit + units)
                yield chosen[0], start, min(start + steps, time), chosen[1]


def square_sum(block: Tensor, squares: Scratch) -> float:
    # Not torch.dot: its plain running sums are off by up to 7e-5 over a block, sum()'s cascade by 4e-8.
    return torch.mul(block, block, out=squares.shaped(*block.shape)).sum().item()


def change_square_sum(block: Tensor, squares: Scratch) -> float:
    """The sum of the squared changes along time, axis 1."""
    squared = squares.shaped(block.shape[0], block.shape[1] - 1, block.shape[2])
    return torch.ops.aten.mse_loss.out(block[:, 1:], block[:, :-1], 0, out=squared).sum().item()  # 0: no reduction


def change_of_rows(x: Tensor, start: int, stop: int, rows: Scratch, changes: Scratch) -> Tensor:
    """The changes that lead to the steps from `start` to `stop`, both included; 0 where one lacks a neighbour.

    `x` is (sequences, time, units); gives (sequences, stop - start + 1, units), in memory of `changes`.
    """
    block = rows.hold(x[:, max(start - 1, 0) : min(stop + 1, x.shape[1])])
    return change_between(block, start == 0, stop == x.shape[1], changes)


def change_between(block: Tensor, at_start: bool, at_end: bool, changes: Scratch) -> Tensor:
    """The changes along time, axis 1, with a 0 before them at the start of all time, and one behind at the end."""
    change = changes.shaped(block.shape[0], block.shape[1] - 1 + at_start + at_end, block.shape[2])
    if at_start:
        change[:, 0] = 0
    if at_end:
        change[:, -1] = 0
    torch.sub(block[:, 1:], block[:, :-1], out=change[:, int(at_start) : change.shape[1] - int(at_end)])
    return change


def results(
    ar: float,
    tar: float,
    alpha: float,
    beta: float,
    divisors: tuple[int, int] | None,
    sizes: Sequence[int],
    lengths: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a forward gives, of its sums."""
    scales = None
    if divisors is None:
        assert lengths is not None
        counts = lengths.tolist()
        divisors = max(sum(counts) * sizes[2], 1), max(sum(max(n - 1, 0) for n in counts) * sizes[2], 1)
        scales = _tensor([1 / n for n in divisors], dtype)
    ar, tar = ar / divisors[0], tar / divisors[1]
    return _tensor(alpha * ar + beta * tar, dtype), _tensor([ar, tar], dtype), scales


def gradient_scales(
    grad: Tensor | None, scales: Tensor | None, ar_factor: float, tar_factor: float
) -> tuple[float, float]:
    """What the gradients of the two sums are multiplied by."""
    if grad is None:
        return 0.0, 0.0
    ar, tar = grad.new_ones(2) if scales is None else scales
    # inf where that dtype has no such number; divided first, as together they may overflow
    return (ar_factor * ar * grad).item(), (tar_factor * tar * grad).item()


def _tensor(values: float | list[float], dtype: torch.dtype) -> Tensor:
    """A tensor of numbers, on the CPU whatever the default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


class Found(NamedTuple):
    """A tensor as (any, inner) rows, and the places in it of those that count."""

    rows: Tensor
    places: Tensor
    numbers: Tensor | None = None  # of each row, which of those that count it is, or how many they are: it is padding

    def take(self, chosen: slice, scratch: Scratch) -> Tensor:
        """Rows that count, (1, rows, inner), in memory of `scratch`."""
        places = self.places[chosen]
        if self.rows.dtype != scratch.memory.dtype:
            return scratch.hold(self.rows.index_select(0, places)[None])
        taken = scratch.shaped(1, len(places), self.rows.shape[1])
        torch.index_select(self.rows, 0, places, out=taken[0])
        return taken

    def put(self, chosen: slice, values: Tensor) -> None:
        """Write rows that count, (1, rows, inner), and with `numbers` one more, of 0, in the padding next to them."""
        start, stop = chosen.start, chosen.stop
        source = values[0].to(self.rows.dtype)
        if self.numbers is None:
            self.rows.index_copy_(0, self.places[chosen], source[: stop - start])
        else:  # several times as fast
            first = int(self.places[start]) if start else 0
            end = int(self.places[stop]) if stop < len(self.places) else len(self.rows)
            numbers = (self.numbers[first:end] - start).clamp_(max=stop - start)
            torch.index_select(source, 0, numbers, out=self.rows[first:end])


class Rows:
    """The rows that count of padded or packed tensors, one sequence after the other, to be gone through as one."""

    def __init__(self, sizes: Sequence[int], lengths: Tensor | None, batch_sizes: Tensor | None = None):
        self.sizes, self.packed_at = sizes, None
        if batch_sizes is not None:
            self.packed_at = batch_sizes.cumsum(0) - batch_sizes
            # Batch sizes never grow, so that a sequence has as many steps as there are sizes above its position.
            lengths = torch.searchsorted(-batch_sizes, -torch.arange(sizes[0], device="cpu"))
        assert lengths is not None
        lengths = lengths.long()
        first = lengths.cumsum(0) - lengths
        self.sequence = torch.repeat_interleave(lengths)
        self.count = len(self.sequence)
        self.step = torch.arange(self.count, device="cpu") - first[self.sequence]
        self.starts = first[lengths > 0]

    def of(self, x: Tensor, strides: Sequence[int]) -> Found:
        """Where they lie in `x`."""
        if self.packed_at is not None:
            return Found(x.detach(), self.packed_at[self.step] + self.sequence)
        outer, time = strides
        unit = math.gcd(outer, time) or 1  # rows begin at multiples of it, and may overlap
        places = (self.sequence * outer + self.step * time) // unit
        rows = int(places.max()) + 1 if self.count else 0
        return Found(x.detach().as_strided((rows, self.sizes[2]), (unit, 1)), places)

    def to_fill(self, x: Tensor, strides: Sequence[int]) -> Found:
        """Where they lie in `x`, which has no gaps, and whose padding is 0 now, or will be with the rows next to it."""
        outer, time, inner = self.sizes
        if self.packed_at is None and self.count and strides[1] == inner:  # one sequence after the other
            places = self.sequence * time + self.step
            numbers = torch.full((outer * time,), self.count, device="cpu")
            numbers[places] = torch.arange(self.count, device="cpu")
            return Found(x.detach().as_strided((outer * time, inner), (inner, 1)), places, numbers)
        return self.of(x if self.packed_at is not None else x.detach().zero_(), strides)

    def blocks(self) -> Iterator[slice]:
        """Parts of the rows."""
        rows = max(BLOCK // self.sizes[2], 1)
        return (slice(i, min(i + rows, self.count)) for i in range(0, self.count, rows))

    def changes(self, x: Found, chosen: slice, taken: Scratch, changes: Scratch) -> Tensor:
        """The changes that lead to these rows, and to the one after them, 0 to the first of a sequence."""
        start, stop = chosen.start, chosen.stop
        first, last = max(start - 1, 0), min(stop + 1, self.count)
        change = change_between(x.take(slice(first, last), taken), start == 0, stop == self.count, changes)
        begin, end = torch.searchsorted(self.starts, torch.tensor([start, stop + 1], device="cpu")).tolist()
        return change.index_fill_(1, self.starts[begin:end] - start, 0)


def sums_of_rows(
    raw: Tensor | None, kept: Tensor | None, strides: Sequence[Sequence[int]], counted: Rows, dtype: torch.dtype
) -> tuple[float, float]:
    """The sum of the squares of the rows of `kept`, and that of the squared changes of those of `raw`."""
    taken, changes, squares = Scratch(dtype), Scratch(dtype), Scratch(dtype)
    ar = tar = 0.0
    if kept is not None:
        found = counted.of(kept, strides[0] if kept is raw else strides[1])
        for chosen in counted.blocks():
            ar += square_sum(found.take(chosen, taken), squares)
    if raw is not None:
        found = counted.of(raw, strides[0])
        for chosen in counted.blocks():
            tar += square_sum(counted.changes(found, chosen, taken, changes)[:, :-1], squares)
    return ar, tar


def _fill_rows(
    raw: Tensor | None,
    dropped: Tensor | None,
    grad_raw: Tensor | None,
    grad_dropped: Tensor | None,
    same: bool,
    strides: Sequence[Sequence[int]],
    counted: Rows,
    ar_scale: float,
    tar_scale: float,
    dtype: torch.dtype,
) -> None:
    """The gradients of the rows that count."""
    rows, changes, slopes = Scratch(dtype), Scratch(dtype), Scratch(dtype)
    if raw is not None and grad_raw is not None:
        source, target = counted.of(raw, strides[0]), counted.to_fill(grad_raw, strides[2])
        for chosen in counted.blocks():
            change = counted.changes(source, chosen, rows, changes)
            slope = with_padding(slopes, change[:, 1:])
            torch.sub(change[:, :-1], change[:, 1:], out=slope[:, :-1]).mul_(tar_scale)
            if same:
                slope[:, :-1].add_(source.take(chosen, rows), alpha=ar_scale)
            target.put(chosen, slope)
    if dropped is not None and grad_dropped is not None:
        source, target = counted.of(dropped, strides[1]), counted.to_fill(grad_dropped, strides[3])
        for chosen in counted.blocks():
            taken = source.take(chosen, rows)
            slope = with_padding(slopes, taken)
            torch.mul(taken, ar_scale, out=slope[:, :-1])
            target.put(chosen, slope)


def with_padding(scratch: Scratch, like: Tensor) -> Tensor:
    """Memory for rows as those of `like`, (1, rows, inner), and for a row of 0 behind them."""
    rows = scratch.shaped(1, like.shape[1] + 1, like.shape[2])
    rows[:, -1] = 0
    return rows


def view_of(x: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """`x` as (outer, time, inner)."""
    return x.detach().as_strided(tuple(sizes), (*strides, 1))


def _view(x: Tensor | None, sizes: Sequence[int], strides: Sequence[int]) -> Tensor | None:
    return None if x is None else view_of(x, sizes, strides)
