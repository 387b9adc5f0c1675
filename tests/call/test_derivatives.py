"""Derivatives of any order, and function transforms, of every kind of call, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

from fastreg import fused_ar_tar
from tests.calls import CALLS, MORE_CALLS, Call, calls, flat, from_seed, leaves
from tests.samples import DOUBLE

pytestmark = pytest.mark.slow

# vmap draws masks in its own way.
UNDRAWN = {name: call for name, call in (CALLS | MORE_CALLS).items() if not name.startswith(("drawn", "module"))}


def differentiable(call: Call) -> Call:
    """Return the results that have a gradient, from one seed."""
    return lambda *xs: tuple(x for x in flat(from_seed(call, [*xs])) if x.requires_grad)


@calls(of=CALLS | MORE_CALLS)
def test_gradients_of_any_order(call: Call, device: str) -> None:
    xs = leaves(4, DOUBLE, device)
    assert gradcheck(differentiable(call), xs, fast_mode=True)
    assert gradgradcheck(differentiable(call), xs, fast_mode=True)
    # A gradient with a graph that is wrong would be so consistently, which is no matter to gradgradcheck.
    results = differentiable(call)(*xs)
    grads = [torch.randn_like(x) if x.dim() else torch.full_like(x, 1000) for x in results]
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    got, want = (torch.autograd.grad(results, xs, grads, create_graph=graph, **options) for graph in (True, False))
    assert_close(got, want)


@calls(of=UNDRAWN)
def test_function_transforms(call: Call, device: str) -> None:
    """The derivatives along a direction and the curvature in it are also those of two backwards."""
    xs, others = leaves(4, DOUBLE, device), [x.flip(0) for x in leaves(4, DOUBLE, device)]
    points, directions = (tuple(x.detach() for x in pair) for pair in (xs, others))

    def loss(*xs: Any) -> Any:
        return torch.stack([x.sin().sum() for x in flat(from_seed(call, [*xs]))]).prod()

    def along(xs: Any) -> Any:
        return sum((x * direction).sum() for x, direction in zip(xs, directions, strict=True))

    options: Any = {"allow_unused": True, "materialize_grads": True, "create_graph": True}
    want, of_others = (torch.autograd.grad(loss(*pair), pair, **options) for pair in (xs, others))
    gradients = torch.func.grad(loss, (0, 1))
    assert_close(gradients(*points), want)
    both = [torch.stack(pair) for pair in zip(points, directions, strict=True)]
    assert_close(torch.func.vmap(gradients)(*both), tuple(map(torch.stack, zip(want, of_others, strict=True))))
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, points, directions)
        assert_close(forward_ad.unpack_dual(loss(*duals)).tangent, along(want))
    curvature = torch.func.jvp(gradients, points, directions)[1]
    assert_close(curvature, torch.autograd.grad(along(want), xs, allow_unused=True, materialize_grads=True))


def test_vmap_of_marks(device: str) -> None:
    raw, marks = torch.randn(3, 4, 7, 2, device=device), torch.rand(3, 4, 7, device=device) < 0.7
    got = torch.func.vmap(lambda x, valid: fused_ar_tar(x, x, 2.0, 1.0, valid=valid))(raw, marks)
    want = [fused_ar_tar(x, x, 2.0, 1.0, valid=valid) for x, valid in zip(raw, marks, strict=True)]
    assert_close(got, torch.stack(want))
