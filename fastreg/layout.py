"""What came in, checked, as the one view that the kernels and the CPU path know.

Every layout is seen as `(outer, time, inner)` with a contiguous inner axis: `(batch, time, hidden)` is outer
batch, inner hidden; a contiguous `(time, batch, hidden)` is outer 1, inner batch * hidden. With lengths, or packed,
outer is always batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from fastreg.reference import Steps, time_dim

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Layer(NamedTuple):
    """One layer's tensors, `None` for a term that is off; if packed, their rows, and the `batch_sizes` of both."""

    raw: Tensor | None
    dropped: Tensor | None
    batch_sizes: Tensor | None


class Sizes(NamedTuple):
    """Extents of the canonical view."""

    outer: int
    time: int
    inner: int


class Strides(NamedTuple):
    """Elements from one sequence, and from one time step, to the next; the inner axis is contiguous."""

    outer: int = 0
    time: int = 0


def canonical(tensors: Sequence[Tensor | None], steps: Steps) -> tuple[Sizes, list[Tensor | None], list[Strides]]:
    """View tensors of one shape as `(outer, time, inner)`; copies only those whose hidden axis is not contiguous.

    `None` stays `None`, with strides of 0. Of packed rows both strides are those of the rows.
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
        if steps.batch_sizes is not None:
            batch, time = int(steps.batch_sizes[0]), len(steps.batch_sizes)
            strides.append(Strides(x.stride(0), x.stride(0)))
        elif x.dim() == 2:
            batch, time = 1, x.shape[0]
            strides.append(Strides(hidden, x.stride(0)))
        else:
            axis = time_dim(x, steps.batch_first)
            batch, time = x.shape[1 - axis], x.shape[axis]
            strides.append(Strides(x.stride(1 - axis) if batch > 1 else hidden, x.stride(axis)))
    whole = steps.lengths is None and steps.batch_sizes is None
    if whole and all(view is None or stride.outer == hidden for view, stride in zip(views, strides, strict=True)):
        return Sizes(1, time, batch * hidden), views, strides
    return Sizes(batch, time, hidden), views, strides


def check_coefficient(name: str, value: float) -> float:
    """A finite, non-negative real number, as a float."""
    _check_real(name, value)
    try:
        value = float(value)
    except OverflowError:
        value = math.inf if value > 0 else -math.inf
    if not 0 <= value < math.inf:  # math.isfinite would break a compiled graph
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return value


def check_flags(**flags: object) -> None:
    """What is to be true or false, by the names of the arguments."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")


def check_reduction(reduction: object) -> None:
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")


def plain(x: Tensor) -> Tensor:
    """`x` without a subclass that only decorates it; one with a dispatcher of its own stays as it is."""
    if type(x) is Tensor or torch.compiler.is_compiling():  # which sees through one that only decorates
        return x
    dispatches = getattr(type(x), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)
    return x if dispatches else x.as_subclass(Tensor)


def readable(x: Tensor) -> bool:
    """Whether `x` is memory that can be read now: it is no stand-in, and nobody traces or transforms the call."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and type(x) is Tensor
        and not x.is_neg()
        and not x.is_meta
        and torch._C._has_storage(x)
    )


def check_layers(raw: object, dropped: object, alpha: float, beta: float) -> list[Layer]:
    """Pair the layers of `raw` and `dropped`. A term whose coefficient is 0 is not looked at: its tensor is `None`."""
    raws = _layers("raw", raw) if beta else None
    droppeds = _layers("dropped", dropped) if alpha else None
    if raws is not None and droppeds is not None:
        if len(raws) != len(droppeds) or is_list(raw) != is_list(dropped):
            raise ValueError(
                f"raw and dropped: expected the same layers in both, got {_count(raw)} and {_count(dropped)}"
            )
        for (name, x, sizes), (other, y, other_sizes) in zip(raws, droppeds, strict=True):
            if (sizes is None) != (other_sizes is None):
                kinds = ["a tensor" if s is None else "a PackedSequence" for s in (sizes, other_sizes)]
                raise TypeError(f"{other}: expected {kinds[0]}, as {name} is, got {kinds[1]}")
            if x.shape != y.shape:
                raise ValueError(f"{other}: expected the shape of {name}, {_shape(x)}, got {_shape(y)}")
            if sizes is not None and other_sizes is not None and readable(sizes) and not sizes.equal(other_sizes):
                raise ValueError(f"{other}: expected the batch_sizes of {name}, got others")
    named = [(name, x) for name, x, _ in (raws or []) + (droppeds or [])]
    for name, x in named:
        if x.device != named[0][1].device:
            raise ValueError(
                f"{name}: expected a tensor on {named[0][1].device}, where {named[0][0]} is, got one on {x.device}"
            )
    count = len(raws or droppeds or [])
    first = [x for _, x, _ in raws] if raws else [None] * count
    second = [x for _, x, _ in droppeds] if droppeds else [None] * count
    return [Layer(x, y, sizes) for x, y, (_, _, sizes) in zip(first, second, raws or droppeds or [], strict=True)]


def check_probability(p: float) -> float:
    """The share of units that dropout drops, from 0 to below 1, as a float."""
    _check_real("p", p)
    if not 0 <= float(p) < 1:
        raise ValueError(f"p: expected a probability from 0 to below 1, got {p}")
    return float(p)


def check_mask(mask: object, raw: Tensor, batch_first: bool) -> Tensor:
    """A dropout mask for `raw`, expanded to its shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    _check_dense("mask", mask)
    one_row = list(raw.shape)
    one_row[time_dim(raw, batch_first)] = 1
    if mask.shape != raw.shape and list(mask.shape) != one_row:  # `in` would not compare symbolic sizes
        raise ValueError(f"mask: expected shape {tuple(one_row)} or that of raw, {_shape(raw)}, got {_shape(mask)}")
    if mask.dtype != raw.dtype:
        raise TypeError(f"mask: expected the dtype of raw, {raw.dtype}, got {mask.dtype}")
    if mask.device != raw.device:
        raise ValueError(f"mask: expected a tensor on {raw.device}, where raw is, got one on {mask.device}")
    if mask.requires_grad:
        raise ValueError("mask: expected a tensor that requires no gradient, got one that does")
    return mask.expand_as(raw)


