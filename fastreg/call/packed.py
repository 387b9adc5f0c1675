"""Packed sequences: their rows, one sequence after another, are one sequence of many segments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad
from torch.nn.utils.rnn import PackedSequence

from fastreg.call import arguments
from fastreg.call.steps import GivenSteps
from fastreg.call.torch_state import has_values, observed, plain


class Orders(NamedTuple):
    """Hold the orders of the rows of a packed sequence.

    order, inverse  (rows,) the order that puts the rows of each sequence together, and its inverse
    lengths         (1,) the number of rows
    starts          (1, rows) whether a sequence starts
    """

    order: Tensor
    inverse: Tensor
    lengths: Tensor
    starts: Tensor


def by_sequence(
    raw: PackedSequence | None, dropped: PackedSequence | None
) -> tuple[Sequence[Tensor | None], GivenSteps]:
    """Return packed rows as `(1, rows, hidden)`, and which of them count.

    Args:
        raw: a packed sequence, or `None`.
        dropped: a packed sequence with the same batch sizes, or `None`.
    """
    packed: Any = dropped if raw is None else raw
    x, sizes = packed.data, plain(packed.batch_sizes)
    arguments.check_no_parts(x)
    arguments.check_not_captured("lengths", x.device)
    orders = _known_orders(tuple(sizes.tolist())) if has_values(sizes) else orders_of(sizes, x.shape[0])
    order, inverse = (y.to(x.device, non_blocking=True) for y in (orders.order, orders.inverse))
    given = [None if y is None else y.data for y in (raw, dropped)]
    layers = {id(y): y for y in given if y is not None}
    selected = {i: _selected(y, order, inverse).unsqueeze(0) for i, y in layers.items()}
    return [selected.get(id(y)) for y in given], GivenSteps(orders.lengths, None, orders.starts)


def _selected(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return rows in an order, whose inverse is known."""
    return x.index_select(0, order) if observed() else Selected.apply(x, order, inverse)


class Selected(Function):
    """Select rows by an order whose inverse is known: the gradient is selected, too.

    PyTorch would add the gradient up by `index_add`, which takes four times as long on a CPU. The order may repeat a
    row at its end, where no step counts and every gradient is 0; the inverse leaves these rows out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.orders = inverse, order
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _selected(grad, *ctx.orders), None, None


@lru_cache(maxsize=64)
def _known_orders(sizes: tuple[int, ...]) -> Orders:
    """Compute `orders_of` batch sizes, and remember them for the next layers and calls.

    The number of rows is rounded up to one of few numbers, so that few plans serve all calls.
    """
    with torch.inference_mode(False):
        order, inverse, lengths, starts = orders_of(torch.tensor(sizes, device="cpu"), sum(sizes))
        more = -len(order) % (1 << max(len(order).bit_length() - 5, 0))
        return Orders(pad(order, (0, more)), inverse, lengths, pad(starts, (0, more)))


def orders_of(sizes: Tensor, count: int) -> Orders:
    """Compute the order that puts the rows of each sequence together, its inverse, and where the sequences start.

    No shape depends on values, which a compiler does not know.

    Args:
        sizes: the batch sizes of a packed sequence.
        count: the number of its rows.
    """
    row = torch.arange(count, device=sizes.device)
    step = torch.searchsorted(sizes.cumsum(0), row, right=True)
    sequence = row - (sizes.cumsum(0) - sizes)[step]
    lengths = torch.zeros_like(row).scatter_add(0, sequence, torch.ones_like(row))
    inverse = (lengths.cumsum(0) - lengths)[sequence] + step
    starts = torch.zeros_like(row, dtype=torch.bool).scatter(0, inverse, step == 0)
    order = torch.zeros_like(row).scatter(0, inverse, row)
    return Orders(order, inverse, torch.ones_like(row).sum(0, keepdim=True), starts.unsqueeze(0))
