"""The backend for GPUs: it prepares launches of the Triton kernels, and launches them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastreg.kernels.ar_tar import ar_tar_kernel
from fastreg.kernels.launch import Launch
from fastreg.kernels.reduction import CHUNK
from fastreg.kernels.steps import AT_ONCE, steps_kernel
from fastreg.kernels.tiling import LARGE, Tiling, ceil_div
from fastreg.kernels.view import EncodedSteps, Spec, Tensors, Values, View, memory, switches

SHARE = 4096  # steps: the least that a program encodes


class Encoder:
    """Launch the encoding of time steps, as a `fastreg.kernels.backend.Encoder`.

    Args:
        shape: `(sequences, time)`.
        device: the device of the activations.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        total = shape[0] * shape[1]
        programs = min(ceil_div(total, SHARE), CHUNK.value)
        share = ceil_div(ceil_div(total, programs), AT_ONCE.value) * AT_ONCE.value
        index = tl.int64 if total >= LARGE else tl.int32
        self.launch = Launch(steps_kernel, (total, shape[1], share, index), programs, device)
        self.bits = memory(shape, torch.uint8, device)
        self.counts, self.partials = (memory((2 * n,), torch.int64, device) for n in (1, programs))

    def __call__(self, lengths: Tensor | None, valid: Tensor | None, starts: Tensor | None) -> EncodedSteps:
        """Return the steps that count."""
        bits, counts, partials = self.bits(), self.counts(), self.partials()
        self.launch(lengths, valid, starts, bits, counts, partials)
        return EncodedSteps(bits, counts)


class Forward:
    """Launch the kernel of a forward, as a `fastreg.kernels.backend.Forward`.

    Args:
        view: the view of the operands: raw and dropped; or raw, mask, and dropped to write. A mask that is the same at
            all time steps has a time stride of 0, and a mask of int64 is the seed of one that is drawn.
        spec: what is computed.
        device: the device of the tensors.
    """

    def __init__(self, view: View, spec: Spec, device: torch.device) -> None:
        self.launch, self.return_terms = launch_of(view, spec, device, is_forward=True), spec.return_terms
        shapes = (), (2,), (2 * self.launch.grid[0],)
        self.penalty, self.terms, self.partials = (memory(shape, spec.dtype, device) for shape in shapes)

    def __call__(self, tensors: Tensors, values: Values) -> tuple[Tensor, Tensor | None]:
        """Compute the penalty; write dropped if there is a mask."""
        penalty, terms = self.penalty(), self.terms() if self.return_terms else None
        self.launch(*tensors, None, self.partials(), penalty, terms, *_arguments(values))
        return penalty, terms


class Backward:
    """Launch the kernel of a backward, as a `fastreg.kernels.backend.Backward`.

    Args:
        view: the view of the operands: raw, mask, upstream_dropped and grad_raw; or raw, dropped and their gradients.
        spec: what the forward computes; no term has a gradient if the penalty has no upstream gradient.
        device: the device of the tensors.
    """

    def __init__(self, view: View, spec: Spec, device: torch.device) -> None:
        self.launch = launch_of(view, spec, device, is_forward=False)

    def __call__(self, upstream: Tensor | None, tensors: Tensors, values: Values) -> None:
        """Write the gradients."""
        self.launch(*tensors, upstream, None, None, None, *_arguments(values))


def _arguments(values: Values) -> Sequence[Tensor | float | None]:
    """Return the values as the kernel takes them: a coefficient is either a pointer into memory or a number."""
    alpha, beta, bits, counts, threshold = values
    alpha_at, alpha = (None, alpha) if type(alpha) is float else (alpha, 1.0)
    beta_at, beta = (None, beta) if type(beta) is float else (beta, 1.0)
    return bits, counts, alpha_at, beta_at, alpha, beta, threshold


def launch_of(view: View, spec: Spec, device: torch.device, is_forward: bool) -> Launch:
    """Prepare the launch of the kernel over a view. A forward draws tickets, and a backward does not."""
    mask, tiling = view.operands.mask, Tiling(view, spec.dtype)
    locked = mask is not None and not view.operands.draws() and (view.time == 1 or mask.time == 0)
    scales = [1 / divisor for divisor in view.divisors(spec.reduction)]
    rest = *tiling.numbers, *scales, *switches(view, spec, is_forward), locked, *tiling.constants.values()
    return Launch(ar_tar_kernel, rest, tiling.programs, device, is_forward)
