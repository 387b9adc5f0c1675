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


def twice(f: Any) -> Any:
    return lambda r, d: torch.stack([f(r, d), f(d, r)])


def tangent(f: Any, r: Tensor, d: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(r, d), d)).tangent


def of_batch(f: Any, r: Tensor, d: Tensor) -> Any:
    return torch.func.vmap(torch.func.grad(f, (0, 1)))(torch.stack([r, d]), torch.stack([d, r + d]))


TRANSFORMS: dict[str, Any] = {
    "vectorized_jacobian": lambda f, *xs: torch.autograd.functional.jacobian(twice(f), xs, vectorize=True),
    "dual": tangent,
    "hessian": lambda f, *xs: torch.func.hessian(f, (0, 1))(*xs),
    "vmap": of_batch,
    "jacrev": lambda f, *xs: torch.func.jacrev(twice(f), (0, 1))(*xs),
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
    if name in ("vmap", "jacrev"):
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(run(*xs), transform(formula, *xs))


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0)])
def test_vmap_of_marks(in_dims: tuple[int, int | None], device: str) -> None:
    raw = torch.randn(3, 4, 7, 2, device=device)
    marks = torch.rand(3, 4, 7, device=device) < 0.7
    given = marks[0] if in_dims[1] is None else marks
    got = torch.func.vmap(lambda x, valid: fused_ar_tar(x, x, 2.0, 1.0, valid=valid), in_dims)(raw, given)
    want = [fused_ar_tar(x, x, 2.0, 1.0, valid=v) for x, v in zip(raw, given.expand_as(marks), strict=True)]
    assert_close(got, torch.stack(want))


def test_second_derivatives_beside_a_layer_that_needs_none(device: str) -> None:
    first, second, kept = (torch.randn(3, 5, 8, dtype=DOUBLE, device=device) for _ in range(3))
    first.requires_grad_()
    results = []
    for alone in (False, True):
        raws, dropped = ([first], [first]) if alone else ([first, second], [first, kept])
        (gradient,) = torch.autograd.grad(fused_ar_tar(raws, dropped, 2.0, 1.0), first, create_graph=True)
        results.append((gradient, *torch.autograd.grad(gradient.square().sum(), first)))
    torch.testing.assert_close(*results)
