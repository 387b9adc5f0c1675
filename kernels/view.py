"""The records that all backends share: layouts and views of tensors, penalties, time steps that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Coefficient: TypeAlias = float | Tensor  # a number, or a 0-dim tensor without a gradient


class Layout(NamedTuple):
    """Describe a dense tensor without its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def layout_of(x: Tensor) -> Layout:
    """Return the layout of a plain, dense tensor."""
    return Layout(x.shape, x.stride(), x.dtype, x.device)


def nothing(*_: object) -> None:
    """Allocate nothing."""


def allocator(layout: Layout, like: Layout | None = None) -> Callable[..., Tensor]:
    """Return a function that allocates memory of a dense layout; a kernel will write all of this memory.

    In deterministic mode PyTorch would fill the memory first.

    Args:
        layout: the layout.
        like: the layout of the tensors that the function will be called with; `None` if it takes no argument.
    """
    if torch.are_deterministic_algorithms_enabled():
        return partial(_unfilled, layout)
    if like is not None and like.stride == layout.stride:
        return torch.empty_like  # which takes three quarters of the time
    return _new(layout)


def memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """Return a function that allocates contiguous memory of at most two axes; a kernel will write all of it."""
    size, stride = torch.Size(shape), (*shape[1:], 1)[: len(shape)]
    return allocator(Layout(size, stride, dtype, device))


def _unfilled(layout: Layout, *_: Tensor) -> Tensor:
    """Allocate memory by a storage, which PyTorch never fills."""
    shape, stride, dtype, device = layout
    storage = torch.UntypedStorage(shape.numel() * dtype.itemsize, device=device)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, stride)


@lru_cache(maxsize=64)
def _new(layout: Layout) -> Callable[..., Tensor]:
    """Return one function for all plans, which then needs memory and the cache of the processor only once."""
    shape, stride, dtype, device = layout
    return lambda *_: torch.empty_strided(shape, stride, dtype=dtype, device=device)


class Operand(NamedTuple):
    """Describe a tensor: its dtype, and its strides, in elements, between sequences and between time steps."""

    dtype: torch.dtype
    outer: int
    time: int


class Operands(NamedTuple):
    """Describe the tensors of a walk, in the order in which backends take them; None if there is none.

    raw, dropped            activations before and after dropout; a forward that has a mask writes dropped
    mask                    the dropout mask, already scaled; or the seed of a mask that is drawn, () int64
    upstream_dropped        the upstream gradient of dropped, in a call that has a mask
    grad_raw, grad_dropped  gradients to write
    """

    raw: Operand | None = None
    mask: Operand | None = None
    upstream_dropped: Operand | None = None
    dropped: Operand | None = None
    grad_raw: Operand | None = None
    grad_dropped: Operand | None = None

    def draws(self) -> bool:
        """Return whether the mask is drawn from a seed."""
        return self.mask is not None and self.mask.dtype == torch.int64

    def strides(self) -> list[int]:
        """Return the strides of all operands, outer and time of each; 0 and 0 if there is none."""
        return [stride for x in self for stride in ((0, 0) if x is None else (x.outer, x.time))]


class Tensors(NamedTuple):
    """Hold the tensors of a walk, with the fields of `Operands`."""

    raw: Tensor | None = None
    mask: Tensor | None = None
    upstream_dropped: Tensor | None = None
    dropped: Tensor | None = None
    grad_raw: Tensor | None = None
    grad_dropped: Tensor | None = None


class View(NamedTuple):
    """View operands of one shape as `(outer, time, inner)` with a contiguous inner axis; no extent is 0."""

    outer: int
    time: int
    inner: int
    operands: Operands

    def divisors(self, reduction: str) -> tuple[int, int]:
        """Return the divisors of the sums of AR and TAR in a call in which all steps count; neither is 0."""
        if reduction == "sum":
            return 1, 1
        steps = self.outer * self.time
        return steps * self.inner, max((steps - self.outer) * self.inner, 1)


class Spec(NamedTuple):
    """Specify a layer's penalty, whatever its tensors and its coefficients are.

    by_ar, by_tar  whether each term is in the penalty, and has a gradient
    return_terms   whether the terms are results, too; then a term that is not in the penalty is computed as well
    ar_of_raw      whether AR is the mean square of raw, because dropped is raw itself
    dtype          the dtype of differences, squares and sums, and of the penalty
    reduction      `"mean"` divides the sums by the numbers of their elements; `"sum"` does not divide
    """

    by_ar: bool = True
    by_tar: bool = True
    return_terms: bool = False
    ar_of_raw: bool = False
    dtype: torch.dtype = torch.float32
    reduction: str = "mean"


def switches(view: View, spec: Spec, is_forward: bool) -> Sequence[bool]:
    """Return the switches of a launch: sum AR, sum TAR, write AR's gradient, write TAR's; and whether AR is of raw."""
    operands, ar, tar = view.operands, spec.by_ar or spec.return_terms, spec.by_tar or spec.return_terms
    sum_ar = is_forward and ar and (spec.ar_of_raw or operands.dropped is not None)
    sum_tar = is_forward and tar and operands.raw is not None
    return sum_ar, sum_tar, spec.by_ar and not is_forward, spec.by_tar and not is_forward, spec.ar_of_raw and ar


class EncodedSteps(NamedTuple):
    """Say which time steps count, on the device of the activations.

    bits    (outer, time) uint8: bit 0 is set if the step counts, bit 1 if the change into it counts
    counts  (2,) int64: how many steps and changes count; None if the sums are not divided
    """

    bits: Tensor
    counts: Tensor | None


class Values(NamedTuple):
    """Hold the values that a launch reads beside activations; no plan depends on them.

    alpha, beta   coefficients of AR and TAR: floats, or 0-dim tensors on the device of the activations
    bits, counts  the time steps that count, as in `EncodedSteps`; None if all count
    threshold     the random numbers of 16 bits below which a mask that is drawn drops; None if no mask is drawn
    """

    alpha: Coefficient
    beta: Coefficient
    bits: Tensor | None = None
    counts: Tensor | None = None
    threshold: int | None = None
