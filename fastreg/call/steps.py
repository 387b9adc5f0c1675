"""The time steps that count: lengths, valid and starts are checked and encoded, once a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastreg.call import arguments
from fastreg.call.plan import Plan
from fastreg.call.problem import axes_of, sizes_of
from fastreg.call.reference import encoded
from fastreg.call.torch_state import has_values, observed, plain
from fastreg.kernels.view import EncodedSteps


def given_steps(lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None) -> GivenSteps | None:
    """Return the steps that a call counts, or `None` if it counts all."""
    if lengths is valid is starts is None:
        return None
    return GivenSteps(plain(lengths), plain(valid), plain(starts))


class GivenSteps:
    """Encode which time steps a call counts, once for all of its layers.

    Args:
        lengths, valid, starts: as for `fused_ar_tar`; each may be `None`.

    Attributes:
        given: lengths, valid and starts.
        encoded_for: the device for which the steps were encoded; all layers have the same sequences and time steps.
        steps: the encoded steps.
    """

    encoded_for: torch.device | None = None
    steps: EncodedSteps

    def __init__(self, lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None) -> None:
        self.given = lengths, valid, starts

    def encoded(self, x: Tensor, plan: Plan) -> EncodedSteps:
        """Check the arguments for a layer, and return its steps.

        Values are checked only on the CPU. On other devices a check would have to wait for the device.

        Args:
            x: raw or dropped.
            plan: the plan of the layer, which knows how to encode such arguments if some have been checked.
        """
        if plan.encode is None:
            arguments.check_steps(*self.given)
            arguments.check_steps_of(x, plan.time_dim, self.given)
            plan.encode = encoding_of(x, plan)
        if self.encoded_for != plan.device:
            self.steps = plan.encode(self.given)
            self.encoded_for = plan.device
        return self.steps


def encoding_of(x: Tensor, plan: Plan) -> Callable[[Sequence[Tensor | None]], EncodedSteps]:
    """Return a function that checks the values of lengths, valid and starts, and encodes them."""
    sizes, device, is_divided = sizes_of(x, plan.time_dim), plan.device, plan.spec.reduction == "mean"
    is_time_first = axes_of(x, plan.time_dim) == (0, 1)
    encoder = partial(encoded, sizes) if plan.backend is None else plan.backend.encoder(sizes, device)

    def encode(given: Sequence[Tensor | None]) -> EncodedSteps:
        lengths, *marks = given
        if is_time_first:
            marks = [None if x is None else x.transpose(0, 1) for x in marks]
        named = zip(arguments.STEPS, (lengths, *marks), strict=True)
        bits, counts = encoder(*[None if x is None else _brought(name, x, sizes, device) for name, x in named])
        return EncodedSteps(bits, counts if is_divided else None)

    return encode


def _brought(name: str, x: Tensor, sizes: tuple[int, int], device: torch.device) -> Tensor:
    """Check the values of an argument; return it on a device; do not wait for the copy.

    Valid and starts become contiguous bool of `(sequences, time)`, as kernels read them.

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
