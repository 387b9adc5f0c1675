"""A driver that needs no GPU: Triton compiles for the target that it names, and its launches do nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


@contextmanager
def active(driver: Any, *kernels: Any) -> Iterator[None]:
    """Let the Triton kernels take CPU tensors inside of the block, by a driver; `kernels` are compiled anew for it."""
    from triton.runtime import driver as chosen

    from fastreg.call.backends import TRITON
    from tests.calls import cpu_tensors_by

    before, caches = vars(chosen).copy(), [kernel.device_caches for kernel in kernels]
    chosen.set_active(driver)
    try:
        for kernel in kernels:
            kernel.device_caches = defaultdict(kernel.create_binder)
        with cpu_tensors_by(TRITON):
            yield
    finally:
        for kernel, cache in zip(kernels, caches, strict=True):
            kernel.device_caches.clear()  # compiled code is freed by the driver that loaded it
            kernel.device_caches = cache
        vars(chosen).update(before)  # Triton's `reset_active` fails without a GPU's driver


def h100() -> AbstractContextManager[None]:
    """Let the Triton kernels take CPU tensors, compiled for an H100, with a driver whose launches do nothing."""
    from triton.backends.compiler import GPUTarget

    return active(StandInDriver(GPUTarget("cuda", 90, 32)))


class StandInDriver:
    """A driver that names a target and ignores launches."""

    def __init__(self, target: Any):
        self.target, self.utils = target, self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device  # each device has another stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**16}

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None