def check_steps(x: Tensor, batch_first: bool, lengths: object, batch_sizes: Tensor | None = None) -> Steps:
    """Which time steps of `x` count. Lengths that are on the CPU already must be in range; they go where `x` is."""
    if lengths is None and batch_sizes is None:
        return Steps(batch_first)
    if hasattr(x, "to_local"):
        raise TypeError("raw and dropped: expected no DTensor with lengths or packed; pass x.to_local() of each part")
    on_cpu = batch_sizes is not None or (isinstance(lengths, Tensor) and lengths.device.type == "cpu")
    if on_cpu and x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "lengths: expected them on the GPU, and no PackedSequence, while a CUDA graph is captured: the graph would "
            "go on reading memory of the CPU that is gone"
        )
    if lengths is None:
        return Steps(batch_first, None, batch_sizes)
    if batch_sizes is not None:
        raise ValueError("lengths: expected None, as a PackedSequence has lengths of its own")
    lengths = _check_integers("lengths", lengths)
    axis = time_dim(x, batch_first)
    batch, time = 1 if x.dim() == 2 else x.shape[1 - axis], x.shape[axis]
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected shape ({batch},), one length a sequence, got {_shape(lengths)}")
    if lengths.device.type == "meta" != x.device.type:
        raise ValueError(f"lengths: expected a tensor on {x.device}, or another device with memory, got one on meta")
    if x.device.type == "cpu" != lengths.device.type:
        lengths = lengths.cpu()
    # Values are looked at only where that waits for nothing, and where there are any.
    if lengths.device.type == "cpu" and readable(lengths) and batch:
        least, most = (int(n) for n in lengths.aminmax())
        if least < 0 or most > time:
            raise ValueError(
                f"lengths: expected from 0 to the {time} time steps there are, got {least if least < 0 else most}"
            )
    return Steps(batch_first, lengths.to(x.device, non_blocking=True).contiguous())


def _check_integers(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(x).__name__}")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor, got one of {x.dtype}")
    x = plain(_check_dense(name, x))
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()  # as a backward may keep it


def _check_dense(name: str, x: Tensor) -> Tensor:
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {'nested' if x.is_nested else x.layout}")
    return x


def check_tensor(name: str, x: object) -> Tensor:
    if isinstance(x, PackedSequence):
        raise TypeError(f"{name}: expected a tensor, got a PackedSequence; pad_packed_sequence gives one, and lengths")
    if not isinstance(x, Tensor):
        hint = " (an RNN gives its output and its state: pass the output)" if isinstance(x, tuple) else ""
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}{hint}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    _check_dense(name, x)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"{name}: expected (batch, time, hidden), (time, batch, hidden) with batch_first=False, "
            f"or (time, hidden), got {_shape(x)}"
        )
    return x


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")


def _layers(name: str, value: object) -> list[tuple[str, Tensor, Tensor | None]]:
    if isinstance(value, (Tensor, PackedSequence)):
        layers: list[tuple[str, object]] = [(name, value)]
    elif isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name}: expected a tensor a layer, got an empty {type(value).__name__}")
        layers = [(f"{name}[{i}]", x) for i, x in enumerate(value)]
    else:
        coefficient = "beta" if name == "raw" else "alpha"
        raise TypeError(
            f"{name}: expected a tensor, a PackedSequence, or a list or tuple of them, got {type(value).__name__}"
            + (f" (it may be None only where {coefficient} is 0)" if value is None else "")
        )
    return [
        (label, *_check_packed(label, x)) if isinstance(x, PackedSequence) else (label, check_tensor(label, x), None)
        for label, x in layers
    ]


def _check_packed(name: str, x: PackedSequence) -> tuple[Tensor, Tensor]:
    """The rows and the batch sizes; what does not fit would be read past its end."""
    data = check_tensor(f"{name}.data", x.data)
    if data.dim() != 2:
        raise ValueError(f"{name}.data: expected (rows, hidden), got {_shape(data)}")
    sizes = _check_integers(f"{name}.batch_sizes", x.batch_sizes)
    if sizes.device.type != "cpu" and not (sizes.is_meta and data.is_meta):
        raise ValueError(f"{name}.batch_sizes: expected a tensor on the CPU, got one on {sizes.device}")
    sizes, rows = sizes.long().contiguous(), data.shape[0]
    if readable(sizes):
        fits = sizes.dim() == 1 and sizes.numel() > 0 and int(sizes[-1]) > 0 and int(sizes[0]) <= rows
        if not fits or int(sizes.sum()) != rows or bool((sizes.diff() > 0).any()):
            raise ValueError(
                f"{name}.batch_sizes: expected sizes above 0 that never grow and add up to the {rows} rows, "
                f"got {sizes.tolist()}"
            )
    return data, sizes


def _shape(x: Tensor) -> str:
    return f"{tuple(x.shape)}"


def is_list(value: object) -> bool:
    """Whether `value` is a list of layers, or the like: a PackedSequence is a tuple, too, but one tensor."""
    return isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence)


def _count(value: object) -> str:
    return f"{len(value)} layers" if is_list(value) else "one tensor"  # pyright: ignore[reportArgumentType]
