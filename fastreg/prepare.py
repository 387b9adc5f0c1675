"""The changes that a call makes to its arguments: subclasses, conversions, copies, moves to the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import (
    check_batch_sizes,
    check_coefficient_value,
    check_lengths_values,
    check_marks_values,
    check_not_captured,
    check_same_batch_sizes,
    check_saved,
    check_time,
)
from fastreg.kernels.view import NOTHING, Layout, Values
from fastreg.problem import (
    Call,
    Coefficient,
    Layer,
    Problem,
    is_list,
    reads_dropped,
    reads_raw,
    rows_of,
    steps_of,
    time_dim_of,
)
from fastreg.reference import marked
from fastreg.torch_state import observed


def plain(x: Any) -> Any:
    """Return a tensor without a subclass that only decorates it; one with a dispatcher of its own is kept.

    Packed and listed tensors are replaced, too; everything else is returned unchanged.
    """
    # A compiler sees through such a subclass.
    if type(x) is Tensor or x is None or type(x) is float or torch.compiler.is_compiling():
        return x
    if isinstance(x, Tensor):
        dispatches = getattr(type(x), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)
        return x if dispatches else x.as_subclass(Tensor)
    if isinstance(x, PackedSequence):
        data = plain(x.data)
        return x if data is x.data else x._replace(data=data)
    return [plain(y) for y in x] if type(x) is list else tuple(plain(y) for y in x) if type(x) is tuple else x


def plain_pair(raw: Any, dropped: Any) -> tuple[Any, Any]:
    """Return raw and dropped without such subclasses; layers of both that are one tensor stay one."""
    if torch.compiler.is_compiling():  # which cannot ask whether two lists are one
        return raw, dropped
    kept = plain(raw)
    if dropped is raw:
        return kept, kept
    if is_list(raw) and is_list(dropped) and kept is not raw:
        known = {id(x): y for x, y in zip(raw, kept, strict=True)}
        return kept, type(dropped)(known[id(x)] if id(x) in known else plain(x) for x in dropped)
    return kept, plain(dropped)


def time_given(batch_first: Any, time_dim: Any) -> bool | int:
    """Return where time is: `batch_first`, `True` by default, or the axis as an int.

    Raises:
        TypeError, ValueError: either is of another type, or both are given.
    """
    if time_dim is None and (batch_first is None or batch_first is True):
        return True
    check_time(batch_first, time_dim)
    return False if time_dim is None else index(time_dim)  # a constant in compiled code, as int() does not make it


def coefficient(value: Any) -> Coefficient:
    """Convert a checked coefficient: a number to a float, a tensor to itself."""
    if isinstance(value, (float, Tensor)):
        return value
    if torch.compiler.is_compiling() and not isinstance(value, int):
        return value.item()  # a compiler takes a NumPy scalar for an array
    return float(value) if not torch.compiler.is_compiling() else value


def problem_of(call: Call) -> Problem:
    """Return the problem of checked arguments, without coefficients that are tensors."""
    alpha = None if isinstance(call.alpha, Tensor) else coefficient(call.alpha)
    beta = None if isinstance(call.beta, Tensor) else coefficient(call.beta)
    time_dim = time_dim_of(call.time_at)
    return Problem(alpha, beta, time_dim, call.reduction, call.measured, call.ar_of_raw)  # pyright: ignore[reportArgumentType]


def parts_of(call: Call, problem: Problem) -> list[tuple[Layer, Problem]]:
    """Pair the layers of raw and dropped, `None` where no term reads one, and the problem of each pair.

    Where dropped is raw itself it is `None`, too, and AR is that of raw.
    """
    raws = _tensors(call.raw) if reads_raw(call, problem) else None
    kept = _tensors(call.dropped) if reads_dropped(call, problem) else None
    if raws is None:
        return [(Layer(None, y), problem) for y in kept or ()]
    if kept is None:
        return [(Layer(x, None), problem) for x in raws]
    of_raw = Problem(problem.alpha, problem.beta, problem.time_dim, problem.reduction, problem.measured, True)
    return [(Layer(x, None), of_raw) if y is x else (Layer(x, y), problem) for x, y in zip(raws, kept, strict=True)]


def _tensors(activations: Any) -> list[Tensor]:
    """Return the tensor of each layer."""
    return [rows_of(x) for x in activations] if is_list(activations) else [rows_of(activations)]


def packed_in(call: Call, problem: Problem) -> list[tuple[str, PackedSequence]]:
    """Return the packed activations that a term reads, with their names."""
    found = []
    for name, given, read in ("raw", call.raw, reads_raw), ("dropped", call.dropped, reads_dropped):
        if read(call, problem):
            layers = [(f"{name}[{i}]", x) for i, x in enumerate(given)] if is_list(given) else [(name, given)]
            found += [(label, x) for label, x in layers if isinstance(x, PackedSequence)]
    return found


def values_of(call: Call, problem: Problem, x: Tensor, mark: Any = None) -> Values:
    """Check the values of coefficients, lengths and marks that are on the CPU, and bring them to activations `x`.

    Values on another device are not looked at, as that would wait for it. `mark` is a `steps` of a backend; with `None`
    plain PyTorch marks the steps.
    """
    alpha, beta = _scalar("alpha", call.alpha), _scalar("beta", call.beta)
    packed = packed_in(call, problem)
    if packed:
        check_not_captured("lengths", x.device)
        return Values(None, None, _offsets(packed), alpha, beta)
    if all_count(call):
        return Values(None, None, None, alpha, beta)
    lengths = None if call.lengths is None else _lengths(call.lengths, x, problem)
    valid = None if call.valid is None else _marks("valid", call.valid, x, problem)
    starts = None if call.starts is None else _marks("starts", call.starts, x, problem)
    steps, counts = (mark or partial(marked, steps_of(x, problem)))(lengths, valid, starts)
    return Values(steps, counts if problem.reduction == "mean" else None, None, alpha, beta)


def all_count(call: Call) -> bool:
    """Return whether a call has no argument that says which steps count."""
    return call.lengths is None and call.valid is None and call.starts is None


def values_like(call: Call, problem: Problem) -> Values:
    """Return values for a plan of a call: steps and counts without their numbers, and the offsets of packed rows."""
    packed = packed_in(call, problem)
    if packed:
        return Values(offsets=_offsets(packed))
    unknown = None if all_count(call) else torch.empty(0, device="meta")
    return Values(unknown, unknown if problem.reduction == "mean" else None)


class Reader:
    """Read the values of all calls of one plan, which have them in the same arguments.

    Args:
        call: one of them.
        problem: the terms.
        steps: class of the backend that marks the time steps that count.
        x: activations.
    """

    def __init__(self, call: Call, problem: Problem, steps: Any, x: Tensor) -> None:
        self.problem, self.mark = problem, None if all_count(call) else steps(steps_of(x, problem), x.device)
        coefficients = isinstance(call.alpha, Tensor) or isinstance(call.beta, Tensor)
        self.finds_any = coefficients or self.mark is not None or bool(packed_in(call, problem))

    def __call__(self, call: Call, x: Tensor) -> Values:
        """Check and read the values of a call, for activations `x`."""
        return values_of(call, self.problem, x, self.mark) if self.finds_any else NOTHING


def _scalar(name: str, value: Any) -> Tensor | None:
    if not isinstance(value, Tensor):
        return None
    check_coefficient_value(name, value)
    return keepable(value)


def _offsets(packed: list[tuple[str, PackedSequence]]) -> Tensor:
    """Return where each time step of packed rows begins, `(1 + time,)` int64, and at the end how many rows there are.

    Kernels trust them, in the backward, too: they are checked, and no view of batch sizes, which NumPy may share.
    """
    (first_name, first), *others = packed
    sizes = first.batch_sizes.long()
    check_batch_sizes(first_name, sizes, first.data.shape[0])
    for name, x in others:
        check_same_batch_sizes(name, x.batch_sizes, first_name, first.batch_sizes)
        check_batch_sizes(name, sizes, x.data.shape[0])
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def _lengths(lengths: Tensor, x: Tensor, problem: Problem) -> Tensor:
    lengths = keepable(lengths)
    if x.device.type == "cpu" != lengths.device.type:
        lengths = lengths.cpu()
    check_lengths_values(lengths, steps_of(x, problem)[1])
    return _queued("lengths", lengths, x.device).contiguous()


def _marks(name: str, marks: Tensor, x: Tensor, problem: Problem) -> Tensor:
    marks = keepable(marks)
    if x.device.type == "cpu" != marks.device.type:
        marks = marks.cpu()
    check_marks_values(name, marks)
    if marks.dtype != torch.bool:
        marks = marks != 0
    return _queued(name, marks, x.device).reshape(steps_of(x, problem)).contiguous()


def _queued(name: str, x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for the copy.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too:
    it is not freed before the device has read it, and the host does not wait.
    """
    if x.device.type == "cpu":
        check_not_captured(name, device)
    if x.device.type == "cpu" != device.type:
        if observed():  # a compiler cannot ask whether memory is pinned
            x = x.clone()
        elif x.is_pinned():
            x = torch.empty_like(x, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=True)


