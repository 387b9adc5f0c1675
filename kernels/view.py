"""The records that all backends share: layouts and views of tensors, terms of a penalty, time steps that count."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Describe a dense tensor without its values: all facts that views and compiled code depend on."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool  # to 16 bytes


def layout_of(x: Any) -> Any:
    """Return the layout of a plain, dense tensor, or `None` for `None`."""
    return None if x is None else Layout(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def allocate(layout: Layout) -> Tensor:
    """Allocate uninitialized memory, also in deterministic mode, because a kernel writes every element."""
    shape, stride, dtype, device, _ = layout
    if not torch._C._get_deterministic_algorithms():  # the public function takes twice as long
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    storage = torch.UntypedStorage(x.nbytes, device=device)  # PyTorch never fills a storage
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, stride)


def allocator(layout: Layout | None, like: Tensor | None = None) -> Callable[..., Any]:
    """Return a function that allocates memory of a layout as `allocate` does, but in less time.

    Args:
        layout: the layout, or `None`; then the function returns `None`.
        like: a tensor with the strides of those that the function will be called with; `None` if it takes no argument.
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
    """Describe a tensor: its dtype, and its strides, in elements, between sequences and between time steps."""

    dtype: torch.dtype
    outer: int
    time: int


class Operands(NamedTuple):
    """Hold the tensors of a walk, or facts about them, in the order in which backends take them; None if there is none.

    raw, dropped            activations before and after dropout; a forward that has a mask writes dropped
    mask                    the dropout mask, already scaled
    arrived                 a gradient that arrives at dropped, in a call that has a mask
    grad_raw, grad_dropped  gradients to write
    """

    raw: Any = None
    mask: Any = None
    arrived: Any = None
    dropped: Any = None
    grad_raw: Any = None
    grad_dropped: Any = None


class View(NamedTuple):
    """View operands of one shape as `(outer, time, inner)` with a contiguous inner axis; no extent is 0.

    Each call says by offsets where packed rows begin. Both strides of a packed operand are the stride of its rows.
    """

    outer: int
    time: int
    inner: int
    operands: Operands


class Terms(NamedTuple):
    """Say which terms of a penalty to compute, whatever its coefficients are.

    dtype          dtype of differences, squares and sums, and of the penalty
    ar, tar        whether each term is computed
    by_ar, by_tar  whether each term is in the penalty, and has a gradient; a term that is only measured is not
    ar_of_raw      whether AR is the mean square of raw instead of dropped
    divisors       the divisors of the two sums; 1 and 1 in calls with counts
    measured       whether the terms are written beside the penalty
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
    """Say which time steps count, or where packed rows begin. A call in which all steps count has None instead.

    bits     (outer, time) uint8 on the device of the activations: bit 0 is set if the time step counts, bit 1 if the
             change into it counts; None for packed rows
    counts   (2,) int64 on the same device: the numbers of such steps and changes; None if the sums are not divided
    offsets  (1 + time,) int64 on the CPU, for packed rows: where each time step begins, and how many rows there are
    """

    bits: Tensor | None = None
    counts: Tensor | None = None
    offsets: Tensor | None = None


class Values(NamedTuple):
    """Hold the values that a launch reads beside activations; no plan depends on them.

    alpha, beta  coefficients of AR and TAR: floats, or 0-dim tensors on the device of the activations
    steps        the time steps that count, or the offsets of packed rows; None if all steps count
    """

    alpha: Any
    beta: Any
    steps: Steps | None = None


class Sums(NamedTuple):
    """Hold the results of a forward.

    penalty  () the penalty
    terms    (2,) AR and TAR; None unless they are measured
    assumed  the upstream gradient for which the forward has written gradients, in the form that the backward compares;
             None if it has written none
    """

    penalty: Tensor
    terms: Tensor | None
    assumed: Any
