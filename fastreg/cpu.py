"""The penalty on CPU tensors, a block at a time, so that no temporary is as large as the input.

Its functions take and give what those of `fastreg.kernels.penalty` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastreg.reference import compute_dtype

BLOCK = 2**19  # elements: smaller blocks lose to the cost of dispatch, larger ones leave the cache


def forward(
    raw: Tensor | None,
    dropped: Tensor | None,
    same: bool,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    alpha: float,
    beta: float,
    ar_divisor: int,
    tar_divisor: int,
) -> tuple[Tensor, Tensor]:
    """The penalty, (), and a vector of ar and tar. `sizes` is (outer, time, inner), none of them 0."""
    dtype = compute_dtype(raw, dropped)
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
    ar, tar = ar / ar_divisor, tar / tar_divisor
    return result(alpha * ar + beta * tar, dtype), result([ar, tar], dtype)


def backward(
    grad: Tensor,
    raw: Tensor | None,
    dropped: Tensor | None,
    grad_raw: Tensor | None,
    grad_dropped: Tensor | None,
    same: bool,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    ar_factor: float,
    tar_factor: float,
) -> None:
    """Fill `grad_raw` and `grad_dropped`; a tensor that needs no gradient is None, and so is its gradient."""
    ar_scale, tar_scale = grad.item() * ar_factor, grad.item() * tar_factor
    raw, dropped = _view(raw, sizes, strides[0]), _view(dropped, sizes, strides[1])
    grad_raw, grad_dropped = _view(grad_raw, sizes, strides[2]), _view(grad_dropped, sizes, strides[3])
    rows, changes, slopes = Scratch(grad.dtype), Scratch(grad.dtype), Scratch(grad.dtype)
    for outer, start, stop, inner in blocks(sizes):
        if raw is not None and grad_raw is not None:
            change = change_of_rows(raw[outer, :, inner], start, stop, rows, changes).mul_(tar_scale)
            target = grad_raw[outer, start:stop, inner]
            slope = target if target.dtype == grad.dtype else slopes.shaped(*target.shape)
            torch.sub(change[:, :-1], change[:, 1:], out=slope)
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


class Scratch:
    """Memory for one block at a time, in the dtype of the computation."""

    def __init__(self, dtype: torch.dtype):
        self.memory = torch.empty(0, dtype=dtype, device="cpu")

    def shaped(self, *shape: int) -> Tensor:
        count = shape[0] * shape[1] * shape[2]
        if self.memory.numel() < count:
            self.memory = torch.empty(count, dtype=self.memory.dtype, device="cpu")
        return self.memory[:count].view(shape)

    def hold(self, block: Tensor) -> Tensor:
        """`block` in the computation's dtype: itself, or a copy."""
        return block if block.dtype == self.memory.dtype else self.shaped(*block.shape).copy_(block)


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


def result(values: float | list[float], dtype: torch.dtype) -> Tensor:
    """A tensor of numbers, on the CPU whatever the default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def view_of(x: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """`x` as (outer, time, inner)."""
    return x.detach().as_strided(tuple(sizes), (*strides, 1))


def _view(x: Tensor | None, sizes: Sequence[int], strides: Sequence[int]) -> Tensor | None:
    return None if x is None else view_of(x, sizes, strides)
