"""Any axis of time, memory order, marks and starts, drawn at random, against the formulas in float64."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import INTERPRETED, by_formula, skip_on_formula
from tests.exact import check_dropout, check_penalty, spoil
from tests.samples import BF16, DOUBLE, FLOAT, HALF

SEEDS = range(6, 20) if INTERPRETED else range(200)  # of smaller tensors than seed 5, which take 1 s in it


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
    shape[axis] = draw.choice([1, 2, 3, 5, 7, 20, 41, 64, 100 if dims < 4 else 9])
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


@pytest.mark.parametrize("seed", SEEDS)
def test_penalty_of_any_axes(seed: int) -> None:
    case = drawn(seed)
    check_penalty(case.raw, case.dropped, *case.coefficients, **case.options)


@pytest.mark.parametrize("seed", SEEDS)
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
    with by_formula():
        test_penalty_of_any_axes(seed)
        if drawn(seed).raw.dtype in (FLOAT, DOUBLE):  # PyTorch rounds each part of a gradient of fewer bits
            test_dropout_of_any_axes(seed)


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


def test_a_mask_is_drawn_of_one_row_for_all_time_steps(device: str) -> None:
    x = torch.ones(4, 3, 9, 2, device=device)
    dropped, _ = fused_dropout_ar_tar(x, 0.5, 2.0, 1.0, time_dim=2)
    assert torch.equal(dropped, dropped[:, :, :1].expand_as(x))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


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
