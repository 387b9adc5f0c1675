"""Any layout as one view `(outer, time, inner)` with a contiguous inner axis.

`(batch, time, hidden)` is outer batch, inner hidden; a contiguous `(time, batch, hidden)` is outer 1, inner
batch * hidden. Where not all steps count, or packed, outer is always batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels.view import NOTHING, Layout, Operand, Sums, Values, View
from fastreg.problem import Layer, Problem, time_dim


def is_readable(x: Layout) -> bool:
    """Return whether kernels read a tensor of this layout: its hidden axis is contiguous."""
    return x.shape[-1] == 1 or x.stride[-1] == 1


def readable(x: Tensor) -> Tensor:
    """Return `x`, or a contiguous copy if its hidden axis is not contiguous."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def readable_values(values: Sequence[Tensor | None]) -> Values:
    """Return saved values as kernels read them: contiguous, whatever a hook on saved tensors has made of them."""
    return Values(*[None if x is None else x.contiguous() for x in values]) if values else NOTHING


def view_of(layouts: Sequence[Layout | None], layer: Layer, problem: Problem) -> View:
    """View tensors of the shape of a layer's as `(outer, time, inner)`.

    One whose hidden axis is not contiguous is seen as its contiguous copy.
    """
    shape, values = layer.given().shape, layer.values
    hidden = shape[-1]
    time_axis = time_dim(layer.given(), problem.batch_first)
    if values.batch_sizes is not None:
        batch, time = int(values.batch_sizes[0]), len(values.batch_sizes)
        outer_axis = time_axis  # rows of one time step and time steps follow each other
    else:
        outer_axis = 1 - time_axis if len(shape) == 3 else None
        batch, time = 1 if outer_axis is None else shape[outer_axis], shape[time_axis]

    def operand(x: Layout) -> Operand:
        strides = x.stride if is_readable(x) else torch.empty(shape, device="meta").stride()
        outer = hidden if outer_axis is None or batch == 1 else strides[outer_axis]
        return Operand(x.dtype, outer, strides[time_axis])

    operands = tuple(None if x is None else operand(x) for x in layouts)
    whole = values.lengths is None and values.batch_sizes is None and values.valid is None
    if whole and all(x is None or x.outer == hidden for x in operands):
        return View(1, time, batch * hidden, operands)
    return View(batch, time, hidden, operands, packed=values.batch_sizes is not None)


def sums_of(layer: Layer, problem: Problem, dtype: torch.dtype) -> Sums:
    """Describe to a backend what it computes in `dtype`; no extent of the layer is 0."""
    terms = problem.with_ar(), problem.with_tar(), problem.ar_of_raw
    return Sums(dtype, problem.alpha, problem.beta, *terms, _known_divisors(layer, problem), problem.measured)


def _known_divisors(layer: Layer, problem: Problem) -> tuple[int, int] | None:
    """Count elements and pairs, unless a kernel counts them from lengths or valid steps."""
    if problem.reduction == "sum":
        return 1, 1
    values, shape = layer.values, layer.given().shape
    if values.lengths is not None or values.valid is not None:
        return None
    elements = math.prod(shape)
    if values.batch_sizes is not None:
        first_steps = int(values.batch_sizes[0]) * shape[-1]
    else:
        first_steps = elements // shape[time_dim(layer.given(), problem.batch_first)]
    return elements, max(elements - first_steps, 1)


def like(layout: Layout) -> Layout:
    """Describe memory for a gradient: in the order of the axes of its tensor, as long as hidden is the innermost."""
    x = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")
    x = torch.empty_like(x)
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return Layout(x.shape, x.stride(), x.dtype, layout.device, aligned=True)
