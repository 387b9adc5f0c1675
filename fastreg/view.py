"""Any layout as one view `(outer, time, inner)` with a contiguous inner axis.

`(batch, time, hidden)` is outer batch, inner hidden; a contiguous `(time, batch, hidden)` is outer 1, inner
batch * hidden. Where not all steps count, or packed, outer is always batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.kernels.view import Operand, Sums, View
from fastreg.problem import Layer, Problem, time_dim


class Memory(NamedTuple):
    """All that checks, views and compiled code depend on of a tensor, except its values; hashable."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]
    aligned: bool  # to 16 bytes


class Signature(NamedTuple):
    """The memories of a layer's tensors, `None` where the tensor is, and the extents of packed rows, if packed."""

    raw: Memory | None
    dropped: Memory | None = None
    lengths: Memory | None = None
    packed: tuple[int, int] | None = None  # (batch, time)
    valid: Memory | None = None
    alpha: Memory | None = None
    beta: Memory | None = None

    def given(self) -> Memory:
        """Return the memory of raw, or that of dropped where raw is `None`."""
        return self.raw if self.raw is not None else self.dropped  # pyright: ignore[reportReturnType]


def memory_of(x: Tensor) -> Memory:
    """Describe a plain, dense tensor."""
    return Memory(x.shape, x.dtype, x.device, x.stride(), x.data_ptr() % 16 == 0)


def signature_of(layer: Layer) -> Signature:
    """Describe the tensors of a layer, all of them plain and dense."""
    raw, dropped, lengths, batch_sizes, valid, _, alpha, beta = layer
    return Signature(
        None if raw is None else memory_of(raw),
        None if dropped is None else memory_of(dropped),
        None if lengths is None else memory_of(lengths),
        None if batch_sizes is None else (int(batch_sizes[0]), len(batch_sizes)),
        None if valid is None else memory_of(valid),
        None if alpha is None else memory_of(alpha),
        None if beta is None else memory_of(beta),
    )


def readable(x: Tensor) -> Tensor:
    """Return what kernels read: `x`, or a contiguous copy if its hidden axis is not contiguous."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def view_of(tensors: Sequence[Memory | None], signature: Signature, problem: Problem) -> View:
    """View tensors of the shape of a layer's as `(outer, time, inner)`.

    One whose hidden axis is not contiguous is seen as its contiguous copy.
    """
    shape = signature.given().shape
    hidden = shape[-1]
    time_axis = time_dim(signature.given(), problem.batch_first)
    if signature.packed is not None:
        batch, time = signature.packed
        outer_axis = time_axis  # rows of one time step and time steps follow each other
    else:
        outer_axis = 1 - time_axis if len(shape) == 3 else None
        batch, time = 1 if outer_axis is None else shape[outer_axis], shape[time_axis]

    def operand(x: Memory) -> Operand:
        strides = x.stride if hidden == 1 or x.stride[-1] == 1 else torch.empty(shape, device="meta").stride()
        outer = hidden if outer_axis is None or batch == 1 else strides[outer_axis]
        return Operand(x.dtype, outer, strides[time_axis])

    operands = tuple(None if x is None else operand(x) for x in tensors)
    whole = signature.lengths is None and signature.packed is None and signature.valid is None
    if whole and all(x is None or x.outer == hidden for x in operands):
        return View(1, time, batch * hidden, operands)
    return View(batch, time, hidden, operands, packed=signature.packed is not None)


def sums_of(signature: Signature, problem: Problem, dtype: torch.dtype) -> Sums:
    """Tell a backend what to compute in `dtype`; no extent of the layer is 0."""
    terms = problem.with_ar(), problem.with_tar(), problem.ar_of_raw
    return Sums(dtype, problem.alpha, problem.beta, *terms, _known_divisors(signature, problem))


def _known_divisors(signature: Signature, problem: Problem) -> tuple[int, int] | None:
    """Count elements and pairs, as far as no lengths or valid steps are to be looked at."""
    if problem.reduction == "sum":
        return 1, 1
    if signature.lengths is not None or signature.valid is not None:
        return None
    shape = signature.given().shape
    elements = math.prod(shape)
    if signature.packed is not None:
        first_steps = signature.packed[0] * shape[-1]
    else:
        first_steps = elements // shape[time_dim(signature.given(), problem.batch_first)]
    return elements, max(elements - first_steps, 1)


def like(memory: Memory) -> Memory:
    """Describe memory for a gradient: in the order of the axes of its tensor, as long as hidden is the innermost."""
    x = torch.empty_strided(memory.shape, memory.stride, dtype=memory.dtype, device="meta")
    x = torch.empty_like(x)
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return Memory(x.shape, x.dtype, memory.device, x.stride(), aligned=True)


def allocate(memory: Memory) -> Tensor:
    """Allocate memory that is not initialized, not even in deterministic mode: all of it will be written."""
    if not torch.are_deterministic_algorithms_enabled():
        return torch.empty_strided(memory.shape, memory.stride, dtype=memory.dtype, device=memory.device)
    x = torch.empty_strided(memory.shape, memory.stride, dtype=memory.dtype, device="meta")
    storage = torch.UntypedStorage(x.nbytes, device=memory.device)  # which is never filled
    return torch.empty(0, dtype=memory.dtype, device=memory.device).set_(storage, 0, memory.shape, memory.stride)
