"""The ways to call fastreg that tests of several features go through, and what they give to these calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import BaseTorchDispatchMode

from fastreg import FusedRNNDropout, fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.key import PLANS
from fastreg.kernels.backend import Backend
from tests.conftest import DOUBLE, FLOAT

Call = Callable[..., Any]  # of raw and dropped
Nothing = BaseTorchDispatchMode  # it changes nothing; fastreg runs the formula, so that modes see its operators


class Decorated(Tensor):
    """A subclass without its own operators, as fastai has them."""


def transposed(x: Tensor) -> Tensor:
    """Swap batch and time in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()  # PyTorch fills new memory in this mode
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def cpu_tensors_by(backend: Backend | None) -> Iterator[None]:
    """Let another backend, or for `None` the formula, compute calls within the block."""
    PLANS.clear()
    try:
        with mock.patch("fastreg.call.operation.backend_for", return_value=backend):
            yield
    finally:
        PLANS.clear()


def mask_for(x: Tensor) -> Tensor:
    kept = torch.arange(x.shape[2], device=x.device) % 3 > 0
    return (1.5 * kept).to(x.dtype).expand(x.shape[0], 1, x.shape[2])


def lengths_for(x: Tensor) -> Tensor:
    """Return the lengths for all steps, all but one, all but two, and so on."""
    return (x.shape[1] - torch.arange(x.shape[0], device=x.device)).clamp(min=0)


def marks_for(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[0] * x.shape[1], device=x.device) % 5 > 0).view(x.shape[:2])


def packed(x: Tensor, sizes: list[int]) -> PackedSequence:
    """Take the first rows of a tensor, of any number of axes, for packed ones."""
    return PackedSequence(x.flatten(0, -2)[: sum(sizes)], torch.tensor(sizes))


# Each call takes raw and dropped, (3, time, 8), and coefficients, and gives tensors, those without a gradient last. An
# option that is a function makes its value from raw.


def made(options: dict[str, Any], raw: Tensor) -> dict[str, Any]:
    return {name: x(raw) if callable(x) else x for name, x in options.items()}


def pair(raw: Tensor, dropped: Tensor, alpha: Any = 2.0, beta: Any = 1.0, axes: Any = None, **options: Any) -> Any:
    """Exchange two axes before the call, if they are given."""
    xs = (raw, dropped) if axes is None else (raw.transpose(*axes), dropped.transpose(*axes))
    return fused_ar_tar(*xs, alpha, beta, **made(options, raw))


def dropout(raw: Tensor, dropped: Tensor, alpha: Any = 2.0, beta: Any = 1.0, **options: Any) -> Any:
    return fused_dropout_ar_tar(raw * dropped, 0.4, alpha, beta, **made(options, raw))


def module(raw: Tensor, dropped: Tensor, alpha: Any = 2.0, beta: Any = 1.0, **options: Any) -> tuple[Tensor, ...]:
    one = FusedRNNDropout(0.4, alpha, beta, **options)
    out, taken = one(raw * dropped), one.take()
    return out, *taken


def same(raw: Tensor, dropped: Tensor, alpha: Any = 2.0, beta: Any = 1.0) -> Tensor:
    x = raw + dropped
    return fused_ar_tar(x, x, alpha, beta)


def layers(raw: Tensor, dropped: Tensor, alpha: Any = 2.0, beta: Any = 1.0) -> tuple[Tensor, ...]:
    return fused_ar_tar([raw, raw * dropped], (dropped, dropped), alpha, beta, return_terms=True)


def terms_apart(raw: Tensor, dropped: Tensor) -> Tensor:
    return fused_ar_tar(raw, None, 0, 1.0) + fused_ar_tar(None, dropped, 2.0, 0, reduction="sum")


def of_packed(raw: Tensor, dropped: Tensor, alpha: Any = 2.0, beta: Any = 1.0) -> Tensor:
    """Take the first 7 rows for sequences of 3, 2 and 2 time steps."""
    return fused_ar_tar(packed(raw, [3, 3, 1]), packed(dropped, [3, 3, 1]), alpha, beta)


def of_tensors(call: Call, raw: Tensor, dropped: Tensor) -> Any:
    """Make a call with coefficients that are tensors."""
    return call(raw, dropped, *torch.tensor([2.0, 0.75], device=raw.device).unbind())


CALLS: dict[str, Call] = {
    "pair": pair,
    "same": same,
    "layers": layers,
    "alpha0": terms_apart,
    "time_first": partial(pair, axes=(0, 1), batch_first=False),
    "channels": partial(pair, axes=(1, 2), time_dim=-1),
    "lengths": partial(pair, lengths=lengths_for),
    "mask": partial(dropout, mask=mask_for),
    "drawn": partial(dropout, return_terms=True),
    "evaluation": partial(dropout, training=False),
    "drawn_lengths": partial(dropout, lengths=lengths_for),
    "module": module,
    "valid": partial(pair, valid=marks_for),
    "marks_time_first": partial(
        pair, axes=(0, 1), time_dim=0, valid=lambda x: marks_for(x).t(), starts=lambda x: ~marks_for(x).roll(2).t()
    ),
    "packed": of_packed,
    "tensors": partial(of_tensors, pair),
    "mask_lengths": partial(dropout, mask=mask_for, lengths=lengths_for),
    "mask_tensors": partial(of_tensors, partial(dropout, mask=mask_for)),
    "module_of_ar": partial(module, beta=0.0),
    "module_of_tar": partial(module, alpha=0.0),
    "module_of_nothing": partial(module, alpha=0.0, beta=0.0),
}


def calls(*names: str, but: tuple[str, ...] = ()) -> Any:
    """Parametrize a test by the named calls, or by all calls whose names do not begin with one of `but`."""
    names = names or tuple(name for name in CALLS if not name.startswith(but))
    return pytest.mark.parametrize("call", [CALLS[name] for name in names], ids=names)


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
