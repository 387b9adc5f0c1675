"""Any axis of time, memory order, marks and starts, drawn at random, against the formulas in float64."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastreg import FusedRNNDropout, fused_ar_tar, fused_dropout_ar_tar
from fastreg.backends import cpu_tensors_by
from fastreg.kernels.view import NOTHING, layout_of
from fastreg.prepare import values_of
from fastreg.problem import Call, Layer, Problem
from fastreg.view import NARROW, fold_of, view_of
from tests.conftest import INTERPRETED, skip_on_formula
from tests.exact import check_dropout, check_penalty, spoil
from tests.samples import BF16, DOUBLE, FLOAT, HALF

CASES = 20 if INTERPRETED else 200


class Case(NamedTuple):
    """A call drawn from a seed."""

    raw: Tensor
    dropped: Tensor
    options: dict[str, Any]
    coefficients: tuple[float, float]


def memory(values: Tensor, draw: random.Random, expands: bool) -> Tensor:
    """Lay out values in any order of axes, with gaps of NaN, every other element, or one row for all."""
    dims = values.dim()
    order = draw.sample(range(dims), dims)
    wide = [n + (draw.choice([0, 0, 0, 1, 3])) for n in values.shape]
    step = [draw.choice([1, 1, 1, 1, 2]) for _ in values.shape]
    held = torch.full([wide[axis] * step[axis] for axis in order], torch.nan, dtype=values.dtype)
    x = held.permute([order.index(axis) for axis in range(dims)])
    for axis in range(dims):
        first = draw.randint(0, wide[axis] - values.shape[axis])
        x = x.narrow(axis, first * step[axis], values.shape[axis] * step[axis])
        x = x[(slice(None),) * axis + (slice(None, None, step[axis]),)]
    x.copy_(values)
    if expands:
        axis = draw.randrange(dims)
        x = x.narrow(axis, 0, 1).expand(values.shape)
    return x.detach()


def drawn(seed: int) -> Case:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dims = draw.choice([1, 2, 3, 3, 3, 4, 5])
    shape = [draw.choice([1, 2, 3, 4, 5, 8]) for _ in range(dims)]
    axis = draw.randrange(dims)
    shape[axis] = draw.choice([1, 2, 3, 5, 7, 20, 41, NARROW, 100 if dims < 4 else 9])
    if draw.random() < 0.2:
        shape[draw.randrange(dims)] = draw.choice([16, 33])
    batch = 0 if axis else 1 if dims > 2 else None
    sequences, time = 1 if batch is None else shape[batch], shape[axis]
    kinds = [FLOAT, FLOAT, HALF, DOUBLE, *([] if INTERPRETED else [BF16])]  # which the interpreter cuts off
    dtype = draw.choice(kinds)
    dtypes = dtype, dtype if draw.random() < 0.7 else draw.choice(kinds)
    options: dict[str, Any] = {
        "time_dim": axis - draw.choice([0, dims]),
        "reduction": draw.choice(["mean", "mean", "sum"]),
    }
    which = draw.choice(["none", "none", "lengths", "valid"])
    if which == "lengths":
        options["lengths"] = torch.tensor([draw.randint(0, time) for _ in range(sequences)])
    elif which == "valid":
        valid = torch.rand(sequences, time, generator=generator) < draw.choice([0.5, 0.9, 1.0])
        options["valid"] = draw.choice([lambda x: x, lambda x: x.long(), lambda x: x.t().contiguous().t()])(valid)
    if draw.random() < 0.5:
        starts = torch.rand(sequences, time, generator=generator) < draw.choice([0.05, 0.3, 1.0])
        starts = starts if batch is not None or draw.random() < 0.5 else starts[0]
        options["starts"] = starts if draw.random() < 0.7 else starts.int()
    tensors = []
    for own in dtypes:
        values = torch.randn(shape, generator=generator, dtype=DOUBLE).to(own)
        if draw.random() < 0.8:
            values = spoil(values, **options)
        tensors.append(memory(values, draw, expands=which == "none" and draw.random() < 0.05).requires_grad_())
    raw, dropped = tensors if draw.random() < 0.7 else tensors[:1] * 2
    coefficients = draw.choice([(2.0, 1.0), (2.0, 1.0), (0.0, 1.5), (2.0, 0.0)])
    return Case(raw, dropped, options, coefficients)


@pytest.mark.parametrize("seed", range(CASES))
def test_penalty_of_any_axes(seed: int) -> None:
    case = drawn(seed)
    check_penalty(case.raw, case.dropped, *case.coefficients, **case.options)


@pytest.mark.parametrize("seed", range(CASES))
def test_dropout_of_any_axes(seed: int) -> None:
    case, draw = drawn(seed), random.Random(-seed)
    shape = list(case.raw.shape)
    shape[case.options["time_dim"]] = draw.choice([1, shape[case.options["time_dim"]]])
    mask = memory(((torch.rand(shape) < 0.6) / 0.6).to(case.raw.dtype), draw, expands=False)
    arriving = memory(torch.randn_like(case.raw), draw, expands=draw.random() < 0.2)
    check_dropout(case.raw, mask, *case.coefficients, arriving=arriving, **case.options)


@pytest.mark.skipif(INTERPRETED, reason="the formula runs no kernel")
@pytest.mark.parametrize("seed", range(50))
def test_the_formula_of_any_axes(seed: int) -> None:
    with cpu_tensors_by(None):
        test_penalty_of_any_axes(seed)
        if drawn(seed).raw.dtype in (FLOAT, DOUBLE):  # PyTorch rounds each part of a gradient of fewer bits
            test_dropout_of_any_axes(seed)


@pytest.mark.parametrize(
    ("memory_order", "axis", "sizes", "copied"),
    [
        ("batch channels time height width", 2, (6, 5, 28), False),
        ("batch time channels height width", 2, (2, 5, 84), False),
        ("time batch channels height width", 2, (1, 5, 168), False),
        ("channels batch time height width", -3, (6, 5, 28), False),
        ("batch time height width channels", 2, (2, 5, 84), False),
        ("time width batch height channels", 2, (1, 5, 168), False),
        ("batch height time channels width", 2, (8, 5, 21), False),
        ("batch channels height width time", 2, (2, 5, 84), True),  # a lane would be a sequence of one element
    ],
)
def test_axes_fold_without_a_copy(memory_order: str, axis: int, sizes: tuple[int, ...], copied: bool) -> None:
    names = ["batch", "channels", "time", "height", "width"]
    order = [names.index(name) for name in memory_order.split()]
    shape = [2, 3, 5, 4, 7]
    x = torch.randn([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(5)])
    layout, layer = layout_of(x), Layer(x, None)
    fold = fold_of([layout], layer, Problem(0.0, 1.0, axis))
    assert view_of([layout], fold, layer.values)[:3] == sizes
    assert (fold.read(x) is not x) == copied
    assert copied or fold.like(layout).stride == x.stride()


@pytest.mark.parametrize("given", ["lengths", "valid", "starts"])
def test_steps_of_more_axes_have_sequences_of_the_first(given: str) -> None:
    """Marks are by batch and time: memory in which other axes come between them is copied."""
    x, marks = torch.randn(2, 3, 5, 4), torch.ones(2, 5) > 0
    steps: dict[str, Any] = {given: torch.tensor([5, 3]) if given == "lengths" else marks}
    call = Call(x, x, 2.0, 1.0, **steps, time_at=2)
    problem = Problem(2.0, 1.0, 2)
    layer = Layer(x, None, values_of(call, problem, x))
    fold = fold_of([layout_of(x)], layer, problem)
    assert view_of([layout_of(x)], fold, layer.values)[:3] == (2, 5, 12)
    assert fold.read(x) is not x


@pytest.mark.parametrize("time", [2, 17, NARROW])
def test_time_alone_in_memory(time: int) -> None:
    """Few steps in a row are copied; many are read as they lie, on the CPU."""
    x = torch.randn(2, 3, time)
    fold = fold_of([layout_of(x)], Layer(x, None), Problem(2.0, 1.0, -1))
    assert (fold.read(x) is not x) == (time < NARROW)
    apart = torch.randn(2, 3, 2 * time)[..., ::2]
    assert fold_of([layout_of(apart)], Layer(apart, None), Problem(2.0, 1.0, -1)).read(apart) is not apart
    elsewhere = fold_of([layout_of(x)], Layer(x.to("meta"), None), Problem(2.0, 1.0, -1))
    assert elsewhere.read(x) is not x


def test_channels_that_share_memory_are_read_in_place() -> None:
    x = torch.randn(1, 1, 5, 4).expand(1, 3, 5, 4)
    fold = fold_of([layout_of(x)], Layer(x, None), Problem(2.0, 1.0, 2))
    assert fold.read(x) is x
    assert view_of([layout_of(x)], fold, NOTHING)[:3] == (3, 5, 4)


def test_a_copied_mask_of_one_row_still_is() -> None:
    raw, mask = torch.randn(2, 3, 40, 5), torch.randn(5, 1, 3, 2).permute(3, 2, 1, 0).expand(2, 3, 40, 5)
    layouts = layout_of(raw), layout_of(mask)
    fold = fold_of(layouts, Layer(raw, None), Problem(2.0, 1.0, 2))
    assert fold.read(raw) is raw
    got = fold.read(mask)
    assert got is not mask
    assert got.stride(2) == 0
    assert torch.equal(got, mask)


def test_gradients_are_in_the_order_of_their_tensors(device: str) -> None:
    skip_on_formula(device)
    x = torch.randn(4, 7, 3, 2, 5, device=device).movedim(2, 1).requires_grad_()  # (batch, channels, time, ...)
    leaf = x.detach().requires_grad_()
    fused_ar_tar(leaf, leaf, 2.0, 1.0, time_dim=2).backward()
    assert leaf.grad is not None
    assert leaf.grad.stride() == leaf.stride()
    dropped, penalty = fused_dropout_ar_tar(x, 0.5, 2.0, 1.0, time_dim=2)
    assert dropped.stride() == x.stride()
    (gradient,) = torch.autograd.grad(dropped.sum() + penalty, x)
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("batch_first", [True, False])
def test_batch_first_is_one_of_two_axes(batch_first: bool, device: str) -> None:
    x, starts = torch.randn(3, 7, 5, device=device), torch.rand(3, 7, device=device) < 0.3
    starts = starts if batch_first else torch.rand(7, 3, device=device) < 0.3
    want = fused_ar_tar(x, x, 2.0, 1.0, batch_first=batch_first, starts=starts)
    axis = 1 if batch_first else 0
    for time_dim in (axis, axis - 3):
        assert torch.equal(fused_ar_tar(x, x, 2.0, 1.0, time_dim=time_dim, starts=starts), want)


def test_a_mask_is_drawn_of_one_row_for_all_time_steps(device: str) -> None:
    x = torch.ones(4, 3, 9, 2, device=device)
    dropped, _ = fused_dropout_ar_tar(x, 0.5, 2.0, 1.0, time_dim=2)
    assert torch.equal(dropped, dropped[:, :, :1].expand_as(x))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


def test_the_module_takes_integers_of_numpy(device: str) -> None:
    numpy = pytest.importorskip("numpy")
    x, taken = torch.randn(4, 3, 9, 2, device=device), []
    for time_dim in (2, numpy.int64(2)):
        module = FusedRNNDropout(0.5, 2.0, 1.0, time_dim=time_dim)
        torch.manual_seed(1)
        module(x)
        taken.append(module.take())
    torch.testing.assert_close(taken[1], taken[0])


def test_the_module(device: str) -> None:
    module = FusedRNNDropout(0.5, 2.0, 1.0, time_dim=-1)
    assert "time_dim=-1" in repr(module)
    x, starts = torch.randn(4, 3, 9, device=device), torch.rand(4, 9, device=device) < 0.3
    valid = torch.rand(4, 9, device=device) < 0.7
    torch.manual_seed(1)
    dropped = module(x, valid=valid, starts=starts)
    taken = module.take()
    assert taken is not None
    want = fused_ar_tar(x, dropped, 2.0, 1.0, time_dim=2, valid=valid, starts=starts)
    torch.testing.assert_close(taken.penalty, want)
    torch.manual_seed(1)
    other = FusedRNNDropout(0.5, 2.0, 1.0)
    turned = other(x.transpose(1, 2), None, valid, starts)
    last = other.take()
    assert last is not None
    torch.testing.assert_close(last.tar, taken.tar)
    assert turned.shape == (4, 9, 3)


def test_a_start_is_no_hole(device: str) -> None:
    """Two documents in a row have the penalty of separate ones; the first step of the second counts."""
    x, y = (torch.randn(1, n, 5, device=device) for n in (4, 6))
    starts = torch.zeros(1, 10, dtype=torch.bool, device=device)
    starts[0, 4] = True
    whole = fused_ar_tar(torch.cat([x, y], 1), None, 0.0, 1.0, starts=starts, reduction="sum")
    parts = sum(fused_ar_tar(z, None, 0.0, 1.0, reduction="sum") for z in (x, y))
    torch.testing.assert_close(whole, parts)
    whole = fused_ar_tar(None, torch.cat([x, y], 1), 1.0, 0.0, starts=starts)
    torch.testing.assert_close(whole, torch.cat([x, y], 1).square().mean())