def restored(name: str, saved: Any, before: Layout | None) -> Any:
    """Return a saved tensor in the dtype of the forward, which its `data` or a hook on saved tensors may have changed.

    Args:
        name: of the argument that it was.
        saved: the tensor, or `None`.
        before: its layout in the forward.

    Raises:
        RuntimeError: it has another shape than in the forward.
    """
    if saved is None or before is None:
        return saved
    check_saved(name, before, saved)
    return saved if saved.dtype == before.dtype else saved.to(before.dtype)


def save(ctx: Any, tensors: Sequence[Tensor | None], values: Values) -> None:
    """Save tensors of a call for its backward, then the values, which most calls do not have, and their dtypes."""
    if values is NOTHING:
        ctx.save_for_backward(*tensors)
        ctx.dtypes = ()
    else:
        ctx.save_for_backward(*tensors, *values)
        ctx.dtypes = dtypes_of(values)


def dtypes_of(values: Values) -> Sequence[torch.dtype | None]:
    """Return the dtypes of values, for `restored_values`."""
    return [None if x is None else x.dtype for x in values]


def restored_values(values: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> Values:
    """Return saved values as kernels read them: contiguous, and in the dtypes of the forward.

    Args:
        values: as a backward unpacks them, after the hooks on saved tensors; none where there were none to save.
        dtypes: those of the forward.
    """
    if not values:
        return NOTHING
    pairs = zip(values, dtypes, strict=True)
    return Values(*[x if x is None or dtype is None else x.to(dtype).contiguous() for x, dtype in pairs])


def keepable(x: Tensor) -> Tensor:
    """Return a copy of a tensor made in inference mode, which a backward could not keep."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()
