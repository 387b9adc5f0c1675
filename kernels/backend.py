"""The interface of a backend: gpu.py is the one for GPUs, and cpu.py the one for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastreg.kernels.view import EncodedSteps, Spec, Tensors, Values, View


class Forward(Protocol):
    """Apply dropout masks, and compute penalties."""

    def __call__(self, tensors: Tensors, values: Values) -> tuple[Tensor, Tensor | None]:
        """Compute the penalty; write dropped if there is a mask.

        Args:
            tensors: the tensors of the view.
            values: coefficients, and the steps that count.

        Returns:
            The penalty, (); AR and TAR, (2,), or `None` without `return_terms`.
        """
        ...


class Backward(Protocol):
    """Compute the gradients of penalties, and add the upstream gradients of dropped."""

    def __call__(self, upstream: Tensor | None, tensors: Tensors, values: Values) -> None:
        """Write the gradients.

        Args:
            upstream: the upstream gradient of the penalty, () in its dtype; `None` if the penalty has none.
            tensors: the tensors of the view; a gradient that is not needed is `None`.
            values: the values of the forward.
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
    backward: Callable[[View, Spec, torch.device], Backward]
    encoder: Callable[[tuple[int, int], torch.device], Encoder]
