"""The host's side of a launch: arguments that stay the same, the compiled kernel, the current device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from fastreg.kernels.reduction import CHUNK, FEW, count_kernel
from fastreg.kernels.tiling import LARGE, UNROLL, WARPS, ceil_div
from fastreg.kernels.view import Layout, Values, allocate


class Launch:
    """A kernel on one device, with the arguments that are the same in every call.

    The first call goes through Triton's JIT launcher, which finds or compiles the code for the tensors of that call.
    Later calls launch that code directly, which takes 3 us of host time instead of 14 (Triton 3.6). So the tensors of
    all calls must agree in the facts that compiled code depends on: dtypes, alignment to 16 bytes, and the positions of
    `None`.

    Args:
        kernel: a jit function, whose parameters are tensors, numbers and compile-time constants, in this order.
        arguments: numbers that follow the tensors.
        constants: compile-time arguments by name.
        programs: how many to launch.
        device: where the tensors are.
    """

    def __init__(
        self, kernel: Any, arguments: Sequence[float], constants: dict[str, Any], programs: int, device: torch.device
    ) -> None:
        self.kernel, self.numbers, self.constants = kernel, arguments, constants
        self.grid = programs, 1, 1
        self.index = None if device.type == "cpu" else device.index
        self.run: Any = None  # the launcher of the compiled code
        constexprs = [constants[name] for name in kernel.arg_names if name in constants]
        self.rest = (*arguments, *constexprs)  # the compiled code takes all by position

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the device."""
        if self.index is None or self.index == torch.accelerator.current_device_index():
            self._launch(tensors)
        else:
            with torch.accelerator.device_index(self.index):  # Triton launches on the current device
                self._launch(tensors)

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> None:
        if self.run is None:
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
            if compiled is not None:  # the interpreter has no compiled code, and comes here every time
                self.compiled, self.code = compiled, (compiled.function, compiled.packed_metadata)
                self.run = compiled.run
            return
        stream, metadata = driver.active.get_current_stream(self.index or 0), None
        before, after = _hook(knobs.runtime.launch_enter_hook), _hook(knobs.runtime.launch_exit_hook)
        if before is not None:  # a profiler asks which kernel is launched
            metadata = self.compiled.launch_metadata(self.grid, stream, *tensors, *self.rest)
        self.run(*self.grid, stream, *self.code, metadata, before, after, *tensors, *self.rest)


def _hook(hook: Any) -> Any:
    """Return a hook, or `None` for a chain without any (Triton 3.5), which the launcher would call in vain."""
    return hook if getattr(hook, "calls", hook) else None


class Marks:
    """Count valid steps of one shape once for all launches of a call, unless each launch counts them sooner itself."""

    def __init__(self, valid: torch.Size, device: torch.device) -> None:
        total = valid.numel()
        programs = 0 if total <= FEW.value else min(ceil_div(total, FEW.value // 2), CHUNK.value)
        constants = {"INDEX": tl.int64 if total >= LARGE else tl.int32, "num_warps": WARPS, "enable_fp_fusion": True}
        self.launch = Launch(count_kernel, (total, valid[1]), constants, programs, device) if programs else None
        self.counts = Layout(torch.Size([16 * programs]), (1,), torch.bool, device, aligned=True)

    def __call__(self, valid: Tensor, starts: Tensor | None) -> Tensor:
        """Return counts of valid steps, `(sequences, time)` bool; or `valid`, for kernels that will not look at counts.

        The dtype is the same in either case, as kernels are compiled for it. With starts, marks of both follow the
        counts.
        """
        marks, counts = valid, self.counts
        if starts is not None:
            counts = counts._replace(shape=torch.Size([counts.shape[0] + valid.numel()]), dtype=torch.int8)
        elif self.launch is None:
            return valid
        counts = allocate(counts)
        if starts is not None:
            marks = counts[-valid.numel() :]
            both = torch.mul(starts, 2, out=marks.view(valid.shape))
            both += valid  # a bool, whose byte may be any but 0
        if self.launch is not None:
            self.launch(marks, counts)
        return counts


def marks_of(values: Values) -> tuple[Tensor | None, Tensor | None]:
    """Return the marks that kernels read for valid steps and starts, `(sequences, time)`, and their counts.

    Marks are valid itself, bool; or with starts int8, bit 0 for valid and bit 1 for a start.
    """
    valid, counts = values.valid, values.marks
    if values.starts is None or valid is None or counts is None:
        return valid, counts
    return counts[-valid.numel() :], counts


def table_of(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the offsets and lengths of packed rows, and copy both to the device in one transfer.

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
