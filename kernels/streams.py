"""Device memory that outlives a launch: an element for each stream, on which launches run one after another.

Launches on different streams, and replays of CUDA graphs, may run at the same time.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor
from triton.runtime import driver

RESERVE = 4096  # elements a device that are filled at once: for each stream, and each ticket of a CUDA graph


class PerStream:
    """Elements of device memory, (1,), that all begin with the same value.

    Args:
        dtype: of an element.
        value: what it begins with.
    """

    def __init__(self, dtype: torch.dtype, value: float) -> None:
        self.dtype, self.value = dtype, value
        self._lock = Lock()  # no thread draws from the reserve before it is filled
        self._reserve: dict[torch.device, list[Tensor]] = {}
        self.of_stream: dict[tuple[torch.device, int], Tensor] = {}

    def current(self, device: torch.device) -> Tensor:
        """Return the element of the current stream."""
        stream = 0 if device.type == "cpu" else driver.active.get_current_stream(device.index)
        found = self.of_stream.get((device, stream))
        if found is None:
            with self._lock:
                found = self._draw(device, may_fill=not _is_captured(device))
                if found is None:
                    return self._new(1, device)  # which the graph fills at each replay
                found = self.of_stream.setdefault((device, stream), found)
        return found

    def exclusive(self, device: torch.device) -> Tensor:
        """Return the element of the current stream, or one for this launch alone where a CUDA graph is captured.

        A graph's replays may run at the same time as anything but each other.
        """
        if not _is_captured(device):
            return self.current(device)
        with self._lock:
            found = self._draw(device, may_fill=False)
        return self._new(1, device) if found is None else found

    def _draw(self, device: torch.device, may_fill: bool) -> Tensor | None:
        """Draw from the reserve, while the lock is held; `None` if it is empty and may not be filled."""
        reserve = self._reserve.setdefault(device, [])
        if not reserve and may_fill:
            reserve.extend(self._new(RESERVE, device).split(1))
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # once: other streams must see the values
        return reserve.pop() if reserve else None

    def _new(self, count: int, device: torch.device) -> Tensor:
        return torch.full((count,), self.value, dtype=self.dtype, device=device)


def _is_captured(device: torch.device) -> bool:
    """Tell whether launches on the current stream are captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
