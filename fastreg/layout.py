"""What came in, checked, as the one view that the kernels and the CPU path know.

Every layout is seen as `(outer, time, inner)` with a contiguous inner axis: `(batch, time, hidden)` is outer
batch, inner hidden; a contiguous `(time, batch, hidden)` is outer 1, inner batch * hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.reference import time_dim

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Sizes(NamedTuple):
    """Extents of the canonical view."""

    outer: int
    time: int
    inner: int


class Strides(NamedTuple):
    """Elements from one sequence, and from one time step, to the next; the inner axis is contiguous."""

    outer: int = 0
    time: int = 0


def canonical(tensors: Sequence[Tensor | None], batch_first: bool) -> tuple[Sizes, list[Tensor | None], list[Strides]]:
    """View tensors of one shape as `(outer, time, inner)`; copies only those whose hidden axis is not contiguous.

    `None` stays `None`, with strides of 0.
    """
    views: list[Tensor | None] = []
    strides: list[Strides] = []
    batch = time = hidden = 1
    for x in tensors:
        if x is None:
            views.append(None)
            strides.append(Strides())
            continue
        hidden = x.shape[-1]
        if hidden != 1 and x.stride(-1) != 1:
            x = x.contiguous()
        views.append(x)
        if x.dim() == 2:
            batch, time = 1, x.shape[0]
            strides.append(Strides(hidden, x.stride(0)))
        else:
            axis = time_dim(x, batch_first)
            batch, time = x.shape[1 - axis], x.shape[axis]
            strides.append(Strides(x.stride(1 - axis) if batch > 1 else hidden, x.stride(axis)))
    if all(view is None or stride.outer == hidden for view, stride in zip(views, strides, strict=True)):
        return Sizes(1, time, batch * hidden), views, strides
    return Sizes(batch, time, hidden), views, strides


def check_coefficient(name: str, value: float) -> float:
    """A finite, non-negative real number, as a float."""
    _check_real(name, value)
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not 0 <= value < math.inf:  # math.isfinite would break a compiled graph
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return value


def check_options(
    batch_first: bool, lengths: object = None, reduction: str = "mean", return_terms: bool = False
) -> None:
    """The keyword arguments that say how to read the tensors and what to make of the sums."""
    for name, flag in (("batch_first", batch_first), ("return_terms", return_terms)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")
    if lengths is not None:
        raise NotImplementedError("lengths: padded batches are not supported yet, expected None")
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")


def check_layers(raw: object, dropped: object, alpha: float, beta: float) -> list[tuple[Tensor | None, Tensor | None]]:
    """Pair the layers of `raw` and `dropped`. A term whose coefficient is 0 is not looked at: its tensor is `None`."""
    raws = _layers("raw", raw) if beta else None
    droppeds = _layers("dropped", dropped) if alpha else None
    if raws is not None and droppeds is not None:
        if len(raws) != len(droppeds) or isinstance(raw, Tensor) != isinstance(dropped, Tensor):
            raise ValueError(
                f"raw and dropped: expected the same layers in both, got {_count(raw)} and {_count(dropped)}"
            )
        for (name, x), (other, y) in zip(raws, droppeds, strict=True):
            if x.shape != y.shape:
                raise ValueError(f"{other}: expected the shape of {name}, {_shape(x)}, got {_shape(y)}")
    named = (raws or []) + (droppeds or [])
    for name, x in named:
        if x.device != named[0][1].device:
            raise ValueError(
                f"{name}: expected a tensor on {named[0][1].device}, where {named[0][0]} is, got one on {x.device}"
            )
    count = len(raws or droppeds or [])
    first = [x for _, x in raws] if raws else [None] * count
    second = [x for _, x in droppeds] if droppeds else [None] * count
    return list(zip(first, second, strict=True))


def check_probability(p: float) -> float:
    """The share of units that dropout drops, from 0 to below 1, as a float."""
    _check_real("p", p)
    if not 0 <= p < 1:
        raise ValueError(f"p: expected a probability from 0 to below 1, got {p}")
    return float(p)


def check_mask(mask: object, raw: Tensor, batch_first: bool) -> Tensor:
    """A dropout mask for `raw`, expanded to its shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    one_row = list(raw.shape)
    one_row[time_dim(raw, batch_first)] = 1
    if mask.shape not in (raw.shape, torch.Size(one_row)):
        raise ValueError(f"mask: expected shape {tuple(one_row)} or that of raw, {_shape(raw)}, got {_shape(mask)}")
    if mask.dtype != raw.dtype:
        raise TypeError(f"mask: expected the dtype of raw, {raw.dtype}, got {mask.dtype}")
    if mask.device != raw.device:
        raise ValueError(f"mask: expected a tensor on {raw.device}, where raw is, got one on {mask.device}")
    if mask.requires_grad:
        raise ValueError("mask: expected a tensor that requires no gradient, got one that does")
    return mask.expand_as(raw)


def check_tensor(name: str, x: object) -> Tensor:
    if isinstance(x, PackedSequence):
        raise NotImplementedError(f"{name}: PackedSequence is not supported yet, expected a padded tensor")
    if not isinstance(x, Tensor):
        hint = " (an RNN gives its output and its state: pass the output)" if isinstance(x, tuple) else ""
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}{hint}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {'nested' if x.is_nested else x.layout}")
    if x.dim() not in (2, 3):
        raise ValueError(
            f"{name}: expected (batch, time, hidden), (time, batch, hidden) with batch_first=False, "
            f"or (time, hidden), got {_shape(x)}"
        )
    return x


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")


def _layers(name: str, value: object) -> list[tuple[str, Tensor]]:
    if isinstance(value, PackedSequence):
        raise NotImplementedError(f"{name}: PackedSequence is not supported yet, expected a padded tensor")
    if isinstance(value, Tensor):
        layers: list[tuple[str, object]] = [(name, value)]
    elif isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name}: expected a tensor a layer, got an empty {type(value).__name__}")
        layers = [(f"{name}[{i}]", x) for i, x in enumerate(value)]
    else:
        coefficient = "beta" if name == "raw" else "alpha"
        raise TypeError(
            f"{name}: expected a tensor, or a list or tuple of tensors, got {type(value).__name__}"
            + (f" (it may be None only where {coefficient} is 0)" if value is None else "")
        )
    return [(label, check_tensor(label, x)) for label, x in layers]


def _shape(x: Tensor) -> str:
    return f"{tuple(x.shape)}"


def _count(value: object) -> str:
    return "one tensor" if isinstance(value, Tensor) else f"{len(value)} layers"  # pyright: ignore[reportArgumentType]
