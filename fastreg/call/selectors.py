"""The time steps that count: lengths, valid and starts are checked and encoded, once a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreg.call import arguments
from fastreg.call.reference import encoded
from fastreg.call.torch_state import has_values, observed, plain


def selectors_of(lengths: Any, valid: Any, starts: Any) -> Selectors | None:
    """Return the selectors of a call, or `None` if all time steps count."""
    return None if lengths is valid is starts is None else Selectors((lengths, valid, starts))


class Selectors:
    """Hold lengths, valid and starts of one call, and encode which time steps count, once for all of its layers.

    Args:
        given: lengths, valid and starts, as for `fused_ar_tar`; each may be `None`.

    Attributes:
        encoded_for: the numbers of sequences and of steps, and the device, for which the steps were encoded.
        steps: bits and counts, as in `Values`.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        self.given: Sequence[Any] = [*map(plain, given)]
        self.encoded_for: Any = None
        self.steps: Sequence[Any] = ()

    def encoded(self, x: Tensor, plan: Any) -> Sequence[Any]:
        """Check the selectors for a layer, and return its bits and counts.

        Values are checked only on the CPU. On other devices a check would have to wait for the device.

        Args:
            x: raw or dropped.
            plan: the plan of the layer, which has an encoder if such selectors have been checked.
        """
        layer = plan.sizes, x.device
        named = [*zip(arguments.SELECTORS, self.given, strict=True)]
        if plan.encoder is None:
            arguments.check_selectors(*self.given)
            arguments.check_selectors_of(x, plan.spec.time_dim, {name: y for name, y in named if y is not None})
            plan.encoder = partial(encoded, plan.sizes) if plan.backend is None else plan.backend.encoder(*layer)
        if self.encoded_for != layer:
            if plan.is_time_first:  # kernels read (batch, time)
                named = [(name, y if y is None or name == "lengths" else y.transpose(0, 1)) for name, y in named]
            given = [y if y is None else _brought(name, y, *layer) for name, y in named]
            self.encoded_for, self.steps = layer, plan.encoder(*given)
        return self.steps


def _brought(name: str, x: Tensor, sizes: tuple[Any, Any], device: torch.device) -> Tensor:
    """Check the values of lengths or of a mask, and return them on a device, a mask as bool; do not wait for the copy.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too.
    PyTorch does not free it before the device has read it, and the host does not wait.
    """
    if x.device == device and x.dtype == torch.bool and x.shape == sizes:
        return x.contiguous()
    if device.type == "cpu" != x.device.type:
        x = x.cpu()
    if x.dtype != torch.bool and has_values(x):
        arguments.check_range(name, sizes[1], x)
    if name != "lengths":
        x = x.bool().reshape(sizes)
    if x.device.type == "cpu" != device.type:
        arguments.check_not_captured(name, device)
        if observed():  # a compiler cannot ask whether memory is pinned
            x = x.clone()
        elif x.is_pinned():
            x = torch.empty_like(x, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=True).contiguous()
