"""The ways to call fastreg that the tests of PyTorch's own features go through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from fastreg import FusedRNNDropout, fused_ar_tar, fused_dropout_ar_tar
from tests.samples import DOUBLE, FLOAT

Call = Callable[..., Any]  # of raw and dropped


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()  # PyTorch fills new memory in this mode
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Nothing(TorchDispatchMode):
    """A dispatch mode that changes nothing; fastreg runs the formula, so that modes see its operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def mask_for(x: Tensor) -> Tensor:
    kept = torch.arange(x.shape[2], device=x.device) % 3 > 0
    return (1.5 * kept).to(x.dtype).expand(x.shape[0], 1, x.shape[2])


def lengths_for(x: Tensor) -> Tensor:
    """Return the lengths for all steps, all but one, all but two, and so on."""
    return (x.shape[1] - torch.arange(x.shape[0], device=x.device)).clamp(min=0)


def marks_for(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[0] * x.shape[1], device=x.device) % 5 > 0).view(x.shape[:2])


def module_call(raw: Tensor, dropped: Tensor, alpha: Any = 2.0, beta: Any = 1.0, **options: Any) -> tuple[Tensor, ...]:
    module = FusedRNNDropout(0.4, alpha, beta, **options)
    out, taken = module(raw * dropped), module.take()
    assert taken is not None
    return out, *taken


def packed(x: Tensor, sizes: list[int]) -> PackedSequence:
    """Take the first rows of a tensor, of any number of axes, for packed ones."""
    return PackedSequence(x.flatten(0, -2)[: sum(sizes)], torch.tensor(sizes))


def packed_call(raw: Tensor, dropped: Tensor, alpha: Any = 2.0, beta: Any = 1.0) -> Tensor:
    """Take the first 7 rows for sequences of 3, 2 and 2 time steps."""
    return fused_ar_tar(packed(raw, [3, 3, 1]), packed(dropped, [3, 3, 1]), alpha, beta)


# Each takes raw and dropped, (3, time, 8), and coefficients, and gives tensors, those without a gradient last.
CALLS: dict[str, Call] = {
    "pair": lambda r, d, a=2.0, b=1.0: fused_ar_tar(r, d, a, b),
    "same": lambda r, d, a=2.0, b=1.0: fused_ar_tar(x := r + d, x, a, b),
    "layers": lambda r, d, a=2.0, b=1.0: fused_ar_tar([r, r * d], (d, d), a, b, return_terms=True),
    "alpha0": lambda r, d: fused_ar_tar(r, None, 0, 1.0) + fused_ar_tar(None, d, 2.0, 0, reduction="sum"),
    "time_first": lambda r, d, a=2.0, b=1.0: fused_ar_tar(
        r.transpose(0, 1), d.transpose(0, 1), a, b, batch_first=False
    ),
    "channels": lambda r, d, a=2.0, b=1.0: fused_ar_tar(r.transpose(1, 2), d.transpose(1, 2), a, b, time_dim=-1),
    "one_sequence": lambda r, d, a=2.0, b=1.0: fused_ar_tar(r[0], d[1], a, b, time_dim=0),
    "lengths": lambda r, d, a=2.0, b=1.0: fused_ar_tar(r, d, a, b, lengths=lengths_for(r)),
    "mask": lambda r, d, a=2.0, b=1.0: fused_dropout_ar_tar(r * d, 0.4, a, b, mask=mask_for(r)),
    "drawn": lambda r, d, a=2.0, b=1.0: fused_dropout_ar_tar(r * d, 0.4, a, b, return_terms=True),
    "evaluation": lambda r, d, a=2.0, b=1.0: fused_dropout_ar_tar(r * d, 0.4, a, b, training=False),
    "drawn_lengths": lambda r, d, a=2.0, b=1.0: fused_dropout_ar_tar(r * d, 0.4, a, b, lengths=lengths_for(r)),
    "module": module_call,
    "module_of_raw": functools.partial(module_call, ar_of="raw"),
}
# Further ones, for derivatives.
MORE_CALLS: dict[str, Call] = {
    "valid": lambda r, d: fused_ar_tar(r, d, 2.0, 1.0, valid=marks_for(r)),
    "marks_time_first": lambda r, d: fused_ar_tar(
        r.transpose(0, 1), d.transpose(0, 1), 2.0, 1.0, time_dim=0, valid=marks_for(r), starts=~marks_for(r).roll(2)
    ),
    "packed": packed_call,
    "tensors": lambda r, d: fused_ar_tar(r, d, *torch.tensor([2.0, 0.75], device=r.device).unbind()),
    "full_mask": lambda r, d: fused_dropout_ar_tar(
        r * d, 0.4, 2.0, 1.0, mask=mask_for(r) * marks_for(r).unsqueeze(-1).to(r.dtype)
    ),
    "mask_lengths": lambda r, d, a=2.0, b=1.0: fused_dropout_ar_tar(
        r * d, 0.4, a, b, mask=mask_for(r), lengths=lengths_for(r)
    ),
    "mask_tensors": lambda r, d: fused_dropout_ar_tar(
        r * d, 0.4, *torch.tensor([2.0, 0.75], device=r.device).unbind(), mask=mask_for(r)
    ),
    "module_of_ar": functools.partial(module_call, beta=0.0),
    "module_of_tar": functools.partial(module_call, alpha=0.0),
    "module_of_ar_of_raw": functools.partial(module_call, beta=0.0, ar_of="raw"),
    "module_of_nothing": functools.partial(module_call, alpha=0.0, beta=0.0),
}


def calls(*names: str, but: tuple[str, ...] = (), of: dict[str, Call] = CALLS) -> Any:
    names = names or tuple(name for name in of if name not in but)
    return pytest.mark.parametrize("call", [of[name] for name in names], ids=names)


def leaves(time: int = 5, dtype: torch.dtype = FLOAT, device: str = "cpu", batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(time)
    values = (torch.randn(batch, time, 8, generator=generator, dtype=DOUBLE) for _ in range(2))
    return [x.to(device, dtype).requires_grad_() for x in values]


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [x for part in results for x in flat(part)]


def total(results: Any) -> Tensor:
    """Return a loss of all results; its gradient hardly depends on the last digits of large results."""
    return sum((x.div(100).sin().sum() for x in flat(results) if x.requires_grad), torch.zeros(()))


def from_seed(call: Call, xs: list[Tensor]) -> Any:
    torch.manual_seed(3)
    return call(*xs)


def everything(call: Call, xs: list[Tensor]) -> list[Tensor]:
    """Return the results of a call, and the gradients of a loss made of them; from one seed."""
    results = from_seed(call, xs)
    gradients = torch.autograd.grad(total(results), xs, allow_unused=True, materialize_grads=True)
    return [*flat(results), *gradients]
