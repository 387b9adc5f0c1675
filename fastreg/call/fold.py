"""The view of any layout as `(outer, time, inner)` with a contiguous inner axis.

Axes that are adjacent in memory fold to one axis. In `(batch, time, hidden)` outer is batch, and inner is hidden. In a
contiguous `(time, batch, hidden)` outer is 1, and inner is batch * hidden. In a contiguous `(batch, channels, time,
width)` outer is batch * channels, and inner is width. If not all steps count, or rows are packed, outer is always
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastreg.call.problem import axes_of
from fastreg.kernels.view import Layout, Operand, Operands, Steps, View

Cut: TypeAlias = tuple[Sequence[int], Sequence[int]]  # outer and inner axes

NARROW = 64  # adjacent time steps from which kernels for CPUs read them in place faster than a transposed copy


class Fold:
    """Fold the axes of tensors of one shape to `(outer, time, inner)`, so that as few tensors as possible are copied.

    Args:
        layouts: the layouts of the first operands of a walk; `None` for an operand that no term reads.
        time_dim: the axis of time.
        steps: the time steps that count, or the offsets of packed rows; `None` if all steps count.

    Attributes:
        order: all axes, the slowest first.
        rows: the axis whose stride separates sequences: the last axis of outer, or time if there is one sequence.
        sizes: the sizes of outer, time and inner.
        copied: for each tensor, whether kernels read a copy of it.
        copies: whether kernels read any copy.
        readable: a function of tensors in these layouts that returns them as kernels read them. A mask of one row may
            be given without the axis of time that repeats it.
    """

    def __init__(self, layouts: Sequence[Layout | None], time_dim: int, steps: Steps | None) -> None:
        present = [x for x in layouts if x is not None]
        x, strides = present[0], [x.stride for x in present]
        self.layouts, self.is_whole, self.shape = layouts, steps is None, x.shape
        self.time, batch = axes_of(x, time_dim)
        others = tuple([axis for axis, size in enumerate(x.shape) if axis != self.time and size != 1])
        sequences = (batch,) if batch in others else ()
        has_rows = x.shape[self.time] >= NARROW and max([stride[self.time] for stride in strides]) <= 1
        # Time is the innermost axis only if kernels for CPUs read many adjacent steps, or if outer has to be batch.
        is_last = not self.is_whole or (has_rows and x.device.type == "cpu")
        most = len(others) if is_last else max(len(others) - 1, 0)
        orders = [others, *[tuple(sorted(others, key=lambda axis: -stride[axis])) for stride in strides]]
        cuts = [(order[:i], order[i:]) for order in dict.fromkeys(orders) for i in range(most + 1)]

        def cost(cut: Cut) -> Any:
            copies = [self._fits(stride, cut) for stride in strides].count(False)
            return not self.is_whole and cut[0] != sequences, copies, cut[0] != sequences

        self.cut = outer, inner = min(cuts, key=cost)
        ones = {*range(len(self.shape))} - {*others, self.time}
        self.order, self.rows = [*ones, *outer, self.time, *inner], (self.time, *outer)[-1]
        extents = [math.prod([self.shape[axis] for axis in axes]) for axes in (outer, [self.time], inner)]
        self.sizes, self.packed_rows = tuple(extents), None
        if steps is not None and steps.offsets is not None:
            self.sizes, self.packed_rows = (0, 0, extents[2]), 0  # each call has its own
        self.copied = [x is not None and not self._fits(x.stride, self.cut) for x in layouts]
        self.copies = True in self.copied
        self.readable: Any = self._copies if self.copies else tuple

    def _fits(self, stride: Sequence[int], cut: Cut) -> bool:
        """Return whether the outer and the inner axes fold to one axis each, the inner one without gaps."""
        outer, inner = cut
        shape, stride = (*self.shape, 1), (*stride, 1)  # add an axis of one element behind the inner axes
        neighbours = [*pairwise(outer), *pairwise([*inner, -1])]
        return all([stride[i] == stride[j] * shape[j] for i, j in neighbours])

    def _copies(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return tensors, and instead of each tensor that kernels cannot read a copy."""
        return [self.copy(x) if copied and x is not None else x for x, copied in zip(tensors, self.copied, strict=True)]

    def copy(self, x: Tensor) -> Tensor:
        """Return a copy that kernels can read; if the tensor repeats one time step, the copy repeats it, too."""
        x, back = x.expand(self.shape), sorted(range(x.dim()), key=self.order.__getitem__)  # undoes `order`
        if x.stride(self.time) == 0:
            x = x.narrow(self.time, 0, 1)
        return x.permute(self.order).contiguous().permute(back).expand(self.shape)

    def _stride(self, x: Layout) -> tuple[int, ...]:
        """Return the strides in which kernels read a tensor, or its copy."""
        return x.stride if self._fits(x.stride, self.cut) else self.copy(_meta(x)).stride()

    def like(self, x: Layout) -> Layout:
        """Return a dense layout for a gradient, in the order of its tensor's axes if kernels can write that."""
        dense = x if _is_dense(x) else x._replace(stride=torch.empty_like(_meta(x)).stride())  # takes 100 us
        return dense._replace(stride=self._stride(dense), aligned=True)

    def view(self, written: Sequence[Layout | None]) -> View:
        """Return the view of the tensors, or of their copies, and of the operands that kernels write."""
        operands = Operands(*[None if x is None else self._operand(x) for x in (*self.layouts, *written)])
        outer, time, inner = self.sizes
        if self.is_whole and {x.outer for x in operands if x is not None} == {inner}:
            return View(1, time, outer * inner, operands)  # one sequence of longer rows
        return View(outer, time, inner, operands, self.packed_rows)

    def _operand(self, x: Layout) -> Operand:
        stride = self._stride(x)
        return Operand(x.dtype, stride[self.rows], stride[self.time])


def _is_dense(x: Layout) -> bool:
    """Return whether a tensor fills its memory without gaps, in any order of its axes."""
    strides, sizes = zip(*sorted(zip(x.stride, x.shape, strict=True)), strict=True)
    return strides == (1, *accumulate(sizes[:-1], mul))


def _meta(x: Layout) -> Tensor:
    """Return a tensor that has a layout, but no memory."""
    return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta")
