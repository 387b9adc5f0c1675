"""The records that all backends share: layouts and views of tensors, terms of a penalty, time steps that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
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


def nothing(*_: Any) -> None:
    """Allocate nothing."""


def allocator(layout: Layout | None, like: Layout | None = None) -> Callable[..., Any]:
    """Return a function that allocates memory of a dense layout as `allocate` does, but in less time.

    Args:
        layout: the layout, or `None`; then the function returns `None`.
        like: the layout of the tensors that the function will be called with, which may have other numbers of packed
            rows; `None` if it takes no argument.
    """
    if layout is None:
        return nothing
    _, stride, dtype, device, _ = layout
    is_filled = torch._C._get_deterministic_algorithms()
    if like is None:
        return partial(allocate, layout) if is_filled else _new(layout)
    if is_filled:
        return lambda x: allocate(layout._replace(shape=x.shape))
    if like.stride == stride:
        return torch.empty_like  # which takes three quarters of the time
    return lambda x: torch.empty_strided(x.shape, stride, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _new(layout: Layout) -> Callable[[], Tensor]:
    """Return one function for all plans, which then needs memory and the cache of the processor only once."""
    shape, stride, dtype, device, _ = layout
    return partial(torch.empty_strided, shape, stride, dtype=dtype, device=device)


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

    In a plan the view of packed rows has sizes of 0. `sized(steps)` fills in the sizes of a call, whose offsets say
    where the rows of each time step begin. Both strides of a packed operand are the stride of its rows. The last field
    is the number of packed rows; it is None for other views.
    """

    outer: int
    time: int
    inner: int
    operands: Operands
    rows: int | None = None

    def sized(self, steps: Steps | None) -> View:
        """Return the view of packed rows with the sizes of a call, given by its steps; return any other view itself."""
        if steps is None or steps.offsets is None:
            return self
        offsets = steps.offsets
        return self._replace(outer=int(offsets[1]), time=len(offsets) - 1, rows=int(offsets[-1]))

    def writes(self) -> bool:
        """Return whether a launch writes gradients."""
        return self.operands[4:] != (None, None)

    def divisors(self, reduction: str) -> tuple[int, int]:
        """Return the divisors of the sums of AR and TAR in a call in which all steps count; neither is 0."""
        if reduction == "sum":
            return 1, 1
        rows = self.outer * self.time if self.rows is None else self.rows
        return rows * self.inner, max((rows - self.outer) * self.inner, 1)


class Terms(NamedTuple):
    """Describe the terms of a layer's penalty, whatever its tensors and its coefficients are.

    by_ar, by_tar  whether each term is in the penalty, and has a gradient
    measured       whether the terms are results, too; then a term that is not in the penalty is computed as well
    ar_of_raw      whether AR is the mean square of raw, as in fastai v1, or because dropped is raw itself
    dtype          the dtype of differences, squares and sums, and of the penalty
    time_dim       the axis of time, negative from the end; it is -2 for `(batch, time, hidden)` and `(time, hidden)`
    reduction      `"mean"` divides the sums by the numbers of their elements; `"sum"` does not divide
    """

    by_ar: bool = True
    by_tar: bool = True
    measured: bool = False
    ar_of_raw: bool = False
    dtype: torch.dtype = torch.float32
    time_dim: int = -2
    reduction: str = "mean"


def switches(view: View, terms: Terms, is_forward: bool) -> Sequence[bool]:
    """Return the switches of a launch: sum AR, sum TAR, write AR's gradient, write TAR's; and whether AR is of raw."""
    raw, _, _, dropped, *_ = view.operands
    writes, ar, tar = view.writes(), terms.by_ar or terms.measured, terms.by_tar or terms.measured
    sum_ar = is_forward and ar and (terms.ar_of_raw or dropped is not None)
    sum_tar = is_forward and tar and raw is not None
    return sum_ar, sum_tar, writes and terms.by_ar, writes and terms.by_tar, terms.ar_of_raw and ar


class Steps(NamedTuple):
    """Say which time steps count, or where packed rows begin. A call in which all steps count has None instead.

    bits     (outer, time) uint8 on the device of the activations: bit 0 is set if the time step counts, bit 1 if the
             change into it counts; None for packed rows
    counts   (2,) int64 on the same device: how many steps and changes count; None if the sums are not divided
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

    penalty   () the penalty
    terms     (2,) AR and TAR; None unless they are measured
    expected  the upstream gradient for which the forward has written gradients, in the form that the backward compares;
              None if it has written none
    """

    penalty: Tensor
    terms: Tensor | None
    expected: Any
