"""Any layout as one view, and memory that the kernels write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg.kernels.view import Layout, allocate, layout_of
from fastreg.prepare import Options, calls_of
from fastreg.problem import Call, Kind
from fastreg.view import NARROW, Fold
from tests.samples import HALF, transposed
from tests.test_torch import deterministic

X = torch.randn(2, 5, 8)


@pytest.mark.parametrize(
    ("tensors", "batch_first", "sizes", "strides", "copied"),
    [
        ([X], True, (2, 5, 8), [(40, 8)], [False]),
        ([X], False, (1, 2, 40), [(8, 40)], [False]),
        ([X[0]], True, (1, 5, 8), [(8, 8)], [False]),
        ([X[:1]], True, (1, 5, 8), [(8, 8)], [False]),
        ([X.transpose(0, 1)], False, (2, 5, 8), [(40, 8)], [False]),
        ([X, X.transpose(0, 1).contiguous().transpose(0, 1)], True, (2, 5, 8), [(40, 8), (8, 16)], [False, False]),
        ([X[..., 1:7]], True, (2, 5, 6), [(40, 8)], [False]),
        ([X[..., ::2]], True, (2, 5, 4), [(20, 4)], [True]),
        ([X[..., :1]], True, (1, 5, 2), [(2, 2)], [True]),
        ([X[:1].expand(3, 5, 8)], True, (3, 5, 8), [(0, 8)], [False]),
        ([None, X], True, (2, 5, 8), [(0, 0), (40, 8)], [False, False]),
    ],
)
def test_view(
    tensors: Sequence[torch.Tensor | None], batch_first: bool, sizes: Any, strides: Any, copied: Sequence[bool]
) -> None:
    layouts = [None if x is None else layout_of(x) for x in tensors]
    first = next(x for x in tensors if x is not None)
    fold = Fold(layouts, Call(first, None, 2.0, 1.0, None, Kind(-2 if batch_first else -first.dim())))
    got = fold.view(())
    assert got[:3] == sizes
    assert [(0, 0) if x is None else (x.outer, x.time) for x in got.operands[: len(tensors)]] == strides
    read = fold.read(tensors)
    assert [x is not y for x, y in zip(read, tensors, strict=True)] == copied
    assert all(x is None or torch.equal(x, y) for x, y in zip(read, tensors, strict=True))


def laid_out(memory_order: str) -> Tensor:
    """Return `(batch, channels, time, height, width)` of 2, 3, 5, 4, 7 whose axes lie in memory in some order."""
    names = ["batch", "channels", "time", "height", "width"]
    order = [names.index(name) for name in memory_order.split()]
    return torch.randn([(2, 3, 5, 4, 7)[axis] for axis in order]).permute([order.index(axis) for axis in range(5)])


@pytest.mark.parametrize(
    ("x", "axis", "steps", "sizes", "copied"),
    [
        (laid_out("batch channels time height width"), 2, {}, (6, 5, 28), False),
        (laid_out("batch time channels height width"), 2, {}, (2, 5, 84), False),
        (laid_out("time batch channels height width"), 2, {}, (1, 5, 168), False),
        (laid_out("channels batch time height width"), -3, {}, (6, 5, 28), False),
        (laid_out("batch time height width channels"), 2, {}, (2, 5, 84), False),
        (laid_out("batch height time channels width"), 2, {}, (8, 5, 21), False),
        (laid_out("batch channels height width time"), 2, {}, (2, 5, 84), True),  # a lane would be one element
        # Lengths and marks are by batch and time: memory in which other axes come between them is copied.
        (torch.randn(2, 3, 5, 4), 2, {"lengths": torch.tensor([5, 3])}, (2, 5, 12), True),
        # Few time steps in a row are copied; many are read as they lie, on the CPU.
        (torch.randn(2, 3, NARROW - 1), -1, {}, (2, NARROW - 1, 3), True),
        (torch.randn(2, 3, NARROW), -1, {}, (6, NARROW, 1), False),
        (torch.randn(2, 3, 2 * NARROW)[..., ::2], -1, {}, (2, NARROW, 3), True),
        (torch.randn(2, 3, NARROW, device="meta"), -1, {}, (2, NARROW, 3), True),
        # Channels may share memory.
        (torch.randn(1, 1, 5, 4).expand(1, 3, 5, 4), 2, {}, (3, 5, 4), False),
    ],
)
def test_axes_fold(x: Tensor, axis: int, steps: dict[str, Any], sizes: tuple[int, ...], copied: bool) -> None:
    (call,) = calls_of((x, x), (2.0, 1.0), (steps.get("lengths"), None, None), Options(time_dim=axis))
    fold = Fold([layout_of(x)], call)
    assert fold.view(())[:3] == sizes
    assert (fold.read([x])[0] is not x) == copied


def test_a_copied_mask_of_one_row_still_is() -> None:
    raw, mask = torch.randn(2, 3, 40, 5), torch.randn(5, 1, 3, 2).permute(3, 2, 1, 0).expand(2, 3, 40, 5)
    layouts: Sequence[Layout] = layout_of(raw), layout_of(mask)
    fold = Fold(layouts, Call(raw, None, 2.0, 1.0))
    first, got = fold.read([raw, mask])
    assert first is raw
    assert got is not mask
    assert got.stride(2) == 0
    assert torch.equal(got, mask)


def test_memory_that_gets_written_is_not_filled_before() -> None:
    x = torch.zeros(2**25, 1, dtype=HALF)  # for this size the system allocates fresh memory, zeros
    with deterministic():
        assert torch.empty_like(x).isnan().all()
        assert not allocate(layout_of(x)).isnan().any()
    x = transposed(torch.zeros(3, 7, 12))
    with deterministic():
        assert allocate(layout_of(x)).stride() == x.stride()
