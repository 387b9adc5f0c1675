"""Any layout as one view `(outer, time, inner)` with a contiguous inner axis.

Axes that lie one after the other in memory fold to one: `(batch, time, hidden)` is outer batch, inner hidden; a
contiguous `(time, batch, hidden)` is outer 1, inner batch * hidden; a contiguous `(batch, channels, time, width)` is
outer batch * channels, inner width. Where not all steps count, or packed, outer is always batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.kernels.view import Layout, Operand, Operands, View
from fastreg.problem import Call, axes_of

NARROW = 64  # time steps in a row from which kernels for CPUs read them as they lie faster than a transposed copy


class Fold:
    """How the axes of tensors of one shape fold to `(outer, time, inner)`, so that the fewest have to be copied.

    Args:
        layouts: of the first operands of a walk, `None` for one that no term reads.
        call: whose activations have that shape.

    Attributes:
        order: the axes, the slowest first, time among them.
        sizes: of outer, time and inner.
        copied: of each tensor whether kernels read a copy.
    """

    def __init__(self, layouts: Sequence[Layout | None], call: Call) -> None:
        x, metas = call.given(), [_meta(layout) for layout in layouts if layout is not None]
        self.layouts, self.is_whole, offsets = tuple(layouts), call.steps is None, call.steps and call.steps.offsets
        self.packed = None if offsets is None else (int(offsets[1]), len(offsets) - 1)
        self.shape, (self.time, batch) = x.shape, axes_of(x, call.kind.time_dim)
        others = [axis for axis, size in enumerate(self.shape) if axis != self.time and size != 1]
        sequences = [axis for axis in others if axis == batch]
        orders = [sorted(others, key=lambda axis: axis != batch)]
        orders += [sorted(others, key=lambda axis: -y.stride(axis)) for y in metas]
        cuts = [(order[:i], order[i:]) for order in orders for i in range(len(order) + 1)]
        has_rows = x.shape[self.time] >= NARROW and all(y.stride(self.time) <= 1 for y in metas)
        if not self.is_whole:
            cuts = [cut for cut in cuts if cut[0] == sequences]
        elif x.device.type != "cpu" or not has_rows:
            cuts = [(outer, inner) for outer, inner in cuts if inner or not outer]
        cuts.sort(key=lambda cut: cut[0] != sequences)
        if all(self._copies(cut, metas) for cut in cuts):  # else the last one needs no copy
            self._copies(min(cuts, key=lambda cut: self._copies(cut, metas)), metas)
        self.copied = [layout is not None and self._seen(_meta(layout)) is None for layout in layouts]

    def _copies(self, cut: tuple[Sequence[int], Sequence[int]], metas: Sequence[Tensor]) -> int:
        """Fold axes to outer and inner; return how many tensors have to be copied."""
        outer, inner = [math.prod([self.shape[axis] for axis in axes]) for axes in cut]
        ones = {*range(len(self.shape))} - {*cut[0], self.time, *cut[1]}
        self.order, self.sizes = [*ones, *cut[0], self.time, *cut[1]], (outer, self.shape[self.time], inner)
        return sum(self._seen(x) is None for x in metas)

    def _seen(self, x: Tensor) -> Tensor | None:
        """View a tensor as `(outer, time, inner)`; return `None` for one that has to be copied."""
        try:
            seen = x.permute(self.order).view(self.sizes)
        except RuntimeError:
            return None
        return seen if seen.stride(2) == 1 or self.sizes[2] == 1 else None

    def read(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return tensors, each in the layout of the one that the fold was made for, as kernels read them."""
        if True not in self.copied:
            return tensors
        return [self.copy(x) if copied and x is not None else x for x, copied in zip(tensors, self.copied, strict=True)]

    def copy(self, x: Tensor) -> Tensor:
        """Return a copy that kernels can read; a tensor that repeats one time step still does."""
        shape, back = x.shape, sorted(range(x.dim()), key=self.order.__getitem__)  # undoes `order`
        if x.stride(self.time) == 0:
            x = x.narrow(self.time, 0, 1)
        return x.permute(self.order).contiguous().permute(back).expand(shape)

    def _readable(self, x: Tensor) -> Tensor:
        """Return the tensor, or a copy of one that has to be copied."""
        return self.copy(x) if self._seen(x) is None else x

    def like(self, x: Layout) -> Layout:
        """Describe memory for a gradient: dense, in the order of its tensor's axes if kernels can write that."""
        found = self._readable(torch.empty_like(_meta(x)))
        return Layout(found.shape, found.stride(), x.dtype, x.device, aligned=True)

    def view(self, written: Sequence[Layout | None]) -> View:
        """View the tensors, and operands behind them, which kernels write; one that has to be copied as its copy."""
        operands = Operands(*[None if x is None else self._operand(x) for x in (*self.layouts, *written)])
        outer, time, inner = self.sizes
        if self.is_whole and all(x is None or x.outer == inner for x in operands):
            return View(1, time, outer * inner, operands)  # as one sequence of longer rows
        return View(*(self.packed or (outer, time)), inner, operands)

    def _operand(self, x: Layout) -> Operand:
        seen: Any = self._seen(self._readable(_meta(x)))
        return Operand(x.dtype, seen.stride(0 if self.sizes[0] > 1 else 1), seen.stride(1))


def _meta(x: Layout) -> Tensor:
    """Return a tensor of a layout without memory."""
    return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta")
