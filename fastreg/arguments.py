"""Every check of an argument, and every message.

What is wrong is a `TypeError` or a `ValueError` whose message names the argument, what was expected, and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.backends import is_memory, observed
from fastreg.problem import Coefficient, Layer, Problem, is_on, replaced, time_dim
from fastreg.view import Signature

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
HINT = " (an RNN gives its output and its state: pass the output)"


class Asked(NamedTuple):
    """What a call asks for: a problem, and the coefficients that are tensors, `None` where the problem has a number."""

    problem: Problem
    alpha: Tensor | None
    beta: Tensor | None


def check_problem(
    alpha: object, beta: object, batch_first: bool, reduction: str = "mean", measured: bool = False
) -> Asked:
    """Check coefficients, layout and reduction."""
    alpha, beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)
    check_flags(batch_first=batch_first)
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    alphas, betas = _split(alpha), _split(beta)
    return Asked(Problem(alphas[0], betas[0], batch_first, reduction, measured), alphas[1], betas[1])


def _split(value: Coefficient) -> tuple[float | None, Tensor | None]:
    return (None, value) if isinstance(value, Tensor) else (value, None)


def check_coefficient(name: str, value: Any) -> Coefficient:
    """Check a coefficient: a finite real number of at least 0, returned as a float, or a 0-dim tensor of such.

    The value of a tensor that is not on the CPU is not looked at, as that would wait for its device.
    """
    if isinstance(value, Tensor):
        return _check_scalar(name, value)
    compiling = torch.compiler.is_compiling()
    if compiling and not isinstance(value, (bool, int, float, str)) and hasattr(value, "item"):
        value = value.item()  # a compiler takes a NumPy scalar for an array
    elif type(value) is not float:
        _check_real(name, value)
        value = _as_float(value)
    if compiling:
        from torch.fx.experimental.symbolic_shapes import guard_or_true  # which imports sympy

        right = guard_or_true(value >= 0) and guard_or_true(value < math.inf)
        if right:
            torch._check(value * 1.0 >= 0)  # when the code runs; torch 2.11 drops a check of the value itself
            torch._check(value < math.inf)
    else:
        right = 0 <= value < math.inf
    if not right:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return value


def check_attribute(name: str, value: Any) -> Coefficient:
    """Check a coefficient that is kept: a tensor stays the one that somebody may change in place."""
    checked = check_coefficient(name, value)
    return value if isinstance(value, Tensor) else checked


def _check_scalar(name: str, value: Tensor) -> Tensor:
    if value.shape != () or value.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected a number or a 0-dim floating-point tensor, got {value.dtype} {_shape(value)}"
        )
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")
    value = keepable(plain(_check_dense(name, value)))
    if value.device.type == "cpu" and not observed() and is_memory(value) and not 0 <= value.item() < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value.item()}")
    return value


def check_probability(p: float) -> float:
    """Check that `p`, the probability to drop a unit, is from 0 to below 1, and return it as a float."""
    _check_real("p", p)
    value = _as_float(p)
    if not 0 <= value < 1:
        raise ValueError(f"p: expected a probability from 0 to below 1, got {p}")
    return value


def check_flags(**flags: object) -> None:
    """Check that arguments are true or false, given by their names."""
    for name, flag in flags.items():
        if flag is not True and flag is not False:
            raise TypeError(f"{name}: expected True or False, got {flag!r}")


class Named(NamedTuple):
    """An activation by the name that messages have for it; of packed rows with their batch sizes."""

    name: str
    tensor: Tensor
    batch_sizes: Tensor | None


def check_layers(raw: object, dropped: object, steps: Steps, asked: Asked) -> list[Layer]:
    """Pair the layers of `raw` and `dropped`; what no term reads is not looked at, and is `None`.

    What depends on shapes, dtypes and devices of one layer is left to `check_layer`, which can be remembered.
    """
    problem, alpha, beta = asked
    raws = _named("raw", raw) if _is_read(raw, problem.beta, problem.measured) else None
    kept = _named("dropped", dropped) if _is_read(dropped, problem.alpha, problem.measured) else None
    if raws is None or kept is None:
        pairs = [(x, None) for x in raws] if raws else [(None, y) for y in kept or []]
    else:
        if len(raws) != len(kept) or is_list(raw) != is_list(dropped):
            raise ValueError(
                f"raw and dropped: expected the same layers in both, got {_count(raw)} and {_count(dropped)}"
            )
        pairs = list(zip(raws, kept, strict=True))
        for x, y in pairs:
            _check_batch_sizes(x, y)
    if not pairs:
        return []
    first = (raws or kept)[0]  # pyright: ignore[reportOptionalSubscript]
    lengths, valid = steps
    if first.batch_sizes is not None:
        for name, given in ("lengths", lengths), ("valid", valid):
            if given is not None:
                raise ValueError(f"{name}: expected None, as a PackedSequence has lengths of its own")
    if len(pairs) > 1:
        for x in (*(raws or []), *(kept or [])):
            _check_alike(x, first)
    shared = lengths, first.batch_sizes, valid, None, alpha, beta
    return [Layer(None if x is None else x.tensor, None if y is None else y.tensor, *shared) for x, y in pairs]


class Steps(NamedTuple):
    """Which time steps count, as a call says it: the first so many of each sequence, or those that are marked."""

    lengths: Tensor | None
    valid: Tensor | None


def check_steps(lengths: object, valid: object) -> Steps:
    """Check lengths or marks of valid steps, of which a call has one at most."""
    if lengths is not None and valid is not None:
        raise ValueError("lengths and valid: expected one of them, got both")
    marks = torch.bool, *INTEGERS
    return Steps(
        None if lengths is None else check_integers("lengths", lengths),
        None if valid is None else _check_tensor_of("valid", valid, marks, "a bool or integer tensor"),
    )


def _is_read(activations: object, coefficient: float | None, measured: bool) -> bool:
    """Tell whether a term reads its activations: without any, one whose coefficient is 0 cannot be measured."""
    return is_on(coefficient) or (measured and activations is not None)


def check_layer(layer: Layer | Signature, problem: Problem, names: tuple[str, str] = ("raw", "dropped")) -> None:
    """Check the shapes, dtypes and devices of one layer's tensors, which may be given by their signature."""
    first: tuple[str, Any] | None = None
    for name, x in zip(names, (layer.raw, layer.dropped), strict=True):
        if x is None:
            continue
        _check_dtype(name, x)
        if len(x.shape) not in (2, 3):
            raise ValueError(
                f"{name}: expected (batch, time, hidden), (time, batch, hidden) with batch_first=False, "
                f"or (time, hidden), got {_shape(x)}"
            )
        if first is None:
            first = name, x
            continue
        if x.shape != first[1].shape:
            raise ValueError(f"{name}: expected the shape of {first[0]}, {_shape(first[1])}, got {_shape(x)}")
        _check_device(name, x, *first)
    if isinstance(layer, Layer) and getattr(layer.given(), "to_local", None) is not None and not layer.is_whole():
        raise TypeError(
            "raw and dropped: expected no DTensor with lengths or valid steps or packed; pass x.to_local() of each part"
        )
    if layer.lengths is not None:
        _check_steps("lengths", layer.lengths, layer.given(), problem)
    if layer.valid is not None:
        _check_steps("valid", layer.valid, layer.given(), problem)
    for name, x in ("alpha", layer.alpha), ("beta", layer.beta):
        if x is not None:
            _check_device(name, x, names[0] if layer.raw is not None else names[1], layer.given())


