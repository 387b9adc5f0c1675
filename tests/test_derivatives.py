"""Derivatives of any order, and function transforms, of every kind of call, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

from fastreg import FusedRNNDropout, fused_ar_tar
from fastreg.problem import Layer, Problem
from fastreg.reference import ar_tar
from tests.calls import CALLS, MORE_CALLS, Call, calls, flat, from_seed, leaves, mask_for
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
def test_gradcheck(call: Call, device: str) -> None:
    xs = leaves(4, DOUBLE, device)
    assert gradcheck(differentiable(call), xs, fast_mode=True)
    assert gradgradcheck(differentiable(call), xs, fast_mode=True)


@by_call
def test_the_gradient_is_the_same_with_a_graph(call: Call, device: str) -> None:
    """A wrong one would be so consistently: it is no matter to gradgradcheck."""
    xs = leaves(7, DOUBLE, device)
    results = differentiable(call)(*xs)
    grads = [torch.randn_like(x) if x.dim() else torch.full_like(x, 1000) for x in results]
    got, want = (
        torch.autograd.grad(
            results, xs, grads, create_graph=graph, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for graph in (True, False)
    )
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, kind) for name in ("pair", "mask") for kind in ("vectorized jacobian", "dual", "hessian")],
        *[("pair", "compiled vmap"), ("mask", "compiled jacrev")],
    ],
)
def test_more_function_transforms_as_of_the_formula(name: str, kind: str) -> None:
    def transform(f: Any, r: Tensor, d: Tensor) -> Any:
        def twice(r: Tensor, d: Tensor) -> Tensor:
            return torch.stack([f(r, d), f(d, r)])

        if kind == "compiled vmap":
            return torch.func.vmap(torch.func.grad(f, (0, 1)))(torch.stack([r, d]), torch.stack([d, r + d]))
        if kind == "dual":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(f(forward_ad.make_dual(r, d), d)).tangent
        if kind == "vectorized jacobian":
            return torch.autograd.functional.jacobian(twice, (r, d), vectorize=True)
        if kind == "hessian":
            return torch.func.hessian(f, (0, 1))(r, d)
        return torch.func.jacrev(twice, (0, 1))(r, d)

    def formula(r: Tensor, d: Tensor) -> Tensor:
        raw, dropped = (r, d) if name == "pair" else (r * d, r * d * mask_for(r))
        penalty = ar_tar(Layer(raw, dropped), Problem(2.0, 1.0)).penalty
        return penalty * dropped.sin().sum() if name == "mask" else penalty

    def call(r: Tensor, d: Tensor) -> Tensor:
        if name != "mask":
            return CALLS[name](r, d)
        dropped, penalty = CALLS[name](r, d)
        return penalty * dropped.sin().sum()

    r, d = (x.detach() for x in leaves(4, DOUBLE))
    run = lambda r, d: transform(call, r, d)  # noqa: E731
    if "compiled" in kind:
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(run(r, d), transform(formula, r, d))


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0)])
def test_vmap_of_marks(in_dims: tuple[int, int | None], device: str) -> None:
    raw = torch.randn(3, 4, 7, 2, device=device)
    marks = torch.rand(3, 4, 7, device=device) < 0.7
    given = marks[0] if in_dims[1] is None else marks
    got = torch.func.vmap(lambda x, valid: fused_ar_tar(x, x, 2.0, 1.0, valid=valid), in_dims)(raw, given)
    want = [fused_ar_tar(x, x, 2.0, 1.0, valid=v) for x, v in zip(raw, given.expand_as(marks), strict=True)]
    assert_close(got, torch.stack(want))


def test_transforms_of_a_module(device: str) -> None:
    """With AR of raw no mask changes the penalty."""
    module = FusedRNNDropout(0.4, 2.0, 1.0, ar_of="raw")
    raw = leaves(7, DOUBLE, device)[0].detach()

    def call(x: Tensor) -> Tensor:
        module(x)
        return module.take().penalty  # pyright: ignore[reportOptionalMemberAccess]

    want = torch.func.grad(lambda x: ar_tar(Layer(x, x), Problem(2.0, 1.0)).penalty)(raw)
    assert_close(torch.func.grad(call)(raw), want)


def test_functional_call() -> None:
    module = nn.Sequential(nn.Linear(8, 8), FusedRNNDropout(0.4, 2.0, 1.0)).double()
    x = leaves(dtype=DOUBLE)[0].detach()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        out = torch.func.functional_call(module, parameters, x)
        return out.sin().sum() + module[1].take().penalty  # pyright: ignore

    parameters = dict(module.named_parameters())
    got = torch.func.grad(loss)({k: v.detach() for k, v in parameters.items()})
    assert_close(tuple(got.values()), torch.autograd.grad(loss(parameters), tuple(parameters.values())))
