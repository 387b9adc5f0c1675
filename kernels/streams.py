"""Device memory that outlives a launch: the tickets of each stream.

Launches on one stream run one after another. Launches on different streams, and replays of CUDA graphs, may run at the
same time. A graph writes to the same memory in each replay, so no memory of this module is ever freed.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

RESERVE = 4096  # counters that are allocated at once on a device


class Tickets:
    """Hand out counters, (1,) int32, which are 0 before each launch and after it."""

    def __init__(self) -> None:
        self._lock = Lock()  # no thread draws a counter before all streams see that it is 0
        self._free: dict[torch.device, list[Tensor]] = {}
        self._memory: list[Tensor] = []
        self._of_stream: dict[tuple[torch.device, int, int], Tensor] = {}

    def fill(self, device: torch.device) -> None:
        """Have counters ready, because a later launch may run while another thread captures a graph."""
        with self._lock:
            self._filled_to(RESERVE // 2, device)

    def of(self, device: torch.device, stream: int, programs: int) -> Tensor:
        """Return the counter of a stream for launches with a number of programs; a captured launch takes `drawn`."""
        key = device, stream, programs
        found = self._of_stream.get(key)
        return self._of_stream.setdefault(key, self.drawn(device)) if found is None else found

    def drawn(self, device: torch.device) -> Tensor:
        """Return a counter for one captured launch, because replays of a graph may run beside any other launch.

        If none is left, the captured graph sets its own counter to 0 in each replay.
        """
        with self._lock:
            free = self._filled_to(1, device)
            return free.pop() if free else zeros(1, device)

    def _filled_to(self, least: int, device: torch.device) -> list[Tensor]:
        """Allocate counters if fewer than `least` are free, unless a graph is being captured; return the free ones."""
        free = self._free.setdefault(device, [])
        if len(free) < least and not is_captured(device):
            self._memory.append(zeros(RESERVE, device))
            free.extend(self._memory[-1].split(1))
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # once: other streams must see the zeros
        return free


def zeros(count: int, device: torch.device) -> Tensor:
    """Allocate int32 zeros that outlive the call; in a captured graph each replay fills them."""
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int32, device=device)


def is_captured(device: torch.device) -> bool:
    """Return whether launches on a device's current stream are captured in a graph."""
    with torch.accelerator.device_index(device.index):  # PyTorch asks the current device
        return capture_of(device.type)()


def capture_of(kind: str) -> Callable[[], bool]:
    """Return the function that says whether a graph captures the current stream of a kind of device."""
    # PyTorch has had graphs for XPU since 2.12. bool() is False.
    return getattr(getattr(torch, kind, None), "is_current_stream_capturing", bool)