def _check_steps(name: str, given: Any, x: Any, problem: Problem) -> None:
    batch, time = _steps_of(x, problem)
    if name == "lengths":
        fits = given.shape == (batch,)
    else:
        fits = given.shape == (batch, time) or (len(x.shape) == 2 and given.shape == (time,))
    if not fits:  # only now: compiled code keeps a size that goes into a message as a constant
        expected = f"({batch},), one length a sequence"
        if name == "valid":
            expected = f"({batch}, {time}), batch and time steps" + ("" if problem.batch_first else ", in every layout")
        raise ValueError(f"{name}: expected shape {expected}, got {_shape(given)}")
    if given.device.type == "meta" != x.device.type:
        raise ValueError(f"{name}: expected a tensor on {x.device}, or another device with memory, got one on meta")


def _steps_of(x: Any, problem: Problem) -> tuple[int, int]:
    """Return how many sequences and time steps there are."""
    axis = time_dim(x, problem.batch_first)
    return 1 if len(x.shape) == 2 else x.shape[1 - axis], x.shape[axis]


def ready_steps(layer: Layer, problem: Problem) -> Layer:
    """Check the values of lengths and valid steps that are on the CPU, and bring them to where the activations are.

    Those on another device are not looked at, as that would wait for it.
    """
    lengths, valid, x = layer.lengths, layer.valid, layer.given()
    on_cpu = layer.batch_sizes is not None or any(
        [given is not None and given.device.type == "cpu" for given in (lengths, valid)]
    )
    # A compiler cannot ask whether a CUDA graph is captured, and captures its own with inputs that it copies.
    may_ask = x.device.type == "cuda" and not torch.compiler.is_compiling()
    if on_cpu and may_ask and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{'lengths' if valid is None else 'valid'}: expected them on the GPU, and no PackedSequence, while a CUDA "
            "graph is captured: the graph would go on reading memory of the CPU that is gone"
        )
    if valid is not None:
        return replaced(layer, valid=_ready_valid(valid, x, problem))
    if lengths is None:
        return layer
    if x.device.type == "cpu" != lengths.device.type:
        lengths = lengths.cpu()
    if lengths.device.type == "cpu" and lengths.shape[0] and not observed() and is_memory(lengths):
        time = x.shape[time_dim(x, problem.batch_first)]
        least, most = (int(n) for n in lengths.aminmax())
        if least < 0 or most > time:
            raise ValueError(
                f"lengths: expected from 0 to the {time} time steps there are, got {least if least < 0 else most}"
            )
    lengths = lengths.to(x.device, non_blocking=True).contiguous()
    return replaced(layer, lengths=lengths)


