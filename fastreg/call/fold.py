"""The view of any layout as `(outer, time, inner)` with a contiguous inner axis.

Axes that are adjacent in memory fold to one axis: the axes that are slower than time to outer, and the faster ones to
inner. If not all steps count, outer is always batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.call.problem import axes_of
from fastreg.kernels.view import Layout, Operand, Operands, View

NARROW = 64  # adjacent time steps from which kernels for CPUs read them in place faster than a transposed copy


class Fold(NamedTuple):
    """Say which axes of tensors of one shape fold to outer and to inner. Axes of one element may be in neither."""

    shape: Sequence[int]
    outer: Sequence[int]
    time: int
    inner: Sequence[int]

    def fits(self, stride: Sequence[int]) -> bool:
        """Return whether the outer and the inner axes fold to one axis each, the inner one without gaps."""
        shape, stride = (*self.shape, 1), (*stride, 1)  # add an axis of one element behind the inner axes
        neighbours = [*pairwise(self.outer), *pairwise([*self.inner, -1])]
        return all([stride[i] == stride[j] * shape[j] for i, j in neighbours])

    def moved(self, x: Tensor | None) -> Tensor | None:
        """Return a view of a tensor or of a mask as `(outer, time, inner)`, or a copy if kernels cannot read that."""
        if x is None:
            return None
        outer, time, inner = self.sizes()
        if x.stride(self.time) == 0 and not x.requires_grad:  # a repeated time step is copied once
            x = x.narrow(self.time, 0, 1)
        x = x.permute(self.order()).reshape(outer, x.shape[self.time], inner)
        return (x if x.stride(2) == 1 else x.contiguous()).expand(outer, time, inner)

    def restored(self, x: Tensor) -> Tensor:
        """Undo `moved`."""
        order = self.order()
        return x.reshape([self.shape[i] for i in order]).permute(sorted(order, key=order.__getitem__))

    def order(self) -> list[int]:
        """Return all axes in the order of their folds."""
        axes = [*self.outer, self.time, *self.inner]
        return [*{*range(len(self.shape))} - {*axes}, *axes]

    def size(self, axes: Sequence[int]) -> int:
        """Return the number of elements along axes."""
        return math.prod([self.shape[axis] for axis in axes])

    def dense(self, x: Layout) -> Layout:
        """Return a dense layout for a gradient, in the order of its tensor's axes if kernels can write that."""
        strides, sizes = zip(*sorted(zip(x.stride, x.shape, strict=True)), strict=True)
        if strides != (1, *accumulate(sizes[:-1], mul)):  # which takes 100 us
            empty = torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta")
            stride = torch.empty_like(empty).stride()
            stride = stride if self.fits(stride) else self.restored(empty.new_empty(self.sizes())).stride()
            return x._replace(stride=stride)
        return x

    def sizes(self) -> tuple[int, int, int]:
        """Return the sizes of outer, time and inner."""
        return self.size(self.outer), self.shape[self.time], self.size(self.inner)

    def operand(self, x: Layout | None) -> Operand | None:
        """Describe a tensor that fits."""
        outer = (self.time, *self.outer)[-1]
        return None if x is None else Operand(x.dtype, x.stride[outer], x.stride[self.time])

    def view(self, operands: Operands) -> View:
        """Return the view of operands that fit."""
        return View(*self.sizes(), operands)


def fold_of(
    layouts: Sequence[Layout | None], time_dim: int, is_whole: bool, in_order: bool = False
) -> tuple[Fold, bool]:
    """Return the fold of tensors of one shape, and whether kernels can read all of them in place.

    Args:
        layouts: the layouts of the tensors; `None` for a tensor that a call does not have.
        time_dim: the axis of time, from the end.
        is_whole: whether all time steps count; otherwise outer is batch.
        in_order: whether lanes must have the order of the tensors' axes, instead of that of memory.
    """
    present = [x for x in layouts if x is not None]
    x = present[0]
    time, batch = axes_of(x, time_dim)
    axes = [i for i, n in enumerate(x.shape) if i != time and n != 1]
    if not in_order:
        axes.sort(key=lambda i: -x.stride[i])
    slow = [i for i in axes if x.stride[i] > x.stride[time]]
    outers = slow, [i for i in axes if i == batch], []
    folds = [Fold(x.shape, outer, time, [i for i in axes if i not in outer]) for outer in outers]
    # Time is the innermost axis only if kernels for CPUs read many adjacent steps, or if outer has to be batch.
    adjacent = x.device.type == "cpu" and x.shape[time] >= NARROW and max([y.stride[time] for y in present]) <= 1
    folds = [y for y in folds if y.inner or adjacent or not axes] if is_whole else folds[1:2]
    if in_order:
        folds = [y for y in folds if [*y.outer, *y.inner] == axes]
    copies = [[fold.fits(y.stride) for y in present].count(False) for fold in folds]
    return folds[copies.index(min(copies))], min(copies) == 0
