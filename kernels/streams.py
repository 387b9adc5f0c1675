"""Device memory that outlives a launch: tickets of each stream, and the expected upstream gradient of each plan.

Launches on one stream run one after another. Launches on different streams, and replays of CUDA graphs, may run at the
same time.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import ClassVar

import torch
from torch import Tensor

RESERVE = 4096  # elements that are allocated at once on a device: for streams, for plans, and for CUDA graphs


class Reserve:
    """Hand out elements of device memory, (1,), that all begin with the same value.

    They are never freed, because a CUDA graph may write to one in each replay.

    Args:
        dtype: the dtype of an element.
        value: its first value.
        shared: whether the elements are handed out again when all have been; otherwise more are allocated.
    """

    def __init__(self, dtype: torch.dtype, value: float, shared: bool = False) -> None:
        self.dtype, self.value, self.shared = dtype, value, shared
        self._lock = Lock()  # no thread draws before the reserve is filled
        self._free: dict[torch.device, list[Tensor]] = {}
        self._filled: dict[torch.device, list[Tensor]] = {}

    def fill(self, device: torch.device) -> None:
        """Have half of a reserve ready, so that a later draw need not wait, unless a graph is being captured now."""
        with self._lock:
            self._filled_to(RESERVE // 2, device)

    def draw(self, device: torch.device) -> Tensor | None:
        """Draw an element; return `None` if none is left during the capture of a CUDA graph, which may not wait."""
        with self._lock:
            free = self._filled_to(1, device)
            return free.pop() if free else None

    def _filled_to(self, least: int, device: torch.device) -> list[Tensor]:
        free, filled = self._free.setdefault(device, []), self._filled.setdefault(device, [])
        if self.shared and filled:
            free.extend([] if free else filled)
        elif len(free) < least and not is_captured(device):
            new = self.new(RESERVE, device).split(1)
            free.extend(new)
            filled.extend(new)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # once: other streams must see the values
        return free

    def new(self, count: int, device: torch.device) -> Tensor:
        """Allocate and fill elements; during the capture of a CUDA graph, each replay fills them."""
        with torch.inference_mode(False):  # the elements outlive the call
            return torch.full((count,), self.value, dtype=self.dtype, device=device)


class PerStream:
    """Hold an element of a reserve for each stream and number of programs, and for each captured launch."""

    def __init__(self, dtype: torch.dtype, value: float) -> None:
        self._reserve = Reserve(dtype, value)
        self.of_stream: dict[tuple[torch.device, int, int], Tensor] = {}

    def fill(self, device: torch.device) -> None:
        """Fill the reserve of a device, so that later launches can draw from it."""
        self._reserve.fill(device)

    def of(self, device: torch.device, stream: int, programs: int) -> Tensor:
        """Return the element of a stream for launches with a number of programs; a captured launch takes `drawn`."""
        key = device, stream, programs
        found = self.of_stream.get(key)
        return self.of_stream.setdefault(key, self.drawn(device)) if found is None else found

    def drawn(self, device: torch.device) -> Tensor:
        """Return an element for one captured launch, because replays of a graph may run beside any other launch.

        If the reserve has none left, the captured graph fills the element itself.
        """
        drawn = self._reserve.draw(device)
        return self._reserve.new(1, device) if drawn is None else drawn


class Expected:
    """Hold the upstream gradient that the next forward of a plan expects: it is the one of the plan's last backward.

    Before its first backward a plan expects the upstream gradient of the last backward of any plan on the device, and
    the first plan expects 1. Beyond `RESERVE` plans on a device, two plans share memory: a wrong guess only costs time.

    Args:
        dtype: the dtype of the upstream gradient.
        device: the device on which the plan runs.
    """

    _reserves: ClassVar = {dtype: Reserve(dtype, 1, shared=True) for dtype in (torch.float32, torch.float64)}
    _latest: ClassVar[dict[tuple[torch.device, torch.dtype], Tensor]] = {}

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.key = device, dtype
        self.memory: Tensor | None = None
        self._reserves[dtype].fill(device)

    def guess(self) -> Tensor:
        """Return the memory, (1,), that a forward reads."""
        if self.memory is not None:
            return self.memory
        latest = self._latest.get(self.key)
        return self.learn() if latest is None or is_captured(self.key[0]) else latest

    def learn(self) -> Tensor:
        """Return the memory for a backward, which writes its upstream gradient into it; the first one draws it."""
        if self.memory is None:
            device, dtype = self.key
            self.memory = self._reserves[dtype].draw(device)
            if self.memory is None:
                return self._reserves[dtype].new(1, device)  # memory of the captured graph
        self._latest[self.key] = self.memory
        return self.memory


def is_captured(device: torch.device) -> bool:
    """Return whether launches on a device's current stream are captured in a graph."""
    asks = capture_of(device.type)
    if asks is bool or device.index is None or device.index == torch.accelerator.current_device_index():
        return asks()
    with torch.accelerator.device_index(device.index):  # PyTorch asks the current device
        return asks()


def capture_of(kind: str) -> Callable[[], bool]:
    """Return the function that says whether a graph captures the current stream of a kind of device."""
    # PyTorch has had graphs for XPU since 2.12. bool() is False.
    return getattr(getattr(torch, kind, None), "is_current_stream_capturing", bool)
