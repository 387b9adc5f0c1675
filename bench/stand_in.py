"""A driver without a GPU: Triton compiles for the target it names, and its launches do nothing."""

from __future__ import annotations

from typing import Any


class StandInDriver:
    """Names a target, and takes launches without making them. Set it as `triton.runtime.driver._active`."""

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
