"""The records that all backends share: layouts and views of tensors, penalties, time steps that count."""

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


def nothing(*_: Any) -> None:
    """Allocate nothing."""


def allocator(layout: Layout | None, like: Layout | None = None) -> Callable[..., Any]:
    """Return a function that allocates memory of a dense layout, all of which a kernel will write.

    In deterministic mode PyTorch would fill the memory first.

    Args:
        layout: the layout, or `None`; then the function returns `None`.
        like: the layout of the tensors that the function will be called with; `None` if it takes no argument.
    """
    if layout is None:
        return nothing
    if torch._C._get_deterministic_algorithms():
        return partial(_unfilled, layout)
    if like is not None and like.stride == layout.stride:
        return torch.empty_like  # which takes three quarters of the time
    return _new(layout)


def _unfilled(layout: Layout, *_: Any) -> Tensor:
    """Allocate memory by a storage, which PyTorch never fills."""
    shape, stride, dtype, device, _aligned = layout
    storage = torch.UntypedStorage(shape.numel() * dtype.itemsize, device=device)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, stride)


@lru_cache(maxsize=64)
def _new(layout: Layout) -> Callable[..., Tensor]:
    """Return one function for all plans, which then needs memory and the cache of the processor only once."""
    shape, stride, dtype, device, _ = layout
    return lambda *_: torch.empty_strided(shape, stride, dtype=dtype, device=device)


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
    """View operands of one shape as `(outer, time, inner)` with a contiguous inner axis; no extent is 0."""

    outer: int
    time: int
    inner: int
    operands: Operands

    def without_gradients(self) -> View:
        """Return the view of a launch that writes no gradients."""
        return self._replace(operands=self.operands._replace(grad_raw=None, grad_dropped=None))

    def writes(self) -> bool:
        """Return whether a launch writes gradients."""
        return self.operands[4:] != (None, None)

    def divisors(self, reduction: str) -> tuple[int, int]:
        """Return the divisors of the sums of AR and TAR in a call in which all steps count; neither is 0."""
        if reduction == "sum":
            return 1, 1
        steps = self.outer * self.time
        return steps * self.inner, max((steps - self.outer) * self.inner, 1)


class Spec(NamedTuple):
    """Specify a layer's penalty, whatever its tensors and its coefficients are.

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


def switches(view: View, spec: Spec, is_forward: bool) -> Sequence[bool]:
    """Return the switches of a launch: sum AR, sum TAR, write AR's gradient, write TAR's; and whether AR is of raw."""
    raw, _, _, dropped, *_ = view.operands
    writes, ar, tar = view.writes(), spec.by_ar or spec.measured, spec.by_tar or spec.measured
    sum_ar = is_forward and ar and (spec.ar_of_raw or dropped is not None)
    sum_tar = is_forward and tar and raw is not None
    return sum_ar, sum_tar, writes and spec.by_ar, writes and spec.by_tar, spec.ar_of_raw and ar


class Values(NamedTuple):
    """Hold the values that a launch reads beside activations; no plan depends on them.

    alpha, beta  coefficients of AR and TAR: floats, or 0-dim tensors on the device of the activations
    bits         (outer, time) uint8 on the same device: bit 0 is set if the time step counts, bit 1 if the change into
                 it counts; None if all steps count
    counts       (2,) int64 there: how many steps and changes count; None if all do, or if the sums are not divided
    """

    alpha: Any
    beta: Any
    bits: Tensor | None = None
    counts: Tensor | None = None
