"""The records that every backend shares: layouts of tensors, sums, values and results of a call."""

from __future__ import annotations

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


def layout_of(x: Tensor) -> Layout:
    """Describe a plain, dense tensor."""
    return Layout(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def allocate(layout: Layout) -> Tensor:
    """Allocate memory that is not initialized, not even in deterministic mode: a kernel writes every element."""
    shape, stride, dtype, device, _ = layout
    if not torch._C._get_deterministic_algorithms():  # the public function takes twice as long
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    storage = torch.UntypedStorage(x.nbytes, device=device)  # PyTorch never fills a storage
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, stride)


class Operand(NamedTuple):
    """The dtype of a tensor, and its strides in elements from one sequence, and one time step, to the next."""

    dtype: torch.dtype
    outer: int
    time: int


class Operands(NamedTuple):
    """The tensors of a walk, or facts about them, in the order in which backends take them; None for one not there.

    raw, dropped            activations before and after dropout; dropped is written by a forward that has a mask
    mask                    of dropout, already scaled
    arrived                 a gradient that arrives at dropped, or at raw without a mask
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


class Sums(NamedTuple):
    """The two sums of squares, and their factors.

    dtype        of differences, squares and sums, and of the penalty
    alpha, beta  coefficients of AR and TAR; None for one that each call brings as a tensor
    ar, tar      whether each term is formed, or in a backward has a gradient
    ar_of_raw    AR is the mean square of raw, not of dropped
    divisors     of the two sums, in calls without counts
    measured     the terms are written beside the penalty
    """

    dtype: torch.dtype
    alpha: float | None
    beta: float | None
    ar: bool
    tar: bool
    ar_of_raw: bool
    divisors: tuple[int, int] = (1, 1)
    measured: bool = True

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """The coefficients, 1 for one that is not known here, and one over the divisors."""
        alpha, beta = (1.0 if x is None else x for x in (self.alpha, self.beta))
        return alpha, beta, 1 / self.divisors[0], 1 / self.divisors[1]

    @property
    def gradients(self) -> tuple[bool, bool]:
        """Whether AR and TAR have gradients: a term with a coefficient of 0 is measured without one."""
        return self.ar and self.alpha != 0, self.tar and self.beta != 0


class Values(NamedTuple):
    """Tensors that a call reads beside activations, each None where there is none.

    steps        (outer, time) uint8 on the device of the activations: bit 0 if a time step counts, bit 1 if the change
                 into it does; None if all do
    counts       (2,) int64 beside steps: how many of each; None where sums are not divided
    offsets      (1 + time,) int64 on the CPU, of packed rows: where each time step begins, and how many rows there are
    alpha, beta  () coefficients in a floating-point dtype, on the device of the activations
    """

    steps: Tensor | None = None
    counts: Tensor | None = None
    offsets: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None


NOTHING = Values()


class Prediction(NamedTuple):
    """The upstream gradient that a forward wrote gradients for, and where the next forward of the plan finds its own.

    assumed   memory that the backward compares the upstream gradient with
    expected  of the backend: kept by the plan, and changed by a backward whose upstream gradient is another one
    """

    assumed: Tensor
    expected: Any


class Result(NamedTuple):
    """The results of a forward, in the dtype of the sums, on the device of the tensors.

    penalty     (): alpha * AR + beta * TAR
    terms       (2,): AR and TAR; None unless they are measured
    prediction  the assumption of written gradients; None if none were written
    """

    penalty: Tensor
    terms: Tensor | None
    prediction: Prediction | None
