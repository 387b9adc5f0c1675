"""The records that every backend shares: how tensors lie, the terms of a penalty, the time steps that count."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """All that views and compiled code depend on of a dense tensor, except its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool  # to 16 bytes


def layout_of(x: Any) -> Any:
    """Describe a plain, dense tensor; return `None` for `None`."""
    return None if x is None else Layout(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def allocate(layout: Layout) -> Tensor:
    """Allocate memory that is not initialized, not even in deterministic mode: a kernel writes every element."""
    shape, stride, dtype, device, _ = layout
    if not torch._C._get_deterministic_algorithms():  # the public function takes twice as long
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    storage = torch.UntypedStorage(x.nbytes, device=device)  # PyTorch never fills a storage
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, stride)


def allocator(layout: Layout | None, like: Tensor | None = None) -> Callable[..., Any]:
    """Return a function that allocates memory of a layout as `allocate` does, in less time; `None` of no layout.

    With `like` the function takes a tensor that lies in memory as that one does.
    """
    if layout is None:
        return lambda *_: None
    if torch._C._get_deterministic_algorithms():
        return lambda *_: allocate(layout)
    if like is not None and torch.empty_like(like, device="meta").stride() == layout.stride:
        return torch.empty_like  # which takes three quarters of the time
    new = partial(torch.empty_strided, layout.shape, layout.stride, dtype=layout.dtype, device=layout.device)
    return new if like is None else lambda _: new()


class Operand(NamedTuple):
    """The dtype of a tensor, and its strides in elements from one sequence, and one time step, to the next."""

    dtype: torch.dtype
    outer: int
    time: int


class Operands(NamedTuple):
    """The tensors of a walk, or facts about them, in the order in which backends take them; None for one not there.

    raw, dropped            activations before and after dropout; dropped is written by a forward that has a mask
    mask                    of dropout, already scaled
    arrived                 a gradient that arrives at dropped where there is a mask
    grad_raw, grad_dropped  gradients, which are written
    """

    raw: Any = None
    mask: Any = None
    arrived: Any = None
    dropped: Any = None
    grad_raw: Any = None
    grad_dropped: Any = None


class View(NamedTuple):
    """Operands of one shape seen as `(outer, time, inner)` with a contiguous inner axis; no extent is 0.

    Of packed rows, whose place each call gives by offsets, both strides are that of the rows.
    """

    outer: int
    time: int
    inner: int
    operands: Operands


class Terms(NamedTuple):
    """The terms of a penalty, whatever its coefficients are.

    dtype          of differences, squares and sums, and of the penalty
    ar, tar        whether each term is formed
    by_ar, by_tar  whether each term is in the penalty, and has a gradient: one that is only measured has none
    ar_of_raw      AR is the mean square of raw, not of dropped
    divisors       of the two sums; 1 and 1 in calls with counts
    measured       the terms are written beside the penalty
    """

    dtype: torch.dtype
    ar: bool
    tar: bool
    by_ar: bool
    by_tar: bool
    ar_of_raw: bool
    divisors: tuple[int, int] = (1, 1)
    measured: bool = True


class Steps(NamedTuple):
    """The time steps that count, or the place of packed rows. Calls in which all steps count have none.

    marks    (outer, time) uint8 on the device of the activations: bit 0 if a time step counts, bit 1 if the change into
             it does; None of packed rows
    counts   (2,) int64 beside marks: how many of each; None where sums are not divided
    offsets  (1 + time,) int64 on the CPU, of packed rows: where each time step begins, and how many rows there are
    """

    marks: Tensor | None = None
    counts: Tensor | None = None
    offsets: Tensor | None = None


class Values(NamedTuple):
    """What a launch reads beside activations; a plan depends on none of it.

    alpha, beta  coefficients of AR and TAR: floats, or 0-dim tensors on the device of the activations
    steps        the time steps that count, or the place of packed rows; None where all steps count
    """

    alpha: Any
    beta: Any
    steps: Steps | None = None


class Sums(NamedTuple):
    """What the forward of a backend returns.

    penalty  ()
    terms    (2,) AR and TAR; None unless they are measured
    assumed  the upstream gradient for which gradients were written, in the form that the backward compares; None where
             none were written
    """

    penalty: Tensor
    terms: Tensor | None
    assumed: Any
