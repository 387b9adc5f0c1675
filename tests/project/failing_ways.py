"""Ways that fail: `pytest bench -p tests.project.failing_ways`."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import torch

from bench.measure.formulas import fastai


def hang(*_: Any, **__: Any) -> None:
    """Hang in C, with the interpreter's lock, where no signal helps."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).sleep(999)


def late(fail: Callable[[], Any]) -> Callable[..., Any]:
    """Fail in a turn, not before."""
    calls = itertools.count()
    return lambda *inputs, **options: fastai(*inputs, **options) if next(calls) < 10 else fail()


def wrong(raw: Any, dropped: Any, alpha: float, beta: float) -> Any:
    return 1.001 * fastai(raw, dropped, alpha, beta)


def pytest_collection() -> None:
    """Add the ways, after the package of another checkout has been imported."""
    from bench import test_call

    full = Mock(side_effect=torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB"))
    error = Mock(side_effect=ValueError("no\nsuch"))
    test_call.WAYS |= {"aborts": lambda *_, **__: os.abort(), "hangs": hang, "wrong": wrong, "raises": error}
    test_call.WAYS |= {"is_too_large": late(full), "aborts_late": late(os.abort)}
