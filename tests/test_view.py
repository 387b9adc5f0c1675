"""Any layout as one view, and memory that the kernels write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg.fold import NARROW, Fold
from fastreg.kernels.view import Layout, Steps, allocate, layout_of
from fastreg.problem import Call, Kind, Place, sizes_of
from fastreg.reference import encoded
from tests.conftest import deterministic
from tests.samples import HALF, transposed

X = torch.randn(2, 5, 8)


def laid_out(memory_order: str) -> Tensor:
    """Return `(batch, channels, time, height, width)` of 2, 3, 5, 4, 7 whose axes lie in memory in some order."""
    names = ["batch", "channels", "time", "height", "width"]
    order = [names.index(name) for name in memory_order.split()]
    return torch.randn([(2, 3, 5, 4, 7)[axis] for axis in order]).permute([order.index(axis) for axis in range(5)])


@pytest.mark.parametrize(
    ("x", "options", "sizes", "copied"),
    [
        (X, {}, (2, 5, 8), False),
        (X, {"batch_first": False}, (1, 2, 40), False),
        (X[0], {}, (1, 5, 8), False),
        (X[:1], {}, (1, 5, 8), False),
        (X.transpose(0, 1), {"batch_first": False}, (2, 5, 8), False),
        (transposed(X), {}, (1, 5, 16), False),
        (X[..., 1:7], {}, (2, 5, 6), False),
        (X[..., ::2], {}, (2, 5, 4), True),
        (X[..., :1], {}, (1, 5, 2), True),
        (X[:1].expand(3, 5, 8), {}, (3, 5, 8), False),
        (laid_out("batch channels time height width"), {"time_dim": 2}, (6, 5, 28), False),
        (laid_out("batch time channels height width"), {"time_dim": 2}, (2, 5, 84), False),
        (laid_out("time batch channels height width"), {"time_dim": 2}, (1, 5, 168), False),
        (laid_out("channels batch time height width"), {"time_dim": -3}, (6, 5, 28), False),
        (laid_out("batch time height width channels"), {"time_dim": 2}, (2, 5, 84), False),
        (laid_out("batch height time channels width"), {"time_dim": 2}, (8, 5, 21), False),
        # A lane would be one element.
        (laid_out("batch channels height width time"), {"time_dim": 2}, (2, 5, 84), True),
        # Lengths and marks are by batch and time: memory in which other axes come between them is copied.
        (torch.randn(2, 3, 5, 4), {"time_dim": 2, "lengths": torch.tensor([5, 3])}, (2, 5, 12), True),
        # Few time steps in a row are copied; many are read as they lie, on the CPU.
        (torch.randn(2, 3, NARROW - 1), {"time_dim": -1}, (2, NARROW - 1, 3), True),
        (torch.randn(2, 3, NARROW), {"time_dim": -1}, (6, NARROW, 1), False),
        (torch.randn(2, 3, 2 * NARROW)[..., ::2], {"time_dim": -1}, (2, NARROW, 3), True),
        (torch.randn(2, 3, NARROW, device="meta"), {"time_dim": -1}, (2, NARROW, 3), True),
        # Channels may share memory.
        (torch.randn(1, 1, 5, 4).expand(1, 3, 5, 4), {"time_dim": 2}, (3, 5, 4), False),
    ],
)
def test_axes_fold(x: Tensor, options: dict[str, Any], sizes: tuple[int, ...], copied: bool) -> None:
    options, lengths = dict(options), options.get("lengths")
    options.pop("lengths", None)
    axis = Place(**options).axis() % x.dim() - x.dim()
    steps = None if lengths is None else Steps(*encoded(sizes_of(x, axis), lengths, None, None))
    fold = Fold([layout_of(x)], Call(x, None, 2.0, 1.0, steps, Kind(axis)))
    assert fold.view(())[:3] == sizes
    (read,) = fold.read([x])
    assert (read is not x) == copied
    assert x.is_meta or torch.equal(read, x)


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
    x, other = torch.zeros(2**25, 1, dtype=HALF), transposed(torch.zeros(3, 7, 12))
    with deterministic():
        assert torch.empty_like(x).isnan().all()
        assert not allocate(layout_of(x)).isnan().any()  # for this size the system allocates fresh memory, zeros
        assert allocate(layout_of(other)).stride() == other.stride()
