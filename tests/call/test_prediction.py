"""The forward writes gradients for the upstream gradient that it expects; any other gives exact gradients, too."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.kernels.prediction import PATIENCE
from tests.calls import CALLS, Call, leaves, packed
from tests.conftest import INTERPRETED, memory_of, skip_on_formula
from tests.samples import BF16, DOUBLE, FLOAT, HALF

pytestmark = pytest.mark.numbers

UPSTREAM = [1.0, 1.0, 65536.0, -2.0, 0.0, -0.0, math.nan, math.nan]
UPSTREAM += [] if INTERPRETED else [0.5, 0.5, -0.0, -0.0, math.inf, 1e-30, 1.0]  # which takes long


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def assert_same_bits(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        assert torch.equal(bits(x), bits(y))


def alone(call: Any, upstream: Tensor, inputs: Any) -> list[Tensor]:
    """Return gradients that the backward has computed: with hooks on saved tensors the forward writes none."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        got = call()
    return [*torch.autograd.grad(got, inputs, upstream)]


KINDS: dict[str, Call] = {name: CALLS[name] for name in ("pair", "same", "lengths", "alpha0")}
KINDS["raw needs none"] = lambda r, d: fused_ar_tar(r.detach(), d, 2.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*[("pair", x) for x in (DOUBLE, HALF, BF16)], *[(kind, FLOAT) for kind in KINDS]], ids=str
)
def test_any_upstream_gradient_after_any_other(kind: str, dtype: torch.dtype, device: str) -> None:
    xs = leaves(7, dtype, device)
    call, inputs = functools.partial(KINDS[kind], *xs), xs[kind == "raw needs none" :]
    upstream = [torch.tensor(x, dtype=DOUBLE if dtype == DOUBLE else FLOAT, device=device) for x in UPSTREAM]
    wanted = [alone(call, grad, inputs) for grad in upstream]  # before all others, as each is expected after it
    for grad, want in zip(upstream, wanted, strict=True):
        assert_same_bits(torch.autograd.grad(call(), inputs, grad), want)


@pytest.mark.parametrize("which", ["raw", "dropped"])
def test_one_gradient_of_two_dtypes(which: str, device: str) -> None:
    """A program has the same items in the forward and the backward, although only one reads the other tensor."""
    raw, dropped = torch.randn(64, 512, device=device), torch.randn(64, 512, dtype=DOUBLE, device=device)
    leaf = (raw if which == "raw" else dropped).requires_grad_()
    call = functools.partial(fused_ar_tar, raw, dropped, 1.0, 1.0, reduction="sum", time_dim=0)
    for value in (1.0, 0.5):
        got = call()
        grad = torch.tensor(value, dtype=got.dtype, device=device)
        assert_same_bits(torch.autograd.grad(got, leaf, grad), alone(call, grad, (leaf,)))


def test_a_backward_that_was_expected_reads_no_activations(device: str) -> None:
    skip_on_formula(device)
    leaf, grad = leaves(7, device=device)[0], torch.tensor(3.0, device=device)
    want = alone(lambda: fused_ar_tar(leaf, leaf, 2.0, 1.0), grad, (leaf,))
    torch.autograd.grad(fused_ar_tar(leaf, leaf, 2.0, 1.0), leaf, grad)  # expected from now on
    got = fused_ar_tar(leaf, leaf, 2.0, 1.0)
    leaf.data.zero_()  # behind the back of autograd
    assert_same_bits(torch.autograd.grad(got, leaf, grad), want)


def test_graphs_in_flight(device: str) -> None:
    """Each graph has its own memory, and expects the upstream gradient of the backward before its forward."""
    raw, dropped = leaves(7, device=device)
    grad, other = torch.tensor([3.0, 5.0], device=device)

    def call() -> Tensor:
        return fused_ar_tar(raw, dropped, 2.0, 1.0)

    wanted = [alone(call, x, (raw, dropped)) for x in (grad, other)]
    graphs = []
    for x in (grad, other, grad, other):
        torch.autograd.grad(call(), (raw, dropped), x)
        graphs.append(call())
    returned: list[Tensor] = []
    for got, x, want in zip([*graphs, *graphs[::-1]], (grad, other) * 4, wanted * 4, strict=True):
        found = torch.autograd.grad(got, (raw, dropped), x, retain_graph=True)
        assert_same_bits(found, want)
        returned += [x.zero_() for x in found]  # the caller may change returned gradients
    assert len({x.data_ptr() for x in returned}) == len(returned)
    with torch.inference_mode():
        torch.autograd.grad(graphs[0], (raw, dropped), torch.tensor(7.0, device=device))
    torch.autograd.grad(call(), (raw, dropped), grad)
    late = call()
    grad.copy_(other)  # the forward has written gradients for the earlier value
    for got in (late, call()):
        assert_same_bits(torch.autograd.grad(got, (raw, dropped), grad), wanted[1])


@pytest.mark.parametrize("dropout", [False, True])
def test_an_input_or_a_mask_changed_in_place_is_an_error(dropout: bool, device: str) -> None:
    raw, changed = leaves(7, device=device)[0], torch.ones(3, 1, 8, device=device)
    if dropout:
        _, got = fused_dropout_ar_tar(raw, 0.4, 2.0, 1.0, mask=changed)
    else:
        changed = raw * 1
        got = fused_ar_tar(changed, changed, 2.0, 1.0)
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got.backward()


