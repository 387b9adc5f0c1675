"""The interface of a backend: gpu.py is the one for GPUs, and cpu.py the one for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastreg.kernels.prediction import Expected, Prediction
from fastreg.kernels.view import EncodedSteps, Spec, Tensors, Values, View


class Forward(Protocol):
    """Apply dropout masks, compute penalties, and predict the gradients that the backward will ask for."""

    @property
    def prediction(self) -> Prediction[Any]:
        """The prediction of the plan, which a `Backward` keeps up to date."""
        ...

    def __call__(self, tensors: Tensors, values: Values) -> tuple[Tensor, Tensor | None, Expected | None]:
        """Compute the penalty; write dropped, or the gradients for the expected upstream gradient.

        Args:
            tensors: the tensors of the view, or those without gradients.
            values: coefficients, and the steps that count.

        Returns:
            The penalty, (). AR and TAR, (2,), or `None` without `return_terms`. The expected upstream gradient,
                for which gradients were written, as a `Backward` compares it; `None` if none were written.
        """
        ...


class Backward(Protocol):
    """Compute the gradients of penalties, and add the upstream gradients of dropped."""

    def __call__(self, upstream: Tensor | None, tensors: Tensors, values: Values, expected: Any) -> None:
        """Write the gradients, unless the forward has written them for this very upstream gradient.

        Args:
            upstream: the upstream gradient of the penalty, () in its dtype; `None` if the penalty has none.
            tensors: the tensors of the view; a gradient that is not needed is `None`.
            values: the values of the forward.
            expected: the last result of the forward, if it has predicted these gradients.
        """
        ...


class Encoder(Protocol):
    """Encode and count the time steps of sequences that count, once for all launches of a call."""

    def __call__(self, lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None) -> EncodedSteps:
        """Return the steps that count.

        Args:
            lengths: `(sequences,)` integers on the device: how many time steps count; `None` if all count.
            valid: `(sequences, time)` contiguous bool on the device: which time steps count; `None` if all count.
            starts: like valid: the steps into which no change counts.
        """
        ...


class Backend(NamedTuple):
    """Hold the code for some devices: its name, and the classes that prepare launches."""

    name: str
    forward: Callable[[View, Spec, torch.device], Forward]
    backward: Callable[[View, Spec, torch.device, Prediction[Any]], Backward]
    encoder: Callable[[tuple[int, int], torch.device], Encoder]
