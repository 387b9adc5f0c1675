"""What every backend is told about its tensors and its sums, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    """The two sums of squares, and what they are multiplied by.

    dtype        of differences, squares and sums, and of the penalty
    alpha, beta  coefficients of AR and TAR; a term whose coefficient is 0 is off
    divisors     of the two sums; None where they follow from lengths that are on the device
    ar_of_raw    AR is the mean square of raw, not of dropped
    """

    dtype: torch.dtype
    alpha: float
    beta: float
    divisors: tuple[int, int] | None
    ar_of_raw: bool

    @property
    def scales(self) -> tuple[float, float]:
        """One over the divisors, or 1 where they are not known here."""
        elements, pairs = self.divisors or (1, 1)
        return 1 / elements, 1 / pairs

    @property
    def factors(self) -> tuple[float, float]:
        """`2 * alpha` and `2 * beta`, over the divisors where they are known here."""
        elements, pairs = self.divisors or (1, 1)
        return 2 * self.alpha / elements, 2 * self.beta / pairs


class Found(NamedTuple):
    """What a forward leaves to its backward.

    scales   (2,): one over the divisors, where they follow from lengths that only the device knows; else None
    assumed  (): the upstream gradient that the forward filled gradients for; None if it filled none
    """

    scales: Tensor | None
    assumed: Tensor | None


class Result(NamedTuple):
    """What a forward computes, in the dtype of the sums, on the device of the tensors.

    penalty  (): alpha * AR + beta * TAR
    terms    (2,): AR and TAR
    found    for the backward
    """

    penalty: Tensor
    terms: Tensor
    found: Found
