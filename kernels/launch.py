"""The host's side of a launch: the arguments of all calls, the compiled kernel, the current device, the ticket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from fastreg.kernels.streams import PerStream, capture_of

TICKETS = PerStream(torch.int32, 0)


class Grid(NamedTuple):
    """Say how many programs a launch has, on which device they run, and whether they draw tickets."""

    programs: int
    device: torch.device
    draws: bool = True


class Launch:
    """Launch a kernel on one device, with arguments that are the same in every call.

    The first call goes through Triton's JIT launcher, which finds or compiles the code for the tensors of that call.
    Later calls launch that code directly, which takes 3 us of host time instead of 14 us (Triton 3.6). Therefore the
    tensors of all calls must agree in the facts that compiled code depends on: dtypes, alignment to 16 bytes, and which
    of them are `None`.

    Args:
        kernel: a jit function. Its parameters are, in this order: a ticket; the values of a call, tensors and numbers;
            numbers that stay the same; and compile-time constants.
        arguments: the numbers that stay the same.
        constants: compile-time arguments by name.
        grid: the number of programs, and the device of the tensors.

    Attributes:
        draws: whether the kernel draws tickets; otherwise it gets `None`.
    """

    def __init__(self, kernel: Any, arguments: Sequence[float], constants: dict[str, Any], grid: Grid) -> None:
        self.kernel, self.numbers, self.constants = kernel, arguments, constants
        self.grid, (self.programs, self.device, self.draws) = (grid.programs, 1, 1), grid
        self.index = None if grid.device.type == "cpu" else grid.device.index
        self.is_captured = capture_of(grid.device.type)
        self.run: Any = None  # the launcher of the compiled code
        constexprs = [constants[name] for name in kernel.arg_names if name in constants]
        self.rest = (*arguments, *constexprs)  # the compiled code takes all by position

    def __call__(self, *values: Tensor | float | None) -> None:
        """Launch on the current stream of the device."""
        index = self.index
        if index is not None and index != torch.accelerator.current_device_index():
            with torch.accelerator.device_index(index):  # Triton launches on the current device
                self(*values)
            return
        stream = None if index is None else driver.active.get_current_stream(index)
        ticket = self.ticket(stream) if self.draws else None
        if self.run is None:
            compiled = self.kernel[self.grid](ticket, *values, *self.numbers, **self.constants)
            if compiled is not None:  # the interpreter has no compiled code, and comes here every time
                self.compiled, self.code = compiled, (compiled.function, compiled.packed_metadata)
                self.run = compiled.run
            return
        metadata, runtime = None, knobs.runtime
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        # Triton 3.5 has chains of hooks, and would call one that has none.
        before, after = (
            before if getattr(before, "calls", before) else None,
            after if getattr(after, "calls", after) else None,
        )
        if before is not None:  # a profiler asks which kernel is launched
            metadata = self.compiled.launch_metadata(self.grid, stream, ticket, *values, *self.rest)
        self.run(*self.grid, stream, *self.code, metadata, before, after, ticket, *values, *self.rest)

    def ticket(self, stream: int | None) -> Tensor:
        """Return a counter, (1,) int32, for a launch on a stream; the launch leaves it at 0.

        Two streams with the same handle share a counter. docs/kernels.md says why their launches cannot spoil it.
        """
        if stream is None:  # an interpreted launch may be cut off, and must not leave its counter to the next one
            return torch.zeros(1, dtype=torch.int32, device=self.device)
        if self.is_captured():
            return TICKETS.drawn(self.device)
        return TICKETS.of(self.device, stream, self.programs)
