"""The prediction of a plan: whether a backward follows a forward, and its upstream gradient.

A forward predicts gradients: it writes them for the upstream gradient that it expects, in the pass in which it reads
the activations anyway, and the backward need not read them again. Without predictions, an isolated call on a CPU would
be 1.44 instead of 1.89 times as fast as the formula under torch.compile. A wrong prediction only costs time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastreg.kernels.streams import RESERVE, filled, is_captured

Gradients: TypeAlias = Sequence[Tensor | None]
Expected: TypeAlias = Tensor | float  # the upstream gradient for which gradients were predicted, as a backend knows it
Guess = TypeVar("Guess", Tensor, float)
PATIENCE = 16  # forwards whose gradients no backward took, after which forwards write none


class Prediction(Generic[Guess]):
    """Count the forwards without a backward; each backend has a subclass that knows the expected upstream gradient.

    A `Guess` is the upstream gradient that a forward expects, or the memory that holds it.

    Attributes:
        lost: the number of forwards in a row whose gradients were freed before a backward took them.
    """

    lost = 0

    def comes(self) -> bool:
        """Return whether a backward is expected."""
        return self.lost < PATIENCE

    def expected(self) -> Guess:
        """Return the guess that a forward reads."""
        raise NotImplementedError

    def learn(self, upstream: Tensor) -> Guess:
        """Expect an upstream gradient from now on."""
        raise NotImplementedError


class Predicted:
    """Hold the gradients that a forward has predicted, until a backward takes them.

    Args:
        prediction: the prediction of the plan, which counts gradients that are freed before a backward takes them.
        expected: the upstream gradient for which they were written, as the forward has returned it.
        gradients: the gradients.
    """

    __slots__ = "expected", "gradients", "is_taken", "prediction"

    def __init__(self, prediction: Prediction[Any], expected: Expected | None, gradients: Gradients) -> None:
        self.prediction, self.expected, self.gradients, self.is_taken = prediction, expected, gradients, False

    def __del__(self) -> None:
        if not getattr(self, "is_taken", True):  # an interrupt may have come before the attributes
            self.prediction.lost += 1

    def take(self) -> tuple[Expected | None, Gradients]:
        """Return the upstream gradient that was expected, and the gradients, to a backward that now owns them."""
        self.is_taken = True
        return self.expected, self.gradients


class OnHost(Prediction[float]):
    """Predict on a CPU, where forwards take the expected upstream gradient as a number.

    A plan expects the upstream gradient of its last backward. A new plan expects the upstream gradient of the last
    backward of any plan, and the first plan expects 1. Threads may replace each other's values.
    """

    latest: ClassVar[float] = 1.0

    def __init__(self) -> None:
        self.gradient = OnHost.latest

    def expected(self) -> float:
        """Return the upstream gradient that a forward expects."""
        return self.gradient

    def learn(self, upstream: Tensor) -> float:
        """Expect an upstream gradient."""
        self.gradient = OnHost.latest = upstream.item()
        return self.gradient


class OnDevice(Prediction[Tensor]):
    """Predict on a GPU, where kernels read and write the expected upstream gradient in memory that is never freed.

    Before its first backward a plan expects the upstream gradient of the last backward of any plan on the device, and
    the first plan expects 1. After `RESERVE` plans on a device, two plans share a cell of memory. Nothing waits until
    other streams see its first value.

    Args:
        dtype: the dtype of the upstream gradient.
        device: the device on which the plan runs.
    """

    _cells: ClassVar[dict[tuple[torch.device, torch.dtype], Iterator[Tensor]]] = {}
    _latest: ClassVar[dict[tuple[torch.device, torch.dtype], Tensor]] = {}

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.key = device, dtype
        self.memory: Tensor | None = None
        if self.key not in self._cells:
            self._cells.setdefault(self.key, cycle(filled(RESERVE, 1, dtype, device).split(1)))

    def comes(self) -> bool:
        """Return whether a backward is expected, as always where a graph captures a forward and its code."""
        return super().comes() or is_captured(self.key[0])

    def expected(self) -> Tensor:
        """Return the memory, (1,), that a forward reads."""
        if self.memory is not None:
            return self.memory
        latest = self._latest.get(self.key)
        return self._own() if latest is None or is_captured(self.key[0]) else latest

    def learn(self, upstream: Tensor) -> Tensor:
        """Return the memory, (1,), into which the kernel of a backward writes its upstream gradient."""
        memory = self._latest[upstream.device, upstream.dtype] = self._own()
        return memory

    def _own(self) -> Tensor:
        """Return the plan's own memory."""
        if self.memory is None:
            self.memory = next(self._cells[self.key])
        return self.memory
