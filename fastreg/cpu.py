"""The penalty on CPU tensors, a block at a time, so that no temporary is as large as the input.

Its functions take and give what those of `fastreg.kernels.penalty` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg.reference import compute_dtype, neighbours

BLOCK = 2**19  # elements: smaller blocks lose to the cost of dispatch, larger ones leave the cache


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
    if batch_sizes is not None:
        ar, tar = _packed_sums(raw, dropped, same, batch_sizes, dtype)
        return results(ar, tar, alpha, beta, divisors, sizes, None, dtype)
    raw, dropped = _view(raw, sizes, strides[0]), _view(dropped, sizes, strides[1])
    rows, squares = Scratch(dtype), Scratch(dtype)
    ar = tar = 0.0
    for outer, start, stop, inner, _ in blocks(sizes, lengths):
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
    if batch_sizes is not None:
        _fill_packed(raw, dropped, grad_raw, grad_dropped, same, batch_sizes, ar_scale, tar_scale, grad.dtype)
        return
    raw, dropped = _view(raw, sizes, strides[0]), _view(dropped, sizes, strides[1])
    grad_raw, grad_dropped = _view(grad_raw, sizes, strides[2]), _view(grad_dropped, sizes, strides[3])
    rows, changes, slopes = Scratch(grad.dtype), Scratch(grad.dtype), Scratch(grad.dtype)
    for behind in padding(sizes, lengths):
        for gradient in (grad_raw, grad_dropped):
            if gradient is not None:
                gradient[behind] = 0
    for outer, start, stop, inner, end in blocks(sizes, lengths):
        chosen = outer, slice(start, stop), inner
        if raw is not None and grad_raw is not None:
            change = change_of_rows(raw[outer, :end, inner], start, stop, rows, changes)
            slope, there = slopes.room(grad_raw, chosen, change[:, 1:].shape)
            torch.sub(change[:, :-1], change[:, 1:], out=slope).mul_(tar_scale)
            if same:
                slope.add_(raw[chosen], alpha=ar_scale)
            if not there:
                put(grad_raw, chosen, slope)
        if dropped is not None and grad_dropped is not None:
            block = dropped[chosen]
            slope, there = slopes.room(grad_dropped, chosen, block.shape)
            torch.mul(block, ar_scale, out=slope)
            if not there:
                put(grad_dropped, chosen, slope)


class Scratch:
    """Memory for one block at a time, in the dtype of the computation."""

    def __init__(self, dtype: torch.dtype):
        self.memory = torch.empty(0, dtype=dtype, device="cpu")

    def shaped(self, *shape: int) -> Tensor:
        count = shape[0] * shape[1] * shape[2]
        if self.memory.numel() < count:
            self.memory = torch.empty(count, dtype=self.memory.dtype, device="cpu")
        return self.memory[:count].view(shape)

    def room(self, x: Tensor, chosen: tuple[Any, ...], shape: Sequence[int]) -> tuple[Tensor, bool]:
        """Memory to form `x[chosen]` in, and whether it is there: else it is to be copied."""
        if isinstance(chosen[0], slice) and x.dtype == self.memory.dtype:
            return x[chosen], True
        return self.shaped(*shape), False

    def hold(self, block: Tensor) -> Tensor:
        """`block` in the computation's dtype: itself, or a copy."""
        return block if block.dtype == self.memory.dtype else self.shaped(*block.shape).copy_(block)


def put(x: Tensor, chosen: tuple[Any, ...], values: Tensor) -> None:
    x[chosen] = values if isinstance(chosen[0], slice) else values.to(x.dtype)  # only slices convert by themselves


class Block(NamedTuple):
    """A part of the view: sequences, first time step and the one past the last, units, and where the sequences end."""

    outer: slice | Tensor
    start: int
    stop: int
    inner: slice
    end: int


