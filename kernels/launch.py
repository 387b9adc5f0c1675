"""The host's side of a launch: arguments that stay the same, the compiled kernel, the current device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.kernels.reduction import mark_kernel
from fastreg.kernels.tiling import UNROLL, WARPS, Tiling, ceil_div
from fastreg.kernels.view import Sums


class Launch:
    """A kernel on one device, with the arguments that are the same in every call.

    The first call goes through Triton's JIT launcher, which finds or compiles the code for the tensors of that call.
    Later calls launch that code directly, which takes 4 us of host time instead of 14 (Triton 3.6). So the tensors of
    all calls must agree in what code depends on: their dtypes, which of them are aligned to 16 bytes, and which are
    `None`.

    Args:
        kernel: a jit function, whose parameters are tensors, numbers and compile-time constants, in this order.
        tiling: how many programs to launch, and arguments that follow the tensors.
        sums: the arguments after those.
        constants: compile-time arguments by name, beside those of the tiling.
        device: where the tensors are.
    """

    def __init__(
        self, kernel: Any, tiling: Tiling, sums: Sums, constants: dict[str, Any], device: torch.device
    ) -> None:
        self.kernel, self.grid = kernel, (tiling.programs, 1, 1)
        self.numbers, self.constants = (*tiling.numbers, *sums.weights), constants | tiling.constants
        self.index = None if device.type == "cpu" else device.index
        self.compiled: Any = None
        constexprs = [self.constants[name] for name in kernel.arg_names if name in self.constants]
        self.rest = (*self.numbers, *constexprs)  # what the compiled code takes after the tensors, all by position

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the device."""
        if self.index is None or self.index == torch.accelerator.current_device_index():
            self._launch(tensors)
        else:
            with torch.accelerator.device_index(self.index):  # Triton launches on the current device
                self._launch(tensors)

    def _launch(self, tensors: Sequence[Tensor | None]) -> None:
        if self.compiled is None:  # the interpreter has no compiled code, and comes here every time
            self.compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        else:
            self.compiled[self.grid](*tensors, *self.rest)


def marks_of(valid: Tensor) -> Tensor:
    """Prepare valid steps, `(sequences, time)` bool, for all launches on their device: see `mark_kernel`."""
    sequences, time = valid.shape
    marks = torch.empty(16 + sequences * ceil_div(time, UNROLL), dtype=torch.uint8, device=valid.device)
    options = {"CHUNK": 2048, "UNROLL": UNROLL, "num_warps": 4 * WARPS, "enable_fp_fusion": True}
    with torch.accelerator.device_index(valid.device.index):
        mark_kernel[(1,)](valid.view(torch.int8), marks, sequences, time, **options)
    return marks


def table_of(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute what kernels need to know of packed rows, and copy it to the device in one go.

    Returns:
        offsets, `(1 + time + UNROLL,)` int64, whose entry `1 + step` is the row where a time step begins; and the
        length of each sequence, `(sequences,)` int64.
    """
    time, sequences = len(batch_sizes), int(batch_sizes[0])
    before = 1 + time + UNROLL  # the entries at both ends only serve to form addresses that nothing is read from
    table = torch.zeros(before + sequences, dtype=torch.int64, device="cpu")
    torch.cumsum(batch_sizes[:-1], 0, out=table[2 : 1 + time])
    positions = torch.arange(sequences, device="cpu")
    # Batch sizes never grow, so a sequence has as many steps as there are sizes above its position.
    torch.searchsorted(-batch_sizes, -positions, out=table[before:])
    table = table.to(device, non_blocking=True)
    return table[:before], table[before:]
