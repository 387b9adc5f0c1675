"""The memory of plans, under keys: the metadata of a call as a flat tuple.

All checks of metadata run when a plan is made, so a key holds every fact that a check, a view, or compiled code depends
on. It holds no tensor.
"""

from __future__ import annotations

from contextlib import suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.problem import Call, is_list, rows_of
from fastreg.torch_state import is_memory, keeps_memory_low, observed

SIZE = 1024  # plans of each kind: a few hundred sequence lengths, with and without gradients
_all: list[Plans] = []


class Plans:
    """Plans under their keys; the oldest is dropped where there are too many."""

    def __init__(self) -> None:
        self._plans: dict[Any, Any] = {}
        _all.append(self)

    def get(self, key: Any) -> Any:
        """Return the plan of a key, or `None`."""
        try:
            return self._plans.get(key)
        except TypeError:  # an argument that is wrong need not be hashable
            return None

    def keep(self, key: Any, plan: Any) -> None:
        """Keep a plan. Two threads may make it at once: both plans are right, and the second is kept."""
        plans = self._plans
        if len(plans) >= SIZE:
            plans.pop(next(iter([*plans])), None)
        with suppress(TypeError):
            plans[key] = plan

    def clear(self) -> None:
        """Drop all plans."""
        self._plans = {}


def forget() -> None:
    """Drop all plans, as the registry of backends has changed."""
    for plans in _all:
        plans.clear()


class _NoKeyError(Exception):
    """Signal an argument whose metadata does not determine a plan."""


def key_of(call: Call, *more: Any) -> Any:
    """Return the metadata of a call as a key; `None` for a call that cannot be planned by metadata.

    Args:
        call: the arguments.
        more: further arguments.
    """
    if observed():
        return None
    raw, dropped, alpha, beta, lengths, valid, starts, time_at, reduction, measured, ar_of_raw = call
    try:
        key = (
            *(raw if raw is None else _fact(raw), dropped if dropped is None else _fact(dropped)),
            raw is dropped or (type(raw) is not Tensor and _aliases(raw, dropped)),
            *(alpha if type(alpha) is float else _fact(alpha), beta if type(beta) is float else _fact(beta)),
            *(lengths if lengths is None else _fact(lengths), valid if valid is None else _fact(valid)),
            *(starts if starts is None else _fact(starts), time_at, type(time_at)),
            *(reduction, measured, type(measured), ar_of_raw),
            *([_fact(x) for x in more] if more else ()),
            *(torch.is_grad_enabled(), keeps_memory_low()),
        )
    except (_NoKeyError, RuntimeError):  # a nested tensor has no shape
        return None
    return key


def _fact(x: Any) -> Any:
    """Return the facts of one argument that a plan may depend on."""
    if type(x) is Tensor:
        if not is_memory(x):
            raise _NoKeyError
        return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0, x.requires_grad
    if isinstance(x, PackedSequence):
        sizes = x.batch_sizes
        if type(sizes) is not Tensor or sizes.dim() != 1 or not sizes.numel() or sizes.device.type != "cpu":
            raise _NoKeyError
        return PackedSequence, _fact(x.data), sizes.dtype, int(sizes[0]), len(sizes)
    if type(x) is list or type(x) is tuple:
        return type(x), *[_fact(y) for y in x]
    if x is None or isinstance(x, (Real, str)):
        return type(x), x
    raise _NoKeyError


def _aliases(raw: Any, dropped: Any) -> Any:
    """Return which layers of raw and dropped are one tensor."""
    if is_list(raw) and is_list(dropped):
        return tuple([rows_of(x) is rows_of(y) for x, y in zip(raw, dropped, strict=False)])
    return rows_of(raw) is rows_of(dropped)
