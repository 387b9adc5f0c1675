"""The host's side of a launch: the arguments of all calls, the compiled kernel, the current device, the ticket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from fastreg.kernels import tiling
from fastreg.kernels.streams import Tickets, capture_of

TICKETS = Tickets()
TRIED = "3.4", "3.5", "3.6", "3.7", "3.8", "3.9"  # releases of Triton whose launcher of compiled code was tried


def why_not_direct(release: str, setting: str | None) -> str | None:
    """Return why compiled code is not launched directly, or `None` if it is.

    Args:
        release: the version of Triton.
        setting: the value of FASTREG_DIRECT_LAUNCH in the environment, if it has one.
    """
    if setting == "0":
        return "FASTREG_DIRECT_LAUNCH is 0"
    return None if ".".join(release.split(".")[:2]) in TRIED else f"no direct launch was tried with Triton {release}"


class Launch:
    """Launch a kernel on one device, with arguments that are the same in every call.

    The first call goes through Triton's JIT launcher, which finds or compiles the code for the tensors of that call.
    Later calls launch that code directly, which needs less host time. Therefore the tensors of all calls must agree in
    the facts that compiled code depends on: dtypes, alignment to 16 bytes, and which of them are `None`.

    Triton does not document the launcher of compiled code. So only the releases of Triton that were tried launch
    directly, and all launches go through the JIT launcher with other releases, or while a profiler has hooked launches.

    Args:
        kernel: a jit function. Its parameters are, in this order: a ticket; the values of a call, tensors and numbers;
            numbers that stay the same; and compile-time constants.
        rest: the numbers that stay the same, and the constants.
        programs: the number of programs.
        device: the device of the tensors.
        draws: whether the kernel draws tickets; otherwise it gets `None`.

    Attributes:
        why_jit: why no code is launched directly; `None` if it is.
    """

    # Plans hold many launches, which take less memory with slots.
    __slots__ = "code", "compiled", "device", "draws", "grid", "index", "is_captured", "kernel", "rest", "run"

    why_jit: ClassVar[str | None] = why_not_direct(triton.__version__, os.environ.get("FASTREG_DIRECT_LAUNCH"))

    def __init__(
        self, kernel: Any, rest: Sequence[Any], programs: int, device: torch.device, draws: bool = True
    ) -> None:
        self.kernel, self.rest, self.grid = kernel, (*rest,), (programs, 1, 1)
        self.device, self.draws = device, draws
        self.index = None if device.type == "cpu" else device.index
        self.is_captured = capture_of(device.type)
        self.compiled: Any = None  # the code to launch directly; its driver unloads it when nothing refers to it
        self.run: Any = None  # its launcher
        self.code: Any = None  # the arguments of the launcher that follow from the code
        if self.draws and self.index is not None:
            TICKETS.fill(device)

    def __call__(self, *values: Tensor | float | None) -> None:
        """Launch on the current stream of the device."""
        index, grid = self.index, self.grid
        if index is not None and index != torch.accelerator.current_device_index():
            with torch.accelerator.device_index(index):  # Triton launches on the current device
                self(*values)
            return
        stream = None if index is None else driver.active.get_current_stream(index)  # pyright: ignore[reportAttributeAccessIssue]
        ticket = self.ticket(stream, grid[0]) if self.draws else None
        before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # From Triton 3.5 on a hook is a chain, which may be empty.
        is_hooked = getattr(before, "calls", before) or getattr(after, "calls", after)
        if self.compiled is not None and not is_hooked:
            self.run(*grid, stream, *self.code, ticket, *values, *self.rest)
            return
        compiled = self.kernel[grid](ticket, *values, *self.rest, num_warps=tiling.WARPS, enable_fp_fusion=True)
        if compiled is not None and Launch.why_jit is None:  # the interpreter has no compiled code
            self.code = compiled.function, compiled.packed_metadata, None, None, None  # nothing for a profiler
            self.run, self.compiled = compiled.run, compiled

    def ticket(self, stream: int | None, programs: int) -> Tensor:
        """Return a counter, (1,) int32, for a launch of some programs on a stream; the launch leaves it at 0.

        Two streams with the same handle share a counter. docs/kernels.md says why their launches cannot spoil it.
        """
        if stream is None:  # an interpreted launch may be cut off, and must not leave its counter to the next one
            return torch.zeros(1, dtype=torch.int32, device=self.device)
        if self.is_captured():
            return TICKETS.drawn(self.device)
        return TICKETS.of(self.device, stream, programs)


def description() -> str:
    """Say in which way kernels are launched."""
    return "launched directly" if Launch.why_jit is None else f"launched by Triton's JIT launcher ({Launch.why_jit})"
