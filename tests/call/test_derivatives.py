"""Derivatives of any order, and function transforms, of every kind of call, in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

from fastreg import fused_ar_tar
from tests.calls import CALLS, MORE_CALLS, Call, calls, flat, from_seed, leaves, mask_for
from tests.exact import truth
from tests.samples import DOUBLE

pytestmark = pytest.mark.slow

by_call = calls(of=CALLS | MORE_CALLS)
# vmap draws masks in its own way.
UNDRAWN = {name: call for name, call in (CALLS | MORE_CALLS).items() if not name.startswith(("drawn", "module"))}


def differentiable(call: Call) -> Call:
    """Return the results that have a gradient, from one seed."""
    return lambda *xs: tuple(x for x in flat(from_seed(call, [*xs])) if x.requires_grad)


def scalar(call: Call) -> Call:
    return lambda *xs: torch.stack([x.sin().sum() for x in flat(from_seed(call, [*xs]))]).prod()


@by_call
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
    xs, others = leaves(4, DOUBLE, device), [x.flip(0) for x in leaves(4, DOUBLE, device)]
    loss = scalar(call)
    want = [torch.autograd.grad(loss(*pair), pair, allow_unused=True, materialize_grads=True) for pair in (xs, others)]
    got = torch.func.grad(loss, (0, 1))(*(x.detach() for x in xs))
    assert_close(got, want[0])
    both = [torch.stack(pair).detach() for pair in zip(xs, others, strict=True)]
    assert_close(
        torch.func.vmap(torch.func.grad(loss, (0, 1)))(*both), tuple(map(torch.stack, zip(*want, strict=True)))
    )


def tangent(f: Any, r: Tensor, d: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(r, d), d)).tangent


def of_batch(f: Any, r: Tensor, d: Tensor) -> Any:
    return torch.func.vmap(torch.func.grad(f, (0, 1)))(torch.stack([r, d]), torch.stack([d, r + d]))


TRANSFORMS: dict[str, Any] = {
    "dual": tangent,
    "hessian": lambda f, *xs: torch.func.hessian(f, (0, 1))(*xs),
    "vmap": of_batch,
}


def dropping(r: Tensor, d: Tensor) -> Tensor:
    dropped, penalty = CALLS["mask"](r, d)
    return penalty * dropped.sin().sum()


def formula_of_dropping(r: Tensor, d: Tensor) -> Tensor:
    dropped = r * d * mask_for(r)
    return truth(r * d, dropped, 2.0, 1.0).penalty * dropped.sin().sum()


@pytest.mark.parametrize(
    ("call", "formula"),
    [(CALLS["pair"], lambda r, d: truth(r, d, 2.0, 1.0).penalty), (dropping, formula_of_dropping)],
    ids=["pair", "dropping"],
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_more_function_transforms_as_of_the_formula(name: str, call: Any, formula: Any) -> None:
    xs, transform = [x.detach() for x in leaves(4, DOUBLE)], TRANSFORMS[name]
    run = functools.partial(transform, call)
    if name == "vmap":
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(run(*xs), transform(formula, *xs))


def test_vmap_of_marks(device: str) -> None:
    raw, marks = torch.randn(3, 4, 7, 2, device=device), torch.rand(3, 4, 7, device=device) < 0.7
    got = torch.func.vmap(lambda x, valid: fused_ar_tar(x, x, 2.0, 1.0, valid=valid))(raw, marks)
    want = [fused_ar_tar(x, x, 2.0, 1.0, valid=valid) for x, valid in zip(raw, marks, strict=True)]
    assert_close(got, torch.stack(want))
