"""The time steps that count: lengths, valid and starts are checked and encoded, once a call."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.call import arguments
from fastreg.call.plan import Plan
from fastreg.call.reference import encoded
from fastreg.call.torch_state import has_values, observed, plain
from fastreg.kernels.view import ALL_STEPS, EncodedSteps


class StepArguments(NamedTuple):
    """Hold lengths, valid and starts, as for `fused_ar_tar`; each may be `None`."""

    lengths: Tensor | None = None
    valid: Tensor | None = None
    starts: Tensor | None = None


def given_steps(lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None) -> GivenSteps | None:
    """Return the steps that a call counts, or `None` if it counts all."""
    if lengths is valid is starts is None:
        return None
    return GivenSteps(StepArguments(plain(lengths), plain(valid), plain(starts)))


class GivenSteps:
    """Encode which time steps a call counts, once for all of its layers.

    Args:
        given: the arguments of the call that say so.

    Attributes:
        encoded_for: the numbers of sequences and of steps, and the device, for which the steps were encoded.
        steps: the encoded steps.
    """

    def __init__(self, given: StepArguments) -> None:
        self.given = given
        self.encoded_for: tuple[tuple[int, int], torch.device] | None = None
        self.steps = ALL_STEPS

    def encoded(self, x: Tensor, plan: Plan) -> EncodedSteps:
        """Check the arguments for a layer, and return its steps.

        Values are checked only on the CPU. On other devices a check would have to wait for the device.

        Args:
            x: raw or dropped.
            plan: the plan of the layer, which has an encoder if such arguments have been checked.
        """
        layer = plan.sizes, plan.device
        named = [*zip(arguments.STEPS, self.given, strict=True)]  # Dynamo of PyTorch 2.8 cannot trace `_asdict`
        if plan.encoder is None:
            arguments.check_steps(*self.given)
            arguments.check_steps_of(x, plan.time_dim, dict(named))
            plan.encoder = partial(encoded, plan.sizes) if plan.backend is None else plan.backend.encoder(*layer)
        if self.encoded_for != layer:
            given = [None if y is None else _brought(name, y, plan) for name, y in named]
            counted = plan.encoder(*given)
            self.steps = counted if plan.spec.reduction == "mean" else EncodedSteps(bits=counted.bits)
            self.encoded_for = layer
        return self.steps


def _brought(name: str, x: Tensor, plan: Plan) -> Tensor:
    """Check the values of an argument; return it on the device of the activations; do not wait for the copy.

    Valid and starts become contiguous bool of `(sequences, time)`, as kernels read them.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too.
    PyTorch does not free it before the device has read it, and the host does not wait.
    """
    sizes, device = plan.sizes, plan.device
    if plan.is_time_first and name != "lengths":
        x = x.transpose(0, 1)
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
