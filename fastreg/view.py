"""Any layout as one view `(outer, time, inner)` with a contiguous inner axis.

Axes that lie one after the other in memory fold to one: `(batch, time, hidden)` is outer batch, inner hidden; a
contiguous `(time, batch, hidden)` is outer 1, inner batch * hidden; a contiguous `(batch, channels, time, width)` is
outer batch * channels, inner width. Where not all steps count, or packed, outer is always batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg.kernels.view import Layout, Operand, Operands, Sums, Values, View
from fastreg.problem import Layer, Problem, batch_axis, steps_of, time_axis

NARROW = 64  # time steps in a row from which kernels for CPUs read them as they lie faster than a transposed copy


class Fold(NamedTuple):
    """How the axes of activations fold to `(outer, time, inner)`.

    shape         of the activations
    time          the axis of time
    outer, inner  the other axes of more than one element, the slowest in memory first
    packed        the axis of time is that of rows
    """

    shape: Sequence[int]
    time: int
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    packed: bool = False

    def fits(self, x: Layout) -> bool:
        """Return whether kernels read a tensor of this layout as it lies."""
        return self._joined(x.stride, self.outer)[1] and self._joined(x.stride, self.inner) == (1, True)

    def copy(self, x: Tensor) -> Tensor:
        """Return a copy that kernels can read; a tensor that repeats one time step still does."""
        shape = x.shape
        if x.stride(self.time) == 0:
            x = x.narrow(self.time, 0, 1)
        last = (*self.outer, self.time, *self.inner)
        order = [*[axis for axis in range(x.dim()) if axis not in last], *last]
        back = sorted(range(x.dim()), key=order.__getitem__)
        return x.permute(order).contiguous().permute(back).expand(shape)

    def read(self, x: Any) -> Any:
        """Return a tensor as kernels read it: itself, or a copy; `None` for none."""
        if x is None or self.fits(Layout(x.shape, x.stride(), x.dtype, x.device, aligned=True)):
            return x
        return self.copy(x)

    def like(self, x: Layout) -> Layout:
        """Describe memory for a gradient: dense, in the order of its tensor's axes if kernels can write that."""
        found = torch.empty_like(torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta"))
        layout = Layout(x.shape, found.stride(), x.dtype, x.device, aligned=True)
        if self.fits(layout):
            return layout
        return layout._replace(stride=self.copy(torch.empty(x.shape, dtype=x.dtype, device="meta")).stride())

    def operand(self, x: Layout) -> Operand:
        """Describe a tensor, or the copy of one that cannot be read as it lies."""
        stride = x.stride
        if not self.fits(x):
            stride = self.copy(torch.empty_strided(x.shape, stride, dtype=x.dtype, device="meta")).stride()
        axis = self.time if self.packed else self.outer[-1] if self.outer else None
        return Operand(x.dtype, self.size(self.inner) if axis is None else stride[axis], stride[self.time])

    def size(self, axes: Sequence[int]) -> int:
        """Return how many elements axes have together."""
        return math.prod([self.shape[axis] for axis in axes])

    def _joined(self, stride: Sequence[int], axes: Sequence[int]) -> tuple[int, bool]:
        """Return the stride of axes as one, 1 of none, and whether they lie in memory as one."""
        if not axes:
            return 1, True
        pairs = pairwise(axes)
        return stride[axes[-1]], all(stride[a] == stride[b] * self.shape[b] for a, b in pairs)


def fold_of(layouts: Sequence[Layout | None], layer: Layer, problem: Problem) -> Fold:
    """Fold the axes of tensors of the shape of a layer's so that the fewest of them have to be copied."""
    x, values = layer.given(), layer.values
    shape, time, batch = x.shape, time_axis(x, problem), batch_axis(x, problem)
    whole = values.steps is None
    others = [axis for axis in range(len(shape)) if axis != time and shape[axis] != 1]
    sequences = tuple([axis for axis in others if axis == batch])
    rest = tuple([axis for axis in others if axis != batch])
    if values.offsets is not None:
        return Fold(shape, 0, (), rest, packed=True)
    given = [x for x in layouts if x is not None]
    folds: list[Fold] = []
    for layout in given:
        order = sorted(others, key=lambda axis: (layout.stride[axis] != 0, -layout.stride[axis]))
        folds += [Fold(shape, time, tuple(order[:i]), tuple(order[i:])) for i in range(len(order) + 1)]
    if not whole:
        folds = [fold for fold in folds if fold.outer == sequences]
    elif x.device.type != "cpu" or shape[time] < NARROW or any(x.stride[time] > 1 for x in given):
        folds = [fold for fold in folds if fold.inner or not fold.outer]
    copied = Fold(shape, time, sequences, rest) if rest or not whole else Fold(shape, time, (), sequences)
    return min([copied, *folds], key=lambda fold: sum(not fold.fits(x) for x in given))  # the first of the best


class Inputs:
    """The tensors that kernels read, all of the shape of one layer's activations.

    Attributes:
        layouts: of the first operands of a walk, `None` for one that no term reads.
        fold: how their axes fold.
        copies: whether kernels read a copy of any.
    """

    def __init__(self, layouts: Sequence[Layout | None], layer: Layer, problem: Problem) -> None:
        self.layouts, self.fold = tuple(layouts), fold_of(layouts, layer, problem)
        self.copies = not all(x is None or self.fold.fits(x) for x in layouts)

    def view(self, written: Sequence[Layout | None], values: Values) -> View:
        """View them, and the operands behind them, which the kernels write, as `(outer, time, inner)`."""
        return view_of((*self.layouts, *written), self.fold, values)

    def read(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the tensors as kernels read them."""
        return [self.fold.read(x) for x in tensors] if self.copies else tensors


def view_of(layouts: Sequence[Layout | None], fold: Fold, values: Values) -> View:
    """View tensors as `(outer, time, inner)`; one that cannot be read as it lies is seen as its copy."""
    operands = Operands(*[None if x is None else fold.operand(x) for x in layouts])
    inner = fold.size(fold.inner)
    if values.offsets is not None:
        return View(int(values.offsets[1]), len(values.offsets) - 1, inner, operands)
    outer, time = fold.size(fold.outer), fold.shape[fold.time]
    if values.steps is None and all(x is None or x.outer == inner for x in operands):
        return View(1, time, outer * inner, operands)
    return View(outer, time, inner, operands)


def sums_of(layer: Layer, problem: Problem, dtype: torch.dtype) -> Sums:
    """Describe the sums of a layer to a backend; no extent of the layer is 0."""
    terms = problem.with_ar(), problem.with_tar(), problem.ar_of_raw
    return Sums(dtype, problem.alpha, problem.beta, *terms, _known_divisors(layer, problem), problem.measured)


def _known_divisors(layer: Layer, problem: Problem) -> tuple[int, int]:
    """Count elements and pairs of a call without counts; 1 and 1 if there are any, or none are wanted."""
    values, shape = layer.values, layer.given().shape
    if problem.reduction == "sum" or values.counts is not None:
        return 1, 1
    elements = math.prod(shape)
    if values.offsets is not None:
        first_steps = int(values.offsets[1]) * shape[-1]
    else:
        first_steps = elements // steps_of(layer.given(), problem)[1]
    return elements, max(elements - first_steps, 1)