def _ready_valid(valid: Tensor, x: Tensor, problem: Problem) -> Tensor:
    """Check the values of valid steps that are on the CPU; return them as kernels read them."""
    if x.device.type == "cpu" != valid.device.type:
        valid = valid.cpu()
    if valid.dtype != torch.bool:
        if valid.device.type == "cpu" and valid.numel() and not observed() and is_memory(valid):
            least, most = (int(n) for n in valid.aminmax())
            if least < 0 or most > 1:
                raise ValueError(f"valid: expected 0 or 1, got {least if least < 0 else most}")
        valid = valid != 0
    return valid.to(x.device, non_blocking=True).reshape(_steps_of(x, problem)).contiguous()


def check_integers(name: str, x: object) -> Tensor:
    """Check for a dense tensor of integers; return it plain, as a copy if it is one that a backward may not keep."""
    return _check_tensor_of(name, x, INTEGERS, "an integer tensor")


def _check_tensor_of(name: str, x: object, dtypes: Sequence[torch.dtype], expected: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {expected}, got one of {x.dtype}")
    return keepable(plain(_check_dense(name, x)))


def check_tensor(name: str, x: object) -> Tensor:
    """Check for a dense tensor."""
    if isinstance(x, PackedSequence):
        raise TypeError(f"{name}: expected a tensor, got a PackedSequence; pad_packed_sequence gives one, and lengths")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}{HINT if isinstance(x, tuple) else ''}")
    return _check_dense(name, x)


def check_mask(mask: object, raw: Tensor, batch_first: bool) -> Tensor:
    """Check a dropout mask for `raw`, and return it expanded to its shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    _check_dense("mask", mask)
    one_row = list(raw.shape)
    one_row[time_dim(raw, batch_first)] = 1
    if mask.shape != raw.shape and list(mask.shape) != one_row:  # `in` would not compare symbolic sizes
        raise ValueError(f"mask: expected shape {tuple(one_row)} or that of raw, {_shape(raw)}, got {_shape(mask)}")
    if mask.dtype != raw.dtype:
        raise TypeError(f"mask: expected the dtype of raw, {raw.dtype}, got {mask.dtype}")
    _check_device("mask", mask, "raw", raw)
    if mask.requires_grad:
        raise ValueError("mask: expected a tensor that requires no gradient, got one that does")
    return keepable(plain(mask)).expand_as(raw)


def plain(x: Tensor) -> Tensor:
    """Return `x` without a subclass that only decorates it; one with a dispatcher of its own stays as it is."""
    if type(x) is Tensor or torch.compiler.is_compiling():  # which sees through one that only decorates
        return x
    dispatches = getattr(type(x), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)
    return x if dispatches else x.as_subclass(Tensor)


def keepable(x: Tensor) -> Tensor:
    """Return a copy of a tensor made in inference mode, which a backward could not keep."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def is_list(value: object) -> bool:
    """Tell whether `value` is a list of layers, or the like: a PackedSequence is a tuple, too, but one tensor."""
    return isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence)


