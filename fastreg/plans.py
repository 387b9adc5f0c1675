"""The memory of the front door, under keys: the metadata of a call's arguments as a flat tuple.

All checks of metadata run when a key is new, so a key holds every fact that a check, a view, or compiled code depends
on. It holds no tensor, and of coefficients only whether each is 0, a number or a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.torch_state import are_memory, keeps_memory_low, observed, plain

SIZE = 1024  # kinds of calls: a few hundred sequence lengths, with and without gradients
_kept: dict[Any, Any] = {}


def kept(key: Any) -> Any:
    """Return the value that is kept under a key, or `None`."""
    try:
        return _kept.get(key)
    except TypeError:  # an option without a hash, which the checks refuse
        return None


def keep(key: Any, value: Any) -> None:
    """Keep a value; drop the oldest of too many. Two threads may make one at once: both are right."""
    if len(_kept) >= SIZE:
        _kept.pop(next(iter([*_kept]), None), None)  # another thread may have dropped all
    _kept[key] = value


def forget() -> None:
    """Drop all values, as the registry of backends has changed."""
    _kept.clear()


class _NoKeyError(Exception):
    """Signal an argument whose metadata does not determine a plan."""


def key_of(values: Iterable[Any], options: Sequence[Any]) -> Any:
    """Return the metadata of arguments as a key; `None` for a call that plain PyTorch has to see.

    Args:
        values: tensors, lists of them, coefficients, and `None`.
        options: values that belong to the key, with their types: `True` is no 1.
    """
    if observed():
        return None
    try:
        facts = [x if x is None else x != 0 if type(x) is float else _facts(x) for x in values]
        return *facts, *options, *map(type, options), torch.is_grad_enabled(), keeps_memory_low()
    except (_NoKeyError, RuntimeError):  # a nested tensor has no shape
        return None


def _facts(x: Any) -> Any:
    """Return the facts of a value that a check or a plan may depend on."""
    if type(x) is Tensor and are_memory((x,)):
        return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0, x.requires_grad
    if isinstance(x, PackedSequence) and type(x.batch_sizes) is Tensor:
        return _facts(x.data), _facts(x.batch_sizes), *x.batch_sizes.view(-1)[:1].tolist()
    if type(x) is list or type(x) is tuple:
        return type(x), *map(_facts, x)
    undecorated = plain(x)
    if undecorated is x:
        raise _NoKeyError
    return _facts(undecorated)
