"""A driver that needs no GPU: Triton compiles for the target that it names, and its launches do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def active(driver: Any) -> Iterator[None]:
    """Let Triton use a driver inside of the block. Triton's `reset_active` fails without a GPU's driver."""
    from triton.runtime import driver as chosen

    before = vars(chosen).copy()
    chosen.set_active(driver)
    try:
        yield
    finally:
        vars(chosen).update(before)


@contextmanager
def h100() -> Iterator[None]:
    """Let the Triton kernels take CPU tensors, compiled for an H100, with a driver whose launches do nothing."""
    from triton.backends.compiler import GPUTarget

    from fastreg.call.backends import PLANS, TRITON, cpu_tensors_by

    with active(StandInDriver(GPUTarget("cuda", 90, 32))), cpu_tensors_by(TRITON):
        yield
    PLANS.clear()


class StandInDriver:
    """A driver that names a target and ignores launches."""

    def __init__(self, target: Any):
        self.target, self.utils = target, self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**16}

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None
