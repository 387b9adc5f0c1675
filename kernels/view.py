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


class View(NamedTuple):
    """Tensors of one shape seen as `(outer, time, inner)` with a contiguous inner axis; no extent is 0.

    `operands` are in the order in which a call takes the tensors, `None` where it takes `None`. Of packed rows both
    strides are that of the rows.
    """

    outer: int
    time: int
    inner: int
    operands: tuple[Operand | None, ...]
    packed: bool = False


class Sums(NamedTuple):
    """The two sums of squares, and their factors.

    dtype        of differences, squares and sums, and of the penalty
    alpha, beta  coefficients of AR and TAR; None for one that each call brings as a tensor
    ar, tar      whether each term is formed, or in a backward has a gradient
    ar_of_raw    AR is the mean square of raw, not of dropped
    divisors     of the two sums; None where they follow from lengths or valid steps that each call brings
    measured     the terms are written beside the penalty
    adds         the penalty and its terms are added to those of the layers before
    """

    dtype: torch.dtype
    alpha: float | None
    beta: float | None
    ar: bool
    tar: bool
    ar_of_raw: bool
    divisors: tuple[int, int] | None
    measured: bool = True
    adds: bool = False

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """The coefficients, and one over the divisors; 1 for each that is not known here."""
        elements, pairs = self.divisors or (1, 1)
        alpha, beta = (1.0 if x is None else x for x in (self.alpha, self.beta))
        return alpha, beta, 1 / elements, 1 / pairs


class Values(NamedTuple):
    """Tensors that a call reads beside activations, each None where there is none.

    lengths      (outer,) integers on the device of the activations: how many time steps of a sequence count
    batch_sizes  (time,) int64 on the CPU, those of packed rows
    valid        (outer, time) contiguous bool on the device of the activations: which time steps count
    marks        counts of valid, or other results of a backend's `Marks`
    alpha, beta  () coefficients in a floating-point dtype, on the device of the activations
    starts       like valid, and only together with it: the steps at which a segment starts; no change into one counts
    """

    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None
    valid: Tensor | None = None
    marks: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    starts: Tensor | None = None


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