def blocks(sizes: Sequence[int], lengths: Tensor | None = None) -> Iterator[Block]:
    """Cover the view, but for padding, by blocks. Long axes are cut from the last."""
    inner = sizes[2]
    units = min(inner, BLOCK)
    for end, alike in _by_length(sizes, lengths):
        steps = max(min(end, BLOCK // units), 1)
        sequences = max(BLOCK // (units * steps), 1) if steps >= end and units == inner else 1
        for first in range(0, len(alike), sequences):
            outer = _together(alike[first : first + sequences])
            for start in range(0, end, steps):
                for unit in range(0, inner, units):
                    yield Block(outer, start, min(start + steps, end), slice(unit, unit + units), end)


def padding(sizes: Sequence[int], lengths: Tensor | None) -> Iterator[tuple[slice | Tensor, slice]]:
    """What lies behind each sequence."""
    for end, alike in _by_length(sizes, lengths):
        if end < sizes[1]:
            yield _together(alike), slice(end, None)


def _by_length(sizes: Sequence[int], lengths: Tensor | None) -> list[tuple[int, Any]]:
    """The sequences of each length: many short ones would take long one after the other."""
    if lengths is None:
        return [(sizes[1], range(sizes[0]))]
    values, order = lengths.sort(stable=True)
    ends, counts = values.unique_consecutive(return_counts=True)
    return list(zip(ends.tolist(), order.split(counts.tolist()), strict=True))


def _together(sequences: Any) -> slice | Tensor:
    """These, which are in order; a slice where none lies between them, as it makes a view and no copy."""
    first, last = int(sequences[0]), int(sequences[-1])
    return slice(first, last + 1) if last - first + 1 == len(sequences) else sequences


def square_sum(block: Tensor, squares: Scratch) -> float:
    # Not torch.dot: its plain running sums are off by up to 7e-5 over a block, sum()'s cascade by 4e-8.
    return torch.mul(block, block, out=squares.shaped(*block.shape)).sum().item()


def change_square_sum(block: Tensor, squares: Scratch) -> float:
    """The sum of the squared changes along time, axis 1."""
    change = squares.shaped(block.shape[0], block.shape[1] - 1, block.shape[2])
    return square_sum(torch.sub(block[:, 1:], block[:, :-1], out=change), squares)


def change_of_rows(x: Tensor, start: int, stop: int, rows: Scratch, changes: Scratch) -> Tensor:
    """The changes that lead to the steps from `start` to `stop`, both included; 0 where one lacks a neighbour.

    `x` is (sequences, time, units); gives (sequences, stop - start + 1, units), in memory of `changes`.
    """
    time = x.shape[1]
    block = rows.hold(x[:, max(start - 1, 0) : min(stop + 1, time)])
    change = changes.shaped(x.shape[0], stop - start + 1, x.shape[2])
    if start == 0:
        change[:, 0] = 0
    if stop == time:
        change[:, -1] = 0
    inside = change[:, int(start == 0) : change.shape[1] - int(stop == time)]
    torch.sub(block[:, 1:], block[:, :-1], out=inside)
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
    return (grad * ar_factor * ar).item(), (grad * tar_factor * tar).item()  # inf where that dtype has no such number


def _tensor(values: float | list[float], dtype: torch.dtype) -> Tensor:
    """A tensor of numbers, on the CPU whatever the default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def _packed_sums(
    raw: Tensor | None, dropped: Tensor | None, same: bool, batch_sizes: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """The sums of AR and TAR of packed rows."""
    rows, squares = Scratch(dtype), Scratch(dtype)
    ar = tar = 0.0
    kept = raw if same else dropped
    if kept is not None:
        for chosen in _row_blocks(kept):
            ar += square_sum(rows.hold(kept.detach()[None, chosen]), squares)
    if raw is not None:
        before, _, precedes, _ = neighbours(batch_sizes, raw.shape[0])
        for chosen in _row_blocks(raw):
            change = _packed_change(raw, chosen, before, precedes, dtype)
            tar += square_sum(change[None], squares)
    return ar, tar


def _fill_packed(
    raw: Tensor | None,
    dropped: Tensor | None,
    grad_raw: Tensor | None,
    grad_dropped: Tensor | None,
    same: bool,
    batch_sizes: Tensor,
    ar_scale: float,
    tar_scale: float,
    dtype: torch.dtype,
) -> None:
    """The gradients of packed rows."""
    if raw is not None and grad_raw is not None:
        before, after, precedes, follows = neighbours(batch_sizes, raw.shape[0])
        for chosen in _row_blocks(raw):
            slope = _packed_change(raw, chosen, before, precedes, dtype)
            slope.add_(_packed_change(raw, chosen, after, follows, dtype)).mul_(tar_scale)
            if same:
                slope.add_(raw.detach()[chosen], alpha=ar_scale)
            grad_raw[chosen] = slope
    if dropped is not None and grad_dropped is not None:
        for chosen in _row_blocks(dropped):
            grad_dropped[chosen] = dropped.detach()[chosen].to(dtype) * ar_scale


def _row_blocks(x: Tensor) -> Iterator[slice]:
    rows = max(BLOCK // x.shape[1], 1)
    return (slice(first, first + rows) for first in range(0, x.shape[0], rows))


def _packed_change(x: Tensor, chosen: slice, other: Tensor, there: Tensor, dtype: torch.dtype) -> Tensor:
    """What a block of rows is more than each one's `other`, 0 where that is not there."""
    change = x.detach()[chosen].to(dtype) - x.detach().index_select(0, other[chosen])
    return change.masked_fill_(~there[chosen, None], 0)


def view_of(x: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """`x` as (outer, time, inner)."""
    return x.detach().as_strided(tuple(sizes), (*strides, 1))


def _view(x: Tensor | None, sizes: Sequence[int], strides: Sequence[int]) -> Tensor | None:
    return None if x is None else view_of(x, sizes, strides)