def _named(name: str, value: object) -> Sequence[Named]:
    """Name the activations of each layer."""
    if isinstance(value, Tensor):
        return (Named(name, _check_dense(name, value), None),)
    if not isinstance(value, (list, tuple)):
        coefficient = "beta" if name == "raw" else "alpha"
        raise TypeError(
            f"{name}: expected a tensor, a PackedSequence, or a list or tuple of them, got {type(value).__name__}"
            + (f" (it may be None only where {coefficient} is 0)" if value is None else "")
        )
    if isinstance(value, PackedSequence):
        return (_packed(name, value),)
    if not value:
        raise ValueError(f"{name}: expected a tensor a layer, got an empty {type(value).__name__}")
    layers = [(f"{name}[{i}]", x) for i, x in enumerate(value)]
    return [
        _packed(label, x) if isinstance(x, PackedSequence) else Named(label, check_tensor(label, x), None)
        for label, x in layers
    ]


def _packed(name: str, x: PackedSequence) -> Named:
    """Check batch sizes, as what does not fit would be read past its end."""
    data = check_tensor(f"{name}.data", x.data)
    _check_dtype(f"{name}.data", data)
    if data.dim() != 2:
        raise ValueError(f"{name}.data: expected (rows, hidden), got {_shape(data)}")
    sizes = check_integers(f"{name}.batch_sizes", x.batch_sizes)
    if sizes.device.type != "cpu" and not (sizes.is_meta and data.is_meta):
        raise ValueError(f"{name}.batch_sizes: expected a tensor on the CPU, got one on {sizes.device}")
    # A copy, as kernels trust what was checked here, in the backward, too, and NumPy may share the memory.
    sizes, rows = sizes.to(torch.int64, copy=True, memory_format=torch.contiguous_format), data.shape[0]
    if not observed() and is_memory(sizes):
        fits = sizes.dim() == 1 and sizes.numel() > 0 and int(sizes.min()) > 0 and int(sizes.max()) <= rows
        if not fits or int(sizes.sum()) != rows or bool((sizes.diff() > 0).any()):
            raise ValueError(
                f"{name}.batch_sizes: expected sizes above 0 that never grow and add up to the {rows} rows, "
                f"got {sizes.tolist()}"
            )
    return Named(name, data, sizes)


def _check_batch_sizes(x: Named, y: Named) -> None:
    """Check that both are packed alike, or neither."""
    if (x.batch_sizes is None) != (y.batch_sizes is None):
        kinds = ["a tensor" if z.batch_sizes is None else "a PackedSequence" for z in (x, y)]
        raise TypeError(f"{y.name}: expected {kinds[0]}, as {x.name} is, got {kinds[1]}")
    if x.batch_sizes is None or y.batch_sizes is None or observed() or not is_memory(x.batch_sizes):
        return
    if not x.batch_sizes.equal(y.batch_sizes):
        raise ValueError(f"{y.name}: expected the batch_sizes of {x.name}, got others")


def _check_alike(x: Named, first: Named) -> None:
    """Check that a layer has the device, batch and time steps of the first."""
    _check_device(x.name, x.tensor, first.name, first.tensor)
    _check_batch_sizes(first, x)
    if first.batch_sizes is None and x.tensor.shape[:-1] != first.tensor.shape[:-1]:
        raise ValueError(
            f"{x.name}: expected the batch and time steps of {first.name}, of shape {_shape(first.tensor)}, "
            f"got {_shape(x.tensor)}{HINT}"
        )


def _check_device(name: str, x: Any, other: str, y: Any) -> None:
    if x.device != y.device:
        raise ValueError(f"{name}: expected a tensor on {y.device}, where {other} is, got one on {x.device}")


def _check_dtype(name: str, x: Any) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_dense(name: str, x: Tensor) -> Tensor:
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {'nested' if x.is_nested else x.layout}")
    return x


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")


def _as_float(value: Any) -> float:
    """Convert a number; one that is too large to be a float is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _shape(x: Any) -> str:
    return f"{tuple(x.shape)}"


def _count(value: object) -> str:
    return f"{len(value)} layers" if is_list(value) else "one tensor"  # pyright: ignore[reportArgumentType]
