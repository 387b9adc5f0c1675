"""The memory of plans, under keys: the metadata of a call as a flat tuple.

All checks of the metadata of tensors run when a plan is made, so a key holds every fact that a check, a view, or
compiled code depends on. It holds no tensor, and of coefficients only whether each is 0, a number or a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.problem import Call
from fastreg.torch_state import are_memory, keeps_memory_low, observed

SIZE = 1024  # plans of each kind: a few hundred sequence lengths, with and without gradients
_all: list[Plans] = []


class Plans:
    """Plans under their keys; the oldest is dropped where there are too many."""

    def __init__(self) -> None:
        self._plans: dict[Any, Any] = {}
        _all.append(self)

    def get(self, key: Any) -> Any:
        """Return the plan of a key, or `None`."""
        return self._plans.get(key)

    def keep(self, key: Any, plan: Any) -> None:
        """Keep a plan. Two threads may make it at once: both plans are right, and the second is kept."""
        plans = self._plans
        if len(plans) >= SIZE:
            plans.pop(next(iter([*plans])), None)
        plans[key] = plan

    def clear(self) -> None:
        """Drop all plans."""
        self._plans = {}


def forget() -> None:
    """Drop all plans, as the registry of backends has changed."""
    for plans in _all:
        plans.clear()


class _NoKeyError(Exception):
    """Signal a tensor whose metadata does not determine a plan."""


def key_of(call: Call, mask: Tensor | None = None) -> Any:
    """Return the metadata of a call as a key; `None` for a call that plain PyTorch has to see.

    Args:
        call: of one layer.
        mask: of a dropout.
    """
    if observed():
        return None
    raw, dropped, alpha, beta, steps, time_dim, reduction, measured, ar_of_raw, dtype, _ = call
    try:
        return (
            *(raw if raw is None else _facts(raw), dropped if dropped is None else _facts(dropped)),
            *(alpha != 0 if type(alpha) is float else _kind(alpha), beta != 0 if type(beta) is float else _kind(beta)),
            *(mask if mask is None else _facts(mask), steps if steps is None else _places(steps.offsets)),
            *(time_dim, reduction, measured, ar_of_raw, dtype, torch.is_grad_enabled(), keeps_memory_low()),
        )
    except (_NoKeyError, RuntimeError):  # a nested tensor has no shape
        return None


def _facts(x: Tensor) -> Any:
    """Return the facts of a tensor that a plan may depend on."""
    if not are_memory((x,)):
        raise _NoKeyError
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0, x.requires_grad


def _kind(coefficient: Tensor) -> Any:
    """Return the facts of a coefficient in memory."""
    if not are_memory((coefficient,)):
        raise _NoKeyError
    return coefficient.dtype, coefficient.device


def _places(offsets: Tensor | None) -> Any:
    """Return how many sequences and time steps packed rows have; 0 of marked steps, which have those of the tensors."""
    return 0 if offsets is None else (int(offsets[1]), len(offsets))
