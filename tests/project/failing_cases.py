"""Small benchmark cases with peers that fail: `python -m pytest bench -p tests.project.failing_cases`."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import time
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import Mock

import torch

from bench.measure import benchmarks, cases, machine


def hang(*_: Any) -> None:
    """Hang in C, with the interpreter's lock, where no signal helps."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).sleep(999)


def interrupt(*_: Any) -> None:
    """Ask pytest to end, as a machine does that is taken away."""
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(999)


CALLS = itertools.count()
FAILURES: dict[str, Any] = {
    "aborts": lambda *_: os.abort(),
    "hangs": hang,
    "raises": Mock(side_effect=ValueError("no\nsuch")),
    "is too large": Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    "aborts in a turn": lambda raw, dropped: raw.sum() + dropped.sum() if next(CALLS) < 10 else os.abort(),
    "interrupts": interrupt,
}


@dataclass(frozen=True)
class FailingCase(cases.PenaltyCase):
    """A case of which all peers but the first and the last fail."""

    PEERS: ClassVar = ("eager", *FAILURES, "fastreg")

    def peers(self) -> dict[str, Any]:
        formula, fused = self.ways()
        return {"eager": formula, **FAILURES, "fastreg": fused}


CASES = FailingCase((2, 5, 8), torch.float32), FailingCase((3, 5, 8), torch.float32)
cases.all_cases = lambda device, allocator=None: CASES if allocator != machine.DEFAULT else ()
benchmarks.SECONDS = 0.0  # in the worker, too
