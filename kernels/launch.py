"""The host's side of a launch: arguments that stay the same, the compiled kernel, the current device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver


class Launch:
    """A kernel on one device, with the arguments that are the same in every call.

    The first call goes through Triton's JIT launcher, which finds or compiles the code for the tensors of that call.
    Later calls launch that code directly, which takes 3 us of host time instead of 14 (Triton 3.6). So the tensors of
    all calls must agree in the facts that compiled code depends on: dtypes, alignment to 16 bytes, and the positions of
    `None`.

    Args:
        kernel: a jit function. Its parameters are values that a call brings, tensors and numbers; numbers that stay the
            same; and compile-time constants, in this order.
        arguments: the numbers that stay the same.
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

    def __call__(self, *values: Tensor | float | None) -> None:
        """Launch on the current stream of the device."""
        if self.index is None or self.index == torch.accelerator.current_device_index():
            self._launch(values)
        else:
            with torch.accelerator.device_index(self.index):  # Triton launches on the current device
                self._launch(values)

    def _launch(self, values: tuple[Tensor | float | None, ...]) -> None:
        if self.run is None:
            compiled = self.kernel[self.grid](*values, *self.numbers, **self.constants)
            if compiled is not None:  # the interpreter has no compiled code, and comes here every time
                self.compiled, self.code = compiled, (compiled.function, compiled.packed_metadata)
                self.run = compiled.run
            return
        stream, metadata = driver.active.get_current_stream(self.index or 0), None
        before, after = _hook(knobs.runtime.launch_enter_hook), _hook(knobs.runtime.launch_exit_hook)
        if before is not None:  # a profiler asks which kernel is launched
            metadata = self.compiled.launch_metadata(self.grid, stream, *values, *self.rest)
        self.run(*self.grid, stream, *self.code, metadata, before, after, *values, *self.rest)


def _hook(hook: Any) -> Any:
    """Return a hook, or `None` for a chain without any (Triton 3.5), which the launcher would call in vain."""
    return hook if getattr(hook, "calls", hook) else None