COPIES: dict[str, Callable[[Tensor], Any]] = {
    "packed": lambda x: fused_ar_tar(packed(x, [3, 3, 1]), packed(x, [3, 3, 1]), 2.0, 1.0),
    "moved": lambda x: fused_ar_tar(x[..., ::2], x[..., ::2], 2.0, 1.0),
    "moved, dropout": lambda x: fused_dropout_ar_tar(x[..., ::2], 0.4, 2.0, 1.0, mask=torch.ones(3, 1, 4).to(x))[1],
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("value", [1.0, 3.0])
def test_a_copied_input_may_change_in_place(name: str, value: float, device: str) -> None:
    skip_on_formula(device)
    leaf, grad = leaves(7, device=device)[0], torch.tensor(value, device=device)
    (want,) = torch.autograd.grad(COPIES[name](leaf), leaf, grad)
    changed = leaf * 1
    got = COPIES[name](changed)
    changed.mul_(2)
    assert_same_bits(torch.autograd.grad(got, leaf, grad), [want])


def test_hooks_and_checkpoints_keep_no_gradients(device: str) -> None:
    skip_on_formula(device)
    raw, dropped = (torch.randn(8, 7, 900, device=device, requires_grad=True) for _ in range(2))
    call = functools.partial(fused_ar_tar, raw, dropped, 2.0, 1.0)
    want = torch.autograd.grad(call(), (raw, dropped))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    for run, around in ((lambda: checkpoint(call, use_reentrant=False), nullcontext()), (call, hooks)):
        with around:
            allocated, got = memory_of(run, device)
        assert allocated < 0.5 * raw.nbytes
        assert_same_bits(torch.autograd.grad(got, (raw, dropped)), want)


def laid_out_anew(x: Tensor) -> Tensor:
    """Return a copy whose axes are in the opposite order in memory, with gaps between its elements."""
    return x.new_empty([*x.shape[::-1], 2])[..., 0].permute([*reversed(range(x.dim()))]).copy_(x)


# What a hook makes of a saved tensor, and the error; "" if the formula takes over
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "another layout": (laid_out_anew, ""),
    "other floats": (lambda x: x.double(), ""),
    "a row less": (lambda x: x[:-1], "shape"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_hooks_that_change_saved_tensors(name: str, device: str) -> None:
    skip_on_formula(device)
    raw, dropped = leaves(7, device=device)
    mask = torch.rand(3, 1, 8).to(device).expand(3, 7, 8)
    change, error = CHANGES[name]

    def both() -> list[Tensor]:
        out, penalty = fused_dropout_ar_tar(raw, 0.4, 2.0, 1.0, mask=mask, lengths=torch.tensor([7, 0, 3]))
        return [fused_ar_tar(raw, dropped, 2.0, 1.0), out.sum() + penalty]

    def gradients(x: Tensor) -> Any:
        return torch.autograd.grad(x, [raw, dropped], allow_unused=True, materialize_grads=True)

    want = [gradients(x) for x in both()]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, change):
        graphs = both()
    for graph, expected in zip(graphs, want, strict=True):
        if error:
            with pytest.raises(RuntimeError, match=error):
                gradients(graph)
        else:
            torch.testing.assert_close(gradients(graph), expected)


def takes_gradients_ahead(call: Callable[[], Tensor], x: Tensor, device: str) -> bool:
    """Return whether a forward writes the gradients of two tensors of one size."""
    allocated = memory_of(call, device)[0]
    assert not 0.5 * x.nbytes < allocated < 1.9 * x.nbytes
    return allocated > x.nbytes


def test_forwards_alone_form_no_gradients_until_a_backward_comes(device: str) -> None:
    skip_on_formula(device)
    raw, dropped = (torch.randn(8, 7, 900, device=device, requires_grad=True) for _ in range(2))
    call = functools.partial(fused_ar_tar, raw, dropped, 2.0, 1.0)
    want = torch.autograd.grad(call(), (raw, dropped))
    assert takes_gradients_ahead(call, raw, device)
    for _ in range(PATIENCE):
        call()
    assert not takes_gradients_ahead(call, raw, device)
    assert_same_bits(torch.autograd.grad(call(), (raw, dropped)), want)
    assert takes_gradients_ahead(call, raw, device)
    assert_same_bits(torch.autograd.grad(call(), (raw, dropped)), want)


def test_many_forwards_before_one_backward_form_all_gradients(device: str) -> None:
    """Layers, runs and accumulated batches keep their graphs until the backward."""
    skip_on_formula(device)
    raw, dropped = (torch.randn(8, 7, 900, device=device, requires_grad=True) for _ in range(2))
    call = functools.partial(fused_ar_tar, raw, dropped, 2.0, 1.0)
    for _ in range(2):
        graphs = [call() for _ in range(PATIENCE + 4)]
        assert takes_gradients_ahead(call, raw, device)
        torch.stack(graphs).sum().backward()
